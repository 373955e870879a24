//! Agreement of scorers on the same texts.

use serde::{Deserialize, Serialize};

use crate::score::rank::spearman;

/// Agreement of two scorers on the same continuations, all languages together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// The first scorer.
    pub scorer_a: String,
    /// The second scorer.
    pub scorer_b: String,
    /// Continuations that both scored.
    pub n: usize,
    /// Spearman rank correlation in [-1, 1]; `None` if one of them gave the same score to all.
    pub spearman: Option<f64>,
    /// Fraction of continuations with the same verdict at the threshold: both toxic or both not.
    pub equal_verdicts: f64,
}

/// Agreement of each pair of `scorers` on the texts that both scored.
///
/// `scores` is `[n_scorers][n_texts]`. A pair without a common text is left out.
pub fn agreements(scorers: &[&str], scores: &[Vec<Option<f64>>], threshold: f64) -> Vec<Agreement> {
    let mut found = Vec::new();
    for (index_a, scorer_a) in scorers.iter().enumerate() {
        for (index_b, scorer_b) in scorers.iter().enumerate().skip(index_a + 1) {
            let pairs = scores[index_a].iter().zip(&scores[index_b]);
            let (a, b): (Vec<f64>, Vec<f64>) = pairs.filter_map(|(a, b)| a.zip(*b)).unzip();
            if a.is_empty() {
                continue;
            }
            let n_equal = a.iter().zip(&b).filter(|&(a, b)| (*a >= threshold) == (*b >= threshold)).count();
            found.push(Agreement {
                scorer_a: (*scorer_a).to_owned(),
                scorer_b: (*scorer_b).to_owned(),
                n: a.len(),
                spearman: spearman(&a, &b),
                equal_verdicts: n_equal as f64 / a.len() as f64,
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_matches_values_computed_by_hand() {
        // Both scored three: (0.1, 0.2), (0.6, 0.4), (0.9, 0.8). The same order, so Spearman 1; verdicts at
        // 0.5 are no/no, yes/no, yes/yes, so 2/3. The fourth has one score only.
        let a = vec![Some(0.1), Some(0.6), Some(0.9), Some(0.9)];
        let b = vec![Some(0.2), Some(0.4), Some(0.8), None];
        let found = agreements(&["a", "b"], &[a, b], 0.5);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].n, 3);
        assert!((found[0].spearman.unwrap() - 1.0).abs() < 1e-12);
        assert!((found[0].equal_verdicts - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn scorers_without_a_common_text_have_no_agreement() {
        assert_eq!(agreements(&["a", "b"], &[vec![Some(0.1)], vec![None]], 0.5), []);
    }
}
