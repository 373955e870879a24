//! The tiny models, and the program's own pairs as their tokens; for tests of training.

use std::path::PathBuf;

use detox_gguf::engine::Vocabulary;
use detox_gguf::train::pairs;
use detox_gguf::train::tokens::{Limits, TokenPair, tokenize};

pub fn tiny(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("gguf/tiny/{name}.gguf"))
}

/// The program's own pairs as a tiny model's tokens, the first `n`.
pub fn own_pairs(name: &str, n: usize) -> Vec<TokenPair> {
    let vocabulary = Vocabulary::open(&tiny(name)).unwrap();
    let limits = Limits { max_prompt: 16, max_length: 40, append_eos: true };
    let tokenized = tokenize(&vocabulary, &pairs::own()[..n], &limits).unwrap();
    assert_eq!(tokenized.pairs.len(), n);
    tokenized.pairs.into_iter().map(|(_, pair)| pair).collect()
}
