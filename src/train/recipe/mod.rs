//! The vocabulary of a training run: its settings, and the preference losses as pure functions.
//!
//! Nothing here runs a model or touches a device, so every other module of [`crate::train`] may use it.

pub mod dpo;
pub mod limits;
pub mod lora;
pub mod method;
pub mod optimizer;
pub mod products;
pub mod schedule;
pub mod settings;
pub mod step;
