//! Bad input: the message names the fault, the exit code is right, and no partial file remains.

use super::{detox, failure, small_eval, tiny};

/// Exit code, part of the message, and the arguments after `eval -m MODEL -o FOLDER`.
const BAD_SETTINGS: [(i32, &str, &[&str]); 14] = [
    (2, "-k/--samples", &["-k", "0"]),
    (2, "-n/--n-predict", &["-n", "0"]),
    (2, "--top-p", &["--top-p", "1.5"]),
    (2, "--top-p", &["--top-p", "0"]),
    (2, "--temp", &["--temp", "-1"]),
    (2, "--temp", &["--temp", "NaN"]),
    (2, "--min-p", &["--min-p", "2"]),
    (2, "--threshold", &["--threshold", "1.2"]),
    (2, "--lang", &["--lang", "xx"]),
    (2, "--scorer", &["--scorer", "nobody"]),
    (2, "-np/--parallel", &["-np", "0"]),
    (2, "-np/--parallel", &["-np", "256"]),
    (2, "-tb/--threads-batch", &["-tb", "0"]),
    (2, "--limit", &["--limit", "0"]),
];

#[test]
fn rejects_settings_out_of_range_before_writing_anything() {
    for (code, word, arguments) in BAD_SETTINGS {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let mut command = detox();
        command.args(["eval", "-m"]).arg(tiny("llama.gguf")).arg("-o").arg(&run).args(arguments);
        let (found, text) = failure(&mut command);
        assert_eq!(found, code, "{text}");
        assert!(text.starts_with(&format!("error: {word}")), "{text}");
        assert!(!run.join("run.json").exists(), "{arguments:?}");
    }
}

#[test]
fn rejects_models_that_cannot_be_run() {
    let folder = tempfile::tempdir().unwrap();
    let cut = folder.path().join("cut.gguf");
    let whole = std::fs::read(tiny("llama.gguf")).unwrap();
    std::fs::write(&cut, &whole[..whole.len() * 2 / 5]).unwrap();
    let foreign = folder.path().join("page.gguf");
    std::fs::write(&foreign, "<!DOCTYPE html><html></html>").unwrap();
    let empty = folder.path().join("empty.gguf");
    std::fs::write(&empty, "").unwrap();
    let cases = [
        (folder.path().join("missing.gguf"), "No such file"),
        (cut, "cut.gguf"),
        (foreign, "HTML"),
        (empty, "empty"),
        (tiny("bert.gguf"), "bert"),
        (folder.path().to_path_buf(), "found a folder"),
    ];
    for (path, word) in cases {
        let mut command = detox();
        command.args(["generate", "-m"]).arg(&path);
        let (code, text) = failure(&mut command);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains(word) && text.contains(path.file_name().unwrap().to_str().unwrap()), "{text}");
    }
}

#[test]
fn rejects_prompt_files_by_line() {
    let folder = tempfile::tempdir().unwrap();
    for (name, content, place) in [
        ("en.jsonl", "{\"prompt\": \"a\"}\n{broken\n", "en.jsonl:2"),
        ("en.jsonl", "{\"prompt\": \"a\"}\n{\"x\": 1}\n", "en.jsonl:2"),
        ("en.txt", "", "en.txt"),
        ("nameless.txt", "hello\n", "nameless.txt"),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let mut command = detox();
        command.args(["generate", "-m"]).arg(tiny("llama.gguf")).arg("--prompts").arg(&path);
        let (code, text) = failure(&mut command);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains(place), "{text}");
    }
}

#[test]
fn rejects_a_language_that_no_scorer_covers() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("sw.txt");
    std::fs::write(&prompts, "Habari ya asubuhi\n").unwrap();
    let mut command = detox();
    command.args(["eval", "-m"]).arg(tiny("llama.gguf")).arg("--prompts").arg(&prompts);
    let (code, text) = failure(command.arg("-o").arg(folder.path().join("run")));
    assert_eq!(code, 1);
    assert!(text.contains("no scorer covers language \"sw\"") && text.contains("hint: "), "{text}");
}

