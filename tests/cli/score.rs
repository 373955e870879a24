//! `score` on files and on standard input.

use super::detox;

fn scored(arguments: &[&str], input: &str) -> Vec<serde_json::Value> {
    let output =
        detox().arg("score").args(arguments).write_stdin(input).assert().success().get_output().clone();
    String::from_utf8(output.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn lines_of_standard_input_are_scored_in_order() {
    let rows = scored(&[], "The soup was very good today.\nYou are a stupid idiot and nobody likes you.\n");
    assert_eq!(rows[0]["text"], "The soup was very good today.");
    let score = |i: usize| rows[i]["toxicity"]["lexical"].as_f64().unwrap();
    assert!(score(0) < 0.5 && score(1) >= 0.5, "{} {}", score(0), score(1));
}

#[test]
fn rows_of_json_and_csv_keep_their_fields() {
    let rows = scored(&[], "{\"id\": 7, \"text\": \"hello there\", \"language\": \"en\"}\n");
    assert_eq!(rows[0]["id"], 7);
    assert!(rows[0]["toxicity"]["lexical"].is_number());
    let rows = scored(&["--format", "csv", "--field", "body"], "id,body\n7,\"hello, there\"\n");
    assert_eq!((&rows[0]["id"], &rows[0]["body"]), (&"7".into(), &"hello, there".into()));
}

#[test]
fn an_uncovered_language_gets_null_and_a_reason() {
    let rows = scored(
        &[],
        "{\"text\": \"habari\", \"language\": \"sw\"}\n{\"text\": \"hello\", \"language\": \"en\"}\n",
    );
    assert!(rows[0]["toxicity"]["lexical"].is_null());
    assert!(rows[0]["errors"]["lexical"].as_str().unwrap().contains("sw"));
    assert!(rows[1].get("errors").is_none());
}

#[test]
fn rejects_an_empty_input_and_a_missing_file() {
    let (code, text) = super::failure(detox().arg("score").write_stdin(""));
    assert_eq!(code, 1);
    assert!(text.contains("<stdin>: expected texts"), "{text}");
    let (code, text) = super::failure(detox().args(["score", "no/such.txt"]));
    assert_eq!(code, 1);
    assert!(text.contains("cannot read no/such.txt"), "{text}");
}

#[test]
fn rejects_a_file_without_a_single_score() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("scored.jsonl");
    let input = "{\"text\": \"habari\", \"language\": \"sw\"}\n{\"text\": \"yako\", \"language\": \"sw\"}\n";
    let (code, text) = super::failure(detox().arg("score").arg("-o").arg(&output).write_stdin(input));
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("expected scores, found none for all 2 texts; the first: scorer lexical"),
        "{text}"
    );
    assert!(!output.exists());
    // One score is enough.
    let input = format!("{input}{{\"text\": \"hello\", \"language\": \"en\"}}\n");
    detox().arg("score").arg("-o").arg(&output).write_stdin(input).assert().success();
}
