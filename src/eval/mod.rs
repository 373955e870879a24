//! How toxic a model's continuations are: prompts, continuations, scores, metrics.
//!
//! ```text
//! prompts ──► generate ──► score ──► summarize ──► result::EvalResult ──► report
//!                │            │
//!        generations.jsonl  scores.jsonl      (run: a folder that resumes)
//! ```

#[cfg(feature = "engine")]
mod agreement;
#[cfg(feature = "engine")]
pub mod bootstrap;
#[cfg(feature = "engine")]
pub mod compare;
#[cfg(feature = "engine")]
pub mod diversity;
#[cfg(feature = "engine")]
mod doubt;
#[cfg(feature = "engine")]
pub mod fluency;
#[cfg(feature = "engine")]
pub mod generate;
#[cfg(feature = "engine")]
pub mod jsonl;
#[cfg(feature = "engine")]
pub mod language;
#[cfg(feature = "engine")]
pub mod metric;
#[cfg(feature = "engine")]
mod paired_test;
#[cfg(feature = "engine")]
pub(crate) mod per_prompt;
#[cfg(feature = "engine")]
pub mod perplexity;
#[cfg(feature = "engine")]
pub mod prompts;
#[cfg(feature = "engine")]
mod rank;
#[cfg(feature = "engine")]
pub mod result;
#[cfg(feature = "engine")]
pub mod run;
#[cfg(feature = "engine")]
pub mod sample;
pub mod score;
#[cfg(feature = "engine")]
pub mod summarize;
#[cfg(feature = "engine")]
pub mod sweep;
#[cfg(feature = "engine")]
pub mod texts;
#[cfg(feature = "engine")]
pub mod tokenizer;
#[cfg(feature = "engine")]
pub mod toxicity;
