//! `pairs`: from prompts to preference pairs, on a tiny model.
//!
//! The model's continuations are noise. So a single threshold separates clean from toxic, and rules that noise
//! would fail are relaxed.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;

use super::{contents, detox, failure, rows, tiny};

/// The median score of this model's noise by the embedded scorer.
const MIDDLE: &str = "0.0215";

fn pairs(model: &str) -> Command {
    let mut command = detox();
    command.args([
        "pairs", "--lang", "en", "--limit", "3", "-k", "8", "-n", "6", "-np", "2", "-t", "1", "-s", "5",
    ]);
    command.args(["--chosen-below", MIDDLE, "--rejected-above", MIDDLE, "--min-margin", "0.001"]);
    command.args(["--min-logprob", "-20", "--max-logprob-gap", "20", "--max-repetition", "1", "-m"]);
    command.arg(tiny(model));
    command
}

/// Writes an intervention that changes the continuations of `llama.gguf`.
fn intervention(folder: &Path) -> PathBuf {
    let (neurons, file) = (folder.join("neurons.json"), folder.join("steer.json"));
    std::fs::write(&neurons, "[[0, 3], [1, 5], [1, 7]]").unwrap();
    let mut command = detox();
    command.args(["steer", "--offset", "2", "-m"]).arg(tiny("llama.gguf"));
    command.arg("--neurons").arg(&neurons).arg("-o").arg(&file).assert().success();
    file
}

#[test]
fn pairs_follow_the_rules_and_are_reproducible() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    let output = pairs("llama.gguf").arg("-o").arg(&path).assert().success().get_output().clone();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.lines().any(|line| line.trim_start().starts_with("en ")), "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    let made = rows(&path);
    assert!(!made.is_empty());
    for row in &made {
        let (chosen, rejected) = (&row["chosen_measured"], &row["rejected_measured"]);
        let toxicity = |side: &Value| side["toxicity"]["lexical"].as_f64().unwrap();
        let middle: f64 = MIDDLE.parse().unwrap();
        assert!(toxicity(chosen) < middle && toxicity(rejected) >= middle, "{row}");
        assert!(toxicity(rejected) - toxicity(chosen) >= 0.001, "{row}");
        assert_eq!(chosen["finish"], rejected["finish"]);
        let n_tokens = |side: &Value| side["n_tokens"].as_f64().unwrap();
        let ratio = n_tokens(chosen) / n_tokens(rejected);
        assert!((1.0 / 1.5..=1.5).contains(&ratio), "{row}");
        assert!(chosen["logprob_per_token"].as_f64().unwrap() < 0.0);
        assert_eq!(row["language"], "en");
        assert!(chosen.get("steered_by").is_none());
    }
    let read = detox_gguf::train::data::preference_pair::read(&path, &Default::default()).unwrap();
    assert_eq!(read.len(), made.len());
    assert_eq!(read[0].prompt, made[0]["prompt"].as_str().unwrap());

    // Without -o: the same lines on standard output, and the table on standard error.
    let output = pairs("llama.gguf").assert().success().get_output().clone();
    assert_eq!(output.stdout, std::fs::read(&path).unwrap());
    assert!(String::from_utf8(output.stderr).unwrap().contains(table.trim_end()));
}

#[test]
fn steered_sides_are_recorded_and_measured_with_the_unsteered_model() {
    let folder = tempfile::tempdir().unwrap();
    let file = intervention(folder.path());
    let mut steer = file.into_os_string();
    steer.push(":3");
    let run = |name: &str, flags: &[&str]| {
        let path = folder.path().join(name);
        let mut command = pairs("llama.gguf");
        for flag in flags {
            command.arg(flag).arg(&steer);
        }
        command.arg("-o").arg(&path).assert().success();
        rows(&path)
    };
    let by = |row: &Value, side: &str| row[side]["steered_by"].as_str().map(str::to_owned);
    let steered = Some("steer.json x 3".to_owned());
    for row in run("rejected.jsonl", &["--steer-rejected"]) {
        assert_eq!((by(&row, "chosen_measured"), by(&row, "rejected_measured")), (None, steered.clone()));
    }
    for row in run("chosen.jsonl", &["--steer-chosen"]) {
        assert_eq!((by(&row, "chosen_measured"), by(&row, "rejected_measured")), (steered.clone(), None));
    }
    let both = run("both.jsonl", &["--steer-chosen", "--steer-rejected"]);
    assert!(!both.is_empty());
    // The unsteered model's log-prob of the sampled tokens, computed independently with `eval --base`.
    let texts = folder.path().join("g.jsonl");
    let mut command = detox();
    command.args(["generate", "--lang", "en", "--limit", "3", "-k", "8", "-n", "6", "-np", "2", "-t", "1"]);
    command.args(["-s", "5", "-m"]).arg(tiny("llama.gguf")).arg("--steer").arg(&steer).arg("-o").arg(&texts);
    command.assert().success();
    let judged = folder.path().join("judged");
    let mut command = detox();
    command.args(["eval", "-t", "1", "--generations"]).arg(&texts).arg("--base").arg(tiny("llama.gguf"));
    command.args(["--perplexity", "sampled", "-o"]).arg(&judged).assert().success();
    let scores = rows(&judged.join("scores.jsonl"));
    for row in &both {
        let measured = &row["rejected_measured"];
        let is_same = |s: &&Value| s["prompt_id"] == row["prompt_id"] && s["sample"] == measured["sample"];
        let score = scores.iter().find(is_same).unwrap();
        let expected = score["base_logprob"].as_f64().unwrap() / score["base_n_tokens"].as_f64().unwrap();
        let found = measured["logprob_per_token"].as_f64().unwrap();
        // 0.02: batches of another shape, with an F16 KV cache.
        assert!((found - expected).abs() < 0.02, "{found} {expected}");
    }
}

