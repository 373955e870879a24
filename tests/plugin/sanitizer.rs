//! Runs the C programs under clang's address and undefined-behaviour sanitizers, and the C functions under its fuzzer.
//!
//! The library is also compiled with the address sanitizer.

use std::process::Command;

use super::build::{compiler, run, sanitized_program};
use super::misuse::files;
use super::{TOKENS, interventions, tiny};

const FLAGS: [&str; 2] = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"];

/// Whether the compiler has its sanitizers. With `CI=true`, `scripts/test.sh` installs them.
fn has_sanitizers() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("x.c");
    std::fs::write(
        &source,
        "int LLVMFuzzerTestOneInput(const char *d, long n) { (void) d; (void) n; return 0; }\n",
    )
    .unwrap();
    let mut command = Command::new(compiler(false));
    command.arg("-fsanitize=address,undefined,fuzzer").arg(&source).arg("-o").arg(folder.path().join("x"));
    let has_them = command.output().is_ok_and(|output| output.status.success());
    assert!(has_them || std::env::var("CI").as_deref() != Ok("true"), "{command:?} failed");
    if !has_them {
        eprintln!("skipped: this compiler has no sanitizers (Debian: apt-get install libclang-rt-16-dev)");
    }
    has_them
}

#[test]
fn the_sanitizer_detects_a_read_of_the_library_past_the_end_of_an_array() {
    if !has_sanitizers() {
        return;
    }
    let beyond = sanitized_program("tests/plugin/beyond.c", "beyond", &FLAGS);
    let folder = tempfile::tempdir().unwrap();
    let [model, steer, ..] = files(folder.path());
    // Correct use first.
    run(Command::new(&beyond).arg(&model).arg(&steer));
    let output = Command::new(&beyond).arg(&model).arg(&steer).arg("beyond").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("heap-buffer-overflow"), "{stderr}");
    assert!(stderr.contains("READ of size 4") && stderr.contains("detox_batch"), "{stderr}");
}

#[test]
fn the_c_example_runs_clean_under_the_address_sanitizer() {
    if !has_sanitizers() {
        return;
    }
    let steer = sanitized_program("examples/c/steer.c", "steer-sanitized", &FLAGS);
    let folder = tempfile::tempdir().unwrap();
    let [_, _, _, probe, _] = files(folder.path());
    let edits = [
        r#""what": {"neurons": [[1, 3], [2, 40]]}, "edit": {"offset": 3}"#,
        r#""what": {"neurons": [[0, 9], [2, 7]]}, "edit": {"assign": 4}"#,
    ];
    let file = interventions(folder.path(), &edits);
    let tokens = TOKENS.map(|token| token.to_string()).join(",");
    let gate =
        ["--callback", "--sequences", "3", "--off", "1", "--gate", probe.to_str().unwrap(), "0.5", "-n", "8"];
    for flags in [&["--ubatch", "4", "--count"][..], &gate, &["--callback", "--race", "100"]] {
        for model in ["llama", "gemma3"] {
            let mut command = Command::new(&steer);
            command.arg("-m").arg(tiny(model)).args(["-t", &tokens]).arg("--steer").arg(&file);
            run(command.args(flags).args(["--coefficient", "0.5"]));
        }
    }
}

#[test]
fn misuse_is_refused_cleanly_under_the_address_sanitizer() {
    if !has_sanitizers() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let misuse = sanitized_program("tests/plugin/misuse.c", "misuse-sanitized", &FLAGS);
    run(Command::new(misuse).args(files(folder.path())));
}

#[test]
fn the_fuzzer_finds_nothing_in_ten_thousand_runs() {
    if !has_sanitizers() {
        return;
    }
    let flags = ["-fsanitize=address,undefined,fuzzer", FLAGS[1]];
    let fuzz = sanitized_program("tests/plugin/fuzz.c", "fuzz", &flags);
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path()).map(|path| path.to_str().unwrap().to_owned()).join(":");
    let mut command = Command::new(fuzz);
    command.env("DETOX_FUZZ_FILES", files).current_dir(folder.path());
    command.args(["-runs=10000", "-seed=1", "-len_control=0", "-max_len=500", "-print_final_stats=1"]);
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{stderr}", output.status);
    // `fuzz.c` alone has about five hundred counters. Without the library's, the fuzzer could not see which code
    // its inputs reach.
    let before = stderr.split_once(" inline 8-bit counters").expect("counters").0;
    let n_counters: usize = before.rsplit('(').next().unwrap().trim().parse().unwrap();
    assert!(n_counters > 3000, "{n_counters} counters: was the library compiled for the fuzzer?");
}
