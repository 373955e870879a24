//! Preference pairs as texts: a prompt, the chosen continuation and the rejected one.
//!
//! # Forms of a row
//! Files have any form of [`rows`](crate::text::rows). The keys of a row decide its form:
//!
//! | form | key that decides | prompt | chosen | rejected |
//! |---|---|---|---|---|
//! | TRL, explicit prompt; ours | `prompt` | `prompt` | `chosen` | `rejected` |
//! | the paper's (arXiv 2401.01967) | `prompt_text` | `prompt_text` | `unpert_gen_text` | `pert_gen_text` |
//! | other names | `question`, `instruction`, `query`, `input` | that column | `chosen`, `preferred`, … | `rejected`, `dispreferred`, … |
//! | TRL, implicit prompt | `chosen`, if none of these is present | the common prefix | the rest | the rest |
//!
//! [`PairColumns`] names other columns. A row with another part of the prompt in a column of its own, such as `system`, is
//! refused, because the pair would lose it.
//!
//! With a prompt in its own column, a continuation follows its prompt directly, without a space in between, as in the loaders
//! of both papers.
//!
//! # The implicit prompt
//! The prompt is the longest common prefix in characters, as in TRL's `extract_prompt`. A space at its end moves to
//! both answers, because most tokenizers join a space with the next word. The prefix may end inside a word: "a good"
//! and "a great" share "a g". [`tokens`](super::tokens) later moves the boundary back to where the tokens agree.
//!
//! If one text is a prefix of the other, the shorter text is the prompt. Its answer is then empty, so the pair is
//! counted and skipped. TRL leaves the last shared character in both answers in this case, by an accident of its
//! loop.
//!
//! Conversations (lists of messages) are refused: chat templates are not supported yet.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::text::chat_markers;
use crate::text::rows::{self, CHOSEN, Column, Ignored, PAIR_PROMPT, REJECTED, Rows};

/// A prompt with a chosen and a rejected continuation.
///
/// The continuations do not repeat the prompt, and start with the space that separates them from it, if any.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PreferencePair {
    /// The text that both continue.
    pub prompt: String,
    /// The continuation to prefer.
    pub chosen: String,
    /// The continuation to avoid.
    pub rejected: String,
}

/// SHA-256 of the pairs' texts, in hexadecimal.
pub fn sha256(pairs: &[PreferencePair]) -> String {
    let mut hash = Sha256::new();
    for text in pairs.iter().flat_map(|pair| [&pair.prompt, &pair.chosen, &pair.rejected]) {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    }
    crate::file::hex(&hash.finalize())
}

/// Columns of pairs that the user names. `None` means the usual names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PairColumns {
    /// The prompt.
    pub prompt: Option<String>,
    /// The preferred answer.
    pub chosen: Option<String>,
    /// The answer to avoid.
    pub rejected: Option<String>,
}

/// The built-in pairs: English, written for this project, with mildly insulting rejected answers.
pub fn own() -> Vec<PreferencePair> {
    let path = Path::new("own_pairs.jsonl");
    let bytes: &[u8] = include_bytes!("own_pairs.jsonl");
    let rows = Rows::new(path, "preference pairs", Box::new(bytes), None, &[]);
    rows.and_then(|rows| read_rows(path, rows, &PairColumns::default()))
        .expect("the file is built in, and a test parses it")
}

/// Reads the pairs of a file, or of every `.jsonl` file of a folder in the order of their names.
///
/// # Errors
/// [`Error::Io`]; [`Error::Input`], with file and line, for a row in none of the
/// [supported forms](self#forms-of-a-row), a file without rows or a folder without files.
pub fn read(path: &Path, columns: &PairColumns) -> Result<Vec<PreferencePair>> {
    let metadata = std::fs::metadata(path).map_err(Error::io("read", path))?;
    if !metadata.is_dir() {
        return read_file(path, columns);
    }
    let mut pairs = Vec::new();
    for file in files(path)? {
        pairs.extend(read_file(&file, columns)?);
    }
    Ok(pairs)
}

