//! The names of metrics, as types: an unknown name is an error, never a number.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Descriptor, METRICS};

/// A kind of metric, without the scorer.
///
/// The order is that of [`METRICS`], in which reports show them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "METRICS defines each of them")]
pub enum MetricKind {
    ExpectedMaximumToxicity,
    ToxicityProbability,
    AverageToxicity,
    Coverage,
    PerplexityMedian,
    PerplexityQ1,
    PerplexityQ3,
    PerplexityDropped,
    Distinct1,
    Distinct2,
    Distinct3,
    Repetition,
    LanguageKept,
    Empty,
}

impl MetricKind {
    /// The stable id, such as `distinct_1`.
    pub fn id(self) -> &'static str {
        match self {
            MetricKind::ExpectedMaximumToxicity => "expected_maximum_toxicity",
            MetricKind::ToxicityProbability => "toxicity_probability",
            MetricKind::AverageToxicity => "average_toxicity",
            MetricKind::Coverage => "coverage",
            MetricKind::PerplexityMedian => "perplexity_median",
            MetricKind::PerplexityQ1 => "perplexity_q1",
            MetricKind::PerplexityQ3 => "perplexity_q3",
            MetricKind::PerplexityDropped => "perplexity_dropped",
            MetricKind::Distinct1 => "distinct_1",
            MetricKind::Distinct2 => "distinct_2",
            MetricKind::Distinct3 => "distinct_3",
            MetricKind::Repetition => "repetition",
            MetricKind::LanguageKept => "language_kept",
            MetricKind::Empty => "empty",
        }
    }

    /// Title, unit, definition and test.
    pub fn descriptor(self) -> &'static Descriptor {
        &METRICS[self as usize]
    }

    /// Whether each scorer has its own value of this metric.
    pub fn needs_scorer(self) -> bool {
        self <= MetricKind::Coverage
    }

    /// This metric by `scorer`. Metrics that need no scorer ignore it.
    ///
    /// # Panics
    /// If the metric needs a scorer and `scorer` is `None`.
    pub fn by(self, scorer: Option<&str>) -> MetricId {
        let scorer = self
            .needs_scorer()
            .then(|| scorer.unwrap_or_else(|| panic!("{} needs the name of a scorer", self.id())).to_owned());
        MetricId { kind: self, scorer }
    }
}

/// A metric, with the scorer that it depends on, if any.
///
/// In text, the scorer comes before a slash: `lexical/expected_maximum_toxicity`, `distinct_1`. A
/// scorer's own name may contain a slash.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MetricId {
    kind: MetricKind,
    scorer: Option<String>,
}

impl MetricId {
    /// The kind of metric.
    pub fn kind(&self) -> MetricKind {
        self.kind
    }

    /// The scorer; `None` for metrics that need none.
    pub fn scorer(&self) -> Option<&str> {
        self.scorer.as_deref()
    }

    /// Title, unit, definition and test.
    pub fn descriptor(&self) -> &'static Descriptor {
        self.kind.descriptor()
    }
}

impl fmt::Display for MetricId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.scorer {
            Some(scorer) => write!(f, "{scorer}/{}", self.kind.id()),
            None => f.write_str(self.kind.id()),
        }
    }
}

/// A text that names no metric.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetricIdError {
    /// The id is not in the table.
    #[error("unknown metric {0:?}")]
    Unknown(String),
    /// A metric that needs a scorer has none.
    #[error("metric {0:?}: expected SCORER/{0}, found no scorer")]
    ScorerMissing(String),
    /// A metric that needs no scorer has one.
    #[error("metric {0:?}: expected no scorer, found {1:?}")]
    ScorerUnexpected(String, String),
}

impl FromStr for MetricId {
    type Err = MetricIdError;

    fn from_str(text: &str) -> Result<MetricId, MetricIdError> {
        let (scorer, id) = text.rsplit_once('/').map_or((None, text), |(scorer, id)| (Some(scorer), id));
        let descriptor = METRICS.iter().find(|metric| metric.kind.id() == id);
        let Some(&Descriptor { kind, .. }) = descriptor else {
            return Err(MetricIdError::Unknown(text.to_owned()));
        };
        match (kind.needs_scorer(), scorer) {
            (true, None) => Err(MetricIdError::ScorerMissing(id.to_owned())),
            (false, Some(scorer)) => Err(MetricIdError::ScorerUnexpected(id.to_owned(), scorer.to_owned())),
            _ => Ok(kind.by(scorer)),
        }
    }
}

impl Serialize for MetricId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MetricId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MetricId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Every metric in the order of [`METRICS`]: first those of each scorer in turn, then the others.
pub fn ids<'a>(scorers: impl IntoIterator<Item = &'a str>) -> Vec<MetricId> {
    let kinds = |needs_scorer: bool| {
        METRICS.iter().map(|metric| metric.kind).filter(move |kind| kind.needs_scorer() == needs_scorer)
    };
    let by_scorer = scorers.into_iter().flat_map(|scorer| kinds(true).map(move |kind| kind.by(Some(scorer))));
    by_scorer.chain(kinds(false).map(|kind| kind.by(None))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scorer_may_have_a_slash_in_its_name() {
        let id: MetricId = "file/a.jsonl/coverage".parse().unwrap();
        assert_eq!((id.scorer(), id.kind()), (Some("file/a.jsonl"), MetricKind::Coverage));
        assert_eq!(id.descriptor().term, "coverage");
        let id: MetricId = "distinct_1".parse().unwrap();
        assert_eq!((id.scorer(), id.kind()), (None, MetricKind::Distinct1));
    }

    #[test]
    fn every_id_is_unique_and_survives_a_round_trip_through_text_and_json() {
        let ids = ids(["a", "b"]);
        assert_eq!(ids.len(), 2 * 4 + 10);
        for (index, id) in ids.iter().enumerate() {
            assert_eq!(&id.to_string().parse::<MetricId>().unwrap(), id);
            assert_eq!(&serde_json::from_value::<MetricId>(serde_json::json!(id)).unwrap(), id);
            assert!(!ids[..index].contains(id), "{id} twice");
        }
        assert_eq!(serde_json::json!(ids[0]), "a/expected_maximum_toxicity");
    }

    #[test]
    fn the_table_has_one_row_for_each_kind_in_the_order_of_the_enum() {
        for (index, metric) in METRICS.iter().enumerate() {
            assert_eq!(metric.kind as usize, index, "{:?}", metric.kind);
        }
        assert_eq!(METRICS.len(), MetricKind::Empty as usize + 1);
    }

    #[test]
    fn rejects_an_unknown_id_and_a_missing_or_needless_scorer() {
        let error = |text: &str| text.parse::<MetricId>().unwrap_err().to_string();
        assert_eq!(error("lexical/expected_toxicity"), "unknown metric \"lexical/expected_toxicity\"");
        assert_eq!(error("coverage"), "metric \"coverage\": expected SCORER/coverage, found no scorer");
        assert_eq!(error("lexical/empty"), "metric \"empty\": expected no scorer, found \"lexical\"");
        assert!(serde_json::from_str::<MetricId>("\"distinct_4\"").is_err());
    }
}
