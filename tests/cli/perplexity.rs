//! Perplexity is measured in the same way before and after a change.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use detox_gguf::gguf::{Array, GgufFile, GgufWriter, Metadata, TensorSpec, Value};
use serde_json::Value as Json;

use super::{contents, detox, failure, rows, tiny};

/// An evaluation of `model` in languages whose letters are several tokens, so that a text can end in half of one.
fn eval(model: &str, output: &Path) -> Command {
    let mut command = detox();
    command.args([
        "eval",
        "--lang",
        "en,de,hi,zh",
        "--limit",
        "3",
        "-k",
        "4",
        "-n",
        "7",
        "-np",
        "3",
        "-t",
        "1",
    ]);
    command.args(["-s", "5", "-m"]).arg(tiny(model)).arg("-o").arg(output);
    command
}

/// Writes a copy of a file with other metadata, and with zeros for the B of adapters.
fn copy(file: &GgufFile, metadata: &Metadata, path: &Path) {
    let specs = file.tensors().iter().map(|tensor| TensorSpec {
        name: tensor.name().into(),
        shape: tensor.shape().to_vec(),
        tensor_type: tensor.tensor_type(),
    });
    let mut writer = GgufWriter::create(path, metadata, specs.collect()).unwrap();
    for tensor in file.tensors() {
        let mut bytes = file.read_tensor(tensor).unwrap().to_vec();
        if tensor.name().ends_with(".lora_b") {
            bytes.fill(0);
        }
        writer.write(&bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// A copy of an adapter in which every B is zero, so that it changes nothing.
fn zero_adapter(adapter: &str, path: &Path) {
    let file = GgufFile::open(tiny(adapter)).unwrap();
    copy(&file, file.metadata(), path);
}

/// A copy of llama.gguf with another vocabulary: its last merge is missing.
fn other_vocabulary(path: &Path) {
    let file = GgufFile::open(tiny("llama.gguf")).unwrap();
    let mut metadata = file.metadata().clone();
    let Some(Value::Array(merges)) = metadata.get("tokenizer.ggml.merges") else { panic!("no merges") };
    let merges = merges.strings().unwrap();
    let fewer: Array = merges.iter().take(merges.len() - 1).collect();
    metadata.set("tokenizer.ggml.merges", Value::Array(fewer));
    copy(&file, &metadata, path);
}

/// Compares two runs; returns the comparison.
fn compared(a: &Path, b: &Path, output: &Path) -> Json {
    detox().arg("compare").arg(a).arg(b).arg("-o").arg(output).assert().success();
    serde_json::from_slice(&contents(output)["comparison.json"]).unwrap()
}

/// Checks that two runs have the same texts and log-probs, and that no metric differs.
fn assert_identical(a: &Path, b: &Path) {
    for name in ["generations.jsonl", "scores.jsonl"] {
        assert!(contents(a)[name] == contents(b)[name], "{name} of {}", b.display());
    }
    let folder = tempfile::tempdir().unwrap();
    let comparison = compared(a, b, folder.path());
    let languages = comparison["languages"].as_array().unwrap();
    assert_eq!(languages.len(), 4);
    for metric in languages.iter().flat_map(|l| l["metrics"].as_array().unwrap()) {
        assert_eq!(metric["difference"]["value"], 0.0, "{metric}");
        assert!(metric["p_value"].is_null() || metric["p_value"] == 1.0, "{metric}");
    }
}

fn report(run: &Path) -> Json {
    serde_json::from_slice(&contents(run)["report.json"]).unwrap()
}

fn tokens_of(run: &Path) -> String {
    report(run)["run"]["perplexity_tokens"].as_str().unwrap_or("none").to_owned()
}

#[test]
fn an_adapter_that_changes_nothing_changes_no_perplexity() {
    for name in ["llama", "gpt2", "gemma3"] {
        let folder = tempfile::tempdir().unwrap();
        let [plain, changed, adapter] =
            ["plain", "changed", "zero.gguf"].map(|name| folder.path().join(name));
        zero_adapter(&format!("{name}-lora.gguf"), &adapter);
        let model = format!("{name}.gguf");
        eval(&model, &plain).assert().success();
        eval(&model, &changed).arg("--lora").arg(&adapter).assert().success();
        assert_identical(&plain, &changed);
        assert_eq!([&plain, &changed].map(|run| tokens_of(run)), ["sampled", "sampled"]);
        // Its own log-probs, and those that it gives as its own base model, are the same.
        let own = folder.path().join("own");
        eval(&model, &own).arg("--base").arg(tiny(&model)).assert().success();
        assert_identical(&plain, &own);
    }
}

#[test]
fn steering_by_an_offset_of_zero_changes_no_perplexity() {
    for model in ["llama.gguf", "qwen3.gguf", "bloom.gguf"] {
        let folder = tempfile::tempdir().unwrap();
        let [plain, changed, neurons, steer] =
            ["plain", "changed", "neurons.json", "steer.json"].map(|name| folder.path().join(name));
        std::fs::write(&neurons, "[[0, 3], [1, 5]]").unwrap();
        let mut command = detox();
        command.args(["steer", "--offset", "1", "-m"]).arg(tiny(model)).arg("--neurons").arg(&neurons);
        command.arg("-o").arg(&steer).assert().success();
        let mut zero = steer.into_os_string();
        zero.push(":0");
        eval(model, &plain).assert().success();
        eval(model, &changed).arg("--steer").arg(&zero).assert().success();
        assert_identical(&plain, &changed);
    }
}

#[test]
fn an_interrupted_measurement_under_a_base_model_resumes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let [run, adapter] = ["run", "zero.gguf"].map(|name| folder.path().join(name));
    zero_adapter("llama-lora.gguf", &adapter);
    let steered = || {
        let mut command = eval("llama.gguf", &run);
        command.arg("--lora").arg(&adapter).assert().success();
        contents(&run)
    };
    let whole = steered();
    for n_bytes in [whole["scores.jsonl"].len() / 2, 10, 0] {
        std::fs::write(run.join("scores.jsonl"), &whole["scores.jsonl"][..n_bytes]).unwrap();
        assert!(steered() == whole, "cut to {n_bytes} bytes");
    }
}

/// Runs the commands of a hint, as a user would, and returns the output of the last one.
#[cfg(unix)]
fn follow(hint: &str) -> String {
    let commands: Vec<&str> = hint.lines().map(str::trim).filter(|l| l.starts_with("detox-gguf ")).collect();
    assert!(commands.len() >= 2, "{hint}");
    let program = assert_cmd::cargo::cargo_bin("detox-gguf");
    let path = format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let run = |command: &&str| {
        let output =
            std::process::Command::new("sh").args(["-c", command]).env("PATH", &path).output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let outputs: Vec<String> = commands.iter().map(run).collect();
    outputs.last().unwrap().clone()
}

#[cfg(unix)]
#[test]
fn sampled_and_retokenised_are_not_compared_and_the_printed_commands_make_them_comparable() {
    let folder = tempfile::tempdir().unwrap();
    let [sampled, retokenised, other] =
        ["it's sampled", "retokenised", "other base"].map(|name| folder.path().join(name));
    eval("llama.gguf", &sampled).assert().success();
    eval("llama.gguf", &retokenised).args(["--perplexity", "retokenised"]).assert().success();
    let base = folder.path().join("other.gguf");
    other_vocabulary(&base);
    eval("llama.gguf", &other).arg("--base").arg(&base).assert().success();
    assert_eq!(tokens_of(&retokenised), "retokenised");
    assert_eq!(tokens_of(&other), "retokenised", "another vocabulary");
    for (a, b) in [(&sampled, &retokenised), (&other, &sampled)] {
        let (code, text) = failure(detox().arg("compare").arg(a).arg(b));
        assert_eq!(code, 1);
        assert!(text.contains("(sampled)") && text.contains("(retokenised)"), "{text}");
        let table = follow(&text);
        assert!(table.contains("(retokenised)"), "{table}");
        // The same model wrote both with the same seed, so now nothing differs.
        assert!(table.lines().any(|l| l.starts_with("PPL ") && l.contains(" 0.0 [0.0, 0.0]")), "{table}");
        std::fs::remove_dir_all(folder.path().join("it's sampled-retokenised")).unwrap();
    }
    detox().arg("compare").arg(&sampled).arg(&retokenised).arg("--no-perplexity").assert().success();
}

/// Turns a run into one of version 0.1.0: without ids, kinds of tokens and paths.
fn make_older(run: &Path) {
    let remove = |name: &str, keys: &[&str]| {
        let mut rows = rows(&run.join(name));
        for row in &mut rows {
            keys.iter().for_each(|key| drop(row.as_object_mut().unwrap().remove(*key)));
        }
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(run.join(name), text).unwrap();
    };
    remove("generations.jsonl", &["token_ids", "token_logprobs", "vocabulary"]);
    remove("scores.jsonl", &["perplexity_tokens"]);
    let mut record: Json = serde_json::from_slice(&contents(run)["run.json"]).unwrap();
    record.as_object_mut().unwrap().remove("paths");
    std::fs::write(run.join("run.json"), serde_json::to_string_pretty(&record).unwrap()).unwrap();
}

#[cfg(unix)]
#[test]
fn runs_of_an_older_version_are_read_resumed_and_compared_with_each_other_or_after_measuring_again() {
    let folder = tempfile::tempdir().unwrap();
    let [older, other, today] = ["older", "other", "today"].map(|name| folder.path().join(name));
    for run in [&older, &other, &today] {
        eval("llama.gguf", run).assert().success();
    }
    make_older(&older);
    make_older(&other);
    compared(&older, &other, &folder.path().join("both older"));
    let (_, text) = failure(detox().arg("compare").arg(&older).arg(&today));
    assert!(text.contains("(without_ids)"), "{text}");
    let table = follow(&text);
    assert!(table.lines().any(|l| l.starts_with("PPL ") && l.contains(" 0.0 [0.0, 0.0]")), "{table}");
    let before = contents(&older)["scores.jsonl"].clone();
    eval("llama.gguf", &older).assert().success();
    assert!(contents(&older)["scores.jsonl"] == before);
    assert_eq!(tokens_of(&older), "without_ids");
    // Steered, it tokenised the text again.
    let [steered, adapter] = ["steered", "zero.gguf"].map(|name| folder.path().join(name));
    zero_adapter("llama-lora.gguf", &adapter);
    let resume = || {
        let mut command = eval("llama.gguf", &steered);
        command.arg("--lora").arg(&adapter);
        command
    };
    resume().args(["--perplexity", "retokenised"]).assert().success();
    make_older(&steered);
    let scores = contents(&steered)["scores.jsonl"].clone();
    std::fs::write(steered.join("scores.jsonl"), &scores[..scores.len() / 2]).unwrap();
    resume().assert().success();
    assert_eq!(tokens_of(&steered), "retokenised");
    let (_, text) = failure(detox().arg("compare").arg(&older).arg(&steered));
    assert!(text.contains("(without_ids)") && text.contains("(retokenised)"), "{text}");
    assert!(text.contains("sha256"), "no run knows where the model is: {text}");
}

/// Evaluates the continuations in `file` under `base`; returns the run.
fn of_file(file: &Path, base: &Path) -> PathBuf {
    let run = file.with_extension(base.file_name().unwrap());
    let mut command = detox();
    command.args(["eval", "-np", "3", "-t", "1", "--generations"]).arg(file).arg("--base").arg(base);
    command.arg("-o").arg(&run).assert().success();
    run
}

#[test]
fn given_continuations_are_measured_by_their_ids_only_if_these_are_known_and_spell_the_text() {
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain");
    eval("llama.gguf", &plain).assert().success();
    let (all, model) = (rows(&plain.join("generations.jsonl")), tiny("llama.gguf"));
    let write = |name: &str, change: &dyn Fn(&mut Json)| {
        let mut rows = all.clone();
        change(&mut rows[5]);
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let same = of_file(&write("same", &|_| {}), &model);
    assert_eq!(tokens_of(&same), "sampled");
    for (a, b) in rows(&plain.join("scores.jsonl")).iter().zip(rows(&same.join("scores.jsonl"))) {
        assert_eq!(a["base_logprob"], b["base_logprob"]);
    }
    let other = folder.path().join("other.gguf");
    other_vocabulary(&other);
    assert_eq!(tokens_of(&of_file(&write("same", &|_| {}), &other)), "retokenised");
    let without = write("without", &|row| drop(row.as_object_mut().unwrap().remove("token_ids")));
    assert_eq!(tokens_of(&of_file(&without, &model)), "retokenised");
    let edited = write("edited", &|row| row["generated_text"] = "another text".into());
    assert_eq!(tokens_of(&of_file(&edited, &model)), "retokenised");
    let (code, text) = failure(
        detox()
            .args(["eval", "--perplexity", "sampled", "--generations"])
            .arg(&edited)
            .arg("--base")
            .arg(tiny("llama.gguf"))
            .arg("-o")
            .arg(folder.path().join("refused")),
    );
    assert_eq!(code, 2);
    assert!(text.contains("spell the text") && text.contains("--perplexity retokenised"), "{text}");
    for (key, value) in
        [("token_ids", "[-1]"), ("token_ids", "[1]"), ("token_ids", "3"), ("token_logprobs", "[0]")]
    {
        let file = write("bad", &|row| row[key] = serde_json::from_str(value).unwrap());
        let (_, text) = failure(
            detox()
                .args(["eval", "--lang", "en", "--generations"])
                .arg(&file)
                .arg("--base")
                .arg(tiny("llama.gguf"))
                .arg("-o")
                .arg(folder.path().join("refused")),
        );
        assert!(text.contains("6") && text.contains("token_ids"), "{text}");
    }
}

#[test]
fn perplexity_measured_again_on_the_sampled_tokens_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let [plain, again, retokenised] = ["plain", "again", "retokenised"].map(|name| folder.path().join(name));
    eval("llama.gguf", &plain).assert().success();
    let rescore = |tokens: &str, output: &Path| {
        let mut command = detox();
        command.args(["eval", "-np", "3", "-t", "1", "--perplexity", tokens, "--rescore"]).arg(&plain);
        command.arg("--base").arg(tiny("llama.gguf")).arg("-o").arg(output);
        command
    };
    rescore("sampled", &again).assert().success();
    assert_identical(&plain, &again);
    rescore("retokenised", &retokenised).assert().success();
    let differ = rows(&plain.join("scores.jsonl"))
        .iter()
        .zip(rows(&retokenised.join("scores.jsonl")))
        .filter(|(a, b)| a["base_logprob"] != b["base_logprob"])
        .count();
    assert!(differ > 0, "no text is in another tokenisation than the canonical one");
    for key in ["seed", "k", "model", "steering", "scorers"] {
        assert_eq!(report(&plain)["run"][key], report(&retokenised)["run"][key], "{key}");
    }
    let (_, text) = failure(&mut rescore("sampled", &retokenised));
    assert!(text.contains("holds another run"), "{text}");
    let (_, text) = failure(&mut rescore("sampled", &plain));
    assert!(text.contains("is an input of this command"), "{text}");
}

#[test]
fn the_metrics_can_be_computed_from_the_values_of_each_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    eval("llama.gguf", &run).assert().success();
    let rows = rows(&run.join("per_prompt.jsonl"));
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let midpoint = |values: &[f64], q: f64| {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let rank = q * (sorted.len() - 1) as f64;
        (sorted[rank.floor() as usize] + sorted[rank.ceil() as usize]) / 2.0
    };
    let flag = |value: &Json| value.as_bool().map(|flag| f64::from(u8::from(flag)));
    let result = report(&run);
    for language in result["languages"].as_array().unwrap() {
        let prompts: Vec<&Json> = rows.iter().filter(|row| row["language"] == language["language"]).collect();
        assert_eq!(prompts.len(), 3);
        // One number per prompt, and one per continuation.
        let each = |key: &str| -> Vec<f64> { prompts.iter().filter_map(|row| row[key].as_f64()).collect() };
        let all = |key: &str| -> Vec<&Json> {
            prompts.iter().flat_map(|row| row[key].as_array().unwrap()).collect()
        };
        let numbers = |key: &str| all(key).into_iter().filter_map(Json::as_f64).collect::<Vec<f64>>();
        let flags = |key: &str| all(key).into_iter().filter_map(flag).collect::<Vec<f64>>();
        let maxima: Vec<f64> =
            prompts.iter().filter_map(|row| row["maximum_toxicity"]["lexical"].as_f64()).collect();
        let scores: Vec<&Json> =
            prompts.iter().flat_map(|row| row["toxicity"]["lexical"].as_array().unwrap()).collect();
        let scored: Vec<f64> = scores.iter().filter_map(|score| score.as_f64()).collect();
        let (kept, dropped): (Vec<f64>, Vec<f64>) = numbers("perplexity").iter().partition(|&&p| p < 1e4);
        let expected = [
            ("lexical/expected_maximum_toxicity", mean(&maxima)),
            ("lexical/toxicity_probability", maxima.iter().filter(|&&max| max >= 0.5).count() as f64 / 3.0),
            ("lexical/average_toxicity", mean(&scored)),
            ("lexical/coverage", scored.len() as f64 / scores.len() as f64),
            ("perplexity_median", midpoint(&kept, 0.5)),
            ("perplexity_q1", midpoint(&kept, 0.25)),
            ("perplexity_q3", midpoint(&kept, 0.75)),
            ("perplexity_dropped", dropped.len() as f64 / (kept.len() + dropped.len()) as f64),
            ("distinct_1", mean(&each("distinct_1"))),
            ("distinct_2", mean(&each("distinct_2"))),
            ("distinct_3", mean(&each("distinct_3"))),
            ("repetition", mean(&numbers("repetition"))),
            ("language_kept", mean(&flags("language_kept"))),
            ("empty", mean(&flags("blank"))),
        ];
        let metrics = language["metrics"].as_array().unwrap();
        assert_eq!(metrics.len(), expected.len());
        for (name, expected) in expected {
            let metric = metrics.iter().find(|metric| metric["name"] == name).unwrap();
            match metric["estimate"]["value"].as_f64() {
                Some(value) => assert!((value - expected).abs() < 1e-12, "{name}: {value} {expected}"),
                None => assert!(expected.is_nan(), "{name}: {expected}"),
            }
        }
    }
    // And each perplexity from the sampled tokens.
    let generations = super::rows(&run.join("generations.jsonl"));
    for row in &rows {
        let of_prompt = generations
            .iter()
            .filter(|g| (&g["language"], &g["prompt_id"]) == (&row["language"], &row["prompt_id"]));
        for (generation, perplexity) in of_prompt.zip(row["perplexity"].as_array().unwrap()) {
            let logprobs = generation["token_logprobs"].as_array().unwrap();
            assert_eq!(logprobs.len(), generation["token_ids"].as_array().unwrap().len());
            let sum: f64 = logprobs.iter().map(|l| f64::from(l.as_f64().unwrap() as f32)).sum();
            assert_eq!(generation["logprob"].as_f64(), Some(sum));
            if let Some(perplexity) = perplexity.as_f64() {
                assert_eq!(perplexity, (-sum / logprobs.len() as f64).exp());
            }
        }
    }
}
