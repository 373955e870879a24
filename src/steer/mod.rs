//! What a user asks to have changed in a running model, and how llama.cpp is made to do it.
//!
//! ```text
//!                 argument (--steer FILE[:COEF])
//!                     │
//!        ┌────────────┴──────┐
//! neuron ─► intervention   control_vector
//!        └─────┬─────────────┘
//!              │   ┌── lora (--lora, checked)
//!              │   ├── fingerprint (made for this model?)
//!              ▼   ▼
//!            compile ──► graph::Steering
//!              ▲
//!        value_vector ──► bake ──► a model with the edit inside
//! ```
//!
//! - [`neuron`] names neurons, reads and writes files of them, and draws random ones for a control.
//! - [`intervention`] is what may be done to neurons and directions, and its file.
//! - [`control_vector`] reads, adds up and writes control vectors, as llama.cpp's tools do.
//! - [`lora`] checks an adapter before llama.cpp, which may end the process, sees it.
//! - [`fingerprint`] tells whether a file was made for the model at hand.
//! - [`value_vector`] gives what a neuron writes: its column of `ffn_down`.
//! - [`compile`] finds the cheapest exact way, and says which it took.
//! - `combined` makes one file of several.
//! - [`bake`] puts the edit into a model's own tensors.
//!
//! Layers count from 0 everywhere. `direction.N` of a control vector is added after block N, as
//! llama.cpp's runtime has it; see [`control_vector`] for a tool that means it otherwise.

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
pub mod neuron;
pub mod value_vector;

pub use argument::{SteerArgument, SteerFile};
pub use compile::{CompileOptions, Compiled, Route};
pub use control_vector::ControlVectorFile;
pub use fingerprint::Fingerprint;
pub use intervention::{Intervention, Interventions, Target};
pub use neuron::{LocatedNeuron, Neuron, NeuronFile};
