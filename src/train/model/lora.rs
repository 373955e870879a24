//! Which matrices get a low-rank change, and its first numbers (arXiv 2106.09685).

use rand_chacha::ChaCha8Rng;
use rand_core::Rng;

use crate::error::{Error, Result};
use crate::gguf::GgufFile;

/// Matrices of a block and beside the blocks, as users name them, with their tensors' names.
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

/// What is trained where nothing else is asked for: all matrices of the blocks.
pub const DEFAULT_TARGETS: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

/// A low-rank change.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraOptions {
    /// r.
    pub rank: usize,
    /// The change is multiplied by alpha / rank.
    pub alpha: f32,
    /// Names out of [`LoraOptions::known_targets`].
    pub targets: Vec<String>,
}

impl Default for LoraOptions {
    /// The paper's: r 64, alpha 16.
    fn default() -> Self {
        let targets = DEFAULT_TARGETS.map(str::to_owned).to_vec();
        LoraOptions { rank: 64, alpha: 16.0, targets }
    }
}

impl LoraOptions {
    /// What may be named as a target.
    pub fn known_targets() -> impl Iterator<Item = &'static str> {
        TARGETS.iter().map(|(name, _)| *name)
    }

    /// What the product of A and B is multiplied by.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// Whether the tensor `name` is changed.
    pub fn trains(&self, name: &str) -> bool {
        let Some(stem) = name.strip_suffix(".weight") else { return false };
        let stem = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map_or(stem, |(_, s)| s);
        let targets = TARGETS.iter().filter(|(target, _)| self.targets.iter().any(|t| t == target));
        targets.flat_map(|(_, stems)| stems.iter()).any(|s| *s == stem)
    }

    /// Whether this model can be trained so, and llama.cpp apply what comes of it.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self, model: &GgufFile) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::setting("--rank", "expected a number from 1 up, found 0"));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            let reason = format!("expected a positive number, found {}", self.alpha);
            return Err(Error::setting("--alpha", reason));
        }
        let known: Vec<&str> = LoraOptions::known_targets().collect();
        for target in &self.targets {
            if !known.contains(&target.as_str()) {
                let reason = format!("expected names out of {}, found {target:?}", known.join(", "));
                return Err(Error::setting("--targets", reason));
            }
        }
        if let Some(target) =
            ["embed", "output"].into_iter().find(|name| self.targets.iter().any(|t| t == name))
            && model.tensor("output.weight").is_none()
        {
            return Err(Error::setting("--targets", format!(
                    "{target}: this model uses its token embeddings as its output too, where llama.cpp cannot \
                     apply an adapter"
                )).with_hint("leave embed and output out"));
        }
        if !model.tensors().iter().any(|tensor| self.trains(tensor.name())) {
            return Err(Error::setting("--targets", "this model has none of these matrices"));
        }
        Ok(())
    }
}

/// A's first numbers, `[n_rows][n_cols]`: uniform within 1 / sqrt(fan-in), as PEFT's
/// `kaiming_uniform_(a=sqrt(5))` comes out.
pub(super) fn first_a(random: &mut ChaCha8Rng, n_rows: usize, n_cols: usize, fan_in: usize) -> Vec<f32> {
    let bound = 1.0 / (fan_in as f32).sqrt();
    // The upper 24 bits, which an f32 holds exactly.
    let unit = |bits: u32| (bits >> 8) as f32 / (1u32 << 24) as f32;
    (0..n_rows * n_cols).map(|_| bound * (2.0 * unit(random.next_u32()) - 1.0)).collect()
}
