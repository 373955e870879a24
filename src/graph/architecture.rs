//! What llama.cpp's graphs are like inside, for the architectures that interventions and recordings know.
//!
//! Names of nodes are details of the pinned revision of llama.cpp, so this one table holds them all, and
//! an architecture that is not in it is refused, never guessed.

use std::path::Path;

use crate::error::{Error, Result};

/// One architecture's graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    /// Node of the neuron activations of a block, without `-{layer}`: the input of `ffn_down`.
    pub neurons: &'static str,
    /// Node of the residual stream before the first block.
    pub embedding: &'static str,
    /// Whether a norm stands between `ffn_down` and the residual stream, so that an offset on a neuron is
    /// no constant added to the residual stream.
    pub norm_after_ffn: bool,
    /// Whether the graph adds `blk.N.ffn_down.bias` where a file has one.
    pub reads_down_bias: bool,
}

/// The residual stream as a block leaves it, after the control vector was added.
pub(super) const BLOCK_OUTPUT: &str = "l_out";

/// The residual stream after the final norm.
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

/// Each is tested against PyTorch on a tiny model (`tests/engine`).
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
    /// The entry for `general.architecture`, if there is one.
    pub fn find(name: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|a| a.name == name)
    }

    /// The entry, or an error that names those there are; `path` is the model's.
    pub fn require(name: &str, path: &Path) -> Result<&'static Architecture> {
        Architecture::find(name).ok_or_else(|| {
            Error::model(path, format!("interventions and recordings do not know architecture {name:?}"))
                .with_hint(format!("they know {}", ARCHITECTURES.map(|a| a.name).join(", ")))
        })
    }
}
