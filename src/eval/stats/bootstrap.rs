//! Percentile bootstrap over prompts, and quantiles.
//!
//! Prompts are resampled, not continuations, because the k continuations of a prompt are not independent.
//! All metrics of a language and both runs of a comparison share the same resamples, so their replicates
//! are paired. (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.)

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::eval::result::{BootstrapInfo, Estimate};

/// How often each resample draws each prompt.
///
/// Depends only on the seed, the label and the number of prompts, not on threads.
#[derive(Debug, Clone)]
pub struct Resamples {
    n_prompts: usize,
    level: f64,
    /// `[resamples, n_prompts]`. With up to 255 prompts a count always fits into a byte. With more, a
    /// prompt is drawn once on average, and 256 times with a probability below 1/256!.
    counts: Vec<u8>,
}

/// A value with its interval and the resampled values behind the interval.
#[derive(Debug, Clone, PartialEq)]
pub struct Replicated {
    /// The value and its interval.
    pub estimate: Estimate,
    /// The value in each resample; NaN if the resample has nothing to count. Empty with fewer than two
    /// prompts.
    pub replicates: Vec<f64>,
}

impl Resamples {
    /// Draws `info.resamples` resamples of `n_prompts` prompts.
    ///
    /// `label` is the language: each language has its own random stream.
    pub fn draw(info: &BootstrapInfo, label: &str, n_prompts: usize) -> Resamples {
        let mut hash = Sha256::new();
        hash.update(b"bootstrap\0");
        hash.update(info.seed.to_le_bytes());
        hash.update(label.as_bytes());
        let seed: [u8; 32] = hash.finalize().into();

        let mut counts = vec![0u8; info.resamples as usize * n_prompts];
        if n_prompts > 0 {
            counts.par_chunks_mut(n_prompts).enumerate().for_each(|(index, counts)| {
                let mut rng = ChaCha8Rng::from_seed(seed);
                rng.set_stream(index as u64);
                for _ in 0..n_prompts {
                    // The high half of a 64 x 64 bit product is uniform to within n_prompts / 2^64.
                    let drawn = (u128::from(rng.next_u64()) * n_prompts as u128) >> 64;
                    let count = &mut counts[drawn as usize];
                    *count = count.saturating_add(1);
                }
            });
        }
        Resamples { n_prompts, level: info.level, counts }
    }

    /// The sum of `numerators` divided by the sum of `denominators`, both `[n_prompts]`.
    ///
    /// With denominators of 1 this is the mean of per-prompt values. A prompt with denominator 0 has
    /// nothing to count; `None` if all prompts are like that.
    pub fn ratio(&self, numerators: &[f64], denominators: &[f64]) -> Option<Replicated> {
        assert_eq!(numerators.len(), self.n_prompts, "one numerator per prompt");
        assert_eq!(denominators.len(), self.n_prompts, "one denominator per prompt");
        let total: f64 = denominators.iter().sum();
        if total <= 0.0 {
            return None;
        }
        let value = numerators.iter().sum::<f64>() / total;
        let n_counted = denominators.iter().filter(|&&denominator| denominator > 0.0).count();
        Some(self.replicated(value, n_counted, |counts| {
            let (mut numerator, mut denominator) = (0.0, 0.0);
            for (index, &count) in counts.iter().enumerate() {
                let count = f64::from(count);
                numerator += count * numerators[index];
                denominator += count * denominators[index];
            }
            numerator / denominator
        }))
    }

    /// Quantiles of all values pooled, by the "midpoint" rule.
    ///
    /// `groups` is `[n_prompts][values]`; `quantiles` are in [0, 1]. One result per quantile; `None` without
    /// any value.
    pub fn quantiles(&self, groups: &[Vec<f64>], quantiles: &[f64]) -> Option<Vec<Replicated>> {
        assert_eq!(groups.len(), self.n_prompts, "one group per prompt");
        let mut pooled: Vec<(f64, usize)> = groups
            .iter()
            .enumerate()
            .flat_map(|(group, values)| values.iter().map(move |&value| (value, group)))
            .collect();
        if pooled.is_empty() {
            return None;
        }
        pooled.sort_by(|a, b| a.0.total_cmp(&b.0));
        let sorted: Vec<f64> = pooled.iter().map(|&(value, _)| value).collect();
        let n_counted = groups.iter().filter(|values| !values.is_empty()).count();

        // [resamples][quantiles]. One pass over the pooled values finds every quantile of a resample.
        let rows: Vec<Vec<f64>> = if n_counted < 2 {
            Vec::new()
        } else {
            self.counts
                .par_chunks(self.n_prompts)
                .map(|counts| {
                    let n = groups.iter().zip(counts).map(|(g, &c)| g.len() * usize::from(c)).sum();
                    weighted_quantiles(&pooled, counts, n, quantiles)
                })
                .collect()
        };
        let one = |index: usize, &quantile: &f64| {
            let replicates: Vec<f64> = rows.iter().map(|row| row[index]).collect();
            interval(midpoint_quantile(&sorted, quantile), replicates, self.level)
        };
        Some(quantiles.iter().enumerate().map(|(index, quantile)| one(index, quantile)).collect())
    }

