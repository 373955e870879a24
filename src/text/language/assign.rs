//! Finds the language of rows that state none.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;

use crate::error::{Error, Result};

use super::{LanguageIdentifier, known_codes};

/// Rows of a file that are identified to find the file's language.
const SAMPLE: usize = 2000;

/// A file has one language if at least this share of its identified rows is in it. Identification of short texts is
/// wrong in a few per cent.
const ONE_LANGUAGE: f64 = 0.9;

/// The language of each row, given those that have one.
///
/// If nearly all identified rows are in one language, all rows get it. Else each row gets its own. The result is
/// logged. `rows`: line, text and language of each row. `hint`: how to set the language.
///
/// # Errors
/// [`Error::Input`] with the line if the language cannot be told from the texts.
pub fn assign(
    path: &Path,
    rows: &[(usize, &str, Option<&'static str>)],
    hint: &str,
) -> Result<Vec<&'static str>> {
    let missing: Vec<(usize, &str)> = rows
        .iter()
        .filter(|(.., language)| language.is_none())
        .map(|&(line, text, _)| (line, text))
        .collect();
    let mut found = identify(path, &missing, hint)?.into_iter();
    let language = |&(.., language): &(usize, &str, Option<&'static str>)| language.or_else(|| found.next());
    Ok(rows.iter().filter_map(language).collect())
}

/// Languages as "12 in German (de)".
fn counted(counts: &BTreeMap<&'static str, usize>) -> String {
    let mut counts: Vec<_> = counts.iter().collect();
    counts.sort_by_key(|(code, n)| (std::cmp::Reverse(**n), **code));
    counts.iter().map(|(code, n)| format!("{n} in {}", named(code))).collect::<Vec<_>>().join(", ")
}

fn named(code: &str) -> String {
    super::find(code).map_or_else(|| code.to_owned(), |language| format!("{} ({code})", language.name))
}

/// The part of a text that is identified.
fn start(text: &str) -> &str {
    let end = text.char_indices().nth(500).map_or(text.len(), |(end, _)| end);
    &text[..end]
}

fn identify(path: &Path, rows: &[(usize, &str)], hint: &str) -> Result<Vec<&'static str>> {
    let Some(&(first_line, _)) = rows.first() else { return Ok(Vec::new()) };
    let identifier = LanguageIdentifier::new();
    let of = |rows: &[(usize, &str)]| -> Vec<Option<&'static str>> {
        rows.par_iter().map(|(_, text)| identifier.identify(start(text))).collect()
    };
    let refuse = |line: usize, reason: String| {
        let known = known_codes().join(", ");
        Error::input(path, Some(line), reason).with_hint(format!("{hint}; known languages: {known}"))
    };
    let sample = &rows[..rows.len().min(SAMPLE)];
    let decided = of(sample);
    let mut counts: BTreeMap<&'static str, usize> = BTreeMap::new();
    decided.iter().flatten().for_each(|code| *counts.entry(code).or_default() += 1);
    let n_decided: usize = counts.values().sum();
    let leading = counts.iter().max_by_key(|(_, n)| **n).map(|(code, n)| (*code, *n));
    let whole: Vec<&str> = sample.iter().take(100).map(|(_, text)| start(text)).collect();
    let of_whole = identifier.identify(&whole.join("\n"));
    let one = match leading {
        // Every row is too short; together they may be long enough.
        None => of_whole,
        Some((code, n)) if n as f64 >= ONE_LANGUAGE * n_decided as f64 => Some(code),
        // A few rows: one error of identification is more than a tenth of them.
        Some((code, n)) if n_decided < 10 && n + 1 == n_decided && n > 1 && of_whole == Some(code) => {
            Some(code)
        }
        Some(_) => None,
    };
    if let Some(code) = one {
        tracing::warn!(
            "{}: no language is given for {} rows; they look like {} and are read as such (set it with --lang)",
            path.display(),
            rows.len(),
            named(code)
        );
        return Ok(vec![code; rows.len()]);
    }
    if leading.is_none() {
        let reason = "expected the language in the row, in the file's name or with --lang, found none, and the text is \
                      too short or in none of the 17 languages";
        return Err(refuse(first_line, reason.into()));
    }
    let decided = if sample.len() < rows.len() { of(rows) } else { decided };
    let mut counts: BTreeMap<&'static str, usize> = BTreeMap::new();
    decided.iter().flatten().for_each(|code| *counts.entry(code).or_default() += 1);
    if let Some(i) = decided.iter().position(Option::is_none) {
        let reason = format!(
            "expected a language for each row of a file in several languages ({}), found none here, and the text is too \
             short to tell",
            counted(&counts)
        );
        return Err(refuse(rows[i].0, reason));
    }
    tracing::warn!(
        "{}: no language is given for {} rows; by their texts they are {}",
        path.display(),
        rows.len(),
        counted(&counts)
    );
    Ok(decided.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GERMAN: [&str; 3] = [
        "Das Wetter war gestern so schön, dass wir",
        "Meine Nachbarin hat mir erzählt, dass der Hund",
        "Als der Zug endlich kam, waren alle",
    ];
    const FRENCH: [&str; 2] =
        ["Le voisin a raconté que son chien était", "Hier soir, nous avons mangé une soupe"];

    fn languages(texts: &[&str]) -> Result<Vec<&'static str>> {
        let rows: Vec<_> = texts.iter().enumerate().map(|(i, text)| (i + 1, *text, None)).collect();
        assign(Path::new("f"), &rows, "give --lang")
    }

    #[test]
    fn a_file_of_one_language_gets_it_even_for_short_rows() {
        assert_eq!(languages(&[GERMAN[0], GERMAN[1], "Du da", GERMAN[2]]).unwrap(), ["de"; 4]);
        let short = ["Der Hund", "Die Nachbarin", "Das Wetter heute"];
        assert_eq!(languages(&short).unwrap(), ["de"; 3]);
    }

    #[test]
    fn rows_of_several_languages_get_their_own_and_stated_ones_stay() {
        let texts = [GERMAN[0], FRENCH[0], GERMAN[1], FRENCH[1]];
        assert_eq!(languages(&texts).unwrap(), ["de", "fr", "de", "fr"]);
        let rows = [(1, "a", Some("sv")), (2, GERMAN[0], None)];
        assert_eq!(assign(Path::new("f"), &rows, "").unwrap(), ["sv", "de"]);
    }

    #[test]
    fn rejects_texts_whose_language_cannot_be_told_by_line() {
        let error = languages(&["ok", "x"]).unwrap_err();
        assert!(
            error.to_string().starts_with("f:1: expected the language") && error.hint().is_some(),
            "{error}"
        );
        let error = languages(&[GERMAN[0], FRENCH[0], "ok"]).unwrap_err();
        assert!(error.to_string().starts_with("f:3: "), "{error}");
    }
}
