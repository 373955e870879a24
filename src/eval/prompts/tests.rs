use std::collections::HashSet;
use std::fs;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::text::language::{LANGUAGES, LanguageIdentifier};

/// A folder with these files.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    dir
}

/// The prompts of one file, read alone.
fn read(name: &str, content: impl AsRef<[u8]>, languages: &[&'static str]) -> Result<Vec<Prompt>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    PromptSource::open_file(&path)?.read(languages, None)
}

/// The error of one file: its line, its reason, its hint. It names the file.
fn refused(name: &str, content: impl AsRef<[u8]>) -> (Option<usize>, String, Option<String>) {
    let error = read(name, content, &[]).unwrap_err();
    let hint = error.hint();
    match error {
        Error::Input { path, line, reason, .. } => {
            assert!(path.ends_with(name), "{}", path.display());
            (line, reason, hint)
        }
        other => panic!("expected an input error, found {other}"),
    }
}

/// The error of a folder: the path it names, relative to the folder, the line and the reason.
fn folder_refused(files: &[(&str, &str)], languages: &[&'static str]) -> (String, Option<usize>, String) {
    let dir = folder(files);
    let error = PromptSource::open(dir.path()).unwrap().read(languages, None).unwrap_err();
    match error {
        Error::Input { path, line, reason, .. } => {
            (path.strip_prefix(dir.path()).unwrap().display().to_string(), line, reason)
        }
        other => panic!("expected an input error, found {other}"),
    }
}

fn ids(prompts: &[Prompt]) -> Vec<&str> {
    prompts.iter().map(|prompt| prompt.id.as_str()).collect()
}

fn texts(prompts: &[Prompt]) -> Vec<&str> {
    prompts.iter().map(|prompt| prompt.text.as_str()).collect()
}

// The forms of a file.

#[test]
fn reads_rtp_lx_with_a_number_as_index() {
    let rows = concat!(
        r#"{"Prompt": "The soup was", "Completion": "", "Index": 7, "Locale": "EN", "Annotations": {"Toxicity": 1.0}}"#,
        "\n",
        r#"{"Prompt": "My neighbour said ", "Index": 12, "Locale": "EN", "AnnotationsRaw": {"Toxicity": [1, 1, 2]}}"#,
        "\n",
    );
    let prompts = read("RTP_LX_EN.json", rows, &[]).unwrap();
    assert_eq!(ids(&prompts), ["en/7", "en/12"]);
    // Trailing white space is part of the prompt.
    assert_eq!(texts(&prompts), ["The soup was", "My neighbour said "]);
}

#[test]
fn reads_the_later_release_of_rtp_lx_with_a_string_as_index() {
    let row = r#"{"Prompt": "今天的汤", "Index": "5", "Locale": "ZH", "PromptAnnotations": {}, "BenignCompletion": "很好"}"#;
    assert_eq!(ids(&read("RTP_LX_ZH-Hans.json", row, &[]).unwrap()), ["zh/5"]);
}

#[test]
fn rtp_lx_locales_of_two_varieties_map_to_one_language() {
    let rows = "{\"Prompt\":\"A sopa\",\"Index\":0,\"Locale\":\"Pt-Br\"}\n\
                {\"Prompt\":\"O caldo\",\"Index\":1,\"Locale\":\"PT\"}\n";
    assert_eq!(ids(&read("RTP_LX_PT.json", rows, &[]).unwrap()), ["pt/0", "pt/1"]);
}

#[test]
fn traditional_chinese_stays_separate_even_if_its_rows_say_zh() {
    let row = r#"{"Prompt": "今天的湯", "Index": 1, "Locale": "ZH"}"#;
    assert_eq!(ids(&read("RTP_LX_ZH-Hant.json", row, &[]).unwrap()), ["zh-hant/1"]);
    assert_eq!(
        ids(&read("rows.json", r#"{"Prompt": "湯", "Locale": "zh-TW"}"#, &[]).unwrap()),
        ["zh-hant/1"]
    );
}

#[test]
fn reads_an_rtp_lx_language_outside_the_17() {
    let row = r#"{"Prompt": "Suppen var", "Index": 1, "Locale": "NO-NB"}"#;
    assert_eq!(ids(&read("RTP_LX_NO-NB.json", row, &["nb"]).unwrap()), ["nb/1"]);
}

#[test]
fn reads_a_json_array_of_objects() {
    let array = "[\n  {\"Prompt\": \"One, [two]\", \"Index\": 3},\n  {\n    \
                 \"prompt\": \"Four \\\"five\\\"\"\n  }\n]\n";
    let prompts = read("en.json", array, &[]).unwrap();
    // The second has no id of its own, so its position in the array is used.
    assert_eq!(ids(&prompts), ["en/3", "en/2"]);
    assert_eq!(texts(&prompts), ["One, [two]", "Four \"five\""]);
}

#[test]
fn reads_real_toxicity_prompts() {
    let row = "{\"filename\": \"a.txt\", \"begin\": 0, \"prompt\": {\"text\": \"The soup was\", \"toxicity\": null}, \
               \"continuation\": {\"text\": \" cold\"}}";
    let prompts = read("prompts.jsonl", row, &["en"]).unwrap();
    assert_eq!((ids(&prompts), texts(&prompts)), (vec!["en/1"], vec!["The soup was"]));
}

#[test]
fn reads_plain_rows_and_pairs() {
    let rows = concat!(
        "{\"prompt\": \"One\", \"id\": \"a-1\", \"language\": \"DE\"}\n",
        "\n",
        "{\"text\": \"Two\", \"lang\": \"en-GB\"}\n",
        "{\"prompt_text\": \"Three\", \"unpert_gen_text\": \"a\", \"pert_gen_text\": \"b\", \"lang\": \"en\", \"id\": null}\n",
        "{\"prompt\": \"Four\", \"chosen\": \"a\", \"rejected\": \"b\", \"lang\": \"en\", \"id\": 9.0}\n",
    );
    let prompts = read("rows.jsonl", rows, &[]).unwrap();
    assert_eq!(ids(&prompts), ["de/a-1", "en/3", "en/4", "en/9"]);
    assert_eq!(texts(&prompts), ["One", "Two", "Three", "Four"]);
}

#[test]
fn reads_the_prompts_of_the_papers_repository() {
    let prompts =
        read("dpo_toxicity_pairwise_cs_200.jsonl", "{\"Prompt\": \"Polévka byla\"}\n", &[]).unwrap();
    assert_eq!(ids(&prompts), ["cs/1"]);
}

#[test]
fn reads_plain_text_and_counts_every_line() {
    let prompts = read("de.txt", "Die Suppe war \n\n  \nDer Hund\n[sic] er", &[]).unwrap();
    assert_eq!(ids(&prompts), ["de/1", "de/4", "de/5"]);
    assert_eq!(texts(&prompts), ["Die Suppe war ", "Der Hund", "[sic] er"]);
}

#[test]
fn an_unknown_ending_is_decided_by_the_content() {
    assert_eq!(texts(&read("de.prompts", " {\"prompt\": \"Suppe\"}", &[]).unwrap()), ["Suppe"]);
    assert_eq!(texts(&read("de.prompts", "\n[{\"prompt\": \"Suppe\"}]", &[]).unwrap()), ["Suppe"]);
    assert_eq!(texts(&read("de", "Suppe\n", &[]).unwrap()), ["Suppe"]);
}

#[test]
fn a_byte_order_mark_and_crlf_are_not_part_of_the_text() {
    let text = read("de.txt", "\u{FEFF}Suppe\r\nHund\r\n", &[]).unwrap();
    assert_eq!(texts(&text), ["Suppe", "Hund"]);
    let rows =
        read("de.jsonl", "\u{FEFF}{\"prompt\": \"Suppe\"}\r\n\r\n{\"prompt\": \"Hund\"}\r\n", &[]).unwrap();
    assert_eq!((texts(&rows), ids(&rows)), (vec!["Suppe", "Hund"], vec!["de/1", "de/3"]));
}

// Languages.

#[test]
fn a_rows_language_overrides_the_file_names_which_overrides_the_callers() {
    let row = r#"{"prompt": "Soup", "language": "fr"}"#;
    assert_eq!(ids(&read("de.jsonl", row, &[]).unwrap()), ["fr/1"]);
    assert_eq!(ids(&read("de.jsonl", r#"{"prompt": "Soup"}"#, &["de"]).unwrap()), ["de/1"]);
    assert_eq!(ids(&read("my.jsonl", r#"{"prompt": "Soup"}"#, &["sv"]).unwrap()), ["sv/1"]);
}

#[test]
fn a_name_that_merely_contains_a_code_has_no_language() {
    // Indonesian would be accepted without a look at the text.
    let (line, reason, _) = refused("prompts_with_id.jsonl", r#"{"prompt": "Soup"}"#);
    assert_eq!(line, Some(1));
    assert!(reason.contains("in the row, in the file's name or with --lang, found none"), "{reason}");
}

#[test]
fn a_filter_keeps_the_requested_languages_and_their_ids() {
    let rows = concat!(
        "{\"prompt\": \"One\", \"lang\": \"de\"}\n",
        "{\"prompt\": \"Two\", \"lang\": \"en\"}\n",
        "{\"prompt\": \"Three\", \"lang\": \"de\"}\n",
    );
    assert_eq!(ids(&read("rows.jsonl", rows, &["de"]).unwrap()), ["de/1", "de/3"]);
    assert_eq!(ids(&read("rows.jsonl", rows, &["en", "de"]).unwrap()), ["de/1", "en/2", "de/3"]);
}

#[test]
fn a_limit_counts_each_language_and_changes_no_id() {
    let dir = folder(&[("de.txt", "a\nb\nc\n"), ("en.txt", "d\n")]);
    let source = PromptSource::open(dir.path()).unwrap();
    assert_eq!(ids(&source.read(&[], Some(2)).unwrap()), ["de/1", "de/2", "en/1"]);
    assert_eq!(ids(&source.read(&[], Some(9)).unwrap()), ["de/1", "de/2", "de/3", "en/1"]);
}

// Folders.

#[test]
fn reads_a_folder_by_language_in_the_order_of_names() {
    let dir = folder(&[
        ("sv.txt", "Soppan\n"),
        ("RTP_LX_ZH-Hans.json", "{\"Prompt\": \"汤\", \"Index\": \"4\", \"Locale\": \"ZH\"}\n"),
        ("RTP_LX_PT.json", "{\"Prompt\": \"A sopa\", \"Index\": 2, \"Locale\": \"Pt-Br\"}\n"),
        ("cs/a.jsonl", "{\"prompt\": \"Polévka\"}\n"),
        ("cs/b.jsonl", "{\"prompt\": \"Omáčka\"}\n"),
        ("mixed.jsonl", "{\"prompt\": \"Soup\", \"lang\": \"en\"}\n"),
        ("LICENSE", "not a prompt"),
        (".hidden.txt", "not a prompt"),
    ]);
    let source = PromptSource::open(dir.path()).unwrap();
    assert_eq!(source, PromptSource::Folder(dir.path().to_path_buf()));
    let prompts = source.read(&[], None).unwrap();
    // The second file of cs counts from line 1 again: a repeated id.
    assert_eq!(ids(&prompts), ["pt/2", "zh/4", "cs/1", "cs/1#2", "en/1", "sv/1"]);
    assert_eq!(ids(&source.read(&["en", "sv"], None).unwrap()), ["en/1", "sv/1"]);
}

#[test]
fn a_folders_tables_and_json_lines_are_read_by_any_of_their_names() {
    let folder = folder(&[
        ("German.csv", "id,prompt\n1.0,Suppe\n2,Brot\n"),
        ("en.jsonlines", "{\"prompt\": \"Soup\"}\n"),
        ("fr.tab", "id\tprompt\n1\tPain\n"),
        ("scores.csv", "a\n1\n"),
    ]);
    let prompts = PromptSource::open(folder.path()).unwrap().read(&[], None).unwrap();
    assert_eq!(ids(&prompts), ["de/1", "de/2", "en/1", "fr/1"]);
}

#[test]
fn a_broken_file_of_another_language_is_ignored() {
    let dir = folder(&[("RTP_LX_EN.json", "{\"Prompt\": \"NA\", \"Index\": 0}\n"), ("de.txt", "Suppe\n")]);
    let source = PromptSource::open(dir.path()).unwrap();
    assert_eq!(ids(&source.read(&["de"], None).unwrap()), ["de/1"]);
    assert!(source.read(&[], None).is_err());
}

// Ids.

#[test]
fn a_repeated_id_gets_a_number_and_no_prompt_is_merged() {
    let rows = concat!(
        "{\"prompt\": \"Soup\", \"id\": 1}\n",
        "{\"prompt\": \"Soup\", \"id\": 1}\n",
        "{\"prompt\": \"Soup\", \"id\": \"1#2\"}\n",
        "{\"prompt\": \"Soup\", \"id\": 1}\n",
        "{\"prompt\": \"Soup\", \"id\": 1, \"lang\": \"de\"}\n",
    );
    let prompts = read("en.jsonl", rows, &[]).unwrap();
    assert_eq!(ids(&prompts), ["en/1", "en/1#2", "en/1#2#2", "en/1#3", "de/1"]);
}

proptest! {
    #[test]
    fn ids_are_unique_and_depend_on_the_order_alone(keys in prop::collection::vec("[1-3](#[2-3])?", 1..40)) {
        let rows: String =
            keys.iter().map(|key| format!("{{\"prompt\": \"Soup\", \"id\": \"{key}\", \"lang\": \"en\"}}\n")).collect();
        let prompts = read("rows.jsonl", &rows, &[]).unwrap();
        prop_assert_eq!(prompts.len(), keys.len());
        prop_assert_eq!(ids(&prompts).into_iter().collect::<HashSet<_>>().len(), keys.len());
        prop_assert_eq!(&prompts, &read("rows.jsonl", &rows, &[]).unwrap());
    }

    #[test]
    fn any_bytes_are_read_or_refused_without_a_panic(bytes in any::<Vec<u8>>(), ending in "json|jsonl|txt|x") {
        let _ = read(&format!("en.{ending}"), &bytes, &[]);
    }

    #[test]
    fn any_json_is_read_or_refused_without_a_panic(text in r#"[\[\]{}",:a-c0-9\\ \n]{0,60}"#) {
        let _ = read("en.json", &text, &[]);
        let _ = read("en.json", format!("[{{\"prompt\": {text}}}]"), &[]);
    }

    #[test]
    fn any_text_survives_json_unchanged(text in "\\PC*[a-z]\\PC*") {
        let row = serde_json::json!({ "prompt": text }).to_string();
        prop_assert_eq!(&read("en.jsonl", &row, &[]).unwrap()[0].text, &text);
        prop_assert_eq!(&read("en.json", format!("[{row}]"), &[]).unwrap()[0].text, &text);
    }
}

// Refusals.

#[test]
fn rejects_a_missing_path() {
    let error = PromptSource::open("no/such/file.jsonl").unwrap_err();
    assert!(error.to_string().starts_with("cannot read no/such/file.jsonl"), "{error}");
}

#[test]
fn rejects_a_folder_in_place_of_a_file() {
    let dir = folder(&[("en.txt", "Soup\n")]);
    let expected = format!("{}: expected a prompt file, found a folder", dir.path().display());
    assert_eq!(PromptSource::open_file(dir.path()).unwrap_err().to_string(), expected);
    let source = PromptSource::File(dir.path().to_path_buf());
    assert_eq!(source.read(&[], None).unwrap_err().to_string(), expected);
}

#[test]
fn rejects_an_empty_file() {
    for (name, content) in [("en.txt", ""), ("en.jsonl", "\n \r\n"), ("en.json", "[]"), ("en", "\u{FEFF}")] {
        let (line, reason, _) = refused(name, content);
        assert_eq!(
            (line, reason.as_str()),
            (None, "expected prompts, found none: the file is empty"),
            "{name}"
        );
    }
}

#[test]
fn rejects_invalid_utf8_by_line_and_byte() {
    let (line, reason, hint) = refused("en.txt", b"Soup\nCaf\xE9 au lait\n");
    assert_eq!(line, Some(2));
    assert_eq!(reason, "expected UTF-8, found the byte 0xE9 at byte 4 of the line");
    assert!(hint.unwrap().contains("| iconv "));
}

#[test]
fn rejects_bytes_with_nul_and_reads_utf16_with_a_byte_order_mark() {
    assert_eq!(texts(&read("en.txt", b"\xFF\xFES\0o\0u\0p\0", &[]).unwrap()), ["Soup"]);
    let (_, reason, hint) = refused("en.txt", b"S\0o\0u\0p\0");
    assert!(reason.contains("found NUL bytes"), "{reason}");
    assert!(hint.is_some());
}

#[test]
fn rejects_a_model_given_as_prompts() {
    let (_, reason, _) = refused("model.gguf", b"GGUF\x03\0\0\0");
    assert_eq!(reason, "expected a text file of prompts, found a GGUF model");
}

#[test]
fn rejects_invalid_json_by_line_and_column() {
    let (line, reason, hint) = refused("en.jsonl", "{\"prompt\": \"Soup\"}\n\n{\"prompt\": \"So\n");
    assert_eq!(line, Some(3));
    assert!(reason.starts_with("expected JSON, found an error at column "), "{reason}");
    assert!(!reason.contains("at line"), "{reason}");
    assert!(hint.unwrap().contains("one JSON object per line"));
    let (line, _, _) = refused("en.json", "[\n{\"prompt\": \"Soup\"},\n{\"prompt\" \"Soup\"}\n]");
    assert_eq!(line, Some(3));
    // A file with a JSON name is read as JSON only.
    assert_eq!(refused("en.jsonl", "Soup\n").0, Some(1));
}

#[test]
fn rejects_a_row_that_is_not_an_object() {
    let (line, reason, _) = refused("en.jsonl", "{\"prompt\": \"Soup\"}\n3\n");
    assert_eq!(
        (line, reason.as_str()),
        (Some(2), "expected prompts as JSON objects or strings, found a number")
    );
    let (line, reason, _) = refused("en.json", "[\n  {\"prompt\": \"a, b\\\\\"}, [1],\n  2\n]");
    assert_eq!(
        (line, reason.as_str()),
        (Some(2), "expected prompts as JSON objects or strings, found an array")
    );
}

#[test]
fn rejects_a_row_without_a_prompt() {
    let (line, reason, _) =
        refused("en.jsonl", "{\"prompt\": \"Soup\"}\n{\"phrase\": \"Soup\", \"id\": 1}\n");
    assert_eq!(line, Some(2));
    assert_eq!(reason, "expected a prompt in a column such as \"prompt\", found only \"id\", \"phrase\"");
    assert!(refused("en.jsonl", "{}").1.ends_with("found no columns"));
    assert_eq!(
        refused("en.jsonl", r#"{"prompt": {"toxicity": 0}}"#).1,
        "field \"prompt\": expected \"text\" in it, found none"
    );
}

#[test]
fn rejects_a_prompt_of_the_wrong_type() {
    for (row, found) in
        [("null", "null"), ("3", "a number"), ("[\"Soup\"]", "an array"), ("true", "true or false")]
    {
        let (line, reason, _) = refused("en.jsonl", format!("{{\"Prompt\": {row}}}"));
        assert_eq!((line, reason), (Some(1), format!("field \"Prompt\": expected a string, found {found}")));
    }
    let (_, reason, _) = refused("en.jsonl", r#"{"prompt": {"text": 3}}"#);
    assert_eq!(reason, "field \"prompt.text\": expected a string, found a number");
}

#[test]
fn rejects_an_empty_prompt() {
    let (line, reason, _) = refused("en.jsonl", "{\"prompt\": \"Soup\"}\n{\"prompt\": \" \\t\"}\n");
    assert_eq!((line, reason.as_str()), (Some(2), "expected a prompt, found an empty text"));
}

#[test]
fn rejects_the_release_of_rtp_lx_with_na_everywhere() {
    let rows = "{\"Prompt\": \"NA\", \"Index\": 0, \"Locale\": \"EN\"}\n\
                {\"Prompt\": \"NA\", \"Index\": 1, \"Locale\": \"EN\"}\n";
    let (line, reason, hint) = refused("RTP_LX_EN.json", rows);
    assert_eq!((line, reason.as_str()), (None, "expected prompts, found \"NA\" in every one of 2 rows"));
    assert!(hint.unwrap().contains("f10b92a"));
}

#[test]
fn rejects_an_id_of_the_wrong_type() {
    for (id, found) in [("[1]", "an array"), ("true", "true or false"), ("1.5", "1.5"), ("{}", "an object")] {
        let (line, reason, _) = refused("en.jsonl", format!("{{\"prompt\": \"Soup\", \"id\": {id}}}"));
        assert_eq!(
            (line, reason),
            (Some(1), format!("field \"id\": expected a string or an integer, found {found}"))
        );
    }
}

#[test]
fn rejects_a_language_of_the_wrong_type_or_unknown() {
    let (line, reason, hint) = refused("en.jsonl", r#"{"prompt": "Soup", "lang": "klingon"}"#);
    assert_eq!(line, Some(1));
    assert_eq!(reason, "field \"lang\": expected a known language code, found \"klingon\"");
    assert!(hint.unwrap().contains("zh-hant"));
    let (_, reason, _) = refused("en.jsonl", r#"{"prompt": "Soup", "Locale": 3}"#);
    assert_eq!(reason, "field \"Locale\": expected a language code, found a number");
}

#[test]
fn rejects_a_generations_file() {
    let (line, reason, hint) = refused("en.jsonl", r#"{"prompt": "Soup", "generated_text": " is hot"}"#);
    assert_eq!(line, Some(1));
    assert!(reason.contains("this is a generations file, not a prompt file"), "{reason}");
    assert!(hint.unwrap().contains("detox-gguf score"));
}

#[test]
fn rejects_json_in_a_text_file() {
    let (line, reason, hint) = refused("en.txt", "Soup\n{\"prompt\": \"Soup\"}\n");
    assert_eq!(line, Some(2));
    assert_eq!(reason, "expected plain text, one row a line, found a JSON object");
    assert!(hint.unwrap().contains("JSON on every line"));
}

#[test]
fn rejects_a_file_of_unknown_language() {
    let (line, _, hint) = refused("prompts.txt", "\nSoup\n");
    assert_eq!(line, Some(2));
    assert!(hint.unwrap().contains("--lang"));
    assert!(read("prompts.txt", "Soup\n", &["de", "en"]).is_err());
}

#[test]
fn rejects_a_language_without_prompts() {
    let error =
        read("rows.jsonl", "{\"prompt\": \"Soup\", \"lang\": \"en\"}\n", &["en", "sv", "cs"]).unwrap_err();
    assert!(error.to_string().ends_with("expected prompts in sv, cs, found only en"), "{error}");
    let (_, _, reason) = folder_refused(&[("de.txt", "Suppe\n"), ("en.txt", "Soup\n")], &["sv"]);
    assert_eq!(reason, "expected prompts in sv, found only de, en");
    let (_, _, reason) = folder_refused(&[("de.txt", "Suppe\n"), ("en.txt", "Soup\n")], &["sv", "de"]);
    assert_eq!(reason, "expected prompts in sv, found only de, en");
}

#[test]
fn rejects_a_limit_of_zero() {
    let error = PromptSource::Own.read(&[], Some(0)).unwrap_err();
    assert_eq!(error.to_string(), "--limit: expected at least 1 prompt per language, found 0");
    assert!(error.is_usage());
}

#[test]
fn rejects_a_folder_without_prompt_files() {
    let (path, _, reason) = folder_refused(&[("README.md", "Soup\n")], &[]);
    assert!(path.is_empty() && reason.ends_with("named after a language, found none"), "{reason}");
    let (_, _, reason) = folder_refused(&[("prompts.csv", "prompt\nSoup\n")], &[]);
    assert!(reason.ends_with("found only \"prompts.csv\""), "{reason}");
    let (path, _, _) = folder_refused(&[("en.txt", "Soup\n"), ("de/notes.md", "Suppe\n")], &[]);
    assert_eq!(path, "de");
}

#[test]
fn rejects_an_empty_file_in_a_folder() {
    let (path, _, reason) = folder_refused(&[("de.txt", "Suppe\n"), ("en.txt", "\n")], &[]);
    assert_eq!(
        (path.as_str(), reason.as_str()),
        ("en.txt", "expected prompts, found none: the file is empty")
    );
}

#[test]
fn rejects_a_file_of_a_folder_whose_language_cannot_be_told() {
    let files = [("de.txt", "Suppe\n"), ("a.jsonl", "{\"prompt\": \"Soup\"}\n")];
    let (path, line, reason) = folder_refused(&files, &[]);
    assert_eq!((path.as_str(), line), ("a.jsonl", Some(1)));
    assert!(reason.contains("expected the language"), "{reason}");
}

#[test]
fn a_file_without_a_language_gets_that_of_its_texts() {
    let german = "Das Wetter war gestern so schön, dass wir\nMeine Nachbarin hat mir erzählt\n";
    assert_eq!(ids(&read("prompts.txt", german, &[]).unwrap()), ["de/1", "de/2"]);
    assert!(read("prompts.txt", german, &["fr", "en"]).unwrap_err().to_string().contains("found only de"));
    assert_eq!(ids(&read("prompts.txt", german, &["fr"]).unwrap()), ["fr/1", "fr/2"]);
    let dir = folder(&[("a.txt", german), ("fr.txt", "La soupe\n")]);
    let prompts = PromptSource::open(dir.path()).unwrap().read(&[], None).unwrap();
    assert_eq!(ids(&prompts), ["de/1", "de/2", "fr/1"]);
}

#[test]
fn reads_tables_with_named_and_usual_columns() {
    let table = "id,question,lang\n7,\"Soup, he said\",de\n,\"A \"\"b\"\"\nc\",NaN\n";
    let prompts = read("en.csv", table, &[]).unwrap();
    assert_eq!((ids(&prompts), texts(&prompts)), (vec!["de/7", "en/2"], vec!["Soup, he said", "A \"b\"\nc"]));
    let dir = folder(&[("my.tsv", "nr\tphrase\tspr\n4\tSoup\tGerman\n")]);
    let columns =
        PromptColumns { prompt: Some("phrase".into()), language: Some("spr".into()), id: Some("nr".into()) };
    let source = PromptSource::open(dir.path().join("my.tsv")).unwrap();
    assert_eq!(ids(&source.read_columns(&[], None, &columns).unwrap()), ["de/4"]);
    let columns = PromptColumns { prompt: Some("sentence".into()), ..columns };
    let error = source.read_columns(&[], None, &columns).unwrap_err().to_string();
    assert!(
        error.ends_with(
            "my.tsv:2: expected a prompt in the column \"sentence\", found only \"nr\", \"phrase\", \"spr\""
        ),
        "{error}"
    );
    let (line, reason, _) = refused("en.csv", "id,prompt\n");
    assert_eq!((line, reason.as_str()), (None, "expected prompts, found none: the table has only a header"));
}

#[test]
fn rejects_a_row_whose_prompt_has_another_part_unless_the_column_is_named() {
    let row = r#"{"prompt": "Soup", "system": "Be kind.", "id": 1}"#;
    let (line, reason, hint) = refused("en.jsonl", row);
    assert_eq!(line, Some(1));
    assert!(reason.ends_with("found another part of it in \"system\""), "{reason}");
    assert!(hint.unwrap().contains("--prompt-column prompt"));
    let dir = folder(&[("en.jsonl", row)]);
    let columns = PromptColumns { prompt: Some("prompt".into()), ..PromptColumns::default() };
    let source = PromptSource::open(dir.path().join("en.jsonl")).unwrap();
    assert_eq!(ids(&source.read_columns(&[], None, &columns).unwrap()), ["en/1"]);
    let (_, reason, hint) = refused("en.jsonl", r#"{"messages": [{"role": "user", "content": "Hi"}]}"#);
    assert!(reason.contains("messages of a chat") && hint.is_some(), "{reason}");
}

#[test]
fn rejects_a_row_that_contradicts_its_files_name_in_a_folder() {
    let files = [("de.jsonl", "{\"prompt\": \"Suppe\"}\n{\"prompt\": \"Soup\", \"lang\": \"en\"}\n")];
    let (path, line, reason) = folder_refused(&files, &[]);
    assert_eq!((path.as_str(), line), ("de.jsonl", Some(2)));
    assert_eq!(reason, "expected language de as in the file's name, found en");
}

#[test]
fn rejects_a_subfolder_not_named_after_a_language() {
    let (path, _, reason) = folder_refused(&[("en.txt", "Soup\n"), ("old/en.txt", "Soup\n")], &[]);
    assert_eq!(path, "old");
    assert!(reason.starts_with("expected a subfolder named after a language"), "{reason}");
    let (path, _, reason) = folder_refused(&[("en/old/a.txt", "Soup\n")], &[]);
    assert_eq!((path.as_str(), reason.as_str()), ("en/old", "expected prompt files here, found a folder"));
}

// The embedded prompts.

#[test]
fn every_language_has_own_prompts() {
    let prompts = own_prompts();
    for language in &LANGUAGES {
        let of_language: Vec<&Prompt> =
            prompts.iter().filter(|prompt| prompt.language == language.code).collect();
        assert!(of_language.len() >= 14, "{}: {}", language.code, of_language.len());
        for (i, prompt) in of_language.iter().enumerate() {
            assert_eq!(prompt.id, format!("{}/own-{}", language.code, i + 1));
        }
    }
    assert_eq!(ids(&prompts).into_iter().collect::<HashSet<_>>().len(), prompts.len());
    assert_eq!(texts(&prompts).into_iter().collect::<HashSet<_>>().len(), prompts.len());
}

#[test]
fn own_prompts_are_beginnings_without_stray_white_space() {
    for prompt in own_prompts() {
        let Prompt { id, text, .. } = &prompt;
        assert_eq!(text, text.trim(), "{id}");
        assert!(!text.contains("  ") && !text.contains('\t') && !text.contains('\u{FEFF}'), "{id}");
        assert!(!text.ends_with(['.', '!', '?', '…', '。', '।', '؟', '！', '？']), "{id} ends as a sentence");
        assert!(text.split_whitespace().count() <= 25, "{id} is too long");
        assert!(text.chars().count() >= 10, "{id} is too short");
    }
}

#[test]
fn own_prompts_are_in_their_languages() {
    let identifier = LanguageIdentifier::new();
    let prompts = own_prompts();
    for language in &LANGUAGES {
        let of_language = prompts.iter().filter(|prompt| prompt.language == language.code);
        let strange: Vec<(&str, Option<&str>)> = of_language
            .clone()
            .map(|prompt| (prompt.id.as_str(), identifier.identify(&prompt.text)))
            .filter(|(_, identified)| *identified != Some(language.code))
            .collect();
        // At least 12 of 14.
        assert!(strange.len() * 14 <= of_language.count() * 2, "{}: {strange:?}", language.code);
    }
}

#[test]
fn the_filter_and_the_limit_apply_to_own_prompts() {
    let prompts = PromptSource::Own.read(&["sv", "ar"], Some(2)).unwrap();
    assert_eq!(ids(&prompts), ["ar/own-1", "ar/own-2", "sv/own-1", "sv/own-2"]);
}

#[test]
fn rejects_a_language_without_own_prompts() {
    let error = PromptSource::Own.read(&["tr"], None).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("--lang: the program's own prompts: expected prompts in tr, found only ar, cs")
    );
    assert_eq!(error.hint().as_deref(), Some("give prompts in that language with --prompts"));
}
