//! Tests that every device must pass.
//!
//! Operations are compared with plain loops in f64, and gradients with finite differences of the CPU's operations.
//! Buffers that an operation overwrites hold NaN first.

pub mod activation;
pub mod attention;
pub mod dense;
pub mod head;
pub mod lookup;
pub mod norm;
pub mod on_host;
pub mod optimizer;
pub mod preference;
pub mod product;
pub mod repeat;
pub mod rope;
pub mod rows;

use std::sync::LazyLock;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

use crate::engine::Token;
use crate::train::data::pack::Packed;
use crate::train::device::Device;
use crate::train::device::cpu::{Cpu, Products};

use on_host::OnHost;

/// What gradient buffers hold first, since operations add to them.
pub const HELD: f32 = 0.25;

/// Tolerance for sums, relative to the largest number.
///
/// Sums have at most a few hundred f32 numbers up to 1, and each addition is off by at most 6e-8 of the sum.
pub const SUMS: f64 = 1e-5;

/// Step of a finite difference.
///
/// A power of two, so that x + STEP is exact for numbers below 1, except for the last bits of x.
const STEP: f64 = 1.0 / 32.0;

/// Tolerance for gradients, relative to the largest.
///
/// A difference of order four is off by STEP^4 / 30 = 3e-8 of the fifth derivative, which reaches some hundreds for a
/// norm of few numbers. Rounding the operation's results to f32 adds 6e-8 / STEP = 2e-6 of them.
const SLOPES: f64 = 1e-4;

pub struct Random(ChaCha8Rng);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform in [-1, 1).
    pub fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.0.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
    }
}

/// A device whose buffers are on the host, possibly through [`OnHost`].
pub trait Tested: Device<Buffer = Vec<f32>> {
    /// Largest relative error of an operand in a product with a frozen matrix.
    const PRODUCTS: f64;
    /// The same in a product of dense matrices.
    const DENSE: f64;
    /// Tolerance of embeddings, relative to the largest dequantised number.
    const TABLES: f64;
}

impl Tested for OnHost<Cpu> {
    const PRODUCTS: f64 = 0.0;
    const DENSE: f64 = 0.0;
    const TABLES: f64 = 0.0;
}

/// One test function for each test of a device; `$device` is an `Option`, and `None` skips the test.
macro_rules! device_tests {
    ($device:expr) => {
        crate::train::device::tests::device_tests! {
            $device,
            activation:
                activations_match_their_formulas,
                gradients_of_activations_match_finite_differences,
                gradients_of_many_numbers_match_one_at_a_time;
            attention:
                packed_rows_attend_as_in_separate_texts,
                large_scores_do_not_overflow,
                gradients_of_attention_match_finite_differences;
            dense:
                dense_products_match_three_loops,
                the_old_result_is_not_read_if_beta_is_zero;
            head:
                log_probabilities_match_a_log_softmax,
                gradients_of_log_probabilities_match_finite_differences,
                logits_far_apart_give_finite_log_probabilities_and_nan_gives_nan;
            lookup:
                table_rows_are_gathered_by_token_position_and_output,
                gradients_are_scattered_once_for_each_time_a_row_was_gathered,
                embeddings_match_the_dequantised_rows;
            norm:
                norms_match_their_formulas,
                gradients_of_norms_match_finite_differences,
                gradients_of_weights_are_sums_over_all_rows,
                an_rms_norm_of_one_number_is_its_sign_and_a_layer_norm_is_zero;
            optimizer:
                a_step_of_rmsprop_matches_a_hand_calculation,
                steps_of_adamw_match_a_hand_calculation,
                epsilon_is_added_to_the_root_and_not_under_it,
                each_number_is_stepped_independently,
                many_tensors_at_once_are_stepped_as_one_by_one;
            preference:
                losses_of_pairs_match_the_formulas_in_f64,
                gradients_of_the_mean_loss_match_finite_differences,
                a_policy_equal_to_its_reference_has_a_loss_of_exactly_ln_2,
                nan_stays_within_its_pair;
            product:
                products_match_those_with_the_dequantised_matrix,
                non_finite_rows_stay_non_finite_and_leave_others_alone,
                products_of_one_input_match_one_matrix_at_a_time,
                rejects_a_matrix_whose_bytes_do_not_match_its_shape;
            rope:
                heads_are_rotated_by_their_positions_and_back,
                a_batch_without_rows_is_not_rotated;
            rows:
                buffers_hold_what_is_written_to_them,
                sums_over_and_into_rows_match_two_loops,
                columns_are_added_at_other_columns;
        }
    };
    ($device:expr, $($module:ident: $($name:ident),+;)+) => {
        $(mod $module {
            #[allow(unused_imports, reason = "for the expression")]
            use super::*;
            $(#[test]
            fn $name() {
                let Some(device) = $device else { return };
                crate::train::device::tests::$module::$name(device);
            })+
        })+
    };
}
pub(crate) use device_tests;

