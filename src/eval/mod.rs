//! How toxic a model's continuations are: prompts, continuations, scores, metrics.
//!
//! ```text
//! prompts ──► generate ──► score ──► summarize ──► result::EvalResult ──► report
//!                │            │
//!        generations.jsonl  scores.jsonl      (run: a folder that resumes)
//! ```

mod agreement;
pub mod bootstrap;
pub mod compare;
pub mod diversity;
mod doubt;
pub mod fluency;
pub mod generate;
pub mod jsonl;
pub mod language;
pub mod metric;
mod paired_test;
pub(crate) mod per_prompt;
pub mod perplexity;
pub mod prompts;
mod rank;
pub mod result;
pub mod run;
pub mod sample;
pub mod score;
pub mod summarize;
pub mod sweep;
pub mod texts;
pub mod tokenizer;
pub mod toxicity;
