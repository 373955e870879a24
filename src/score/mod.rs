//! Scorers: text in, toxicity in [0, 1] out, or an error. A missing score is missing, never 0.

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
    /// The text alone: a continuation without its prompt.
    pub text: &'a str,
    /// Its language, where it is known, as a two-letter code.
    pub language: Option<&'a str>,
}

/// A scorer that was used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ScorerInfo {
    /// Its name, as in the names of its metrics.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of its weights or source file, in lower-case hex, where it has one.
    pub sha256: Option<String>,
    /// Languages that it covers; empty where that is not stated.
    pub languages: Vec<String>,
}

impl ScorerInfo {
    /// Whether the scorer claims `language`, or states no languages at all.
    pub fn covers(&self, language: &str) -> bool {
        self.languages.is_empty() || self.languages.iter().any(|covered| covered == language)
    }
}

/// Something that judges how toxic a text is.
pub trait Scorer: Sync {
    /// Its name, version, hash and the languages it covers.
    fn info(&self) -> ScorerInfo;

    /// Toxicity in [0, 1].
    fn toxicity(&self, text: Text<'_>) -> Result<f64>;

    /// Toxicity of many texts, in their order; one that fails does not stop the others.
    #[cfg(feature = "engine")]
    fn toxicity_of_all(&self, texts: &[Text<'_>]) -> Vec<Result<f64>> {
        texts.par_iter().map(|&text| self.toxicity(text)).collect()
    }
}

/// The embedded scorer behind the trait.
#[derive(Debug, Clone, Copy)]
struct Embedded(&'static Lexical);

impl Scorer for Embedded {
    fn info(&self) -> ScorerInfo {
        ScorerInfo {
            name: LEXICAL.into(),
            version: self.0.version().into(),
            sha256: Some(self.0.sha256().into()),
            languages: lexical::LANGUAGES.map(str::to_owned).to_vec(),
        }
    }

    fn toxicity(&self, Text { text, language }: Text<'_>) -> Result<f64> {
        // A text in a language that the model has not seen would get a number that means nothing.
        if let Some(language) = language
            && !lexical::LANGUAGES.contains(&language)
        {
            return Err(Error::scorer(LEXICAL, format!("does not cover language {language:?}")));
        }
        // The score of an f32 model: printed with the digits that it has.
        let score = f64::from(self.0.toxicity(text, language));
        Ok((score * 1e6).round() / 1e6)
    }
}

/// Name of the embedded scorer, and the default of `--scorer`.
pub const LEXICAL: &str = "lexical";

/// The scorer called `name`.
pub fn by_name(name: &str) -> Result<Box<dyn Scorer>> {
    match name {
        LEXICAL => Ok(Box::new(Embedded(Lexical::embedded()))),
        _ => Err(Error::setting("--scorer", format!("expected {LEXICAL:?}, found {name:?}"))),
    }
}

/// Scorers by name, each once.
pub fn by_names(names: &[String]) -> Result<Vec<Box<dyn Scorer>>> {
    for (i, name) in names.iter().enumerate() {
        if names[..i].contains(name) {
            return Err(Error::setting("--scorer", format!("{name:?} is given twice")));
        }
    }
    names.iter().map(|name| by_name(name)).collect()
}

/// Refuses languages that none of the scorers covers, before any work is done.
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
                .with_hint(format!("choose among these with --lang: {}", covered.join(" "))));
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

    #[test]
    fn a_score_has_six_decimals() {
        let scorers = by_names(&[LEXICAL.to_owned()]).unwrap();
        let score =
            scorers[0].toxicity(Text { text: "good morning to you all", language: Some("en") }).unwrap();
        assert_eq!(score, format!("{score:.6}").parse::<f64>().unwrap());
        assert!((0.0..=1.0).contains(&score));
    }
}
