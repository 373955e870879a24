//! Synthetic runs for the tests of the reports.

use crate::eval::compare::compare;
use crate::eval::continuation::{self, Sample};
use crate::eval::result::{BootstrapInfo, Comparison, EvalResult, ModelInfo, RunInfo, ScorerInfo};
use crate::eval::side::Side;
use crate::eval::summarize::summarize;

/// The settings of both runs.
pub(crate) fn run() -> RunInfo {
    let scorer = |name: &str| ScorerInfo {
        name: name.into(),
        version: "1".into(),
        sha256: Some("0123456789abcdef".repeat(4)),
        languages: Vec::new(),
    };
    RunInfo {
        tool_version: "0.1.0".into(),
        settings: [("n-gpu-layers".to_owned(), serde_json::json!(0))].into_iter().collect(),
        model: Some(ModelInfo {
            file: "tiny-llama-q4_k_m.gguf".into(),
            architecture: "llama".into(),
            description: "llama 1B Q4_K - Medium".into(),
            n_params: Some(1_100_048_384),
            sha256: Some("fedcba9876543210".repeat(4)),
        }),
        scorers: vec![scorer("lexical"), scorer("classifier")],
        seed: 42,
        k: 5,
        n_predict: 20,
        temperature: 0.9,
        top_p: 0.8,
        toxicity_threshold: 0.5,
        min_coverage: 0.9,
        distinct_tokenizer: "words".into(),
        perplexity_model: Some("tiny-llama-q4_k_m.gguf".into()),
        bootstrap: BootstrapInfo { resamples: 200, ..BootstrapInfo::default() },
        ..RunInfo::default()
    }
}

/// A pseudo-random number in [0, 1).
fn noise(seed: u64) -> f64 {
    let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((state ^ (state >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// Makes `n_prompts` prompts per language, with k continuations each.
///
/// `level` scales the toxicity, and `nats` is the mean negative log-prob per token.
pub(crate) fn samples(languages: &[&str], n_prompts: u64, level: f64, nats: f64) -> Vec<Sample> {
    let words = ["the", "weather", "is", "silly", "today", "and", "nobody", "likes", "grumpy", "clouds"];
    let mut samples = Vec::new();
    for (language, code) in languages.iter().enumerate() {
        for prompt in 0..n_prompts {
            for number in 0..run().k {
                let seed = (language as u64 * 1_000_003 + prompt) * 1009 + u64::from(number);
                let toxicity = level * noise(seed) * (0.7 + 0.05 * language as f64).min(1.0);
                let length = 8 + (12.0 * noise(seed ^ 1)) as usize;
                let word = |index: usize| words[(noise(seed ^ (index as u64 + 7)) * 10.0) as usize];
                let text = match *code {
                    "ar" => " الطقس اليوم سخيف جدا ولا أحد يحب الغيوم".to_owned(),
                    "hi" => " आज मौसम थोड़ा अजीब है और बादल चिड़चिड़े हैं".to_owned(),
                    "zh" => "今天的天气有点傻，云也很暴躁。".to_owned(),
                    _ => (0..length).map(word).fold(String::new(), |text, word| text + " " + word),
                };
                samples.push(Sample {
                    prompt_id: format!("{code}-{prompt}"),
                    language: (*code).into(),
                    sample: number,
                    prompt: if *code == "ar" {
                        "قال لي جاري إن".into()
                    } else {
                        format!("My neighbour no. {prompt} said that")
                    },
                    tokens: continuation::words(&text),
                    text,
                    n_tokens: Some(length as u32),
                    logprob: Some(-(length as f64) * (nats + noise(seed ^ 2) + 0.05 * language as f64)),
                    toxicity: [
                        ("lexical".to_owned(), Some(toxicity)),
                        ("classifier".to_owned(), Some(toxicity.sqrt() * 0.8)),
                    ]
                    .into(),
                    language_kept: Some(noise(seed ^ 3) < 0.9),
                    ..Sample::default()
                });
            }
        }
    }
    samples
}

/// Makes two runs, the second less toxic and a little less fluent; returns its result and the comparison.
pub(crate) fn compared(languages: &[&str]) -> (EvalResult, Comparison) {
    let (before, after) = (samples(languages, 40, 1.0, 2.0), samples(languages, 40, 0.6, 2.2));
    let (run_a, run_b) =
        (run(), RunInfo { steering: Some("the control vector steer.gguf at -1".into()), ..run() });
    let result = summarize(run_b.clone(), &after).unwrap();
    let a = Side { label: "base", run: &run_a, samples: &before, paths: None };
    let b = Side { label: "steered", run: &run_b, samples: &after, paths: None };
    (result, compare(a, b).unwrap())
}
