//! Formats numbers, settings and language names for readers.

use crate::eval::metric::{Descriptor, Unit};
use crate::eval::result::{Estimate, RunInfo};

/// Printed if there is no value.
pub const NONE: &str = "-";

/// Formats a value in its metric's unit: `0.512`, `43.2%`.
pub fn value(metric: &Descriptor, value: f64) -> String {
    match metric.unit {
        Unit::Fraction => format!("{:.1}%", 100.0 * value),
        Unit::Plain { decimals } => format!("{value:.decimals$}"),
    }
}

/// Formats a value with its interval: `0.512 [0.498, 0.526]`, `43.2% [41.0, 45.4]`.
pub fn estimate(metric: &Descriptor, estimate: &Estimate) -> String {
    match interval(metric, estimate) {
        Some((low, high)) => format!("{} [{low}, {high}]", value(metric, estimate.value)),
        None => value(metric, estimate.value),
    }
}

/// Formats both ends of an interval, without the unit.
pub fn interval(metric: &Descriptor, estimate: &Estimate) -> Option<(String, String)> {
    let end = |end: f64| match metric.unit {
        Unit::Fraction => format!("{:.1}", 100.0 * end),
        Unit::Plain { decimals } => format!("{end:.decimals$}"),
    };
    Some((end(estimate.low?), end(estimate.high?)))
}

/// Formats a difference with its interval: `-0.211 [-0.250, -0.170]`, `-31.1 pp [-33.2, -29.0]`.
///
/// pp stands for percentage points.
pub fn difference(metric: &Descriptor, estimate: &Estimate) -> String {
    let (decimals, factor, unit) = match metric.unit {
        Unit::Fraction => (1, 100.0, " pp"),
        Unit::Plain { decimals } => (decimals, 1.0, ""),
    };
    let signed = |value: f64| {
        let text = format!("{:+.decimals$}", factor * value);
        // A difference that rounds to zero has no sign: neither +0.000 nor -0.000.
        if text.chars().any(|c| ('1'..='9').contains(&c)) { text } else { text[1..].to_owned() }
    };
    match (estimate.low, estimate.high) {
        (Some(low), Some(high)) => {
            format!("{}{unit} [{}, {}]", signed(estimate.value), signed(low), signed(high))
        }
        _ => format!("{}{unit}", signed(estimate.value)),
    }
}

/// Formats a p-value with three decimals, and never as 0.
pub fn p_value(p: Option<f64>) -> String {
    match p {
        None => NONE.into(),
        Some(p) if p < 0.001 => "<0.001".into(),
        Some(p) => format!("{p:.3}"),
    }
}

/// Formats the level of an interval: `95%`.
pub fn level(level: f64) -> String {
    let percent = 100.0 * level;
    if (percent - percent.round()).abs() < 1e-9 { format!("{percent:.0}%") } else { format!("{percent:.1}%") }
}

