//! The transformer that is trained, written once over a [`Device`](crate::train::device::Device).

pub mod backward;
pub mod config;
pub mod forward;
pub mod linear;
pub mod lora;
pub mod parameters;
pub mod transformer;
