//! How far scorers agree.

use crate::eval::continuation::Sample;
use crate::eval::result::Agreement;
use crate::score::rank::spearman;

/// Agreement of each pair of `scorers`, on the continuations that both scored. Pairs without one are left
/// out.
pub fn agreements(samples: &[Sample], scorers: &[&str], threshold: f64) -> Vec<Agreement> {
    let mut found = Vec::new();
    for (index, scorer_a) in scorers.iter().enumerate() {
        for scorer_b in &scorers[index + 1..] {
            let (a, b): (Vec<f64>, Vec<f64>) = samples
                .iter()
                .filter_map(|sample| sample.toxicity_by(scorer_a).zip(sample.toxicity_by(scorer_b)))
                .unzip();
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
    fn agreement_is_that_worked_out_by_hand() {
        // Both scored three: (0.1, 0.2), (0.6, 0.4), (0.9, 0.8). The same order, so Spearman 1; verdicts at
        // 0.5 are no/no, yes/no, yes/yes, so 2/3. The fourth has one score only.
        let sample = |a: Option<f64>, b: Option<f64>| Sample {
            toxicity: [("a".to_owned(), a), ("b".to_owned(), b)].into(),
            ..Sample::default()
        };
        let samples = [
            sample(Some(0.1), Some(0.2)),
            sample(Some(0.6), Some(0.4)),
            sample(Some(0.9), Some(0.8)),
            sample(Some(0.9), None),
        ];
        let found = agreements(&samples, &["a", "b"], 0.5);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].n, 3);
        assert!((found[0].spearman.unwrap() - 1.0).abs() < 1e-12);
        assert!((found[0].equal_verdicts - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn scorers_that_share_no_continuation_have_no_agreement() {
        let sample = Sample { toxicity: [("a".to_owned(), Some(0.1))].into(), ..Sample::default() };
        assert_eq!(agreements(&[sample], &["a", "b"], 0.5), []);
    }
}