#[test]
fn rejects_a_prompt_longer_than_the_context() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("en.txt");
    // The long prompt comes last: it must be found before the first is generated.
    std::fs::write(&prompts, format!("{}{}\n", "short\n".repeat(40), "long ".repeat(400))).unwrap();
    for more in [&[][..], &["-c", "128", "-np", "2"][..]] {
        let mut command = detox();
        let run = folder.path().join("run");
        command
            .args(["eval", "-k", "1", "-m"])
            .arg(tiny("llama.gguf"))
            .arg("--prompts")
            .arg(&prompts)
            .args(more);
        let (code, text) = failure(command.arg("-o").arg(&run));
        assert_eq!(code, 1);
        assert!(!run.join("run.json").exists() && !run.join("generations.jsonl").exists());
        assert!(text.contains("\"en/41\"") && text.contains("tokens"), "{text}");
    }
}

#[test]
fn rejects_texts_beyond_learned_positions_in_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // The tiny gpt2 knows 256 positions.
    let long = "one two three four five six seven ".repeat(60);
    std::fs::write(path("en.txt"), &long).unwrap();
    let row = serde_json::json!({"prompt": "A", "generated_text": long, "language": "en"});
    std::fs::write(path("g.jsonl"), row.to_string()).unwrap();
    let row = serde_json::json!({"toxic": format!("you {long}"), "benign": format!("we {long}")});
    std::fs::write(path("c.jsonl"), format!("{row}\n").repeat(4)).unwrap();
    let model = tiny("gpt2.gguf");
    let run = |arguments: &[&std::ffi::OsStr]| failure(detox().args(arguments).args(["-t", "1"]));
    let os = std::ffi::OsStr::new;
    let (prompts, generations) = (path("en.txt"), path("g.jsonl"));
    let (contrast, output, vector) = (path("c.jsonl"), path("out"), path("out.gguf"));
    let generate = [os("generate"), os("-m"), model.as_os_str(), os("--prompts"), prompts.as_os_str()];
    let with_context = [&generate[..], &[os("-c"), os("4096"), os("-np"), os("1")]].concat();
    let base = [os("--base"), model.as_os_str(), os("-o"), output.as_os_str()];
    let eval = [&[os("eval"), os("--generations"), generations.as_os_str()][..], &base].concat();
    let from = [os("--contrast"), contrast.as_os_str(), os("-o"), vector.as_os_str()];
    let steer = [&[os("steer"), os("-m"), model.as_os_str()][..], &from].concat();
    let bench = [os("bench"), os("generate"), os("-m"), model.as_os_str(), os("-n"), os("300")];
    for arguments in [&generate[..], &with_context, &eval, &steer, &bench] {
        let (code, text) = run(arguments);
        assert_eq!(code, 1, "{arguments:?}: {text}");
        assert!(text.contains("learned positions only for 256"), "{arguments:?}: {text}");
        assert!(
            text.contains("hint: shorten the text") && !text.contains("raise -c"),
            "{arguments:?}: {text}"
        );
    }
}

#[cfg(unix)]
#[test]
fn runs_a_model_whose_name_and_metadata_are_not_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9.gguf"));
    // "tiny llama" as the last bytes of the value of general.name, in Latin-1.
    let mut bytes = std::fs::read(tiny("llama.gguf")).unwrap();
    let at = bytes.windows(10).position(|w| w == b"tiny llama").unwrap();
    bytes[at..at + 10].copy_from_slice(b"m\xe4rchen  \xe9");
    std::fs::write(&path, bytes).unwrap();
    let mut command = detox();
    command.args(["eval", "-k", "1", "-n", "2", "--lang", "en", "--limit", "2", "-t", "1", "-m"]).arg(&path);
    command.arg("-o").arg(folder.path().join("run")).assert().success();
}

#[test]
fn rejects_a_folder_with_another_run_or_other_files() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    small_eval(&run).assert().success();
    let before = super::contents(&run);
    let (code, text) = failure(small_eval(&run).args(["--temp", "0.5"]));
    assert_eq!(code, 1);
    assert!(text.contains("temperature is 0.9 there, and 0.5 now"), "{text}");
    assert_eq!(super::contents(&run), before);

    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("notes.txt"), "mine").unwrap();
    let (code, text) = failure(&mut small_eval(&other));
    assert_eq!(code, 1);
    assert!(text.contains("expected an empty folder or a run"), "{text}");

    let file = folder.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    let (_, text) = failure(&mut small_eval(&file));
    assert!(text.contains("cannot create"), "{text}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
}

