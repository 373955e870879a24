//! Whether a model's sequences may be decoded together.
//!
//! For some architectures llama.cpp mixes up the states of sequences that share a batch: it aborts, or computes wrong
//! logits without a word. So only proven architectures share batches. Those of [`ARCHITECTURES`] are compared with a
//! reference in the tests. Recurrent and hybrid ones are never tried, because trying can abort the process. All
//! others are tried once per model.
//!
//! [`ARCHITECTURES`]: crate::graph::ARCHITECTURES

use crate::error::Result;
use crate::graph::Architecture;
use crate::memory;

use super::Token;
use super::model::Model;
use super::options::SessionOptions;
use super::sample;
use super::session::{CELLS, Session};

/// More sequences than this decode no faster on a CPU, measured with `bench generate`.
const MOST_PARALLEL: usize = 100;

/// The largest mean KL divergence, in nats per token, between sequences decoded together and alone.
///
/// Rounding alone gives at most 2e-2 even on quantised weights (`check::bounds::ROUNDING_MAX`), and 1e-9 on F32.
/// A mixed-up sequence sees other words, and moves a trained model by more than 1.
const MOST_KL: f64 = 2e-2;

impl SessionOptions {
    /// The number of sequences to decode at once, if each needs `n_ctx_seq` tokens.
    ///
    /// Without `-np` this is as many as a quarter of the machine's memory holds, and at most 100. It depends on
    /// total memory rather than free memory, so the same command chooses the same number. A model whose sequences
    /// cannot share a batch decodes one at a time, whatever is asked for.
    pub fn resolve_parallel(&self, model: &Model, n_ctx_seq: usize) -> usize {
        let n_parallel = self.n_parallel.unwrap_or_else(|| {
            let quarter = usize::try_from(memory::total_bytes() / 4).unwrap_or(usize::MAX);
            let of_memory =
                quarter / (self.kv_bytes_per_cell(model) * n_ctx_seq.next_multiple_of(CELLS)).max(1);
            // With -c the sequences share the given context.
            let of_context = self.n_ctx.map_or(MOST_PARALLEL, |n_ctx| n_ctx / n_ctx_seq.max(1));
            MOST_PARALLEL.min(of_memory).min(of_context).min(self.n_batch).max(1)
        });
        if n_parallel > 1 && !shares_batches(model, self) { 1 } else { n_parallel }
    }
}

/// Whether sequences of `model` may be decoded together. Found out at the first call, with its options.
fn shares_batches(model: &Model, options: &SessionOptions) -> bool {
    *model.shares_batches.get_or_init(|| may_share_batches(model, options))
}

/// Decides whether sequences of `model` may share batches, and warns if not.
fn may_share_batches(model: &Model, options: &SessionOptions) -> bool {
    if Architecture::find(model.architecture()).is_some() {
        return true;
    }
    let reason = match model.handle.has_state() {
        true => {
            "llama.cpp keeps a recurrent state for it, which is not proven for several sequences".to_owned()
        }
        false => match divergence(model, options) {
            Ok(kl) if kl <= MOST_KL => return true,
            Ok(kl) => format!(
                "two sequences decoded together differ from each alone: expected a mean KL up to {MOST_KL}, found {kl:.3}"
            ),
            Err(error) => format!("two sequences could not be decoded together: {error}"),
        },
    };
    tracing::warn!(
        "{}: decoding one sequence at a time, which is slower (architecture {:?}: {reason})",
        model.path().display(),
        model.architecture()
    );
    false
}

/// The mean KL divergence, in nats per token, between a continuation decoded together with another, and decoded alone.
///
/// Follows `schedule`: prompts of different lengths are decoded, copied to their slots, and continued in one batch.
fn divergence(model: &Model, options: &SessionOptions) -> Result<f64> {
    let n_vocab = model.n_vocab() as Token;
    let tokens = |first: Token, n: Token| -> Vec<Token> {
        (0..n).map(|i| (first + 37 * i).rem_euclid(n_vocab.max(1))).collect()
    };
    let prompts = [tokens(11, 7), tokens(23, 4)];
    let next = [tokens(5, 2), tokens(17, 2)];
    let unsteered = model.clone().without_steering();
    let mut session = Session::open_with_slots(&unsteered, options, 2, 16, false)?;
    let mut alone = Vec::new();
    for (prompt, next) in prompts.iter().zip(&next) {
        let mut rows = session.logits(&[prompt.as_slice(), next].concat())?;
        alone.push(rows.split_off(prompt.len()));
    }
    session.context.clear();
    for (i, prompt) in prompts.iter().enumerate() {
        session.load_prompt(prompt)?;
        session.fork_prompt(i + 1);
    }
    let mut divergences = Vec::new();
    for step in 0..next[0].len() {
        session.batch.clear();
        for (i, prompt) in prompts.iter().enumerate() {
            session.batch.push(next[i][step], prompt.len() + step, i + 1, true);
        }
        session.decode()?;
        for (i, alone) in alone.iter().enumerate() {
            divergences.push(kl(&alone[step], session.row(i)?).unwrap_or(f64::INFINITY));
        }
    }
    Ok(divergences.iter().sum::<f64>() / divergences.len() as f64)
}

