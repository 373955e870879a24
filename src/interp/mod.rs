//! Finds the neurons and directions behind toxicity, and measures how a change affects them.
//!
//! ```text
//! labelled texts ─► residual streams ─► probe ─► locate ─► neurons ─► activations
//! text pairs ───────────┤                          └─► vocabulary (the tokens they promote)
//! aligned sentences ────┤
//!                       ├─► contrast: directions
//!                       └─► retrieval
//! ```
//!
//! - [`residual_streams`] averages the residual stream over the tokens of each text.
//! - [`probe`] trains a linear probe on these averages; its weight is the direction of toxicity.
//! - [`locate`] ranks every FFN value vector by its cosine with the probe vector.
//! - [`vocabulary`] projects vectors of the residual stream to the vocabulary.
//! - [`activations`] measures how active neurons are in each language.
//! - [`contrast`] computes directions from pairs of texts, with the functions of [`directions`].
//! - [`retrieval`] measures how similarly a model represents translations.

#[cfg(feature = "engine")]
pub mod activations;
#[cfg(feature = "engine")]
pub mod contrast;
#[cfg(feature = "engine")]
pub mod directions;
#[cfg(feature = "engine")]
pub mod locate;
pub mod probe;
#[cfg(feature = "engine")]
pub mod residual_streams;
#[cfg(feature = "engine")]
pub mod retrieval;
#[cfg(feature = "engine")]
pub mod vocabulary;
