//! Training away from toxicity on preference pairs.
//!
//! ```text
//! pairs (prompt, chosen, rejected) ──► tokens ──► split, epoch order
//! ```

pub mod backward;
pub mod config;
pub mod cpu;
pub mod device;
pub mod dpo;
pub mod forward;
pub mod linear;
pub mod lora;
pub mod optimizer;
pub mod pack;
pub mod pairs;
pub mod parameters;
pub mod tokens;
pub mod trainer;
pub mod transformer;
