//! Training away from toxicity on preference pairs.
//!
//! ```text
//! pairs ──► tokens ──► pack ─────────────┐
//!                                        ▼
//! gguf ──► config, transformer ──► forward ──► dpo ──► backward ──► optimizer        (trainer: one step)
//!         over a device (cpu, cuda)      ▲                              │
//!                                    reference                          ▼
//! settings ──► run: steps, looks at held-out pairs, checkpoint, metrics ──► artifact ──► agreement
//!
//! adapter.gguf ──► merge: W + scale alpha / rank B A, into the blocks there are ──► loaded_back: llama.cpp's word
//! ```
//!
//! - [`device`] is what a processor must do; [`cpu`] does it, as the reference for any other, and `cuda` (with the
//!   feature of that name) on NVIDIA GPUs. [`placement`] says which, and whether a GPU's memory suffices.
//! - [`transformer`] holds a model's weights, [`parameters`] what of them is trained, [`linear`] and [`lora`] how.
//! - [`dpo`] is the loss, a function of numbers.
//! - [`run`](mod@run) is a whole run; [`artifact`] writes what it leaves, and [`agreement`] asks llama.cpp about it.
//! - [`adapter`] reads and writes LoRA files; [`merge`] puts them into a copy of a model and tells what of the
//!   change survives, [`merge_bench`] times that, and [`loaded_back`] asks llama.cpp about the copy.

pub mod adapter;
pub mod agreement;
pub mod artifact;
pub mod backward;
pub mod checkpoint;
pub mod config;
pub mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub mod cuda;
pub mod device;
#[cfg(test)]
mod device_tests;
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
pub mod placement;
pub mod reference;
pub mod run;
pub mod settings;
pub mod tokens;
pub mod trainer;
pub mod transformer;

pub use adapter::{Adapter, Factors};
