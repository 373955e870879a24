//! Bilingual sentence retrieval: how similarly a model represents translations (the paper, section 5).
//!
//! There are two measures:
//!
//! - *Top-1 accuracy* is the share of sentences whose nearest neighbour by cosine, among all sentences of the
//!   other language, is their own translation. The paper's text describes this one.
//! - *Mean cosine* is the mean cosine of aligned pairs. The paper's code computes this one, and prints it as
//!   "Retrieval acc".

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::{Array2, Axis};
use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, StudentsT};

use crate::error::{Error, Result};

/// Retrieval between two languages at one place of the model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Retrieval {
    /// Share of sentences of the first language whose nearest neighbour in the second is their translation.
    pub forward_accuracy: f64,
    /// The same from the second language to the first.
    pub backward_accuracy: f64,
    /// Mean cosine of aligned pairs.
    pub mean_cosine: f64,
}

/// Measures retrieval between aligned sentence vectors, each list of shape `[n][n_embd]`.
///
/// A tie with another sentence counts as a miss.
///
/// # Errors
/// [`Error::Setting`] if the numbers of sentences differ or are below two, or if a vector is zero or not
/// finite.
pub fn retrieve(first: &[Vec<f32>], second: &[Vec<f32>]) -> Result<Retrieval> {
    let refuse = |reason: String| Error::setting("sentence vectors", reason);
    let n = first.len();
    if n != second.len() || n < 2 {
        return Err(refuse(format!(
            "expected at least two aligned pairs, found {n} and {} sentences",
            second.len()
        )));
    }
    let (first, second) = (unit_rows(first)?, unit_rows(second)?);
    // [n][n]: cosines of all pairs of sentences.
    let cosines = first.dot(&second.t());
    let n_first = |axis: Axis| {
        let lines = cosines.axis_iter(axis).enumerate();
        lines.filter(|(i, line)| line.iter().enumerate().all(|(j, &c)| j == *i || c < line[*i])).count()
    };
    Ok(Retrieval {
        forward_accuracy: n_first(Axis(0)) as f64 / n as f64,
        backward_accuracy: n_first(Axis(1)) as f64 / n as f64,
        mean_cosine: cosines.diag().iter().map(|&c| f64::from(c)).sum::<f64>() / n as f64,
    })
}

/// Scales each row to length 1.
fn unit_rows(rows: &[Vec<f32>]) -> Result<Array2<f32>> {
    let n_embd = rows.first().map_or(0, Vec::len);
    let mut unit = Array2::zeros((rows.len(), n_embd));
    for (i, (row, mut unit)) in rows.iter().zip(unit.axis_iter_mut(Axis(0))).enumerate() {
        let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        if row.len() != n_embd || !(norm > 0.0 && norm.is_finite()) {
            return Err(Error::setting(
                "sentence vectors",
                format!(
                    "expected finite vectors of one length that are not zero, found another at entry {}",
                    i + 1
                ),
            ));
        }
        unit.iter_mut().zip(row).for_each(|(u, &x)| *u = (f64::from(x) / norm) as f32);
    }
    Ok(unit)
}

/// Pearson's correlation coefficient with its p-value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Correlation {
    /// The coefficient, in [-1, 1].
    pub r: f64,
    /// Two-sided p-value of no correlation, by Student's t test.
    pub p: f64,
    /// Number of pairs.
    pub n: usize,
}

