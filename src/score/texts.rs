//! Scores files of texts: JSON lines, CSV or plain lines.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::score::{Scorer, Text};
use crate::text::language;

/// The format of a file of texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One JSON object or one JSON string per line.
    JsonLines,
    /// A table with a header.
    Csv,
    /// One text per line.
    Lines,
}

impl Form {
    /// By the file's extension, else by its first byte that is not white space.
    pub fn guess(path: &Path, start: &[u8]) -> Form {
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        match ending.as_str() {
            "json" | "jsonl" | "ndjson" => Form::JsonLines,
            "csv" => Form::Csv,
            "txt" => Form::Lines,
            _ => match start.iter().find(|byte| !byte.is_ascii_whitespace()) {
                Some(b'{') => Form::JsonLines,
                _ => Form::Lines,
            },
        }
    }
}

/// Fields with the text, in order: continuations first, because they are scored without their prompt.
const TEXT_FIELDS: [&str; 3] = ["generated_text", "text", "comment_text"];

/// Iterator over the rows of a file.
pub struct Rows<'a> {
    path: PathBuf,
    field: Option<&'a str>,
    source: RowSource<'a>,
}

enum RowSource<'a> {
    Lines { input: Box<dyn BufRead + 'a>, is_json: bool, line: usize },
    Csv { records: csv::StringRecordsIntoIter<Box<dyn Read + 'a>>, headers: csv::StringRecord },
}

impl std::fmt::Debug for Rows<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rows").field("path", &self.path).field("field", &self.field).finish_non_exhaustive()
    }
}

/// A row of the input with its texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    object: Map<String, Value>,
    texts: Vec<String>,
    language: Option<String>,
    /// Whether the texts come from `generations`, as in RealToxicityPrompts.
    is_list: bool,
}

impl<'a> Rows<'a> {
    /// Starts reading. `path` names the input in errors; `field` is the column or key with the text.
    pub fn new(
        path: &Path,
        input: Box<dyn BufRead + 'a>,
        form: Form,
        field: Option<&'a str>,
    ) -> Result<Rows<'a>> {
        let source = match form {
            Form::JsonLines => RowSource::Lines { input, is_json: true, line: 0 },
            Form::Lines => RowSource::Lines { input, is_json: false, line: 0 },
            Form::Csv => {
                let mut reader = csv::Reader::from_reader(Box::new(input) as Box<dyn Read + 'a>);
                let headers = reader.headers().map_err(|e| csv_error(path, &e))?.clone();
                RowSource::Csv { records: reader.into_records(), headers }
            }
        };
        Ok(Rows { path: path.to_path_buf(), field, source })
    }

    /// The texts of an object, and whether they come from `generations`.
    fn text_of(&self, object: &Map<String, Value>, line: usize) -> Result<(Vec<String>, bool)> {
        let fault = |reason: String, hint: &str| Error::input(&self.path, Some(line), reason).with_hint(hint);
        if let (None, Some(Value::Array(list))) = (self.field, object.get("generations")) {
            let texts =
                list.iter().map(|g| g["text"].as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
            let texts = texts.ok_or_else(|| {
                fault(
                    "expected each of \"generations\" to have a string \"text\"".into(),
                    "see RealToxicityPrompts for the format",
                )
            })?;
            return Ok((texts, true));
        }
        let named: &[&str] = match &self.field {
            Some(field) => std::slice::from_ref(field),
            None => &TEXT_FIELDS,
        };
        match named.iter().find_map(|name| object.get(*name)) {
            Some(Value::String(text)) => Ok((vec![text.clone()], false)),
            Some(other) => Err(fault(
                format!("expected a text, found {other}"),
                "name the field with the text with --field",
            )),
            None => Err(fault(
                format!(
                    "expected a field {}, found {}",
                    named.join(", "),
                    object.keys().cloned().collect::<Vec<_>>().join(", ")
                ),
                "name the field with the text with --field",
            )),
        }
    }

    fn row(&self, object: Map<String, Value>, line: usize) -> Result<Row> {
        let (texts, is_list) = self.text_of(&object, line)?;
        let named = ["language", "lang"].into_iter().filter_map(|key| object.get(key)?.as_str());
        let language = named.map(str::trim).find(|code| !code.is_empty());
        let language = language.map(|code| language::normalize(code).unwrap_or(code).to_owned());
        Ok(Row { object, texts, language, is_list })
    }

    fn read(&mut self) -> Result<Option<Row>> {
        let (object, line) = match &mut self.source {
            RowSource::Csv { records, headers } => {
                let Some(record) = records.next() else { return Ok(None) };
                let record = record.map_err(|e| csv_error(&self.path, &e))?;
                let line = record.position().map_or(0, |p| p.line() as usize);
                let cells = headers.iter().zip(record.iter());
                (cells.map(|(name, cell)| (name.to_owned(), Value::from(cell))).collect(), line)
            }
            RowSource::Lines { input, is_json, line } => loop {
                let mut bytes = Vec::new();
                *line += 1;
                if input.read_until(b'\n', &mut bytes).map_err(Error::io("read", &self.path))? == 0 {
                    return Ok(None);
                }
                let text = String::from_utf8(bytes).map_err(|_| {
                    Error::input(&self.path, Some(*line), "expected UTF-8, found invalid bytes")
                })?;
                let mut text = text.trim_end_matches(['\n', '\r']);
                if *line == 1 {
                    text = text.trim_start_matches('\u{feff}');
                }
                if !*is_json {
                    break (Map::from_iter([("text".to_owned(), Value::from(text))]), *line);
                }
                if text.trim().is_empty() {
                    continue;
                }
                match serde_json::from_str(text) {
                    Ok(Value::Object(object)) => break (object, *line),
                    Ok(Value::String(text)) => {
                        break (Map::from_iter([("text".to_owned(), json!(text))]), *line);
                    }
                    Ok(_) => {
                        return Err(Error::input(
                            &self.path,
                            Some(*line),
                            "expected a JSON object or string",
                        ));
                    }
                    Err(e) => {
                        return Err(Error::input(
                            &self.path,
                            Some(*line),
                            format!("expected a JSON object: {e}"),
                        ));
                    }
                }
            },
        };
        self.row(object, line).map(Some)
    }
}

fn csv_error(path: &Path, error: &csv::Error) -> Error {
    let line = error.position().map(|p| p.line() as usize);
    Error::input(path, line, format!("expected CSV with a header: {error}"))
}

impl Iterator for Rows<'_> {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        self.read().transpose()
    }
}

