//! What happens when a model changes while it runs, when llama.cpp crashes, and when flags ask for the impossible.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::{contents, detox, failure, rows, tiny};

/// An evaluation of a copy of the tiny llama, long enough to meddle with it, stopped at its first finished unit.
fn long_eval(folder: &Path) -> Child {
    fs::copy(tiny("llama.gguf"), folder.join("m.gguf")).unwrap();
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("detox-gguf"));
    command.args(["eval", "-m", "m.gguf", "-o", "run", "--lang", "en,de,fr", "-k", "25", "-n", "40"]);
    command.args(["-np", "4", "-t", "1"]).current_dir(folder).env_remove("RUST_LOG");
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while !fs::metadata(folder.join("run/generations.jsonl")).is_ok_and(|found| found.len() > 0) {
        assert!(started.elapsed() < Duration::from_secs(60), "no unit was finished");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

/// Waits for the program to end. Returns its exit code and standard error.
fn ended(child: Child) -> (i32, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code().expect("it was not killed by a signal"), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_model_that_is_overwritten_while_it_runs_ends_the_run_without_a_report() {
    let folder = tempfile::tempdir().unwrap();
    let child = long_eval(folder.path());
    let path = folder.path().join("m.gguf");
    let mut bytes = fs::read(&path).unwrap();
    let half = bytes.len() / 2;
    bytes[half..].reverse();
    // In place, as `dd conv=notrunc` and `rsync --inplace` write: a file that is truncated first sends a signal.
    fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(&bytes).unwrap();
    let (code, message) = ended(child);
    assert_eq!(code, 1, "{message}");
    assert!(message.contains("error: m.gguf: the file was changed while it was in use"), "{message}");
    let run = folder.path().join("run");
    assert!(!run.join("report.json").exists());
    let finished = rows(&run.join("generations.jsonl"));
    assert!(!finished.is_empty(), "units finished before the change are kept");

    // As the hint says: restore the file, and repeat the command.
    fs::copy(tiny("llama.gguf"), &path).unwrap();
    let mut again = detox();
    again.args(["eval", "-m", "m.gguf", "-o", "run", "--lang", "en,de,fr", "-k", "25", "-n", "40"]);
    again.args(["-np", "4", "-t", "1"]).current_dir(folder.path()).assert().success();
    assert_eq!(rows(&run.join("generations.jsonl"))[..finished.len()], finished);
}

#[cfg(unix)]
#[test]
fn a_model_that_is_replaced_by_another_file_runs_to_the_end_under_its_own_hash() {
    let folder = tempfile::tempdir().unwrap();
    let child = long_eval(folder.path());
    let path = folder.path().join("m.gguf");
    fs::copy(tiny("qwen2.gguf"), folder.path().join("other.gguf")).unwrap();
    fs::rename(folder.path().join("other.gguf"), &path).unwrap();
    let (code, message) = ended(child);
    assert_eq!(code, 0, "{message}");
    let report =
        String::from_utf8(contents(&folder.path().join("run")).remove("report.json").unwrap()).unwrap();
    let hash = detox_gguf::gguf::model_sha256(tiny("llama.gguf"), |_, _| {}).unwrap();
    assert!(report.contains(&hash));
}

#[cfg(unix)]
#[test]
fn a_truncated_model_ends_the_run_with_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let child = long_eval(folder.path());
    fs::write(folder.path().join("m.gguf"), "").unwrap();
    let (code, message) = ended(child);
    assert_eq!(code, 1, "{message}");
    // Noticed between two units, or by the signal in the middle of one.
    assert!(
        message.contains("m.gguf was truncated") || message.contains("m.gguf: the file was changed"),
        "{message}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_crash_names_the_model_and_exits_with_1() {
    for (signal, expected) in [("SEGV", "SIGSEGV"), ("BUS", "SIGBUS"), ("FPE", "SIGFPE"), ("ABRT", "SIGABRT")]
    {
        let folder = tempfile::tempdir().unwrap();
        let child = long_eval(folder.path());
        let sent =
            std::process::Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status();
        assert!(sent.unwrap().success());
        let (code, message) = ended(child);
        assert_eq!(code, 1, "{message}");
        assert!(message.contains("error: model m.gguf: ") && message.contains(expected), "{message}");
        assert!(message.contains("hint: "), "{message}");
    }
}

#[test]
fn a_hybrid_model_runs_one_sequence_at_a_time_and_says_so() {
    let logprobs = |parallel: &[&str]| {
        let mut command = detox();
        command.args([
            "generate", "--lang", "en", "--limit", "2", "-k", "2", "-n", "3", "--temp", "0", "-t", "1",
        ]);
        let output =
            command.arg("-m").arg(tiny("plamo2.gguf")).args(parallel).assert().success().get_output().clone();
        let of_line =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["logprob"].clone();
        let logprobs: Vec<_> = String::from_utf8(output.stdout).unwrap().lines().map(of_line).collect();
        (logprobs, String::from_utf8(output.stderr).unwrap())
    };
    let (alone, message) = logprobs(&["-np", "1"]);
    assert!(!message.contains("one sequence at a time"), "{message}");
    assert_eq!(alone[0], alone[1], "greedy continuations of one prompt are equal");
    for parallel in [&["-np", "2"][..], &[]] {
        let (found, message) = logprobs(parallel);
        assert_eq!(found, alone);
        assert!(message.contains("one sequence at a time"), "{message}");
    }
}

#[test]
fn flags_that_ask_for_the_impossible_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let huge = "4294967295";
    let cases: [(&str, &[&str], &str); 9] = [
        ("generate", &["-k", huge], "-k/--samples"),
        ("generate", &["-c", huge], "-c/--ctx-size"),
        ("generate", &["-c", "2147483647"], "-c/--ctx-size"),
        ("generate", &["-b", "9223372036854775807"], "-b/--batch-size"),
        ("generate", &["-np", huge], "-np/--parallel"),
        ("generate", &["-t", huge], "-t/--threads"),
        ("train", &["-t", huge, "-o", "run"], "-t/--threads"),
        ("train", &["--rank", huge, "-o", "run"], "--rank"),
        ("probe", &["--epochs", huge, "-o", "probe.gguf"], "--epochs"),
    ];
    for (command, flags, named) in cases {
        let mut detox = detox();
        detox.arg(command).arg("-m").arg(tiny("llama.gguf")).args(flags).current_dir(folder.path());
        let (code, message) = failure(detox.timeout(Duration::from_secs(60)));
        assert_eq!(code, 2, "{message}");
        assert!(
            message.lines().any(|line| line.starts_with(&format!("error: {named}: "))),
            "{flags:?}: {message}"
        );
    }
}

#[test]
fn the_smallest_batch_is_enough_for_one_sequence() {
    let mut command = detox();
    command.args([
        "generate", "--lang", "en", "--limit", "1", "-k", "2", "-n", "2", "-np", "1", "-b", "1", "-ub", "1",
    ]);
    command.arg("-m").arg(tiny("llama.gguf")).assert().success();
}

#[cfg(target_os = "linux")]
#[test]
fn output_to_a_closed_pipe_or_a_file_beyond_the_limit_is_an_error() {
    let run = |shell: &str| {
        let mut command = assert_cmd::Command::new("sh");
        command
            .args(["-c", shell])
            .env("D", assert_cmd::cargo::cargo_bin("detox-gguf"))
            .env("M", tiny("llama.gguf"));
        failure(&mut command)
    };
    let (code, message) = run("$D generate -m $M --lang en --limit 1 -k 1 -n 2 -t 1 >&-");
    assert_eq!(code, 1, "{message}");
    assert!(message.contains("cannot write <stdout>: it is closed"), "{message}");
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("o.jsonl");
    let (code, message) = run(&format!(
        "ulimit -f 0; $D generate -m $M --lang en --limit 1 -k 1 -n 2 -t 1 -o {}",
        output.display()
    ));
    assert_eq!(code, 1, "{message}");
    assert!(message.contains("cannot write") && message.contains("too large"), "{message}");
}
