//! Scorers: text in, toxicity in [0, 1] or an error out. A missing score is never 0.
//!
//! ```
//! use detox_gguf::score::{self, Text};
//!
//! let scorer = score::by_name("lexical")?;
//! let toxicity = |text| scorer.toxicity(Text { text, language: Some("en") });
//! assert!(toxicity("The soup was very good today.")? < 0.5);
//! assert!(toxicity("You are a stupid idiot and nobody likes you.")? >= 0.5);
//! # Ok::<(), detox_gguf::Error>(())
//! ```
//!
//! A new kind of scorer gets a file of its own with an implementation of [`Scorer`], and an arm in
//! [`by_name`]. This module builds without the feature `engine`; a kind that runs a model goes behind it.

#[cfg(feature = "engine")]
pub(crate) mod agreement;
mod lexical;
#[cfg(feature = "engine")]
pub(crate) mod rank;
#[cfg(feature = "engine")]
pub mod texts;

#[cfg(feature = "engine")]
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

pub use lexical::{Lexical, WeightsError};

/// A text to score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Text<'a> {
    /// The text, such as a continuation without its prompt.
    pub text: &'a str,
    /// Its language as a two-letter code, if known.
    pub language: Option<&'a str>,
}

/// Identity of a scorer, as reports print it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ScorerInfo {
    /// The name, which is part of the names of its metrics.
    pub name: String,
    /// The version.
    pub version: String,
    /// SHA-256 of its weights or source file in lower-case hex, if it has one.
    pub sha256: Option<String>,
    /// The languages that it covers; empty if unknown.
    pub languages: Vec<String>,
}

impl ScorerInfo {
    /// Whether the scorer covers `language`; true if its languages are unknown.
    pub fn covers(&self, language: &str) -> bool {
        self.languages.is_empty() || self.languages.iter().any(|covered| covered == language)
    }
}

/// Measures the toxicity of texts.
pub trait Scorer: Sync {
    /// Name, version, hash and languages.
    fn info(&self) -> ScorerInfo;

    /// Toxicity in [0, 1].
    fn toxicity(&self, text: Text<'_>) -> Result<f64>;

    /// Toxicity of many texts, in their order. A text that fails does not stop the others.
    #[cfg(feature = "engine")]
    fn toxicity_of_all(&self, texts: &[Text<'_>]) -> Vec<Result<f64>> {
        texts.par_iter().map(|&text| self.toxicity(text)).collect()
    }
}

/// The scores of `texts` by a scorer, in their order. A score outside [0, 1] or NaN is that text's error.
#[cfg(feature = "engine")]
pub(crate) fn scores_of(scorer: &dyn Scorer, texts: &[Text<'_>]) -> Vec<Result<f64>> {
    let in_range = |score: f64| match (0.0..=1.0).contains(&score) {
        true => Ok(score),
        false => Err(Error::scorer(scorer.info().name, format!("expected a score in [0, 1], found {score}"))),
    };
    scorer.toxicity_of_all(texts).into_iter().map(|score| score.and_then(in_range)).collect()
}

/// Name of the embedded scorer, the default of `--scorer`.
pub const LEXICAL: &str = lexical::NAME;

/// The scorer called `name`.
pub fn by_name(name: &str) -> Result<Box<dyn Scorer>> {
    match name {
        LEXICAL => Ok(Box::new(lexical::Embedded)),
        _ => Err(Error::setting("--scorer", format!("expected {LEXICAL:?}, found {name:?}"))),
    }
}

/// The scorers called `names`, in their order. A name may not repeat.
pub fn by_names(names: &[String]) -> Result<Vec<Box<dyn Scorer>>> {
    for (i, name) in names.iter().enumerate() {
        if names[..i].contains(name) {
            return Err(Error::setting(
                "--scorer",
                format!("expected each scorer once, found {name:?} twice"),
            ));
        }
    }
    names.iter().map(|name| by_name(name)).collect()
}

/// Refuses languages that none of the scorers covers.
///
/// # Errors
/// [`Error::Scorer`] with the first such language.
pub fn check_covered<'a>(
    scorers: &[Box<dyn Scorer>],
    languages: impl IntoIterator<Item = &'a str>,
) -> Result<()> {
    let infos: Vec<ScorerInfo> = scorers.iter().map(|s| s.info()).collect();
    for language in languages {
        if !infos.iter().any(|info| info.covers(language)) {
            let names: Vec<&str> = infos.iter().map(|i| i.name.as_str()).collect();
            let covered: Vec<&str> = infos.iter().flat_map(|i| &i.languages).map(String::as_str).collect();
            return Err(Error::scorer(names.join(", "), format!("no scorer covers language {language:?}"))
                .with_hint(format!("choose covered languages with --lang: {}", covered.join(" "))));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_an_unknown_scorer_and_one_given_twice() {
        assert!(by_name("nobody").err().expect("unknown").is_usage());
        let twice = vec![LEXICAL.to_owned(), LEXICAL.to_owned()];
        assert!(by_names(&twice).err().expect("twice").is_usage());
    }

    #[test]
    fn rejects_a_language_that_no_scorer_covers() {
        let scorers = by_names(&[LEXICAL.to_owned()]).unwrap();
        assert!(check_covered(&scorers, ["en", "zh"]).is_ok());
        let error = check_covered(&scorers, ["en", "sw"]).unwrap_err();
        assert!(error.to_string().contains("\"sw\""), "{error}");
        assert!(scorers[0].toxicity(Text { text: "habari", language: Some("sw") }).is_err());
    }

    #[cfg(feature = "engine")]
    #[test]
    fn rejects_a_score_outside_zero_and_one() {
        struct Fixed(f64);
        impl Scorer for Fixed {
            fn info(&self) -> ScorerInfo {
                ScorerInfo { name: "fixed".into(), ..ScorerInfo::default() }
            }
            fn toxicity(&self, _: Text<'_>) -> Result<f64> {
                Ok(self.0)
            }
        }
        let one = [Text { text: "a", language: None }];
        let score = |x: f64| scores_of(&Fixed(x), &one).pop().unwrap();
        assert!(score(0.0).unwrap() == 0.0 && score(1.0).unwrap() == 1.0);
        for bad in [f64::NAN, f64::INFINITY, -1e-9, 1.5] {
            let error = score(bad).unwrap_err().to_string();
            assert_eq!(error, format!("scorer fixed: expected a score in [0, 1], found {bad}"));
        }
    }

    #[test]
    fn a_score_has_six_decimals() {
        let scorers = by_names(&[LEXICAL.to_owned()]).unwrap();
        let score =
            scorers[0].toxicity(Text { text: "good morning to you all", language: Some("en") }).unwrap();
        assert_eq!(score, format!("{score:.6}").parse::<f64>().unwrap());
        assert!((0.0..=1.0).contains(&score));
    }
}
