//! Logistic regression, trained as the paper trains its probe.
//!
//! Adam minimises the binary cross-entropy in small batches. The epoch with the lowest held-out loss is kept.

use serde::{Deserialize, Serialize};

use super::file::sigmoid;
use crate::engine::random::{random_stream, shuffle};
use crate::error::{Error, Result};
use crate::finite;

/// The most epochs: their losses are kept.
const MOST_EPOCHS: usize = 1_000_000;

/// Training options of a probe. The defaults are the paper's (Table 7).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ProbeOptions {
    /// Learning rate of Adam. The paper's table says 1e-4; its script uses 1e-6.
    pub learning_rate: f64,
    /// Number of epochs.
    pub n_epochs: usize,
    /// Texts per step.
    pub batch_size: usize,
    /// Share of the texts to hold out, in (0, 1).
    pub held_out: f64,
    /// Seed of the split and the order of the texts.
    pub seed: u64,
}

impl Default for ProbeOptions {
    fn default() -> Self {
        ProbeOptions { learning_rate: 1e-4, n_epochs: 20, batch_size: 10, held_out: 0.1, seed: 99 }
    }
}

/// Mean losses of one epoch, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// Over the training texts, each taken before its own step.
    pub train_loss: f64,
    /// Over the held-out texts, after the epoch.
    pub held_out_loss: f64,
}

/// Results of the probe on the held-out texts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    /// Number of texts.
    pub n: usize,
    /// Number of toxic texts.
    pub n_toxic: usize,
    /// Share classified correctly, at probability 0.5.
    pub accuracy: f64,
    /// Accuracy of always guessing the more frequent label, for comparison.
    pub majority_accuracy: f64,
    /// Probability that a toxic text gets a higher score than a benign one; ties count half.
    pub auc: f64,
}

/// A trained probe with its losses and held-out results.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// The probe vector, shape `[n_embd]`.
    pub weight: Vec<f32>,
    /// The epoch whose weight was kept, from 1: the one with the lowest held-out loss.
    pub best_epoch: usize,
    /// Losses of each epoch, shape `[n_epochs]`.
    pub epochs: Vec<Epoch>,
    /// Number of training texts.
    pub n_train: usize,
    /// Results on the other texts.
    pub held_out: HeldOut,
}

// Adam's other constants; PyTorch's defaults.
const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// Adam (Kingma and Ba 2015, algorithm 1) on one vector.
#[derive(Debug)]
struct Adam {
    learning_rate: f64,
    /// First and second moments, shape `[n_embd]` each.
    m: Vec<f64>,
    v: Vec<f64>,
    step: i32,
}

impl Adam {
    fn new(n: usize, learning_rate: f64) -> Adam {
        Adam { learning_rate, m: vec![0.0; n], v: vec![0.0; n], step: 0 }
    }

    fn step(&mut self, weight: &mut [f64], gradient: &[f64]) {
        self.step += 1;
        let (c1, c2) = (1.0 - BETA_1.powi(self.step), 1.0 - BETA_2.powi(self.step));
        for (((w, g), m), v) in weight.iter_mut().zip(gradient).zip(&mut self.m).zip(&mut self.v) {
            *m = BETA_1 * *m + (1.0 - BETA_1) * g;
            *v = BETA_2 * *v + (1.0 - BETA_2) * g * g;
            *w -= self.learning_rate * (*m / c1) / ((*v / c2).sqrt() + EPSILON);
        }
    }
}

