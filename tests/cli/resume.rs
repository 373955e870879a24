//! Interrupted runs resume and produce the same bytes as uninterrupted ones.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{differing, small_eval};

fn cut(path: &std::path::Path, n_bytes: usize) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..n_bytes.min(bytes.len())]).unwrap();
}

#[test]
fn a_truncated_run_resumes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    small_eval(&whole).assert().success();
    let n_bytes = std::fs::metadata(whole.join("generations.jsonl")).unwrap().len() as usize;
    for n in [0, 1, n_bytes / 3, n_bytes / 2, n_bytes - 1, n_bytes] {
        small_eval(&broken).assert().success();
        for name in
            ["report.json", "report.html", "report.md", "report.csv", "per_prompt.jsonl", "scores.jsonl"]
        {
            std::fs::remove_file(broken.join(name)).unwrap();
        }
        cut(&broken.join("generations.jsonl"), n);
        small_eval(&broken).assert().success();
        assert_eq!(differing(&whole, &broken), [""; 0], "truncated to {n} bytes");
    }
    cut(&broken.join("scores.jsonl"), 700);
    small_eval(&broken).assert().success();
    assert_eq!(differing(&whole, &broken), [""; 0]);
}

/// An evaluation of several dozen units.
fn long_eval(output: &std::path::Path) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("detox-gguf"));
    command.args(["eval", "--lang", "en,de,fr", "-k", "8", "-n", "20", "-np", "2", "-t", "1", "-m"]);
    command.arg(super::tiny("llama.gguf")).arg("-o").arg(output);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    assert!(long_eval(&whole).status().unwrap().success());
    let mut n_kills = 0;
    for _ in 0..3 {
        let before = std::fs::metadata(killed.join("generations.jsonl")).map_or(0, |m| m.len());
        let mut child = long_eval(&killed).spawn().unwrap();
        let started = Instant::now();
        loop {
            let now = std::fs::metadata(killed.join("generations.jsonl")).map_or(0, |m| m.len());
            if child.try_wait().unwrap().is_some() {
                break;
            }
            if now > before {
                child.kill().unwrap();
                child.wait().unwrap();
                n_kills += 1;
                break;
            }
            assert!(started.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(n_kills > 0, "the run ended before it could be killed");
    assert!(long_eval(&killed).status().unwrap().success());
    assert_eq!(differing(&whole, &killed), [""; 0]);
}

#[cfg(unix)]
#[test]
fn a_run_on_a_full_disk_resumes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
    assert!(long_eval(&whole).status().unwrap().success());
    let eval = long_eval(&stopped);
    // With a limit of 16 KiB per file, a write fails in mid-run, as on a full disk.
    let output = Command::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\""])
        .arg(eval.get_program())
        .args(eval.get_args())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("cannot write") && text.contains("generations.jsonl"), "{text}");
    assert!(!stopped.join("report.html").exists());
    assert!(long_eval(&stopped).status().unwrap().success());
    assert_eq!(differing(&whole, &stopped), [""; 0]);
}
