//! What llama.cpp's graphs are like inside, and what is changed there: all of it without running a model.
//!
//! ```text
//! architecture (names of nodes) ─► watch ◄── steering (what to change)
//!                                    ▲
//!                                  node: the engine's own tensors · a host's
//! ```
//!
//! - [`architecture`] names the nodes of the graphs that are known.
//! - [`steering`] describes what changes a model while it runs.
//! - [`node`] is what is asked of one node of a graph that is being computed.
//! - `watch` looks at the nodes as they come, and edits and reads their values.

pub mod architecture;
mod edit;
pub mod node;
#[cfg_attr(not(feature = "engine"), allow(dead_code, reason = "the engine alone records"))]
pub(crate) mod place;
#[cfg_attr(not(feature = "engine"), allow(dead_code, reason = "the engine alone records"))]
pub(crate) mod recording;
pub(crate) mod rows;
pub mod steering;
#[cfg_attr(not(feature = "engine"), allow(dead_code, reason = "the engine alone records"))]
pub(crate) mod watch;

pub use architecture::Architecture;
pub use node::{Node, Shape};
pub use steering::Steering;