/// Correlates two lists; `None` for fewer than three pairs or a list without variance.
pub fn pearson(x: &[f64], y: &[f64]) -> Option<Correlation> {
    let n = x.len();
    if n < 3 || n != y.len() {
        return None;
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / n as f64;
    let (mean_x, mean_y) = (mean(x), mean(y));
    let sum =
        |f: &dyn Fn(f64, f64) -> f64| x.iter().zip(y).map(|(x, y)| f(x - mean_x, y - mean_y)).sum::<f64>();
    let (xy, xx, yy) = (sum(&|x, y| x * y), sum(&|x, _| x * x), sum(&|_, y| y * y));
    if !(xx > 0.0 && yy > 0.0) {
        return None;
    }
    let r = (xy / (xx * yy).sqrt()).clamp(-1.0, 1.0);
    let freedom = n as f64 - 2.0;
    let t = r * (freedom / (1.0 - r * r)).sqrt();
    let p = match t.is_finite() {
        true => 2.0 * StudentsT::new(0.0, 1.0, freedom).ok()?.sf(t.abs()),
        false => 0.0,
    };
    Some(Correlation { r, p, n })
}

/// Sentences of several languages; those at the same index are translations of each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Aligned {
    /// Sentences by language; all lists have the same length.
    pub sentences: BTreeMap<String, Vec<String>>,
    /// Number of sentences with HTML entities (such as `&quot;`), by language.
    ///
    /// Machine-translated files often contain entities, which do not belong to the text.
    pub n_with_entities: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Row {
    #[serde(alias = "Prompt", alias = "prompt", alias = "sentence")]
    text: String,
    #[serde(alias = "Index", alias = "id")]
    index: Option<serde_json::Value>,
}

/// Reads the `{language}.jsonl` files of a folder.
///
/// A row has its sentence in `text`, `sentence`, `prompt` or `Prompt`. Rows are aligned by `Index` (or
/// `index`, `id`) if every row has one, else by line.
///
/// # Errors
/// [`Error::Io`]; [`Error::Input`], with file and line, for an invalid row, an index that occurs twice or is
/// missing in another file, and for fewer than two languages.
pub fn read_aligned(folder: &Path, languages: &[&str]) -> Result<Aligned> {
    let mut files: BTreeMap<String, Vec<Row>> = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let Some(language) = path.file_stem().and_then(|stem| stem.to_str()) else { continue };
        let is_wanted = languages.is_empty() || languages.contains(&language);
        if !is_wanted || path.extension().is_none_or(|e| e != "jsonl" && e != "json") {
            continue;
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let rows = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(|(i, line)| {
            let row: Row = serde_json::from_str(line).map_err(|e| {
                Error::input(
                    &path,
                    Some(i + 1),
                    format!("expected an object with \"text\" or \"Prompt\": {e}"),
                )
            })?;
            match row.text.trim().is_empty() {
                true => Err(Error::input(&path, Some(i + 1), "expected a sentence, found an empty text")),
                false => Ok(row),
            }
        });
        let rows: Vec<Row> = rows.collect::<Result<_>>()?;
        if files.insert(language.to_owned(), rows).is_some() {
            let reason = format!("expected one file of {language}, found both .json and .jsonl");
            return Err(Error::input(folder, None, reason));
        }
    }
    if files.len() < 2 {
        let found: Vec<&String> = files.keys().collect();
        let reason = format!("expected files {{language}}.jsonl for two or more languages, found {found:?}");
        return Err(Error::input(folder, None, reason));
    }
    align(folder, files)
}

fn align(folder: &Path, files: BTreeMap<String, Vec<Row>>) -> Result<Aligned> {
    let name_of = |language: &str| folder.join(format!("{language}.jsonl"));
    let has_index = files.values().flatten().all(|row| row.index.is_some());
    let mut sentences: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut n_with_entities = BTreeMap::new();
    let mut order: Option<(String, Vec<String>)> = None;
    for (language, rows) in files {
        let entities = rows.iter().filter(|row| has_entity(&row.text)).count();
        n_with_entities.insert(language.clone(), entities);
        let refuse =
            |line: Option<usize>, reason: String| Err(Error::input(name_of(&language), line, reason));
        let mut by_key: BTreeMap<String, String> = BTreeMap::new();
        let mut keys = Vec::with_capacity(rows.len());
        for (i, row) in rows.into_iter().enumerate() {
            let key = match row.index {
                Some(index) if has_index => index.to_string(),
                _ => (i + 1).to_string(),
            };
            if by_key.insert(key.clone(), row.text).is_some() {
                return refuse(Some(i + 1), format!("index {key} occurs twice"));
            }
            keys.push(key);
        }
        let (first, order) = order.get_or_insert_with(|| (language.clone(), keys.clone()));
        if by_key.len() != order.len() {
            let reason = format!("expected {} sentences as in {first}, found {}", order.len(), by_key.len());
            return refuse(None, reason);
        }
        let mut of_language = Vec::with_capacity(order.len());
        for key in order.iter() {
            match by_key.remove(key) {
                Some(text) => of_language.push(text),
                None => return refuse(None, format!("index {key} of {first} is missing")),
            }
        }
        sentences.insert(language, of_language);
    }
    Ok(Aligned { sentences, n_with_entities })
}

fn has_entity(text: &str) -> bool {
    ["&quot;", "&#39;", "&amp;", "&lt;", "&gt;"].iter().any(|entity| text.contains(entity))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_counts_nearest_neighbours_and_cosine_averages_pairs() {
        // Angles in degrees: first 0, 90; second 10, 80. Every pair is nearest, with cosine cos 10.
        let at = |degrees: f32| vec![2.0 * degrees.to_radians().cos(), 2.0 * degrees.to_radians().sin()];
        let found = retrieve(&[at(0.0), at(90.0)], &[at(10.0), at(80.0)]).unwrap();
        assert_eq!((found.forward_accuracy, found.backward_accuracy), (1.0, 1.0));
        assert!((found.mean_cosine - 10f64.to_radians().cos()).abs() < 1e-6);
        // Second 50, 100. From first: 0 is nearest to 50 (its own), 90 to 100 (its own): 1.
        // From second: 50 is nearer to 90 (40 degrees) than to 0: a miss; 100 is nearest to 90: 1/2.
        let found = retrieve(&[at(0.0), at(90.0)], &[at(50.0), at(100.0)]).unwrap();
        assert_eq!((found.forward_accuracy, found.backward_accuracy), (1.0, 0.5));
    }

    #[test]
    fn a_tie_is_a_miss() {
        let same = [vec![1.0, 0.0], vec![1.0, 0.0]];
        let found = retrieve(&same, &same).unwrap();
        assert_eq!((found.forward_accuracy, found.backward_accuracy, found.mean_cosine), (0.0, 0.0, 1.0));
    }

    #[test]
    fn the_papers_correlations_have_its_p_values() {
        // If z is orthogonal to x, then x and r x + sqrt(1 - r^2) z have the correlation r.
        for (r, p) in [(0.732, 0.0013), (0.59, 0.016), (0.66, 0.0054), (0.78, 0.0004)] {
            let x: Vec<f64> = (0..16).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
            let z: Vec<f64> = (0..16).map(|i| if i / 2 % 2 == 0 { 1.0 } else { -1.0 }).collect();
            let y: Vec<f64> = x.iter().zip(&z).map(|(x, z)| r * x + (1.0f64 - r * r).sqrt() * z).collect();
            let found = pearson(&x, &y).unwrap();
            assert!((found.r - r).abs() < 1e-12 && found.n == 16);
            assert!((found.p - p).abs() < 0.06 * p + 5e-5, "{} {p}", found.p);
        }
        assert_eq!(pearson(&[1.0, 2.0, 3.0], &[2.0, 4.0, 6.0]).unwrap().r, 1.0);
        assert_eq!(pearson(&[1.0, 1.0, 1.0], &[1.0, 2.0, 3.0]), None);
        assert_eq!(pearson(&[1.0, 2.0], &[1.0, 2.0]), None);
    }

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn rows_are_aligned_by_index_if_there_is_one_else_by_line() {
        let by_index = folder(&[
            ("en.jsonl", "{\"Prompt\": \"one\", \"Index\": 1}\n{\"Prompt\": \"two\", \"Index\": 2}\n"),
            ("fr.jsonl", "{\"Prompt\": \"deux\", \"Index\": 2}\n{\"Prompt\": \"l&#39;un\", \"Index\": 1}\n"),
            ("notes.txt", "not read"),
        ]);
        let aligned = read_aligned(by_index.path(), &[]).unwrap();
        assert_eq!(aligned.sentences["en"], ["one", "two"]);
        assert_eq!(aligned.sentences["fr"], ["l&#39;un", "deux"]);
        assert_eq!(aligned.n_with_entities["fr"], 1);
        let by_line = folder(&[("en.jsonl", "{\"text\": \"a\"}\n"), ("de.jsonl", "{\"prompt\": \"b\"}\n")]);
        assert_eq!(read_aligned(by_line.path(), &[]).unwrap().sentences["de"], ["b"]);
    }

    #[test]
    fn rejects_files_that_are_not_aligned() {
        for (files, reason) in [
            (vec![("en.jsonl", "{\"text\": \"a\"}")], "two or more languages"),
            (vec![("en.jsonl", "{\"text\": \"a\"}"), ("de.jsonl", "")], "expected 0 sentences as in de"),
            (
                vec![
                    ("de.jsonl", "{\"text\": \"a\", \"id\": 1}"),
                    ("en.jsonl", "{\"text\": \"a\", \"id\": 2}"),
                ],
                "index 1 of de is missing",
            ),
            (
                vec![
                    ("de.jsonl", "{\"text\": \"a\", \"id\": 1}\n{\"text\": \"a\", \"id\": 1}"),
                    ("en.jsonl", "{\"text\": \"a\", \"id\": 2}"),
                ],
                "occurs twice",
            ),
            (vec![("en.jsonl", "{\"text\": \" \"}"), ("de.jsonl", "x")], "expected"),
            (
                vec![("en.jsonl", "{\"text\": \"a\"}"), ("en.json", "{\"text\": \"a\"}")],
                "both .json and .jsonl",
            ),
        ] {
            let folder = folder(&files);
            let error = read_aligned(folder.path(), &[]).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
