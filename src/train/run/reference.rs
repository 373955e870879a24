//! Reference log-probs of the answers, computed once per pair and cached by its content.

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::engine::Token;
use crate::error::Result;
use crate::file::{self, JsonLog};

use crate::train::data::tokens::TokenPair;
use crate::train::device::Device;
use crate::train::recipe::dpo::AnswerLogps;
use crate::train::run::trainer::{Side, Trainer};

/// A line of `reference.jsonl`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Row {
    /// SHA-256 of the pair's tokens.
    pair: String,
    chosen: f64,
    rejected: f64,
}

/// The cache of reference log-probs, in memory and in `reference.jsonl`.
#[derive(Debug)]
pub struct References {
    known: HashMap<String, AnswerLogps>,
    log: JsonLog,
}

impl References {
    /// Opens or creates the file at `path`. Damaged lines are dropped: their values are computed again.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn open(path: &Path) -> Result<References> {
        let (log, rows) = JsonLog::open_independent::<Row>(path, usize::MAX, |_| true)?;
        let known = rows
            .into_iter()
            .map(|row| (row.pair, AnswerLogps { chosen: row.chosen, rejected: row.rejected }))
            .collect();
        Ok(References { known, log })
    }

    /// The reference log-probs of `pairs`, `[n_pairs]`. Missing ones are computed together and cached.
    ///
    /// In a run that trains every weight the policy is the reference, as long as its weights are the model's own.
    ///
    /// # Errors
    /// As [`Trainer::logps`]; [`crate::Error::Io`].
    pub fn of<D: Device>(&mut self, trainer: &Trainer<D>, pairs: &[&TokenPair]) -> Result<Vec<AnswerLogps>> {
        let hashes: Vec<String> = pairs.iter().map(|pair| hash(pair)).collect();
        let is_missing = |i: &usize| !self.known.contains_key(&hashes[*i]);
        let missing: Vec<usize> = (0..pairs.len()).filter(is_missing).collect();
        if !missing.is_empty() {
            let of_missing: Vec<&TokenPair> = missing.iter().map(|&i| pairs[i]).collect();
            let side = if trainer.has_reference() { Side::Reference } else { Side::Policy };
            let logps = trainer.logps(side, &of_missing)?;
            let row = |(&i, logps): (&usize, &AnswerLogps)| Row {
                pair: hashes[i].clone(),
                chosen: logps.chosen,
                rejected: logps.rejected,
            };
            self.log.append(&missing.iter().zip(&logps).map(row).collect::<Vec<Row>>())?;
            self.known.extend(missing.iter().map(|&i| hashes[i].clone()).zip(logps));
        }
        Ok(hashes.iter().map(|hash| self.known[hash]).collect())
    }
}

/// SHA-256 of a pair's tokens, in hex.
fn hash(pair: &TokenPair) -> String {
    let mut hash = Sha256::new();
    for tokens in [&pair.prompt, &pair.chosen, &pair.rejected] {
        hash.update((tokens.len() as u64).to_le_bytes());
        tokens.iter().for_each(|token: &Token| hash.update(token.to_le_bytes()));
    }
    file::hex(&hash.finalize())
}
