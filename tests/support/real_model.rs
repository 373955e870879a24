//! SmolLM2-135M-Instruct, for the tests that need a model that says something.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The model, fetched as the demo fetches it; `None`, said aloud, where it cannot be had outside CI.
pub fn real_model() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("DETOX_GGUF_TEST_MODEL") {
        return Some(path.into());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/fetch_model.py");
    let output = Command::new("python3").arg(script).arg("smollm2-135m-instruct-q4_1").output();
    let path = output.ok().filter(|o| o.status.success()).and_then(|o| String::from_utf8(o.stdout).ok());
    if path.is_none() {
        let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
        assert!(!ci, "the real model cannot be had");
        eprintln!("not run: the real model cannot be had; scripts/fetch_model.py says why");
    }
    path.map(|path| PathBuf::from(path.trim()))
}
