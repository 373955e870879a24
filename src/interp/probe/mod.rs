//! A linear probe: the direction of toxicity in the residual stream (the paper, section 4.2).
//!
//! The features are mean residual streams ([`crate::engine::residual`]), by default after the final norm, as in
//! the paper. The probe is a logistic regression without bias; its weight is the probe vector.

mod file;
#[cfg(feature = "engine")]
mod fit;
#[cfg(feature = "engine")]
mod labelled;
#[cfg(feature = "engine")]
mod train;

pub(crate) use file::sigmoid;
pub use file::{Probe, ProbePlace};
#[cfg(feature = "engine")]
pub use fit::{Epoch, Fit, HeldOut, ProbeOptions, check, fit};
#[cfg(feature = "engine")]
pub use labelled::{Labelled, LabelledColumns, LabelledText, own, read};
#[cfg(feature = "engine")]
pub use train::{ProbeReading, train};