/// Trains a probe on `features`, shape `[n][n_embd]`, with `is_toxic`, shape `[n]`.
///
/// The weight starts at zero, so only the texts determine its direction.
///
/// # Errors
/// [`Error::Setting`] for an option out of range, a split that leaves one part without toxic or without
/// benign texts, or a held-out loss that is not finite in any epoch. [`Error::NotFinite`] for a feature that is NaN or
/// infinite.
///
/// # Panics
/// If the numbers of labels and features differ, or features differ in length.
pub fn fit(features: &[Vec<f32>], is_toxic: &[bool], options: &ProbeOptions) -> Result<Fit> {
    assert_eq!(features.len(), is_toxic.len(), "one label per text");
    let n_embd = features.first().map_or(0, Vec::len);
    assert!(features.iter().all(|x| x.len() == n_embd), "features must have one length");
    check(is_toxic, options)?;
    for (text, values) in features.iter().enumerate() {
        if let Some((at, found)) = finite::not_finite(values) {
            return Err(Error::not_finite(format!("feature {at} of text {}", text + 1), found));
        }
    }
    let (train, held_out) = split(is_toxic, options)?;
    let mut random = random_stream(options.seed, "probe order", 0);
    let mut weight = vec![0f64; n_embd];
    let mut adam = Adam::new(n_embd, options.learning_rate);
    let mut epochs = Vec::new();
    let mut best: Option<(f64, usize, Vec<f64>)> = None;
    let mut order = train.clone();
    for epoch in 1..=options.n_epochs {
        shuffle(&mut order, &mut random);
        let mut train_loss = 0.0;
        for batch in order.chunks(options.batch_size) {
            let mut gradient = vec![0f64; n_embd];
            for &i in batch {
                let z = dot(&weight, &features[i]);
                train_loss += loss(z, is_toxic[i]);
                // d loss / d z = sigmoid(z) - y
                let scale = (sigmoid(z) - f64::from(u8::from(is_toxic[i]))) / batch.len() as f64;
                gradient.iter_mut().zip(&features[i]).for_each(|(g, &x)| *g += scale * f64::from(x));
            }
            adam.step(&mut weight, &gradient);
        }
        let held_out_loss =
            held_out.iter().map(|&i| loss(dot(&weight, &features[i]), is_toxic[i])).sum::<f64>();
        let held_out_loss = held_out_loss / held_out.len() as f64;
        epochs.push(Epoch { train_loss: train_loss / train.len() as f64, held_out_loss });
        if held_out_loss.is_finite() && best.as_ref().is_none_or(|(least, ..)| held_out_loss < *least) {
            best = Some((held_out_loss, epoch, weight.clone()));
        }
    }
    let best =
        best.map(|(_, epoch, weight)| (epoch, weight.into_iter().map(|w| w as f32).collect::<Vec<f32>>()));
    // f32 may be too small for a weight.
    let best = best.filter(|(_, weight)| finite::not_finite(weight).is_none());
    let (best_epoch, weight) = best.ok_or_else(|| {
        Error::setting(
            "--learning-rate",
            "expected a finite held-out loss and finite weights in some epoch, found none: the probe diverged",
        )
    })?;
    let scores: Vec<(f64, bool)> =
        held_out.iter().map(|&i| (score(&weight, &features[i]), is_toxic[i])).collect();
    let n_toxic = scores.iter().filter(|(_, is_toxic)| *is_toxic).count();
    let n = scores.len();
    let n_right = scores.iter().filter(|&&(z, is_toxic)| (z > 0.0) == is_toxic).count();
    Ok(Fit {
        weight,
        best_epoch,
        epochs,
        n_train: train.len(),
        held_out: HeldOut {
            n,
            n_toxic,
            accuracy: n_right as f64 / n as f64,
            majority_accuracy: n_toxic.max(n - n_toxic) as f64 / n as f64,
            auc: auc(scores),
        },
    })
}

/// Checks that [`fit`] can train on these labels, before the features are computed.
///
/// # Errors
/// Those of [`fit`] for the options and the split.
pub fn check(is_toxic: &[bool], options: &ProbeOptions) -> Result<()> {
    let refuse = |flag: &str, reason: String| Err(Error::setting(flag, reason));
    if !(options.learning_rate > 0.0 && options.learning_rate.is_finite()) {
        return refuse(
            "--learning-rate",
            format!("expected a number above 0, found {}", options.learning_rate),
        );
    }
    if !(options.held_out > 0.0 && options.held_out < 1.0) {
        return refuse("--held-out", format!("expected a share between 0 and 1, found {}", options.held_out));
    }
    for (flag, n) in [("--epochs", options.n_epochs), ("--train-batch", options.batch_size)] {
        if n == 0 {
            return refuse(flag, "expected at least 1, found 0".into());
        }
    }
    if options.n_epochs > MOST_EPOCHS {
        return refuse("--epochs", format!("expected at most {MOST_EPOCHS}, found {}", options.n_epochs));
    }
    split(is_toxic, options).map(drop)
}

