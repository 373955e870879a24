//! Generates k samples of many prompts through a fixed number of slots.
//!
//! A prompt is decoded once, in the prompt slot, and its KV is copied to the slot of each of its samples. When a
//! sample ends, its slot takes the next sample at once, so the batch stays full. When no samples are left to start,
//! the slots still running are moved together, because llama.cpp computes only adjacent sequences in one micro-batch.

use std::iter::Peekable;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::error::{Error, Result};

use super::random::random_stream;
use super::sample::{self, Choice};
use super::{Sampling, Session, Token};

/// A prompt to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Id of the prompt, unique within a run. It selects the prompt's random streams.
    pub id: String,
    /// The prompt, with BOS if the model needs one.
    pub tokens: Vec<Token>,
}

/// What to generate for each prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GenerateOptions {
    /// Continuations per prompt.
    pub k: u32,
    /// Most tokens per continuation.
    pub n_predict: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// The run's seed.
    pub seed: u64,
    /// Continue past an end-of-generation token (`--ignore-eos`), to measure speed.
    pub ignore_eos: bool,
}

/// Why a continuation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// It has `n_predict` tokens.
    Length,
    /// The model chose an end-of-generation token, which is not part of the text.
    Stop,
}

/// A continuation that was sampled before, to be decoded again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written<'a> {
    /// Its tokens, without the end-of-generation token.
    pub tokens: &'a [Token],
    /// Why it ended.
    pub finish: Finish,
}

/// One sampled continuation.
#[derive(Debug, Clone, PartialEq)]
pub struct Continuation {
    /// Index of its prompt among the requests.
    pub request: usize,
    /// Its number among the k samples of its prompt, from 0.
    pub sample: u32,
    /// Its tokens, without the end-of-generation token.
    pub tokens: Vec<Token>,
    /// The tokens' natural log-probabilities under the model, at temperature 1 with nothing cut.
    pub logprobs: Vec<f32>,
    /// Their [`sum`].
    pub logprob: f64,
    /// Why it ended.
    pub finish: Finish,
}

/// The sum of log-probabilities, in order and in f64: a reader of `token_logprobs` gets the same bits.
pub fn sum(logprobs: &[f32]) -> f64 {
    logprobs.iter().map(|&logprob| f64::from(logprob)).sum()
}

/// Token counts and times of a generation.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GenerateStats {
    /// Prompt tokens decoded.
    pub n_prompt: usize,
    /// Continuation tokens decoded. The last token of a continuation is never decoded.
    pub n_decoded: usize,
    /// Steps that decoded continuations.
    pub n_steps: usize,
    /// Time spent decoding prompts.
    pub prompt_time: Duration,
    /// Time spent starting samples: choosing their first tokens, and copying their prompts' KV.
    pub start_time: Duration,
    /// Time spent decoding continuations.
    pub decode_time: Duration,
    /// Time spent choosing tokens.
    pub sample_time: Duration,
}

/// The source of a continuation's tokens.
enum Origin<'a> {
    /// They are sampled.
    Sampled { random: Box<ChaCha8Rng>, options: &'a GenerateOptions },
    /// They were sampled before.
    Written(Written<'a>),
}

impl Origin<'_> {
    /// The next token, after `n_done` others; `None` if the row defines no distribution.
    fn next(&mut self, row: &[f32], n_done: usize) -> Option<Next> {
        match self {
            Origin::Sampled { random, options } => {
                sample::choose(row, &options.sampling, random).map(Next::Token)
            }
            Origin::Written(written) => match written.tokens.get(n_done) {
                Some(&token) => {
                    sample::logprob(row, token).map(|logprob| Next::Token(Choice { token, logprob }))
                }
                None => Some(Next::End),
            },
        }
    }
}

/// The next token of a continuation, or its end.
enum Next {
    Token(Choice),
    /// The end of a written continuation that had stopped.
    End,
}

/// A continuation in progress.
struct Running<'a> {
    slot: usize,
    request: usize,
    sample: u32,
    n_prompt: usize,
    tokens: Vec<Token>,
    logprobs: Vec<f32>,
    origin: Origin<'a>,
}

impl Running<'_> {
    /// Adds a token; returns why the continuation ended, if it did.
    fn take(&mut self, next: Next, session: &Session) -> Option<Finish> {
        let Next::Token(choice) = next else { return Some(Finish::Stop) };
        let is_last = match &self.origin {
            Origin::Sampled { options, .. } => {
                if !options.ignore_eos && session.model().is_end_of_generation(choice.token) {
                    return Some(Finish::Stop);
                }
                self.tokens.len() + 1 >= options.n_predict
            }
            // The last token of one that stopped is decoded once more, as when it was sampled, so that every
            // batch has the same shape.
            Origin::Written(written) => {
                written.finish == Finish::Length && self.tokens.len() + 1 >= written.tokens.len()
            }
        };
        self.tokens.push(choice.token);
        self.logprobs.push(choice.logprob as f32);
        is_last.then_some(Finish::Length)
    }

    fn finished(self, finish: Finish) -> Continuation {
        let Running { request, sample, tokens, logprobs, .. } = self;
        let logprob = sum(&logprobs);
        Continuation { request, sample, tokens, logprobs, logprob, finish }
    }
}

