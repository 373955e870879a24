//! `examples/c/overhead.c`: that it measures what it says. What it measures is in `docs/plugin.md`.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

use super::build::{program, run};
use super::{interventions, tiny};

/// The ratio of each context with its interval.
fn overhead(edit: &str, flags: &[&str]) -> BTreeMap<String, [f64; 3]> {
    let folder = tempfile::tempdir().unwrap();
    let file = interventions(folder.path(), &[edit]);
    let mut command = Command::new(program("examples/c/overhead.c", "overhead", &[]));
    command.arg("-m").arg(tiny("llama")).arg("--steer").arg(&file).args(["-t", "1,60,70"]).args(flags);
    let found: BTreeMap<String, Value> = serde_json::from_str(&run(&mut command)).unwrap();
    let contexts = found.into_iter().filter(|(_, value)| value.is_object());
    contexts
        .map(|(name, value)| (name, ["low", "ratio", "high"].map(|key| value[key].as_f64().unwrap())))
        .collect()
}

#[test]
fn the_overhead_of_each_context_is_measured_with_an_interval() {
    let vector = r#""what": {"neurons": [[1, 3]]}, "edit": {"offset": 3}"#;
    let all = ["callback", "callback_at_0", "control_vector", "plain", "plain_again"];
    for flags in [&["--tokens", "40", "--cpu"][..], &["--tokens", "41", "--threads", "2", "--pool"]] {
        let found = overhead(vector, flags);
        assert_eq!(found.keys().collect::<Vec<_>>(), all);
        assert_eq!(found["plain"], [1.0; 3]);
        for (name, [low, ratio, high]) in found {
            assert!(0.0 < low && low <= ratio && ratio <= high, "{name}: {low} {ratio} {high}");
        }
    }
}

#[test]
fn what_no_control_vector_can_do_is_measured_by_the_callback_alone() {
    let assign = r#""what": {"neurons": [[0, 3]]}, "edit": {"assign": 3}"#;
    let found = overhead(assign, &["--tokens", "1"]);
    assert_eq!(found.keys().collect::<Vec<_>>(), ["callback", "callback_at_0", "plain", "plain_again"]);
    assert!(
        found.values().all(|[low, ratio, high]| low == ratio && ratio == high),
        "of one token: {found:?}"
    );
}

#[test]
fn asking_about_a_node_that_is_not_wanted_is_quick() {
    let folder = tempfile::tempdir().unwrap();
    let file = interventions(folder.path(), &[r#""what": {"neurons": [[2, 3]]}, "edit": {"offset": 3}"#]);
    let mut command = Command::new(program("tests/plugin/ask.c", "ask", &[]));
    let ns: f64 = run(command.arg(tiny("llama")).arg(&file).arg("2000")).trim().parse().unwrap();
    // 31 where it was written; far more means that something waits, allocates, or looks through all that there is.
    assert!(ns < 500.0, "{ns} ns");
}
