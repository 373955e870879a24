use serde_json::json;

use super::*;

fn read_as(name: &str, content: impl AsRef<[u8]>, form: Option<Wanted>) -> Result<Vec<Row>> {
    Rows::new(Path::new(name), "texts", Box::new(content.as_ref()), form, &[])?.limited().collect()
}

fn read(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<Row>> {
    read_as(name, content, None)
}

/// Line, place and fields of every row.
fn rows(name: &str, content: &str) -> Vec<(usize, usize, Value)> {
    let rows = read(name, content).unwrap_or_else(|error| panic!("{name}: {content:?}: {error}"));
    rows.into_iter().map(|row| (row.line, row.place, Value::Object(row.fields))).collect()
}

fn fields(name: &str, content: &str) -> Vec<Value> {
    rows(name, content).into_iter().map(|(.., fields)| fields).collect()
}

/// Line, reason and hint of a refusal.
fn refused(name: &str, content: impl AsRef<[u8]>) -> (Option<usize>, String, String) {
    let error = read(name, content.as_ref());
    let error =
        error.err().unwrap_or_else(|| panic!("{name}: {:?}", String::from_utf8_lossy(content.as_ref())));
    let hint = error.hint().unwrap_or_default();
    match error {
        Error::Input { line, reason, .. } => (line, reason, hint),
        other => panic!("expected an input error, found {other}"),
    }
}

#[test]
fn every_shape_of_json_gives_the_same_rows() {
    let expected = [json!({"prompt": "a, {b}"}), json!({"prompt": "c \"d\"\\"})];
    let (a, b) = (r#"{"prompt": "a, {b}"}"#, r#"{"prompt": "c \"d\"\\"}"#);
    for content in [
        format!("{a}\n\n{b}"),
        format!("\u{feff}{a}\r\n{b}\r\n"),
        format!("[{a},{b}]"),
        format!("\n[\n  {a},\n  {b}\n]\n"),
        format!("{{\"version\": 3, \"data\": [{a}, {b}]}}"),
        format!("{{\n  \"rows\": [\n{a},\n{b}]\n}}\n"),
        format!("{}\n{b}", a.replace(": ", ":\n")),
        format!("{}{}", a.replace(": ", ":\n"), b.replace(": ", "\n:")),
    ] {
        for name in ["f.json", "f.jsonl", "f", "<stdin>", "f.txt"] {
            assert_eq!(fields(name, &content), expected, "{name}: {content}");
        }
    }
    assert_eq!(fields("f.json", "[\"a\", \"b\"]"), [json!({"text": "a"}), json!({"text": "b"})]);
    assert_eq!(rows("f.json", "[\n{\"a\":1},\n\n{\"a\":2}]")[1], (4, 2, json!({"a": 2})));
    assert_eq!(rows("f.jsonl", "{\"a\":1}\n\n{\"a\":2}")[1], (3, 3, json!({"a": 2})));
    assert!(fields("f.json", "[]").is_empty());
    // One row is a row, even with a list in it.
    assert_eq!(fields("f.json", r#"{"prompt": "a", "examples": [1]}"#).len(), 1);
}

#[test]
fn unpaired_surrogates_nan_and_infinity_are_repaired_and_pairs_stay() {
    let row =
        r#"{"text": "\ud83d x \ud83d\ude00 \udc00 \\ud83d", "x": NaN, "y": [-Infinity, 1], "NaN": "NaN"}"#;
    let expected = json!({"text": "\u{fffd} x 😀 \u{fffd} \\ud83d", "x": null, "y": [null, 1], "NaN": "NaN"});
    assert_eq!(fields("f.jsonl", row), [expected]);
    assert_eq!(json::parse(row.as_bytes()).unwrap().1, 2);
}

#[test]
fn rejects_broken_json_by_line() {
    for (content, line, word) in [
        ("{\"a\": 1}\n{\"a\": \n{\"a\": 2}", 2, "EOF"),
        ("{\"a\": 1}\n{\"a\": 1} x", 2, "trailing"),
        ("{\"a\": 1}\n{\"a\": 1, \"a\": 2}", 2, "the key \"a\" twice"),
        ("[{\"a\": 1},\n{\"a\" 2}]", 2, "error at column"),
        ("[{\"a\": 1}\n{\"a\": 2}]", 2, "expected a comma"),
        ("[{\"a\": 1},\n]", 2, "after the comma"),
        ("[{\"a\": 1}]\n[]", 2, "more text"),
        ("[{\"a\": 1},\n{\"a\": 2}", 2, "cut off"),
        ("{\"a\":\n{\"b\": 1}", 2, "EOF"),
        ("{\"a\": \"x\ny\"}", 1, "EOF while parsing a string"),
        ("{'a': 1}", 1, "column 2"),
        ("[1]", 1, "found a number"),
        ("{\"a\": 1}\nnull", 2, "found null"),
        (
            "{\"prompt\": {\"0\": \"a\", \"1\": \"b\"}, \"id\": {\"0\": 1, \"1\": 2}}",
            1,
            "one object of columns",
        ),
        ("{\"prompt\": [\"a\", \"b\"], \"id\": [1, 2]}", 1, "one object of columns"),
    ] {
        let (found, reason, hint) = refused("f.json", content);
        assert!(
            found == Some(line) && reason.contains(word) && !hint.is_empty(),
            "{content}: {found:?} {reason}"
        );
    }
    assert!(refused("f.json", "{'a': 1}").2.contains("double quotes"));
}

#[test]
fn tables_are_read_with_any_usual_separator() {
    let expected =
        [json!({"id": "1", "prompt": "The weather"}), json!({"id": "2", "prompt": "A \"q\",\nb; c"})];
    for separator in [",", ";", "\t", "|"] {
        for end in ["\n", "\r\n", "\r"] {
            let lines = ["id,prompt", "1,The weather", "2,\"A \"\"q\"\",\nb; c\""];
            // Only the commas between cells.
            let lines = lines.map(|line| line.replacen(',', separator, 1));
            let content = lines.join(end) + end;
            for name in ["f.csv", "f.tsv", "f", "f.txt", "<stdin>"] {
                assert_eq!(fields(name, &content), expected, "{name}: {content:?}");
            }
        }
    }
    assert_eq!(
        fields("f.csv", "prompt\na\n\n\"b, c\"\n"),
        [json!({"prompt": "a"}), json!({"prompt": "b, c"})]
    );
    assert_eq!(fields("f.csv", "sep=;\ntext;x\na;1\n"), [json!({"text": "a", "x": "1"})]);
    assert_eq!(fields("f.csv", "\u{feff}\"text\",\"x\"\n\"a\",1"), [json!({"text": "a", "x": "1"})]);
    assert_eq!(rows("f.csv", "text,x\n\"a\nb\",1\nc,2\n")[1], (4, 2, json!({"text": "c", "x": "2"})));
    // The header decides: a semicolon in a text of a table with commas is text.
    assert_eq!(fields("f.csv", "text,x\na;b,1\n"), [json!({"text": "a;b", "x": "1"})]);
    assert_eq!(fields("f.csv", "id;text\n1;0,5\n"), [json!({"id": "1", "text": "0,5"})]);
    let long = format!("\u{feff}id,text\n{}", "1,\"a, b\"\n".repeat(10_000));
    assert_eq!(fields("f", &long)[9_999], json!({"id": "1", "text": "a, b"}));
    // Tabs without quoting: a quotation mark is text.
    let plain = "id\ttext\n1\t\"Hello\" she said\n2\tb\n";
    assert_eq!(fields("f.tsv", plain)[0], json!({"id": "1", "text": "\"Hello\" she said"}));
}

#[test]
fn rejects_broken_tables_by_line() {
    for (content, line, word) in [
        ("text,x\na,1\nb,1,2\n", 3, "expected 2 cells as in the header, found 3"),
        ("text,x\na\n", 2, "found 1"),
        ("text,text\na,1\n", 1, "\"text\" twice"),
        ("text,x\n\"a \"b\" c\",1\n", 2, "after a quoted cell"),
        ("text,x\na,1\n\"b,1\nc,2\n", 3, "found the end of the file"),
        ("text,x\na,1\nb\0,1\n", 0, "NUL"),
    ] {
        let (found, reason, hint) = refused("f.csv", content);
        let found = found.unwrap_or(0);
        assert!(found == line && reason.contains(word) && !hint.is_empty(), "{content:?}: {found} {reason}");
    }
    let (line, reason, hint) = refused("f.csv", b"text,x\na,1\n\"b\nCaf\xE9\",1\n");
    assert_eq!(
        (line, reason.as_str()),
        (Some(4), "expected UTF-8, found the byte 0xE9 at byte 4 of the line")
    );
    assert!(hint.contains("iconv"), "{hint}");
}

#[test]
fn plain_lines_stay_plain() {
    for content in [
        "Well, he said\nNo, she said\n",
        "Text, they say, is cheap\nYes, text\n",
        "[sic] he said\n[laughs] no\n",
        "{sighs} well\nok\n",
        "\"Quoted\" he said\nb\n",
        "a | b\nc | d\n",
        "Note: this\nWell: that\n",
        "# one hash\ntwo\n",
        "1. The weather\n2. The soup\n",
        "a;b;c\nd;e;f\n",
        "prompt\nanswer\n",
    ] {
        let expected: Vec<Value> = content.lines().map(|line| json!({ "text": line })).collect();
        for name in ["f.txt", "f", "<stdin>"] {
            assert_eq!(fields(name, content), expected, "{name}: {content}");
        }
    }
    let blank = rows("f", "ab\n\nc\r\n");
    assert_eq!(blank[1], (2, 2, json!({"text": ""})));
    assert_eq!(fields("f", "ab\rc\r"), [json!({"text": "ab"}), json!({"text": "c"})]);
    let lines = read_as("f.md", "# A\n- b\n{\"a\": 1}\n", Some(Wanted::Lines)).unwrap();
    assert_eq!(lines.len(), 3);
    assert_eq!(refused("f.txt", "Soup\n{\"prompt\": \"Soup\"}\n").0, Some(2));
}

#[test]
fn rejects_files_that_are_no_lists_of_rows_with_advice() {
    for (name, content, found) in [
        ("f.yaml", "prompts:\n  - The weather\n", "YAML"),
        ("f.yml.gz", "- a\n", "YAML"),
        ("f", "prompts:\n  - The weather\n  - b\n", "YAML"),
        ("<stdin>", "---\ntitle: x\n---\n", "YAML"),
        ("f", "- prompt: a\n  id: 1\n- prompt: b\n", "YAML"),
        ("README.md", "Prompts\n", "Markdown"),
        ("f", "# Prompts\n\n- one\n- two\n", "Markdown"),
        ("f", "| id | prompt |\n|---|---|\n| 1 | a |\n", "Markdown"),
        ("f.toml", "a = 1\n", "settings"),
        ("f", "[section]\nname = \"a\"\n", "settings"),
        ("f.py", "print(1)\n", "source code"),
        ("f.ipynb", "x", "a notebook"),
        ("f.txt", "<!DOCTYPE html>\n<html>", "a web page"),
        ("f.jsonl", "<html>404</html>", "a web page"),
        ("f", "<?xml version=\"1.0\"?><a/>", "XML"),
        ("f", "#!/bin/sh\nls\n", "a script"),
    ] {
        let (_, reason, hint) = refused(name, content);
        // A file that is called .txt already needs other advice.
        let advises = hint.contains(".txt") != name.ends_with(".txt");
        assert!(reason.contains(found) && advises, "{name}: {reason} {hint}");
    }
}

#[test]
fn rejects_an_endless_line_and_endless_rows_before_memory_ends() {
    let line = std::io::repeat(b'a').take(1 << 40);
    let error =
        Rows::new(Path::new("f"), "texts", Box::new(line), None, &[]).unwrap().next().unwrap().unwrap_err();
    assert!(error.to_string().contains("a row of at most 64 MiB"), "{error}");
    let string = std::io::Read::chain(&b"[{\"a\": \""[..], std::io::repeat(b'a').take(1 << 40));
    let error =
        Rows::new(Path::new("f"), "texts", Box::new(string), None, &[]).unwrap().next().unwrap().unwrap_err();
    assert!(error.to_string().contains("a row of at most 64 MiB"), "{error}");
    let error = Rows::new(Path::new("f"), "texts", Box::new(std::io::repeat(0)), None, &[]).unwrap_err();
    assert!(error.to_string().contains("NUL"), "{error}");
    let mut rows = read_as("f", "a\nb\n", None).unwrap();
    let mut reader = Rows::new(Path::new("f"), "texts", Box::new(&b"a\n"[..]), None, &[]).unwrap().limited();
    reader.n_rows = MAX_ROWS;
    assert!(reader.add(&rows.remove(0)).unwrap_err().to_string().contains("more than 2000000 rows"));
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_read_or_refused_without_a_panic(bytes: Vec<u8>, name in "f\\.(json|csv|tsv|txt|x)") {
        let _ = read(&name, &bytes);
    }

    #[test]
    fn any_text_is_read_or_refused_without_a_panic(text in r#"[\[\]{}",;|:a-c0-9\\ \n\r\t]{0,60}"#, name in "f\\.(json|csv|tsv|txt|x)") {
        let _ = read(&name, &text);
    }

    #[test]
    fn a_quoted_table_gives_its_cells_back(cells in proptest::collection::vec("[a-z\",;\n\r ]{0,8}", 1..12)) {
        let quoted: Vec<String> = cells.iter().map(|cell| format!("\"{}\",x\n", cell.replace('"', "\"\""))).collect();
        let content = format!("text,y\n{}", quoted.concat());
        let found: Vec<Value> = fields("f.csv", &content).into_iter().map(|row| row["text"].clone()).collect();
        proptest::prop_assert_eq!(found, cells.into_iter().map(Value::from).collect::<Vec<_>>());
    }
}

#[test]
fn rejects_a_row_of_more_values_than_fit_in_memory() {
    let wide = format!("{{\"text\": [{}0]}}\n", "0,".repeat(4_000_000));
    let (line, reason, _) = refused("f.jsonl", &wide);
    assert!(line == Some(1) && reason.contains("at most 4000000 values"), "{line:?} {reason}");
}