/// The prompt in the prompt slot.
struct Loaded {
    request: usize,
    /// Logits after its last token, `[n_vocab]`. The first token of each sample is chosen from them.
    logits: Vec<f32>,
}

/// Samples `options.k` continuations of each request, and passes each to `done` when it ends.
///
/// The same call on the same build gives the same tokens. They depend on the requests and their order, the options,
/// and the session's shape (slots, batch, threads). Another shape can change the last bits of the logits, and
/// occasionally a token.
///
/// Errors: [`Error::PromptTooLong`] before anything runs; [`Error::Interrupted`] once `interrupt` is set;
/// [`Error::Decode`] if llama.cpp fails; [`Error::Model`] if logits are NaN; and any error that `done` returns.
pub fn generate(
    session: &mut Session,
    requests: &[Request],
    options: &GenerateOptions,
    interrupt: &AtomicBool,
    mut done: impl FnMut(Continuation) -> Result<()>,
) -> Result<GenerateStats> {
    options.sampling.validate()?;
    session.model().files().check_content()?;
    for request in requests {
        session.check_fits(&request.id, request.tokens.len(), options.n_predict)?;
    }
    if options.n_predict == 0 {
        return Err(Error::setting("-n/--n-predict", "expected at least 1, found 0"));
    }
    let waiting = (0..requests.len()).flat_map(|r| (0..options.k).map(move |s| (r, s)));
    let origin = |request: usize, sample: u32| {
        let random = Box::new(random_stream(options.seed, &requests[request].id, sample));
        Origin::Sampled { random, options }
    };
    run(session, requests, Box::new(waiting), &origin, interrupt, &mut done)
}

/// Decodes continuations that were sampled before, in the same batches, for their log-probabilities.
///
/// `written` has the continuations of each request. Passes each to `done`. Without a change of the model, the steering
/// and the session's shape, the log-probabilities have the same bits as those of [`generate`].
///
/// Errors: as [`generate`].
pub fn replay(
    session: &mut Session,
    requests: &[Request],
    written: &[Vec<Written<'_>>],
    interrupt: &AtomicBool,
    mut done: impl FnMut(Continuation) -> Result<()>,
) -> Result<GenerateStats> {
    for (request, written) in requests.iter().zip(written) {
        let longest = written.iter().map(|w| w.tokens.len()).max().unwrap_or(0);
        session.check_fits(&request.id, request.tokens.len(), longest)?;
    }
    let waiting =
        written.iter().enumerate().flat_map(|(r, written)| (0..written.len() as u32).map(move |s| (r, s)));
    let origin = |request: usize, sample: u32| {
        let mut written = written[request][sample as usize];
        // Nothing was chosen after the prompt, so it ended there.
        if written.tokens.is_empty() {
            written.finish = Finish::Stop;
        }
        Origin::Written(written)
    };
    run(session, requests, Box::new(waiting), &origin, interrupt, &mut done)
}

/// Decodes the continuations in `waiting`, pairs of a request and a sample, in this order.
fn run<'a>(
    session: &mut Session,
    requests: &[Request],
    waiting: Waiting<'a>,
    origin: &impl Fn(usize, u32) -> Origin<'a>,
    interrupt: &AtomicBool,
    done: &mut impl FnMut(Continuation) -> Result<()>,
) -> Result<GenerateStats> {
    session.context.clear();
    let n_parallel = session.n_parallel();
    let mut schedule = Schedule {
        waiting: waiting.peekable(),
        free: (1..=n_parallel).rev().collect(),
        running: Vec::with_capacity(n_parallel),
        loaded: None,
        stats: GenerateStats::default(),
    };
    loop {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        schedule.fill_slots(session, requests, origin, done)?;
        if schedule.running.is_empty() {
            session.model().files().check_content()?;
            return Ok(schedule.stats);
        }
        schedule.step(session, done)?;
    }
}

/// Pairs of a request and the number of a sample, in the order in which they start.
type Waiting<'a> = Box<dyn Iterator<Item = (usize, u32)> + 'a>;

