//! Prompts: texts for a model to continue, from files or embedded.
//!
//! ```text
//! file or folder ──► read (rows of one file) ──► language, id, filter, limit ──► Vec<Prompt>
//!      own (embedded, 17 languages) ───────────────────────┘
//! ```
//!
//! # Forms of a file
//! | form | recognised by | text | id | language |
//! |---|---|---|---|---|
//! | RTP-LX, any release (JSON lines despite `.json`) | `Prompt` | `Prompt` | `Index`, string or integer | `Locale` |
//! | RealToxicityPrompts (JSON lines) | `prompt` is an object | `prompt.text` | – | – |
//! | preference pairs (JSON lines) | `prompt_text` | `prompt_text` | – | – |
//! | any other table or JSON | – | `prompt`, `text`, `question` and [similar names](crate::text::rows::PROMPT) | `id` | `language` or `lang` |
//! | plain text | `.txt`, or any other content | the line, unchanged | – | – |
//!
//! [`rows`](crate::text::rows) describes the files: JSON, tables and plain text. [`PromptColumns`] names other columns.
//! White space in and around a prompt is kept, because it changes the tokens and the paper's scripts do not strip it
//! either. A generations file (`generated_text`) is refused, and so is a row with another part of the prompt in a
//! column of its own, such as `system`.
//!
//! # Ids
//! `"{language}/{key}"`. The key is the row's own id, else its line in the file or its position in the
//! array or table, from 1. A repeated id gets `#2`, `#3`, … in file order. Ids are therefore unique, and do not
//! depend on `--lang` and `--limit`. Prompts with the same text stay separate; the paper's scripts key
//! results by text, which merges them.

mod own;
mod read;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::text::{language, rows};

pub use own::own_prompts;
pub(in crate::eval) use read::{id, language_of_name};

/// A text for a model to continue.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Prompt {
    /// `"{language}/{key}"`, unique among the prompts of one source; see the [module](self#ids).
    pub id: String,
    /// The language's code as [`language::normalize`] spells it: `de`, `zh`, `pt`.
    pub language: String,
    /// The text, exactly as in the file.
    pub text: String,
}

/// Origin of prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptSource {
    /// The embedded prompts ([`own_prompts`]).
    Own,
    /// One file of any form in the [module's table](self#forms-of-a-file).
    File(PathBuf),
    /// A folder: `{lang}.jsonl|.json|.txt`, `RTP_LX_{LANG}.json`, or subfolders `{lang}/` of such files.
    Folder(PathBuf),
}

/// Columns of prompts that the user names. `None` means the usual names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PromptColumns {
    /// The text.
    pub prompt: Option<String>,
    /// The row's language.
    pub language: Option<String>,
    /// The row's id.
    pub id: Option<String>,
}

/// A row with its language.
struct Placed {
    language: &'static str,
    key: String,
    text: String,
}

/// A file of a folder, with the language in its name or its subfolder's name.
struct Named {
    path: PathBuf,
    language: Option<&'static str>,
}

impl PromptSource {
    /// The folder or file at `path`.
    pub fn open(path: impl AsRef<Path>) -> Result<PromptSource> {
        let path = path.as_ref();
        let metadata = fs::metadata(path).map_err(Error::io("read", path))?;
        Ok(if metadata.is_dir() {
            PromptSource::Folder(path.to_path_buf())
        } else {
            PromptSource::File(path.to_path_buf())
        })
    }

    /// The file at `path`; a folder is refused.
    pub fn open_file(path: impl AsRef<Path>) -> Result<PromptSource> {
        match PromptSource::open(path)? {
            PromptSource::Folder(path) => Err(read::folder_for_file(&path)),
            source => Ok(source),
        }
    }

