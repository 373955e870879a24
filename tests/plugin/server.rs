//! `examples/llama-server.sh`, with a program in the server's place that loads what the server loads
//! (`tests/plugin/server.c`): the files that the recipe makes, its command line, and the logits that come of it. Not
//! covered: the server itself, which this repository does not build.

use std::process::Command;

use detox_gguf::steer::compile::Route;

use super::build::{program, run};
use super::{TOKENS, engine_logits, interventions, largest_difference, root};

#[test]
fn the_recipe_for_llama_server_steers_as_the_engine_does() {
    let server = program("tests/plugin/server.c", "server", &[]);
    let folder = tempfile::tempdir().unwrap();
    let neurons = folder.path().join("neurons.json");
    std::fs::write(&neurons, "[[0, 9], [1, 3], [1, 40]]").unwrap();
    let tokens = TOKENS.map(|token| token.to_string()).join(",");
    let serve = |way: &str, model: &str, offset: &str| -> Vec<f32> {
        let mut command = Command::new(root().join("examples/llama-server.sh"));
        command.args([way, &format!("gguf/tiny/{model}.gguf")]).arg(&neurons).arg(offset);
        command.arg(folder.path().join(model)).args(["-t", &tokens]).current_dir(root());
        command.env("LLAMA_SERVER", &server).env("DETOX_GGUF", env!("CARGO_BIN_EXE_detox-gguf"));
        serde_json::from_str(&run(&mut command)).unwrap()
    };
    for model in ["llama", "gpt2", "bloom"] {
        let plain = engine_logits(model, None, Route::Cheapest);
        for (way, neurons) in [("vector", "[[1, 3], [1, 40]]"), ("baked", "[[0, 9], [1, 3], [1, 40]]")] {
            let edit = format!("\"what\": {{\"neurons\": {neurons}}}, \"edit\": {{\"offset\": -3.5}}");
            let file = interventions(folder.path(), &[&edit]);
            let expected = engine_logits(model, Some((&file, 1.0)), Route::Cheapest);
            assert!(largest_difference(&plain, &expected) > 0.1, "{model} {way}: it does something");
            let difference = largest_difference(&serve(way, model, "-3.5"), &expected);
            assert!(difference < 1e-3, "{model} {way}: {difference}");
            // What was made for one offset is not taken for another, and is there the next time.
            let other = serve(way, model, "2");
            assert!(largest_difference(&other, &expected) > 0.1, "{model} {way}: another offset");
            assert_eq!(serve(way, model, "2"), other);
            assert!(largest_difference(&serve(way, model, "-3.5"), &expected) < 1e-3);
        }
    }
}
