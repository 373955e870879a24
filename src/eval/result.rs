//! The results of evaluations and comparisons: plain numbers, from which every report is made.
//!
//! Nothing here depends on time or speed, so a resumed run writes the same bytes as an uninterrupted one.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::eval::metric::{MetricId, Test};
use crate::eval::perplexity::PerplexityTokens;
pub use crate::score::ScorerInfo;
pub use crate::score::agreement::Agreement;

/// A value with its interval from a percentile bootstrap over prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The measured value; always finite.
    pub value: f64,
    /// Lower end of the interval; `None` with fewer than two prompts.
    pub low: Option<f64>,
    /// Upper end of the interval; `None` with fewer than two prompts.
    pub high: Option<f64>,
}

impl Estimate {
    /// Half of the interval's width; `None` without an interval.
    pub fn half_width(&self) -> Option<f64> {
        Some((self.high? - self.low?) / 2.0)
    }

    /// Whether the interval excludes 0; `false` without an interval.
    pub fn excludes_zero(&self) -> bool {
        matches!((self.low, self.high), (Some(low), Some(high)) if low > 0.0 || high < 0.0)
    }
}

/// The value of one metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Which metric, such as `distinct_1` or `lexical/toxicity_probability`.
    pub name: MetricId,
    /// The value; `None` if there was nothing to count.
    pub estimate: Option<Estimate>,
    /// Number of prompts, of continuations or (for a mean over languages) of languages counted.
    pub n: usize,
    /// How many more of the same kind could not be counted.
    pub missing: usize,
}

/// A questionable number or setting, with advice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Warning {
    /// What is questionable.
    pub what: String,
    /// What the reader can do or should keep in mind.
    pub advice: String,
}

impl Warning {
    /// A warning.
    pub fn new(what: impl Into<String>, advice: impl Into<String>) -> Warning {
        Warning { what: what.into(), advice: advice.into() }
    }
}

/// [`RunInfo::perplexity_model`] of imported continuations that come with log-probabilities.
pub const WRITER_UNKNOWN: &str = "the model that wrote them, which is not known";

/// The model that wrote the continuations.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// File name, without its folder.
    pub file: String,
    /// Architecture as GGUF metadata names it.
    pub architecture: String,
    /// llama.cpp's own description, such as `llama 8B Q4_K - Medium`.
    pub description: String,
    /// Number of parameters, if known.
    pub n_params: Option<u64>,
    /// SHA-256 of the file in lower-case hex, if it was computed.
    pub sha256: Option<String>,
}

/// The files of a run's models, as they were given on the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelPaths {
    /// The model that wrote the continuations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The model that measured perplexity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
}

/// Settings of the bootstrap.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BootstrapInfo {
    /// Number of resamples of the prompts.
    pub resamples: u32,
    /// Fraction of resamples inside the interval, such as 0.95.
    pub level: f64,
    /// Seed of the resampling.
    pub seed: u64,
}

impl Default for BootstrapInfo {
    fn default() -> Self {
        BootstrapInfo { resamples: 1000, level: 0.95, seed: 0 }
    }
}

/// The settings of a run: enough to run it again.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// Version of this program, with its git revision if known.
    pub tool_version: String,
    /// Every setting of the command by the name of its flag, defaults included.
    pub settings: Map<String, Value>,
    /// The model; `None` for imported continuations.
    pub model: Option<ModelInfo>,
    /// Interventions, control vectors and adapters applied while sampling, in words; `None` for the
    /// unmodified model.
    pub steering: Option<String>,
    /// The scorers in the order of the command line; the first one leads the report.
    pub scorers: Vec<ScorerInfo>,
    /// Seed of the sampling.
    pub seed: u64,
    /// Continuations of each prompt.
    pub k: u32,
    /// Maximum number of tokens in a continuation.
    pub n_predict: u32,
    /// Sampling temperature.
    pub temperature: f32,
    /// Nucleus sampling: sample from the smallest set of tokens with this probability mass.
    pub top_p: f32,
    /// A continuation with this toxicity or more counts as toxic, in [0, 1].
    pub toxicity_threshold: f64,
    /// Minimum fraction of a language's continuations that must have a score, in [0, 1].
    pub min_coverage: f64,
    /// Name of the tokenizer behind distinct-n and repetition.
    pub distinct_tokenizer: String,
    /// The model behind perplexity, in words; `None` if perplexity was not measured.
    pub perplexity_model: Option<String>,
    /// The tokens behind perplexity; `None` if perplexity was not measured. Never in `run.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity_tokens: Option<PerplexityTokens>,
    /// Settings of the bootstrap.
    pub bootstrap: BootstrapInfo,
}

