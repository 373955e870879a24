//! Reads texts labelled toxic or benign.

use std::path::Path;

use serde::Deserialize;

use crate::engine::random::{random_stream, shuffle};
use crate::error::{Error, Result};
use crate::text::rows;

/// A text and its label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelledText {
    /// The text.
    pub text: String,
    /// Whether its label is toxic.
    pub is_toxic: bool,
}

/// Texts of both labels, in the file's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labelled {
    /// At least one of each label.
    pub texts: Vec<LabelledText>,
    /// Number of rows without text, which were skipped.
    pub n_empty: usize,
}

impl Labelled {
    /// Number of toxic texts.
    pub fn n_toxic(&self) -> usize {
        self.texts.iter().filter(|t| t.is_toxic).count()
    }

    /// Draws a seeded sample of `n` texts that keeps the share of each label.
    ///
    /// It has at least two texts of each label. If there are no more than `n` texts, all are kept.
    pub fn sample(self, n: usize, seed: u64) -> Labelled {
        let total = self.texts.len();
        if n >= total {
            return self;
        }
        let n_toxic = (self.n_toxic() as f64 * n as f64 / total as f64).round() as usize;
        let n_toxic = n_toxic.clamp(2.min(n), n.saturating_sub(2).max(1));
        let mut random = random_stream(seed, "labelled texts", 0);
        let mut order: Vec<usize> = (0..total).collect();
        shuffle(&mut order, &mut random);
        let mut left = [n - n_toxic, n_toxic];
        let mut kept: Vec<usize> = order
            .into_iter()
            .filter(|&i| {
                let left = &mut left[usize::from(self.texts[i].is_toxic)];
                let is_kept = *left > 0;
                *left -= usize::from(is_kept);
                is_kept
            })
            .collect();
        kept.sort_unstable();
        let texts = kept.into_iter().map(|i| self.texts[i].clone()).collect();
        Labelled { texts, n_empty: self.n_empty }
    }
}

/// The built-in labelled texts: English, written for this project, half of them toxic.
pub fn own() -> Labelled {
    parse_lines(Path::new("own.jsonl"), include_str!("own.jsonl")).expect("a test parses the built-in texts")
}

/// Reads labelled texts from a file.
///
/// The file has one of these forms:
///
/// - JSON lines with `text` and `label`; a label is 0 or 1, or false or true.
/// - CSV with the columns `text` and `label`.
/// - Jigsaw's unmodified `train.csv`, with the columns `comment_text` and `toxic`, as in the paper.
///
/// # Errors
/// [`Error::Input`], with the line, for an invalid row or label, and if all texts have the same label.
pub fn read(path: &Path) -> Result<Labelled> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let text = rows::decode(path, &bytes)?;
    if text.trim_start().starts_with('{') { parse_lines(path, text) } else { parse_csv(path, text) }
}

#[derive(Deserialize)]
struct Row {
    text: String,
    label: Label,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a label is 0 or 1, or false or true")]
enum Label {
    Bool(bool),
    Number(f64),
}

fn parse_lines(path: &Path, text: &str) -> Result<Labelled> {
    let rows = rows::numbered(text).map(|(number, line)| {
        let refuse = |reason: String| Error::input(path, Some(number), reason);
        let row: Row = serde_json::from_str(line)
            .map_err(|e| refuse(format!("expected an object with \"text\" and \"label\": {e}")))?;
        let is_toxic = match row.label {
            Label::Bool(label) => label,
            Label::Number(0.0) => false,
            Label::Number(1.0) => true,
            Label::Number(found) => return Err(refuse(format!("expected label 0 or 1, found {found}"))),
        };
        Ok(LabelledText { text: row.text, is_toxic })
    });
    whole(path, rows)
}

fn parse_csv(path: &Path, text: &str) -> Result<Labelled> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let headers = reader.headers().map_err(|e| Error::input(path, Some(1), e.to_string()))?.clone();
    let column = |name: &str| headers.iter().position(|header| header.trim() == name);
    let columns = column("text").zip(column("label"));
    let Some((text_column, label_column)) = columns.or(column("comment_text").zip(column("toxic"))) else {
        let found: Vec<&str> = headers.iter().take(8).collect();
        return Err(Error::input(
            path,
            Some(1),
            format!("expected columns text and label, or Jigsaw's comment_text and toxic, found {found:?}"),
        )
        .with_hint("JSON lines with \"text\" and \"label\" work too"));
    };
    let rows = reader.records().map(|record| {
        let record = record.map_err(|e| {
            let line = e.position().map(|p| p.line() as usize);
            Error::input(path, line, format!("expected a row of {} fields: {e}", headers.len()))
        })?;
        let is_toxic = match record.get(label_column).unwrap_or_default().trim() {
            "0" | "false" => false,
            "1" | "true" => true,
            found => {
                let why = if found == "-1" { " (-1 marks rows that Jigsaw did not score)" } else { "" };
                let line = record.position().map(|p| p.line() as usize);
                return Err(Error::input(path, line, format!("expected label 0 or 1, found {found:?}{why}")));
            }
        };
        Ok(LabelledText { text: record.get(text_column).unwrap_or_default().to_owned(), is_toxic })
    });
    whole(path, rows)
}

