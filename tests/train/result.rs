//! llama.cpp computes the trainer's logits from the trained result.

use std::path::Path;

use detox_gguf::check::training::{Agreement, Expected, agreement};
use detox_gguf::gguf::{GgufFile, Metadata};
use detox_gguf::train::data::tokens::TokenPair;
use detox_gguf::train::device::cpu::Cpu;
use detox_gguf::train::model::config::Config;
use detox_gguf::train::output::artifact;
use detox_gguf::train::recipe::method::MethodName;
use detox_gguf::train::recipe::settings::Settings;
use detox_gguf::train::run::trainer::{Side, Trainer};

use super::{load, own_pairs, small_settings, tiny};

const ARCHITECTURES: [&str; 7] = ["llama", "command-r", "gpt2", "bloom", "gemma3", "qwen2", "qwen3"];

/// Bound in nats per token.
const KL: f64 = 1e-6;

fn agree(
    trainer: &Trainer<Cpu>,
    base: &GgufFile,
    settings: &Settings,
    path: &Path,
    pairs: &[&TokenPair],
) -> Agreement {
    let expected = Expected::of(trainer, settings.rounding(), pairs).unwrap();
    agreement(&expected, base, settings.method, path, 2).unwrap()
}

fn assert_agreement_before_and_after_training(method: MethodName) {
    let folder = tempfile::tempdir().unwrap();
    for name in ARCHITECTURES {
        let base = GgufFile::open(tiny(name)).unwrap();
        let pairs = own_pairs(name, 6);
        let pairs: Vec<&TokenPair> = pairs.iter().collect();
        let settings = Settings { method, ..small_settings() };
        let mut trainer = load(&base, &settings).unwrap();
        let references = trainer.logps(Side::Policy, &pairs).unwrap();
        for n_steps in [0, 4] {
            for _ in 0..n_steps {
                trainer.add_gradient(&pairs, &references).unwrap();
                trainer.step(0.02, settings.max_grad_norm).unwrap();
            }
            let path = folder.path().join(format!("{name}-{n_steps}.gguf"));
            artifact::write(&trainer, &base, &settings, &path, &Metadata::new()).unwrap();
            let found = agree(&trainer, &base, &settings, &path, &pairs[..3]);
            let what = format!("{name}, {method:?} after {n_steps} steps: {found:?}");
            assert!(found.difference.mean_kl < KL && found.difference.n_tokens > 30, "{what}");
            assert!(found.holds() && found.bound <= KL, "{what}");
            assert!(found.floor.mean_kl > 0.0, "{what}: the nudge had no effect");
            assert_eq!(found.untrained.is_some(), method != MethodName::Full);
            assert!(found.untrained.is_none_or(|untrained| untrained.difference.mean_kl < KL), "{what}");
            let policy = trainer.logps(Side::Policy, &pairs).unwrap();
            let moved = policy.iter().zip(&references).map(|(a, b)| (a.rejected - b.rejected).abs());
            let moved = moved.fold(0.0, f64::max);
            assert_eq!(moved > 0.1, n_steps > 0, "{what}: log-probabilities moved by {moved}");
        }
    }
}

#[test]
fn llama_cpp_computes_a_trained_adapter() {
    assert_agreement_before_and_after_training(MethodName::Lora);
}

#[test]
fn llama_cpp_computes_trained_directions() {
    assert_agreement_before_and_after_training(MethodName::Vector);
}

#[test]
fn llama_cpp_computes_a_fully_trained_model() {
    assert_agreement_before_and_after_training(MethodName::Full);
}

#[test]
fn llama_cpp_computes_trained_embeddings_and_output() {
    let folder = tempfile::tempdir().unwrap();
    let (base, pairs) = (GgufFile::open(tiny("llama")).unwrap(), own_pairs("llama", 6));
    let pairs: Vec<&TokenPair> = pairs.iter().collect();
    let targets = ["q", "embed", "output"].map(str::to_owned).to_vec();
    let settings = Settings { targets, ..small_settings() };
    let mut trainer = load(&base, &settings).unwrap();
    let references = trainer.logps(Side::Reference, &pairs).unwrap();
    for _ in 0..4 {
        trainer.add_gradient(&pairs, &references).unwrap();
        trainer.step(0.02, settings.max_grad_norm).unwrap();
    }
    let path = folder.path().join("adapter.gguf");
    artifact::write(&trainer, &base, &settings, &path, &Metadata::new()).unwrap();
    let found = agree(&trainer, &base, &settings, &path, &pairs);
    assert!(found.difference.mean_kl < KL, "{found:?}");
}

