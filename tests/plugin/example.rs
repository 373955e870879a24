//! `examples/c/steer.c` gives the engine's logits for the same interventions.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use detox_gguf::engine::Token;
use detox_gguf::gguf::{GgufFile, Metadata, file_sha256};
use detox_gguf::steer::compile::Route;
use detox_gguf::steer::{Fingerprint, control_vector};
use serde::Deserialize;

use super::build::{program, run};
use super::{TOKENS, engine_logits, interventions, largest_difference, tiny};

/// The output of the example.
#[derive(Debug, Deserialize)]
pub struct Output {
    /// `[n_sequences][n_vocab]`, after the last token.
    pub logits: Vec<Vec<f32>>,
    pub n_blocks: usize,
    pub generated: Vec<Generated>,
}

#[derive(Debug, Deserialize)]
pub struct Generated {
    pub token: i32,
    pub probability: f64,
    pub is_open: bool,
    pub logits: Vec<f32>,
}

fn command(model: &str, steer: Option<&Path>, flags: &[&str]) -> Command {
    command_of(&TOKENS, model, steer, flags)
}

fn command_of(tokens: &[Token], model: &str, steer: Option<&Path>, flags: &[&str]) -> Command {
    let mut command = Command::new(program("examples/c/steer.c", "steer", &[]));
    let tokens = tokens.iter().map(Token::to_string).collect::<Vec<_>>().join(",");
    command.arg("-m").arg(tiny(model)).arg("-t").arg(tokens).args(flags);
    if let Some(steer) = steer {
        command.arg("--steer").arg(steer);
    }
    command
}

pub fn example(model: &str, steer: Option<&Path>, flags: &[&str]) -> Output {
    example_of(&TOKENS, model, steer, flags)
}

