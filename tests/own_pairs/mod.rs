//! The tiny models, the program's own pairs as their tokens, and a progress that nobody follows; for tests of training.

use std::path::PathBuf;

use detox_gguf::engine::Vocabulary;
use detox_gguf::progress::Progress;
use detox_gguf::train::data::preference_pair;
use detox_gguf::train::data::tokens::{Limits, TokenPair, tokenize};

pub fn tiny(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("gguf/tiny/{name}.gguf"))
}

/// The program's own pairs as a tiny model's tokens, the first `n`.
pub fn own_pairs(name: &str, n: usize) -> Vec<TokenPair> {
    let vocabulary = Vocabulary::open(&tiny(name)).unwrap();
    let limits = Limits { max_prompt: 16, max_length: 40, append_eos: true };
    let tokenized = tokenize(&vocabulary, &preference_pair::own()[..n], &limits).unwrap();
    assert_eq!(tokenized.pairs.len(), n);
    tokenized.pairs.into_iter().map(|(_, pair)| pair).collect()
}

/// Told nothing and telling nothing.
pub struct Silent;

impl Progress for Silent {
    fn start(&mut self, _phase: &str, _total: u64, _done: u64) {}
    fn advance(&mut self, _n: u64) {}
    fn finish(&mut self) {}
    fn say(&mut self, _text: &str) {}
}
