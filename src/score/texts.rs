//! Scores files of texts, one row at a time.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::score::{self, Scorer, Text};
use crate::text::language;
use crate::text::rows::{self, Column, LANGUAGE, TEXT, Wanted};

/// Columns of texts that the user names. `None` means the usual names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextColumns {
    /// The text.
    pub text: Option<String>,
    /// The row's language.
    pub language: Option<String>,
}

/// Iterator over the rows of a file.
#[derive(Debug)]
pub struct Rows<'a> {
    path: PathBuf,
    columns: TextColumns,
    rows: rows::Rows<'a>,
}

/// A row of the input with its texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    object: Map<String, Value>,
    /// `None` if the row has no text.
    texts: Vec<Option<String>>,
    language: Option<String>,
    /// Whether the texts come from `generations`, as in RealToxicityPrompts.
    is_list: bool,
}

impl<'a> Rows<'a> {
    /// Starts reading. `path` names the input in errors. `form` is detected if it is `None`.
    ///
    /// # Errors
    /// [`Error::Input`] for a file that is no list of rows; [`Error::Io`].
    pub fn new(
        path: &Path,
        input: Box<dyn Read + 'a>,
        form: Option<Wanted>,
        columns: TextColumns,
    ) -> Result<Rows<'a>> {
        let named = [&columns.text, &columns.language].map(Option::as_deref);
        let rows =
            rows::Rows::new(path, "texts", input, form, &named).map_err(|error| match error.hint() {
                Some(hint) if hint.contains("plain text") || hint.contains("the first line") => {
                    error.with_hint(format!("{hint}; to score it line by line: --format text"))
                }
                _ => error,
            })?;
        Ok(Rows { path: path.to_path_buf(), columns, rows })
    }

    /// The texts of an object, and whether they come from `generations`.
    fn text_of(&self, object: &Map<String, Value>, line: usize) -> Result<(Vec<Option<String>>, bool)> {
        let fault = |reason: String, hint: &str| Error::input(&self.path, Some(line), reason).with_hint(hint);
        let chosen = self.columns.text.as_deref();
        if let (None, Some(Value::Array(list))) = (chosen, object.get("generations")) {
            let texts =
                list.iter().map(|g| g["text"].as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
            let texts = texts.ok_or_else(|| {
                fault(
                    "expected each of \"generations\" to have a string \"text\"".into(),
                    "see RealToxicityPrompts for the format",
                )
            })?;
            return Ok((texts.into_iter().map(Some).collect(), true));
        }
        let Some((name, value)) = TEXT.find(object, chosen) else {
            if let Some((reason, hint)) = rows::chat(object) {
                return Err(Error::input(&self.path, Some(line), reason).with_optional_hint(hint));
            }
            let (reason, hint) = TEXT.absent(object, chosen);
            return Err(fault(reason, &hint));
        };
        // In a table, an empty cell is a missing text.
        let is_empty_cell = self.rows.header().is_some() && value.as_str().is_some_and(str::is_empty);
        if value.is_null() || is_empty_cell {
            return Ok((vec![None], false));
        }
        let text = rows::text(name, value).map_err(|(reason, hint)| {
            fault(reason, hint.unwrap_or("name the field with the text with --field"))
        })?;
        Ok((vec![Some(text.to_owned())], false))
    }

    fn row(&self, object: Map<String, Value>, line: usize) -> Result<Row> {
        let (texts, is_list) = self.text_of(&object, line)?;
        let column = Column { names: &["language", "lang", "Locale", "locale"], ..LANGUAGE };
        let named = column.stated(&object, self.columns.language.as_deref());
        let named =
            named.map_err(|(reason, hint)| Error::input(&self.path, Some(line), reason).with_hint(hint))?;
        let code = named.and_then(|(_, value)| value.as_str()).map(str::trim);
        let language = code.map(|code| language::recognise(code).unwrap_or(code).to_owned());
        Ok(Row { object, texts, language, is_list })
    }
}

impl Iterator for Rows<'_> {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        let row = self.rows.next()?;
        Some(row.and_then(|row| self.row(row.fields, row.line)))
    }
}

/// Counts of texts and of missing scores.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Texts.
    pub n_texts: usize,
    /// Missing scores of all scorers.
    pub n_missing: usize,
    /// Why the first of them is missing.
    pub first_error: Option<String>,
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
    let texts: Vec<(Option<&str>, Option<&str>)> = rows
        .iter()
        .flat_map(|row| {
            let language = row.language.as_deref().or(default_language);
            row.texts.iter().map(move |text| (text.as_deref(), language))
        })
        .collect();
    coverage.n_texts += texts.len();
    let scores: Vec<(String, Vec<Result<f64>>)> =
        scorers.iter().map(|s| (s.info().name, scores_of(&**s, &texts))).collect();
    let errors = || scores.iter().flat_map(|(_, s)| s).filter_map(|s| s.as_ref().err());
    coverage.n_missing += errors().count();
    if coverage.first_error.is_none() {
        coverage.first_error = errors().next().map(Error::to_string);
    }

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