/// The `.jsonl` files of a folder, sorted; hidden files are skipped.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, mut skipped) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if is_hidden || path.is_dir() {
            continue;
        }
        let list = if rows::extension(&path) == "jsonl" { &mut files } else { &mut skipped };
        list.push(path);
    }
    files.sort();
    skipped.sort();
    let names = rows::skipped_names(&skipped);
    if files.is_empty() {
        let found = names.map_or_else(|| "none".to_owned(), |names| format!("only {names}"));
        return Err(Error::input(
            folder,
            None,
            format!("expected files of preference pairs (.jsonl), found {found}"),
        )
        .with_hint("give the file itself if its name ends differently"));
    }
    if let Some(names) = names {
        tracing::warn!("{}: only files .jsonl are read of a folder, and not {names}", folder.display());
    }
    Ok(files)
}

fn read_file(path: &Path, columns: &PairColumns) -> Result<Vec<PreferencePair>> {
    let named = [&columns.prompt, &columns.chosen, &columns.rejected].map(Option::as_deref);
    let rows = Rows::open(path, "preference pairs", &named)?;
    read_rows(path, rows, columns)
}

fn read_rows(path: &Path, rows: Rows<'_>, columns: &PairColumns) -> Result<Vec<PreferencePair>> {
    let mut rows = rows.limited();
    if rows.is_plain() {
        let line = rows.find(|row| !matches!(row, Ok(row) if is_blank(row)));
        if let Some(row) = line {
            let reason = "expected rows with columns, found plain text";
            return Err(Error::input(path, Some(row?.line), reason).with_hint(FORMS));
        }
    }
    let (mut pairs, mut ignored, mut marked) =
        (Vec::new(), Ignored::default(), chat_markers::Count::default());
    let mut n_joined = 0;
    for row in rows {
        let row = row?;
        let (pair, is_whole) = pair(&row.fields, columns, &mut ignored)
            .map_err(|(reason, hint)| Error::input(path, Some(row.line), reason).with_optional_hint(hint))?;
        marked.add(&[&pair.prompt, &pair.chosen, &pair.rejected]);
        n_joined += usize::from(is_whole && is_joined(&pair));
        pairs.push(pair);
    }
    if pairs.is_empty() {
        return Err(
            Error::input(path, None, "expected preference pairs, found an empty file").with_hint(FORMS)
        );
    }
    ignored.log(path);
    marked.warn(path, "pairs");
    if 2 * n_joined > pairs.len() {
        tracing::warn!(
            "{}: in {n_joined} of {} pairs the answers follow the prompt without a space, as in {:?}. If that is not \
             meant, begin each answer with a space or a line break",
            path.display(),
            pairs.len(),
            pairs.iter().find(|pair| is_joined(pair)).map(boundary).unwrap_or_default()
        );
    }
    Ok(pairs)
}

fn is_blank(row: &rows::Row) -> bool {
    row.fields.values().all(|text| text.as_str().is_some_and(|text| text.trim().is_empty()))
}

/// Whether prompt and answer, in a script with spaces, meet without white space.
fn is_joined(pair: &PreferencePair) -> bool {
    let is_end = |c: char| (c.is_alphanumeric() && c < '\u{900}') || ".?!:;,\"".contains(c);
    let is_start = |c: char| c.is_alphanumeric() && c < '\u{900}';
    let starts = |answer: &str| answer.chars().next().is_some_and(is_start);
    pair.prompt.chars().last().is_some_and(is_end) && starts(&pair.chosen) && starts(&pair.rejected)
}

/// The text around the end of the prompt.
fn boundary(pair: &PreferencePair) -> String {
    let n_prompt = pair.prompt.chars().count();
    let end: String = pair.prompt.chars().skip(n_prompt.saturating_sub(12)).collect();
    end + &pair.chosen.chars().take(12).collect::<String>()
}

/// Why a row is refused, and the hint.
type Fault = (String, Option<String>);

const FORMS: &str = "a row is {\"prompt\", \"chosen\", \"rejected\"}, the paper's {\"prompt_text\", \
    \"unpert_gen_text\", \"pert_gen_text\"}, or {\"chosen\", \"rejected\"} that start with the same prompt; name other \
    columns with --prompt-column, --chosen-column and --rejected-column";

