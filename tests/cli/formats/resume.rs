//! Run folders that version 0.1.0 (17a851291285) left unfinished; scripts/make_interrupted_runs.py made them.

use std::path::Path;

use serde_json::Value;

use super::{copy_folder, copy_inputs, detox_in, golden, read, run_in};
use crate::rows;

/// As in scripts/make_interrupted_runs.py: 3 prompts in each of 2 languages, in units of 2 prompts.
const SAMPLING: &str = "--lang en,de --limit 3 -k 4 -n 6 -np 2 -t 1 -s 5";

/// The version that started these runs.
const OLD_VERSION: &str = "0.1.0 (17a851291285)";

/// Continuations in a unit.
const UNIT_ROWS: usize = 8;

const TRAINING: &str = "--rank 2 --targets q,down --max-steps 16 --eval-every 4 --patience 99 --warmup-steps 2 \
    --learning-rate 1e-3 --max-length 64 --max-prompt 32 --products exact -t 1 -s 5";

/// A string value of a JSON text, with its quotes.
fn quoted(text: &str, key: &str) -> String {
    let value: Value = serde_json::from_str(text).unwrap();
    let found = value.get(key).or_else(|| value["run"].get(key));
    found.unwrap_or_else(|| panic!("no {key:?} in {text}")).to_string()
}

/// Replaces llama.cpp's version and the CPU in an old `run.json` with today's. The program's version stays old.
///
/// A run resumes under a newer version of the program, but not on another CPU or with another llama.cpp.
/// Nothing else may differ.
fn adopt(old: &Path, today: &Path) {
    let (mut text, fresh) = (read(old), read(today));
    for key in ["system", "llama_cpp"] {
        if fresh.contains(&format!("\"{key}\"")) {
            text = text.replace(&quoted(&text, key), &quoted(&fresh, key));
        }
    }
    std::fs::write(old, &text).unwrap();
    for key in ["tool_version", "detox_gguf"] {
        if fresh.contains(&format!("\"{key}\"")) {
            assert!(quoted(&text, key).contains(OLD_VERSION), "{key} in {}", old.display());
            text = text.replace(&quoted(&text, key), &quoted(&fresh, key));
        }
    }
    // An older version did not write the models' paths, which may differ when a run resumes.
    let fresh = match fresh.split_once(",\n  \"paths\"") {
        Some((before, _)) => format!("{before}\n}}\n"),
        None => fresh,
    };
    assert_eq!(text, fresh, "run.json of {}", old.display());
}

/// Checks that the program warned about the older version, and left it in `run.json`.
fn assert_keeps_old_version(run_json: &Path, stderr: &str) {
    assert!(stderr.contains(&format!("the run was started by detox-gguf {OLD_VERSION}")), "{stderr}");
    assert!(read(run_json).contains(OLD_VERSION), "{}", run_json.display());
}

/// A folder with an interrupted run in `old`, and an uninterrupted run of the same command, made now, in `today`.
fn old_and_today(name: &str, command: &str, flags: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_inputs(folder.path());
    copy_folder(&golden::folder().join("interrupted").join(name), &folder.path().join("old"));
    run_in(folder.path(), &format!("{command} -m llama.gguf -o today {flags}"));
    folder
}

/// Resumes the run in `old`; returns the program's messages.
fn resume(folder: &Path, command: &str, flags: &str) -> String {
    let line = format!("{command} -m llama.gguf -o old {flags}");
    let output = detox_in(folder, &line).assert().success().get_output().clone();
    String::from_utf8(output.stderr).unwrap()
}

/// The same file names, and the same number of lines in the logs, in both folders.
fn assert_same_files(old: &Path, today: &Path) {
    let (old_files, today_files) = (crate::contents(old), crate::contents(today));
    assert_eq!(old_files.keys().collect::<Vec<_>>(), today_files.keys().collect::<Vec<_>>());
    for name in old_files.keys().filter(|name| name.ends_with(".jsonl")) {
        let n_lines = |folder: &Path| read(&folder.join(name)).lines().count();
        assert_eq!(n_lines(old), n_lines(today), "{name}");
    }
}

/// Checks that the first unit of `generations.jsonl` is untouched and that no row is missing.
fn assert_completed(name: &str, old: &Path, today: &Path) {
    let before = read_lossy(&golden::folder().join("interrupted").join(name).join("generations.jsonl"));
    let after = read(&old.join("generations.jsonl"));
    let unit = |text: &str| text.split_inclusive('\n').take(UNIT_ROWS).collect::<String>();
    assert_eq!(unit(&before), unit(&after), "the finished unit of {name}");
    for log in ["generations.jsonl", "scores.jsonl"] {
        let ids = |folder: &Path| -> Vec<Value> {
            let rows = rows(&folder.join(log)).into_iter();
            rows.map(|row| serde_json::json!([row["prompt_id"], row["sample"]])).collect()
        };
        assert_eq!(ids(old), ids(today), "{name}: {log}");
    }
}

/// Reads a log whose last row was truncated, possibly in the middle of a character.
fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned()
}

