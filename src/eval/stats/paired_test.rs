//! Two-sided tests of a paired difference: pure functions of the per-prompt differences.
//!
//! Equal runs have p = 1. An undefined test returns `None`, never 0 or NaN.

use statrs::distribution::{Binomial, ContinuousCDF, DiscreteCDF, Normal, StudentsT};

use crate::score::rank::average_ranks;

/// Mean per-prompt difference of one language, with the variance of the mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MeanDifference {
    /// Mean of the differences.
    pub mean: f64,
    /// Sample variance of the differences, divided by `n`.
    pub variance: f64,
    /// Number of differences.
    pub n: usize,
}

impl MeanDifference {
    /// The mean of `differences`; `None` with fewer than two.
    pub fn of(differences: &[f64]) -> Option<MeanDifference> {
        let n = differences.len();
        if n < 2 {
            return None;
        }
        let mean = differences.iter().sum::<f64>() / n as f64;
        let squares: f64 = differences.iter().map(|difference| (difference - mean).powi(2)).sum();
        Some(MeanDifference { mean, variance: squares / (n as f64 - 1.0) / n as f64, n })
    }
}

/// Paired t-test of the mean difference against 0, with n - 1 degrees of freedom.
///
/// `None` with fewer than two differences, or if all are equal but not 0.
pub fn paired_t(differences: &[f64]) -> Option<f64> {
    welch(&[MeanDifference::of(differences)?])
}

/// t-test of the unweighted mean of several languages' mean differences against 0.
///
/// The languages' variances add up, as for independent samples. The degrees of freedom are Welch and
/// Satterthwaite's: (sum v)^2 / sum(v^2 / (n - 1)). With one language this is the paired t-test. `None`
/// without languages, or if the variance is 0 but the difference is not.
pub fn welch(languages: &[MeanDifference]) -> Option<f64> {
    let n_languages = languages.len() as f64;
    let mean = languages.iter().map(|language| language.mean).sum::<f64>() / n_languages;
    let variance: f64 = languages.iter().map(|language| language.variance).sum();
    let squares: f64 =
        languages.iter().map(|language| language.variance.powi(2) / (language.n as f64 - 1.0)).sum();
    let error = variance.sqrt() / n_languages;
    if !mean.is_finite() || !error.is_finite() {
        return None;
    }
    // Rounding errors give equal differences a tiny variance instead of 0.
    if error <= 1e-12 * mean.abs() {
        return (mean == 0.0).then_some(1.0);
    }
    let t = StudentsT::new(0.0, 1.0, variance * variance / squares).ok()?;
    Some((2.0 * t.sf((mean / error).abs())).min(1.0))
}

/// Normal test of `mean` against 0, given the variance of the mean. Without variance it acts like [`welch`].
pub fn normal(mean: f64, variance: f64) -> Option<f64> {
    let error = variance.sqrt();
    if !mean.is_finite() || !error.is_finite() {
        return None;
    }
    if error <= 1e-12 * mean.abs() {
        return (mean == 0.0).then_some(1.0);
    }
    Some((2.0 * Normal::standard().sf((mean / error).abs())).min(1.0))
}

/// Exact McNemar test of the prompts whose verdicts differ.
///
/// `only_a` prompts are toxic only in the first run, `only_b` only in the second. Tests the smaller count
/// against Binomial(`only_a + only_b`, 1/2).
pub fn mcnemar(only_a: u64, only_b: u64) -> f64 {
    let n = only_a + only_b;
    let binomial = Binomial::new(0.5, n).expect("1/2 is a probability");
    (2.0 * binomial.cdf(only_a.min(only_b))).min(1.0)
}

/// Maximum number of differences for the exact distribution of rank sums.
const EXACT_WILCOXON: usize = 25;

/// Wilcoxon signed-rank test, two-sided. Differences of 0 are left out; p is 1 if all are 0.
///
/// Exact up to 25 differences, with or without ties: every assignment of signs is equally likely. With
/// more, the normal approximation with tie correction and without continuity correction, as in
/// `scipy.stats.wilcoxon(zero_method="wilcox", correction=False, method="asymptotic")`. `None` without
/// differences.
pub fn wilcoxon(differences: &[f64]) -> Option<f64> {
    if differences.is_empty() {
        return None;
    }
    let differences: Vec<f64> = differences.iter().copied().filter(|&difference| difference != 0.0).collect();
    if differences.is_empty() {
        return Some(1.0);
    }
    let sizes: Vec<f64> = differences.iter().map(|difference| difference.abs()).collect();
    let (ranks, ties) = average_ranks(&sizes);
    let signed = ranks.iter().zip(&differences);
    let positive: f64 = signed.filter(|&(_, &difference)| difference > 0.0).map(|(rank, _)| rank).sum();
    if differences.len() <= EXACT_WILCOXON {
        return Some(exact_wilcoxon(&ranks, positive));
    }
    let n = differences.len() as f64;
    let expected = n * (n + 1.0) / 4.0;
    let variance = n * (n + 1.0) * (2.0 * n + 1.0) / 24.0 - ties / 48.0;
    normal(positive - expected, variance)
}

