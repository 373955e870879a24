//! Bilingual sentence retrieval at each place of a model, and its correlation with toxicity.
//!
//! The paper, section 5: is toxicity reduced more in languages whose sentences retrieve better?

use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use crate::engine::residual::ResidualPlace;
use crate::engine::{Model, SessionOptions};
use crate::error::{Error, Result};
use crate::eval::compare;
use crate::eval::metric::MetricKind;
use crate::eval::record;
use crate::eval::result::find_difference;
use crate::file::base_name;
use crate::interp::residual_streams::{check_max_tokens, mean_residual_streams};
use crate::interp::retrieval::{Aligned, Correlation, Retrieval, pearson, retrieve};
use crate::progress::Progress;

/// Options of [`measure`].
#[derive(Debug, Clone)]
pub struct RetrievalOptions {
    /// The language to compare all others with.
    pub pivot: String,
    /// Use only the first `n` sentences; all if `None`.
    pub limit: Option<usize>,
    /// Maximum number of tokens to read of each sentence.
    pub max_tokens: usize,
}

impl RetrievalOptions {
    /// Checks the options before a model is loaded.
    ///
    /// # Errors
    /// [`Error::Setting`] for a pivot without sentences, and for a limit that is too small.
    pub fn check(&self, aligned: &Aligned) -> Result<()> {
        if !aligned.sentences.contains_key(&self.pivot) {
            let found: Vec<&String> = aligned.sentences.keys().collect();
            let reason = format!("expected one of {found:?}, found {:?}", self.pivot);
            return Err(Error::setting("--pivot", reason));
        }
        check_max_tokens(self.max_tokens)?;
        if let Some(n) = self.limit.filter(|&n| n < 2) {
            return Err(Error::setting("--limit", format!("expected at least 2 sentences, found {n}")));
        }
        Ok(())
    }
}

/// Retrieval between the pivot and every other language.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrievalReport {
    /// The model's file name.
    pub model: String,
    /// The language that all others are compared with.
    pub pivot: String,
    /// Number of sentences in each language.
    pub n_sentences: usize,
    /// Names of the places in the model, in order.
    pub places: Vec<String>,
    /// Results by language.
    pub languages: Vec<LanguageRetrieval>,
    /// Correlations with the fall of expected maximum toxicity; empty unless two runs were given.
    pub correlations: Vec<NamedCorrelation>,
}

/// Retrieval between the pivot and one other language.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LanguageRetrieval {
    /// The language's code.
    pub language: String,
    /// Results at each place; forward is from the pivot to this language.
    pub places: Vec<Retrieval>,
    /// Mean top-1 accuracy over places and both directions.
    pub mean_accuracy: f64,
    /// Mean cosine of aligned pairs, averaged over places.
    pub mean_cosine: f64,
    /// Fraction by which expected maximum toxicity fell between the two runs, if they were given.
    pub toxicity_fall: Option<f64>,
}

/// The correlation of a measure with the fall of toxicity, over languages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NamedCorrelation {
    /// The measure: top-1 accuracy or mean cosine.
    pub of: String,
    /// `None` with fewer than three languages, or without variance.
    pub correlation: Option<Correlation>,
}

/// Languages with the fraction by which expected maximum toxicity fell between two runs.
pub type ToxicityFalls = Vec<(String, f64)>;

