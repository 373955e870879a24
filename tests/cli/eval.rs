//! `eval`, and its steps `generate` and `score` on their own.

use super::{contents, detox, differing, rows, small_eval, tiny};

#[test]
fn an_evaluation_writes_its_files_and_prints_a_row_per_language() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let output = small_eval(&run).assert().success().get_output().clone();
    let table = String::from_utf8(output.stdout).unwrap();
    for row in ["de ", "en ", "mean"] {
        assert!(table.lines().any(|line| line.starts_with(row)), "{table}");
    }
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    let names: Vec<String> = contents(&run).into_keys().collect();
    let expected = [
        "generations.jsonl",
        "per_prompt.jsonl",
        "report.csv",
        "report.html",
        "report.json",
        "report.md",
        "run.json",
        "run.json.bak",
        "scores.jsonl",
    ];
    assert_eq!(names, expected);
    let generations = rows(&run.join("generations.jsonl"));
    assert_eq!(generations.len(), 2 * 3 * 4);
    assert_eq!(rows(&run.join("scores.jsonl")).len(), generations.len());
    let record: serde_json::Value = serde_json::from_slice(&contents(&run)["run.json"]).unwrap();
    for setting in ["seed", "k", "temperature", "top_p", "tool_version"] {
        assert!(!record["run"][setting].is_null(), "{setting}");
    }
    assert_eq!(record["run"]["model"]["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(record["run"]["scorers"][0]["sha256"].as_str().unwrap().len(), 64);
}

#[test]
fn the_same_command_gives_the_same_bytes_twice() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    small_eval(&a).assert().success();
    small_eval(&b).assert().success();
    assert_eq!(differing(&a, &b), [""; 0]);
    small_eval(&a).assert().success();
    assert_eq!(differing(&a, &b), [""; 0], "a finished run is not changed");
}

#[test]
fn separate_steps_give_the_same_numbers_as_eval() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    small_eval(&run).assert().success();
    let file = folder.path().join("g.jsonl");
    detox()
        .args([
            "generate", "--lang", "en,de", "--limit", "3", "-k", "4", "-n", "6", "-np", "2", "-t", "1", "-s",
            "5", "-m",
        ])
        .arg(tiny("llama.gguf"))
        .arg("-o")
        .arg(&file)
        .assert()
        .success();
    assert_eq!(std::fs::read(&file).unwrap(), contents(&run)["generations.jsonl"]);

    let scored = detox().arg("score").arg(&file).assert().success().get_output().stdout.clone();
    let scored: Vec<serde_json::Value> =
        String::from_utf8(scored).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let expected = rows(&run.join("scores.jsonl"));
    assert_eq!(scored.len(), expected.len());
    for (a, b) in scored.iter().zip(&expected) {
        assert_eq!(a["toxicity"], b["toxicity"]);
        assert_eq!(a["prompt_id"], b["prompt_id"]);
    }

    let again = folder.path().join("again");
    detox()
        .args(["eval", "--generations"])
        .arg(&file)
        .arg("--tokenizer")
        .arg(tiny("tokenizer.json"))
        .arg("-o")
        .arg(&again)
        .assert()
        .success();
    let metric = |report: &std::path::Path, name: &str| -> serde_json::Value {
        let report: serde_json::Value = serde_json::from_slice(&contents(report)["report.json"]).unwrap();
        let metrics = report["mean"].as_array().unwrap().clone();
        metrics.into_iter().find(|m| m["name"] == name).unwrap()["estimate"].clone()
    };
    for name in [
        "lexical/expected_maximum_toxicity",
        "lexical/average_toxicity",
        "perplexity_median",
        "distinct_1",
        "repetition",
    ] {
        assert_eq!(metric(&run, name), metric(&again, name), "{name}");
    }
}

#[test]
fn log_probs_under_a_base_model_match_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tiny_llama.json");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let continuations = golden["continuations"].as_array().unwrap();
    let lines: Vec<String> = continuations
        .iter()
        .map(|c| {
            serde_json::json!({"prompt": c["prompt"], "generated_text": c["continuation"]}).to_string() + "\n"
        })
        .collect();
    let file = folder.path().join("en.jsonl");
    std::fs::write(&file, lines.concat()).unwrap();
    let run = folder.path().join("run");
    let mut command = detox();
    command.args(["eval", "-t", "1", "--generations"]).arg(&file).arg("--base").arg(tiny("llama.gguf"));
    command.arg("-o").arg(&run).assert().success();
    let scores = rows(&run.join("scores.jsonl"));
    assert_eq!(scores.len(), continuations.len());
    for (score, c) in scores.iter().zip(continuations) {
        let logps = c["logps"].as_array().unwrap();
        let expected: f64 = logps.iter().map(|l| l.as_f64().unwrap()).sum();
        assert_eq!(score["base_n_tokens"], logps.len(), "the text is split between prompt and continuation");
        // 0.02 per token for the F16 KV cache, as in the tests of the engine.
        let difference = score["base_logprob"].as_f64().unwrap() - expected;
        assert!(difference.abs() < 0.02 * logps.len() as f64, "{difference}");
    }
}

#[test]
fn prompts_of_a_file_keep_their_text_and_id() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("RTP_LX_DE.json");
    std::fs::write(&prompts, "{\"Prompt\": \"Der Hund\", \"Index\": \"7\", \"Locale\": \"DE\"}\n").unwrap();
    let output = detox()
        .args(["generate", "-k", "2", "-n", "3", "-t", "1", "-m"])
        .arg(tiny("gpt2.gguf"))
        .arg("--prompts")
        .arg(&prompts)
        .assert()
        .success()
        .get_output()
        .stdout
        .clone();
    let text = String::from_utf8(output).unwrap();
    let rows: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(rows.len(), 2);
    assert_eq!((&rows[1]["prompt_id"], &rows[1]["prompt"]), (&"de/7".into(), &"Der Hund".into()));
}
