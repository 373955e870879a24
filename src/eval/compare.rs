//! Compares two runs prompt by prompt: differences with paired intervals and tests.
//!
//! A metric's difference is computed on the prompts that have the metric in both runs, matched by language
//! and id. Both runs share the resamples of the bootstrap, so variation between prompts cancels out.
//!
//! | metric | test within a language | on |
//! |---|---|---|
//! | toxicity probability | exact McNemar | verdicts of the prompts |
//! | median perplexity | Wilcoxon signed-rank | medians of the prompts |
//! | the other quartiles, coverage, dropped perplexities | none | - |
//! | every other metric | paired t | values of the prompts |
//!
//! For the unweighted mean over languages, the languages' mean per-prompt differences are averaged and
//! their variances add up (with Welch and Satterthwaite's degrees of freedom). For median perplexity the
//! variance comes from the bootstrap replicates. Languages count as independent. With a single language,
//! its own test is reported.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::eval::comparable;
use crate::eval::metric::per_prompt::{self, PromptValues, QUARTILES, ratios, scorer_index};
use crate::eval::metric::{self, MetricId, Test};
use crate::eval::result::{Comparison, Difference, LanguageComparison};
use crate::eval::side::Side;
use crate::eval::stats::bootstrap::{self, Replicated, Resamples};
use crate::eval::stats::paired_test::{self, MeanDifference};
use crate::eval::warnings;

/// One language's difference in one metric, with the parts of its mean over languages.
struct Paired {
    difference: Difference,
    a: Replicated,
    b: Replicated,
    replicated: Replicated,
    /// Mean of the per-prompt differences; `None` for quartiles and with fewer than two prompts.
    mean: Option<MeanDifference>,
}

/// Compares `b` with `a`; both are counted at `a`'s threshold.
///
/// # Errors
/// [`Error::Setting`] if the runs share no prompt; [`Error::Scorer`] for a score outside [0, 1];
/// [`Error::RunFolder`] if they measured perplexity on different kinds of tokens.
pub fn compare(a: Side<'_>, b: Side<'_>) -> Result<Comparison> {
    comparable::check(a, b)?;
    // Scorers of both runs, in the order of the first.
    let scorers: Vec<&str> = (a.run.scorers.iter())
        .map(|scorer| scorer.name.as_str())
        .filter(|name| b.run.scorers.iter().any(|other| other.name == *name))
        .collect();
    let threshold = a.run.toxicity_threshold;
    let level = a.run.bootstrap.level;
    let of_a = per_prompt::by_language(a.samples, &scorers, threshold)?;
    let mut of_b = per_prompt::by_language(b.samples, &scorers, threshold)?;

    let ids = metric::ids(scorers.iter().copied());
    let mut languages = Vec::new();
    // [n_languages][ids]
    let mut paired: Vec<Vec<Option<Paired>>> = Vec::new();
    let mut n_changed = 0;
    for (language, prompts_a) in of_a {
        let pairs = Pairs::of(prompts_a, of_b.remove(&language).unwrap_or_default());
        n_changed += pairs.n_changed;
        if pairs.a.is_empty() {
            continue;
        }
        let resamples = Resamples::draw(&a.run.bootstrap, &language, pairs.a.len());
        let found = of_language(&pairs, &resamples, &ids, &scorers, level);
        languages.push(LanguageComparison {
            language,
            n_prompts: pairs.a.len(),
            n_only_a: pairs.n_only_a,
            n_only_b: pairs.n_only_b,
            metrics: found.iter().flatten().map(|paired| paired.difference.clone()).collect(),
        });
        paired.push(found);
    }
    if languages.is_empty() {
        return Err(Error::setting("compare", "expected runs that share prompts, found no shared prompt")
            .with_hint(
                "compare runs of the same prompt files: prompts are matched by language, id and text",
            ));
    }
    let mean: Vec<Difference> = (0..ids.len())
        .filter_map(|index| {
            let parts: Vec<&Paired> = paired.iter().filter_map(|found| found[index].as_ref()).collect();
            over_languages(&parts, level)
        })
        .collect();
    let warnings = warnings::of_comparison(a, b, &scorers, &languages, &mean, n_changed);
    Ok(Comparison {
        label_a: a.label.to_owned(),
        label_b: b.label.to_owned(),
        a: a.run.clone(),
        b: b.run.clone(),
        languages,
        mean,
        warnings,
    })
}