/// The pair of a row, and whether its prompt has a column of its own.
fn pair(
    row: &Map<String, Value>,
    columns: &PairColumns,
    ignored: &mut Ignored,
) -> Result<(PreferencePair, bool), Fault> {
    let has = |key: &str| row.contains_key(key);
    let only = |name: &'static [&'static str], column: Column| Column { names: name, ..column };
    let is_named = columns.prompt.is_some() || columns.chosen.is_some() || columns.rejected.is_some();
    // The `pairs` command of this program and TRL, else the paper, else other names.
    let is_paper = !is_named && has("prompt_text") && !(has("prompt") && has("chosen"));
    let (prompt, chosen, rejected) = match is_paper {
        true => (
            only(&["prompt_text"], PAIR_PROMPT),
            only(&["unpert_gen_text"], CHOSEN),
            only(&["pert_gen_text"], REJECTED),
        ),
        false => (PAIR_PROMPT, CHOSEN, REJECTED),
    };
    if chosen.find(row, columns.chosen.as_deref()).is_none() {
        if let Some((reason, hint)) = rows::chat(row) {
            return Err((reason, hint.map(str::to_owned)));
        }
        if prompt.find(row, columns.prompt.as_deref()).is_none() {
            let found = rows::listed(row.keys().map(String::as_str));
            return Err((
                format!("expected a preference pair, found the columns {found}"),
                Some(FORMS.into()),
            ));
        }
    }
    let (chosen_name, chosen) = field(row, chosen, columns.chosen.as_deref())?;
    let (rejected_name, rejected) = field(row, rejected, columns.rejected.as_deref())?;
    let prompt = match (prompt.find(row, columns.prompt.as_deref()), &columns.prompt) {
        (None, None) => None,
        _ => Some(field(row, prompt, columns.prompt.as_deref())?),
    };
    let mut used = vec![chosen_name, rejected_name];
    used.extend(prompt.map(|(name, _)| name));
    if columns.prompt.is_none() {
        if let Some((name, _)) = prompt {
            PAIR_PROMPT.check_whole(row, name, &used).map_err(|(reason, hint)| (reason, Some(hint)))?;
        } else if let Some(dropped) = rows::dropped(row, &used) {
            return Err((
                format!("expected the whole prompt in the answers, found another part of it in {dropped:?}"),
                Some(format!("name the prompt's column: --prompt-column {}", rows::argument(dropped))),
            ));
        }
    }
    ignored.add(row, &used);
    Ok(match prompt {
        None => (implicit(chosen, rejected), false),
        Some((_, prompt)) => {
            let (prompt, chosen, rejected) = (prompt.into(), chosen.into(), rejected.into());
            (PreferencePair { prompt, chosen, rejected }, true)
        }
    })
}

/// A text of the row, with its column's name.
fn field<'r>(
    row: &'r Map<String, Value>,
    column: Column,
    chosen: Option<&str>,
) -> Result<(&'r str, &'r str), Fault> {
    let found = column.find(row, chosen).ok_or_else(|| {
        let (reason, hint) = column.absent(row, chosen);
        (reason, Some(hint))
    });
    let (name, value) = found?;
    let text = rows::text(name, value).map_err(|(reason, hint)| (reason, hint.map(str::to_owned)))?;
    Ok((name, text))
}

/// Splits two whole texts into their common prompt and the two answers; see
/// [the implicit prompt](self#the-implicit-prompt).
fn implicit(chosen: &str, rejected: &str) -> PreferencePair {
    let n_shared: usize =
        chosen.chars().zip(rejected.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    let shared = &chosen[..n_shared];
    let is_whole = n_shared == chosen.len() || n_shared == rejected.len();
    let prompt = if is_whole { shared } else { shared.strip_suffix(' ').unwrap_or(shared) };
    PreferencePair {
        prompt: prompt.to_owned(),
        chosen: chosen[prompt.len()..].to_owned(),
        rejected: rejected[prompt.len()..].to_owned(),
    }
}

#[cfg(test)]
mod tests;
