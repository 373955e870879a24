//! The plugin as programs use it: as a C library without llama.cpp, in C and Python programs with their own llama.cpp.
//!
//! Like `scripts/build_plugin.sh`, this needs a system with ELF libraries and a C compiler.
#![cfg(target_os = "linux")]

mod abi;
mod build;
mod example;
mod gate;
#[path = "../support/golden.rs"]
mod golden;
mod header;
mod library;
mod misuse;
mod overhead;
mod python;
mod sanitizer;
mod server;
#[path = "../support/real_model.rs"]
mod support;

use std::path::{Path, PathBuf};

use detox_gguf::engine::{CacheType, FlashAttention, Model, ModelOptions, Session, SessionOptions, Token};
use detox_gguf::gguf::GgufFile;
use detox_gguf::steer::SteerFile;
use detox_gguf::steer::compile::{CompileOptions, Route, compile};

const TOKENS: [Token; 9] = [1, 60, 70, 80, 90, 100, 110, 120, 130];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn tiny(name: &str) -> PathBuf {
    root().join("gguf/tiny").join(format!("{name}.gguf"))
}

/// The options with which the C example opens its context.
fn exact() -> SessionOptions {
    SessionOptions {
        n_parallel: Some(1),
        n_threads: Some(1),
        flash_attention: FlashAttention::Off,
        cache_type_k: CacheType::F32,
        cache_type_v: CacheType::F32,
        ..SessionOptions::default()
    }
}

/// Writes a file of interventions; each is the JSON `{"what": …, "edit": …}` without the braces.
fn interventions(folder: &Path, list: &[&str]) -> PathBuf {
    let path = folder.join("steer.json");
    let list = list.iter().map(|x| format!("{{{x}}}")).collect::<Vec<_>>().join(", ");
    let text = format!("{{\"detox_gguf\": \"interventions\", \"format\": 1, \"interventions\": [{list}]}}");
    std::fs::write(&path, text).unwrap();
    path
}

/// The engine's logits after the last of [`TOKENS`], steered by a file or unsteered.
fn engine_logits(model: &str, steer: Option<(&Path, f32)>, route: Route) -> Vec<f32> {
    engine_logits_of(&tiny(model), &TOKENS, steer, route, &exact())
}

/// As [`engine_logits`], for any model and tokens.
fn engine_logits_of(
    path: &Path,
    tokens: &[Token],
    steer: Option<(&Path, f32)>,
    route: Route,
    session: &SessionOptions,
) -> Vec<f32> {
    let mut loaded = Model::open(path, &ModelOptions::default()).unwrap();
    if let Some((file, coefficient)) = steer {
        let sources = [(SteerFile::open(file).unwrap(), coefficient)];
        let options = CompileOptions { route, ..CompileOptions::default() };
        let compiled = compile(&GgufFile::open(path).unwrap(), &sources, &[], &options).unwrap();
        loaded = loaded.with_steering(compiled.steering).unwrap();
    }
    Session::open(&loaded, session, 64).unwrap().logits(tokens).unwrap().pop().unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