/// Every metric of one language, in the order of `ids`.
fn of_language(
    pairs: &Pairs,
    resamples: &Resamples,
    ids: &[MetricId],
    scorers: &[&str],
    level: f64,
) -> Vec<Option<Paired>> {
    let quartiles = paired_quartiles(pairs, resamples);
    ids.iter()
        .map(|id| {
            let both = match QUARTILES.iter().position(|(quartile, _)| *quartile == id.kind()) {
                Some(index) => quartiles.as_ref()?[index].clone(),
                None => paired_ratio(pairs, resamples, id, scorers)?,
            };
            Some(paired_metric(id, both, level))
        })
        .collect()
}

/// The prompts of one language that both runs have, in the same order.
struct Pairs {
    a: Vec<PromptValues>,
    b: Vec<PromptValues>,
    n_only_a: usize,
    n_only_b: usize,
    /// Prompts with the same id but different texts in the two runs. They are not paired.
    n_changed: usize,
}

impl Pairs {
    fn of(prompts_a: Vec<PromptValues>, prompts_b: Vec<PromptValues>) -> Pairs {
        let mut by_id: BTreeMap<String, PromptValues> =
            prompts_b.into_iter().map(|prompt| (prompt.id.clone(), prompt)).collect();
        let mut pairs = Pairs { a: Vec::new(), b: Vec::new(), n_only_a: 0, n_only_b: 0, n_changed: 0 };
        for prompt_a in prompts_a {
            match by_id.remove(&prompt_a.id) {
                Some(prompt_b) if prompt_b.prompt == prompt_a.prompt => {
                    pairs.a.push(prompt_a);
                    pairs.b.push(prompt_b);
                }
                Some(_) => {
                    pairs.n_changed += 1;
                    pairs.n_only_a += 1;
                    pairs.n_only_b += 1;
                }
                None => pairs.n_only_a += 1,
            }
        }
        pairs.n_only_b += by_id.len();
        pairs
    }
}

/// Tests one metric, given its value in both runs and the per-prompt differences.
fn paired_metric(
    id: &MetricId,
    (a, b, differences): (Replicated, Replicated, Vec<f64>),
    level: f64,
) -> Paired {
    let test = id.descriptor().test;
    let replicated = bootstrap::difference(&a, &b, level);
    let p_value = match test {
        Test::McNemar => {
            let n = |sign: f64| differences.iter().filter(|&&difference| difference == sign).count() as u64;
            Some(paired_test::mcnemar(n(-1.0), n(1.0)))
        }
        Test::Wilcoxon => paired_test::wilcoxon(&differences),
        Test::PairedT => paired_test::paired_t(&differences),
        _ => None,
    };
    let n = differences.len();
    let mean = if test == Test::Wilcoxon { None } else { MeanDifference::of(&differences) };
    let difference = Difference {
        name: id.clone(),
        a: a.estimate,
        b: b.estimate,
        difference: replicated.estimate,
        p_value,
        test,
        n,
    };
    Paired { difference, a, b, replicated, mean }
}

/// A ratio metric in both runs, and the differences of the prompts that count in both.
fn paired_ratio(
    pairs: &Pairs,
    resamples: &Resamples,
    id: &MetricId,
    scorers: &[&str],
) -> Option<(Replicated, Replicated, Vec<f64>)> {
    let scorer = scorer_index(id, scorers);
    let (mut numerators_a, mut denominators_a) = ratios(&pairs.a, id.kind(), scorer)?;
    let (mut numerators_b, mut denominators_b) = ratios(&pairs.b, id.kind(), scorer)?;
    let mut differences = Vec::new();
    for index in 0..pairs.a.len() {
        if denominators_a[index] > 0.0 && denominators_b[index] > 0.0 {
            let value_a = numerators_a[index] / denominators_a[index];
            differences.push(numerators_b[index] / denominators_b[index] - value_a);
        } else {
            for values in [&mut numerators_a, &mut denominators_a, &mut numerators_b, &mut denominators_b] {
                values[index] = 0.0;
            }
        }
    }
    let a = resamples.ratio(&numerators_a, &denominators_a)?;
    let b = resamples.ratio(&numerators_b, &denominators_b)?;
    Some((a, b, differences))
}

