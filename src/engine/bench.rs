//! How fast this build generates, in the terms of llama.cpp's own `llama-batched-bench -pps`.

use std::sync::atomic::AtomicBool;

use rand_core::Rng;
use serde::Serialize;

use crate::error::{Error, Result};

use super::model::Model;
use super::schedule::{self, GenerateOptions, GenerateStats, Request};
use super::session::{Session, SessionOptions};
use super::{Sampling, Token, sample};

/// One line of the table: `n_parallel` continuations of one prompt, decoded together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchRow {
    /// Sequences decoded at once.
    pub n_parallel: usize,
    /// Tokens in the prompt.
    pub n_prompt: usize,
    /// Tokens decoded in each sequence.
    pub n_predict: usize,
    /// Runs, of which the medians follow.
    pub n_runs: usize,
    /// Tokens a second, decoding and sampling together; prompts and the start of samples apart.
    pub generate_tokens_per_second: f64,
    /// Tokens a second of decoding alone: what `llama-batched-bench` calls S_TG.
    pub decode_tokens_per_second: f64,
    /// Share of the time of a step spent choosing tokens, in [0, 1].
    pub sample_share: f64,
    /// Tokens a second of prompt.
    pub prompt_tokens_per_second: f64,
}

/// Measures generation at each number of sequences in `parallel`.
///
/// The prompt is `n_prompt` random tokens, shared; each sequence then decodes exactly `n_predict`
/// tokens (the first token of a continuation is chosen from the prompt's logits, so `n_predict + 1`
/// are generated), end-of-generation tokens notwithstanding. The first run of each line is not counted.
#[allow(clippy::too_many_arguments, reason = "flat named parameters of one measurement, from one caller")]
pub fn bench(
    model: &Model,
    options: &SessionOptions,
    sampling: Sampling,
    parallel: &[usize],
    n_prompt: usize,
    n_predict: usize,
    n_runs: usize,
    interrupt: &AtomicBool,
) -> Result<Vec<BenchRow>> {
    for (flag, n) in [("--n-prompt", n_prompt), ("-n/--n-predict", n_predict), ("--runs", n_runs)] {
        if n == 0 {
            return Err(Error::setting(flag, "expected a number from 1 up, found 0"));
        }
    }
    parallel
        .iter()
        .map(|&n| bench_row(model, options, sampling, n, n_prompt, n_predict, n_runs, interrupt))
        .collect()
}

#[allow(clippy::too_many_arguments, reason = "flat named parameters of one measurement, from one caller")]
fn bench_row(
    model: &Model,
    options: &SessionOptions,
    sampling: Sampling,
    n_parallel: usize,
    n_prompt: usize,
    n_predict: usize,
    n_runs: usize,
    interrupt: &AtomicBool,
) -> Result<BenchRow> {
    let options = SessionOptions { n_parallel: Some(n_parallel), ..options.clone() };
    let mut session = Session::open(model, &options, n_prompt + n_predict + 1)?;
    let requests = [Request { id: "bench".into(), tokens: random_tokens(model, n_prompt) }];
    let generate = GenerateOptions {
        k: u32::try_from(n_parallel).unwrap_or(u32::MAX),
        n_predict: n_predict + 1,
        sampling,
        seed: 0,
        ignore_eos: true,
    };
    let mut runs = Vec::with_capacity(n_runs);
    for run in 0..=n_runs {
        let stats = schedule::generate(&mut session, &requests, &generate, interrupt, |_| Ok(()))?;
        if run > 0 {
            runs.push(stats);
        }
    }
    let median_of = |rate: &dyn Fn(&GenerateStats) -> f64| {
        let mut rates: Vec<f64> = runs.iter().map(rate).collect();
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    Ok(BenchRow {
        n_parallel,
        n_prompt,
        n_predict,
        n_runs,
        generate_tokens_per_second: median_of(&|s| {
            s.n_decoded as f64 / (s.decode_time + s.sample_time).as_secs_f64()
        }),
        decode_tokens_per_second: median_of(&|s| s.n_decoded as f64 / s.decode_time.as_secs_f64()),
        sample_share: median_of(&|s| {
            s.sample_time.as_secs_f64() / (s.decode_time + s.sample_time).as_secs_f64()
        }),
        prompt_tokens_per_second: median_of(&|s| s.n_prompt as f64 / s.prompt_time.as_secs_f64()),
    })
}

/// Tokens that stand for text, chosen by a fixed seed.
fn random_tokens(model: &Model, n: usize) -> Vec<Token> {
    let mut random = sample::random_stream(0, "bench prompt", 0);
    let n_vocab = model.n_vocab() as u64;
    let mut tokens = Vec::with_capacity(n);
    // A vocabulary of control tokens alone does not exist; the bound keeps a broken one from looping.
    for _ in 0..1000 * n {
        let token = (random.next_u64() % n_vocab) as Token;
        if !model.is_control(token) && !model.is_end_of_generation(token) {
            tokens.push(token);
        }
        if tokens.len() == n {
            break;
        }
    }
    tokens
}
