//! Length limits of preference pairs, in tokens.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Longest prompt and longest sequence, in tokens. The defaults are the paper's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Tokens kept of a prompt if prompt and answer exceed `max_length`, BOS included.
    pub max_prompt: usize,
    /// Tokens of prompt and answer together, BOS and EOS included.
    pub max_length: usize,
    /// Whether answers end with EOS.
    pub append_eos: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { max_prompt: 64, max_length: 256, append_eos: true }
    }
}

impl Limits {
    /// Checks that both limits are at least 1.
    ///
    /// # Errors
    /// [`Error::Setting`] if either is 0.
    pub fn validate(&self) -> Result<()> {
        for (flag, n) in [("--max-prompt", self.max_prompt), ("--max-length", self.max_length)] {
            if n == 0 {
                return Err(Error::setting(flag, "expected at least 1, found 0"));
            }
        }
        Ok(())
    }
}