/// As [`paired_ratio`], for each of the [`QUARTILES`] of pooled perplexities.
///
/// The differences are those of the prompts' own quartiles.
fn paired_quartiles(pairs: &Pairs, resamples: &Resamples) -> Option<Vec<(Replicated, Replicated, Vec<f64>)>> {
    let both =
        |(a, b): &(&PromptValues, &PromptValues)| !a.perplexities.is_empty() && !b.perplexities.is_empty();
    let counted: Vec<(&PromptValues, &PromptValues)> = pairs.a.iter().zip(&pairs.b).collect();
    let group = |of: &dyn Fn(&(&PromptValues, &PromptValues)) -> Vec<f64>| -> Vec<Vec<f64>> {
        counted.iter().map(|pair| if both(pair) { of(pair) } else { Vec::new() }).collect()
    };
    let quantiles = QUARTILES.map(|(_, quantile)| quantile);
    let a = resamples.quantiles(&group(&|pair| pair.0.perplexities.clone()), &quantiles)?;
    let b = resamples.quantiles(&group(&|pair| pair.1.perplexities.clone()), &quantiles)?;
    let differences = |quantile: f64| {
        let of = |prompt: &PromptValues| bootstrap::midpoint_quantile(&prompt.perplexities, quantile);
        counted.iter().filter(|pair| both(pair)).map(|(a, b)| of(b) - of(a)).collect()
    };
    Some(
        a.into_iter().zip(b).zip(quantiles).map(|((a, b), quantile)| (a, b, differences(quantile))).collect(),
    )
}

/// The unweighted mean of one metric's difference over languages; `None` without a language.
fn over_languages(parts: &[&Paired], level: f64) -> Option<Difference> {
    let first = &parts.first()?.difference;
    if parts.len() == 1 {
        return Some(Difference { n: 1, ..first.clone() });
    }
    let mean = |of: fn(&Paired) -> &Replicated| {
        let values: Vec<&Replicated> = parts.iter().map(|part| of(part)).collect();
        bootstrap::mean(&values, level)
    };
    let replicated = mean(|part| &part.replicated)?;
    let (test, p_value) = match first.test {
        Test::None => (Test::None, None),
        Test::Wilcoxon => (Test::BootstrapNormal, bootstrap_normal(&replicated)),
        _ => {
            let means: Option<Vec<MeanDifference>> = parts.iter().map(|part| part.mean).collect();
            (Test::Welch, means.and_then(|means| paired_test::welch(&means)))
        }
    };
    Some(Difference {
        name: first.name.clone(),
        a: mean(|part| &part.a)?.estimate,
        b: mean(|part| &part.b)?.estimate,
        difference: replicated.estimate,
        p_value,
        test,
        n: parts.len(),
    })
}

