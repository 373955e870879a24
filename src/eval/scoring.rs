//! Fills `scores.jsonl` unit by unit. Interrupted runs resume.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::engine::{Model, ModelOptions, SessionOptions};
use crate::error::{Error, Result};
use crate::eval::generate::Generation;
use crate::eval::perplexity::{self, BaseLogprob, BaseModel, PerplexityTokens};
use crate::eval::record::{self, ScoreRow};
use crate::file::JsonLog;
use crate::gguf::ModelFiles;
use crate::progress::Progress;

/// How the log-probs behind perplexity are measured.
#[derive(Debug)]
pub(super) struct Judge<'a> {
    /// The model that measures them, and its files when the run began; `None` to keep those of the continuations.
    pub base: Option<(&'a Path, &'a ModelFiles)>,
    /// Whether `base` wrote the continuations, unsteered: their own log-probs are those of `base`.
    pub wrote_them: bool,
    /// The tokens to measure; `None` for the sampled ones if `base` can.
    pub wanted: Option<PerplexityTokens>,
    /// Most tokens of a continuation when it was sampled, or 0 if that is not known.
    pub n_predict: usize,
    /// How `base` is loaded.
    pub model_options: &'a ModelOptions,
    /// How `base` is run.
    pub session_options: &'a SessionOptions,
}

/// Continuations scored and written at a time if no base model determines it.
const SCORE_UNIT: usize = 500;

/// Loads a model again, and checks that it is still the one that the run began with.
pub(super) fn reopen(path: &Path, files: &ModelFiles, options: &ModelOptions) -> Result<Model> {
    let model = Model::open(path, options)?;
    files.check_same(model.files())?;
    Ok(model)
}

impl Judge<'_> {
    /// Opens the base model, if one is needed. `found` is the kind of tokens in the rows that exist already.
    fn open(&self, generations: &[Generation], found: Option<PerplexityTokens>) -> Result<Option<BaseModel>> {
        let Some((path, files)) = self.base else { return Ok(None) };
        let has_ids = generations.iter().all(|generation| generation.token_ids.is_some());
        let wanted = self.wanted.or(found);
        if self.wrote_them && has_ids && wanted != Some(PerplexityTokens::Retokenised) {
            return Ok(None);
        }
        let model = reopen(path, files, self.model_options)?;
        let tokens = perplexity::tokens_of(wanted, &model, generations)?;
        // Sampled tokens need no text, but their prompts do.
        let is_retokenised = tokens == PerplexityTokens::Retokenised;
        let texts = generations
            .iter()
            .flat_map(|g| [Some(g.prompt.as_str()), is_retokenised.then_some(g.generated_text.as_str())]);
        model.vocabulary().check_nfc(texts.flatten());
        BaseModel::open(&model, generations, tokens, self.n_predict, self.session_options).map(Some)
    }

    /// The kind of tokens in the rows of an interrupted run; refuses another kind than is wanted.
    fn found_tokens(&self, folder: &Path, found: Option<PerplexityTokens>) -> Result<PerplexityTokens> {
        // An older version did not name the kind. It tokenised the text again for a base model.
        let older =
            if self.base.is_some() { PerplexityTokens::Retokenised } else { PerplexityTokens::WithoutIds };
        let found = found.unwrap_or(older);
        match self.wanted {
            Some(wanted) if wanted != found => Err(Error::run_folder(
                folder,
                format!("holds another run: its perplexity is {found}, not {wanted}"),
            )
            .with_hint("choose a new folder with -o")),
            _ => Ok(found),
        }
    }
}

/// Scores the continuations missing in `scores.jsonl`; returns all rows.
///
/// `score` makes the rows of the continuations in a range, given their log-probs.
pub(super) fn score_all(
    folder: &Path,
    generations: &[Generation],
    judge: &Judge<'_>,
    interrupt: &AtomicBool,
    progress: &mut dyn Progress,
    mut score: impl FnMut(Range<usize>, Vec<BaseLogprob>) -> Result<Vec<ScoreRow>>,
) -> Result<Vec<ScoreRow>> {
    let there = record::peek_scores(folder, generations)?;
    let found = there.tokens.map(|found| judge.found_tokens(folder, found)).transpose()?;
    // A finished run needs no model.
    let mut base = if there.n_rows < generations.len() { judge.open(generations, found)? } else { None };
    let units: Vec<usize> = match &base {
        Some(base) => base.units(generations),
        None => generations.chunks(SCORE_UNIT).map(<[_]>::len).collect(),
    };
    let is_expected = |i: usize, row: &ScoreRow| {
        let generation = &generations[i];
        row.is_of(generation) && row.is_possible(generation)
    };
    let (mut log, mut rows) =
        JsonLog::open(&folder.join("scores.jsonl"), units.iter().copied(), is_expected)?;
    progress.start("scores", generations.len() as u64, rows.len() as u64);
    let mut first = 0;
    for n_rows in units {
        let unit = first..first + n_rows;
        first = unit.end;
        if unit.end <= rows.len() {
            continue;
        }
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let logprobs = match &mut base {
            Some(base) => base.logprobs(&generations[unit.clone()], interrupt)?,
            None => generations[unit.clone()].iter().map(BaseLogprob::of_generation).collect(),
        };
        let mut scored = score(unit, logprobs)?;
        log.append(&scored)?;
        progress.advance(scored.len() as u64);
        rows.append(&mut scored);
    }
    progress.finish();
    Ok(rows)
}
