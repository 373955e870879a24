//! What an evaluation found: inert numbers, the one source of every report.
//!
//! Nothing here tells when or how fast a run was made, so that a resumed run and an unbroken one write
//! the same bytes.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::eval::metric::Test;
pub use crate::score::ScorerInfo;

/// A number with its interval from a percentile bootstrap over prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The number measured; always finite.
    pub value: f64,
    /// Lower end of the interval; `None` with fewer than two prompts.
    pub low: Option<f64>,
    /// Upper end of the interval; `None` with fewer than two prompts.
    pub high: Option<f64>,
}

impl Estimate {
    /// Half of the interval's width, where there is an interval.
    pub fn half_width(&self) -> Option<f64> {
        Some((self.high? - self.low?) / 2.0)
    }

    /// Whether the interval lies wholly above or wholly below 0; `false` without an interval.
    pub fn excludes_zero(&self) -> bool {
        matches!((self.low, self.high), (Some(low), Some(high)) if low > 0.0 || high < 0.0)
    }
}

/// One metric, by its stable name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// `distinct_1`, or with a scorer before the slash `lexical/toxicity_probability`; see
    /// [`crate::eval::metric`].
    pub name: String,
    /// The number; `None` where there was nothing to count.
    pub estimate: Option<Estimate>,
    /// What was counted: prompts, continuations, or (in a mean over languages) languages.
    pub n: usize,
    /// What of the same kind was there and could not be counted.
    pub missing: usize,
}

/// A number or a setting that deserves doubt, and what to do about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Warning {
    /// What is doubtful.
    pub what: String,
    /// What the reader can do, or should bear in mind.
    pub advice: String,
}

impl Warning {
    /// A warning.
    pub fn new(what: impl Into<String>, advice: impl Into<String>) -> Warning {
        Warning { what: what.into(), advice: advice.into() }
    }
}

/// [`RunInfo::perplexity_model`] of continuations that came with log-probabilities from elsewhere.
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
    /// Number of parameters, where it is known.
    pub n_params: Option<u64>,
    /// SHA-256 of the file, in lower-case hex, where it was computed.
    pub sha256: Option<String>,
}

/// How the intervals were made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BootstrapInfo {
    /// Number of resamples of the prompts.
    pub resamples: u32,
    /// Share of resamples inside the interval, such as 0.95.
    pub level: f64,
    /// Seed of the resampling.
    pub seed: u64,
}

impl Default for BootstrapInfo {
    fn default() -> Self {
        BootstrapInfo { resamples: 1000, level: 0.95, seed: 0 }
    }
}

/// What was run: enough to run it again.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// Version of this program, with its git revision where known.
    pub tool_version: String,
    /// Every setting of the command, defaults included, by the name of its flag.
    pub settings: Map<String, Value>,
    /// The model; `None` where the continuations were made elsewhere.
    pub model: Option<ModelInfo>,
    /// Intervention, adapter or control vector applied while sampling, in words; `None` for the model as
    /// it is.
    pub steering: Option<String>,
    /// The scorers, in the order of the command line; the first one leads the report.
    pub scorers: Vec<ScorerInfo>,
    /// Seed of the sampling.
    pub seed: u64,
    /// Continuations of each prompt.
    pub k: u32,
    /// Most tokens in a continuation.
    pub n_predict: u32,
    /// Sampling temperature.
    pub temperature: f32,
    /// Nucleus: the smallest set of tokens with this probability mass is sampled from.
    pub top_p: f32,
    /// A continuation with this toxicity or more counts as toxic, in [0, 1].
    pub toxicity_threshold: f64,
    /// Least share of a language's continuations that must have a score, in [0, 1].
    pub min_coverage: f64,
    /// Name of the tokenizer behind distinct-n and repetition.
    pub distinct_tokenizer: String,
    /// The model behind perplexity, in words; `None` where perplexity was not measured.
    pub perplexity_model: Option<String>,
    /// How the intervals were made.
    pub bootstrap: BootstrapInfo,
}

