use std::collections::HashSet;

use super::*;

fn read_text(text: impl AsRef<[u8]>) -> Result<Vec<PreferencePair>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    std::fs::write(&path, text).unwrap();
    read(&path, &PairColumns::default())
}

fn one(text: &str) -> [String; 3] {
    let pairs = read_text(text).unwrap();
    assert_eq!(pairs.len(), 1);
    let PreferencePair { prompt, chosen, rejected } = pairs[0].clone();
    [prompt, chosen, rejected]
}

#[test]
fn every_form_gives_the_same_pair() {
    let expected = ["Say", " yes", " no"];
    let forms = [
        r#"{"prompt": "Say", "chosen": " yes", "rejected": " no"}"#,
        r#"{"rejected": " no", "scores": [1, 2], "prompt": "Say", "chosen": " yes"}"#,
        concat!(
            r#"{"prompt_text": "Say", "unpert_gen_text": " yes", "pert_gen_text": " no", "#,
            r#""gold_text": "x", "pert_gen_toks": [[3]]}"#
        ),
        r#"{"chosen": "Say yes", "rejected": "Say no"}"#,
    ];
    for form in forms {
        assert_eq!(one(form), expected, "{form}");
    }
    let all = read_text(format!("\u{feff}{}\r\n\n", forms.join("\n"))).unwrap();
    assert_eq!(all.len(), forms.len());
}

#[test]
fn an_implicit_prompt_is_the_longest_common_prefix_without_its_last_space() {
    for (chosen, rejected, expected) in [
        ("Is it? Yes.", "Is it? No.", ["Is it?", " Yes.", " No."]),
        // Inside a word, as in TRL; tokenising moves the boundary.
        ("a good day", "a great day", ["a g", "ood day", "reat day"]),
        // One space of two.
        ("a  b", "a  c", ["a ", " b", " c"]),
        // Whole characters: é is c3 a9, è is c3 a8.
        ("né", "nè", ["n", "é", "è"]),
        ("今日は", "今日も", ["今日", "は", "も"]),
        ("a", "b", ["", "a", "b"]),
        (" a", " b", ["", " a", " b"]),
        // One is a prefix of the other: the shorter one is the prompt.
        ("It is", "It is not", ["It is", "", " not"]),
        ("It ", "It is", ["It ", "", "is"]),
        ("same", "same", ["same", "", ""]),
    ] {
        let row = serde_json::json!({"chosen": chosen, "rejected": rejected}).to_string();
        assert_eq!(one(&row), expected, "{row}");
    }
}

#[test]
fn only_jsonl_files_of_a_folder_are_read_in_the_order_of_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let row = |text: &str| format!("{{\"prompt\":\"{text}\",\"chosen\":\"a\",\"rejected\":\"b\"}}\n");
    for (name, text) in [("split_1.jsonl", "second"), ("split_0.jsonl", "first"), (".hidden.jsonl", "no")] {
        std::fs::write(folder.path().join(name), row(text)).unwrap();
    }
    std::fs::write(folder.path().join("README.md"), "no rows").unwrap();
    std::fs::create_dir(folder.path().join("more.jsonl")).unwrap();
    let prompts: Vec<String> =
        read(folder.path(), &PairColumns::default()).unwrap().into_iter().map(|pair| pair.prompt).collect();
    assert_eq!(prompts, ["first", "second"]);
}

