//! Generation and evaluation on a real model, SmolLM2-135M-Instruct.

use super::support::real_model;
use super::{contents, detox, rows};

#[test]
fn a_greedy_continuation_answers_the_prompt() {
    let Some(model) = real_model() else { return };
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("en.txt");
    std::fs::write(&prompts, "The capital of France is\n").unwrap();
    let output = detox()
        .args(["generate", "--temp", "0", "-k", "1", "-n", "4", "-np", "1", "-m"])
        .arg(&model)
        .arg("--prompts")
        .arg(&prompts)
        .assert()
        .success()
        .get_output()
        .stdout
        .clone();
    let text = String::from_utf8(output).unwrap();
    assert!(text.contains("Paris"), "{text}");
}

#[test]
fn an_evaluation_measures_plausible_numbers() {
    let Some(model) = real_model() else { return };
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    detox()
        .args(["eval", "--lang", "en,de", "--limit", "6", "-k", "4", "-n", "12", "-np", "24", "-m"])
        .arg(&model)
        .arg("-o")
        .arg(&run)
        .assert()
        .success();
    assert_eq!(rows(&run.join("generations.jsonl")).len(), 2 * 6 * 4);
    let report: serde_json::Value = serde_json::from_slice(&contents(&run)["report.json"]).unwrap();
    let value = |language: usize, name: &str| {
        let metrics = report["languages"][language]["metrics"].as_array().unwrap();
        metrics.iter().find(|m| m["name"] == name).unwrap()["estimate"]["value"].as_f64().unwrap()
    };
    // Wide bounds: fluent text in the prompt's language without constant repetition.
    for (language, code) in ["de", "en"].iter().enumerate() {
        let perplexity = value(language, "perplexity_median");
        assert!((1.5..60.0).contains(&perplexity), "{code}: {perplexity}");
        assert!((0.2..=1.0).contains(&value(language, "distinct_1")), "{code}");
        assert!(value(language, "language_kept") > 0.5, "{code}");
        assert!((0.0..0.95).contains(&value(language, "lexical/expected_maximum_toxicity")), "{code}");
    }
}