/// The example with other tokens.
pub fn example_of(tokens: &[Token], model: &str, steer: Option<&Path>, flags: &[&str]) -> Output {
    let text = run(&mut command_of(tokens, model, steer, flags));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

const OFFSETS: &str = r#""what": {"neurons": [[1, 3], [1, 40]]}, "edit": {"offset": 3}"#;
const LAYER_0: &str = r#""what": {"neurons": [[0, 9]]}, "edit": {"offset": 5}"#;
const CLAMP: &str =
    r#""what": {"neurons": [[1, 5], [1, 60]]}, "edit": {"clamp": {"min": -0.01, "max": 0.01}}"#;
const ASSIGN: &str = r#""what": {"neurons": [[0, 9], [1, 7]]}, "edit": {"assign": 4}"#;

/// The two programs differ only in how they split batches and allocate caches. This is far below the effect.
const TOLERANCE: f32 = 1e-4;

#[test]
fn a_control_vector_steers_like_in_the_engine() {
    let folder = tempfile::tempdir().unwrap();
    let file = interventions(folder.path(), &[OFFSETS]);
    for model in ["llama", "command-r", "gpt2", "bloom", "qwen2", "qwen3"] {
        let plain = example(model, None, &[]).logits.remove(0);
        let found = example(model, Some(&file), &["--coefficient", "1.5"]).logits.remove(0);
        let expected = engine_logits(model, Some((&file, 1.5)), Route::Cheapest);
        assert!(largest_difference(&plain, &expected) > 0.1, "{model}: it has an effect");
        let difference = largest_difference(&found, &expected);
        assert!(difference < TOLERANCE, "{model}: {difference}");
    }
}

#[test]
fn the_callback_steers_like_in_the_engine_if_a_control_vector_cannot() {
    let folder = tempfile::tempdir().unwrap();
    for (model, edits, flags) in [
        ("llama", &[OFFSETS, LAYER_0][..], &[][..]),
        ("llama", &[OFFSETS, LAYER_0], &["--callback"]),
        ("llama", &[CLAMP, ASSIGN], &[]),
        ("gpt2", &[LAYER_0], &[]),
        ("bloom", &[ASSIGN], &[]),
        ("gemma3", &[OFFSETS, LAYER_0], &[]),
        ("gemma3", &[CLAMP, ASSIGN], &["--ubatch", "4"]),
        ("llama", &[LAYER_0, CLAMP], &["--ubatch", "2"]),
    ] {
        let file = interventions(folder.path(), edits);
        let plain = example(model, None, &[]).logits.remove(0);
        let flags = [&["--coefficient", "-0.75"], flags].concat();
        let found = example(model, Some(&file), &flags).logits.remove(0);
        let route = if flags.contains(&"--callback") { Route::Callback } else { Route::Cheapest };
        let expected = engine_logits(model, Some((&file, -0.75)), route);
        assert!(largest_difference(&plain, &expected) > 0.05, "{model} {edits:?}: it has an effect");
        let difference = largest_difference(&found, &expected);
        assert!(difference < TOLERANCE, "{model} {edits:?} {flags:?}: {difference}");
    }
}

#[test]
fn a_coefficient_of_0_gives_the_bits_of_a_run_without_the_plugin() {
    let folder = tempfile::tempdir().unwrap();
    let file = interventions(folder.path(), &[OFFSETS, LAYER_0, ASSIGN]);
    for model in ["llama", "gemma3", "llama-q8_0"] {
        let plain = example(model, None, &["--sequences", "2"]).logits;
        for route in [&[][..], &["--callback"]] {
            let flags = [&["--sequences", "2", "--coefficient", "0"], route].concat();
            assert_eq!(example(model, Some(&file), &flags).logits, plain, "{model} {route:?}");
        }
    }
}

#[test]
fn left_out_sequences_equal_the_unsteered_model_and_the_others_are_steered() {
    let folder = tempfile::tempdir().unwrap();
    let file = interventions(folder.path(), &[OFFSETS, LAYER_0, ASSIGN]);
    for (model, layout) in [
        ("llama", &[][..]),
        ("llama", &["--unified"]),
        ("llama", &["--ubatch", "5"]),
        ("llama", &["--unified", "--ubatch", "5"]),
        ("gemma3", &[]),
        ("gpt2", &["--ubatch", "4"]),
    ] {
        let of_three = |flags: &[&'static str]| [&["--sequences", "3"], layout, flags].concat();
        let plain = example(model, None, &of_three(&[])).logits;
        let steered = example(model, Some(&file), &of_three(&["--callback"])).logits;
        let mixed = example(model, Some(&file), &of_three(&["--callback", "--off", "1"])).logits;
        assert!(largest_difference(&plain[0], &steered[0]) > 0.05, "{model}");
        assert_eq!(mixed[1], plain[1], "{model} {layout:?}");
        assert_eq!((&mixed[0], &mixed[2]), (&steered[0], &steered[2]), "{model} {layout:?}");
    }
}

#[test]
fn edits_of_prompts_or_generated_tokens_follow_the_announced_batch() {
    let folder = tempfile::tempdir().unwrap();
    let both = interventions(folder.path(), &[LAYER_0]);
    let plain = example("llama", None, &[]).logits;
    let steered = example("llama", Some(&both), &[]).logits;
    for (when, on, off) in
        [("prompt", "--as-prompt", "--as-generated"), ("generation", "--as-generated", "--as-prompt")]
    {
        let edit = format!("{LAYER_0}, \"when\": \"{when}\"");
        let file = interventions(folder.path(), &[&edit]);
        assert_eq!(example("llama", Some(&file), &[on]).logits, steered, "{when}");
        assert_eq!(example("llama", Some(&file), &[off]).logits, plain, "{when}");
        // The batch is not announced.
        let output = command("llama", Some(&file), &[]).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && stderr.contains("status 7"), "{stderr}");
        assert!(stderr.contains("the batch does not say which is which"), "{stderr}");
    }
}

#[test]
fn with_sliding_windows_a_batch_can_be_announced_only_if_its_order_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let directions = folder.path().join("directions.gguf");
    let fingerprint = Fingerprint::of(&GgufFile::open(tiny("gemma3")).unwrap()).unwrap();
    let direction = BTreeMap::from([(1, vec![0.5; fingerprint.n_embd as usize])]);
    control_vector::write(&directions, &fingerprint, &direction, &Metadata::new()).unwrap();
    let sha256 = file_sha256(&directions, |_, _| {}).unwrap();
    let direction = format!(
        r#""what": {{"directions": {{"path": "directions.gguf", "sha256": "{sha256}"}}}}, "edit": {{"offset": 3}}"#
    );
    let prompt = format!("{LAYER_0}, \"when\": \"prompt\"");
    let (part, whole) = (interventions(folder.path(), &[&direction]), folder.path().join("whole.json"));
    let (plain, of_part) = (
        engine_logits("gemma3", None, Route::Cheapest),
        engine_logits("gemma3", Some((&part, 1.0)), Route::Cheapest),
    );
    std::fs::rename(interventions(folder.path(), &[&direction, &prompt]), &whole).unwrap();
    let both = engine_logits("gemma3", Some((&whole, 1.0)), Route::Cheapest);
    assert!(largest_difference(&plain, &of_part) > 0.05 && largest_difference(&of_part, &both) > 0.05);
    for layout in [&[][..], &["--sequences", "3"]] {
        for (flag, expected) in [("--as-prompt", &both), ("--as-generated", &of_part)] {
            for found in example("gemma3", Some(&whole), &[layout, &[flag]].concat()).logits {
                let difference = largest_difference(&found, expected);
                assert!(difference < TOLERANCE, "{layout:?} {flag}: {difference}");
            }
        }
    }
    // With a unified cache the order is not known.
    let output = command("gemma3", Some(&whole), &["--sequences", "2", "--unified", "--as-prompt"]).output();
    let stderr = String::from_utf8_lossy(&output.unwrap().stderr).into_owned();
    assert!(stderr.contains("sliding windows"), "{stderr}");
}

