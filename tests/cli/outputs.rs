//! Outputs harm no other file, whatever becomes of the terminal, and show no control characters.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use super::{contents, detox, failure, small_eval, tiny};

/// The program with the words of `line` as arguments, started in `folder`.
fn detox_in(folder: &Path, line: &str) -> assert_cmd::Command {
    let mut command = detox();
    command.current_dir(folder).args(line.split_whitespace());
    command
}

/// A folder with a model, an adapter, neurons, prompts, pairs, texts and aligned sentences.
fn inputs() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_path_buf();
    for name in ["llama.gguf", "llama-lora.gguf"] {
        std::fs::copy(tiny(name), path.join(name)).unwrap();
    }
    let write = |name: &str, text: &str| std::fs::write(path.join(name), text).unwrap();
    write("neurons.json", "[[0, 1], [1, 2]]");
    write("en.jsonl", "{\"prompt\": \"You are such a\"}\n{\"prompt\": \"The\"}\n");
    write("texts.csv", "text,note\n\"you idiot\",mine\n");
    std::fs::create_dir(path.join("aligned")).unwrap();
    write("aligned/en.jsonl", "{\"text\": \"a dog\"}\n{\"text\": \"a cat\"}\n");
    write("aligned/de.jsonl", "{\"text\": \"ein Hund\"}\n{\"text\": \"eine Katze\"}\n");
    (folder, path)
}

#[test]
fn no_command_replaces_one_of_its_inputs() {
    let (_guard, folder) = inputs();
    std::fs::create_dir(folder.join("links")).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink("../llama.gguf", folder.join("links/model.gguf")).unwrap();
    #[cfg(unix)]
    std::fs::hard_link(folder.join("en.jsonl"), folder.join("links/en.jsonl")).unwrap();
    let run = "-m ./llama.gguf -t 1 -k 1 -n 1";
    let mut lines = vec![
        format!("pairs {run} --prompts en.jsonl -o en.jsonl"),
        format!("pairs {run} -o llama.gguf"),
        format!("pairs {run} --steer-chosen neurons.json:1 -o ./neurons.json"),
        format!("generate {run} --lora llama-lora.gguf -o llama-lora.gguf"),
        "score texts.csv -o ./texts.csv".to_owned(),
        "score texts.csv -o aligned/../texts.csv".to_owned(),
        "probe -m llama.gguf --data texts.csv -o texts.csv".to_owned(),
        "steer -m llama.gguf --neurons neurons.json --offset -1 -o neurons.json".to_owned(),
        "export -m llama.gguf --lora llama-lora.gguf -o llama.gguf".to_owned(),
        "export -m llama.gguf --lora llama-lora.gguf -o llama-lora.gguf".to_owned(),
        "retrieval -m llama.gguf --aligned aligned -o aligned".to_owned(),
        format!("generate {run} --prompts aligned -o aligned/en.jsonl"),
    ];
    if cfg!(unix) {
        lines.push("export -m llama.gguf --lora llama-lora.gguf -o links/model.gguf".to_owned());
        lines.push(format!("generate {run} --prompts en.jsonl -o links/en.jsonl"));
    }
    let before = (contents_of_files(&folder), contents(&folder.join("aligned")));
    for line in lines {
        let (code, text) = failure(&mut detox_in(&folder, &line));
        assert_eq!(code, 2, "{line}: {text}");
        assert!(text.contains("is an input of this command") && text.contains("\nhint: "), "{line}: {text}");
        assert_eq!((contents_of_files(&folder), contents(&folder.join("aligned"))), before, "{line}");
    }
}

/// The contents of the files of a folder, without its folders.
fn contents_of_files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        paths.filter(|path| path.is_file()).map(|p| (p.clone(), std::fs::read(p).unwrap())).collect();
    files.sort();
    files
}

