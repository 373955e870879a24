//! Runs `examples/python/steer.py` with llama-cpp-python, which brings its own build of llama.cpp.

use std::process::Command;

use detox_gguf::steer::compile::Route;

use super::build::{PLUGIN, run};
use super::{TOKENS, engine_logits, interventions, largest_difference, root, tiny};

/// Path of a Python that has llama-cpp-python. With `CI=true`, `scripts/test.sh` prepares one.
const PYTHON: &str = "DETOX_GGUF_TEST_PYTHON";

#[test]
fn the_python_example_steers_as_the_engine_does() {
    let Ok(python) = std::env::var(PYTHON) else {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{PYTHON} is not set");
        eprintln!("skipped: {PYTHON} names no Python with llama-cpp-python");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let tokens = TOKENS.map(|token| token.to_string()).join(",");
    for (model, edit) in [
        ("llama", r#""what": {"neurons": [[1, 3], [2, 40]]}, "edit": {"offset": 3}"#),
        ("llama", r#""what": {"neurons": [[0, 9], [2, 7]]}, "edit": {"assign": 4}"#),
        ("gemma3", r#""what": {"neurons": [[0, 9], [1, 3]]}, "edit": {"offset": 3}"#),
    ] {
        let file = interventions(folder.path(), &[edit]);
        let mut command = Command::new(&python);
        command.arg(root().join("examples/python/steer.py")).arg(PLUGIN.join("lib/libdetox_gguf.so"));
        command.arg(tiny(model)).arg(&file).args([tokens.as_str(), "1.5"]);
        let found: Vec<f32> = serde_json::from_str(&run(&mut command)).unwrap();
        let plain = engine_logits(model, None, Route::Cheapest);
        let expected = engine_logits(model, Some((&file, 1.5)), Route::Cheapest);
        assert!(largest_difference(&plain, &expected) > 0.05, "{model}: it has an effect");
        let difference = largest_difference(&found, &expected);
        assert!(difference < 1e-3, "{model} {edit}: {difference}");
    }
}
