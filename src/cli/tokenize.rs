//! `tokenize`: prints the token ids of a text.

use std::borrow::Cow;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use crate::engine::{Token, Vocabulary};
use crate::error::{Error, Result};
use crate::file::output::Paths;

use super::print::{print, print_json};

/// A text, and how to tokenize it.
#[derive(Debug, Args)]
pub struct TextArguments {
    /// Do not add BOS, even if the model's metadata asks for it
    #[arg(long)]
    pub no_bos: bool,
    /// Read special tokens such as <s> in the text as tokens and not as letters
    #[arg(long)]
    pub parse_special: bool,
}

impl TextArguments {
    /// The text's tokens. EOS is never added, because a text that has ended cannot be continued.
    pub fn tokenize(&self, vocabulary: &Vocabulary, text: &str) -> Result<Vec<Token>> {
        vocabulary.check_nfc([text]);
        vocabulary.tokenize(text, !self.no_bos, self.parse_special)
    }
}

/// Arguments of `tokenize`.
#[derive(Debug, Args)]
pub struct TokenizeCommand {
    /// The text
    #[arg(value_name = "TEXT", required_unless_present = "file")]
    text: Option<String>,
    /// Model (GGUF); only its vocabulary is read
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Read the text from a file, with its last line break; - reads standard input
    #[arg(short, long, value_name = "FILE", conflicts_with = "text")]
    file: Option<PathBuf>,
    /// Print one token per line: its id and its piece of the text
    #[arg(long)]
    pieces: bool,
    /// Print a JSON object with the ids and pieces
    #[arg(long, conflicts_with = "pieces")]
    json: bool,
    /// Normalise the text to Unicode NFC first, as Hugging Face does for some models (Qwen, Command R)
    #[arg(long)]
    nfc: bool,
    #[command(flatten)]
    how: TextArguments,
}

impl TokenizeCommand {
    /// Tokenizes and prints.
    pub fn run(&self) -> Result<()> {
        let text = read_text(self.text.as_deref(), self.file.as_deref())?;
        let vocabulary = Vocabulary::open(&self.model)?.with_nfc(self.nfc);
        let ids = self.how.tokenize(&vocabulary, &text)?;
        if self.pieces {
            let lines = ids.iter().map(|&id| format!("{id:>8}  {:?}\n", piece(&vocabulary, id)));
            return print(&lines.collect::<String>());
        }
        if self.json {
            let pieces: Vec<String> = ids.iter().map(|&id| piece(&vocabulary, id)).collect();
            return print_json(&format!("{}\n", json!({ "ids": ids, "pieces": pieces })));
        }
        print_json(&format!("{}\n", json!(ids)))
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Paths {
        with_text(Paths::new().reads([&self.model]), &self.file).writes_stdout()
    }
}

/// Adds the file of a text, which may be standard input.
pub fn with_text(paths: Paths, file: &Option<PathBuf>) -> Paths {
    match file {
        Some(path) if path.as_path() == Path::new("-") => paths.reads_stdin(),
        other => paths.reads(other),
    }
}

/// Most bytes of a text. A longer one is more than any context holds.
const MAX_BYTES: u64 = 8 << 20;

/// The text of the command line or of a file, without a byte-order mark.
pub fn read_text<'a>(text: Option<&'a str>, file: Option<&Path>) -> Result<Cow<'a, str>> {
    let Some(path) = file else { return Ok(Cow::Borrowed(text.unwrap_or_default())) };
    let input: Box<dyn Read> = match path == Path::new("-") {
        true => Box::new(std::io::stdin().lock()),
        false => Box::new(std::fs::File::open(path).map_err(Error::io("open", path))?),
    };
    let mut bytes = Vec::new();
    input.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::input(path, None, format!("expected a text of at most {} MiB", MAX_BYTES >> 20)));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::input(path, None, format!("expected UTF-8, found an invalid byte at offset {at}"))
    })?;
    Ok(Cow::Owned(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text)))
}

/// The text of a token, or its name if it has none. A part of a character becomes U+FFFD.
pub fn piece(vocabulary: &Vocabulary, id: Token) -> String {
    String::from_utf8_lossy(&vocabulary.piece_or_name(id)).into_owned()
}