/// Fraction of all sign assignments whose rank sum is at least as far from the expectation.
fn exact_wilcoxon(ranks: &[f64], positive: f64) -> f64 {
    // Average ranks are multiples of 1/2, so their doubles are integers.
    let doubled: Vec<usize> = ranks.iter().map(|rank| (2.0 * rank).round() as usize).collect();
    let total: usize = doubled.iter().sum();
    // Probability of each doubled rank sum of the positive differences.
    let mut probability = vec![0.0; total + 1];
    probability[0] = 1.0;
    for rank in doubled {
        for sum in (0..=total).rev() {
            let with = if sum >= rank { probability[sum - rank] } else { 0.0 };
            probability[sum] = 0.5 * (probability[sum] + with);
        }
    }
    let found = (2.0 * positive).round() as usize;
    let distance = (2 * found).abs_diff(total);
    let far = |&(sum, _): &(usize, &f64)| (2 * sum).abs_diff(total) >= distance;
    probability.iter().enumerate().filter(far).map(|(_, p)| p).sum::<f64>().min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Reference values are from scipy 1.17.1, by the call in the comment. D is:
    const D: [f64; 8] = [-0.30, -0.10, 0.05, -0.22, -0.10, 0.0, -0.41, 0.10];

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9 * expected.max(1e-3), "expected {expected}, found {found}");
    }

    #[test]
    fn the_paired_t_test_agrees_with_scipy() {
        // scipy.stats.ttest_1samp(D, 0).pvalue, which is ttest_rel(b, a) on D = b - a
        close(paired_t(&D).unwrap(), 0.09093958766302132);
    }

    #[test]
    fn a_very_small_p_value_is_not_rounded_to_zero() {
        // scipy.stats.ttest_1samp([1 + 0.001 * i for i in range(30)], 0).pvalue
        let differences: Vec<f64> = (0..30).map(|i| 1.0 + 0.001 * f64::from(i)).collect();
        let found = paired_t(&differences).unwrap();
        assert!((found / 1.4676830536926904e-61 - 1.0).abs() < 1e-4, "{found:e}");
    }

    #[test]
    fn the_exact_mcnemar_test_agrees_with_scipy() {
        // scipy.stats.binomtest(3, 15, 0.5).pvalue and binomtest(40, 160, 0.5).pvalue
        close(mcnemar(3, 12), 0.03515625);
        close(mcnemar(12, 3), 0.03515625);
        let found = mcnemar(40, 120);
        assert!((found / 1.7524500188513523e-10 - 1.0).abs() < 1e-6, "{found:e}");
    }

    #[test]
    fn mcnemar_matches_values_computed_by_hand() {
        // 0 of 3: 2 * (1/2)^3 = 0.25. Equal counts: the tail holds more than half, so 1.
        close(mcnemar(0, 3), 0.25);
        assert_eq!(mcnemar(2, 2), 1.0);
        assert_eq!(mcnemar(0, 0), 1.0, "no verdict changed");
    }

    #[test]
    fn the_exact_wilcoxon_test_counts_sign_assignments() {
        // Five of one sign: of 2^5 assignments, only all plus and all minus are as extreme.
        close(wilcoxon(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap(), 2.0 / 32.0);
        // D without its 0, with three ties at 0.1 (rank 3): the positive ranks are 1 and 3 of a total of 28,
        // and 16 of the 2^7 assignments have a positive sum of at most 4 or at least 24 (by enumeration).
        close(wilcoxon(&D).unwrap(), 16.0 / 128.0);
    }

    #[test]
    fn the_asymptotic_wilcoxon_test_agrees_with_scipy() {
        // d = [((-1)**i)*i*0.1+0.35 for i in range(30)];
        // scipy.stats.wilcoxon(d, zero_method="wilcox", correction=False, method="asymptotic").pvalue
        let d: Vec<f64> =
            (0..30).map(|i| if i % 2 == 0 { f64::from(i) } else { -f64::from(i) } * 0.1 + 0.35).collect();
        close(wilcoxon(&d).unwrap(), 0.37080877574877935);
    }

    #[test]
    fn the_test_of_a_mean_over_languages_agrees_with_scipy() {
        // Two languages with differences x and y: the mean of their means is 0 when mean(x) = mean(-y), so
        // scipy.stats.ttest_ind(D, [-v for v in Y], equal_var=False).pvalue, Y = [-0.2, 0.1, -0.3, -0.15]
        let parts = [MeanDifference::of(&D).unwrap(), MeanDifference::of(&[-0.2, 0.1, -0.3, -0.15]).unwrap()];
        close(welch(&parts).unwrap(), 0.04691901968899427);
    }

    #[test]
    fn the_normal_test_agrees_with_scipy() {
        // 2 * scipy.stats.norm.sf(1.96)
        close(normal(-0.98, 0.25).unwrap(), 0.04999579029644087);
    }

    #[test]
    fn equal_runs_have_p_one_in_every_test() {
        assert_eq!(paired_t(&[0.0; 5]), Some(1.0));
        assert_eq!(wilcoxon(&[0.0; 5]), Some(1.0));
        assert_eq!(normal(0.0, 0.0), Some(1.0));
        assert_eq!(welch(&[MeanDifference { mean: 0.0, variance: 0.0, n: 3 }; 2]), Some(1.0));
    }

    #[test]
    fn a_difference_without_any_spread_has_no_p_value() {
        assert_eq!(paired_t(&[0.1; 5]), None);
        assert_eq!(normal(0.1, 0.0), None);
        assert_eq!(paired_t(&[0.1]), None);
        assert_eq!(paired_t(&[]), None);
        assert_eq!(wilcoxon(&[]), None);
        assert_eq!(welch(&[]), None);
    }

    #[test]
    fn the_sign_of_the_difference_does_not_matter() {
        let negated = D.map(|difference| -difference);
        close(paired_t(&negated).unwrap(), paired_t(&D).unwrap());
        close(wilcoxon(&negated).unwrap(), wilcoxon(&D).unwrap());
    }
}
