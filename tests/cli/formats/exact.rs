//! Files that depend on no model. Their bytes are frozen.

use std::path::Path;

use super::golden::assert_golden;
use super::{copy_inputs, read, run_in};

/// Replaces values that differ between builds and machines (versions and the CPU, from `run.json`) with placeholders.
fn without_build(text: &str, run_json: &str) -> String {
    let run: serde_json::Value = serde_json::from_str(run_json).unwrap();
    let values = [
        ("<version>", &run["run"]["tool_version"]),
        ("<system>", &run["system"]),
        ("<llama.cpp>", &run["llama_cpp"]),
    ];
    values.iter().fold(text.to_owned(), |text, (placeholder, value)| {
        text.replace(&value.to_string(), &format!("\"{placeholder}\""))
    })
}

/// The report up to its warnings, which come last and whose wording may change.
fn before_warnings(report: &str) -> &str {
    let (before, after) = report.split_once("\n  \"warnings\": [").expect("warnings");
    assert!(!after.contains("\n  \""), "warnings are the last key");
    before
}

/// Evaluates continuations that are given, in the subfolder `name`.
pub fn eval_given(folder: &Path, generations: &str, name: &str) {
    run_in(folder, &format!("eval --generations {generations} --tokenizer tokenizer.json -t 1 -o {name}"));
}

#[test]
fn an_evaluation_of_given_continuations_writes_these_bytes() {
    let folder = tempfile::tempdir().unwrap();
    copy_inputs(folder.path());
    eval_given(folder.path(), "generations_a.jsonl", "a");
    let file = |name: &str| read(&folder.path().join("a").join(name));
    let run = file("run.json");
    for name in ["run.json", "generations.jsonl", "scores.jsonl", "report.csv"] {
        assert_golden(&format!("eval_given/{name}"), &without_build(&file(name), &run));
    }
    assert_golden(
        "eval_given/report.json",
        &(without_build(before_warnings(&file("report.json")), &run) + "\n"),
    );
}

#[test]
fn scores_of_given_texts_are_these_bytes() {
    let folder = tempfile::tempdir().unwrap();
    copy_inputs(folder.path());
    let scored = [
        run_in(folder.path(), "score texts.jsonl"),
        run_in(folder.path(), "score texts.csv --field body"),
        run_in(folder.path(), "score texts.txt --lang fr"),
    ];
    assert_golden("score.jsonl", &scored.concat());
    run_in(folder.path(), "score texts.jsonl -o scored.jsonl");
    assert_eq!(read(&folder.path().join("scored.jsonl")), scored[0]);
}