#[test]
fn an_evaluation_that_an_older_version_left_unfinished_resumes() {
    let folder = old_and_today("eval", "eval", SAMPLING);
    let (old, today) = (folder.path().join("old"), folder.path().join("today"));
    adopt(&old.join("run.json"), &today.join("run.json"));
    let stderr = resume(folder.path(), "eval", SAMPLING);
    assert_keeps_old_version(&old.join("run.json"), &stderr);
    assert!(
        stderr.contains(&format!("continuations: {UNIT_ROWS} of 24")),
        "it starts after the finished unit: {stderr}"
    );
    assert_same_files(&old, &today);
    assert_completed("eval", &old, &today);
    let keys = |folder: &Path| super::written::form_of_report(&read(&folder.join("report.json")));
    assert_eq!(keys(&old), keys(&today));
}

#[test]
fn a_sweep_that_an_older_version_left_unfinished_resumes() {
    let flags = format!("{SAMPLING} --neurons neurons.json --offsets -1,-2");
    let folder = old_and_today("sweep", "sweep", &flags);
    let (old, today) = (folder.path().join("old"), folder.path().join("today"));
    for run in ["baseline", "chosen_-1"] {
        adopt(&old.join(run).join("run.json"), &today.join(run).join("run.json"));
    }
    let baseline = crate::contents(&old.join("baseline"));
    let stderr = resume(folder.path(), "sweep", &flags);
    for run in ["baseline", "chosen_-1"] {
        assert_keeps_old_version(&old.join(run).join("run.json"), &stderr);
    }
    let mut found = crate::contents(&old.join("baseline"));
    assert_eq!(
        found.remove("run.json.bak").as_ref(),
        found.get("run.json"),
        "the copy, which it did not have"
    );
    assert!(found == baseline, "the finished run");
    assert_completed("sweep/chosen_-1", &old.join("chosen_-1"), &today.join("chosen_-1"));
    for run in ["baseline", "chosen_-1", "chosen_-2", "control_0_-1", "control_0_-2"] {
        assert_same_files(&old.join(run), &today.join(run));
    }
    let names = |sweep: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(sweep).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    };
    assert_eq!(names(&old), names(&today));
}

/// Resumes a run of training whose checkpoint was written after step `step` and line `n_kept` of `metrics.jsonl`.
fn assert_training_resumes(method: &str, step: u64, n_kept: usize, result: &str) {
    let name = format!("train_{method}");
    let flags = format!("{TRAINING} --method {method}");
    let folder = old_and_today(&name, "train", &flags);
    let (old, today) = (folder.path().join("old"), folder.path().join("today"));
    adopt(&old.join("run.json"), &today.join("run.json"));
    let stderr = resume(folder.path(), "train", &flags);
    assert_keeps_old_version(&old.join("run.json"), &stderr);
    assert!(stderr.contains(&format!("training: {step} of 16")), "it starts after step {step}: {stderr}");

    assert_same_files(&old, &today);
    let lines = |path: &Path| read(path).lines().map(str::to_owned).collect::<Vec<_>>();
    let fixture = golden::folder().join("interrupted").join(&name);
    let metrics = lines(&old.join("metrics.jsonl"));
    assert_eq!(
        metrics[..n_kept],
        lines(&fixture.join("metrics.jsonl"))[..n_kept],
        "steps before the checkpoint"
    );
    let references = lines(&fixture.join("reference.jsonl"));
    assert_eq!(lines(&old.join("reference.jsonl"))[..references.len()], references, "cached references");

    // The loss curve must match an uninterrupted run made today. Other batch shapes round differently and moved it by
    // 5e-7. A checkpoint with a zeroed optimizer state fails the bound.
    for (a, b) in rows(&old.join("metrics.jsonl")).iter().zip(rows(&today.join("metrics.jsonl"))) {
        assert_eq!(a["step"], b["step"]);
        for loss in ["loss", "eval_loss"] {
            assert_eq!(a[loss].is_f64(), b[loss].is_f64(), "{a} {b}");
            if let (Some(a), Some(b)) = (a[loss].as_f64(), b[loss].as_f64()) {
                assert!((a - b).abs() < 1e-3, "{loss}: {a} {b}");
            }
        }
    }
    let report: Value = serde_json::from_str(&read(&old.join("report.json"))).unwrap();
    assert_eq!(
        (&report["outcome"]["n_steps"], &report["outcome"]["ending"]),
        (&16.into(), &"finished".into())
    );
    assert_eq!(report["result"], result);
    assert!(old.join(result).exists());
}

#[test]
fn training_of_an_adapter_that_an_older_version_interrupted_resumes() {
    // Stopped by Ctrl-C: the checkpoint holds the last step.
    assert_training_resumes("lora", 6, 7, "adapter.gguf");
}

#[test]
fn training_of_a_control_vector_that_was_killed_under_an_older_version_resumes() {
    // Killed two steps after the checkpoint: both are repeated.
    assert_training_resumes("vector", 4, 5, "steer.gguf");
}
