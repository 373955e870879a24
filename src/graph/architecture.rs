//! The architectures whose graphs interventions and recordings support.
//!
//! Node names are details of the pinned revision of llama.cpp, so this one table holds them all. An architecture
//! that is not in the table is refused, never guessed.

use std::path::Path;

use crate::error::{Error, Result};

/// One architecture's graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    /// Node of a block's neuron activations, the input of `ffn_down`, without `-{layer}`.
    pub neurons: &'static str,
    /// Node of the residual stream before the first block.
    pub embedding: &'static str,
    /// Whether there is a norm between `ffn_down` and the residual stream. If so, an offset on a neuron does not add
    /// a constant to the residual stream.
    pub norm_after_ffn: bool,
    /// Whether the graph adds `blk.N.ffn_down.bias` if the file has one.
    pub reads_down_bias: bool,
}

/// Node of the residual stream after a block, with the control vector added.
pub(super) const BLOCK_OUTPUT: &str = "l_out";

/// Node of the residual stream after the final norm.
pub(super) const FINAL_NORM: &str = "result_norm";

const fn gated(name: &'static str) -> Architecture {
    Architecture {
        name,
        neurons: "ffn_swiglu",
        embedding: "embd",
        norm_after_ffn: false,
        reads_down_bias: false,
    }
}

/// The supported architectures, each tested against PyTorch on a tiny model (`tests/engine`).
pub const ARCHITECTURES: [Architecture; 7] = [
    Architecture { reads_down_bias: true, ..gated("llama") },
    gated("command-r"),
    Architecture { neurons: "ffn_gelu", embedding: "inpL", reads_down_bias: true, ..gated("gpt2") },
    Architecture { neurons: "ffn_gelu", embedding: "inp_norm-0", reads_down_bias: true, ..gated("bloom") },
    Architecture { neurons: "ffn_geglu", embedding: "inp_scaled", norm_after_ffn: true, ..gated("gemma3") },
    gated("qwen2"),
    gated("qwen3"),
];

impl Architecture {
    /// The entry for a `general.architecture`, if there is one.
    pub fn find(name: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|a| a.name == name)
    }

    /// The entry for a `general.architecture`, or an error that lists the supported ones.
    ///
    /// `path` is the model's, for the error ([`Error::Model`]).
    pub fn require(name: &str, path: &Path) -> Result<&'static Architecture> {
        Architecture::find(name).ok_or_else(|| {
            Error::model(path, format!("interventions and recordings do not support architecture {name:?}"))
                .with_hint(format!("they support {}", ARCHITECTURES.map(|a| a.name).join(", ")))
        })
    }
}