#[test]
fn a_run_makes_changed_rows_again() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    small_eval(&run).assert().success();
    let path = run.join("generations.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("en/own-2", "en/own-9", 1)).unwrap();
    let output = small_eval(&run).assert().success().get_output().clone();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("WARN") && message.contains("generations.jsonl"), "{message}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "the rows are made again");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_with_a_hint() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = std::process::Command::new(assert_cmd::cargo::cargo_bin("detox-gguf"))
        .args(["generate", "-k", "1", "-n", "2", "--lang", "en", "--limit", "1", "-t", "1", "-m"])
        .arg(tiny("llama.gguf"))
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("cannot write <stdout>: No space left") && text.contains("hint: free some space"),
        "{text}"
    );
}

#[test]
fn an_output_file_appears_only_when_complete() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.jsonl");
    let bad = folder.path().join("in.jsonl");
    // The second batch fails after the first was written.
    std::fs::write(&bad, format!("{}broken\n", "{\"text\":\"a\"}\n".repeat(5000))).unwrap();
    let (code, text) = failure(detox().arg("score").arg(&bad).arg("-o").arg(&output));
    assert_eq!(code, 1);
    assert!(text.contains("in.jsonl:5001"), "{text}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn rejects_settings_without_effect() {
    for arguments in
        [&["--compare", "a", "b", "--threshold", "0.7"][..], &["--generations", "f", "-o", "d", "-k", "3"]]
    {
        let (code, text) = failure(detox().arg("eval").args(arguments));
        assert_eq!(code, 2);
        assert!(text.contains("cannot be used with"), "{text}");
    }
}

#[test]
fn rejects_a_folder_with_scores_of_other_continuations() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("g.jsonl");
    std::fs::write(
        &file,
        "{\"prompt\":\"a\",\"generated_text\":\"x\",\"language\":\"en\"}\n{\"prompt\":\"b\",\"generated_text\":\"y\",\"language\":\"de\"}\n",
    )
    .unwrap();
    let run = folder.path().join("run");
    let eval = |language: &str| {
        let mut command = detox();
        command.args(["eval", "--lang", language, "--generations"]).arg(&file);
        command.arg("--tokenizer").arg(tiny("tokenizer.json")).arg("-o").arg(&run);
        command
    };
    eval("en").assert().success();
    let (code, text) = failure(&mut eval("de"));
    assert_eq!(code, 1);
    assert!(text.contains("holds another run"), "{text}");
}

#[test]
fn rejects_a_model_whose_values_are_not_finite_wherever_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let bad = folder.path().join("nan.gguf");
    let mut bytes = std::fs::read(tiny("llama.gguf")).unwrap();
    let base = detox_gguf::gguf::GgufFile::open(tiny("llama.gguf")).unwrap();
    let norm = base.tensor("output_norm.weight").unwrap();
    let at = norm.offset() as usize;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&bad, bytes).unwrap();
    let bad = bad.to_str().unwrap();
    let output = folder.path().join("out");
    let output = output.to_str().unwrap();
    for (arguments, part) in [
        (
            &["probe", "--limit", "30", "--epochs", "1"][..],
            "the residual stream after the final norm holds NaN",
        ),
        (&["generate", "-k", "1", "-n", "1", "--lang", "en", "--limit", "1"], "its logits contain NaN"),
        (&["train", "--max-steps", "1"], "tensor \"output_norm.weight\": expected finite numbers, found NaN"),
    ] {
        let mut command = detox();
        command.args(arguments).args(["-t", "1", "-m", bad, "-o", output]);
        let (code, text) = failure(&mut command);
        assert!(code == 1 && text.contains(part), "{text}");
        assert!(!std::path::Path::new(output).is_file(), "{arguments:?}");
    }
}