    fn replicated(
        &self,
        value: f64,
        n_counted: usize,
        statistic: impl Fn(&[u8]) -> f64 + Send + Sync,
    ) -> Replicated {
        let replicates = if n_counted < 2 {
            Vec::new()
        } else {
            self.counts.par_chunks(self.n_prompts).map(statistic).collect()
        };
        interval(value, replicates, self.level)
    }
}

/// Unweighted mean of several values (languages), with the interval of the means of their replicates.
///
/// Languages are resampled independently. If their prompts are translations of the same sentences, they
/// are not quite independent, and the interval is somewhat too narrow. The mean has no interval if a part
/// has none; `None` without parts.
pub fn mean(parts: &[&Replicated], level: f64) -> Option<Replicated> {
    combine(parts, level, |values| values.iter().sum::<f64>() / values.len() as f64)
}

/// `b` minus `a`, replicate by replicate; both must come from the same [`Resamples`].
pub fn difference(a: &Replicated, b: &Replicated, level: f64) -> Replicated {
    combine(&[a, b], level, |values| values[1] - values[0]).expect("there are two parts")
}

fn combine(parts: &[&Replicated], level: f64, with: impl Fn(&[f64]) -> f64) -> Option<Replicated> {
    if parts.is_empty() {
        return None;
    }
    let values: Vec<f64> = parts.iter().map(|part| part.estimate.value).collect();
    let n_replicates = parts.iter().map(|part| part.replicates.len()).min().unwrap_or(0);
    let replicates = (0..n_replicates)
        .map(|index| with(&parts.iter().map(|part| part.replicates[index]).collect::<Vec<_>>()))
        .collect();
    Some(interval(with(&values), replicates, level))
}

