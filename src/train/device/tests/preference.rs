//! Losses on preference pairs.

use crate::train::data::pack::Packed;
use crate::train::device::tests::{Random, Tested, packed};
use crate::train::recipe::dpo::{AnswerLogps, LossKind, PairLoss, Preference};

/// Answers with more outputs than a warp has threads, answers of one token, and a batch of one pair.
const BATCHES: [&[[usize; 3]]; 3] =
    [&[[2, 3, 2], [1, 1, 33], [4, 70, 1]], &[[1, 1, 1]], &[[3, 5, 64], [2, 9, 9]]];

/// Step of a finite difference.
const STEP: f32 = 1.0 / 1024.0;

const KINDS: [LossKind; 3] = [LossKind::Sigmoid, LossKind::Ipo, LossKind::Hinge];

fn kinds() -> impl Iterator<Item = Preference> {
    let of = |kind| [0.05, 0.5].map(|beta| Preference { kind, beta, label_smoothing: 0.0 });
    let smoothed = Preference { kind: LossKind::Sigmoid, beta: 0.1, label_smoothing: 0.2 };
    KINDS.into_iter().flat_map(of).chain([smoothed])
}

/// Log-probabilities of every output, about -3, and references within ten of their sums.
fn numbers(packed: &Packed, random: &mut Random) -> (Vec<f32>, Vec<AnswerLogps>) {
    let logps: Vec<f32> = random.numbers(packed.outputs.len()).into_iter().map(|x| 3.0 * (x - 1.0)).collect();
    let sums = packed.sum_by_answer(&logps);
    let offsets = random.numbers(sums.len());
    let of = |i: usize| sums[i] + 10.0 * f64::from(offsets[i]);
    (logps, (0..sums.len() / 2).map(|i| AnswerLogps { chosen: of(2 * i), rejected: of(2 * i + 1) }).collect())
}

fn costs(
    device: &impl Tested,
    preference: Preference,
    packed: &Packed,
    (logps, references): (&Vec<f32>, &[AnswerLogps]),
    n_pairs: usize,
) -> (Vec<(AnswerLogps, PairLoss)>, Vec<f32>) {
    let rows = device.rows(packed).unwrap();
    let mut dlogps = vec![f32::NAN; packed.outputs.len()];
    let costs = device.preference_loss(preference, &rows, references, n_pairs, logps, &mut dlogps).unwrap();
    (costs, dlogps)
}

/// Checks a loss in f64: its logarithms and exponentials may differ in the last bits.
#[track_caller]
fn near(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() <= 1e-13 * expected.abs().max(1.0), "{what}: {found}, not {expected}");
}

pub fn losses_of_pairs_match_the_formulas_in_f64<D: Tested>(device: &D) {
    let mut random = Random::new(31);
    for lengths in BATCHES {
        let packed = packed(lengths);
        for preference in kinds() {
            let (logps, references) = numbers(&packed, &mut random);
            let (found, dlogps) = costs(device, preference, &packed, (&logps, &references), 7);
            assert_eq!(found.len(), lengths.len());
            let what = format!("{preference:?}, {lengths:?}");
            let Preference { kind, beta, label_smoothing } = preference;
            for (i, ((policy, loss), reference)) in found.iter().zip(&references).enumerate() {
                let [of_chosen, of_rejected] = [&packed.answers[2 * i], &packed.answers[2 * i + 1]];
                let sum = |of: &std::ops::Range<usize>| -> f64 {
                    logps[of.clone()].iter().map(|&x| f64::from(x)).sum()
                };
                assert_eq!((policy.chosen, policy.rejected), (sum(of_chosen), sum(of_rejected)), "{what}");
                let [mut chosen, mut rejected] =
                    [policy.chosen - reference.chosen, policy.rejected - reference.rejected];
                near(loss.chosen_reward, beta * chosen, &what);
                near(loss.rejected_reward, beta * rejected, &what);
                if kind == LossKind::Ipo {
                    chosen /= of_chosen.len() as f64;
                    rejected /= of_rejected.len() as f64;
                }
                let h = chosen - rejected;
                let cost = |h: f64| match kind {
                    // -ln(1 / (1 + e^-x)) = ln(1 + e^-x)
                    LossKind::Sigmoid => {
                        (1.0 - label_smoothing) * (-beta * h).exp().ln_1p()
                            + label_smoothing * (beta * h).exp().ln_1p()
                    }
                    LossKind::Ipo => (h - 0.5 / beta).powi(2),
                    LossKind::Hinge => (1.0 - beta * h).max(0.0),
                };
                near(loss.loss, cost(h), &what);
                for (of, slope) in [(of_chosen, loss.dchosen), (of_rejected, loss.drejected)] {
                    let expected = (slope / 7.0) as f32;
                    assert!(dlogps[of.clone()].iter().all(|&x| x == expected), "{what}: {dlogps:?}");
                }
            }
        }
    }
}

