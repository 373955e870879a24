//! Gates in `examples/c/steer.c` read what the engine records, and open when they should.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use detox_gguf::engine::residual::{self, ResidualPlace};
use detox_gguf::engine::{Model, ModelOptions, Session, Token};
use detox_gguf::interp::probe::{Probe, ProbePlace};

use super::example::{Generated, example, example_of};
use super::{TOKENS, exact, interventions, largest_difference, tiny};

const EDIT: &str = r#""what": {"neurons": [[0, 9], [2, 7]]}, "edit": {"assign": 4}"#;

/// A probe with positive and negative weights.
fn probe(folder: &Path, place: ProbePlace) -> (PathBuf, Probe) {
    let weight = (0..64).map(|i| ((i * 37 % 64) as f32 - 31.5) / 40.0).collect();
    let probe =
        Probe { weight, place, fingerprint: None, source: "a test".into(), accuracy: None, auc: None };
    let path = folder.join("probe.gguf");
    probe.write(&path).unwrap();
    (path, probe)
}

/// The engine's probability for the unsteered text before each generated token.
fn expected(model: &str, probe: &Probe, generated: &[Generated]) -> Vec<f64> {
    let model = Model::open(&tiny(model), &ModelOptions::default()).unwrap();
    let mut session = Session::open_with_callback(&model, &exact(), 64).unwrap();
    let mut text = TOKENS.to_vec();
    let mut texts: Vec<Vec<Token>> = Vec::new();
    for step in generated {
        texts.push(text.clone());
        text.push(step.token);
    }
    let place = match probe.place {
        ProbePlace::Embedding => ResidualPlace::Embedding,
        ProbePlace::Block(il) => ResidualPlace::AfterBlock(il as usize),
        ProbePlace::FinalNorm => ResidualPlace::AfterFinalNorm,
    };
    let interrupt = AtomicBool::new(false);
    let means = residual::record(&mut session, &texts, &[place], &interrupt, |_| {}).unwrap();
    means.iter().map(|of_places| probe.probability(&of_places[0])).collect()
}

#[test]
fn the_probability_equals_that_of_the_mean_residual_stream_recorded_by_the_engine() {
    let folder = tempfile::tempdir().unwrap();
    let file = interventions(folder.path(), &[EDIT]);
    for model in ["llama", "gemma3"] {
        for place in [ProbePlace::Block(0), ProbePlace::Block(1), ProbePlace::Embedding] {
            let (path, probe) = probe(folder.path(), place);
            // The gate never opens, so the text is the model's own. Its 15 tokens fit into the window of 16.
            let flags = ["--callback", "--gate", path.to_str().unwrap(), "1", "-n", "7"];
            let found = example(model, Some(&file), &flags);
            assert_eq!(found.logits, example(model, None, &[]).logits);
            let expected = expected(model, &probe, &found.generated);
            for (i, (step, expected)) in found.generated.iter().zip(&expected).enumerate() {
                let difference = (step.probability - expected).abs();
                assert!(difference < 1e-4, "{model} {place} {i}: {} {expected}", step.probability);
                assert!(!step.is_open);
            }
        }
    }
}

#[test]
fn a_gate_with_threshold_0_steers_everything_except_the_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let generation = format!("{EDIT}, \"when\": \"generation\"");
    for place in [ProbePlace::Block(1), ProbePlace::FinalNorm] {
        let (path, _) = probe(folder.path(), place);
        let both = interventions(folder.path(), &[EDIT]);
        let gated =
            example("llama", Some(&both), &["--callback", "--gate", path.to_str().unwrap(), "0", "-n", "5"]);
        assert!(gated.generated.iter().all(|step| step.is_open));
        let alone = interventions(folder.path(), &[&generation]);
        let expected = example("llama", Some(&alone), &["--as-prompt", "-n", "5"]);
        assert_eq!(gated.logits, expected.logits);
        for (gated, expected) in gated.generated.iter().zip(&expected.generated) {
            assert_eq!((gated.token, &gated.logits), (expected.token, &expected.logits));
        }
    }
}

#[test]
fn a_gate_opens_and_closes_as_the_probability_crosses_the_threshold() {
    let folder = tempfile::tempdir().unwrap();
    let file = interventions(folder.path(), &[EDIT]);
    let (path, _) = probe(folder.path(), ProbePlace::Block(0));
    let run = |threshold: &str| {
        let flags = ["--callback", "--gate", path.to_str().unwrap(), threshold, "-n", "12"];
        example("llama", Some(&file), &flags).generated
    };
    // A threshold between the probabilities that a closed gate reads.
    let mut seen: Vec<f64> = run("1").iter().map(|step| step.probability).collect();
    seen.sort_by(f64::total_cmp);
    let threshold = (seen[5] + seen[6]) / 2.0;
    let steps = run(&format!("{threshold:.17}"));
    for step in &steps {
        assert_eq!(step.is_open, step.probability >= threshold, "{}", step.probability);
    }
    let first_open = steps.iter().position(|step| step.is_open).expect("it opens");
    assert!(steps.iter().any(|step| !step.is_open), "it closes as well");
    // Until it opens every step has the bits of the model's own, and the first open step does not.
    let plain = example("llama", None, &["-n", "12"]).generated;
    for (step, plain) in steps.iter().zip(&plain).take(first_open) {
        assert_eq!((step.token, &step.logits), (plain.token, &plain.logits));
    }
    assert_eq!(steps[first_open].token, plain[first_open].token);
    assert_ne!(steps[first_open].logits, plain[first_open].logits);
}

#[test]
fn each_sequence_has_its_own_gate() {
    const N: usize = 8;
    let folder = tempfile::tempdir().unwrap();
    let file = interventions(folder.path(), &[EDIT]);
    let (path, _) = probe(folder.path(), ProbePlace::Block(1));
    let gate = path.to_str().unwrap();
    let alone = |sequence: usize, threshold: &str| {
        let mut tokens = TOKENS;
        tokens.rotate_left(sequence);
        let flags = ["--callback", "--gate", gate, threshold, "-n", "8"];
        example_of(&tokens, "llama", Some(&file), &flags).generated
    };
    // A threshold between the readings of three texts, so that some gates are open while others are closed.
    let mut seen: Vec<f64> = (0..3).flat_map(|s| alone(s, "1")).map(|step| step.probability).collect();
    seen.sort_by(f64::total_cmp);
    let threshold = format!("{:.17}", (seen[11] + seen[12]) / 2.0);
    let expected: Vec<Vec<Generated>> = (0..3).map(|s| alone(s, &threshold)).collect();
    let n_open = |step: usize| expected.iter().filter(|of_sequence| of_sequence[step].is_open).count();
    assert!((0..N).any(|step| (1..3).contains(&n_open(step))), "one is open while another is closed");
    for layout in [&["--sequences", "3"][..], &["--sequences", "3", "--unified", "--ubatch", "7"]] {
        let flags = [layout, &["--apart", "--callback", "--gate", gate, &threshold, "-n", "8"]].concat();
        let found = example("llama", Some(&file), &flags).generated;
        assert_eq!(found.len(), 3 * N);
        for (i, found) in found.iter().enumerate() {
            let alone = &expected[i % 3][i / 3];
            let difference = (found.probability - alone.probability).abs();
            assert!(difference < 1e-5, "{layout:?} {i}: {} {}", found.probability, alone.probability);
            assert_eq!((found.token, found.is_open), (alone.token, alone.is_open), "{layout:?} {i}");
            assert!(largest_difference(&found.logits, &alone.logits) < 1e-3, "{layout:?} {i}");
        }
    }
}
