//! Finds what to change in a model, and what a change did inside it.
//!
//! ```text
//! labelled text ─► residual streams ─► probe ─► locate ─► neurons ─► activations
//!                        │                        └─► vocabulary (what they say)
//! aligned text ──────────┴─► retrieval
//! ```
//!
//! - [`probe`] trains a linear probe on residual streams: the direction of toxicity.
//! - [`directions`] computes directions from residual streams.
//! - [`locate`] ranks every FFN value vector by its cosine with the probe vector.
//! - [`vocabulary`] projects vectors of the residual stream to tokens.
//! - [`activations`] sums up how active neurons are, language by language.
//! - [`retrieval`] tells how alike a model represents translations.

#[cfg(feature = "engine")]
pub mod activations;
#[cfg(feature = "engine")]
pub mod directions;
#[cfg(feature = "engine")]
pub mod locate;
pub mod probe;
#[cfg(feature = "engine")]
pub mod retrieval;
#[cfg(feature = "engine")]
pub mod vocabulary;