fn whole(path: &Path, rows: impl Iterator<Item = Result<LabelledText>>) -> Result<Labelled> {
    let mut labelled = Labelled { texts: Vec::new(), n_empty: 0 };
    for row in rows {
        let row = row?;
        if row.text.trim().is_empty() {
            labelled.n_empty += 1;
        } else {
            labelled.texts.push(row);
        }
    }
    let (n, n_toxic) = (labelled.texts.len(), labelled.n_toxic());
    if n_toxic == 0 || n_toxic == n {
        let reason =
            format!("expected texts of both labels, found {n_toxic} toxic and {} benign", n - n_toxic);
        return Err(Error::input(path, None, reason));
    }
    Ok(labelled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Labelled> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("labelled");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    fn labels(text: &str) -> Vec<(String, bool)> {
        parse(text).unwrap().texts.into_iter().map(|t| (t.text, t.is_toxic)).collect()
    }

    #[test]
    fn all_file_forms_give_the_same_rows() {
        let expected = [("a, b".to_owned(), true), ("line\nbreak".to_owned(), false)];
        assert_eq!(
            labels("{\"text\": \"a, b\", \"label\": 1}\n\n{\"label\": false, \"text\": \"line\\nbreak\"}"),
            expected
        );
        assert_eq!(labels("text,label\n\"a, b\",1\n\"line\nbreak\",0\n"), expected);
        assert_eq!(
            labels(
                "\u{feff}\"id\",\"comment_text\",\"toxic\",\"insult\"\n7,\"a, b\",1,0\n8,\"line\nbreak\",0,1\n"
            ),
            expected
        );
    }

    #[test]
    fn rows_without_text_are_counted_and_skipped() {
        let labelled = parse("text,label\na,1\n ,0\nb,0\n").unwrap();
        assert_eq!((labelled.texts.len(), labelled.n_empty), (2, 1));
    }

    #[test]
    fn rejects_other_labels_other_columns_and_a_single_label() {
        for (text, reason) in [
            ("text,label\na,2\n", "found \"2\""),
            ("id,comment_text,toxic\n1,a,-1\n", "not score"),
            ("{\"text\": \"a\", \"label\": 0.5}", "found 0.5"),
            ("{\"text\": \"a\"}", "label"),
            ("{\"text\": \"a\", \"label\": \"toxic\"}", "a label is 0 or 1"),
            ("a,b\n1,2\n", "expected columns"),
            ("text,label\na,1\n", "1 toxic and 0 benign"),
            ("", "expected columns"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_sample_keeps_the_share_of_each_label_and_depends_only_on_the_seed() {
        let texts = (0..100).map(|i| LabelledText { text: i.to_string(), is_toxic: i % 5 == 0 }).collect();
        let all = Labelled { texts, n_empty: 0 };
        let sampled = all.clone().sample(20, 1);
        assert_eq!((sampled.texts.len(), sampled.n_toxic()), (20, 4));
        assert_eq!(sampled, all.clone().sample(20, 1));
        assert_ne!(sampled, all.clone().sample(20, 2));
        assert_eq!(all.clone().sample(100, 1), all);
    }

    #[test]
    fn the_built_in_texts_are_distinct_and_half_of_them_toxic() {
        let own = own();
        assert!(own.texts.len() >= 200 && own.n_empty == 0);
        assert_eq!(own.n_toxic() * 2, own.texts.len());
        let different: std::collections::HashSet<&str> = own.texts.iter().map(|t| t.text.as_str()).collect();
        assert_eq!(different.len(), own.texts.len());
    }
}
