//! For tests of training: the tiny models, the built-in pairs as their tokens, and a silent progress.

use std::path::PathBuf;

use detox_gguf::engine::Vocabulary;
pub use detox_gguf::progress::Silent;
use detox_gguf::train::data::preference_pair;
use detox_gguf::train::data::tokens::{TokenPair, tokenize};
use detox_gguf::train::recipe::limits::Limits;

pub fn tiny(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("gguf/tiny/{name}.gguf"))
}

/// The first `n` built-in pairs as a tiny model's tokens.
pub fn own_pairs(name: &str, n: usize) -> Vec<TokenPair> {
    let vocabulary = Vocabulary::open(&tiny(name)).unwrap();
    let limits = Limits { max_prompt: 16, max_length: 40, append_eos: true };
    let tokenized = tokenize(&vocabulary, &preference_pair::own()[..n], &limits).unwrap();
    assert_eq!(tokenized.pairs.len(), n);
    tokenized.pairs.into_iter().map(|(_, pair)| pair).collect()
}