/// p-value of a normal test with the variance of the bootstrap replicates.
fn bootstrap_normal(replicated: &Replicated) -> Option<f64> {
    let finite: Vec<f64> = replicated.replicates.iter().copied().filter(|value| value.is_finite()).collect();
    let of_mean = MeanDifference::of(&finite)?;
    paired_test::normal(replicated.estimate.value, of_mean.variance * of_mean.n as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::continuation::{Sample, words};
    use crate::eval::result::{Estimate, RunInfo, ScorerInfo, find_difference};
    use crate::eval::summarize::summarize;

    fn id(text: &str) -> MetricId {
        text.parse().unwrap()
    }

    fn run() -> RunInfo {
        RunInfo {
            scorers: vec![ScorerInfo { name: "s".into(), ..ScorerInfo::default() }],
            k: 2,
            toxicity_threshold: 0.5,
            ..RunInfo::default()
        }
    }

    /// Two continuations a prompt, the first with the toxicity given, the second with half of it.
    fn samples(language: &str, toxicity: &[f64]) -> Vec<Sample> {
        let one = |(prompt, &toxicity): (usize, &f64), number: u32| Sample {
            prompt_id: prompt.to_string(),
            language: language.into(),
            sample: number,
            prompt: format!("prompt {prompt}"),
            text: format!("a b {prompt} {number}"),
            tokens: words(&format!("a b {prompt} {number}")),
            n_tokens: Some(4),
            logprob: Some(-4.0 - toxicity - prompt as f64),
            toxicity: [("s".to_owned(), Some(toxicity / f64::from(number + 1)))].into(),
            language_kept: Some(true),
            ..Sample::default()
        };
        toxicity.iter().enumerate().flat_map(|pair| [one(pair, 0), one(pair, 1)]).collect()
    }

    fn compared(a: &[Sample], b: &[Sample]) -> Comparison {
        let run = run();
        let side = |label, samples| Side { label, run: &run, samples, paths: None };
        compare(side("a", a), side("b", b)).unwrap()
    }

    #[test]
    fn a_run_compared_with_itself_differs_by_zero_with_p_one() {
        let mut samples_a = samples("de", &[0.9, 0.2, 0.6, 0.4]);
        samples_a.extend(samples("fr", &[0.1, 0.2, 0.8]));
        let found = compared(&samples_a, &samples_a);
        for difference in found.languages.iter().flat_map(|l| &l.metrics).chain(&found.mean) {
            let zero = Estimate { value: 0.0, low: Some(0.0), high: Some(0.0) };
            assert_eq!(difference.difference, zero, "{}", difference.name);
            let p = if difference.test == Test::None { None } else { Some(1.0) };
            assert_eq!(difference.p_value, p, "{}", difference.name);
        }
    }

    #[test]
    fn a_comparison_repeats_the_values_of_both_summaries() {
        let (a, b) = (samples("de", &[0.9, 0.2, 0.6]), samples("de", &[0.1, 0.2, 0.3]));
        let found = compared(&a, &b);
        let (of_a, of_b) = (summarize(run(), &a).unwrap(), summarize(run(), &b).unwrap());
        for difference in &found.languages[0].metrics {
            let estimate = |result: &crate::eval::result::EvalResult| {
                result.languages[0].metric(&difference.name).unwrap().estimate.unwrap()
            };
            assert_eq!(difference.a, estimate(&of_a), "{}", difference.name);
            assert_eq!(difference.b, estimate(&of_b), "{}", difference.name);
        }
    }

    #[test]
    fn differences_match_values_computed_by_hand() {
        // EMT: maxima 0.9, 0.2, 0.6 against 0.1, 0.2, 0.3; differences -0.8, 0, -0.3, mean -1.1/3.
        // Verdicts: prompts 0 and 2 are toxic in a alone, so McNemar 2 * (1/2)^2 = 0.5; ToxProb -2/3.
        // scipy 1.17.1: scipy.stats.ttest_1samp([-0.8, 0, -0.3], 0).pvalue
        let found = compared(&samples("de", &[0.9, 0.2, 0.6]), &samples("de", &[0.1, 0.2, 0.3]));
        let emt = find_difference(&found.languages[0].metrics, &id("s/expected_maximum_toxicity")).unwrap();
        assert!((emt.difference.value + 1.1 / 3.0).abs() < 1e-12);
        assert!((emt.p_value.unwrap() - 0.25668888376056553).abs() < 1e-9);
        let probability =
            find_difference(&found.languages[0].metrics, &id("s/toxicity_probability")).unwrap();
        assert!((probability.difference.value + 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(probability.test, Test::McNemar);
        assert!((probability.p_value.unwrap() - 0.5).abs() < 1e-12);
    }

    #[test]
    fn swapping_the_runs_negates_the_differences_and_keeps_p() {
        let (a, b) = (samples("de", &[0.9, 0.2, 0.6, 0.3]), samples("de", &[0.1, 0.4, 0.3, 0.3]));
        let (there, back) = (compared(&a, &b), compared(&b, &a));
        for (there, back) in there.mean.iter().zip(&back.mean) {
            assert!((there.difference.value + back.difference.value).abs() < 1e-12, "{}", there.name);
            let p = there.p_value.zip(back.p_value).map_or(0.0, |(there, back)| there - back);
            assert!(p.abs() < 1e-12, "{}", there.name);
        }
    }

    #[test]
    fn the_mean_over_one_language_equals_that_language() {
        let found = compared(&samples("de", &[0.9, 0.2, 0.6]), &samples("de", &[0.1, 0.2, 0.3]));
        for (mean, difference) in found.mean.iter().zip(&found.languages[0].metrics) {
            assert_eq!(mean, &Difference { n: 1, ..difference.clone() });
        }
    }

    #[test]
    fn the_mean_over_languages_is_unweighted() {
        // de: maxima fall by 0.8 and 0.2, mean -0.5; fr: by 0.1 three times, mean -0.1. Mean -0.3.
        let mut a = samples("de", &[0.9, 0.4]);
        a.extend(samples("fr", &[0.3, 0.3, 0.3]));
        let mut b = samples("de", &[0.1, 0.2]);
        b.extend(samples("fr", &[0.2, 0.2, 0.2]));
        let found = compared(&a, &b);
        let emt = find_difference(&found.mean, &id("s/expected_maximum_toxicity")).unwrap();
        assert!((emt.difference.value + 0.3).abs() < 1e-12);
        assert_eq!((emt.n, emt.test), (2, Test::Welch));
        let perplexity = find_difference(&found.mean, &id("perplexity_median")).unwrap();
        assert_eq!(perplexity.test, Test::BootstrapNormal);
    }

    #[test]
    fn only_shared_prompts_count() {
        let a = samples("de", &[0.9, 0.2, 0.6]);
        let mut b = samples("de", &[0.1, 0.2]);
        b.extend(samples("fr", &[0.5]));
        let found = compared(&a, &b);
        assert_eq!(found.languages.len(), 1);
        let language = &found.languages[0];
        assert_eq!((language.n_prompts, language.n_only_a, language.n_only_b), (2, 1, 0));
        assert!((language.metrics[0].a.value - 0.55).abs() < 1e-12, "the mean of 0.9 and 0.2");
        assert!(found.warnings.iter().any(|warning| warning.what.contains("not in both runs")));
    }

    #[test]
    fn a_prompt_without_a_score_in_one_run_counts_in_neither() {
        let a = samples("de", &[0.9, 0.2, 0.6]);
        let mut b = samples("de", &[0.1, 0.2, 0.3]);
        for sample in b.iter_mut().filter(|sample| sample.prompt_id == "0") {
            sample.toxicity.insert("s".into(), None);
        }
        let found = compared(&a, &b);
        let emt = find_difference(&found.languages[0].metrics, &id("s/expected_maximum_toxicity")).unwrap();
        assert_eq!(emt.n, 2);
        assert!((emt.a.value - 0.4).abs() < 1e-12, "the mean of 0.2 and 0.6");
    }

    #[test]
    fn rejects_runs_without_a_shared_prompt() {
        let run = run();
        let (a, b) = (samples("de", &[0.9]), samples("fr", &[0.9]));
        let side = |samples| Side { label: "x", run: &run, samples, paths: None };
        let error = compare(side(&a), side(&b)).unwrap_err();
        assert_eq!(error.to_string(), "compare: expected runs that share prompts, found no shared prompt");
    }

    #[test]
    fn prompts_with_one_id_and_two_texts_are_not_paired() {
        let a = samples("de", &[0.9, 0.2]);
        let mut b = a.clone();
        for sample in b.iter_mut().filter(|sample| sample.prompt_id == "0") {
            sample.prompt = "another prompt".into();
        }
        let found = compared(&a, &b);
        assert_eq!(found.languages[0].n_prompts, 1);
        assert!(found.warnings.iter().any(|warning| warning.what.contains("a different text")));
    }
}
