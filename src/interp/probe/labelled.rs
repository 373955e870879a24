//! Reads texts labelled toxic or benign.

use std::path::Path;

use serde_json::{Map, Value};

use crate::engine::random::{random_stream, shuffle};
use crate::error::{Error, Result};
use crate::text::chat_markers;
use crate::text::rows::{self, Ignored, LABEL, LABELLED_TEXT, Rows};

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

/// Columns of labelled texts that the user names. `None` means the usual names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelledColumns {
    /// The text.
    pub text: Option<String>,
    /// The label.
    pub label: Option<String>,
}

/// The built-in labelled texts: English, written for this project, half of them toxic.
pub fn own() -> Labelled {
    let path = Path::new("own.jsonl");
    let bytes: &[u8] = include_bytes!("own.jsonl");
    let rows = Rows::new(path, "labelled texts", Box::new(bytes), None, &[]);
    rows.and_then(|rows| read_rows(path, rows, &LabelledColumns::default()))
        .expect("a test parses the built-in texts")
}

/// Reads labelled texts from a file of any form of [`rows`](crate::text::rows).
///
/// The usual columns are `text` and `label`, or `comment_text` and `toxic` as in Jigsaw's unmodified `train.csv`, which
/// the paper uses. [`rows::label`] describes labels.
///
/// # Errors
/// [`Error::Input`], with the line, for an invalid row or label, and if all texts have the same label.
pub fn read(path: &Path, columns: &LabelledColumns) -> Result<Labelled> {
    let named = [&columns.text, &columns.label].map(Option::as_deref);
    read_rows(path, Rows::open(path, "labelled texts", &named)?, columns)
}

fn read_rows(path: &Path, rows: Rows<'_>, columns: &LabelledColumns) -> Result<Labelled> {
    let rows = rows.limited();
    if rows.is_plain() {
        let mut rows = rows;
        let found = if rows.next().is_some() { "plain lines" } else { "an empty file" };
        let reason =
            format!("expected columns text and label, or Jigsaw's comment_text and toxic, found {found}");
        return Err(Error::input(path, None, reason)
            .with_hint("write CSV with a header, or JSON lines with \"text\" and \"label\""));
    }
    let (mut ignored, mut marked) = (Ignored::default(), chat_markers::Count::default());
    let found = whole(
        path,
        rows.map(|row| {
            let text = labelled(path, &row?, columns, &mut ignored)?;
            marked.add(&[&text.text]);
            Ok(text)
        }),
    )?;
    ignored.log(path);
    marked.warn(path, "texts");
    Ok(found)
}

fn labelled(
    path: &Path,
    row: &rows::Row,
    columns: &LabelledColumns,
    ignored: &mut Ignored,
) -> Result<LabelledText> {
    let refuse = |reason: String| Error::input(path, Some(row.line), reason);
    let fields: &Map<String, Value> = &row.fields;
    let (text_column, label_column) = (columns.text.as_deref(), columns.label.as_deref());
    let absent = |(reason, hint): (String, String)| refuse(reason).with_hint(hint);
    let (name, text) = LABELLED_TEXT
        .find(fields, text_column)
        .ok_or_else(|| absent(LABELLED_TEXT.absent(fields, text_column)))?;
    // A row without text is skipped, whatever its label.
    let text = match text {
        Value::Null => "",
        value => rows::text(name, value).map_err(|(reason, hint)| refuse(reason).with_optional_hint(hint))?,
    };
    if text.trim().is_empty() {
        return Ok(LabelledText { text: String::new(), is_toxic: false });
    }
    let (label_name, label) =
        LABEL.find(fields, label_column).ok_or_else(|| absent(LABEL.absent(fields, label_column)))?;
    let is_toxic = rows::label(label).map_err(|reason| {
        refuse(reason)
            .with_hint("labels are 0 or 1; turn scores into labels first, for example 1 from 0.5 up")
    })?;
    ignored.add(fields, &[name, label_name]);
    Ok(LabelledText { text: text.to_owned(), is_toxic })
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
        read(&path, &LabelledColumns::default())
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
    fn labels_and_columns_of_other_tools_give_the_same_rows() {
        let expected = [("a, b".to_owned(), true), ("c".to_owned(), false)];
        for text in [
            "text,label\n\"a, b\",True\nc,False\n",
            "id;sentence;toxicity\n1;a, b;1,0\n2;c;0,0\n",
            "[{\"text\": \"a, b\", \"label\": \"toxic\"}, {\"text\": \"c\", \"label\": 0.0}]",
        ] {
            assert_eq!(labels(text), expected, "{text}");
        }
    }

    #[test]
    fn rows_without_text_are_counted_and_skipped() {
        let labelled = parse("text,label\na,1\n ,0\n,\nb,0\n").unwrap();
        assert_eq!((labelled.texts.len(), labelled.n_empty), (2, 2));
    }

    #[test]
    fn rejects_other_labels_other_columns_and_a_single_label() {
        for (text, reason) in [
            ("text,label\na,2\n", "found \"2\""),
            ("id,comment_text,toxic\n1,a,-1\n", "not score"),
            ("{\"text\": \"a\", \"label\": 0.5}", "found 0.5"),
            ("{\"text\": \"a\"}", "label"),
            ("{\"text\": \"a\", \"label\": \"maybe\"}", "found \"maybe\""),
            ("text,label\na,1\nb,<NA>\n", "labelled:3: expected a label, found none"),
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
