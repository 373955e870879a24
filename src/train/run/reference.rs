//! Reference log-probs of the answers, computed once per pair and cached by its content.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::engine::Token;
use crate::error::{Error, Result};
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
    path: PathBuf,
    known: HashMap<String, AnswerLogps>,
    log: JsonLog,
}

impl References {
    /// Opens or creates the file at `path`. An incomplete last line is dropped.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Input`] if a line is malformed.
    pub fn open(path: &Path) -> Result<References> {
        let n_lines = match std::fs::File::open(path) {
            Ok(file) => BufReader::new(file).split(b'\n').count(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        let (log, rows) = JsonLog::open::<Row>(path, std::iter::repeat_n(1, n_lines))?;
        let known = rows
            .into_iter()
            .map(|row| (row.pair, AnswerLogps { chosen: row.chosen, rejected: row.rejected }))
            .collect();
        Ok(References { path: path.to_path_buf(), known, log })
    }

    /// The reference log-probs of `pairs`, `[n_pairs]`. Missing ones are computed together and cached.
    ///
    /// # Errors
    /// As [`Trainer::logps`]; [`Error::Io`].
    pub fn of<D: Device>(&mut self, trainer: &Trainer<D>, pairs: &[&TokenPair]) -> Result<Vec<AnswerLogps>> {
        let side = if trainer.has_reference() { Some(Side::Reference) } else { None };
        self.look_up(trainer, pairs, side)
    }

    /// As [`References::of`], for a run that trains every weight and has done `step` steps. At step 0 the policy is the
    /// reference.
    ///
    /// # Errors
    /// As [`References::of`]; [`Error::RunFolder`] if a pair is missing after step 0.
    pub fn of_start<D: Device>(
        &mut self,
        trainer: &Trainer<D>,
        pairs: &[&TokenPair],
        step: u64,
    ) -> Result<Vec<AnswerLogps>> {
        self.look_up(trainer, pairs, (step == 0).then_some(Side::Policy))
    }

    fn look_up<D: Device>(
        &mut self,
        trainer: &Trainer<D>,
        pairs: &[&TokenPair],
        side: Option<Side>,
    ) -> Result<Vec<AnswerLogps>> {
        let hashes: Vec<String> = pairs.iter().map(|pair| hash(pair)).collect();
        let is_missing = |i: &usize| !self.known.contains_key(&hashes[*i]);
        let missing: Vec<usize> = (0..pairs.len()).filter(is_missing).collect();
        if !missing.is_empty() {
            let of_missing: Vec<&TokenPair> = missing.iter().map(|&i| pairs[i]).collect();
            let Some(side) = side else {
                return Err(Error::run_folder(
                    &self.path,
                    format!("the reference log-probs of {} pairs are missing", missing.len()),
                )
                .with_hint("delete the folder to start over"));
            };
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
