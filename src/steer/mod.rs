//! Reads interventions and control vectors, and compiles them for llama.cpp.
//!
//! ```text
//! --steer FILE[:COEF]                                              --lora FILE
//!       │                                                              │
//!    argument ─┬─► intervention: JSON; uses neuron, control_vector     │
//!              └─► control_vector: GGUF                                │
//!                        │                                             │
//!                        ▼                                             ▼
//!                     compile ◄──── fingerprint (right model?), value_vector, lora (does it fit?)
//!                        │
//!                        ▼
//!                  graph::Steering ───► the engine
//!                        │
//!                        ▼
//!                    combined ──┬─► one control vector
//!                               ├─► one intervention file
//!                               └─► a vector for each layer ─► bake ─► a model with the edit baked in
//! ```
//!
//! - [`argument`] parses `--steer FILE[:COEF]` and opens the file.
//! - [`neuron`] reads and writes lists of neurons, and draws random neurons for a control.
//! - [`intervention`] defines edits of neurons and directions, and their file.
//! - [`control_vector`] reads, adds up and writes control vectors, as llama.cpp's tools do.
//! - [`lora`] checks an adapter before llama.cpp loads it, because llama.cpp may abort on a bad one.
//! - [`fingerprint`] checks whether a file was made for a given model.
//! - [`value_vector`] computes what a neuron writes to the residual stream: its column of `ffn_down`.
//! - [`compile`] picks the cheapest exact way to make each edit, and reports the choice.
//! - `combined` merges several files into one.
//! - `record` describes steering in a `run.json`.
//! - [`bake`] writes a copy of a model with the edit baked in.
//!
//! Layers count from 0 everywhere. As in llama.cpp's runtime, `direction.N` of a control vector is added
//! after block N. One tool numbers directions differently; see [`control_vector`].

pub mod argument;
pub mod bake;
mod choice;
#[cfg(feature = "engine")]
pub mod combined;
pub mod compile;
pub mod control_vector;
pub mod fingerprint;
pub mod intervention;
mod json;
pub mod lora;
mod misspelt;
pub mod neuron;
pub mod record;
pub mod value_vector;

pub use argument::{SteerArgument, SteerFile};
pub use compile::{CompileOptions, Compiled, Route};
pub use control_vector::ControlVectorFile;
pub use fingerprint::Fingerprint;
pub use intervention::{Intervention, Interventions, Target};
pub use neuron::{LocatedNeuron, Neuron, NeuronFile};