/// Formats a count with thousands separators: `18,328`.
pub fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Lists all settings of a run with their values, the most important first.
pub fn settings(run: &RunInfo) -> Vec<(String, String)> {
    let mut rows: Vec<(String, String)> = Vec::new();
    let mut add = |name: &str, value: String| rows.push((name.to_owned(), value));
    if let Some(model) = &run.model {
        add("model", model.file.clone());
        add("model sha256", model.sha256.clone().unwrap_or_else(|| NONE.into()));
        add("model architecture", model.architecture.clone());
        add("model description", model.description.clone());
        let n_params = model.n_params.and_then(|n| usize::try_from(n).ok());
        add("model parameters", n_params.map_or(NONE.into(), count));
    }
    add("steering", run.steering.clone().unwrap_or_else(|| "none".into()));
    for scorer in &run.scorers {
        let hash = scorer.sha256.as_deref().map(|hash| format!(", sha256 {hash}")).unwrap_or_default();
        let languages = if scorer.languages.is_empty() {
            "languages not stated".to_owned()
        } else {
            format!("covers {}", scorer.languages.join(" "))
        };
        add(&format!("scorer {}", scorer.name), format!("version {}{hash}, {languages}", scorer.version));
    }
    add("toxicity threshold", run.toxicity_threshold.to_string());
    add("minimum coverage", run.min_coverage.to_string());
    add("k", run.k.to_string());
    // The sampling settings of imported texts are unknown.
    let sampled = |value: String| if run.model.is_some() { value } else { "unknown".to_owned() };
    add("n_predict", sampled(run.n_predict.to_string()));
    add("temperature", sampled(run.temperature.to_string()));
    add("top_p", sampled(run.top_p.to_string()));
    add("seed", sampled(run.seed.to_string()));
    add("tokenizer of distinct-n and repetition", run.distinct_tokenizer.clone());
    add("model for perplexity", run.perplexity_model.clone().unwrap_or_else(|| "none: not measured".into()));
    if let Some(tokens) = run.perplexity_tokens {
        add("tokens of perplexity", tokens.to_string());
    }
    let bootstrap = &run.bootstrap;
    add(
        "bootstrap",
        format!(
            "{} resamples, {} interval, seed {}",
            bootstrap.resamples,
            level(bootstrap.level),
            bootstrap.seed
        ),
    );
    for (name, value) in &run.settings {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        rows.push((name.clone(), value));
    }
    rows.push(("detox-gguf".into(), run.tool_version.clone()));
    rows
}

/// Capitalises the first letter, for the start of a sentence.
pub fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// The English name of a language, or its code if the name is not listed here.
pub fn language(code: &str) -> &str {
    match code {
        "ar" => "Arabic",
        "cs" => "Czech",
        "de" => "German",
        "en" => "English",
        "es" => "Spanish",
        "fr" => "French",
        "hi" => "Hindi",
        "id" => "Indonesian",
        "it" => "Italian",
        "ja" => "Japanese",
        "ko" => "Korean",
        "nl" => "Dutch",
        "pl" => "Polish",
        "pt" => "Portuguese",
        "ru" => "Russian",
        "sv" => "Swedish",
        "zh" => "Chinese",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::metric::MetricKind;

    #[test]
    fn fractions_are_printed_in_percent_and_means_are_not() {
        let share = MetricKind::ToxicityProbability.descriptor();
        let mean = MetricKind::ExpectedMaximumToxicity.descriptor();
        let found = Estimate { value: 0.4321, low: Some(0.41), high: Some(0.4549) };
        assert_eq!(estimate(share, &found), "43.2% [41.0, 45.5]");
        assert_eq!(estimate(mean, &found), "0.432 [0.410, 0.455]");
        assert_eq!(estimate(mean, &Estimate { value: 0.5, low: None, high: None }), "0.500");
    }

    #[test]
    fn differences_have_a_sign_unless_they_round_to_zero() {
        let share = MetricKind::ToxicityProbability.descriptor();
        let mean = MetricKind::ExpectedMaximumToxicity.descriptor();
        let found = Estimate { value: -0.311, low: Some(-0.332), high: Some(0.00001) };
        assert_eq!(difference(share, &found), "-31.1 pp [-33.2, 0.0]");
        assert_eq!(difference(mean, &found), "-0.311 [-0.332, 0.000]");
        assert_eq!(difference(mean, &Estimate { value: 0.0, low: None, high: None }), "0.000");
    }

    #[test]
    fn a_p_value_is_never_printed_as_zero() {
        assert_eq!(p_value(Some(1e-300)), "<0.001");
        assert_eq!(p_value(Some(0.034)), "0.034");
        assert_eq!(p_value(Some(1.0)), "1.000");
        assert_eq!(p_value(None), "-");
    }

    #[test]
    fn counts_have_thousands_separators() {
        assert_eq!([0, 999, 1000, 18328, 1234567].map(count), ["0", "999", "1,000", "18,328", "1,234,567"]);
        assert_eq!([level(0.95), level(0.995)], ["95%", "99.5%"]);
    }
}
