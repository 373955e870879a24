//! Log-probabilities of given continuations after given prompts.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use crate::error::{Error, Result};

use super::session::PROMPT_SLOT;
use super::{Session, Token, sample};
use crate::graph::place::Phase;

/// A prompt and the continuations to score after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Name of the prompt in errors.
    pub id: String,
    /// The prompt, with BOS if the model needs one.
    pub prompt: Vec<Token>,
    /// Continuations without BOS. An empty one gets no log-probabilities.
    pub continuations: Vec<Vec<Token>>,
}

/// Most bytes of logits that one decode may produce: 256 MiB, whatever the vocabulary.
pub(super) const MOST_LOGIT_BYTES: usize = 256 << 20;

/// A continuation in a slot.
struct Task {
    slot: usize,
    request: usize,
    continuation: usize,
    /// Number of its tokens decoded so far.
    n_done: usize,
}

/// Natural log-probability of every token of every continuation, given the text before it.
///
/// Shape: `[requests][continuations][tokens]`. Each prompt is decoded once, and its KV copied to its continuations;
/// continuations of several prompts share a batch.
///
/// Errors: [`Error::PromptTooLong`] before anything runs; [`Error::Interrupted`]; [`Error::Decode`] if llama.cpp
/// fails; [`Error::Model`] if logits are NaN.
pub fn score(
    session: &mut Session,
    requests: &[Request],
    interrupt: &AtomicBool,
) -> Result<Vec<Vec<Vec<f64>>>> {
    session.model().files().check_content()?;
    for request in requests {
        let longest = request.continuations.iter().map(Vec::len).max().unwrap_or(0);
        session.check_fits(&request.id, request.prompt.len(), 0)?;
        session.check_fits(&request.id, request.prompt.len() + longest, 0)?;
    }
    session.context.clear();
    let mut logprobs: Vec<Vec<Vec<f64>>> =
        requests.iter().map(|r| vec![Vec::new(); r.continuations.len()]).collect();
    let row_bytes = session.model().n_vocab() * size_of::<f32>();
    let most_rows = (MOST_LOGIT_BYTES / row_bytes.max(1)).clamp(1, session.context.n_batch());

    let mut tasks: Vec<Task> = Vec::new();
    for (r, request) in requests.iter().enumerate() {
        let mut first_row: Option<Vec<f32>> = None;
        for (c, continuation) in request.continuations.iter().enumerate() {
            let Some(&first) = continuation.first() else { continue };
            if tasks.len() == session.n_parallel() {
                run(session, requests, &mut tasks, most_rows, &mut logprobs, interrupt)?;
            }
            let row = match &first_row {
                Some(row) => row,
                None => first_row.insert(session.load_prompt(&request.prompt)?),
            };
            logprobs[r][c].push(session.logprob(row, first)?);
            if continuation.len() > 1 {
                let slot = tasks.len() + 1;
                session.fork_prompt(slot);
                tasks.push(Task { slot, request: r, continuation: c, n_done: 0 });
            }
        }
    }
    run(session, requests, &mut tasks, most_rows, &mut logprobs, interrupt)?;
    session.model().files().check_content()?;
    Ok(logprobs)
}

/// The log-probabilities of every possible next token, after each token of one text.
///
/// `each` is called for each position from 0, with the natural log-probabilities of the token that follows it, shape
/// `[n_vocab]`. Only a few rows are in memory at a time.
///
/// Errors: [`Error::PromptTooLong`] before anything runs; [`Error::Interrupted`]; [`Error::Decode`]; [`Error::Model`]
/// if logits are NaN; those of `each`.
pub fn distributions(
    session: &mut Session,
    tokens: &[Token],
    interrupt: &AtomicBool,
    mut each: impl FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    session.check_fits("the text", tokens.len(), 0)?;
    session.context.clear();
    let row_bytes = session.model().n_vocab() * size_of::<f32>();
    let most_rows = (MOST_LOGIT_BYTES / row_bytes.max(1)).clamp(1, session.context.n_batch());
    for (chunk, first) in tokens.chunks(most_rows).zip((0..).step_by(most_rows)) {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        session.batch.clear();
        for (i, &token) in chunk.iter().enumerate() {
            session.batch.push(token, first + i, PROMPT_SLOT, true);
        }
        session.decode_as(Phase::Prompt)?;
        for i in 0..chunk.len() {
            let row = sample::log_softmax(session.row(i)?).ok_or_else(|| session.no_distribution())?;
            each(first + i, &row)?;
        }
    }
    Ok(())
}

/// Decodes all continuations in `tasks`, and clears it.
fn run(
    session: &mut Session,
    requests: &[Request],
    tasks: &mut Vec<Task>,
    most_rows: usize,
    logprobs: &mut [Vec<Vec<f64>>],
    interrupt: &AtomicBool,
) -> Result<()> {
    let tokens_of = |t: &Task| -> &[Token] { &requests[t.request].continuations[t.continuation] };
    loop {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        session.batch.clear();
        // The token that each row of this batch predicts.
        let mut predicted: Vec<(usize, usize, Token)> = Vec::new();
        for task in tasks.iter_mut() {
            let tokens = tokens_of(task);
            let n_prompt = requests[task.request].prompt.len();
            // The last token is only predicted, so it is not decoded.
            while task.n_done + 1 < tokens.len() && predicted.len() < most_rows {
                session.batch.push(tokens[task.n_done], n_prompt + task.n_done, task.slot, true);
                predicted.push((task.request, task.continuation, tokens[task.n_done + 1]));
                task.n_done += 1;
            }
        }
        if predicted.is_empty() {
            tasks.clear();
            return Ok(());
        }
        session.decode()?;
        let rows: Vec<&[f32]> = (0..predicted.len()).map(|i| session.row(i)).collect::<Result<_>>()?;
        let found: Option<Vec<f64>> = session.pool.install(|| {
            rows.par_iter().zip(&predicted).map(|(row, &(_, _, token))| sample::logprob(row, token)).collect()
        });
        for ((r, c, _), logprob) in predicted.into_iter().zip(found.ok_or_else(|| session.no_distribution())?)
        {
            logprobs[r][c].push(logprob);
        }
    }
}
