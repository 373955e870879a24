//! `train`: the files it writes, the messages it prints, and the inputs it rejects.

use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::Command;

use super::{contents, detox, failure, rows, tiny};

/// A command that trains for six steps on the built-in pairs.
fn small_train(output: &Path) -> Command {
    let mut command = detox();
    command.args(["train", "--rank", "4", "--max-steps", "6", "--eval-every", "3", "-t", "2", "-s", "5"]);
    command.args([
        "--warmup-steps",
        "2",
        "--learning-rate",
        "1e-3",
        "--max-length",
        "64",
        "--max-prompt",
        "32",
    ]);
    command.arg("-m").arg(tiny("llama.gguf")).arg("-o").arg(output);
    command
}

fn train(model: &str, output: &Path) -> Command {
    let mut command = detox();
    command.args(["train", "-t", "2", "-m"]).arg(tiny(model)).arg("-o").arg(output);
    command
}

#[test]
fn a_change_too_small_to_check_is_said_to_be_that_and_the_result_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    for model in ["llama.gguf", "llama-q8_0.gguf"] {
        let run = folder.path().join(model);
        let mut command = train(model, &run);
        command.args(["--rank", "4", "--max-steps", "1", "--learning-rate", "1e-20", "--max-length", "64"]);
        let output = command.args(["--max-prompt", "32"]).assert().success().get_output().clone();
        let text = String::from_utf8(output.stdout).unwrap().replace("\n  ", " ");
        assert!(text.contains("the trained change is too small to tell from rounding"), "{text}");
        assert!(text.contains("train more steps, or raise --learning-rate"), "{text}");
        assert!(run.join("adapter.gguf").exists());
    }
}

#[test]
fn a_run_writes_its_result_its_metrics_and_a_report_with_curves() {
    let folder = tempfile::tempdir().unwrap();
    for (method, result) in [("lora", "adapter.gguf"), ("vector", "steer.gguf"), ("full", "model.gguf")] {
        let run = folder.path().join(method);
        let output = small_train(&run).args(["--method", method]).assert().success().get_output().clone();
        let (stdout, stderr) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        let names: Vec<String> = contents(&run).into_keys().collect();
        let mut expected = vec![
            "best.gguf",
            "checkpoint.gguf",
            "metrics.jsonl",
            "reference.jsonl",
            "report.html",
            "report.json",
            "run.json",
            "run.json.bak",
            result,
        ];
        expected.sort_unstable();
        assert_eq!(names, expected);

        let metrics = rows(&run.join("metrics.jsonl"));
        let steps: Vec<u64> = metrics
            .iter()
            .filter(|row| row["loss"].is_f64())
            .map(|row| row["step"].as_u64().unwrap())
            .collect();
        let evaluations: Vec<u64> = metrics
            .iter()
            .filter(|row| row["eval_loss"].is_f64())
            .map(|row| row["step"].as_u64().unwrap())
            .collect();
        assert_eq!((steps, evaluations), (vec![1, 2, 3, 4, 5, 6], vec![3, 6]));
        for name in [
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
            "grad_norm",
            "learning_rate",
            "epoch",
        ] {
            assert!(metrics[0][name].is_f64(), "{name} in {}", metrics[0]);
        }

        let html = std::fs::read_to_string(run.join("report.html")).unwrap();
        for title in [
            "Loss",
            "Margin: chosen minus rejected reward",
            "Reward accuracy: fraction of pairs with a margin above 0",
            "Rewards of chosen",
            "Gradient norm",
        ] {
            assert!(html.contains(&format!("<figcaption>{title}")), "no plot of {title}");
        }
        assert_eq!(html.matches("<svg").count(), 5);
        assert!(html.contains("Training of llama.gguf") && html.contains("of 6 was kept"));

        let report: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(run.join("report.json")).unwrap()).unwrap();
        assert_eq!((&report["outcome"]["n_steps"], &report["result"]), (&6.into(), &result.into()));
        assert_eq!(
            (&report["outcome"]["n_train"], &report["outcome"]["n_held_out"]),
            (&152.into(), &8.into())
        );
        assert!(report["agreement"]["difference"]["mean_kl"].as_f64().unwrap() < 1e-6);

        assert!(stdout.contains("in llama.cpp       mean KL ") && stdout.contains("best step "), "{stdout}");
        assert!(stdout.contains("chosen on only 8 held-out pairs"), "{stdout}");
        assert!(stderr.contains("step     3  held out: loss 0."), "{stderr}");
        assert!(stderr.contains(result) && stderr.contains("report.html"), "{stderr}");
    }
}