/// Error of a sum of products if both operands are off by `u`, relative to the sum of absolute products.
pub fn rounding(u: f64) -> f64 {
    2.0 * u + u * u
}

/// The sum of a_i b_i, and the sum of their absolute values.
pub fn dot_and_magnitude(a: impl IntoIterator<Item = f32>, b: impl IntoIterator<Item = f32>) -> (f64, f64) {
    let products = a.into_iter().zip(b).map(|(a, b)| f64::from(a) * f64::from(b));
    products.fold((0.0, 0.0), |(sum, magnitude), x| (sum + x, magnitude + x.abs()))
}

/// Checks that every number is within its bound plus [`SUMS`] of the largest number or of 1.
#[track_caller]
pub fn assert_within(found: &[f32], expected: &[f64], bounds: &[f64], what: &str) {
    assert_eq!((found.len(), bounds.len()), (expected.len(), expected.len()), "{what}");
    let largest = expected.iter().fold(1.0f64, |most, x| most.max(x.abs()));
    for (i, ((&found, &expected), bound)) in found.iter().zip(expected).zip(bounds).enumerate() {
        let distance = (f64::from(found) - expected).abs();
        assert!(
            distance <= bound + SUMS * largest,
            "{what}: expected {expected} at {i}, found {found}, which is more than {bound} away"
        );
    }
}

/// The CPU with two threads, shared by all tests: a finite difference calls an operation four times for each number.
pub fn oracle() -> &'static OnHost<Cpu> {
    static CPU: LazyLock<OnHost<Cpu>> = LazyLock::new(|| OnHost(Cpu::new(2, Products::Exact).unwrap()));
    &CPU
}

/// Checks that every number is within `tolerance` of the largest number or of 1.
#[track_caller]
pub fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1.0f64, |most, x| most.max(x.abs()));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let distance = (f64::from(found) - expected).abs();
        assert!(distance <= tolerance * largest, "{what}: expected {expected} at {i}, found {found}");
    }
}

/// Checks that `found` is [`HELD`] plus the gradient of Σ dy f(x) at `x`.
#[track_caller]
pub fn assert_gradient(found: &[f32], x: &[f32], dy: &[f32], f: impl Fn(&Vec<f32>) -> Vec<f32>, what: &str) {
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
pub fn dot(a: impl IntoIterator<Item = f32>, b: impl IntoIterator<Item = f32>) -> f64 {
    a.into_iter().zip(b).map(|(a, b)| f64::from(a) * f64::from(b)).sum()
}

/// Packs pairs with these numbers of tokens: prompt, chosen, rejected. Tokens repeat.
pub fn packed(lengths: &[[usize; 3]]) -> Packed {
    let mut packed = Packed::default();
    for (i, lengths) in lengths.iter().enumerate() {
        let [prompt, chosen, rejected] =
            lengths.map(|n| (0..n).map(|j| ((3 * i + j * j) % 5) as Token).collect::<Vec<Token>>());
        packed.push(&prompt, &chosen, &rejected);
    }
    packed
}

/// The rows of each text that [`packed`] packs: a prompt followed by one of its answers.
pub fn texts(lengths: &[[usize; 3]]) -> Vec<Vec<usize>> {
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
