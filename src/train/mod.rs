//! Training away from toxicity on preference pairs.
//!
//! ```text
//! pairs (prompt, chosen, rejected) ──► tokens ──► split, epoch order
//!
//! adapter (factors A, B) ──► adapter.gguf, for llama.cpp's --lora
//!      │
//!      └─► merge: W + scale alpha / rank B A, into the blocks there are ─► model.gguf
//!                                                                              │
//!                  loaded_back: llama.cpp's logits of both, compared ◄─────────┘
//! ```

pub mod adapter;
pub mod agreement;
pub mod artifact;
pub mod backward;
pub mod checkpoint;
pub mod config;
pub mod cpu;
pub mod device;
pub mod dpo;
pub mod forward;
pub mod linear;
pub mod loaded_back;
pub mod lora;
pub mod memory;
pub mod merge;
pub mod merge_bench;
pub mod metrics;
pub mod optimizer;
pub mod pack;
pub mod pairs;
pub mod parameters;
pub mod reference;
pub mod run;
pub mod settings;
pub mod tokens;
pub mod trainer;
pub mod transformer;

pub use adapter::{Adapter, Factors};