/// Measures retrieval at the embeddings, after each block but the last, and after the final norm.
///
/// These places are Hugging Face's `hidden_states`, which the paper's code reads. Correlations are computed
/// over the languages in `falls`.
///
/// # Errors
/// Those of [`RetrievalOptions::check`], [`mean_residual_streams`] and [`retrieve`].
pub fn measure(
    model: &Model,
    session_options: &SessionOptions,
    aligned: &Aligned,
    options: &RetrievalOptions,
    falls: Option<&ToxicityFalls>,
    progress: &mut dyn Progress,
    interrupt: &AtomicBool,
) -> Result<RetrievalReport> {
    options.check(aligned)?;
    let mut places = ResidualPlace::all(model.n_layer());
    places.remove(model.n_layer());
    let streams = |sentences: &[String], progress: &mut dyn Progress| {
        let texts = sentences.iter().take(options.limit.unwrap_or(usize::MAX));
        let texts: Vec<&str> = texts.map(String::as_str).collect();
        let max_tokens = options.max_tokens;
        mean_residual_streams(model, session_options, &texts, &places, max_tokens, progress, interrupt)
    };
    let pivot = streams(&aligned.sentences[&options.pivot], progress)?;
    let mut languages = Vec::new();
    for (language, sentences) in aligned.sentences.iter().filter(|(l, _)| **l != options.pivot) {
        progress.say(language);
        let other = streams(sentences, progress)?;
        let of_places = (0..places.len()).map(|i| retrieve(&at_place(&pivot, i), &at_place(&other, i)));
        let fall = falls.and_then(|falls| falls.iter().find(|(l, _)| l == language));
        languages.push(LanguageRetrieval::of(language, of_places.collect::<Result<_>>()?, fall.map(|f| f.1)));
    }
    Ok(RetrievalReport {
        model: base_name(model.path()),
        pivot: options.pivot.clone(),
        n_sentences: pivot.len(),
        places: places.iter().map(|&place| place_name(place)).collect(),
        correlations: falls.map_or_else(Vec::new, |_| correlations(&languages)),
        languages,
    })
}

impl LanguageRetrieval {
    fn of(language: &str, places: Vec<Retrieval>, toxicity_fall: Option<f64>) -> LanguageRetrieval {
        let mean = |of: &dyn Fn(&Retrieval) -> f64| places.iter().map(of).sum::<f64>() / places.len() as f64;
        LanguageRetrieval {
            language: language.to_owned(),
            mean_accuracy: mean(&|r| (r.forward_accuracy + r.backward_accuracy) / 2.0),
            mean_cosine: mean(&|r| r.mean_cosine),
            toxicity_fall,
            places,
        }
    }
}

/// Selects one place, shape `[n_sentences][n_embd]`, from shape `[n_sentences][n_places][n_embd]`.
fn at_place(streams: &[Vec<Vec<f32>>], place: usize) -> Vec<Vec<f32>> {
    streams.iter().map(|places| places[place].clone()).collect()
}

fn place_name(place: ResidualPlace) -> String {
    match place {
        ResidualPlace::Embedding => "embedding".into(),
        ResidualPlace::AfterBlock(il) => format!("layer {il}"),
        ResidualPlace::AfterFinalNorm => "final norm".into(),
    }
}

/// Correlates both measures with the fall of toxicity, over languages.
fn correlations(languages: &[LanguageRetrieval]) -> Vec<NamedCorrelation> {
    let correlate = |of: &str, number: &dyn Fn(&LanguageRetrieval) -> f64| {
        let (x, y): (Vec<f64>, Vec<f64>) =
            languages.iter().filter_map(|l| Some((number(l), l.toxicity_fall?))).unzip();
        NamedCorrelation { of: of.into(), correlation: pearson(&x, &y) }
    };
    vec![correlate("top-1 accuracy", &|l| l.mean_accuracy), correlate("mean cosine", &|l| l.mean_cosine)]
}

/// Computes the fraction by which expected maximum toxicity fell between two run folders, by language.
///
/// The first scorer's values are used. A language with value 0 before the change is skipped.
///
/// # Errors
/// Those of [`record::read`] and [`compare::compare`].
pub fn toxicity_falls(before: &Path, after: &Path) -> Result<ToxicityFalls> {
    let (a, b) = (record::read(before)?, record::read(after)?);
    let scorer = a.info.scorers.first().map(|s| s.name.clone()).unwrap_or_default();
    let comparison = compare::compare(a.side("before"), b.side("after"))?;
    let id = MetricKind::ExpectedMaximumToxicity.by(Some(&scorer));
    let falls = comparison.languages.iter().filter_map(|l| {
        let found = find_difference(&l.metrics, &id)?;
        (found.a.value > 0.0).then(|| (l.language.clone(), 1.0 - found.b.value / found.a.value))
    });
    Ok(falls.collect())
}
