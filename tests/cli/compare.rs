//! `compare`, and its former name `eval --compare`.

use super::{contents, detox, differing, failure, small_eval};

#[test]
fn a_run_compared_with_itself_shows_no_difference() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    small_eval(&run).assert().success();
    let output = folder.path().join("comparison");
    detox().arg("compare").arg(&run).arg(&run).arg("-o").arg(&output).assert().success();
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
fn two_runs_are_paired_by_prompt_under_both_names_of_the_command() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    small_eval(&a).assert().success();
    // The last value of a flag counts.
    small_eval(&b).args(["--temp", "1.4"]).assert().success();
    let compare = |name: &[&str], output: &str| {
        let mut command = detox();
        command.args(name).arg(&a).arg(&b).arg("-o").arg(folder.path().join(output));
        String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap()
    };
    let table = compare(&["compare"], "new");
    assert!(table.contains("temperature"), "the warning names the setting that differs: {table}");
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    assert_eq!(compare(&["eval", "--compare"], "old"), table);
    assert_eq!(differing(&folder.path().join("new"), &folder.path().join("old")), [""; 0]);
}

#[test]
fn the_table_is_printed_without_an_output_folder() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    small_eval(&run).assert().success();
    let output = detox().arg("compare").arg(&run).arg(&run).assert().success().get_output().stdout.clone();
    assert!(String::from_utf8(output).unwrap().contains("EMT"));
}

#[test]
fn rejects_a_folder_without_a_run() {
    let folder = tempfile::tempdir().unwrap();
    for name in [&["compare"][..], &["eval", "--compare"]] {
        let (code, text) = failure(detox().args(name).arg(folder.path()).arg(folder.path()));
        assert_eq!(code, 1);
        assert!(text.contains("found no run.json"), "{text}");
    }
}

#[test]
fn rejects_flags_of_eval_that_have_no_effect_on_a_comparison() {
    // A unit test of src/cli/eval.rs tries every flag of `eval`.
    for flag in [&["--flash-attn", "on"][..], &["--threshold", "0.7"], &["--check-tensors"]] {
        let (code, text) = failure(detox().args(["eval", "--compare", "a", "b"]).args(flag));
        assert_eq!(code, 2);
        assert!(text.contains("cannot be used with") && text.contains(flag[0]), "{text}");
    }
    let (code, text) = failure(detox().args(["compare", "a", "b", "--flash-attn", "on"]));
    assert_eq!(code, 2);
    assert!(text.contains("unexpected argument"), "{text}");
}

#[test]
fn the_help_lists_compare_and_hides_its_former_name() {
    let help = |arguments: &[&str]| {
        String::from_utf8(detox().args(arguments).assert().success().get_output().stdout.clone()).unwrap()
    };
    assert!(help(&["--help"]).contains("Compare two runs, prompt by prompt"));
    assert!(!help(&["eval", "--help"]).contains("--compare"));
}
