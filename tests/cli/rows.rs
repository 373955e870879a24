//! Files of people and other tools: read in every command, or refused with advice that works.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::{detox, failure, rows, tiny};

fn file(folder: &tempfile::TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    path
}

/// The prompts that `generate` reads from a file, and its messages.
fn prompts(path: &Path, more: &[&str]) -> (Vec<String>, String) {
    let output = path.with_extension("out");
    let mut command = detox();
    command.args(["generate", "-k", "1", "-n", "1", "-t", "1", "-m"]).arg(tiny("llama.gguf"));
    command.arg("--prompts").arg(path).arg("-o").arg(&output).args(more);
    let done = command.assert().success().get_output().clone();
    let prompts = rows(&output).iter().map(|row| row["prompt"].as_str().unwrap().to_owned()).collect();
    (prompts, String::from_utf8(done.stderr).unwrap())
}

#[test]
fn prompts_of_a_table_lose_their_header_and_quotes_and_compression_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let table = "id,prompt\n1,\"The weather, he said\"\n2,\"A \"\"quoted\"\" start\nand a second line\"\n";
    let expected = ["The weather, he said", "A \"quoted\" start\nand a second line"];
    assert_eq!(prompts(&file(&folder, "en.csv", table), &[]).0, expected);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(table.as_bytes()).unwrap();
    assert_eq!(prompts(&file(&folder, "en.csv.gz", gzip.finish().unwrap()), &[]).0, expected);
    let other = file(&folder, "en.tsv", "nr\tphrase\n1\tThe weather\n");
    assert_eq!(prompts(&other, &["--prompt-column", "phrase"]).0, ["The weather"]);
    let (code, text) =
        failure(detox().args(["generate", "-m"]).arg(tiny("llama.gguf")).arg("--prompts").arg(&other));
    assert!(
        code == 1 && text.contains("only \"nr\", \"phrase\"") && text.contains("--prompt-column"),
        "{text}"
    );
}

#[test]
fn a_column_of_pairs_without_a_file_of_pairs_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for flag in ["--toxic-column", "--benign-column"] {
        let mut command = detox();
        command.args(["steer", "-m"]).arg(tiny("llama.gguf")).arg("-o").arg(folder.path().join("s.json"));
        let (code, text) = failure(command.args([flag, "x", "--contrast"]));
        assert!(code == 2 && text.contains(flag) && text.contains("hint: give the file"), "{text}");
    }
}

#[test]
fn the_language_of_a_file_and_chat_markers_are_logged() {
    let folder = tempfile::tempdir().unwrap();
    let german = "Das Wetter war gestern so schön, dass wir\nMeine Nachbarin hat mir erzählt\n";
    let (_, log) = prompts(&file(&folder, "mine.txt", german), &[]);
    assert!(log.contains("they look like German (de)"), "{log}");
    let marked = file(
        &folder,
        "en.jsonl",
        "{\"prompt\": \"<|im_start|>user\"}\n{\"prompt\": \"Hello\", \"mood\": 1}\n",
    );
    let (_, log) = prompts(&marked, &[]);
    assert!(log.contains("1 of 2 prompts contain chat markers such as \"<|im_start|>\""), "{log}");
    assert!(log.contains("these columns are not used: \"mood\""), "{log}");
}

#[test]
fn rejects_files_that_are_no_prompts_with_advice() {
    let folder = tempfile::tempdir().unwrap();
    for (name, content, words) in [
        ("en.yaml", &b"prompts:\n  - The weather\n"[..], "found YAML"),
        ("en.md", b"# Prompts\n", "found Markdown"),
        ("en.parquet", b"PAR1\x15\x04", "found a Parquet file"),
        ("en.csv", b"id,prompt\n1,a\n2,b,c\n", "en.csv:3: expected 2 cells"),
        ("en.csv", b"prompt\nCaf\xE9\n", "en.csv:2: expected UTF-8"),
    ] {
        let path = file(&folder, name, content);
        let mut command = detox();
        let (code, text) =
            failure(command.args(["generate", "-m"]).arg(tiny("llama.gguf")).arg("--prompts").arg(path));
        assert!(code == 1 && text.contains(words) && text.contains("hint: "), "{text}");
    }
    #[cfg(target_os = "linux")]
    {
        let (code, text) = failure(detox().args(["score", "/dev/zero"]));
        assert!(code == 1 && text.contains("NUL bytes"), "{text}");
    }
}