/// One language.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LanguageResult {
    /// Two-letter code.
    pub language: String,
    /// Prompts with at least one continuation.
    pub n_prompts: usize,
    /// Continuations.
    pub n_samples: usize,
    /// Its metrics, the same names in the same order in every language.
    pub metrics: Vec<Metric>,
}

/// How far two scorers agree on the same continuations, all languages together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// One scorer.
    pub scorer_a: String,
    /// The other.
    pub scorer_b: String,
    /// Continuations that both scored.
    pub n: usize,
    /// Spearman rank correlation in [-1, 1]; `None` where one of them gave one score to all.
    pub spearman: Option<f64>,
    /// Share of continuations that both call toxic or both do not, at the threshold.
    pub equal_verdicts: f64,
}

/// Everything an evaluation found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalResult {
    /// What was run.
    pub run: RunInfo,
    /// One entry a language, by code.
    pub languages: Vec<LanguageResult>,
    /// Unweighted mean over languages, as the paper's Table 2 has it (arXiv 2406.16235, section 3).
    pub mean: Vec<Metric>,
    /// Each pair of scorers; empty with one scorer.
    pub agreement: Vec<Agreement>,
    /// What deserves doubt.
    pub warnings: Vec<Warning>,
}

/// One metric of two runs, on the prompts that have it in both.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// The metric's name.
    pub name: String,
    /// In the first run.
    pub a: Estimate,
    /// In the second run.
    pub b: Estimate,
    /// `b` minus `a`, with the interval of the paired bootstrap.
    pub difference: Estimate,
    /// Two-sided, not corrected for the number of comparisons; `None` where `test` is undefined.
    pub p_value: Option<f64>,
    /// The test behind `p_value`.
    pub test: Test,
    /// Prompts that count in both runs, or (in a mean over languages) languages.
    pub n: usize,
}

impl Difference {
    /// Whether the interval leaves 0 out and the test, where there is one, agrees at the same `level`
    /// (0.95 for p < 0.05). With few unlike verdicts a bootstrap interval alone is too sure.
    pub fn is_clear(&self, level: f64) -> bool {
        let agrees = match self.test {
            Test::None => true,
            // Undefined where all differences are equal, as with few prompts: that confirms nothing.
            _ => self.p_value.is_some_and(|p| p < 1.0 - level),
        };
        self.difference.excludes_zero() && agrees
    }
}

/// Two runs in one language.
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

/// Two runs, prompt by prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What the first run is called.
    pub label_a: String,
    /// What the second run is called.
    pub label_b: String,
    /// What the first run was.
    pub a: RunInfo,
    /// What the second run was.
    pub b: RunInfo,
    /// One entry for each language with shared prompts.
    pub languages: Vec<LanguageComparison>,
    /// Unweighted mean over those languages.
    pub mean: Vec<Difference>,
    /// What deserves doubt.
    pub warnings: Vec<Warning>,
}

/// The metric called `name` in a list of metrics.
pub fn find<'a>(metrics: &'a [Metric], name: &str) -> Option<&'a Metric> {
    metrics.iter().find(|metric| metric.name == name)
}

impl LanguageResult {
    /// The metric called `name`.
    pub fn metric(&self, name: &str) -> Option<&Metric> {
        find(&self.metrics, name)
    }
}

impl EvalResult {
    /// The result of one language.
    pub fn language(&self, language: &str) -> Option<&LanguageResult> {
        self.languages.iter().find(|result| result.language == language)
    }

    /// The unweighted mean over languages of the metric called `name`.
    pub fn mean_of(&self, name: &str) -> Option<&Metric> {
        find(&self.mean, name)
    }
}

/// The difference of the metric called `name` in a list of differences.
pub fn find_difference<'a>(differences: &'a [Difference], name: &str) -> Option<&'a Difference> {
    differences.iter().find(|difference| difference.name == name)
}
