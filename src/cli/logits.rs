//! `logits`: prints or writes a model's log-probs of every next token of a text.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Args;
use serde::Serialize;

use crate::engine::{Model, Session, Token, logprob};
use crate::error::{Error, Result};
use crate::file::output::Paths;
use crate::file::{AtomicFile, base_name};
use crate::report::json::to_json;
use crate::report::npy;

use super::arguments::EngineArguments;
use super::print::{note, print, print_json};
use super::steering::SteeringArguments;
use super::tokenize::{TextArguments, piece, read_text, with_text};

/// Arguments of `logits`.
#[derive(Debug, Args)]
#[command(
    after_help = "Row i has the natural log-probs of the token after token i. To compare with F32 references, add -ctk f32 -ctv \
                  f32 -fa off."
)]
pub struct LogitsCommand {
    /// The text
    #[arg(value_name = "TEXT", required_unless_present_any = ["file", "ids"])]
    text: Option<String>,
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Read the text from a file, with its last line break; - reads standard input
    #[arg(short, long, value_name = "FILE", conflicts_with = "text")]
    file: Option<PathBuf>,
    /// Token ids instead of a text
    #[arg(long, value_name = "ID,…", value_delimiter = ',', conflicts_with_all = ["text", "file", "no_bos", "parse_special", "nfc"])]
    ids: Vec<Token>,
    /// Number of most probable tokens to print for each position
    #[arg(long, value_name = "N", default_value_t = 5)]
    top: usize,
    /// Print a JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Write all log-probs to a NumPy file, f32 of shape [n_tokens, n_vocab]; the ids go next to it (.ids.npy)
    #[arg(short, long, value_name = "FILE.npy", conflicts_with_all = ["json", "top"])]
    output: Option<PathBuf>,
    #[command(flatten)]
    how: TextArguments,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

/// A token with its log-prob.
#[derive(Debug, Serialize)]
struct Candidate {
    id: Token,
    piece: String,
    logprob: f32,
}

/// One token of the text, and the tokens that may follow it.
#[derive(Debug, Serialize)]
struct Position {
    id: Token,
    piece: String,
    /// The log-prob of the text's next token; `None` after the last one.
    next_logprob: Option<f32>,
    /// The most probable next tokens.
    top: Vec<Candidate>,
}

/// Everything that is printed.
#[derive(Debug, Serialize)]
struct Printed {
    model: String,
    n_vocab: usize,
    positions: Vec<Position>,
}

impl LogitsCommand {
    /// Runs the model over the text, and prints or writes the log-probs.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let ids_path = self.ids_path();
        let text = read_text(self.text.as_deref(), self.file.as_deref())?;
        let model = self.steering.open(&self.model, &self.engine)?;
        let ids = self.ids(&model, &text)?;
        if ids.is_empty() {
            let hint = match self.how.no_bos {
                true => "give a text of at least one character; --no-bos leaves out BOS",
                false => "give a text of at least one character: this model adds no BOS",
            };
            return Err(Error::setting("TEXT", "expected at least one token, found none").with_hint(hint));
        }
        let mut session = self.session(&model, ids.len())?;
        match (&self.output, &ids_path) {
            (Some(output), Some(ids_path)) => write(&mut session, &ids, output, ids_path, interrupt),
            _ => self.print(&mut session, &ids, interrupt),
        }
    }

