//! SmolLM2-135M-Instruct, for tests that need a model that writes real text.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Downloads the model, or uses `DETOX_GGUF_TEST_MODEL`. If that fails, panics in CI, and elsewhere prints a note and
/// returns `None`.
pub fn real_model() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("DETOX_GGUF_TEST_MODEL") {
        return Some(path.into());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/fetch_model.py");
    let output = Command::new("python3").arg(script).arg("smollm2-135m-instruct-q4_1").output();
    let path = output.ok().filter(|o| o.status.success()).and_then(|o| String::from_utf8(o.stdout).ok());
    if path.is_none() {
        let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
        assert!(!ci, "cannot download the real model");
        eprintln!("skipped: cannot download the real model; run scripts/fetch_model.py to see why");
    }
    path.map(|path| PathBuf::from(path.trim()))
}
