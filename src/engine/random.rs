//! Random streams, uniform numbers and shuffles.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

/// The random stream of one sample of one prompt.
///
/// It depends only on the seed, the prompt's id and the sample's number. The order of prompts, the batch, and
/// whether a run was resumed never change it.
pub fn random_stream(seed: u64, prompt_id: &str, sample: u32) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(b"detox-gguf sample 1\0");
    hash.update(seed.to_le_bytes());
    hash.update(sample.to_le_bytes());
    hash.update(prompt_id.as_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// A number in [0, 1) with 53 random bits.
pub(super) fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Shuffles `items` (Fisher-Yates).
///
/// Every order is equally likely, up to a bias of `items.len()` / 2^64.
pub fn shuffle<T>(items: &mut [T], random: &mut impl Rng) {
    for i in (1..items.len()).rev() {
        // The high half of a 64 x 64 bit product is uniform up to a bias of i / 2^64.
        let j = (u128::from(random.next_u64()) * (i as u128 + 1)) >> 64;
        items.swap(i, j as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_seed_prompt_and_sample_only() {
        let first = |seed, id, sample| random_stream(seed, id, sample).next_u64();
        assert_eq!(first(1, "en/1", 0), first(1, "en/1", 0));
        let all = [first(1, "en/1", 0), first(2, "en/1", 0), first(1, "en/2", 0), first(1, "en/1", 1)];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b));
        }
    }
}