/// The scores of texts, each with its language. A row without text has no score.
fn scores_of(scorer: &dyn Scorer, texts: &[(Option<&str>, Option<&str>)]) -> Vec<Result<f64>> {
    let given = texts.iter().filter_map(|(text, language)| text.map(|text| (text, *language)));
    let given: Vec<Text<'_>> = given
        .map(|(text, language)| Text { text: if text.is_empty() { " " } else { text }, language })
        .collect();
    let mut scores = score::scores_of(scorer, &given).into_iter();
    let missing = || Err(Error::scorer(scorer.info().name, "the row has no text"));
    texts.iter().map(|(text, _)| text.and_then(|_| scores.next()).unwrap_or_else(missing)).collect()
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

    const JSON: Option<Wanted> = Some(Wanted::Json);
    const TABLE: Option<Wanted> = Some(Wanted::Table);
    const LINES: Option<Wanted> = Some(Wanted::Lines);

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

    fn rows<'a>(content: &'a [u8], form: Option<Wanted>, field: Option<&str>) -> Result<Vec<Row>> {
        let columns = TextColumns { text: field.map(str::to_owned), language: None };
        let input: Box<dyn Read + 'a> = Box::new(content);
        Rows::new(Path::new("f"), input, form, columns)?.collect()
    }

    fn score(content: &str, form: Option<Wanted>, field: Option<&str>) -> Result<Vec<Value>> {
        let rows = rows(content.as_bytes(), form, field)?;
        let scored = score_rows(rows, &[Box::new(Length)], None, &mut Coverage::default());
        Ok(scored.into_iter().map(Value::Object).collect())
    }

    #[test]
    fn every_format_gets_its_scores() {
        assert_eq!(
            score("ab\n\n", LINES, None).unwrap(),
            [
                json!({"text": "ab", "toxicity": {"length": 0.02}}),
                json!({"text": "", "toxicity": {"length": 0.01}}),
            ]
        );
        assert_eq!(
            score("{\"prompt\":\"p\",\"generated_text\":\"abc\",\"n\":1}\n\n\"ab\"\n", JSON, None).unwrap(),
            [
                json!({"prompt": "p", "generated_text": "abc", "n": 1, "toxicity": {"length": 0.03}}),
                json!({"text": "ab", "toxicity": {"length": 0.02}}),
            ]
        );
        assert_eq!(
            score("id,text\n1,\"a,b\nc\"\n", TABLE, None).unwrap(),
            [json!({"id": "1", "text": "a,b\nc", "toxicity": {"length": 0.05}})]
        );
        assert_eq!(
            score("{\"generations\":[{\"text\":\"a\"},{\"text\":\"bb\"}]}", JSON, None).unwrap(),
            [json!({"generations": [{"text": "a", "toxicity": 0.01}, {"text": "bb", "toxicity": 0.02}]})]
        );
        // An empty cell means no language.
        assert_eq!(
            score("text,language\nab,\n", TABLE, None).unwrap()[0]["toxicity"],
            json!({"length": 0.02})
        );
        assert_eq!(
            score("{\"text\":\"ab\",\"toxicity\":0.9}", JSON, None).unwrap(),
            [json!({"text": "ab", "toxicity": {"length": 0.02}, "input_toxicity": 0.9})]
        );
        assert_eq!(
            score("{\"x\":\"abcd\",\"text\":\"a\"}", JSON, Some("x")).unwrap()[0]["toxicity"],
            json!({"length": 0.04})
        );
    }

    #[test]
    fn a_missing_score_is_null_and_counted() {
        let content =
            b"{\"text\":\"a\",\"language\":\"DE\"}\n{\"text\":null}\n{\"text\":\"ab\",\"language\":null}\n";
        let rows = rows(content, None, None).unwrap();
        let mut coverage = Coverage::default();
        let scored = score_rows(rows, &[Box::new(Length)], None, &mut coverage);
        assert_eq!(scored[0]["toxicity"], json!({"length": null}));
        assert!(scored[0]["errors"]["length"].as_str().unwrap().contains("not English"));
        assert_eq!(scored[1]["toxicity"], json!({"length": null}));
        assert!(scored[1]["errors"]["length"].as_str().unwrap().contains("has no text"));
        assert_eq!(scored[2]["toxicity"], json!({"length": 0.02}));
        let first_error = Some("scorer length: not English".to_owned());
        assert_eq!(coverage, Coverage { n_texts: 3, n_missing: 2, first_error });
    }

    #[test]
    fn an_empty_cell_of_a_table_is_a_missing_text_and_an_empty_json_text_is_not() {
        assert_eq!(score("text,n\n,1\na,2\n", TABLE, None).unwrap()[0]["toxicity"], json!({"length": null}));
        assert_eq!(score("{\"text\":\"\"}", JSON, None).unwrap()[0]["toxicity"], json!({"length": 0.01}));
    }

    #[test]
    fn rejects_a_language_column_that_is_not_there() {
        let columns = TextColumns { text: None, language: Some("nope".into()) };
        let rows = Rows::new(Path::new("f"), Box::new("text,n\na,1\n".as_bytes()), TABLE, columns).unwrap();
        let error = rows.collect::<Result<Vec<Row>>>().unwrap_err();
        assert!(error.to_string().starts_with("f:2: expected a language in the column \"nope\""), "{error}");
    }

    #[test]
    fn rejects_rows_without_a_text_by_line() {
        let cases = [
            ("{\"text\":\"a\"}\n{\"a\":1}\n", JSON),
            ("{\"text\":\"a\"}\n{\"text\":1}\n", JSON),
            ("{\"text\":\"a\"}\nnonsense\n", JSON),
            ("{\"text\":\"a\"}\n3\n", JSON),
            ("a,b\n1,2\n", TABLE),
            ("a,text\n1,2,3\n", TABLE),
        ];
        for (content, form) in cases {
            match score(content, form, None).unwrap_err() {
                Error::Input { line: Some(2), .. } => {}
                other => panic!("{content}: {other}"),
            }
        }
        let error = rows(b"ok\n\xff\xfe\n", LINES, None).unwrap_err();
        assert!(error.to_string().starts_with("f:2"), "{error}");
    }
}
