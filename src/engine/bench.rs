//! Measures generation speed, in the terms of llama.cpp's `llama-batched-bench -pps`.

use std::sync::atomic::AtomicBool;

use rand_core::Rng;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::graph::steering::{Change, ControlVector, Edit, Operation, Steering, When};

use super::model::Model;
use super::options::SessionOptions;
use super::random::random_stream;
use super::schedule::{self, GenerateOptions, GenerateStats, Request};
use super::session::Session;
use super::{Sampling, Token};

/// Speed at one number of sequences: continuations of one prompt, decoded together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchRow {
    /// Sequences decoded at once.
    pub n_parallel: usize,
    /// Tokens in the prompt.
    pub n_prompt: usize,
    /// Tokens decoded in each sequence.
    pub n_predict: usize,
    /// Number of timed runs. The figures below are medians over them.
    pub n_runs: usize,
    /// Tokens per second, decoding and sampling. Excludes decoding the prompt and starting the samples.
    pub generate_tokens_per_second: f64,
    /// Tokens per second, decoding only: S_TG in `llama-batched-bench`.
    pub decode_tokens_per_second: f64,
    /// Fraction of a step's time spent on sampling, in [0, 1].
    pub sample_share: f64,
    /// Prompt tokens per second.
    pub prompt_tokens_per_second: f64,
}

/// Measures generation at each number of sequences in `parallel`.
///
/// All sequences share a prompt of `n_prompt` random tokens. Each then decodes exactly `n_predict` tokens, even past
/// an end-of-generation token. It generates `n_predict + 1`, because the first one is chosen from the prompt's
/// logits. One warm-up run per number of sequences is not counted.
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
    check_counts(n_prompt, n_predict, n_runs)?;
    parallel
        .iter()
        .map(|&n| bench_row(model, options, sampling, n, n_prompt, n_predict, n_runs, interrupt))
        .collect()
}

/// The most runs of a benchmark, whose times are kept for the median.
const MOST_RUNS: usize = 10_000;

/// Checks the number of timed runs of a benchmark.
///
/// # Errors
/// [`Error::Setting`].
pub fn check_runs(n_runs: usize) -> Result<()> {
    match (1..=MOST_RUNS).contains(&n_runs) {
        true => Ok(()),
        false => {
            Err(Error::setting("--runs", format!("expected a number from 1 to {MOST_RUNS}, found {n_runs}")))
        }
    }
}

fn check_counts(n_prompt: usize, n_predict: usize, n_runs: usize) -> Result<()> {
    for (flag, n) in [("--n-prompt", n_prompt), ("-n/--n-predict", n_predict)] {
        if n == 0 {
            return Err(Error::setting(flag, "expected at least 1, found 0"));
        }
    }
    check_runs(n_runs)
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
    let mut session = Session::open(model, &options, n_prompt.saturating_add(n_predict).saturating_add(1))?;
    let requests = [Request { id: "bench".into(), tokens: random_tokens(model, n_prompt) }];
    let generate = GenerateOptions {
        k: u32::try_from(n_parallel).unwrap_or(u32::MAX),
        n_predict: n_predict.saturating_add(1),
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
    let median_of = |rate: &dyn Fn(&GenerateStats) -> f64| median(runs.iter().map(rate).collect());
    Ok(BenchRow {
        n_parallel: session.n_parallel(),
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

/// Speed with one kind of steering.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SteeringRow {
    /// The kind of steering.
    pub way: &'static str,
    /// Median tokens per second, decoding and sampling.
    pub tokens_per_second: f64,
    /// Time relative to the unsteered time of the same round; the median over rounds.
    pub relative_time: f64,
}

/// Measures generation unsteered and with several kinds of steering.
///
/// The kinds are a control vector on all layers, and the callback on one layer, on a quarter of the layers and on all
/// layers, with 8 neurons per layer. The offsets of 1e-6 have almost no effect, but cost as much as larger ones. Every
/// round runs all kinds in turn, so all run under the same load. One warm-up round is not counted. Prompt and
/// continuations are as in [`bench()`].
///
/// Errors: as [`bench()`]; [`Error::Model`] for an architecture that the callback does not support.
pub fn bench_steering(
    model: &Model,
    options: &SessionOptions,
    n_parallel: usize,
    n_prompt: usize,
    n_predict: usize,
    n_runs: usize,
    interrupt: &AtomicBool,
) -> Result<Vec<SteeringRow>> {
    check_counts(n_prompt, n_predict, n_runs)?;
    let options = SessionOptions { n_parallel: Some(n_parallel), ..options.clone() };
    let mut sessions = steerings(model)
        .into_iter()
        .map(|(way, steering)| {
            let steered = model.with_steering(steering)?;
            Ok((
                way,
                Session::open(&steered, &options, n_prompt.saturating_add(n_predict).saturating_add(1))?,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let requests = [Request { id: "bench".into(), tokens: random_tokens(model, n_prompt) }];
    let generate = GenerateOptions {
        k: u32::try_from(n_parallel).unwrap_or(u32::MAX),
        n_predict: n_predict.saturating_add(1),
        sampling: Sampling::PAPER,
        seed: 0,
        ignore_eos: true,
    };
    // Seconds per token, `[n_ways][n_runs]`.
    let mut times = vec![Vec::with_capacity(n_runs); sessions.len()];
    for run in 0..=n_runs {
        for ((_, session), times) in sessions.iter_mut().zip(&mut times) {
            let stats = schedule::generate(session, &requests, &generate, interrupt, |_| Ok(()))?;
            if run > 0 {
                times.push((stats.decode_time + stats.sample_time).as_secs_f64() / stats.n_decoded as f64);
            }
        }
    }
    let rows = sessions.iter().zip(&times).map(|((way, _), of_way)| SteeringRow {
        way,
        tokens_per_second: 1.0 / median(of_way.clone()),
        relative_time: median(
            of_way.iter().zip(&times[0]).map(|(time, unsteered)| time / unsteered).collect(),
        ),
    });
    Ok(rows.collect())
}

/// The kinds of steering that [`bench_steering`] compares. The first is no steering.
fn steerings(model: &Model) -> [(&'static str, Steering); 5] {
    const OFFSET: f32 = 1e-6;
    let n_layer = model.n_layer();
    let neurons_of = |layers: std::ops::Range<usize>| Steering {
        edits: layers
            .flat_map(|layer| (0..8).map(move |index| (layer, index)))
            .map(|(layer, index)| Edit {
                layer,
                when: When::Both,
                coefficient: 1.0,
                change: Change::Neuron { index, operation: Operation::Offset(OFFSET) },
            })
            .collect(),
        ..Steering::default()
    };
    let n_embd = model.n_embd();
    let rows = vec![OFFSET; n_embd * n_layer.saturating_sub(1)];
    [
        ("unsteered", Steering::default()),
        (
            "control vector, all layers",
            Steering { control_vector: Some(ControlVector { n_embd, rows }), ..Steering::default() },
        ),
        ("callback, 1 layer", neurons_of(n_layer / 2..n_layer / 2 + 1)),
        ("callback, a quarter of the layers", neurons_of(0..n_layer.div_ceil(4))),
        ("callback, all layers", neurons_of(0..n_layer)),
    ]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Random text tokens, from a fixed seed.
fn random_tokens(model: &Model, n: usize) -> Vec<Token> {
    let mut random = random_stream(0, "bench prompt", 0);
    let n_vocab = model.n_vocab() as u64;
    let mut tokens = Vec::new();
    // Every real vocabulary has text tokens. The bound prevents an endless loop on a broken one.
    for _ in 0..n.saturating_mul(1000) {
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
