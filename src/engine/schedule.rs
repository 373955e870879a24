//! Generates k samples of many prompts through a fixed number of slots.
//!
//! A prompt is decoded once, in the prompt slot, and its KV is copied to the slot of each of its samples. When a
//! sample ends, its slot takes the next sample at once, so the batch stays full. When no samples are left to start,
//! the slots still running are moved together, because llama.cpp computes only adjacent sequences in one micro-batch.

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

/// One sampled continuation.
#[derive(Debug, Clone, PartialEq)]
pub struct Continuation {
    /// Index of its prompt among the requests.
    pub request: usize,
    /// Its number among the k samples of its prompt, from 0.
    pub sample: u32,
    /// Its tokens, without the end-of-generation token.
    pub tokens: Vec<Token>,
    /// Sum of the tokens' natural log-probabilities under the model, at temperature 1 with nothing cut.
    pub logprob: f64,
    /// Why it ended.
    pub finish: Finish,
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

/// A continuation in progress.
struct Running {
    slot: usize,
    request: usize,
    sample: u32,
    n_prompt: usize,
    tokens: Vec<Token>,
    logprob: f64,
    random: ChaCha8Rng,
}

impl Running {
    /// Adds a chosen token; returns why the continuation ended, if it did.
    fn take(&mut self, choice: Choice, session: &Session, options: &GenerateOptions) -> Option<Finish> {
        if !options.ignore_eos && session.model().is_end_of_generation(choice.token) {
            return Some(Finish::Stop);
        }
        self.tokens.push(choice.token);
        self.logprob += choice.logprob;
        (self.tokens.len() >= options.n_predict).then_some(Finish::Length)
    }

    fn finished(self, finish: Finish) -> Continuation {
        let Running { request, sample, tokens, logprob, .. } = self;
        Continuation { request, sample, tokens, logprob, finish }
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
    session.context.clear();
    let n_parallel = session.n_parallel();
    let mut schedule = Schedule {
        waiting: Waiting { next: (0, 0), n_requests: requests.len(), k: options.k },
        free: (1..=n_parallel).rev().collect(),
        running: Vec::with_capacity(n_parallel),
        loaded: None,
        stats: GenerateStats::default(),
    };
    loop {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        schedule.fill_slots(session, requests, options, &mut done)?;
        if schedule.running.is_empty() {
            session.model().files().check_content()?;
            return Ok(schedule.stats);
        }
        schedule.step(session, options, &mut done)?;
    }
}

/// The samples that have not started, in order. Counted, not listed: there may be billions.
struct Waiting {
    /// Request and number of the next sample.
    next: (usize, u32),
    n_requests: usize,
    k: u32,
}

impl Waiting {
    fn front(&self) -> Option<(usize, u32)> {
        (self.k > 0 && self.next.0 < self.n_requests).then_some(self.next)
    }

    fn pop_front(&mut self) {
        let (request, sample) = self.next;
        self.next = if sample + 1 < self.k { (request, sample + 1) } else { (request + 1, 0) };
    }

    fn is_empty(&self) -> bool {
        self.front().is_none()
    }
}

/// The samples of one call of [`generate`]: those waiting, and those in slots.
struct Schedule {
    waiting: Waiting,
    /// Free slots, the highest first.
    free: Vec<usize>,
    running: Vec<Running>,
    loaded: Option<Loaded>,
    stats: GenerateStats,
}

impl Schedule {
    /// Starts waiting samples until no slot is free.
    fn fill_slots(
        &mut self,
        session: &mut Session,
        requests: &[Request],
        options: &GenerateOptions,
        done: &mut impl FnMut(Continuation) -> Result<()>,
    ) -> Result<()> {
        let (started, before) = (Instant::now(), self.stats.prompt_time);
        while let (Some(&slot), Some((request, sample))) = (self.free.last(), self.waiting.front()) {
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
            self.waiting.pop_front();
            let mut random = random_stream(options.seed, &prompt.id, sample);
            let choice = sample::choose(&current.logits, &options.sampling, &mut random)
                .ok_or_else(|| session.no_distribution())?;
            let n_prompt = prompt.tokens.len();
            let mut new =
                Running { slot, request, sample, n_prompt, tokens: Vec::new(), logprob: 0.0, random };
            match new.take(choice, session, options) {
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
        options: &GenerateOptions,
        done: &mut impl FnMut(Continuation) -> Result<()>,
    ) -> Result<()> {
        let Schedule { waiting, free, running, stats, .. } = self;
        running.sort_unstable_by_key(|r| r.slot);
        if waiting.is_empty() {
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
        let choices = choose_all(session, running, &options.sampling)?;
        stats.sample_time += started.elapsed();
        let mut left = Vec::with_capacity(running.capacity());
        for (mut r, choice) in running.drain(..).zip(choices) {
            match r.take(choice, session, options) {
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

/// Chooses a token for each running continuation in parallel, from the logits of the last decode.
fn choose_all(session: &Session, running: &mut [Running], sampling: &Sampling) -> Result<Vec<Choice>> {
    let rows: Vec<&[f32]> = (0..running.len()).map(|i| session.row(i)).collect::<Result<_>>()?;
    let choices: Option<Vec<Choice>> = session.pool.install(|| {
        running
            .par_iter_mut()
            .zip(rows)
            .map(|(r, row)| sample::choose(row, sampling, &mut r.random))
            .collect()
    });
    choices.ok_or_else(|| session.no_distribution())
}

/// Closes the gaps between running sequences, by moving the highest into free slots below.
///
/// `running` is in order of slot, before and after.
fn close_gaps(session: &mut Session, running: &mut [Running], free: &mut [usize]) {
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
