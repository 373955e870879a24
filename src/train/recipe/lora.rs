//! LoRA options: rank, alpha, and which matrices are adapted (arXiv 2106.09685).

use crate::error::{Error, Result};
use crate::gguf::GgufFile;
use crate::steer::lora;

/// Target names as users type them, with the GGUF tensor names each stands for.
const TARGETS: [(&str, &[&str]); 9] = [
    ("q", &["attn_q", "attn_qkv"]),
    ("k", &["attn_k", "attn_qkv"]),
    ("v", &["attn_v", "attn_qkv"]),
    ("o", &["attn_output"]),
    ("gate", &["ffn_gate"]),
    ("up", &["ffn_up"]),
    ("down", &["ffn_down"]),
    ("embed", &["token_embd"]),
    ("output", &["output"]),
];

/// Default targets: all matrices of the blocks.
pub const DEFAULT_TARGETS: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

/// Rank, alpha and targets of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraOptions {
    /// Rank r of the update B A.
    pub rank: usize,
    /// The update is scaled by alpha / rank.
    pub alpha: f32,
    /// Target names from [`LoraOptions::known_targets`].
    pub targets: Vec<String>,
}

impl Default for LoraOptions {
    /// The paper's rank 64 and alpha 16.
    fn default() -> Self {
        let targets = DEFAULT_TARGETS.map(str::to_owned).to_vec();
        LoraOptions { rank: 64, alpha: 16.0, targets }
    }
}

impl LoraOptions {
    /// Every valid target name.
    pub fn known_targets() -> impl Iterator<Item = &'static str> {
        TARGETS.iter().map(|(name, _)| *name)
    }

    /// Scale of the update ([`lora::scale`]).
    pub fn scale(&self) -> f32 {
        lora::scale(1.0, self.alpha, self.rank)
    }

    /// Whether the tensor `name` gets an adapter.
    pub fn trains(&self, name: &str) -> bool {
        let Some(stem) = name.strip_suffix(".weight") else { return false };
        let stem = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map_or(stem, |(_, s)| s);
        let targets = TARGETS.iter().filter(|(target, _)| self.targets.iter().any(|t| t == target));
        targets.flat_map(|(_, stems)| stems.iter()).any(|s| *s == stem)
    }

    /// Checks the options against a model, including that llama.cpp can apply the adapter.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self, model: &GgufFile) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::setting("--rank", "expected at least 1, found 0"));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            let reason = format!("expected a positive number, found {}", self.alpha);
            return Err(Error::setting("--alpha", reason));
        }
        let known: Vec<&str> = LoraOptions::known_targets().collect();
        for target in &self.targets {
            if !known.contains(&target.as_str()) {
                let reason = format!("expected names from {}, found {target:?}", known.join(", "));
                return Err(Error::setting("--targets", reason));
            }
        }
        let mut tied = ["embed", "output"].into_iter().filter(|name| self.targets.iter().any(|t| t == name));
        if let Some(target) = tied.next()
            && model.tensor("output.weight").is_none()
        {
            let reason = format!(
                "{target}: this model shares its token embeddings with its output, where llama.cpp cannot apply an \
                 adapter"
            );
            return Err(Error::setting("--targets", reason).with_hint("leave embed and output out"));
        }
        let trained = model.tensors().iter().filter(|tensor| self.trains(tensor.name()));
        // A higher rank adds parameters and nothing else.
        match trained.flat_map(|tensor| tensor.shape()).max() {
            None => Err(Error::setting("--targets", "this model has none of these matrices")),
            Some(&most) if self.rank as u64 > most => {
                let reason =
                    format!("expected at most {most}, the longest side of a matrix, found {}", self.rank);
                Err(Error::setting("--rank", reason))
            }
            Some(_) => Ok(()),
        }
    }
}
