//! `train --device cuda` on the command line.

use std::path::Path;
use std::process::{Command, Output};

use super::{gpu, tiny};

fn train(output: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_detox-gguf"));
    command.args("train --device cuda --rank 4 --max-steps 1 --held-out 0 --batch-size 2".split(' '));
    command.args("--max-length 32 --max-prompt 16 --learning-rate 1e-3".split(' '));
    command.arg("-m").arg(tiny("llama-q8_0")).arg("--pairs").arg(output.with_file_name("pairs.jsonl"));
    command.arg("-o").arg(output).args(arguments);
    command.output().unwrap()
}

#[test]
fn a_run_resumes_with_other_memory_options_but_not_with_another_recipe() {
    let Some(_turn) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    // Three of the program's own pairs, so that the comparison with llama.cpp is short.
    let own = include_str!("../../src/train/data/own_pairs.jsonl").lines().take(3);
    let pairs: String = own.map(|line| format!("{line}\n")).collect();
    std::fs::write(folder.path().join("pairs.jsonl"), pairs).unwrap();
    let stderr = |output: &Output| String::from_utf8(output.stderr.clone()).unwrap();
    let first = train(&run, &["-t", "2"]);
    assert!(first.status.success(), "{}", stderr(&first));
    let record = std::fs::read_to_string(run.join("run.json")).unwrap();
    assert!(!record.contains("max_rows") && record.contains("\"device\": \"cuda\""), "{record}");
    // By default, enough tokens for all pairs of a step.
    assert!(stderr(&first).contains(" tokens per pass (--ubatch-size)\n"), "{}", stderr(&first));

    let choices = ["-ub", "40", "--frozen", "quantised", "--checkpointing", "on", "-t", "1"];
    let other = train(&run, &choices);
    assert!(other.status.success(), "{}", stderr(&other));
    let notice =
        "resuming with 40 tokens per pass, weights in the file's blocks, activations recomputed instead of ";
    assert!(stderr(&other).contains(notice), "{}", stderr(&other));
    assert_eq!(std::fs::read_to_string(run.join("run.json")).unwrap(), record);

    let refused = train(&run, &["--beta", "0.2"]);
    assert!(
        !refused.status.success() && stderr(&refused).contains("beta is 0.1 there, and 0.2 now"),
        "{}",
        stderr(&refused)
    );
}
