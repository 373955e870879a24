//! Ranks with ties, and Spearman's rank correlation.

/// Ranks of the values from 1, and the tie correction of a rank test's variance.
///
/// Tied values share the mean of their ranks. The tie correction is the sum of t^3 - t over groups of t
/// tied values.
pub fn average_ranks(values: &[f64]) -> (Vec<f64>, f64) {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut ties = 0.0;
    let mut start = 0;
    while start < order.len() {
        let same = |&&index: &&usize| values[index] == values[order[start]];
        let n_tied = order[start..].iter().take_while(same).count();
        let rank = start as f64 + (n_tied as f64 + 1.0) / 2.0;
        for &index in &order[start..start + n_tied] {
            ranks[index] = rank;
        }
        ties += (n_tied as f64).powi(3) - n_tied as f64;
        start += n_tied;
    }
    (ranks, ties)
}

/// Spearman's rank correlation in [-1, 1]: Pearson's correlation of the ranks. `None` if one side is
/// constant.
pub fn spearman(a: &[f64], b: &[f64]) -> Option<f64> {
    assert_eq!(a.len(), b.len(), "as many values on both sides");
    let (a, _) = average_ranks(a);
    let (b, _) = average_ranks(b);
    let mean = (a.len() as f64 + 1.0) / 2.0;
    let (mut covariance, mut variance_a, mut variance_b) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(&b) {
        covariance += (a - mean) * (b - mean);
        variance_a += (a - mean).powi(2);
        variance_b += (b - mean).powi(2);
    }
    (variance_a > 0.0 && variance_b > 0.0).then(|| covariance / (variance_a * variance_b).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_share_the_mean_of_their_ranks() {
        // 1 is rank 1; the three 2s share ranks 2, 3 and 4; 5 is rank 5. Ties: 3^3 - 3 = 24.
        assert_eq!(average_ranks(&[2.0, 1.0, 2.0, 5.0, 2.0]), (vec![3.0, 1.0, 3.0, 5.0, 3.0], 24.0));
        assert_eq!(average_ranks(&[]), (vec![], 0.0));
    }

    #[test]
    fn spearman_of_a_monotonic_relation_is_one() {
        let a = [0.1, 0.2, 0.4, 0.8];
        assert!((spearman(&a, &a.map(|x: f64| x.powi(3))).unwrap() - 1.0).abs() < 1e-15);
        assert!((spearman(&a, &a.map(|x| -x)).unwrap() + 1.0).abs() < 1e-15);
    }

    #[test]
    fn spearman_with_ties_agrees_with_scipy() {
        // scipy 1.17.1: scipy.stats.spearmanr([1, 2, 2, 4, 5, 0], [3, 1, 2, 2, 9, 4]).statistic
        let found = spearman(&[1.0, 2.0, 2.0, 4.0, 5.0, 0.0], &[3.0, 1.0, 2.0, 2.0, 9.0, 4.0]).unwrap();
        assert!((found - 0.014705882352941178).abs() < 1e-12, "{found}");
    }

    #[test]
    fn spearman_with_a_constant_is_undefined() {
        assert_eq!(spearman(&[1.0, 1.0], &[1.0, 2.0]), None);
        assert_eq!(spearman(&[], &[]), None);
    }
}