    /// Reads the prompts in file order; files of a folder by name.
    ///
    /// `languages`: codes from [`language::parse_languages`]; empty for all. A single file takes its
    /// language from its rows, else from its name, else from `languages` if it has exactly one, else from its texts
    /// ([`language::assign`]). In a folder, the name of the file or subfolder decides which files are opened, so a row that
    /// contradicts the name is an error. In a single file, the row takes precedence.
    ///
    /// `limit`: maximum number of prompts per language, the first in file order; at least 1.
    pub fn read(&self, languages: &[&'static str], limit: Option<usize>) -> Result<Vec<Prompt>> {
        self.read_columns(languages, limit, &PromptColumns::default())
    }

    /// [`PromptSource::read`] with columns that the user names.
    pub fn read_columns(
        &self,
        languages: &[&'static str],
        limit: Option<usize>,
        columns: &PromptColumns,
    ) -> Result<Vec<Prompt>> {
        if limit == Some(0) {
            return Err(Error::setting("--limit", "expected at least 1 prompt per language, found 0"));
        }
        let (prompts, mut present) = match self {
            PromptSource::Own => (own_prompts(), BTreeSet::new()),
            PromptSource::File(path) => (with_ids(read_file(path, languages, columns)?), BTreeSet::new()),
            PromptSource::Folder(path) => {
                let (rows, of_names) = read_folder(path, languages, columns)?;
                (with_ids(rows), of_names)
            }
        };
        present.extend(prompts.iter().map(|prompt| prompt.language.as_str()));
        self.check_present(languages, &present)?;

        let mut taken: HashMap<String, usize> = HashMap::new();
        Ok(prompts
            .into_iter()
            .filter(|prompt| languages.is_empty() || languages.contains(&prompt.language.as_str()))
            .filter(|prompt| {
                let n_taken = taken.entry(prompt.language.clone()).or_default();
                *n_taken += 1;
                limit.is_none_or(|limit| *n_taken <= limit)
            })
            .collect())
    }

    /// Refuses requested languages without prompts.
    fn check_present(&self, languages: &[&'static str], present: &BTreeSet<&str>) -> Result<()> {
        let absent: Vec<&str> =
            languages.iter().copied().filter(|language| !present.contains(language)).collect();
        if absent.is_empty() {
            return Ok(());
        }
        let reason = format!("expected prompts in {}, found only {}", absent.join(", "), join(present));
        const HINT: &str = "request only these languages, or omit --lang for all of them";
        Err(match self {
            PromptSource::Own => Error::setting("--lang", format!("the program's own prompts: {reason}"))
                .with_hint("give prompts in that language with --prompts"),
            PromptSource::File(path) | PromptSource::Folder(path) => {
                Error::input(path, None, reason).with_hint(HINT)
            }
        })
    }
}

fn join(languages: &BTreeSet<&str>) -> String {
    languages.iter().copied().collect::<Vec<_>>().join(", ")
}

/// How to set a language, for errors.
const LANGUAGE_HINT: &str =
    "give one language with --lang, name the file after it (de.txt), or give each row a \"language\"";

/// The rows of one file, each with its language.
fn read_file(path: &Path, languages: &[&'static str], columns: &PromptColumns) -> Result<Vec<Placed>> {
    let name_language = read::language_of_name(path);
    let caller_language = match languages {
        [language] => Some(*language),
        _ => None,
    };
    let rows = read::read_rows(path, columns)?;
    let of_rows = rows.iter().map(|row| {
        let language = read::more_specific(row.language, name_language).or(caller_language);
        (row.line, row.text.as_str(), language)
    });
    let languages = language::assign(path, &of_rows.collect::<Vec<_>>(), LANGUAGE_HINT)?;
    let placed = rows.into_iter().zip(languages);
    Ok(placed.map(|(row, language)| Placed { language, key: row.key, text: row.text }).collect())
}

/// The rows of a folder, and the languages in the names of all its files, even unopened ones.
fn read_folder(
    folder: &Path,
    languages: &[&'static str],
    columns: &PromptColumns,
) -> Result<(Vec<Placed>, BTreeSet<&'static str>)> {
    let mut placed = Vec::new();
    let mut of_names = BTreeSet::new();
    for file in list_folder(folder)? {
        of_names.extend(file.language);
        if file.language.is_some_and(|language| !languages.is_empty() && !languages.contains(&language)) {
            continue;
        }
        let rows = read::read_rows(&file.path, columns)?;
        let of_rows = rows
            .iter()
            .map(|row| (row.line, row.text.as_str(), read::more_specific(row.language, file.language)));
        let found = language::assign(&file.path, &of_rows.collect::<Vec<_>>(), FOLDER_HINT)?;
        for (row, language) in rows.into_iter().zip(found) {
            if let Some(of_name) = file.language
                && language != of_name
            {
                return Err(Error::input(
                    file.path,
                    Some(row.line),
                    format!("expected language {of_name} as in the file's name, found {language}"),
                )
                .with_hint(
                    "correct the row or the name, or read the file alone: then the rows take precedence",
                ));
            }
            placed.push(Placed { language, key: row.key, text: row.text });
        }
    }
    Ok((placed, of_names))
}

/// How to set a language in a folder.
const FOLDER_HINT: &str =
    "name the file after its language (de.jsonl, RTP_LX_DE.json), or give each row a \"language\"";

/// The prompt files of a folder and of its subfolders `{lang}/`, sorted by path. Others that may hold prompts are named
/// in a warning.
fn list_folder(folder: &Path) -> Result<Vec<Named>> {
    let (mut files, mut skipped) = (Vec::new(), Vec::new());
    for path in entries(folder)? {
        if path.is_dir() {
            let Some(language) = path.file_name().and_then(|name| language::recognise(name.to_str()?)) else {
                return Err(Error::input(
                    path,
                    None,
                    "expected a subfolder named after a language (de, zh-hans), found another name",
                )
                .with_hint(format!("rename or move it; known: {}", language::known_codes().join(", "))));
            };
            let (n_files, n_skipped) = (files.len(), skipped.len());
            for path in entries(&path)? {
                if path.is_dir() {
                    return Err(Error::input(&path, None, "expected prompt files here, found a folder"));
                }
                if read::is_prompt_file(&path) {
                    files.push(Named { path, language: Some(language) });
                } else {
                    skipped.push(path);
                }
            }
            if files.len() == n_files {
                return Err(no_prompt_files(&path, &skipped[n_skipped..]));
            }
        } else if read::is_prompt_file(&path) {
            let language = read::language_of_name(&path);
            files.push(Named { path, language });
        } else {
            skipped.push(path);
        }
    }
    if files.is_empty() {
        return Err(no_prompt_files(folder, &skipped));
    }
    if let Some(names) = rows::skipped_names(&skipped) {
        tracing::warn!(
            "{}: these files are not read: {names}. Of tables, only those named after a language are (de.csv)",
            folder.display()
        );
    }
    Ok(files)
}

fn no_prompt_files(folder: &Path, skipped: &[PathBuf]) -> Error {
    let found =
        rows::skipped_names(skipped).map_or_else(|| "none".to_owned(), |names| format!("only {names}"));
    let reason =
        format!("expected files .jsonl, .json or .txt, or tables named after a language, found {found}");
    Error::input(folder, None, reason)
        .with_hint("name each file after its language: de.jsonl, RTP_LX_DE.json, de.txt, de.csv")
}

/// The entries of a folder without hidden ones, sorted.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

/// Gives every row its unique id, in order.
fn with_ids(rows: Vec<Placed>) -> Vec<Prompt> {
    let mut taken: HashSet<String> = HashSet::with_capacity(rows.len());
    // The last number given to a repeated id: keeps a file with one id throughout linear.
    let mut repeats: HashMap<String, usize> = HashMap::new();
    rows.into_iter()
        .map(|row| {
            let base = format!("{}/{}", row.language, row.key);
            let mut id = base.clone();
            while !taken.insert(id.clone()) {
                let n = repeats.entry(base.clone()).or_insert(1);
                *n += 1;
                id = format!("{base}#{n}");
            }
            Prompt { id, language: row.language.to_owned(), text: row.text }
        })
        .collect()
}

#[cfg(test)]
mod tests;