#[test]
fn no_command_writes_into_a_folder_with_other_files_or_of_another_command() {
    let (_guard, folder) = inputs();
    let foreign = folder.join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    for name in ["report", "sweep", "comparison", "activations", "retrieval"] {
        std::fs::write(foreign.join(format!("{name}.json")), "precious").unwrap();
    }
    let run = folder.join("run");
    small_eval(&run).assert().success();
    let before = (contents(&foreign), contents(&run));
    for line in [
        "train -m llama.gguf --max-steps 1 --rank 2 -t 1",
        "sweep -m llama.gguf --neurons neurons.json --offsets 0,-1 -k 1 -n 1 -t 1",
        "activations -m llama.gguf --neurons neurons.json -n 1 -t 1",
        "retrieval -m llama.gguf --aligned aligned -t 1",
        "compare run run",
    ] {
        for output in ["foreign", "run"] {
            let (code, text) = failure(&mut detox_in(&folder, &format!("{line} -o {output}")));
            assert!(code == 1 || code == 2 && output == "run", "{line}: {text}");
            assert!(text.contains("\nhint: choose "), "{line}: {text}");
            assert_eq!((contents(&foreign), contents(&run)), before, "{line} -o {output}");
        }
    }
    for line in
        ["score texts.csv -o run/scores.jsonl", "export -m llama.gguf --lora llama-lora.gguf -o run/m.gguf"]
    {
        let (code, text) = failure(&mut detox_in(&folder, line));
        assert!(code == 2 && text.contains("in the folder of a run of `eval`"), "{line}: {text}");
        assert_eq!(contents(&run), before.1, "{line}");
    }
    // The hint works, and so does the same command again.
    for _ in 0..2 {
        detox_in(&folder, "compare run run -o new").assert().success();
    }
}

#[test]
fn locate_replaces_no_file_of_another_program_next_to_its_output() {
    let (_guard, folder) = inputs();
    std::fs::write(folder.join("found.csv"), "my,data\n").unwrap();
    std::fs::copy(folder.join("llama.gguf"), folder.join("probe.gguf")).unwrap();
    let line = "locate -m llama.gguf --probe probe.gguf --no-activations -o found.json";
    let (code, text) = failure(&mut detox_in(&folder, line));
    assert!(code == 2 && text.contains("found.csv would be overwritten"), "{text}");
    assert_eq!(std::fs::read_to_string(folder.join("found.csv")).unwrap(), "my,data\n");
}

/// Runs a command whose standard output, standard error or both are pipes that nobody reads.
#[cfg(unix)]
fn unread(folder: &Path, line: &str, stdout: bool, stderr: bool) -> (ExitStatus, String) {
    let closed = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("detox-gguf"));
    command.current_dir(folder).args(line.split_whitespace());
    command.stdout(if stdout { closed() } else { Stdio::piped() });
    command.stderr(if stderr { closed() } else { Stdio::piped() });
    let output = command.spawn().unwrap().wait_with_output().unwrap();
    (output.status, String::from_utf8(output.stderr).unwrap())
}