#[test]
fn a_result_loads_with_the_flag_that_the_run_names() {
    let folder = tempfile::tempdir().unwrap();
    for (method, flag, result) in
        [("lora", "--lora", "adapter.gguf"), ("vector", "--control-vector", "steer.gguf")]
    {
        let run = folder.path().join(method);
        let output = small_train(&run).args(["--method", method]).assert().success().get_output().clone();
        assert!(String::from_utf8(output.stderr).unwrap().contains(flag));
        let mut generate = detox();
        generate.args(["generate", "-k", "1", "-n", "4", "--lang", "en", "--limit", "1", "-t", "1", "-m"]);
        generate.arg(tiny("llama.gguf")).arg(flag).arg(run.join(result)).assert().success();
    }
}

#[test]
fn the_same_command_writes_the_same_adapter_and_does_not_repeat_a_finished_run() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let adapter = |run: &Path| std::fs::read(run.join("adapter.gguf")).unwrap();
    small_train(&first).assert().success();
    small_train(&second).assert().success();
    assert!(adapter(&first) == adapter(&second));
    let metrics = std::fs::read(second.join("metrics.jsonl")).unwrap();
    small_train(&second).assert().success();
    assert!(adapter(&first) == adapter(&second));
    assert!(std::fs::read(second.join("metrics.jsonl")).unwrap() == metrics, "a finished step was repeated");
}

/// The start of the message after "error: ", and the arguments that cause it.
const BAD_SETTINGS: [(&str, &[&str]); 28] = [
    ("--rank: expected at least 1, found 0", &["--rank", "0"]),
    ("--alpha: expected a positive number, found 0", &["--alpha", "0"]),
    ("--alpha: expected a positive number, found -2", &["--alpha", "-2"]),
    ("--targets: expected names from q, k,", &["--targets", "nonsense"]),
    ("--targets: expected names from q, k,", &["--targets", "q,nonsense"]),
    ("--beta: expected a positive number, found -1", &["--beta", "-1"]),
    ("--beta: expected a positive number, found 0", &["--beta", "0"]),
    ("--beta: expected a positive number, found NaN", &["--beta", "NaN"]),
    ("--held-out: expected a fraction from 0 to less than 1, found 1.5", &["--held-out", "1.5"]),
    ("--held-out: expected a fraction from 0 to less than 1, found -0.1", &["--held-out", "-0.1"]),
    ("--held-out: expected a fraction from 0 to less than 1, found 1", &["--held-out", "1"]),
    ("--learning-rate: expected a positive number, found -0.001", &["--learning-rate", "-0.001"]),
    ("--learning-rate: expected a positive number, found inf", &["--learning-rate", "inf"]),
    ("--max-grad-norm: expected a positive number, found -1", &["--max-grad-norm", "-1"]),
    (
        "--label-smoothing: expected a fraction from 0 to less than 0.5, found 0.5",
        &["--label-smoothing", "0.5"],
    ),
    (
        "--label-smoothing: expected a fraction from 0 to less than 0.5, found -1",
        &["--label-smoothing", "-1"],
    ),
    (
        "--label-smoothing: the hinge loss does not support it",
        &["--label-smoothing", "0.1", "--loss", "hinge"],
    ),
    ("--weight-decay: only AdamW supports it", &["--weight-decay", "0.1"]),
    (
        "--weight-decay: expected a number from 0 up, found -1",
        &["--weight-decay", "-1", "--optimizer", "adamw"],
    ),
    ("--batch-size: expected at least 1, found 0", &["--batch-size", "0"]),
    ("--epochs: expected at least 1, found 0", &["--epochs", "0"]),
    ("--max-steps: expected at least 1, found 0", &["--max-steps", "0"]),
    ("--eval-every: expected at least 1, found 0", &["--eval-every", "0"]),
    ("--patience: expected at least 1, found 0", &["--patience", "0"]),
    ("--max-prompt: expected at least 1, found 0", &["--max-prompt", "0"]),
    ("--max-length: expected at least 1, found 0", &["--max-length", "0"]),
    ("-t/--threads: expected a number from 1 to 512, found 0", &["-t", "0"]),
    ("--ubatch-size: expected at least 1, found 0", &["-ub", "0"]),
];