#[test]
fn indistinguishable_sequences_and_invalid_numbers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (model, edits, flags, reason) in [
        // Part of it is a control vector, which llama.cpp adds to all sequences.
        ("llama", OFFSETS, &["--sequences", "2", "--off", "1"][..], "llama.cpp adds to all sequences"),
        ("gemma3", LAYER_0, &["--sequences", "2", "--off", "1", "--unified"], "sliding windows"),
        ("llama", LAYER_0, &["--sequences", "2", "--off", "2"], "expected a sequence below 2"),
        ("llama", LAYER_0, &["--sequences", "0"], "expected a number from 1"),
        ("llama", LAYER_0, &["-t", "abc"], "expected a number from 0"),
    ] {
        let file = interventions(folder.path(), &[edits]);
        let output = command(model, Some(&file), flags).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && stderr.contains(reason), "{stderr}");
    }
}

#[test]
fn the_programs_own_callback_still_sees_every_node_it_wants() {
    let folder = tempfile::tempdir().unwrap();
    for (edits, flags) in [(LAYER_0, &[][..]), (CLAMP, &[]), (OFFSETS, &["--callback"])] {
        let file = interventions(folder.path(), &[edits]);
        // 9 tokens in micro-batches of 4 are 3 micro-batches, each of 3 blocks.
        let common = ["--ubatch", "4", "--count"];
        let plain = example("llama", None, &common);
        assert_eq!(plain.n_blocks, 9);
        let steered = example("llama", Some(&file), &[&common, flags].concat());
        assert_eq!(steered.n_blocks, 9);
        assert_eq!(plain.logits, example("llama", None, &common[..2]).logits);
        let alone = example("llama", Some(&file), &[&common[..2], flags].concat());
        assert_eq!(steered.logits, alone.logits);
    }
}

#[test]
fn a_coefficient_changed_by_another_thread_never_splits_a_decode() {
    #[derive(Deserialize)]
    struct Race {
        plain: usize,
        steered: usize,
        neither: usize,
    }
    let folder = tempfile::tempdir().unwrap();
    let file = interventions(folder.path(), &[OFFSETS, LAYER_0, ASSIGN]);
    let text = run(&mut command("llama", Some(&file), &["--callback", "--race", "400"]));
    let race: Race = serde_json::from_str(&text).unwrap();
    assert_eq!((race.neither, race.plain + race.steered), (0, 400));
    assert!(race.plain > 0 && race.steered > 0, "both occurred: {text}");
}
