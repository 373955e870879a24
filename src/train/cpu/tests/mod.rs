//! Every operation against plain loops in f64, and every gradient against finite differences of its operation.

mod activation;
mod attention;
mod dense;
mod head;
mod lookup;
mod norm;
mod optimizer;
mod product;
mod repeat;
mod rope;
mod rows;

use std::sync::LazyLock;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

use super::{Cpu, Products};
use crate::engine::Token;
use crate::train::pack::Packed;

/// What buffers hold before gradients are added to them.
const HELD: f32 = 0.25;

/// Of the largest number. Sums are of at most some hundred f32 numbers up to 1, each addition being off by
/// 6e-8 of the sum at most.
const SUMS: f64 = 1e-5;

/// From x to either side, in a finite difference: a power of two, so that steps from numbers below 1 are exact
/// but for the last bits, which are lost from x itself.
const STEP: f64 = 1.0 / 32.0;

/// Of the largest slope. A difference of order four is off by STEP^4 / 30 = 3e-8 of the fifth derivative, which
/// is up to some hundreds for a norm of few numbers; rounding the operation's results to f32 adds
/// 6e-8 / STEP = 2e-6 of them.
const SLOPES: f64 = 1e-4;

struct Random(ChaCha8Rng);

impl Random {
    fn new(seed: u64) -> Random {
        Random(ChaCha8Rng::seed_from_u64(seed))
    }

    /// From -1 up to 1.
    fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.0.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
    }
}

/// Two threads, started once: a finite difference calls an operation four times for each number.
fn cpu() -> &'static Cpu {
    static CPU: LazyLock<Cpu> = LazyLock::new(|| Cpu::new(2, Products::Exact).unwrap());
    &CPU
}

/// Every number within `tolerance` of the largest, or of 1.
#[track_caller]
fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1.0f64, |most, x| most.max(x.abs()));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let distance = (f64::from(found) - expected).abs();
        assert!(distance <= tolerance * largest, "{what}: expected {expected} at {i}, found {found}");
    }
}

/// `found` is [`HELD`] and the gradient of Σ dy f(x) at `x`.
#[track_caller]
fn assert_gradient(found: &[f32], x: &[f32], dy: &[f32], f: impl Fn(&Vec<f32>) -> Vec<f32>, what: &str) {
    let sum = |x: &Vec<f32>| -> f64 {
        let y = f(x);
        assert_eq!(y.len(), dy.len(), "{what}");
        y.iter().zip(dy).map(|(&y, &dy)| f64::from(y) * f64::from(dy)).sum()
    };
    let mut moved = x.to_vec();
    let slopes: Vec<f64> = (0..x.len())
        .map(|i| {
            let mut difference = |n_steps: f64| -> f64 {
                let mut at = |offset: f64| {
                    moved[i] = (f64::from(x[i]) + offset) as f32;
                    (f64::from(moved[i]), sum(&moved))
                };
                let ((left, low), (right, high)) = (at(-n_steps * STEP), at(n_steps * STEP));
                moved[i] = x[i];
                (high - low) / (right - left)
            };
            f64::from(HELD) + (4.0 * difference(1.0) - difference(2.0)) / 3.0
        })
        .collect();
    assert_close(found, &slopes, SLOPES, what);
}

/// The sum of a_i b_i.
fn dot(a: impl IntoIterator<Item = f32>, b: impl IntoIterator<Item = f32>) -> f64 {
    a.into_iter().zip(b).map(|(a, b)| f64::from(a) * f64::from(b)).sum()
}

/// Pairs of so many tokens: prompt, chosen, rejected. Tokens repeat.
fn packed(lengths: &[[usize; 3]]) -> Packed {
    let mut packed = Packed::default();
    for (i, lengths) in lengths.iter().enumerate() {
        let [prompt, chosen, rejected] =
            lengths.map(|n| (0..n).map(|j| ((3 * i + j * j) % 5) as Token).collect::<Vec<Token>>());
        packed.push(&prompt, &chosen, &rejected);
    }
    packed
}

/// The rows of each text that [`packed`] packs: a prompt's, and those of one of its answers.
fn texts(lengths: &[[usize; 3]]) -> Vec<Vec<usize>> {
    let mut texts = Vec::new();
    let mut first = 0;
    for &[n_prompt, n_chosen, n_rejected] in lengths {
        let chosen = first + n_prompt;
        let rejected = chosen + n_chosen - 1;
        let end = rejected + n_rejected - 1;
        texts.push((first..rejected).collect());
        texts.push((first..chosen).chain(rejected..end).collect());
        first = end;
    }
    texts
}
