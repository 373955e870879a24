//! `eval --compare`.

use super::{contents, detox, failure, small_eval};

#[test]
fn a_run_compared_with_itself_shows_no_difference() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    small_eval(&run).assert().success();
    let output = folder.path().join("comparison");
    detox().arg("eval").arg("--compare").arg(&run).arg(&run).arg("-o").arg(&output).assert().success();
    let names: Vec<String> = contents(&output).into_keys().collect();
    assert_eq!(names, ["comparison.csv", "comparison.html", "comparison.json", "comparison.md"]);
    let comparison: serde_json::Value =
        serde_json::from_slice(&contents(&output)["comparison.json"]).unwrap();
    let mean = comparison["mean"].as_array().unwrap();
    assert!(mean.len() >= 8);
    for metric in mean {
        assert_eq!(metric["difference"]["value"], 0.0, "{metric}");
    }
}

#[test]
fn two_runs_are_paired_by_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    small_eval(&a).assert().success();
    // The last value of a flag counts.
    small_eval(&b).args(["--temp", "1.4"]).assert().success();
    let output =
        detox().arg("eval").arg("--compare").arg(&a).arg(&b).assert().success().get_output().stdout.clone();
    let table = String::from_utf8(output).unwrap();
    assert!(table.contains("temperature"), "the difference in settings is named: {table}");
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
}

#[test]
fn rejects_a_folder_without_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let (code, said) = failure(detox().arg("eval").arg("--compare").arg(folder.path()).arg(folder.path()));
    assert_eq!(code, 1);
    assert!(said.contains("holds no run.json"), "{said}");
}