#[test]
fn rejects_rows_of_other_forms_with_their_line_and_a_hint() {
    let good = "{\"prompt\":\"p\",\"chosen\":\"a\",\"rejected\":\"b\"}\n";
    for (row, reason) in [
        (r#"{"text": "a"}"#, "found the columns \"text\""),
        (
            r#"{"prompt": "p", "chosen": "a"}"#,
            "expected a rejected answer in a column such as \"rejected\", found only",
        ),
        (r#"{"chosen": "a"}"#, "expected a rejected answer"),
        (r#"{"prompt_text": "p", "unpert_gen_text": "a"}"#, "in a column such as \"pert_gen_text\""),
        (
            r#"{"question": "p", "system": "s", "chosen": "a", "rejected": "b"}"#,
            "another part of it in \"system\"",
        ),
        (
            r#"{"instruction": "p", "input": "s", "chosen": "a", "rejected": "b"}"#,
            "another part of it in \"input\"",
        ),
        (r#"{"context": "p", "chosen": "a", "rejected": "b"}"#, "another part of it in \"context\""),
        (r#"{"prompt": "p", "chosen": [{"role": "user", "content": "a"}], "rejected": []}"#, "messages"),
        (r#"{"prompt": [{"role": "user", "content": "a"}], "chosen": "a", "rejected": "b"}"#, "messages"),
        (r#"[{"prompt": "p"}]"#, "found an array"),
        (r#""text""#, "found the columns \"text\""),
        (r#"{"prompt": "p","#, "EOF"),
    ] {
        match read_text(format!("{good}\n{row}\n")).unwrap_err() {
            Error::Input { line: Some(3), reason: found, hint, path } => {
                assert!(found.contains(reason), "{row}: {found}");
                assert!(hint.is_some() && path.ends_with("pairs.jsonl"), "{row}");
            }
            other => panic!("{row}: {other}"),
        }
    }
    let error =
        read_text(format!("{good}{{\"prompt\":\"p\",\"chosen\":null,\"rejected\":\"b\"}}\n")).unwrap_err();
    assert!(
        error.to_string().ends_with("pairs.jsonl:2: field \"chosen\": expected a string, found null"),
        "{error}"
    );
}

#[test]
fn other_names_and_tables_give_the_same_pair() {
    let expected = ["Say", " yes", " no"];
    for row in [
        r#"{"question": "Say", "chosen": " yes", "rejected": " no", "system": ""}"#,
        r#"{"instruction": "Say", "input": null, "Chosen": " yes", "Rejected": " no"}"#,
        r#"[{"prompt": "Say", "preferred": " yes", "dispreferred": " no"}]"#,
        "prompt,chosen,rejected\nSay, yes, no\n",
    ] {
        assert_eq!(one(row), expected, "{row}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.csv");
    std::fs::write(&path, "a;b;c;system\nSay; yes; no;kind\n").unwrap();
    let columns =
        PairColumns { prompt: Some("a".into()), chosen: Some("b".into()), rejected: Some("c".into()) };
    assert_eq!(read(&path, &columns).unwrap()[0].rejected, " no");
    assert!(read(&path, &PairColumns::default()).unwrap_err().hint().unwrap().contains("--chosen-column"));
}

#[test]
fn rejects_invalid_utf_8_with_its_line() {
    let error = read_text(b"{\"prompt\":\"p\",\"chosen\":\"a\",\"rejected\":\"b\"}\n\xff\n").unwrap_err();
    assert!(error.to_string().contains("pairs.jsonl:2: expected UTF-8"), "{error}");
}

#[test]
fn rejects_files_and_folders_without_pairs_and_missing_ones() {
    assert!(read_text("\n \n").unwrap_err().to_string().contains("found an empty file"));
    let folder = tempfile::tempdir().unwrap();
    let error = read(folder.path(), &PairColumns::default()).unwrap_err();
    assert!(error.to_string().contains("found none") && error.hint().is_some(), "{error}");
    assert!(matches!(
        read(&folder.path().join("none.jsonl"), &PairColumns::default()),
        Err(Error::Io { .. })
    ));
}

#[test]
fn built_in_pairs_differ_from_each_other_and_their_answers_have_similar_lengths() {
    let own = own();
    assert!((150..=200).contains(&own.len()), "{}", own.len());
    let texts: HashSet<&str> =
        own.iter().flat_map(|p| [&p.prompt, &p.chosen, &p.rejected]).map(String::as_str).collect();
    assert_eq!(texts.len(), 3 * own.len(), "a text must not occur twice");
    let words = |text: &str| text.split_whitespace().count();
    for pair in &own {
        assert!((5..=15).contains(&words(&pair.prompt)), "{pair:?}");
        let (chosen, rejected) = (words(&pair.chosen), words(&pair.rejected));
        assert!((5..=16).contains(&chosen) && (5..=16).contains(&rejected), "{pair:?}");
        assert!(chosen.max(rejected) as f64 / chosen.min(rejected) as f64 <= 1.5, "{pair:?}");
        for answer in [&pair.chosen, &pair.rejected] {
            assert!(answer.starts_with(' ') && !answer.starts_with("  "), "{pair:?}");
            assert!(answer.ends_with(['.', '!', '?', '"']), "{pair:?}");
        }
    }
}
