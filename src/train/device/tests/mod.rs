//! What every device must pass: its operations against plain loops in f64, and its gradients against finite differences
//! of the CPU's operations. Buffers that are overwritten hold no numbers first.

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

/// What buffers hold before gradients are added to them.
pub const HELD: f32 = 0.25;

/// Of the largest number. Sums are of at most some hundred f32 numbers up to 1, each addition being off by
/// 6e-8 of the sum at most.
pub const SUMS: f64 = 1e-5;

/// From x to either side, in a finite difference: a power of two, so that steps from numbers below 1 are exact
/// but for the last bits, which are lost from x itself.
const STEP: f64 = 1.0 / 32.0;

/// Of the largest slope. A difference of order four is off by STEP^4 / 30 = 3e-8 of the fifth derivative, which
/// is up to some hundreds for a norm of few numbers; rounding the operation's results to f32 adds
/// 6e-8 / STEP = 2e-6 of them.
const SLOPES: f64 = 1e-4;

pub struct Random(ChaCha8Rng);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(ChaCha8Rng::seed_from_u64(seed))
    }

    /// From -1 up to 1.
    pub fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.0.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
    }
}

/// A device whose buffers are on the host, or seem to be.
pub trait Tested: Device<Buffer = Vec<f32>> {
    /// Largest relative error of an operand of a product with a frozen matrix.
    const PRODUCTS: f64;
    /// The same of a product of dense matrices.
    const DENSE: f64;
    /// How far embeddings may be from the numbers that blocks stand for, of the largest.
    const TABLES: f64;
}

impl Tested for OnHost<Cpu> {
    const PRODUCTS: f64 = 0.0;
    const DENSE: f64 = 0.0;
    const TABLES: f64 = 0.0;
}

/// The tests of a device, each as a function that is given the one of `$device`, if there is one.
macro_rules! device_tests {
    ($device:expr) => {
        crate::train::device::tests::device_tests! {
            $device,
            activation:
                activations_are_those_of_their_formulas,
                gradients_of_activations_are_their_finite_differences,
                gradients_of_many_numbers_are_those_of_one_at_a_time;
            attention:
                rows_of_packed_pairs_attend_as_in_texts_of_their_own,
                large_scores_do_not_overflow,
                gradients_of_attention_are_its_finite_differences;
            dense:
                dense_products_are_those_of_three_loops,
                what_a_result_held_is_not_read_where_it_does_not_count;
            head:
                log_probabilities_are_those_of_a_log_softmax,
                gradients_of_log_probabilities_are_their_finite_differences,
                logits_far_apart_give_finite_log_probabilities_and_no_number_gives_none;
            lookup:
                rows_of_a_table_are_gathered_by_token_position_and_output,
                gradients_are_scattered_to_every_row_that_was_gathered_once_for_each_time,
                embeddings_are_the_numbers_that_a_tokens_blocks_stand_for;
            norm:
                norms_are_those_of_their_formulas,
                gradients_of_norms_are_their_finite_differences,
                gradients_of_weights_are_sums_over_all_rows,
                a_norm_of_one_number_is_its_sign_and_less_its_mean_nothing;
            optimizer:
                a_step_of_rmsprop_is_that_which_is_derived_by_hand,
                steps_of_adamw_are_those_that_are_derived_by_hand,
                epsilon_stands_beside_the_root_and_not_below_it,
                numbers_are_stepped_each_by_itself,
                many_tensors_at_once_are_stepped_as_one_by_one;
            preference:
                losses_of_pairs_are_those_of_the_formulas_in_f64,
                slopes_of_the_mean_loss_are_its_finite_differences,
                a_policy_that_is_its_reference_costs_ln_2_to_the_bit,
                what_is_no_number_stays_in_its_pair;
            product:
                products_are_those_with_the_numbers_that_blocks_stand_for,
                rows_that_hold_no_number_stay_none_and_leave_others_alone,
                products_of_one_input_are_those_of_one_matrix_at_a_time,
                rejects_a_matrix_whose_bytes_are_not_those_of_its_shape;
            rope:
                heads_are_rotated_by_their_positions_and_back_again,
                no_rows_are_nothing_to_rotate;
            rows:
                buffers_hold_what_is_written_to_them,
                sums_over_rows_and_to_rows_are_those_of_two_loops,
                columns_are_added_from_one_place_to_another;
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

/// What the relative error `u` of both operands makes of a sum of products, of the sum of their absolute values.
pub fn rounding(u: f64) -> f64 {
    2.0 * u + u * u
}

/// The sum of a_i b_i, and of their absolute values.
pub fn dot_and_magnitude(a: impl IntoIterator<Item = f32>, b: impl IntoIterator<Item = f32>) -> (f64, f64) {
    let products = a.into_iter().zip(b).map(|(a, b)| f64::from(a) * f64::from(b));
    products.fold((0.0, 0.0), |(sum, magnitude), x| (sum + x, magnitude + x.abs()))
}

/// Every number within its bound, and [`SUMS`] of the largest or of 1.
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

/// Two threads, started once: a finite difference calls an operation four times for each number.
pub fn oracle() -> &'static OnHost<Cpu> {
    static CPU: LazyLock<OnHost<Cpu>> = LazyLock::new(|| OnHost(Cpu::new(2, Products::Exact).unwrap()));
    &CPU
}

/// Every number within `tolerance` of the largest, or of 1.
#[track_caller]
pub fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1.0f64, |most, x| most.max(x.abs()));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let distance = (f64::from(found) - expected).abs();
        assert!(distance <= tolerance * largest, "{what}: expected {expected} at {i}, found {found}");
    }
}

/// `found` is [`HELD`] and the gradient of Σ dy f(x) at `x`.
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

/// Pairs of so many tokens: prompt, chosen, rejected. Tokens repeat.
pub fn packed(lengths: &[[usize; 3]]) -> Packed {
    let mut packed = Packed::default();
    for (i, lengths) in lengths.iter().enumerate() {
        let [prompt, chosen, rejected] =
            lengths.map(|n| (0..n).map(|j| ((3 * i + j * j) % 5) as Token).collect::<Vec<Token>>());
        packed.push(&prompt, &chosen, &rejected);
    }
    packed
}

/// The rows of each text that [`packed`] packs: a prompt's, and those of one of its answers.
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
