//! `examples/c/overhead.c` measures the cost of steering. `docs/plugin.md` has its results.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::build::{program, run};
use super::{interventions, tiny};

/// The measurement of one context.
#[derive(Debug)]
struct Measured {
    ratio: f64,
    low: f64,
    high: f64,
    /// A hash of the context's last logits.
    logits: String,
}

impl Measured {
    fn from(value: &Value) -> Measured {
        let [ratio, low, high] = ["ratio", "low", "high"].map(|key| value[key].as_f64().unwrap());
        Measured { ratio, low, high, logits: value["logits"].as_str().unwrap().to_owned() }
    }
}

fn command(edit: &str, folder: &Path, flags: &[&str]) -> Command {
    let file = interventions(folder, &[edit]);
    let mut command = Command::new(program("examples/c/overhead.c", "overhead", &[]));
    command.arg("-m").arg(tiny("llama")).arg("--steer").arg(&file).args(["-t", "1,60,70"]).args(flags);
    command
}

/// The measurements, by name of the context.
fn overhead(edit: &str, flags: &[&str]) -> BTreeMap<String, Measured> {
    let folder = tempfile::tempdir().unwrap();
    let found = run(&mut command(edit, folder.path(), flags));
    let found: BTreeMap<String, Value> = serde_json::from_str(&found).unwrap();
    let contexts = found.into_iter().filter(|(_, value)| value.is_object());
    contexts.map(|(name, value)| (name, Measured::from(&value))).collect()
}

/// Asserts that each context is steered or unsteered, as its name says.
fn assert_steered(found: &BTreeMap<String, Measured>) {
    let plain = &found["plain"].logits;
    for (name, measured) in found {
        let is_unsteered = ["plain", "plain_again", "callback_at_0"].contains(&name.as_str());
        assert_eq!(measured.logits == *plain, is_unsteered, "{name}: {found:?}");
    }
}

const OFFSET: &str = r#""what": {"neurons": [[1, 3]]}, "edit": {"offset": 3}"#;

#[test]
fn the_overhead_of_each_context_is_measured_with_an_interval() {
    let all = ["callback", "callback_at_0", "control_vector", "plain", "plain_again"];
    for flags in [&["--tokens", "40", "--cpu"][..], &["--tokens", "41", "--threads", "2", "--pool"]] {
        let found = overhead(OFFSET, flags);
        assert_eq!(found.keys().collect::<Vec<_>>(), all);
        assert_steered(&found);
        for (name, &Measured { ratio, low, high, .. }) in &found {
            assert!(0.0 < low && low <= ratio && ratio <= high, "{name}: {low} {ratio} {high}");
        }
        // For each token the ratios of the two unsteered contexts add up to 2, and so do their printed medians.
        let (plain, again) = (&found["plain"], &found["plain_again"]);
        for (a, b) in [(plain.ratio, again.ratio), (plain.low, again.high), (plain.high, again.low)] {
            assert!((a + b - 2.0).abs() < 3e-4, "{found:?}");
        }
    }
}

#[test]
fn without_a_control_vector_only_the_callback_is_measured() {
    let assign = r#""what": {"neurons": [[0, 3]]}, "edit": {"assign": 3}"#;
    let found = overhead(assign, &["--tokens", "1"]);
    assert_eq!(found.keys().collect::<Vec<_>>(), ["callback", "callback_at_0", "plain", "plain_again"]);
    assert_steered(&found);
    let is_one_value = |of: &Measured| of.low == of.ratio && of.ratio == of.high;
    assert!(found.values().all(is_one_value), "one token has no spread: {found:?}");
}

#[test]
fn measuring_cpu_time_of_several_threads_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let output = command(OFFSET, folder.path(), &["--cpu", "--threads", "2"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("--cpu is for one thread"), "{stderr}");
}

#[test]
fn asking_about_an_unwanted_node_is_fast() {
    let folder = tempfile::tempdir().unwrap();
    let file = interventions(folder.path(), &[r#""what": {"neurons": [[2, 3]]}, "edit": {"offset": 3}"#]);
    let mut command = Command::new(program("tests/plugin/ask.c", "ask", &[]));
    let ns: f64 = run(command.arg(tiny("llama")).arg(&file).arg("2000")).trim().parse().unwrap();
    // It takes 31 ns on the machine where this was written, the best of many rounds. Ten times that leaves room for
    // slower processors, and still catches string building or a loop over all layers for each node.
    assert!(ns < 300.0, "{ns} ns");
}
