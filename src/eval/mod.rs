//! How toxic a model's continuations are: prompts, continuations, scores, metrics.
//!
//! ```text
//! prompts ──► generate ──► score ──► summarize ──► result::EvalResult ──► report
//!                │            │
//!        generations.jsonl  scores.jsonl      (run: a folder that resumes)
//! ```

pub mod compare;
pub mod continuation;
pub mod generate;
pub mod imported;
pub mod metric;
pub mod perplexity;
pub mod prompts;
pub mod record;
pub mod result;
pub mod run;
pub mod side;
pub mod stats;
pub mod summarize;
pub mod tokenizer;
mod warnings;