#[test]
fn pairs_that_would_lose_a_part_are_refused_and_the_hint_works() {
    let folder = tempfile::tempdir().unwrap();
    let row = r#"{"system":"You are kind.","question":"What is two and two?","chosen":"It is four.","rejected":"Is it?"}"#;
    let pairs = file(&folder, "pairs.jsonl", format!("{row}\n").repeat(4));
    let train = || {
        let mut command = detox();
        command.args(["train", "--rank", "1", "--max-steps", "1", "-t", "1", "-m"]).arg(tiny("llama.gguf"));
        command.arg("--pairs").arg(&pairs).arg("-o").arg(folder.path().join("run"));
        command
    };
    let (code, text) = failure(&mut train());
    assert!(code == 1 && text.contains("another part of it in \"system\""), "{text}");
    let hint = "read \"question\" alone with --prompt-column question";
    assert!(text.contains(hint), "{text}");
    let output = train().args(["--prompt-column", "question"]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!text.contains("another part"), "{text}");
    assert!(text.contains("follow the prompt without a space"), "{text}");
}

#[test]
fn pairs_that_cannot_be_used_get_a_hint_for_their_reason() {
    let folder = tempfile::tempdir().unwrap();
    for (row, hint) in [
        (r#"{"prompt":"a b","chosen":" c","rejected":" c"}"#, "give two different answers"),
        (r#"{"prompt":"a b","chosen":"","rejected":" c"}"#, "at least one token after the prompt"),
    ] {
        let pairs = file(&folder, "pairs.jsonl", row);
        let mut command = detox();
        command.args(["train", "-t", "1", "-m"]).arg(tiny("llama.gguf")).arg("--pairs").arg(&pairs);
        let (code, text) = failure(command.arg("-o").arg(folder.path().join("run")));
        assert!(code == 1 && text.contains(hint), "{text}");
    }
}

#[test]
fn texts_and_continuations_of_other_tools_are_scored() {
    let folder = tempfile::tempdir().unwrap();
    let table = file(&folder, "s.csv", "id;text\n1;hello\n2;\"a; b\"\n");
    let output = detox().arg("score").arg(&table).assert().success().get_output().clone();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("\"text\":\"hello\"") && text.contains("\"text\":\"a; b\""), "{text}");
    let generations = file(
        &folder,
        "g.json",
        r#"[{"prompt":"A","completion":" \ud83d b","language":"English","prompt_id":null,"x":NaN},
            {"prompt":"A","completion":" c","language":"en"}]"#,
    );
    let mut command = detox();
    command.args(["eval", "-t", "1", "--generations"]).arg(&generations);
    command.arg("--tokenizer").arg(tiny("tokenizer.json")).arg("-o").arg(folder.path().join("run"));
    let log = String::from_utf8(command.assert().success().get_output().stderr.clone()).unwrap();
    assert!(log.contains("replaced by U+FFFD: 1"), "{log}");
    assert_eq!(rows(&folder.path().join("run/generations.jsonl"))[0]["generated_text"], " \u{fffd} b");
}

#[test]
fn a_damaged_tokenizer_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(tiny("tokenizer.json")).unwrap();
    let cut = file(&folder, "t.json", &whole[..whole.len() * 9 / 10]);
    let generations = file(&folder, "en.jsonl", "{\"prompt\":\"A\",\"generated_text\":\" b\"}\n");
    let mut command = detox();
    command.args(["eval", "-t", "1", "--generations"]).arg(&generations).arg("--tokenizer").arg(&cut);
    let (code, text) = failure(command.arg("-o").arg(folder.path().join("run")));
    assert!(code == 1 && text.contains("t.json: expected") && text.contains("cut off"), "{text}");
    assert!(!text.contains("panicked"), "{text}");
}