#[cfg(unix)]
#[test]
fn a_closed_pipe_costs_no_file_and_hides_no_failure() {
    let (_guard, folder) = inputs();
    for (line, file) in [
        ("probe -m llama.gguf -o probe.gguf --limit 20 --epochs 1 -t 1", "probe.gguf"),
        ("locate -m llama.gguf --probe probe.gguf -o n.json --no-activations -t 1", "n.steer.json"),
        ("export -m llama.gguf --lora llama-lora.gguf -o e.gguf -t 1", "e.gguf"),
        ("train -m llama.gguf -o tr --max-steps 1 --rank 2 -t 1", "tr/report.html"),
        ("eval -m llama.gguf -o ev -k 2 -n 3 --limit 2 --lang en -t 1", "ev/report.html"),
        ("compare ev ev -o cmp", "cmp/comparison.html"),
        (
            "activations -m llama.gguf --neurons neurons.json -o ac -n 2 --limit 1 --lang en -t 1",
            "ac/activations.html",
        ),
        ("generate -m llama.gguf -o g.jsonl -k 1 -n 2 --limit 1 --lang en -t 1", "g.jsonl"),
    ] {
        for (stdout, stderr) in [(true, false), (true, true)] {
            let (status, text) = unread(&folder, line, stdout, stderr);
            assert_eq!(status.code(), Some(0), "{line}: {text}");
            assert!(folder.join(file).exists(), "{line}: {file} is missing");
            let of_folder = folder.join(file);
            match file.split_once('/') {
                Some((of_run, _)) => std::fs::remove_dir_all(folder.join(of_run)).unwrap(),
                None if file != "probe.gguf" => std::fs::remove_file(of_folder).unwrap(),
                None => {}
            }
            if line.starts_with("eval") {
                unread(&folder, line, true, false);
            }
        }
    }
    // The work fails: so does the program.
    let merged = "export -m llama.gguf --lora llama-lora.gguf --type q4_0 -o llama-lora.gguf -t 1";
    assert_eq!(unread(&folder, merged, true, true).0.code(), Some(2));
    // The output itself is lost, without a message, as with `seq | head`.
    let lost = unread(&folder, "generate -m llama.gguf -k 1 -n 2 --limit 1 --lang en -t 1", true, false);
    assert_eq!(lost.0.code(), Some(1));
    assert!(!lost.1.contains("error"), "{}", lost.1);
}

#[test]
fn an_output_called_minus_is_standard_output() {
    let (_guard, folder) = inputs();
    for output in ["-", "/dev/stdout"] {
        let mut command = detox_in(&folder, &format!("score texts.csv -o {output}"));
        let found = String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap();
        assert!(found.starts_with('{') && found.contains("idiot"), "{found}");
    }
    assert!(!folder.join("-").exists());
}

#[test]
fn control_and_bidi_characters_of_files_and_arguments_are_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let steer = folder.path().join("s.json");
    let evil = "\\u001b[31mKEY\\u202e\\u009b\\nerror: forged\\u200f";
    std::fs::write(&steer, format!("{{\"detox_gguf\": \"interventions\", \"{evil}\": 1}}")).unwrap();
    let name = "\u{1b}[31mno\nhint: forged\u{202e}.gguf";
    let of_steer = {
        let mut command = detox();
        command.args(["generate", "-m"]).arg(tiny("llama.gguf")).arg("--steer").arg(&steer);
        failure(&mut command).1
    };
    let of_row = failure(detox().arg("score").write_stdin(format!("{{\"{evil}\":1}}\n"))).1;
    let of_file = failure(detox().args(["generate", "-m", name])).1;
    let of_usage = failure(detox().args(["generate", "-m", "x", "-k", name])).1;
    for text in [of_steer, of_row, of_file, of_usage] {
        let is_shown = |c: char| c == '\n' || !c.is_control() && !('\u{200e}'..='\u{202e}').contains(&c);
        assert!(text.chars().all(is_shown) && text.contains("\\u{1b}[31m"), "{text:?}");
        assert!(text.lines().all(|line| !line.contains("forged") || line.contains("\\u{1b}")), "{text}");
    }
}

#[test]
fn a_coefficient_with_a_decimal_comma_is_refused_with_the_right_spelling() {
    let (_guard, folder) = inputs();
    let line = "steer -m llama.gguf --neurons neurons.json --offset -1 -o s.json";
    detox_in(&folder, line).assert().success();
    let generate = "generate -m llama.gguf -k 1 -n 1 --limit 1 --lang en -t 1 --steer";
    let (code, text) = failure(&mut detox_in(&folder, &format!("{generate} s.json:-0,5")));
    assert!(code == 2 && text.contains("hint: write s.json:-0.5"), "{text}");
    detox_in(&folder, &format!("{generate} s.json:-0.5")).assert().success();
}
