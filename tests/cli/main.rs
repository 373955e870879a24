//! Runs the program like a user: files, messages, exit codes.

mod bad_input;
mod compare;
mod directions;
mod eval;
mod export;
#[cfg(unix)]
mod files;
mod formats;
mod outputs;
mod pairs;
mod perplexity;
mod real_model;
mod resume;
mod rows;
mod runtime;
mod score;
mod steering;
#[path = "../support/real_model.rs"]
mod support;
mod train;
mod verify;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use assert_cmd::Command;

fn detox() -> Command {
    let mut command = Command::cargo_bin("detox-gguf").unwrap();
    command.env("NO_COLOR", "1").env_remove("RUST_LOG");
    command
}

fn tiny(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("gguf/tiny").join(name)
}

/// A small evaluation of a tiny model: 3 prompts in each of 2 languages, in 3 units of 2 prompts each.
fn small_eval(output: &Path) -> Command {
    let mut command = detox();
    command.args([
        "eval", "--lang", "en,de", "--limit", "3", "-k", "4", "-n", "6", "-np", "2", "-t", "1", "-s", "5",
    ]);
    command.arg("-m").arg(tiny("llama.gguf")).arg("-o").arg(output);
    command
}

/// File names and contents of a folder.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// Names of the files that differ between two folders.
fn differing(a: &Path, b: &Path) -> Vec<String> {
    let (a, b) = (contents(a), contents(b));
    let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    names.into_iter().filter(|name| a.get(*name) != b.get(*name)).cloned().collect()
}

/// Rows of a JSON-lines file.
fn rows(path: &Path) -> Vec<serde_json::Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Runs a command that must fail. Returns its exit code and standard error.
fn failure(command: &mut Command) -> (i32, String) {
    let output = command.assert().failure().get_output().clone();
    (output.status.code().expect("it was not killed by a signal"), String::from_utf8(output.stderr).unwrap())
}