    /// The file of the ids, next to the output.
    fn ids_path(&self) -> Option<PathBuf> {
        self.output.as_deref().map(|output| output.with_extension("ids.npy"))
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Result<Paths> {
        let paths = Paths::new().reads([&self.model]).reads(self.steering.files()?);
        let paths = with_text(paths, &self.file);
        let (Some(output), Some(ids)) = (&self.output, self.ids_path()) else {
            return Ok(paths.writes_stdout());
        };
        if output.extension().is_none_or(|ending| ending != "npy") {
            let reason = format!("expected a file name ending in .npy, found {}", output.display());
            return Err(Error::setting("-o/--output", reason)
                .with_hint("write -o NAME.npy; without -o, tables go to standard output"));
        }
        Ok(paths.writes_beside(output, npy::MAGIC).writes_beside(ids, npy::MAGIC))
    }

    /// The ids of the command line, or those of the text.
    fn ids(&self, model: &Model, text: &str) -> Result<Vec<Token>> {
        if self.ids.is_empty() {
            return self.how.tokenize(model.vocabulary(), text);
        }
        let n_vocab = model.n_vocab();
        match self.ids.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= n_vocab)) {
            Some(id) => {
                Err(Error::setting("--ids", format!("expected ids from 0 to {}, found {id}", n_vocab - 1)))
            }
            None => Ok(self.ids.clone()),
        }
    }

    /// A session for one text of `n_tokens`.
    fn session(&self, model: &Model, n_tokens: usize) -> Result<Session> {
        let mut options = self.engine.session_options();
        options.n_parallel.get_or_insert(1);
        let n_ctx_train = model.n_ctx_train();
        if options.n_ctx.is_none() && n_ctx_train > 0 && n_tokens > n_ctx_train {
            return Err(Error::PromptTooLong {
                prompt: "the text".into(),
                n_prompt: n_tokens,
                n_predict: 0,
                n_ctx_seq: n_ctx_train,
                is_learned: model.n_positions() == Some(n_ctx_train),
            });
        }
        Session::open(model, &options, n_tokens)
    }

    fn print(&self, session: &mut Session, ids: &[Token], interrupt: &AtomicBool) -> Result<()> {
        let model = session.model().clone();
        let piece = |id: Token| piece(model.vocabulary(), id);
        let mut positions = Vec::new();
        logprob::distributions(session, ids, interrupt, |at, logprobs| {
            let top = most_probable(logprobs, self.top);
            positions.push(Position {
                id: ids[at],
                piece: piece(ids[at]),
                next_logprob: ids.get(at + 1).map(|&next| logprobs[next as usize]),
                top: top.map(|(id, logprob)| Candidate { id, piece: piece(id), logprob }).collect(),
            });
            Ok(())
        })?;
        let printed = Printed { model: base_name(&self.model), n_vocab: model.n_vocab(), positions };
        if self.json { print_json(&to_json(&printed)?) } else { print(&table(&printed)) }
    }
}

/// The `n` most probable tokens with their log-probs. Of equals, the lower id comes first.
fn most_probable(logprobs: &[f32], n: usize) -> impl Iterator<Item = (Token, f32)> {
    let mut order: Vec<usize> = (0..logprobs.len()).collect();
    let by_logprob = |&a: &usize, &b: &usize| logprobs[b].total_cmp(&logprobs[a]).then(a.cmp(&b));
    if n < order.len() {
        order.select_nth_unstable_by(n, by_logprob);
        order.truncate(n);
    }
    order.sort_unstable_by(by_logprob);
    order.into_iter().map(|id| (id as Token, logprobs[id])).collect::<Vec<_>>().into_iter()
}

/// One row per token: its id and piece, the log-prob of the next token, and the most probable next tokens.
fn table(printed: &Printed) -> String {
    let mut text = format!("{:>5} {:>7}  {:<16} {:>9}  most probable next\n", "at", "id", "piece", "next");
    for (at, position) in printed.positions.iter().enumerate() {
        let next = position.next_logprob.map_or("-".to_owned(), |logprob| format!("{logprob:.4}"));
        let top: Vec<String> = (position.top.iter())
            .map(|candidate| format!("{} {:?} {:.4}", candidate.id, candidate.piece, candidate.logprob))
            .collect();
        let piece = format!("{:?}", position.piece);
        text += &format!("{at:>5} {:>7}  {piece:<16} {next:>9}  {}\n", position.id, top.join(", "));
    }
    text
}

/// Writes the log-probs and the ids.
fn write(
    session: &mut Session,
    ids: &[Token],
    output: &Path,
    ids_path: &Path,
    interrupt: &AtomicBool,
) -> Result<()> {
    let n_vocab = session.model().n_vocab();
    let mut file = AtomicFile::create(output)?;
    file.write_all(&npy::header("<f4", &[ids.len(), n_vocab]))?;
    logprob::distributions(session, ids, interrupt, |_, logprobs| {
        file.write_all(&logprobs.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
    })?;
    let mut of_ids = AtomicFile::create(ids_path)?;
    of_ids.write_all(&npy::header("<i4", &[ids.len()]))?;
    of_ids.write_all(&ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>())?;
    file.commit()?;
    of_ids.commit()?;
    note(&format!("log-probs: {}  [{}, {n_vocab}]", output.display(), ids.len()));
    note(&format!("ids: {}", ids_path.display()));
    Ok(())
}
