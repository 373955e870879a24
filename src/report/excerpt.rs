//! Continuations to show in a report.

use std::collections::BTreeMap;

use crate::eval::continuation::Sample;

/// A continuation, shown so that readers can judge the scorer and the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Excerpt {
    /// The prompt's language.
    pub language: String,
    /// The prompt's id.
    pub prompt_id: String,
    /// The prompt.
    pub prompt: String,
    /// The continuation.
    pub text: String,
    /// The scorer's name.
    pub scorer: String,
    /// The toxicity in [0, 1].
    pub toxicity: f64,
}

/// Selects the `n_per_language` most toxic continuations of each language, at most one per prompt.
///
/// They are sorted by language, then by decreasing toxicity. Continuations without a score are left out.
pub fn most_toxic(samples: &[Sample], scorer: &str, n_per_language: usize) -> Vec<Excerpt> {
    let mut of_prompt: BTreeMap<(&str, &str), (&Sample, f64)> = BTreeMap::new();
    for sample in samples {
        let Some(toxicity) = sample.toxicity_by(scorer) else { continue };
        let best = of_prompt.entry((&sample.language, &sample.prompt_id)).or_insert((sample, toxicity));
        // The sample number breaks ties, so that the order of the samples does not matter.
        if toxicity > best.1 || (toxicity == best.1 && sample.sample < best.0.sample) {
            *best = (sample, toxicity);
        }
    }
    let mut of_language: BTreeMap<&str, Vec<(&Sample, f64)>> = BTreeMap::new();
    for ((language, _), found) in of_prompt {
        of_language.entry(language).or_default().push(found);
    }
    let mut excerpts = Vec::new();
    for (language, mut found) in of_language {
        found.sort_by(|a, b| b.1.total_cmp(&a.1));
        excerpts.extend(found.into_iter().take(n_per_language).map(|(sample, toxicity)| Excerpt {
            language: language.to_owned(),
            prompt_id: sample.prompt_id.clone(),
            prompt: sample.prompt.clone(),
            text: sample.text.clone(),
            scorer: scorer.to_owned(),
            toxicity,
        }));
    }
    excerpts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_toxic_come_first_one_per_prompt_and_only_with_a_score() {
        let sample = |prompt: &str, number, toxicity| Sample {
            prompt_id: prompt.into(),
            language: "de".into(),
            sample: number,
            toxicity: [("s".to_owned(), toxicity)].into(),
            ..Sample::default()
        };
        let mut samples = vec![
            sample("1", 0, Some(0.2)),
            sample("1", 1, Some(0.3)),
            sample("2", 0, Some(0.9)),
            sample("2", 1, Some(0.8)),
            sample("3", 0, None),
            sample("4", 0, Some(0.1)),
        ];
        let ids = |samples: &[Sample]| {
            let found = most_toxic(samples, "s", 2);
            found.iter().map(|e| (e.prompt_id.clone(), e.toxicity)).collect::<Vec<_>>()
        };
        let expected = [("2".to_owned(), 0.9), ("1".to_owned(), 0.3)];
        assert_eq!(ids(&samples), expected);
        samples.reverse();
        assert_eq!(ids(&samples), expected);
        assert_eq!(most_toxic(&samples, "another", 2), []);
    }
}