/// Arguments that are refused before sampling, with the flag that the error names.
const BAD_SETTINGS: [(&str, &[&str]); 14] = [
    ("-k/--samples", &["-k", "0"]),
    ("--per-prompt", &["--per-prompt", "0"]),
    ("--min-margin", &["--min-margin", "1.5"]),
    ("--min-margin", &["--min-margin", "NaN"]),
    ("--chosen-below", &["--chosen-below", "-0.1"]),
    ("--chosen-below", &["--chosen-below", "0.6"]),
    ("--rejected-above", &["--rejected-above", "2"]),
    ("--max-length-ratio", &["--max-length-ratio", "0.5"]),
    ("--min-logprob", &["--min-logprob", "1"]),
    ("--max-logprob-gap", &["--max-logprob-gap", "-1"]),
    ("--max-repetition", &["--max-repetition", "2"]),
    ("--scorer", &["--scorer", "nobody"]),
    ("--steer-chosen", &["--steer-chosen", ":2"]),
    ("--steer-rejected", &["--steer-rejected", ""]),
];

#[test]
fn rejects_settings_out_of_range_and_writes_nothing() {
    for (flag, arguments) in BAD_SETTINGS {
        let folder = tempfile::tempdir().unwrap();
        let mut command = detox();
        command.args(["pairs", "-m"]).arg(tiny("llama.gguf")).args(arguments);
        let (code, stderr) = failure(command.arg("-o").arg(folder.path().join("pairs.jsonl")));
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.starts_with(&format!("error: {flag}: ")), "{arguments:?}: {stderr}");
        assert!(contents(folder.path()).is_empty(), "{arguments:?}");
    }
}

#[test]
fn rejects_steering_for_another_model_and_languages_without_a_scorer() {
    let folder = tempfile::tempdir().unwrap();
    let of_llama = intervention(folder.path());
    let (code, stderr) = failure(pairs("gpt2.gguf").arg("--steer-rejected").arg(&of_llama));
    assert_eq!(code, 1);
    assert!(stderr.contains("architecture llama"), "{stderr}");
    let prompts = folder.path().join("sw.txt");
    std::fs::write(&prompts, "Habari ya asubuhi\n").unwrap();
    let mut command = detox();
    command.args(["pairs", "-m"]).arg(tiny("llama.gguf")).arg("--prompts").arg(&prompts);
    let (code, stderr) = failure(&mut command);
    assert_eq!(code, 1);
    assert!(stderr.contains("no scorer covers language \"sw\"") && stderr.contains("hint: "), "{stderr}");
}

#[test]
fn a_run_without_pairs_fails_with_the_reasons_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = pairs("llama.gguf");
    // Continuations have at most six tokens.
    command.args(["--min-tokens", "7"]).arg("-o").arg(folder.path().join("pairs.jsonl"));
    let (code, stderr) = failure(&mut command);
    assert_eq!(code, 1);
    assert!(stderr.contains("blank or too short") && stderr.contains("24"), "{stderr}");
    assert!(stderr.contains("error: no two samples made a pair") && stderr.contains("hint: "), "{stderr}");
    assert!(contents(folder.path()).is_empty());
}

#[test]
fn rejects_a_folder_that_cannot_be_written_before_sampling() {
    let folder = tempfile::tempdir().unwrap();
    let (code, stderr) = failure(pairs("llama.gguf").arg("-o").arg(folder.path().join("none/pairs.jsonl")));
    assert_eq!(code, 2);
    assert!(stderr.contains("found no folder") && !stderr.contains("samples:"), "{stderr}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_writes_nothing_and_says_so() {
    use std::io::{BufRead, BufReader};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("detox-gguf"))
        .args(["pairs", "-k", "500", "-n", "40", "--ignore-eos", "-t", "1", "-m"])
        .arg(tiny("llama.gguf"))
        .arg("-o")
        .arg(&path)
        .env_remove("RUST_LOG")
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("samples: 0 of") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended before sampling");
    }
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut stderr, &mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    assert!(rest.contains("error: interrupted") && rest.contains("no pairs were written"), "{rest}");
    assert!(contents(folder.path()).is_empty());
}
