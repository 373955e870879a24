//! Mean activations of neurons in each language, before and after a change (the paper, Figure 3).

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use rand_core::Rng;
use serde::{Deserialize, Serialize};

use crate::engine::random::random_stream;
use crate::engine::schedule::Request;
use crate::engine::{Model, Session, SessionOptions, activation};
use crate::error::{Error, Result};
use crate::progress::{Progress, advance_to};
use crate::steer::LocatedNeuron;

/// A mean with its 95% interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The mean.
    pub value: f64,
    /// Lower end of the interval; `None` with fewer than two prompts.
    pub low: Option<f64>,
    /// Upper end of the interval; `None` with fewer than two prompts.
    pub high: Option<f64>,
}

/// Number of bootstrap resamples.
const RESAMPLES: usize = 1000;

impl Interval {
    /// Computes the mean of `values` and its percentile bootstrap interval.
    ///
    /// `name` seeds the bootstrap. `None` if there are no values.
    pub fn of(values: &[f64], name: &str) -> Option<Interval> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let value = values.iter().sum::<f64>() / n as f64;
        if n < 2 {
            return Some(Interval { value, low: None, high: None });
        }
        let mut random = random_stream(0, name, 0);
        let mut means: Vec<f64> = (0..RESAMPLES)
            .map(|_| {
                let drawn =
                    (0..n).map(|_| values[((u128::from(random.next_u64()) * n as u128) >> 64) as usize]);
                drawn.sum::<f64>() / n as f64
            })
            .collect();
        means.sort_by(f64::total_cmp);
        // Ranks 25 and 975 of 1000, from 1: 2.5% of the resamples lie outside at each end.
        let (low, high) = (means[RESAMPLES * 25 / 1000], means[RESAMPLES * 975 / 1000 - 1]);
        Some(Interval { value, low: Some(low), high: Some(high) })
    }
}

/// A prompt after which activations are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActivationPrompt<'a> {
    /// The prompt's id, for messages.
    pub id: &'a str,
    /// Its text.
    pub text: &'a str,
}

/// Measures the mean activation of each neuron after each prompt, shape `[n_prompts][n_neurons]`.
///
/// The mean is over `n_predict` greedy tokens; see [`activation::record`].
///
/// # Errors
/// [`Error::PromptTooLong`] if the longest prompt and its tokens are more than the model was trained for, and no context
/// was asked for; those of [`activation::record`].
pub fn mean_activations(
    model: &Model,
    options: &SessionOptions,
    prompts: &[ActivationPrompt<'_>],
    neurons: &[LocatedNeuron],
    n_predict: usize,
    progress: &mut dyn Progress,
    interrupt: &AtomicBool,
) -> Result<Vec<Vec<f32>>> {
    let request = |p: &ActivationPrompt<'_>| {
        Ok(Request { id: p.id.to_owned(), tokens: model.tokenize_prompt(p.text)? })
    };
    model.vocabulary().check_nfc(prompts.iter().map(|p| p.text));
    let requests: Vec<Request> = prompts.iter().map(request).collect::<Result<_>>()?;
    let longest = requests.iter().max_by_key(|r| r.tokens.len());
    let n_ctx_seq = longest.map_or(0, |r| r.tokens.len()).saturating_add(n_predict);
    let n_ctx_train = model.n_ctx_train();
    if let Some(longest) =
        longest.filter(|_| options.n_ctx.is_none() && (1..n_ctx_seq).contains(&n_ctx_train))
    {
        return Err(Error::PromptTooLong {
            prompt: longest.id.clone(),
            n_prompt: longest.tokens.len(),
            n_predict,
            n_ctx_seq: n_ctx_train,
            is_learned: model.n_positions() == Some(n_ctx_train),
        });
    }
    let mut session = Session::open_with_callback(model, options, n_ctx_seq)?;
    let places: Vec<(usize, usize)> =
        neurons.iter().map(|n| (n.neuron.layer as usize, n.neuron.index as usize)).collect();
    progress.start("prompts", requests.len() as u64, 0);
    let recorded =
        activation::record(&mut session, &requests, &places, n_predict, interrupt, advance_to(progress))?;
    progress.finish();
    Ok(recorded.into_iter().map(|r| r.mean).collect())
}

