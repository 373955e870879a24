//! The transformer being trained, written once over a [`Device`](crate::train::device::Device).
//!
//! ```text
//! config ──► transformer ──► forward ──► backward
//!                 ▲             │            │
//!             parameters        └─ linear, embedding ─► low_rank (applies the LoRA scale)
//! ```
//!
//! - [`config`] reads sizes and options from the GGUF's metadata.
//! - `metadata_keys` refuses those that the trainer does not implement.
//! - [`parameters`] holds the trained tensors and their gradients.
//! - [`transformer`] loads the weights.
//! - [`mod@forward`] computes log-probabilities, [`mod@backward`] the gradients of a loss of them.
//! - [`linear`] and [`embedding`] are the two kinds of matrices, [`low_rank`] the LoRA change of either.
//!
//! # Shapes
//! Every buffer is dense f32, and its shape is given slowest axis first. `n_rows` is the number of tokens the
//! batch reads ([`Packed::n_rows`](crate::train::data::pack::Packed::n_rows)), `n_outputs` the number it
//! predicts, `rank` that of a low-rank change. A gradient has the name of its buffer with a `d` in front: `dx`
//! is the derivative of the loss with respect to `x`.

pub mod backward;
pub mod config;
pub mod embedding;
pub mod forward;
mod gemm;
pub mod linear;
pub mod low_rank;
mod metadata_keys;
pub mod parameters;
pub mod pass;
pub mod transformer;