#[test]
fn rejects_settings_out_of_range_before_creating_the_folder() {
    for (start, arguments) in BAD_SETTINGS {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let mut command = detox();
        command.args(["train", "-m"]).arg(tiny("llama.gguf")).arg("-o").arg(&run).args(arguments);
        let (code, stderr) = failure(&mut command);
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.starts_with(&format!("error: {start}")), "{arguments:?}: {stderr}");
        assert!(!run.exists(), "{arguments:?}");
    }
}

#[test]
fn rejects_unknown_values_and_lists_the_valid_ones() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, words) in [
        (["--method", "magic"], "lora, vector, full"),
        (["--loss", "magic"], "expected sigmoid, ipo or hinge, found \"magic\""),
        (["--optimizer", "magic"], "expected rmsprop or adamw, found \"magic\""),
        (["--schedule", "magic"], "expected constant, linear or cosine, found \"magic\""),
        (["--products", "magic"], "exact, fast"),
        (["--device", "gpu"], "expected cpu, cuda or cuda:N, found \"gpu\""),
        (["--frozen", "magic"], "bf16, quantised, auto"),
    ] {
        let (code, stderr) = failure(train("llama.gguf", &folder.path().join("run")).args(arguments));
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains(arguments[0]) && stderr.contains(words), "{stderr}");
    }
}

#[test]
fn rejects_gpu_options_in_a_cpu_build_or_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    for (arguments, start, cure) in [
        (
            ["--device", "cuda:1"],
            "error: --device cuda:1: this build trains on the CPU only",
            "--features cuda",
        ),
        (
            ["--frozen", "bf16"],
            "error: --frozen: the CPU always keeps frozen matrices in the file's blocks",
            "--device cuda",
        ),
    ] {
        if cfg!(any(feature = "cuda", feature = "cuda-emulation")) && arguments[0] == "--device" {
            continue;
        }
        let (code, stderr) = failure(train("llama.gguf", &run).args(arguments));
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.starts_with(start) && stderr.contains(cure), "{stderr}");
        assert!(!run.exists());
    }
}

#[test]
fn rejects_models_that_cannot_be_trained_before_creating_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    for (model, arguments, code, words) in [
        (
            "llama-q8_0.gguf",
            &["--method", "full"][..],
            2,
            "--method full: it trains the weights themselves, and tensor",
        ),
        (
            "gemma3.gguf",
            &["--targets", "q,embed"][..],
            2,
            "--targets: embed: this model shares its token embeddings",
        ),
        ("gpt2.gguf", &["--targets", "gate"][..], 2, "--targets: this model has none of these matrices"),
        ("gpt2.gguf", &["--max-length", "1000", "--pairs", "long.jsonl"][..], 2, "--max-length: "),
        ("plamo2.gguf", &[][..], 1, "architecture \"plamo2\" cannot be trained here"),
        ("bert.gguf", &[][..], 1, "bert"),
        ("missing.gguf", &[][..], 1, "No such file"),
    ] {
        let mut command = train(model, &run);
        let long = format!(
            "{{\"prompt\": \"So it\", \"chosen\": \"{}\", \"rejected\": \" went\"}}\n",
            " goes".repeat(300)
        );
        std::fs::write(folder.path().join("long.jsonl"), long).unwrap();
        let (found, stderr) = failure(command.current_dir(folder.path()).args(arguments));
        assert_eq!(found, code, "{model}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(words), "{model}: {stderr}");
        assert!(!run.exists(), "{model} {arguments:?}");
    }
}

#[test]
fn rejects_malformed_pairs_by_file_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let (pairs, run) = (folder.path().join("pairs.jsonl"), folder.path().join("run"));
    let missing = failure(train("llama.gguf", &run).arg("--pairs").arg(&pairs));
    assert_eq!(missing.0, 1);
    assert!(missing.1.contains("pairs.jsonl: No such file"), "{}", missing.1);
    let good = "{\"prompt\": \"a\", \"chosen\": \" b\", \"rejected\": \" c\"}";
    for (content, words) in [
        (format!("{good}\n{{broken\n"), "pairs.jsonl:2: expected JSON"),
        (
            format!("{good}\n\n{{\"prompt\": \"a\", \"chosen\": \"b\"}}\n"),
            "pairs.jsonl:3: expected a rejected answer",
        ),
        (format!("{good}\n{{\"text\": \"a\"}}\n"), "pairs.jsonl:2: expected a preference pair"),
        (String::new(), "pairs.jsonl: expected preference pairs, found an empty file"),
    ] {
        std::fs::write(&pairs, content).unwrap();
        let (code, stderr) = failure(train("llama.gguf", &run).arg("--pairs").arg(&pairs));
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.contains(words) && stderr.contains("\nhint: "), "{stderr}");
        assert!(!run.exists());
    }
}

