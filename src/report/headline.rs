//! Headlines: the result in one or two sentences, with its interval.
//!
//! A headline claims nothing that was not measured.

use crate::eval::metric::MetricKind;
use crate::eval::result::{Comparison, Estimate, EvalResult, RunInfo, find_difference};
use crate::report::format;

const LEADING: MetricKind = MetricKind::ToxicityProbability;

/// The headline of one run, by its first scorer.
pub fn of_result(result: &EvalResult) -> String {
    let Some(scorer) = result.run.scorers.first() else {
        return "Toxicity was not measured: no scorer was used.".into();
    };
    let found = result.mean_of(&LEADING.by(Some(&scorer.name)));
    let Some((found, estimate)) = found.and_then(|found| Some((found, found.estimate?))) else {
        return format!("Scorer {} gave no score, so the toxicity is unknown.", scorer.name);
    };
    let counted: Vec<&str> = result
        .languages
        .iter()
        .filter(|language| language.metric(&found.name).is_some_and(|metric| metric.estimate.is_some()))
        .map(|language| language.language.as_str())
        .collect();
    let all = if found.missing > 0 { format!(" of {}", found.n + found.missing) } else { String::new() };
    format!(
        "{}, {} of the prompts{} drew {} rated {} or more by the scorer {}.",
        where_in(&counted, &all),
        percent(estimate.value),
        interval(&result.run, &estimate),
        at_least_one(result.run.k),
        result.run.toxicity_threshold,
        scorer.name,
    )
}

/// The headline of a comparison, by the first common scorer, with perplexity as a check.
pub fn of_comparison(comparison: &Comparison) -> String {
    let Some(scorer) = super::grid::shared_scorers(comparison).next() else {
        return "The toxicity of the two runs cannot be compared: they share no scorer.".into();
    };
    let name = LEADING.by(Some(scorer));
    let Some(found) = find_difference(&comparison.mean, &name) else {
        return format!(
            "The toxicity of the two runs cannot be compared: scorer {scorer} did not score both."
        );
    };
    let counted: Vec<&str> = comparison
        .languages
        .iter()
        .filter(|language| find_difference(&language.metrics, &name).is_some())
        .map(|language| language.language.as_str())
        .collect();
    let run = &comparison.a;
    if run.k != comparison.b.k {
        return format!(
            "The toxicity of the two runs cannot be compared: A has {} continuations of each prompt and B has \
             {}, and the maximum over more continuations is higher.",
            run.k, comparison.b.k
        );
    }
    let subject = format!(
        "{}, the share of prompts that drew {} rated {} or more by the scorer {scorer}",
        where_in(&counted, ""),
        at_least_one(run.k),
        run.toxicity_threshold,
    );
    let (a, b) = (percent(found.a.value), percent(found.b.value));
    let points = |value: f64| format!("{:.1}", 100.0 * value);
    let change = &found.difference;
    let p = match found.p_value {
        Some(p) if p < 0.001 => ", p < 0.001".to_owned(),
        Some(p) => format!(", p = {p:.3}"),
        None => String::new(),
    };
    let mut text = match (change.low, change.high) {
        (Some(low), Some(high)) if found.is_clear(run.bootstrap.level) => {
            let (verb, low, high) =
                if change.value < 0.0 { ("fell", -high, -low) } else { ("rose", low, high) };
            format!(
                "{subject} {verb} from {a} (A) to {b} (B), by {} percentage points ({} interval {} to {}{p}).",
                points(change.value.abs()),
                format::level(run.bootstrap.level),
                points(low),
                points(high),
            )
        }
        (Some(low), Some(high)) => format!(
            "{subject} is {a} in A and {b} in B: with these prompts, the difference is not significant \
             ({} interval {} to {} percentage points{p}).",
            format::level(run.bootstrap.level),
            points(low),
            points(high),
        ),
        _ => format!(
            "{subject} is {a} in A and {b} in B; there is no interval, because a language has only one prompt."
        ),
    };
    if let Some(perplexity) = find_difference(&comparison.mean, &MetricKind::PerplexityMedian.by(None)) {
        text.push_str(&format!(
            " Median perplexity is {:.1} in A and {:.1} in B.",
            perplexity.a.value, perplexity.b.value
        ));
    } else {
        text.push_str(" Perplexity was not measured, so it is unknown whether the text is still fluent.");
    }
    text
}

/// Describes what was measured: the model, counts, and the sampling settings if this program sampled.
pub fn what_was_measured(run: &RunInfo, n_prompts: usize, n_samples: usize, n_languages: usize) -> String {
    let languages = if n_languages == 1 { "language" } else { "languages" };
    let counts = format!(
        "{} continuations of {} prompts in {n_languages} {languages}",
        format::count(n_samples),
        format::count(n_prompts)
    );
    let Some(model) = &run.model else { return format!("Imported texts: {counts}.") };
    let steering = run.steering.as_ref().map(|steering| format!(" with {steering}")).unwrap_or_default();
    format!(
        "{}{steering}: {counts}, {} per prompt of at most {} tokens, temperature {}, top-p {}, seed {}.",
        model.file, run.k, run.n_predict, run.temperature, run.top_p, run.seed,
    )
}

/// Which tokens perplexity is measured on, and by which model; `None` if it was not measured.
pub fn perplexity(run: &RunInfo) -> Option<String> {
    let tokens = run.perplexity_tokens?;
    let model = run.perplexity_model.as_deref().unwrap_or("an unknown model");
    Some(format!("Perplexity is measured on {} ({tokens}), by {model}.", tokens.in_words()))
}

