//! A whole step. In tests, new buffers hold NaN, so that reading one too early shows.

use std::path::Path;

use crate::gguf::GgufFile;
use crate::train::data::tokens::TokenPair;
use crate::train::device::cpu::{Cpu, Products};
use crate::train::recipe::method::MethodName;
use crate::train::recipe::settings::Settings;
use crate::train::run::trainer::{Side, Trainer};

#[test]
fn a_step_reads_no_buffer_before_it_is_written() {
    let pair = |prompt: &[i32], chosen: &[i32], rejected: &[i32]| TokenPair {
        index: 0,
        prompt: prompt.to_vec(),
        chosen: chosen.to_vec(),
        rejected: rejected.to_vec(),
    };
    // The second pair has an answer without a row.
    let pairs = [pair(&[1, 60, 70], &[80, 90, 2], &[61, 2]), pair(&[1, 83], &[2], &[105, 60, 70, 2])];
    let pairs: Vec<&TokenPair> = pairs.iter().collect();
    for name in ["llama", "command-r", "gpt2", "bloom", "gemma3", "qwen3", "llama-q8_0"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("gguf/tiny/{name}.gguf"));
        let file = GgufFile::open(&path).unwrap();
        for (method, products) in [
            (MethodName::Lora, Products::Exact),
            (MethodName::Lora, Products::Fast),
            (MethodName::Vector, Products::Exact),
            (MethodName::Full, Products::Exact),
        ] {
            if method == MethodName::Full && name == "llama-q8_0" {
                continue;
            }
            for checkpointing in [false, true] {
                let what = format!("{name}, {method:?}, {products:?}, checkpointing {checkpointing}");
                let settings = Settings { method, products, rank: 4, n_threads: 2, ..Settings::paper() };
                let device = Cpu::new(settings.n_threads, products).unwrap();
                let options = settings.step_options();
                let mut trainer = Trainer::load(device, &file, &settings.method(), 3, options).unwrap();
                trainer.set_checkpointing(checkpointing);
                let references = trainer.logps(Side::Policy, &pairs).unwrap();
                let costs = trainer.add_gradient(&pairs, &references).unwrap();
                assert!(
                    costs.iter().all(|(_, loss)| (loss.loss - std::f64::consts::LN_2).abs() < 1e-12),
                    "{what}"
                );
                let norm = trainer.step(1e-4, 10.0).unwrap();
                assert!(norm.is_finite() && norm > 0.0, "{what}: {norm}");
                let moved = trainer.logps(Side::Policy, &pairs).unwrap();
                assert!(moved != references, "{what}: the step changed nothing");
            }
        }
    }
}
