//! Prompts: what a model is asked to continue, from files or from the program itself.
//!
//! ```text
//! file or folder ──► read (rows of one file) ──► language, id, filter, limit ──► Vec<Prompt>
//!      own (embedded, 17 languages) ───────────────────────┘
//! ```
//!
//! # Forms of a file
//! | form | recognised by | text | id | language |
//! |---|---|---|---|---|
//! | RTP-LX, any release (JSON lines despite `.json`) | `Prompt` | `Prompt` | `Index`, a string or a whole number | `Locale` |
//! | RealToxicityPrompts (JSON lines) | `prompt` is an object | `prompt.text` | – | – |
//! | preference pairs (JSON lines) | `prompt_text` | `prompt_text` | – | – |
//! | plain JSON lines | `prompt` or `text`, a string | that field | `id` | `language` or `lang` |
//! | a JSON array of any of these | first character `[` | | | |
//! | plain text | `.txt`, or any other content | the line, as it is | – | – |
//!
//! `.json`, `.jsonl` and `.ndjson` are JSON, `.txt` is text; under any other name the first
//! character that is not white space decides (`{` or `[`: JSON). UTF-8, with or without a byte-order
//! mark; lines end in LF or CRLF. White space inside a prompt and at its ends is kept: it changes
//! tokens, and the paper's scripts feed prompts raw. A generations file (`generated_text`) is refused.
//!
//! # Ids
//! `"{language}/{key}"`, where the key is the row's own id, else its line in the file (its place in
//! the array), from 1. A repeated id gets `#2`, `#3`, … in file order, so ids are unique, and stay the
//! same whatever `--lang` and `--limit` select. Prompts with the same text stay separate prompts; the
//! paper's scripts key results by text and merge them.

mod own;
mod read;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::text::language;

pub use own::own_prompts;

/// A text that a model continues.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Prompt {
    /// `"{language}/{key}"`, unique among the prompts of one source; see the [module](self#ids).
    pub id: String,
    /// The language's code as [`language::normalize`] spells it: `de`, `zh`, `pt`.
    pub language: String,
    /// The text, exactly as the file has it.
    pub text: String,
}

/// Where prompts come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptSource {
    /// The prompts that are part of this program ([`own_prompts`]).
    Own,
    /// One file, of any form in the [module's table](self#forms-of-a-file).
    File(PathBuf),
    /// A folder: `{lang}.jsonl|.json|.txt`, `RTP_LX_{LANG}.json`, or subfolders `{lang}/` of such files.
    Folder(PathBuf),
}

/// A row that has its language.
struct Placed {
    language: &'static str,
    key: String,
    text: String,
}

/// A file of a folder, with the language that its name or its subfolder's name carries.
struct Named {
    path: PathBuf,
    language: Option<&'static str>,
}

impl PromptSource {
    /// A folder or a file, whichever `path` is.
    pub fn open(path: impl AsRef<Path>) -> Result<PromptSource> {
        let path = path.as_ref();
        let metadata = fs::metadata(path).map_err(Error::io("read", path))?;
        Ok(if metadata.is_dir() {
            PromptSource::Folder(path.to_path_buf())
        } else {
            PromptSource::File(path.to_path_buf())
        })
    }

    /// One file; a folder is refused.
    pub fn open_file(path: impl AsRef<Path>) -> Result<PromptSource> {
        match PromptSource::open(path)? {
            PromptSource::Folder(path) => Err(read::folder_for_file(&path)),
            source => Ok(source),
        }
    }