pub fn gradients_of_the_mean_loss_match_finite_differences<D: Tested>(device: &D) {
    let mut random = Random::new(32);
    let packed = packed(BATCHES[0]);
    for preference in kinds() {
        let (logps, references) = numbers(&packed, &mut random);
        let (_, dlogps) = costs(device, preference, &packed, (&logps, &references), 3);
        for output in 0..logps.len() {
            // The output after rounding to f32, and the mean loss.
            let mean = |offset: f32| -> (f64, f64) {
                let mut logps = logps.clone();
                logps[output] += offset;
                let (found, _) = costs(device, preference, &packed, (&logps, &references), 3);
                (f64::from(logps[output]), found.iter().map(|(_, loss)| loss.loss).sum::<f64>() / 3.0)
            };
            // At the hinge's kink the gradient may be either slope.
            let (left, at, right) = (mean(-STEP), mean(0.0), mean(STEP));
            let slope = |a: (f64, f64), b: (f64, f64)| (b.1 - a.1) / (b.0 - a.0);
            let [before, after] = [slope(left, at), slope(at, right)];
            let found = f64::from(dlogps[output]);
            let within = before.min(after) - 1e-3 <= found && found <= before.max(after) + 1e-3;
            assert!(within, "{preference:?}, output {output}: {found}, not from {before} to {after}");
        }
    }
}

pub fn a_policy_equal_to_its_reference_has_a_loss_of_exactly_ln_2<D: Tested>(device: &D) {
    let mut random = Random::new(33);
    for lengths in BATCHES {
        let packed = packed(lengths);
        let (logps, _) = numbers(&packed, &mut random);
        let sums = packed.sum_by_answer(&logps);
        let references: Vec<AnswerLogps> =
            sums.chunks_exact(2).map(|sums| AnswerLogps { chosen: sums[0], rejected: sums[1] }).collect();
        let preference = Preference { kind: LossKind::Sigmoid, beta: 0.1, label_smoothing: 0.0 };
        let (found, _) = costs(device, preference, &packed, (&logps, &references), lengths.len());
        for (_, loss) in found {
            assert_eq!((loss.loss, loss.margin()), (std::f64::consts::LN_2, 0.0));
            assert_eq!((loss.dchosen, loss.drejected), (-0.05, 0.05));
        }
    }
}

pub fn nan_stays_within_its_pair<D: Tested>(device: &D) {
    let packed = packed(&[[2, 3, 2], [1, 2, 2]]);
    let (mut logps, references) = numbers(&packed, &mut Random::new(34));
    logps[1] = f32::NAN;
    for preference in kinds() {
        let (found, dlogps) = costs(device, preference, &packed, (&logps, &references), 2);
        assert!(found[0].0.chosen.is_nan() && found[0].0.rejected.is_finite());
        let of_second = &dlogps[packed.answers[2].start..];
        assert!(found[1].1.loss.is_finite() && of_second.iter().all(|x| x.is_finite()), "{preference:?}");
    }
    // Log-probabilities far from zero.
    logps[1] = -1e6;
    let preference = Preference { kind: LossKind::Sigmoid, beta: 1.0, label_smoothing: 0.0 };
    let (found, _) = costs(device, preference, &packed, (&logps, &references), 2);
    assert!(found[0].1.loss > 9e5 && found[0].1.loss.is_finite() && found[0].1.dchosen == -1.0);
}