/// Splits indices into training and held-out texts with the same share of toxic texts, in a seeded order.
fn split(is_toxic: &[bool], options: &ProbeOptions) -> Result<(Vec<usize>, Vec<usize>)> {
    let mut random = random_stream(options.seed, "probe split", 0);
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    for label in [false, true] {
        let mut of_label: Vec<usize> = (0..is_toxic.len()).filter(|&i| is_toxic[i] == label).collect();
        shuffle(&mut of_label, &mut random);
        let n_held_out = (of_label.len() as f64 * options.held_out).round() as usize;
        if n_held_out == 0 || n_held_out == of_label.len() {
            let name = if label { "toxic" } else { "benign" };
            return Err(Error::setting(
                "--held-out",
                format!(
                    "expected {name} texts in both parts, found {n_held_out} of {} to hold out",
                    of_label.len()
                ),
            ));
        }
        train.extend(of_label.split_off(n_held_out));
        held_out.extend(of_label);
    }
    Ok((train, held_out))
}

/// The score of the finished probe.
fn score(weight: &[f32], x: &[f32]) -> f64 {
    weight.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum()
}

fn dot(weight: &[f64], x: &[f32]) -> f64 {
    weight.iter().zip(x).map(|(w, &x)| w * f64::from(x)).sum()
}

/// Binary cross-entropy of `sigmoid(z)` in nats: `ln(1 + e^z) - y z`, computed without overflow.
fn loss(z: f64, is_toxic: bool) -> f64 {
    let softplus = z.max(0.0) + (-z.abs()).exp().ln_1p();
    if is_toxic { softplus - z } else { softplus }
}

