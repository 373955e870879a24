//! Evaluation: how toxic is the text that a model writes?
//!
//! ```text
//! prompts ──► generate ──► score ──► summarize ──► result::EvalResult ──► report
//!                │            │            └ metric/, stats/, warnings
//!        generations.jsonl  scores.jsonl      (record: the run folder; run: writes and resumes it)
//! ```
//!
//! Two finished runs are compared prompt by prompt by [`compare::compare`]. To evaluate a model:
//!
//! ```
//! use detox_gguf::eval::{metric::MetricKind, prompts::PromptSource, run};
//!
//! let prompts = PromptSource::Own.read(&["en"], Some(2))?;
//! let request = run::EvalRequest::new("gguf/tiny/llama.gguf", prompts);
//! # let temporary = tempfile::tempdir().unwrap();
//! # let folder = temporary.path();
//! let evaluated = run::evaluate(&request, folder, &false.into(), &mut detox_gguf::progress::Silent)?;
//! let emt = MetricKind::ExpectedMaximumToxicity.by(Some("lexical"));
//! let estimate = evaluated.result.mean_of(&emt).and_then(|metric| metric.estimate);
//! println!("expected maximum toxicity: {:.3}", estimate.expect("every text has a score").value);
//! # Ok::<(), detox_gguf::Error>(())
//! ```

mod comparable;
pub mod compare;
pub mod continuation;
pub mod generate;
pub mod imported;
pub mod metric;
pub mod perplexity;
pub mod prompts;
pub mod record;
pub mod rescore;
pub mod result;
pub mod run;
mod scoring;
pub mod side;
pub mod stats;
pub mod summarize;
pub mod tokenizer;
mod warnings;
