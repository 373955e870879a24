//! `score`: adds toxicity scores to texts.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, ValueEnum};

use crate::error::{Error, Result};
use crate::file;
use crate::file::output::Paths;
use crate::score;
use crate::score::texts::{self, Coverage, Row, Rows, TextColumns};
use crate::text::language;
use crate::text::rows::Wanted;

use super::print;

/// Arguments of `score`.
#[derive(Debug, Args)]
pub struct ScoreCommand {
    /// Texts: JSON, CSV or another table, or one text per line; may be compressed [default: standard input]
    #[arg(value_name = "FILE")]
    input: Option<PathBuf>,
    /// File to write (JSON lines) [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Scorer; repeatable
    #[arg(long, value_name = "NAME", default_value = score::LEXICAL)]
    scorer: Vec<String>,
    /// Format of the input [default: detected from the content and the file name]
    #[arg(long, value_enum)]
    format: Option<FormArgument>,
    /// Field or column with the text [default: generated_text, text, comment_text or similar]
    #[arg(long, alias = "text-column", value_name = "NAME")]
    field: Option<String>,
    /// Column with the language [default: language, lang or locale]
    #[arg(long, value_name = "NAME")]
    language_column: Option<String>,
    /// Language of texts that do not state one
    #[arg(long, value_name = "L")]
    lang: Option<String>,
}

/// Value of `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormArgument {
    /// JSON: an object or string per line, or an array
    #[value(alias = "json")]
    Jsonl,
    /// A table with a header: CSV, TSV, or with semicolons
    #[value(alias = "tsv")]
    Csv,
    /// One text per line
    Text,
}

/// Texts scored and written at a time.
const BATCH: usize = 4096;

impl ScoreCommand {
    /// Scores and writes one batch at a time.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let scorers = score::by_names(&self.scorer)?;
        let language = match &self.lang {
            None => None,
            Some(code) => language::parse_languages(&[code])?.first().copied(),
        };
        score::check_covered(&scorers, language)?;
        let stdin = Path::new("<stdin>");
        let path = self.input.as_deref().filter(|p| *p != Path::new("-")).unwrap_or(stdin);
        let input: Box<dyn Read> = if path == stdin {
            Box::new(std::io::stdin())
        } else {
            Box::new(File::open(path).map_err(Error::io("read", path))?)
        };
        let form = self.format.map(|format| match format {
            FormArgument::Jsonl => Wanted::Json,
            FormArgument::Csv => Wanted::Table,
            FormArgument::Text => Wanted::Lines,
        });
        let columns = TextColumns { text: self.field.clone(), language: self.language_column.clone() };
        let mut rows = Rows::new(path, input, form, columns)?;
        let mut output = print::Rows::open(print::named(self.output.as_deref()))?;
        let mut coverage = Coverage::default();
        loop {
            if interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let batch = rows.by_ref().take(BATCH).collect::<Result<Vec<Row>>>()?;
            if batch.is_empty() {
                break;
            }
            output.write(&file::json_lines(&texts::score_rows(batch, &scorers, language, &mut coverage))?)?;
        }
        if coverage.n_texts == 0 {
            return Err(Error::input(path, None, "expected texts, found none"));
        }
        if coverage.n_missing == coverage.n_texts * scorers.len() {
            let why = coverage.first_error.unwrap_or_default();
            let reason = match coverage.n_texts {
                1 => format!("expected a score, found none: {why}"),
                n => format!("expected scores, found none for all {n} texts; the first: {why}"),
            };
            return Err(Error::no_result(reason)
                .with_hint("give the language of the texts with --lang, if the scorer covers it"));
        }
        if coverage.n_missing > 0 {
            print::note(&format!(
                "{} of {} scores are missing; see \"errors\" in the output",
                coverage.n_missing,
                coverage.n_texts * scorers.len()
            ));
        }
        output.finish()
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Paths {
        let paths = match self.input.as_deref().filter(|path| *path != Path::new("-")) {
            Some(path) => Paths::new().reads([path]),
            None => Paths::new().reads_stdin(),
        };
        print::writes_rows(paths, self.output.as_deref())
    }
}
