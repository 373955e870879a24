//! Settings of a training run, and the preference losses.

pub mod dpo;
pub mod method;
pub mod settings;