/// Two valid pairs within 16 tokens, and one pair for each reason to skip it.
const PAIRS: &str = r#"{"prompt": "It is", "chosen": " sunny", "rejected": " raining"}
{"prompt": "It is", "chosen": "", "rejected": " raining"}
{"prompt": "It is", "chosen": " raining", "rejected": " raining"}
{"prompt": "It is the longest of all the prompts that anybody ever wrote down in this small file", "chosen": " yes", "rejected": " no"}
{"prompt": "We saw", "chosen": " a cat", "rejected": " a dog"}
"#;

#[test]
fn skipped_pairs_are_counted_by_reason() {
    let folder = tempfile::tempdir().unwrap();
    let (pairs, run) = (folder.path().join("pairs.jsonl"), folder.path().join("run"));
    let limits = ["--max-length", "16", "--max-prompt", "16", "--max-steps", "1", "--pairs"];
    std::fs::write(&pairs, PAIRS).unwrap();
    let output = train("llama.gguf", &run).args(limits).arg(&pairs).assert().success().get_output().clone();
    let stderr = String::from_utf8(output.stdout).unwrap();
    for words in [
        "1 for training, 1 held out, pairs.jsonl",
        "1 skipped: an empty answer",
        "1 skipped: no answer left after truncation",
        "1 skipped: chosen equal to rejected",
    ] {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
    let report: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(run.join("report.json")).unwrap()).unwrap();
    assert_eq!(report["skipped"].as_array().unwrap().len(), 3);

    let none: String = PAIRS.lines().skip(1).take(3).map(|line| format!("{line}\n")).collect();
    std::fs::write(&pairs, none).unwrap();
    let other = folder.path().join("other");
    let (code, stderr) = failure(train("llama.gguf", &other).args(limits).arg(&pairs));
    assert_eq!(code, 1, "{stderr}");
    let words = "pairs.jsonl: none of its 3 pairs can be used: 1 an empty answer, 1 no answer left after \
                 truncation, 1 chosen equal to rejected\nhint: give both answers";
    assert!(stderr.contains(words), "{stderr}");
    assert!(!other.exists());
}

#[test]
fn rejects_a_folder_with_another_run_and_names_the_difference() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    small_train(&run).assert().success();
    let before = contents(&run);
    for (arguments, words) in [
        (["--beta", "0.2"], "beta is 0.1 there, and 0.2 now"),
        (["--rank", "8"], "rank is 4 there, and 8 now"),
        (["--targets", "q,v"], "targets is [\"q\","),
        (["-s", "6"], "seed is 5 there, and 6 now"),
        (["--method", "vector"], "method is \"lora\" there, and \"vector\" now"),
    ] {
        // The parser rejects a flag that is given twice, so build the command from scratch.
        let mut command = detox();
        command.args(["train", "--max-steps", "6", "--eval-every", "3", "-t", "2", "--warmup-steps", "2"]);
        command.args(["--learning-rate", "1e-3", "--max-length", "64", "--max-prompt", "32"]);
        for (flag, value) in [("--rank", "4"), ("-s", "5")] {
            if arguments[0] != flag {
                command.args([flag, value]);
            }
        }
        command.args(arguments).arg("-m").arg(tiny("llama.gguf")).arg("-o").arg(&run);
        let (code, stderr) = failure(&mut command);
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.contains("holds another run: ") && stderr.contains(words), "{stderr}");
        assert!(stderr.contains("hint: choose a new folder"), "{stderr}");
    }
    let pairs = folder.path().join("pairs.jsonl");
    std::fs::write(&pairs, PAIRS).unwrap();
    let (_, stderr) = failure(small_train(&run).arg("--pairs").arg(&pairs));
    assert!(
        stderr.contains("pairs is \"the program's own pairs\" there, and \"pairs.jsonl\" now"),
        "{stderr}"
    );
    assert_eq!(contents(&run), before);
}