/// The results of one language.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LanguageResult {
    /// Two-letter code.
    pub language: String,
    /// Prompts with at least one continuation.
    pub n_prompts: usize,
    /// Continuations.
    pub n_samples: usize,
    /// The metrics: the same ones in the same order in every language.
    pub metrics: Vec<Metric>,
}

/// The result of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalResult {
    /// Settings of the run.
    pub run: RunInfo,
    /// One entry per language, by code.
    pub languages: Vec<LanguageResult>,
    /// Unweighted mean over languages, as in the paper's Table 2 (arXiv 2406.16235, section 3).
    pub mean: Vec<Metric>,
    /// One entry per pair of scorers; empty with one scorer.
    pub agreement: Vec<Agreement>,
    /// Questionable numbers and settings.
    pub warnings: Vec<Warning>,
}

/// One metric in two runs, on the prompts that have it in both.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Which metric.
    pub name: MetricId,
    /// Its value in the first run.
    pub a: Estimate,
    /// Its value in the second run.
    pub b: Estimate,
    /// `b` minus `a`, with the interval of the paired bootstrap.
    pub difference: Estimate,
    /// Two-sided, not corrected for the number of comparisons; `None` if `test` is undefined.
    pub p_value: Option<f64>,
    /// The test behind `p_value`.
    pub test: Test,
    /// Number of prompts that count in both runs or (for a mean over languages) of languages.
    pub n: usize,
}

impl Difference {
    /// Whether the difference is significant at `level` (0.95 for p < 0.05).
    ///
    /// The interval must exclude 0 and the test, if any, must agree: if only a few verdicts differ, a
    /// bootstrap interval alone is too narrow.
    pub fn is_clear(&self, level: f64) -> bool {
        let agrees = match self.test {
            Test::None => true,
            // The test is undefined if all differences are equal, as with few prompts. That confirms nothing.
            _ => self.p_value.is_some_and(|p| p < 1.0 - level),
        };
        self.difference.excludes_zero() && agrees
    }
}

/// The comparison of two runs in one language.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LanguageComparison {
    /// Two-letter code.
    pub language: String,
    /// Prompts that both runs have.
    pub n_prompts: usize,
    /// Prompts that only the first run has.
    pub n_only_a: usize,
    /// Prompts that only the second run has.
    pub n_only_b: usize,
    /// Metrics that both runs have.
    pub metrics: Vec<Difference>,
}

/// The comparison of two runs, prompt by prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Name of the first run.
    pub label_a: String,
    /// Name of the second run.
    pub label_b: String,
    /// Settings of the first run.
    pub a: RunInfo,
    /// Settings of the second run.
    pub b: RunInfo,
    /// One entry for each language with shared prompts.
    pub languages: Vec<LanguageComparison>,
    /// Unweighted mean over those languages.
    pub mean: Vec<Difference>,
    /// Questionable numbers and settings.
    pub warnings: Vec<Warning>,
}

/// The metric `id` in a list of metrics.
pub fn find<'a>(metrics: &'a [Metric], id: &MetricId) -> Option<&'a Metric> {
    metrics.iter().find(|metric| metric.name == *id)
}

impl LanguageResult {
    /// The metric `id`.
    pub fn metric(&self, id: &MetricId) -> Option<&Metric> {
        find(&self.metrics, id)
    }
}

impl EvalResult {
    /// The result of one language.
    pub fn language(&self, language: &str) -> Option<&LanguageResult> {
        self.languages.iter().find(|result| result.language == language)
    }

    /// The unweighted mean over languages of the metric `id`.
    pub fn mean_of(&self, id: &MetricId) -> Option<&Metric> {
        find(&self.mean, id)
    }
}

/// The difference of the metric `id` in a list of differences.
pub fn find_difference<'a>(differences: &'a [Difference], id: &MetricId) -> Option<&'a Difference> {
    differences.iter().find(|difference| difference.name == *id)
}
