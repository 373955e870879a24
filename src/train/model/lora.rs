//! The first numbers of a low-rank change (arXiv 2106.09685).

use rand_chacha::ChaCha8Rng;
use rand_core::Rng;

pub use crate::train::recipe::lora::LoraOptions;

/// A's first numbers, `[n_rows][n_cols]`: uniform within 1 / sqrt(fan-in), as PEFT's
/// `kaiming_uniform_(a=sqrt(5))` comes out.
pub(super) fn first_a(random: &mut ChaCha8Rng, n_rows: usize, n_cols: usize, fan_in: usize) -> Vec<f32> {
    let bound = 1.0 / (fan_in as f32).sqrt();
    // The upper 24 bits, which an f32 holds exactly.
    let unit = |bits: u32| (bits >> 8) as f32 / (1u32 << 24) as f32;
    (0..n_rows * n_cols).map(|_| bound * (2.0 * unit(random.next_u32()) - 1.0)).collect()
}