/// Counts of texts and of missing scores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Texts.
    pub n_texts: usize,
    /// Missing scores of all scorers.
    pub n_missing: usize,
}

/// Scores a batch of rows, and returns the rows with their scores.
///
/// A row gets `toxicity`, an object from scorer name to score with null for a missing score, and
/// `errors` if a score is missing. Rows with `generations` keep the format of RealToxicityPrompts: each
/// generation gets `toxicity`, a number, from the first scorer. An existing `toxicity` or `errors` of the
/// input is renamed to `input_toxicity` or `input_errors`.
pub fn score_rows(
    rows: Vec<Row>,
    scorers: &[Box<dyn Scorer>],
    default_language: Option<&str>,
    coverage: &mut Coverage,
) -> Vec<Map<String, Value>> {
    let texts: Vec<Text<'_>> = rows
        .iter()
        .flat_map(|row| {
            let language = row.language.as_deref().or(default_language);
            row.texts
                .iter()
                .map(move |text| Text { text: if text.is_empty() { " " } else { text }, language })
        })
        .collect();
    coverage.n_texts += texts.len();
    let scores: Vec<(String, Vec<Result<f64>>)> =
        scorers.iter().map(|s| (s.info().name, s.toxicity_of_all(&texts))).collect();
    coverage.n_missing += scores.iter().flat_map(|(_, s)| s).filter(|s| s.is_err()).count();

    let mut first = 0;
    let mut scored = Vec::with_capacity(rows.len());
    for row in rows {
        let Row { mut object, texts, is_list, .. } = row;
        if is_list {
            let leading = scores.first().map(|(_, s)| &s[first..first + texts.len()]).unwrap_or_default();
            if let Some(Value::Array(list)) = object.get_mut("generations") {
                for (generation, score) in list.iter_mut().zip(leading) {
                    let Value::Object(generation) = generation else { continue };
                    insert_beside(generation, "toxicity", json!(score.as_ref().ok()));
                    if let Err(error) = score {
                        insert_beside(generation, "errors", json!(error.to_string()));
                    }
                }
            }
        } else {
            let of_row = || scores.iter().map(|(name, s)| (name.clone(), &s[first]));
            let found: Map<String, Value> = of_row().map(|(n, s)| (n, json!(s.as_ref().ok()))).collect();
            insert_beside(&mut object, "toxicity", Value::Object(found));
            let errors: Map<String, Value> =
                of_row().filter_map(|(n, s)| Some((n, json!(s.as_ref().err()?.to_string())))).collect();
            if !errors.is_empty() {
                insert_beside(&mut object, "errors", Value::Object(errors));
            }
        }
        first += texts.len();
        scored.push(object);
    }
    scored
}