/// As [`perplexity`], for both runs; one sentence if they agree.
pub fn perplexity_of_both(comparison: &Comparison) -> Option<String> {
    let (a, b) = (perplexity(&comparison.a)?, perplexity(&comparison.b)?);
    Some(if a == b { a } else { format!("A: {a} B: {b}") })
}

/// The start of a headline: the language, or the number of languages.
fn where_in(languages: &[&str], all: &str) -> String {
    match languages {
        [one] if all.is_empty() => format!("In {}", format::language(one)),
        [one] => format!("In {}, one{all} languages", format::language(one)),
        languages => format!("On average over {}{all} languages", languages.len()),
    }
}

fn at_least_one(k: u32) -> String {
    if k == 1 { "a continuation".into() } else { format!("at least one continuation in {k}") }
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

fn interval(run: &RunInfo, estimate: &Estimate) -> String {
    match (estimate.low, estimate.high) {
        (Some(low), Some(high)) => format!(
            " ({} interval {:.1} to {})",
            format::level(run.bootstrap.level),
            100.0 * low,
            percent(high)
        ),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::perplexity::PerplexityTokens;
    use crate::eval::result::Difference;
    use crate::report::synthetic;

    #[test]
    fn the_headline_of_a_run_has_share_interval_k_threshold_and_scorer() {
        let mut result = synthetic::compared(&["de", "fr"]).0;
        result.mean[1].estimate = Some(Estimate { value: 0.4321, low: Some(0.41), high: Some(0.4549) });
        assert_eq!(
            of_result(&result),
            "On average over 2 languages, 43.2% of the prompts (95% interval 41.0 to 45.5%) drew at least one \
             continuation in 5 rated 0.5 or more by the scorer lexical."
        );
        let mut one = synthetic::compared(&["de"]).0;
        one.mean[1].estimate = Some(Estimate { value: 0.4321, low: None, high: None });
        assert!(of_result(&one).starts_with("In German, 43.2% of the prompts drew"));
    }

    #[test]
    fn a_run_without_scores_makes_no_claim() {
        let mut result = synthetic::compared(&["de"]).0;
        result.mean[1].estimate = None;
        assert!(of_result(&result).ends_with("the toxicity is unknown."));
        result.run.scorers.clear();
        assert!(of_result(&result).starts_with("Toxicity was not measured"));
    }

    #[test]
    fn imported_texts_have_no_claim_about_sampling() {
        let run = RunInfo { model: None, ..synthetic::run() };
        assert_eq!(
            what_was_measured(&run, 1000, 25000, 1),
            "Imported texts: 25,000 continuations of 1,000 prompts in 1 language."
        );
        assert!(
            what_was_measured(&synthetic::run(), 2, 10, 2).contains("temperature 0.9, top-p 0.8, seed 42")
        );
    }

    #[test]
    fn every_report_names_the_tokens_of_perplexity() {
        use crate::report::{html, json, markdown, terminal};
        let (mut result, mut comparison) = synthetic::compared(&["de"]);
        for (tokens, word) in
            [(PerplexityTokens::Sampled, "sampled"), (PerplexityTokens::Retokenised, "retokenised")]
        {
            result.run.perplexity_tokens = Some(tokens);
            (comparison.a.perplexity_tokens, comparison.b.perplexity_tokens) = (Some(tokens), Some(tokens));
            for report in [
                json::to_json(&result).unwrap(),
                html::to_html(&result, &[]),
                markdown::to_markdown(&result),
                terminal::to_terminal(&result, false),
                json::to_json(&comparison).unwrap(),
                html::comparison_to_html(&comparison, &[]),
                markdown::comparison_to_markdown(&comparison),
                terminal::comparison_to_terminal(&comparison, false),
            ] {
                assert!(
                    report.contains(&format!("({word})")) || report.contains(&format!("\"{word}\"")),
                    "{report}"
                );
            }
        }
    }

    fn with(difference: Estimate) -> String {
        let mut comparison = synthetic::compared(&["de", "fr"]).1;
        let (a, b) = (comparison.mean[1].a, comparison.mean[1].b);
        comparison.mean[1] = Difference { a, b, difference, ..comparison.mean[1].clone() };
        of_comparison(&comparison)
    }

    #[test]
    fn the_headline_of_a_comparison_says_fell_only_for_a_significant_difference() {
        let fell = with(Estimate { value: -0.311, low: Some(-0.332), high: Some(-0.29) });
        assert!(fell.contains("fell from"), "{fell}");
        assert!(fell.contains("by 31.1 percentage points (95% interval 29.0 to 33.2, p < 0.001)"), "{fell}");
        let rose = with(Estimate { value: 0.311, low: Some(0.29), high: Some(0.332) });
        assert!(rose.contains("rose from") && rose.contains("29.0 to 33.2"), "{rose}");
        let same = with(Estimate { value: -0.01, low: Some(-0.03), high: Some(0.01) });
        assert!(!same.contains("fell") && same.contains("not significant"), "{same}");
        let mut unsure = synthetic::compared(&["de"]).1;
        unsure.mean[1].p_value = Some(0.125);
        let unsure = of_comparison(&unsure);
        assert!(!unsure.contains("fell") && unsure.contains("p = 0.125"), "{unsure}");
        let none = with(Estimate { value: -0.01, low: None, high: None });
        assert!(!none.contains("fell") && none.contains("there is no interval"), "{none}");
    }
}
