//! Many prompts times k samples, through a fixed number of slots.
//!
//! A prompt is decoded once, in the prompt slot. Each of its samples gets a copy of that KV in a slot
//! of its own; a slot whose sample ends takes the next sample at once, so that the batch stays full.
//! When no samples are left to start, the slots that still run are moved together, because llama.cpp
//! computes only neighbouring sequences in one go.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::error::{Error, Result};

use super::sample::{self, Choice};
use super::{Sampling, Session, Token};

/// A prompt to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Names the prompt's random streams; unique within a run.
    pub id: String,
    /// The prompt, with BOS where the model wants one.
    pub tokens: Vec<Token>,
}

/// What to generate for each prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GenerateOptions {
    /// Continuations a prompt.
    pub k: u32,
    /// Most tokens a continuation.
    pub n_predict: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// The run's seed.
    pub seed: u64,
    /// Go on after an end-of-generation token (`--ignore-eos`); for measuring speed.
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
    /// Its number among the k of its prompt, from 0.
    pub sample: u32,
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<Token>,
    /// Sum of the tokens' natural log-probabilities under the model (temperature 1, nothing cut).
    pub logprob: f64,
    /// Why it ended.
    pub finish: Finish,
}

/// Where the time of a generation went.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GenerateStats {
    /// Tokens of prompts decoded.
    pub n_prompt: usize,
    /// Tokens of continuations decoded; the last token of a continuation never is.
    pub n_decoded: usize,
    /// Steps that decoded continuations.
    pub n_steps: usize,
    /// Time spent on decoding prompts.
    pub prompt_time: Duration,
    /// Time spent on starting samples: their first tokens, and copies of their prompts' KV.
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
    /// Takes a chosen token; says whether the continuation has ended, and why.
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
    /// Logits after its last token, `[n_vocab]`: the first token of each sample is chosen from them.
    logits: Vec<f32>,
}

/// Samples `options.k` continuations of each request; `done` gets each as it ends.
///
/// Which text comes out depends on the requests, the options and the session's shape (slots, batch,
/// threads), in the order given: the same call on the same build gives the same tokens. Another shape
/// can change the last bits of logits, and so now and then a token.
///
/// Errors: [`Error::PromptTooLong`] before anything runs; [`Error::Interrupted`] once `interrupt` is
/// set; [`Error::Decode`] and [`Error::Model`] when llama.cpp fails or gives NaN.
pub fn generate(
    session: &mut Session,
    requests: &[Request],
    options: &GenerateOptions,
    interrupt: &AtomicBool,
    mut done: impl FnMut(Continuation) -> Result<()>,
) -> Result<GenerateStats> {
    options.sampling.validate()?;
    for request in requests {
        session.check_fits(&request.id, request.tokens.len(), options.n_predict)?;
    }
    if options.n_predict == 0 {
        return Err(Error::setting("-n/--n-predict", "expected a number from 1 up, found 0"));
    }
    session.context.clear();

    let mut stats = GenerateStats::default();
    let mut waiting: VecDeque<(usize, u32)> =
        (0..requests.len()).flat_map(|r| (0..options.k).map(move |s| (r, s))).collect();
    let mut free: Vec<usize> = (1..=session.n_parallel()).rev().collect();
    let mut running: Vec<Running> = Vec::with_capacity(session.n_parallel());
    let mut loaded: Option<Loaded> = None;

    loop {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let (started, before) = (Instant::now(), stats.prompt_time);
        while let (Some(&slot), Some(&(request, sample))) = (free.last(), waiting.front()) {
            let prompt = &requests[request];
            let current = match &mut loaded {
                Some(l) if l.request == request => l,
                _ => {
                    let started = Instant::now();
                    let logits = session.load_prompt(&prompt.tokens)?;
                    stats.prompt_time += started.elapsed();
                    stats.n_prompt += prompt.tokens.len();
                    loaded.insert(Loaded { request, logits })
                }
            };
            waiting.pop_front();
            let mut random = sample::random_stream(options.seed, &prompt.id, sample);
            let choice = sample::choose(&current.logits, &options.sampling, &mut random)
                .ok_or_else(|| session.no_distribution())?;
            let n_prompt = prompt.tokens.len();
            let mut new =
                Running { slot, request, sample, n_prompt, tokens: Vec::new(), logprob: 0.0, random };
            match new.take(choice, session, options) {
                Some(finish) => done(new.finished(finish))?,
                None => {
                    free.pop();
                    session.fork_prompt(slot);
                    running.push(new);
                }
            }
        }
        stats.start_time += (started.elapsed() + before).saturating_sub(stats.prompt_time);
        if running.is_empty() {
            return Ok(stats);
        }

        running.sort_unstable_by_key(|r| r.slot);
        if waiting.is_empty() {
            close_gaps(session, &mut running, &mut free);
        }
        let started = Instant::now();
        session.batch.clear();
        for r in &running {
            // `take` put a token there before the continuation started to run, and after every step.
            let last = *r.tokens.last().expect("a running continuation has a token");
            session.batch.push(last, r.n_prompt + r.tokens.len() - 1, r.slot, true);
        }
        session.decode()?;
        stats.decode_time += started.elapsed();
        stats.n_decoded += running.len();
        stats.n_steps += 1;

        let started = Instant::now();
        let choices = choose_all(session, &mut running, &options.sampling)?;
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
        running = left;
        // The lowest free slot goes first, so that the slots in use stay neighbours.
        free.sort_unstable_by(|a, b| b.cmp(a));
    }
}

/// One choice for each running continuation, from the rows of the last decode, in parallel.
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

/// Moves running sequences together where there is a gap between them: from the highest slots into free
/// ones below. `running` is in order of slot, and stays so.
fn close_gaps(session: &mut Session, running: &mut [Running], free: &mut [usize]) {
    let n = running.len();
    let first = running.first().map_or(0, |r| r.slot);
    if running.last().is_none_or(|last| last.slot - first < n) {
        return;
    }
    for slot in free.iter_mut().filter(|slot| **slot <= n) {
        // As many running slots lie above n as free ones lie at or below it.
        if let Some(highest) = running.iter_mut().max_by_key(|r| r.slot) {
            session.context.remove(*slot);
            session.context.copy(highest.slot, *slot);
            std::mem::swap(&mut highest.slot, slot);
        }
    }
    running.sort_unstable_by_key(|r| r.slot);
}