/// Measures the mean activation over `neurons` after each prompt, shape `[n_prompts]`.
///
/// # Errors
/// Those of [`mean_activations`].
pub fn mean_over_neurons(
    model: &Model,
    options: &SessionOptions,
    prompts: &[ActivationPrompt<'_>],
    neurons: &[LocatedNeuron],
    n_predict: usize,
    progress: &mut dyn Progress,
    interrupt: &AtomicBool,
) -> Result<Vec<f64>> {
    let means = mean_activations(model, options, prompts, neurons, n_predict, progress, interrupt)?;
    let n = neurons.len() as f64;
    Ok(means.iter().map(|of_prompt| of_prompt.iter().map(|&a| f64::from(a)).sum::<f64>() / n).collect())
}

/// One prompt's mean activation over neurons and steps, of model A and optionally of model B.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptActivation {
    /// The prompt's language.
    pub language: String,
    /// Mean activation in model A.
    pub a: f64,
    /// Mean activation in model B.
    pub b: Option<f64>,
}

/// One language's mean activations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LanguageActivation {
    /// The language's code.
    pub language: String,
    /// Number of prompts.
    pub n_prompts: usize,
    /// Mean over prompts, of model A.
    pub a: Interval,
    /// Mean over prompts, of model B.
    pub b: Option<Interval>,
    /// Mean over prompts of the paired difference, b minus a.
    pub difference: Option<Interval>,
}

/// Where activations are measured, whichever way a model is steered: before edits of the neurons themselves.
pub const MEASURED: &str = "before_edits";

/// Mean activations by language, of one or two models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Activations {
    /// Name of model A.
    pub a: String,
    /// Name of model B, if there is one.
    pub b: Option<String>,
    /// Number of neurons averaged over.
    pub n_neurons: usize,
    /// Number of greedy tokens averaged over.
    pub n_predict: usize,
    /// Where in the graph: [`MEASURED`]. Empty in older files, which did not say.
    #[serde(default)]
    pub measured: String,
    /// One entry per language.
    pub languages: Vec<LanguageActivation>,
}

/// Groups prompts by language, in order of the language codes.
pub fn by_language(prompts: &[PromptActivation]) -> Vec<LanguageActivation> {
    let mut languages: BTreeMap<&str, Vec<&PromptActivation>> = BTreeMap::new();
    for prompt in prompts {
        languages.entry(&prompt.language).or_default().push(prompt);
    }
    let rows = languages.into_iter().filter_map(|(language, prompts)| {
        let interval = |values: Option<Vec<f64>>| Interval::of(&values?, language);
        let b: Option<Vec<f64>> = prompts.iter().map(|p| p.b).collect();
        let difference = prompts.iter().map(|p| Some(p.b? - p.a)).collect();
        Some(LanguageActivation {
            language: language.to_owned(),
            n_prompts: prompts.len(),
            a: interval(Some(prompts.iter().map(|p| p.a).collect()))?,
            b: interval(b),
            difference: interval(difference),
        })
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(language: &str, a: f64, b: Option<f64>) -> PromptActivation {
        PromptActivation { language: language.into(), a, b }
    }

    #[test]
    fn each_language_has_its_means_and_its_mean_paired_difference() {
        let rows = by_language(&[
            prompt("en", 1.0, Some(0.0)),
            prompt("de", 4.0, Some(5.0)),
            prompt("en", 2.0, Some(-1.0)),
        ]);
        assert_eq!(
            rows.iter().map(|r| (r.language.as_str(), r.n_prompts)).collect::<Vec<_>>(),
            [("de", 1), ("en", 2)]
        );
        assert_eq!(rows[0].a, Interval { value: 4.0, low: None, high: None });
        assert_eq!(rows[1].a.value, 1.5);
        assert_eq!(rows[1].b.unwrap().value, -0.5);
        let difference = rows[1].difference.unwrap();
        assert_eq!(difference.value, -2.0);
        assert_eq!((difference.low, difference.high), (Some(-3.0), Some(-1.0)));
        assert!(by_language(&[prompt("en", 1.0, None)])[0].b.is_none());
    }

    #[test]
    fn the_interval_of_a_mean_is_about_two_standard_errors_wide_on_each_side() {
        // Standard deviation 0.5, 400 values: the standard error is 0.025.
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let interval = Interval::of(&values, "x").unwrap();
        let (low, high) = (interval.low.unwrap(), interval.high.unwrap());
        assert!((0.44..0.46).contains(&low) && (0.54..0.56).contains(&high), "{low} {high}");
        assert_eq!(Interval::of(&values, "x"), Some(interval));
        assert_eq!(Interval::of(&[], "x"), None);
    }
}