#[test]
fn a_result_from_an_earlier_step_does_not_agree() {
    let folder = tempfile::tempdir().unwrap();
    let (base, pairs) = (GgufFile::open(tiny("llama")).unwrap(), own_pairs("llama", 6));
    let pairs: Vec<&TokenPair> = pairs.iter().collect();
    for method in [MethodName::Lora, MethodName::Vector, MethodName::Full] {
        let settings = Settings { method, ..small_settings() };
        let mut trainer = load(&base, &settings).unwrap();
        let references = trainer.logps(Side::Policy, &pairs).unwrap();
        let path = folder.path().join(artifact::file_name(method));
        for step in 0..4 {
            trainer.add_gradient(&pairs, &references).unwrap();
            trainer.step(0.01, settings.max_grad_norm).unwrap();
            // Write the result too early.
            if step == 0 {
                artifact::write(&trainer, &base, &settings, &path, &Metadata::new()).unwrap();
            }
        }
        let found = agree(&trainer, &base, &settings, &path, &pairs);
        assert!(!found.holds(), "{method:?}: {found:?}");
        let error = found.verify(&path).unwrap_err().to_string();
        assert!(error.contains("llama.cpp does not reproduce the trained model: "), "{error}");
        assert!(error.contains("expected a mean KL up to 1.0e-6 a token, "), "{error}");
        assert!(error.contains(", found "), "{error}");
    }
}

#[test]
fn llama_cpp_computes_an_adapter_on_a_quantised_base_within_its_noise() {
    let folder = tempfile::tempdir().unwrap();
    let (base, pairs) = (GgufFile::open(tiny("llama-q8_0")).unwrap(), own_pairs("llama-q8_0", 8));
    let pairs: Vec<&TokenPair> = pairs.iter().collect();
    for products in [
        detox_gguf::train::recipe::products::Products::Exact,
        detox_gguf::train::recipe::products::Products::Fast,
    ] {
        let settings = Settings { products, ..small_settings() };
        let mut trainer = load(&base, &settings).unwrap();
        let references = trainer.logps(Side::Reference, &pairs).unwrap();
        let untrained = folder.path().join("untrained.gguf");
        artifact::write(&trainer, &base, &settings, &untrained, &Metadata::new()).unwrap();
        for _ in 0..4 {
            trainer.add_gradient(&pairs, &references).unwrap();
            // A learning rate of 0.02 makes a model whose logits move by 12 after a single rounding.
            trainer.step(0.005, settings.max_grad_norm).unwrap();
        }
        let path = folder.path().join("adapter.gguf");
        artifact::write(&trainer, &base, &settings, &path, &Metadata::new()).unwrap();
        let found = agree(&trainer, &base, &settings, &path, &pairs);
        assert!(found.holds(), "{products:?}: {found:?}");
        let other = agree(&trainer, &base, &settings, &untrained, &pairs);
        assert!(!other.holds(), "the untrained adapter agrees: {other:?}");
    }
}

/// A change to the trainer's model that llama.cpp's model does not have.
type Fault = fn(&mut Config);

/// Faults by description; each comment is the mean KL before training on `llama-q8_0`.
const FAULTS: [(&str, Fault); 4] = [
    // 4.9e-2
    ("logits scaled by 1.2", |config| config.logit_scale *= 1.2),
    // 4.4e-2
    ("attention scores scaled by 1.2", |config| config.attention.iter_mut().for_each(|a| a.scale *= 1.2)),
    // 0.43
    ("rotary frequencies halved", |config| {
        let all = config.rope.iter_mut().flatten().flat_map(|rope| rope.frequencies.iter_mut());
        all.for_each(|frequency| *frequency *= 0.5);
    }),
    // 0.73
    ("a norm epsilon of 1", |config| config.norm.epsilon *= 1e5),
];

#[test]
fn a_trainer_that_computes_another_model_does_not_agree_on_quantised_weights() {
    let folder = tempfile::tempdir().unwrap();
    let (base, pairs) = (GgufFile::open(tiny("llama-q8_0")).unwrap(), own_pairs("llama-q8_0", 8));
    let pairs: Vec<&TokenPair> = pairs.iter().collect();
    let settings = small_settings();
    let mut n_formerly_excused = 0;
    for (fault, change) in FAULTS {
        let mut trainer = load(&base, &settings).unwrap();
        change(&mut trainer.transformer.config);
        let references = trainer.logps(Side::Reference, &pairs).unwrap();
        for _ in 0..4 {
            trainer.add_gradient(&pairs, &references).unwrap();
            trainer.step(0.005, settings.max_grad_norm).unwrap();
        }
        let path = folder.path().join("adapter.gguf");
        artifact::write(&trainer, &base, &settings, &path, &Metadata::new()).unwrap();
        let found = agree(&trainer, &base, &settings, &path, &pairs);
        assert!(!found.holds(), "{fault}: {found:?}");
        let error = found.verify(&path).unwrap_err().to_string();
        assert!(error.contains("disagree about the model even before training"), "{fault}: {error}");
        // A difference of up to 0.1 before training used to excuse twice as much after it.
        let untrained = found.untrained.unwrap().difference.mean_kl;
        let was_excused = untrained <= 0.1 && found.difference.mean_kl <= 2.0 * untrained;
        n_formerly_excused += usize::from(was_excused);
    }
    assert!(n_formerly_excused >= 2, "{n_formerly_excused} faults passed the former bound");
}