/// Area under the ROC curve, from ranks (Mann and Whitney); ties share their mean rank.
fn auc(mut scores: Vec<(f64, bool)>) -> f64 {
    scores.sort_by(|a, b| a.0.total_cmp(&b.0));
    let n_toxic = scores.iter().filter(|(_, is_toxic)| *is_toxic).count();
    let n_benign = scores.len() - n_toxic;
    let mut rank_sum = 0.0;
    let mut before = 0;
    for group in scores.chunk_by(|a, b| a.0 == b.0) {
        let mean_rank = before as f64 + (group.len() as f64 + 1.0) / 2.0;
        rank_sum += mean_rank * group.iter().filter(|(_, is_toxic)| *is_toxic).count() as f64;
        before += group.len();
    }
    (rank_sum - (n_toxic * (n_toxic + 1)) as f64 / 2.0) / (n_toxic * n_benign) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Points on both sides of a plane through the origin, with some noise.
    fn separable() -> (Vec<Vec<f32>>, Vec<bool>) {
        let mut random = random_stream(7, "test", 0);
        let mut uniform = || {
            use rand_core::Rng;
            (random.next_u64() >> 11) as f32 / (1u64 << 53) as f32 - 0.5
        };
        (0..400)
            .map(|i| {
                let is_toxic = i % 4 == 0;
                let side = if is_toxic { 1.0 } else { -1.0 };
                (vec![side + uniform(), -0.5 * side + uniform(), uniform()], is_toxic)
            })
            .unzip()
    }

    #[test]
    fn the_gradient_used_in_training_is_that_of_the_loss() {
        for (z, is_toxic) in [(0.3, true), (-2.0, false), (30.0, true), (-30.0, true)] {
            let h = 1e-5;
            let difference = (loss(z + h, is_toxic) - loss(z - h, is_toxic)) / (2.0 * h);
            let gradient = sigmoid(z) - f64::from(u8::from(is_toxic));
            assert!((difference - gradient).abs() < 1e-8, "{z} {is_toxic}");
        }
        assert_eq!(loss(0.0, true), std::f64::consts::LN_2);
        assert!(loss(1000.0, false) == 1000.0 && loss(1000.0, true) == 0.0);
    }

    #[test]
    fn the_first_step_of_adam_is_the_learning_rate_against_the_sign_of_the_gradient() {
        // m / c1 = g and v / c2 = g^2 at step 1: the step is lr g / (|g| + epsilon).
        let mut weight = [0.0, 1.0];
        let mut adam = Adam::new(2, 0.1);
        adam.step(&mut weight, &[4.0, -2.0]);
        assert!((weight[0] + 0.1).abs() < 1e-8 && (weight[1] - 1.1).abs() < 1e-8, "{weight:?}");
        // Step 2 with gradient 0: m = 0.9 * 0.4, v = 0.999 * 0.016; c1 = 0.19, c2 = 0.001999.
        adam.step(&mut weight, &[0.0, 0.0]);
        let expected = -0.1 - 0.1 * (0.36 / 0.19) / (0.999 * 0.016f64 / 0.001999).sqrt();
        assert!((weight[0] - expected).abs() < 1e-8, "{} {expected}", weight[0]);
    }

    #[test]
    fn separable_texts_are_separated_and_shuffled_labels_are_not() {
        let (features, labels) = separable();
        let options = ProbeOptions { learning_rate: 0.01, ..ProbeOptions::default() };
        let found = fit(&features, &labels, &options).unwrap();
        assert_eq!((found.held_out.accuracy, found.held_out.auc), (1.0, 1.0));
        assert_eq!((found.held_out.n, found.held_out.n_toxic, found.n_train), (40, 10, 360));
        assert_eq!(found.held_out.majority_accuracy, 0.75);
        // The direction is the difference of the two centres, (1, -0.5, 0).
        let [x, y, z] = found.weight[..] else { panic!("three numbers") };
        assert!(x > 0.0 && y < 0.0 && z.abs() < 0.2 * x, "{:?}", found.weight);
        let mut shuffled = labels;
        shuffle(&mut shuffled, &mut random_stream(1, "test", 1));
        let found = fit(&features, &shuffled, &options).unwrap();
        assert!((0.25..0.75).contains(&found.held_out.auc), "{:?}", found.held_out);
    }

    #[test]
    fn the_seed_determines_the_probe() {
        let (features, labels) = separable();
        let options = ProbeOptions::default();
        let first = fit(&features, &labels, &options).unwrap();
        assert_eq!(first, fit(&features, &labels, &options).unwrap());
        assert_ne!(
            first.weight,
            fit(&features, &labels, &ProbeOptions { seed: 1, ..options }).unwrap().weight
        );
        assert_eq!(first.epochs[first.best_epoch - 1].held_out_loss, {
            first.epochs.iter().map(|e| e.held_out_loss).fold(f64::INFINITY, f64::min)
        });
    }

    #[test]
    fn rejects_features_that_are_not_finite_and_names_the_text() {
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut features, labels) = separable();
            features[7][2] = bad;
            let error = fit(&features, &labels, &ProbeOptions::default()).unwrap_err().to_string();
            assert!(error.starts_with("feature 2 of text 8: expected a finite number, found"), "{error}");
        }
    }

    #[test]
    fn rejects_a_learning_rate_at_which_the_probe_diverges() {
        let (features, labels) = separable();
        let options = ProbeOptions { learning_rate: f64::MAX, ..ProbeOptions::default() };
        let error = fit(&features, &labels, &options).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains("diverged"), "{error}");
    }

    #[test]
    fn auc_is_the_share_of_correctly_ordered_pairs_and_ties_count_half() {
        // Toxic 3, 2; benign 2, 1. Of four pairs, three are in the right order and one is tied.
        assert_eq!(auc(vec![(3.0, true), (2.0, true), (2.0, false), (1.0, false)]), 0.875);
        assert_eq!(auc(vec![(0.0, true), (0.0, false)]), 0.5);
        assert_eq!(auc(vec![(0.0, true), (1.0, false)]), 0.0);
    }

    #[test]
    fn rejects_options_out_of_range_and_splits_without_one_of_the_labels() {
        let (features, labels) = separable();
        let default = ProbeOptions::default();
        for (options, flag) in [
            (ProbeOptions { learning_rate: 0.0, ..default }, "--learning-rate"),
            (ProbeOptions { learning_rate: f64::NAN, ..default }, "--learning-rate"),
            (ProbeOptions { held_out: 1.0, ..default }, "--held-out"),
            (ProbeOptions { held_out: 0.001, ..default }, "--held-out"),
            (ProbeOptions { n_epochs: 0, ..default }, "--epochs"),
            (ProbeOptions { batch_size: 0, ..default }, "--train-batch"),
        ] {
            for error in [check(&labels, &options).err(), fit(&features, &labels, &options).err()] {
                let error = error.expect("check and fit both refuse it");
                assert!(error.is_usage() && error.to_string().starts_with(flag), "{options:?}: {error}");
            }
        }
        check(&labels, &default).unwrap();
    }
}