fn interval(value: f64, replicates: Vec<f64>, level: f64) -> Replicated {
    let mut sorted: Vec<f64> = replicates.iter().copied().filter(|replicate| replicate.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = if sorted.is_empty() {
        (None, None)
    } else {
        let tail = (1.0 - level) / 2.0;
        (Some(linear_quantile(&sorted, tail)), Some(linear_quantile(&sorted, 1.0 - tail)))
    };
    Replicated { estimate: Estimate { value, low, high }, replicates }
}

/// The quantile of ascending, non-empty `sorted` by the midpoint rule, which the paper uses for perplexity.
///
/// It lies halfway between the two neighbours of rank (n - 1) q, as in
/// `numpy.percentile(…, method="midpoint")`.
pub fn midpoint_quantile(sorted: &[f64], quantile: f64) -> f64 {
    let (below, above) = midpoint_ranks(sorted.len(), quantile);
    (sorted[below] + sorted[above]) / 2.0
}

/// The quantile of ascending, non-empty `sorted` by linear interpolation, as in `numpy.percentile`.
fn linear_quantile(sorted: &[f64], quantile: f64) -> f64 {
    let rank = quantile.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let below = rank.floor() as usize;
    let above = rank.ceil() as usize;
    sorted[below] + (sorted[above] - sorted[below]) * (rank - below as f64)
}

fn midpoint_ranks(n: usize, quantile: f64) -> (usize, usize) {
    let rank = quantile.clamp(0.0, 1.0) * (n - 1) as f64;
    (rank.floor() as usize, rank.ceil() as usize)
}

/// [`midpoint_quantile`] for each of `quantiles`, counting a value as often as its group was drawn.
///
/// `n` is the number of values with repeats; NaN if it is 0.
fn weighted_quantiles(pooled: &[(f64, usize)], counts: &[u8], n: usize, quantiles: &[f64]) -> Vec<f64> {
    if n == 0 {
        return vec![f64::NAN; quantiles.len()];
    }
    let mut wanted: Vec<usize> = quantiles
        .iter()
        .flat_map(|&quantile| {
            let (below, above) = midpoint_ranks(n, quantile);
            [below, above]
        })
        .collect();
    let of_quantile = wanted.clone();
    wanted.sort_unstable();
    wanted.dedup();
    let mut found = Vec::with_capacity(wanted.len());
    let mut n_passed = 0;
    for &(value, group) in pooled {
        n_passed += usize::from(counts[group]);
        while found.len() < wanted.len() && wanted[found.len()] < n_passed {
            found.push(value);
        }
        if found.len() == wanted.len() {
            break;
        }
    }
    let at = |rank: usize| found[wanted.binary_search(&rank).expect("every rank is in `wanted`")];
    of_quantile.chunks(2).map(|ranks| (at(ranks[0]) + at(ranks[1])) / 2.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: BootstrapInfo = BootstrapInfo { resamples: 1000, level: 0.95, seed: 7 };

    #[test]
    fn resamples_depend_on_seed_and_label_but_not_on_threads() {
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let four = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        let values: Vec<f64> = (0..50).map(|i| f64::from(i) / 50.0).collect();
        let ones = vec![1.0; 50];
        let run = || Resamples::draw(&INFO, "de", 50).ratio(&values, &ones).unwrap();
        assert_eq!(one.install(run), four.install(run));
        let other_language = Resamples::draw(&INFO, "fr", 50).ratio(&values, &ones).unwrap();
        let other_seed =
            Resamples::draw(&BootstrapInfo { seed: 8, ..INFO }, "de", 50).ratio(&values, &ones).unwrap();
        assert_ne!(run().replicates, other_language.replicates);
        assert_ne!(run().replicates, other_seed.replicates);
    }

    #[test]
    fn every_resample_draws_as_many_prompts_as_there_are() {
        for n_prompts in [1, 2, 255, 300] {
            let resamples = Resamples::draw(&INFO, "de", n_prompts);
            for counts in resamples.counts.chunks(n_prompts) {
                assert_eq!(counts.iter().map(|&count| usize::from(count)).sum::<usize>(), n_prompts);
            }
        }
    }

    #[test]
    fn one_prompt_has_a_value_but_no_interval() {
        let found = Resamples::draw(&INFO, "de", 1).ratio(&[0.3], &[1.0]).unwrap();
        assert_eq!(found.estimate, Estimate { value: 0.3, low: None, high: None });
        // Of two prompts, one has nothing to count, so there is one prompt.
        let found = Resamples::draw(&INFO, "de", 2).ratio(&[0.3, 0.0], &[1.0, 0.0]).unwrap();
        assert_eq!(found.estimate, Estimate { value: 0.3, low: None, high: None });
        let found = Resamples::draw(&INFO, "de", 2).quantiles(&[vec![3.0, 4.0], vec![]], &[0.5]).unwrap();
        assert_eq!(found[0].estimate, Estimate { value: 3.5, low: None, high: None });
    }

    #[test]
    fn nothing_to_count_is_none_and_not_zero() {
        assert_eq!(Resamples::draw(&INFO, "de", 2).ratio(&[0.0, 0.0], &[0.0, 0.0]), None);
        assert_eq!(Resamples::draw(&INFO, "de", 0).ratio(&[], &[]), None);
        assert_eq!(Resamples::draw(&INFO, "de", 1).quantiles(&[vec![]], &[0.5]), None);
    }

    #[test]
    fn equal_values_have_an_interval_of_no_width() {
        let found = Resamples::draw(&INFO, "de", 9).ratio(&[0.25; 9], &[1.0; 9]).unwrap();
        assert_eq!(found.estimate, Estimate { value: 0.25, low: Some(0.25), high: Some(0.25) });
    }

    #[test]
    fn the_interval_of_a_fraction_matches_the_normal_approximation() {
        // 400 prompts, half of them 1: standard error sqrt(0.5 * 0.5 / 400) = 0.025, so that 95% lie
        // within 0.5 +- 1.96 * 0.025 = 0.451 to 0.549. The ends of 1000 resamples are good to about 0.004.
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let found = Resamples::draw(&INFO, "de", 400).ratio(&values, &[1.0; 400]).unwrap();
        assert!((found.estimate.low.unwrap() - 0.451).abs() < 0.008, "{:?}", found.estimate);
        assert!((found.estimate.high.unwrap() - 0.549).abs() < 0.008, "{:?}", found.estimate);
    }

    #[test]
    fn quantiles_follow_the_midpoint_rule() {
        // n = 4: ranks (n - 1) q are 0.75, 1.5 and 2.25, so the midpoints of (1, 2), (2, 4) and (4, 8).
        let sorted = [1.0, 2.0, 4.0, 8.0];
        assert_eq!(midpoint_quantile(&sorted, 0.25), 1.5);
        assert_eq!(midpoint_quantile(&sorted, 0.5), 3.0);
        assert_eq!(midpoint_quantile(&sorted, 0.75), 6.0);
        // n = 5: whole ranks 1, 2 and 3 need no neighbour.
        let sorted = [1.0, 2.0, 4.0, 8.0, 16.0];
        assert_eq!(midpoint_quantile(&sorted, 0.25), 2.0);
        assert_eq!(midpoint_quantile(&sorted, 0.5), 4.0);
        assert_eq!(midpoint_quantile(&sorted, 0.75), 8.0);
        assert_eq!(linear_quantile(&[0.0, 10.0], 0.025), 0.25);
    }

    #[test]
    fn quantiles_of_a_resample_match_those_of_the_repeated_values() {
        let groups = [vec![1.0, 9.0], vec![4.0], vec![2.0, 3.0, 5.0], vec![]];
        let mut pooled: Vec<(f64, usize)> =
            groups.iter().enumerate().flat_map(|(g, v)| v.iter().map(move |&x| (x, g))).collect();
        pooled.sort_by(|a, b| a.0.total_cmp(&b.0));
        for counts in [[1, 1, 1, 1], [0, 4, 0, 0], [2, 0, 1, 1], [0, 1, 3, 0]] {
            let mut repeated = Vec::new();
            for (group, &count) in groups.iter().zip(&counts) {
                for _ in 0..count {
                    repeated.extend_from_slice(group);
                }
            }
            repeated.sort_by(f64::total_cmp);
            let found = weighted_quantiles(&pooled, &counts, repeated.len(), &[0.25, 0.5, 0.75]);
            let expected: Vec<f64> =
                [0.25, 0.5, 0.75].iter().map(|&q| midpoint_quantile(&repeated, q)).collect();
            assert_eq!(found, expected, "{counts:?}");
        }
        assert!(weighted_quantiles(&pooled, &[0, 0, 0, 4], 0, &[0.5])[0].is_nan());
    }

    #[test]
    fn the_mean_over_one_language_equals_that_language() {
        let one = Resamples::draw(&INFO, "de", 4).ratio(&[0.1, 0.2, 0.3, 0.9], &[1.0; 4]).unwrap();
        assert_eq!(mean(&[&one], INFO.level).unwrap(), one);
        assert_eq!(mean(&[], INFO.level), None);
    }

    #[test]
    fn the_mean_over_languages_is_unweighted() {
        // One language has 2 prompts with mean 0.2, the other 4 with mean 0.8: (0.2 + 0.8) / 2 = 0.5.
        let small = Resamples::draw(&INFO, "de", 2).ratio(&[0.1, 0.3], &[1.0; 2]).unwrap();
        let large = Resamples::draw(&INFO, "fr", 4).ratio(&[0.7, 0.9, 0.8, 0.8], &[1.0; 4]).unwrap();
        let both = mean(&[&small, &large], INFO.level).unwrap();
        assert!((both.estimate.value - 0.5).abs() < 1e-12);
        assert!((both.replicates[3] - (small.replicates[3] + large.replicates[3]) / 2.0).abs() < 1e-12);
    }

    #[test]
    fn a_run_minus_itself_is_zero_with_an_interval_of_no_width() {
        let one = Resamples::draw(&INFO, "de", 4).ratio(&[0.1, 0.2, 0.3, 0.9], &[1.0; 4]).unwrap();
        let found = difference(&one, &one, INFO.level).estimate;
        assert_eq!(found, Estimate { value: 0.0, low: Some(0.0), high: Some(0.0) });
    }
}