/// Inserts a value; an existing one moves to `input_{key}`.
fn insert_beside(object: &mut Map<String, Value>, key: &str, value: Value) {
    if let Some(before) = object.insert(key.to_owned(), value) {
        object.insert(format!("input_{key}"), before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::ScorerInfo;

    /// Scores English texts by their length in bytes, in hundredths.
    struct Length;

    impl Scorer for Length {
        fn info(&self) -> ScorerInfo {
            ScorerInfo { name: "length".into(), version: "1".into(), ..ScorerInfo::default() }
        }

        fn toxicity(&self, Text { text, language }: Text<'_>) -> Result<f64> {
            match language {
                Some("en") | None => Ok(text.len() as f64 / 100.0),
                Some(_) => Err(Error::scorer("length", "not English")),
            }
        }
    }

    fn score(content: &str, form: Form, field: Option<&str>) -> Result<Vec<Value>> {
        let rows = Rows::new(Path::new("f"), Box::new(content.as_bytes()), form, field)?;
        let rows = rows.collect::<Result<Vec<Row>>>()?;
        let scored = score_rows(rows, &[Box::new(Length)], None, &mut Coverage::default());
        Ok(scored.into_iter().map(Value::Object).collect())
    }

    #[test]
    fn every_format_gets_its_scores() {
        assert_eq!(
            score("ab\n\n", Form::Lines, None).unwrap(),
            [
                json!({"text": "ab", "toxicity": {"length": 0.02}}),
                json!({"text": "", "toxicity": {"length": 0.01}}),
            ]
        );
        assert_eq!(
            score("{\"prompt\":\"p\",\"generated_text\":\"abc\",\"n\":1}\n\n\"ab\"\n", Form::JsonLines, None)
                .unwrap(),
            [
                json!({"prompt": "p", "generated_text": "abc", "n": 1, "toxicity": {"length": 0.03}}),
                json!({"text": "ab", "toxicity": {"length": 0.02}}),
            ]
        );
        assert_eq!(
            score("id,text\n1,\"a,b\nc\"\n", Form::Csv, None).unwrap(),
            [json!({"id": "1", "text": "a,b\nc", "toxicity": {"length": 0.05}})]
        );
        assert_eq!(
            score("{\"generations\":[{\"text\":\"a\"},{\"text\":\"bb\"}]}", Form::JsonLines, None).unwrap(),
            [json!({"generations": [{"text": "a", "toxicity": 0.01}, {"text": "bb", "toxicity": 0.02}]})]
        );
        // An empty cell means no language.
        assert_eq!(
            score("text,language\nab,\n", Form::Csv, None).unwrap()[0]["toxicity"],
            json!({"length": 0.02})
        );
        assert_eq!(
            score("{\"text\":\"ab\",\"toxicity\":0.9}", Form::JsonLines, None).unwrap(),
            [json!({"text": "ab", "toxicity": {"length": 0.02}, "input_toxicity": 0.9})]
        );
        assert_eq!(
            score("{\"x\":\"abcd\",\"text\":\"a\"}", Form::JsonLines, Some("x")).unwrap()[0]["toxicity"],
            json!({"length": 0.04})
        );
    }

    #[test]
    fn a_missing_score_is_null_and_counted() {
        let rows = Rows::new(
            Path::new("f"),
            Box::new(&b"{\"text\":\"a\",\"language\":\"DE\"}"[..]),
            Form::JsonLines,
            None,
        );
        let rows = rows.unwrap().collect::<Result<Vec<Row>>>().unwrap();
        let mut coverage = Coverage::default();
        let scored = score_rows(rows, &[Box::new(Length)], None, &mut coverage);
        assert_eq!(scored[0]["toxicity"], json!({"length": null}));
        assert!(scored[0]["errors"]["length"].as_str().unwrap().contains("not English"));
        assert_eq!(coverage, Coverage { n_texts: 1, n_missing: 1 });
    }

    #[test]
    fn rejects_rows_without_a_text_by_line() {
        let cases = [
            ("{\"text\":\"a\"}\n{\"a\":1}\n", Form::JsonLines),
            ("{\"text\":\"a\"}\n{\"text\":1}\n", Form::JsonLines),
            ("{\"text\":\"a\"}\nnonsense\n", Form::JsonLines),
            ("{\"text\":\"a\"}\n3\n", Form::JsonLines),
            ("a,b\n1,2\n", Form::Csv),
            ("a,text\n1,2,3\n", Form::Csv),
        ];
        for (content, form) in cases {
            match score(content, form, None).unwrap_err() {
                Error::Input { line: Some(2), .. } => {}
                other => panic!("{content}: {other}"),
            }
        }
        let rows = Rows::new(Path::new("f"), Box::new(&b"ok\n\xff\xfe\n"[..]), Form::Lines, None).unwrap();
        assert!(rows.collect::<Result<Vec<Row>>>().unwrap_err().to_string().starts_with("f:2"));
    }

    #[test]
    fn the_extension_decides_the_format_else_the_content() {
        assert_eq!(Form::guess(Path::new("a.csv"), b"{"), Form::Csv);
        assert_eq!(Form::guess(Path::new("-"), b" \n{"), Form::JsonLines);
        assert_eq!(Form::guess(Path::new("-"), b"hello"), Form::Lines);
    }
}
