//! The result of a run on a GPU, compared with the trainer in llama.cpp.

use std::sync::atomic::AtomicBool;

use detox_gguf::check::training::{Expected, agreement};
use detox_gguf::gguf::{GgufFile, Metadata};
use detox_gguf::train::data::tokens::TokenPair;
use detox_gguf::train::device::name::Rounding;
use detox_gguf::train::device::name::{DeviceName, Frozen};
use detox_gguf::train::output::artifact;
use detox_gguf::train::recipe::method::MethodName;
use detox_gguf::train::recipe::settings::Settings;
use detox_gguf::train::run::{RunFiles, run};

use super::{Silent, gpu, load, own_pairs, settings, tiny};

#[test]
fn llama_cpp_agrees_with_the_trainer_within_the_bound_of_bf16() {
    let Some(_turn) = gpu() else { return };
    for (name, method, frozen) in [
        ("llama", MethodName::Lora, Frozen::Bf16),
        ("llama-q8_0", MethodName::Lora, Frozen::Quantised),
        ("gemma3", MethodName::Lora, Frozen::Bf16),
        ("bloom", MethodName::Vector, Frozen::Bf16),
        ("gpt2", MethodName::Full, Frozen::Bf16),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            method,
            device: DeviceName::Cuda(0),
            frozen: Some(frozen),
            max_steps: Some(2),
            ..settings()
        };
        assert_eq!(settings.rounding(), Rounding::Bf16);
        let pairs = own_pairs(name, 5);
        let base = GgufFile::open(tiny(name)).unwrap();
        let mut trainer = load(name, &settings, frozen);
        let files = RunFiles::of(folder.path());
        run(&mut trainer, &pairs, &settings, &files, &AtomicBool::new(false), &mut Silent).unwrap();
        let path = folder.path().join(artifact::file_name(method));
        artifact::write(&trainer, &base, &settings, &path, &Metadata::new()).unwrap();
        let compared: Vec<&TokenPair> = pairs.iter().take(2).collect();
        let expected = Expected::of(&trainer, settings.rounding(), &compared).unwrap();
        let found = agreement(&expected, &base, method, &path, 2).unwrap();
        println!("{name}: mean KL {:.1e}, bound {:.1e}", found.difference.mean_kl, found.bound);
        assert!(found.holds(), "{name}, {method:?}: {found:?}");
    }
}
