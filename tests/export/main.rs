//! Adapters and merged models as files, compared with llama.cpp applying the same adapters at run time.

mod adapter;
mod library;
mod loaded_back;
mod merge;
#[path = "../support/split.rs"]
mod split;

use std::path::{Path, PathBuf};

use detox_gguf::check::logits::exact_options;
use detox_gguf::engine::steering::LoraScaled;
use detox_gguf::engine::{Model, ModelOptions, Session, SessionOptions, Steering, Token};
use detox_gguf::gguf::{GgufFile, Metadata, Value};
use detox_gguf::train::output::{Adapter, Factors};

const TOKENS: [Token; 12] = [1, 60, 70, 80, 90, 100, 110, 120, 130, 61, 83, 105];

fn tiny_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("gguf/tiny").join(format!("{name}.gguf"))
}

fn tiny(name: &str) -> GgufFile {
    GgufFile::open(tiny_path(name)).unwrap()
}

/// The logits of a model with adapters, with an F32 cache and without flash attention.
fn logits(model: &Path, loras: &[LoraScaled]) -> Vec<Vec<f32>> {
    let model = Model::open(model, &ModelOptions::default()).unwrap();
    let steering = Steering { loras: loras.to_vec(), ..Steering::default() };
    let model = model.with_steering(steering).unwrap();
    // One thread: the models are too small to gain from more.
    let options = SessionOptions {
        n_parallel: Some(1),
        n_threads: Some(1),
        ..exact_options(&SessionOptions::default())
    };
    Session::open(&model, &options, 64).unwrap().logits(&TOKENS).unwrap()
}

fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!((a.len(), a[0].len()), (b.len(), b[0].len()));
    assert!(a.iter().chain(b).flatten().all(|x| x.is_finite()));
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Values from -0.5 to 0.5 that depend on the seed.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + 31 * seed + 1) * 7919 % 1009) as f32 - 504.0) / 1009.0).collect()
}

/// Factors for a tensor of `base`.
fn factors(base: &GgufFile, name: &str, rank: usize, seed: usize) -> Factors {
    let &[n_in, n_out] = base.tensor(name).unwrap().shape() else { panic!("{name} is not a matrix") };
    let (n_in, n_out) = (n_in as usize, n_out as usize);
    let (n_a, n_b) = if name == "token_embd.weight" { (n_out, n_in) } else { (n_in, n_out) };
    Factors {
        name: name.into(),
        n_in,
        n_out,
        rank,
        a: numbers(rank * n_a, seed),
        b: numbers(rank * n_b, seed + 1),
    }
}

fn provenance() -> Metadata {
    let mut metadata = Metadata::new();
    metadata.set("detox_gguf.test", Value::Str("yes".into()));
    metadata
}

fn write(adapter: &Adapter, path: &Path, base: &GgufFile) -> LoraScaled {
    adapter.write(path, base, &provenance()).unwrap();
    LoraScaled { path: path.to_path_buf(), scale: 1.0 }
}