    /// Reads the prompts, in file order (files of a folder by name).
    ///
    /// `languages`: codes as [`language::parse_languages`] gives them; empty for all. A single file
    /// takes its language from its rows, else from its name, else from `languages` if that is exactly
    /// one. In a folder, the file's (or subfolder's) name decides which files are opened, so a row
    /// that contradicts the name is an error there; in a single file the row is believed.
    ///
    /// `limit`: at most so many prompts a language, the first in file order; at least 1.
    pub fn read(&self, languages: &[&'static str], limit: Option<usize>) -> Result<Vec<Prompt>> {
        if limit == Some(0) {
            return Err(Error::setting("--limit", "expected at least 1 prompt a language, found 0"));
        }
        let (prompts, mut present) = match self {
            PromptSource::Own => (own_prompts(), BTreeSet::new()),
            PromptSource::File(path) => (with_ids(read_file(path, languages)?), BTreeSet::new()),
            PromptSource::Folder(path) => {
                let (rows, of_names) = read_folder(path, languages)?;
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

    /// Every language asked for has prompts.
    fn check_present(&self, languages: &[&'static str], present: &BTreeSet<&str>) -> Result<()> {
        let absent: Vec<&str> =
            languages.iter().copied().filter(|language| !present.contains(language)).collect();
        if absent.is_empty() {
            return Ok(());
        }
        let reason = format!("no prompts in {}, only in {}", absent.join(", "), join(present));
        let hint = Some("ask only for languages that are there, or leave out --lang for all of them".into());
        Err(match self {
            PromptSource::Own => Error::setting("--lang", format!("the program's own prompts: {reason}"))
                .with_hint("give prompts in that language with --prompts"),
            PromptSource::File(path) | PromptSource::Folder(path) => {
                Error::Input { path: path.clone(), line: None, reason, hint }
            }
        })
    }
}

fn join(languages: &BTreeSet<&str>) -> String {
    languages.iter().copied().collect::<Vec<_>>().join(", ")
}

/// The rows of one file, each with its language.
fn read_file(path: &Path, languages: &[&'static str]) -> Result<Vec<Placed>> {
    let name_language = read::language_of_name(path);
    let caller_language = match languages {
        [language] => Some(*language),
        _ => None,
    };
    read::read_rows(path)?
        .into_iter()
        .map(|row| {
            let language = read::more_specific(row.language, name_language).or(caller_language);
            let language = language.ok_or_else(|| {
                Error::input(
                    path,
                    Some(row.line),
                    "expected to know the prompt's language, but neither the row, nor the file's name, \
                         nor --lang says it",
                )
                .with_hint(
                    "name one language with --lang, name the file after it (de.txt), or give each row a \
                     \"language\"",
                )
            })?;
            Ok(Placed { language, key: row.key, text: row.text })
        })
        .collect()
}

/// The rows of a folder, and the languages that its files' names carry, opened or not.
fn read_folder(folder: &Path, languages: &[&'static str]) -> Result<(Vec<Placed>, BTreeSet<&'static str>)> {
    let mut placed = Vec::new();
    let mut nameless = Vec::new();
    let mut of_names = BTreeSet::new();
    for file in list_folder(folder)? {
        of_names.extend(file.language);
        if file.language.is_some_and(|language| !languages.is_empty() && !languages.contains(&language)) {
            continue;
        }
        for row in read::read_rows(&file.path)? {
            let language = read::more_specific(row.language, file.language);
            if let (Some(language), Some(of_name)) = (language, file.language)
                && language != of_name
            {
                return Err(Error::input(
                    file.path,
                    Some(row.line),
                    format!("the row's language is {language}, but its file is named as {of_name}"),
                )
                .with_hint("correct the row or the name, or read the file alone, where rows are believed"));
            }
            let Some(language) = language else {
                nameless.push(file.path);
                break;
            };
            placed.push(Placed { language, key: row.key, text: row.text });
        }
    }
    if !nameless.is_empty() {
        let names: Vec<String> = nameless
            .iter()
            .map(|path| path.strip_prefix(folder).unwrap_or(path).display().to_string())
            .collect();
        return Err(Error::input(folder, None, format!(
                "expected each file's name to carry a language (de.jsonl, RTP_LX_DE.json) or each row to have \
                 one, found neither for: {}",
                names.join(", ")
            )).with_hint(format!(
                "rename or move them, or give each row a \"language\"; known: {}",
                language::known_codes().join(", ")
            )));
    }
    Ok((placed, of_names))
}

/// The prompt files of a folder and of its subfolders `{lang}/`, by path.
fn list_folder(folder: &Path) -> Result<Vec<Named>> {
    let mut files = Vec::new();
    for path in entries(folder)? {
        if path.is_dir() {
            let Some(language) = path.file_name().and_then(|name| language::normalize(name.to_str()?)) else {
                return Err(Error::input(
                    path,
                    None,
                    "expected a subfolder named after a language (de, zh-hans), found another name",
                )
                .with_hint(format!("rename or move it; known: {}", language::known_codes().join(", "))));
            };
            let before = files.len();
            for path in entries(&path)? {
                if path.is_dir() {
                    return Err(Error::input(&path, None, "expected prompt files here, found a folder"));
                }
                if read::is_prompt_file(&path) {
                    files.push(Named { path, language: Some(language) });
                }
            }
            if files.len() == before {
                return Err(no_prompt_files(&path));
            }
        } else if read::is_prompt_file(&path) {
            let language = read::language_of_name(&path);
            files.push(Named { path, language });
        }
    }
    if files.is_empty() {
        return Err(no_prompt_files(folder));
    }
    Ok(files)
}

fn no_prompt_files(folder: &Path) -> Error {
    Error::input(folder, None, "expected files .jsonl, .json or .txt, found none")
        .with_hint("name each file after its language: de.jsonl, RTP_LX_DE.json, de.txt")
}

/// The entries of a folder, sorted, without hidden ones.
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
    // The last number given to a repeated id, so that a file with one id throughout stays linear.
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