/// KL(p || q) in nats of two rows of logits; `None` if one of them defines no distribution.
fn kl(p: &[f32], q: &[f32]) -> Option<f64> {
    let mut sum = 0.0;
    for token in 0..p.len() as Token {
        let (p, q) = (sample::logprob(p, token)?, sample::logprob(q, token)?);
        if p > f64::NEG_INFINITY {
            sum += p.exp() * (p - q);
        }
    }
    (!sum.is_nan()).then_some(sum)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::engine::ModelOptions;
    use crate::engine::Sampling;
    use crate::engine::schedule::{self, GenerateOptions, Request};

    fn tiny(name: &str) -> Model {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("gguf/tiny/{name}.gguf"));
        Model::open(&path, &ModelOptions::default()).unwrap()
    }

    fn options(n_parallel: usize) -> SessionOptions {
        SessionOptions { n_parallel: Some(n_parallel), n_threads: Some(1), ..SessionOptions::default() }
    }

    #[test]
    fn the_trial_finds_that_proven_architectures_batch_rightly() {
        for name in ["llama", "gemma3", "gpt2"] {
            let kl = divergence(&tiny(name), &options(1)).unwrap();
            assert!(kl < 1e-6, "{name}: {kl}");
        }
    }

    #[test]
    fn kl_is_that_of_the_definition() {
        // p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3).
        let kl_of = |q: &[f32]| kl(&[0.0, 0.0], q);
        assert!((kl_of(&[0.0, 3f32.ln()]).unwrap() - 0.5 * (4f64 / 3.0).ln()).abs() < 1e-6);
        assert!(kl_of(&[1.0, 1.0]).unwrap().abs() < 1e-12);
        assert_eq!(kl_of(&[f32::NAN, 1.0]), None);
    }

    #[test]
    fn a_hybrid_model_runs_one_sequence_at_a_time_with_the_log_probs_of_each_alone() {
        let model = tiny("plamo2");
        for (n_parallel, n_batch, n_ubatch) in [(8, 2048, 512), (1, 2048, 512), (8, 3, 2)] {
            let options = SessionOptions { n_batch, n_ubatch, ..options(n_parallel) };
            if n_batch < n_parallel {
                assert_eq!(options.resolve_parallel(&model, 32), 1);
            }
            let mut session = Session::open(&model, &options, 32).unwrap();
            assert_eq!(session.n_parallel(), 1);
            let prompts = [vec![1, 7, 20, 33, 4], vec![9, 8], vec![12, 3, 14]];
            let requests: Vec<Request> =
                (0..3).map(|i| Request { id: i.to_string(), tokens: prompts[i].clone() }).collect();
            let generate =
                GenerateOptions { k: 3, n_predict: 5, sampling: Sampling::PAPER, seed: 1, ignore_eos: true };
            let mut found = Vec::new();
            let no_interrupt = std::sync::atomic::AtomicBool::new(false);
            let take = |c| {
                found.push(c);
                Ok(())
            };
            schedule::generate(&mut session, &requests, &generate, &no_interrupt, take).unwrap();
            assert_eq!(found.len(), 9);
            for c in found {
                // A session of its own for each text: nothing is left over from another.
                let mut alone = Session::open(&model, &self::options(1), 32).unwrap();
                let text = [prompts[c.request].as_slice(), &c.tokens].concat();
                let rows = alone.logits(&text).unwrap();
                let n_prompt = prompts[c.request].len();
                let expected: f64 = (0..c.tokens.len())
                    .map(|i| sample::logprob(&rows[n_prompt - 1 + i], c.tokens[i]).unwrap())
                    .sum();
                assert!((c.logprob - expected).abs() < 1e-4, "{} {expected}", c.logprob);
            }
            let each = session.logits_of_each(&[&prompts[0], &prompts[1]]).unwrap();
            for (rows, prompt) in each.iter().zip(&prompts) {
                let mut alone = Session::open(&model, &self::options(1), 32).unwrap();
                assert!(
                    kl(rows.last().unwrap(), alone.logits(prompt).unwrap().last().unwrap()).unwrap() < 1e-6
                );
            }
        }
    }
}