/// The samples of one call of [`generate`]: those waiting, and those in slots.
struct Schedule<'a> {
    /// The samples that have not started, in order. An iterator, because there may be billions.
    waiting: Peekable<Waiting<'a>>,
    /// Free slots, the highest first.
    free: Vec<usize>,
    running: Vec<Running<'a>>,
    loaded: Option<Loaded>,
    stats: GenerateStats,
}

impl<'a> Schedule<'a> {
    /// Starts waiting samples until no slot is free.
    fn fill_slots(
        &mut self,
        session: &mut Session,
        requests: &[Request],
        origin: &impl Fn(usize, u32) -> Origin<'a>,
        done: &mut impl FnMut(Continuation) -> Result<()>,
    ) -> Result<()> {
        let (started, before) = (Instant::now(), self.stats.prompt_time);
        while let (Some(&slot), Some(&(request, sample))) = (self.free.last(), self.waiting.peek()) {
            let prompt = &requests[request];
            let current = match &mut self.loaded {
                Some(l) if l.request == request => l,
                _ => {
                    let started = Instant::now();
                    let logits = session.load_prompt(&prompt.tokens)?;
                    self.stats.prompt_time += started.elapsed();
                    self.stats.n_prompt += prompt.tokens.len();
                    self.loaded.insert(Loaded { request, logits })
                }
            };
            self.waiting.next();
            let mut origin = origin(request, sample);
            let next = origin.next(&current.logits, 0).ok_or_else(|| session.no_distribution())?;
            let n_prompt = prompt.tokens.len();
            let (tokens, logprobs) = (Vec::new(), Vec::new());
            let mut new = Running { slot, request, sample, n_prompt, tokens, logprobs, origin };
            match new.take(next, session) {
                Some(finish) => done(new.finished(finish))?,
                None => {
                    self.free.pop();
                    session.fork_prompt(slot);
                    self.running.push(new);
                }
            }
        }
        self.stats.start_time += (started.elapsed() + before).saturating_sub(self.stats.prompt_time);
        Ok(())
    }

    /// Decodes one token of each running continuation, and chooses the next.
    fn step(
        &mut self,
        session: &mut Session,
        done: &mut impl FnMut(Continuation) -> Result<()>,
    ) -> Result<()> {
        let Schedule { waiting, free, running, stats, .. } = self;
        running.sort_unstable_by_key(|r| r.slot);
        if waiting.peek().is_none() {
            close_gaps(session, running, free);
        }
        let started = Instant::now();
        session.batch.clear();
        for r in running.iter() {
            // `take` added a token before the continuation started to run, and another after every step.
            let last = *r.tokens.last().expect("a running continuation has a token");
            session.batch.push(last, r.n_prompt + r.tokens.len() - 1, r.slot, true);
        }
        session.decode()?;
        stats.decode_time += started.elapsed();
        stats.n_decoded += running.len();
        stats.n_steps += 1;

        let started = Instant::now();
        let found = next_of_each(session, running)?;
        stats.sample_time += started.elapsed();
        let mut left = Vec::with_capacity(running.capacity());
        for (mut r, next) in running.drain(..).zip(found) {
            match r.take(next, session) {
                Some(finish) => {
                    free.push(r.slot);
                    done(r.finished(finish))?;
                }
                None => left.push(r),
            }
        }
        *running = left;
        // The lowest free slot is used first, so that the used slots stay adjacent.
        free.sort_unstable_by(|a, b| b.cmp(a));
        Ok(())
    }
}

/// Finds the next token of each running continuation in parallel, from the logits of the last decode.
fn next_of_each(session: &Session, running: &mut [Running<'_>]) -> Result<Vec<Next>> {
    let rows: Vec<&[f32]> = (0..running.len()).map(|i| session.row(i)).collect::<Result<_>>()?;
    let found: Option<Vec<Next>> = session.pool.install(|| {
        running.par_iter_mut().zip(rows).map(|(r, row)| r.origin.next(row, r.tokens.len())).collect()
    });
    found.ok_or_else(|| session.no_distribution())
}

/// Closes the gaps between running sequences, by moving the highest into free slots below.
///
/// `running` is in order of slot, before and after.
fn close_gaps(session: &mut Session, running: &mut [Running<'_>], free: &mut [usize]) {
    let n = running.len();
    let first = running.first().map_or(0, |r| r.slot);
    if running.last().is_none_or(|last| last.slot - first < n) {
        return;
    }
    for slot in free.iter_mut().filter(|slot| **slot <= n) {
        // There are as many running slots above n as free slots at or below it.
        if let Some(highest) = running.iter_mut().max_by_key(|r| r.slot) {
            session.context.remove(*slot);
            session.context.copy(highest.slot, *slot);
            std::mem::swap(&mut highest.slot, slot);
        }
    }
    running.sort_unstable_by_key(|r| r.slot);
}