#[test]
fn a_diverging_run_fails_with_a_hint_that_works() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let (code, stderr) =
        failure(train("llama.gguf", &run).args(["--learning-rate", "1e30", "--warmup-steps", "0"]));
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("error: training diverged: ") && stderr.contains("hint: lower --learning-rate"),
        "{stderr}"
    );
    assert!(!run.join("adapter.gguf").exists() && !run.join("report.html").exists());
    // Another learning rate is another run, which this folder would reject. The hint must say so.
    let hint = stderr.lines().find(|line| line.starts_with("hint: ")).unwrap();
    assert!(hint.contains("-o") && !hint.contains("same command"), "{hint}");
}

/// A command that trains for sixty steps, to be run as a process.
fn long_train(output: &Path, method: &str) -> Process {
    let mut command = Process::new(assert_cmd::cargo::cargo_bin("detox-gguf"));
    command.args([
        "train",
        "--method",
        method,
        "--rank",
        "2",
        "--max-steps",
        "60",
        "--eval-every",
        "5",
        "-t",
        "1",
    ]);
    command.args([
        "--warmup-steps",
        "4",
        "--learning-rate",
        "1e-3",
        "--patience",
        "99",
        "--max-length",
        "64",
    ]);
    command.args(["--max-prompt", "32", "-m"]).arg(tiny("llama.gguf")).arg("-o").arg(output);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// The lines of `metrics.jsonl`, without times.
fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let mut rows = rows(&run.join("metrics.jsonl"));
    rows.iter_mut().for_each(|row| drop(row.as_object_mut().unwrap().remove("step_seconds")));
    rows
}

fn assert_same(whole: &Path, other: &Path, result: &str) {
    assert_eq!(metrics(whole), metrics(other));
    assert!(std::fs::read(whole.join(result)).unwrap() == std::fs::read(other.join(result)).unwrap());
}

/// Waits until a run has written more than `n_bytes` of metrics or has exited.
fn wait_for_metrics(run: &Path, n_bytes: u64, child: &mut std::process::Child) {
    let started = Instant::now();
    while std::fs::metadata(run.join("metrics.jsonl")).map_or(0, |m| m.len()) <= n_bytes {
        if child.try_wait().unwrap().is_some() {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    assert!(long_train(&whole, "lora").status().unwrap().success());
    let mut n_kills = 0;
    for _ in 0..3 {
        let before = std::fs::metadata(killed.join("metrics.jsonl")).map_or(0, |m| m.len());
        let mut child = long_train(&killed, "lora").spawn().unwrap();
        wait_for_metrics(&killed, before + 2000, &mut child);
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            n_kills += 1;
        }
        child.wait().unwrap();
    }
    assert!(n_kills > 0, "the run was too quick to be killed");
    assert!(long_train(&killed, "lora").status().unwrap().success());
    assert_same(&whole, &killed, "adapter.gguf");
}

#[cfg(unix)]
#[test]
fn ctrl_c_finishes_the_step_saves_and_says_how_to_resume() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
    assert!(long_train(&whole, "lora").status().unwrap().success());
    let mut child = long_train(&stopped, "lora").spawn().unwrap();
    wait_for_metrics(&stopped, 100, &mut child);
    assert!(Process::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    let steps = metrics(&stopped).iter().filter(|row| row["loss"].is_f64()).count();
    assert!(
        stderr.contains(&format!("saved after step {steps};")) && stderr.contains("the same command"),
        "{stderr}"
    );
    assert!(stopped.join("checkpoint.gguf").exists() && !stopped.join("adapter.gguf").exists());
    assert!(long_train(&stopped, "lora").status().unwrap().success());
    assert_same(&whole, &stopped, "adapter.gguf");
}

#[cfg(unix)]
#[test]
fn a_run_that_failed_to_write_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
    assert!(long_train(&whole, "vector").status().unwrap().success());
    let train = long_train(&stopped, "vector");
    // With a limit of 12 KiB per file, appending to the metrics or references fails in mid-run, as on a full disk. The
    // checkpoints of two directions are smaller than that.
    let output = Process::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 12; exec \"$0\" \"$@\""])
        .arg(train.get_program())
        .args(train.get_args())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("cannot write") && stderr.contains(".jsonl"), "{stderr}");
    assert!(stopped.join("checkpoint.gguf").exists() && !stopped.join("steer.gguf").exists());
    assert!(long_train(&stopped, "vector").status().unwrap().success());
    assert_same(&whole, &stopped, "steer.gguf");
}
