//! Edits and records the values of nodes in llama.cpp's graphs.
//!
//! ```text
//! architecture (names of nodes) ─► watch ◄── steering (what to change)
//!                                    ▲
//!                                  node: the engine's own tensors · a host's
//! ```
//!
//! Nothing here runs a model or calls llama.cpp.
//!
//! - [`architecture`] names the nodes of each supported architecture. Add a new architecture there.
//! - [`steering`] describes the changes to a running model.
//! - [`node`] is the interface to one node of a running graph.
//! - `place` names the places that are edited or recorded.
//! - `watch` follows the nodes of a graph as they are computed, and edits and reads their values.
//! - `edit` computes an edit, `recording` keeps recorded values, and `rows` finds the token of each row.

pub mod architecture;
mod edit;
pub mod node;
#[cfg_attr(not(feature = "engine"), allow(dead_code, reason = "only the engine records"))]
pub(crate) mod place;
#[cfg_attr(not(feature = "engine"), allow(dead_code, reason = "only the engine records"))]
pub(crate) mod recording;
pub(crate) mod rows;
pub mod steering;
#[cfg_attr(not(feature = "engine"), allow(dead_code, reason = "only the engine records"))]
pub(crate) mod watch;

pub use architecture::Architecture;
pub use node::{Node, Shape};
pub use steering::Steering;
