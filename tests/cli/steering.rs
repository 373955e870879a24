//! From labelled text to a steered model, on a tiny model: probe, locate, steer, sweep, activations, retrieval.

use std::path::{Path, PathBuf};

use super::{contents, detox, differing, failure, small_eval, tiny};

/// A probe and what `locate` makes of it, in `folder`.
fn located(folder: &Path, model: &str) -> (PathBuf, PathBuf) {
    let (probe, neurons) = (folder.join("probe.gguf"), folder.join("neurons.json"));
    let output = detox()
        .args(["probe", "-t", "1", "--epochs", "2", "-m"])
        .arg(tiny(model))
        .arg("-o")
        .arg(&probe)
        .assert()
        .success();
    let said = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    assert!(said.contains("AUC") && said.contains("by always answering the same"), "{said}");
    let output = detox()
        .args(["locate", "-t", "1", "--top", "20", "-n", "4", "--limit", "3", "--min-activation", "-9", "-m"])
        .arg(tiny(model))
        .arg("--probe")
        .arg(&probe)
        .arg("-o")
        .arg(&neurons)
        .assert()
        .success();
    let table = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    assert_eq!(table.lines().filter(|line| line.contains("kept")).count(), 20, "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    (probe, neurons)
}

#[test]
fn the_way_from_text_to_a_steered_evaluation_is_five_commands() {
    let folder = tempfile::tempdir().unwrap();
    let (_, neurons) = located(folder.path(), "llama.gguf");
    assert!(folder.path().join("neurons.csv").exists());
    let intervention = folder.path().join("neurons.steer.json");
    let (plain, steered) = (folder.path().join("plain"), folder.path().join("steered"));
    small_eval(&plain).assert().success();
    let mut steer = intervention.clone().into_os_string();
    steer.push(":3");
    let output = small_eval(&steered).arg("--steer").arg(&steer).assert().success();
    let said = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(said.contains("steering: 20 neuron offsets"), "{said}");
    assert!(differing(&plain, &steered).contains(&"generations.jsonl".to_owned()));
    let record: serde_json::Value = serde_json::from_slice(&contents(&steered)["run.json"]).unwrap();
    assert_eq!(record["run"]["settings"]["steering"][0]["coefficient"], 3.0);
    assert!(record["run"]["steering"].as_str().unwrap().contains("neurons.steer.json"));
    // The judge of perplexity is the model as it was.
    assert!(record["run"]["perplexity_model"].as_str().unwrap().starts_with("llama.gguf"));
    assert!(record["run"]["settings"]["base"].is_string());

    // Another way to the same neurons, and what a control vector cannot hold.
    let has_layer_0 = std::fs::read_to_string(&neurons).unwrap().contains("\"layer\": 0");
    let vector = folder.path().join("steer.gguf");
    let mut command = detox();
    command.args(["steer", "--offset", "-3", "-t", "1", "-m"]).arg(tiny("llama.gguf"));
    command.arg("--neurons").arg(&neurons).arg("-o").arg(&vector);
    if has_layer_0 {
        let (code, said) = failure(&mut command);
        assert!(code == 2 && said.contains("--without-layer-0"), "{said}");
    }
    let output = command.args(["--without-layer-0", "--exact-check"]).assert().success();
    let table = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    assert!(table.contains("noise floor"), "{table}");
    let baked = folder.path().join("baked.gguf");
    let mut command = detox();
    command.args(["steer", "--offset", "-3", "--bake", "-m"]).arg(tiny("llama.gguf"));
    command.arg("--neurons").arg(&neurons).arg("-o").arg(&baked).assert().success();
    detox()
        .args(["generate", "-k", "1", "-n", "2", "--lang", "en", "-t", "1", "-m"])
        .arg(&baked)
        .assert()
        .success();
}

#[test]
fn a_sweep_resumes_and_writes_the_bytes_of_an_unbroken_one() {
    let folder = tempfile::tempdir().unwrap();
    let (_, neurons) = located(folder.path(), "gemma3.gguf");
    let sweep = |output: &Path| {
        let mut command = detox();
        command.args(["sweep", "--offsets", "0,-1,-4", "--lang", "en", "--limit", "3", "-k", "2", "-n", "4"]);
        command.args(["-np", "2", "-t", "1", "-m"]).arg(tiny("gemma3.gguf"));
        command.arg("--neurons").arg(&neurons).arg("-o").arg(output);
        command
    };
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    let output = sweep(&a).assert().success();
    let table = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    for row in ["baseline", "-1 ", "-1 r1", "-4 ", "-4 r1"] {
        assert!(table.lines().any(|line| line.trim_start().starts_with(row)), "{row}: {table}");
    }
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    // As if it had been killed after the second run.
    sweep(&b).assert().success();
    for name in ["chosen_-4", "control_0_-4"] {
        std::fs::remove_dir_all(b.join(name)).unwrap();
    }
    std::fs::remove_file(b.join("sweep.json")).unwrap();
    sweep(&b).assert().success();
    for name in ["sweep.json", "sweep.csv", "sweep.html", "sweep.md"] {
        assert_eq!(std::fs::read(a.join(name)).unwrap(), std::fs::read(b.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn activations_fall_when_neurons_are_assigned_less() {
    let folder = tempfile::tempdir().unwrap();
    let neurons = folder.path().join("neurons.json");
    std::fs::write(&neurons, "[[0, 3], [1, 5]]").unwrap();
    let intervention = folder.path().join("steer.json");
    let mut command = detox();
    command.args(["steer", "--assign", "-2", "-m"]).arg(tiny("gpt2.gguf"));
    command.arg("--neurons").arg(&neurons).arg("-o").arg(&intervention).assert().success();
    let output = folder.path().join("out");
    let mut command = detox();
    command.args(["activations", "--lang", "en,de", "--limit", "3", "-n", "4", "-t", "1", "-m"]);
    command.arg(tiny("gpt2.gguf")).arg("--neurons").arg(&neurons).arg("--steer").arg(&intervention);
    command.arg("-o").arg(&output).assert().success();
    let found: serde_json::Value = serde_json::from_slice(&contents(&output)["activations.json"]).unwrap();
    for language in found["languages"].as_array().unwrap() {
        // What is recorded is what the edit made of it: -2 of every neuron at every step.
        assert_eq!(language["b"]["value"], -2.0, "{language}");
        assert!(language["a"]["value"].as_f64().unwrap() > -2.0);
    }
}

#[test]
fn sentences_find_themselves_and_not_what_is_something_else() {
    let folder = tempfile::tempdir().unwrap();
    let aligned = folder.path().join("aligned");
    std::fs::create_dir(&aligned).unwrap();
    let sentences = ["The cat sleeps", "A house in the rain", "Bread and butter", "He sings loudly at night"];
    let lines = |order: &[usize]| {
        order.iter().map(|&i| format!("{{\"text\": {:?}, \"id\": {i}}}\n", sentences[i])).collect::<String>()
    };
    // The same sentences in another order: aligned by their numbers.
    std::fs::write(aligned.join("en.jsonl"), lines(&[0, 1, 2, 3])).unwrap();
    std::fs::write(aligned.join("de.jsonl"), lines(&[3, 1, 0, 2])).unwrap();
    let output = folder.path().join("out");
    let mut command = detox();
    command.args(["retrieval", "-t", "1", "-m"]).arg(tiny("bloom.gguf")).arg("--aligned").arg(&aligned);
    command.arg("-o").arg(&output).assert().success();
    let found: serde_json::Value = serde_json::from_slice(&contents(&output)["retrieval.json"]).unwrap();
    assert_eq!(found["languages"][0]["mean_accuracy"], 1.0);
    assert!(found["languages"][0]["mean_cosine"].as_f64().unwrap() > 0.999);
    assert_eq!(found["places"].as_array().unwrap().len(), 3);
}

#[test]
fn rejects_steering_of_another_kind_or_model_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let neurons = folder.path().join("neurons.json");
    std::fs::write(&neurons, "[[0, 3], [1, 5]]").unwrap();
    let of_llama = folder.path().join("llama.json");
    let mut command = detox();
    command.args(["steer", "--scale", "0", "-m"]).arg(tiny("llama.gguf"));
    command.arg("--neurons").arg(&neurons).arg("-o").arg(&of_llama).assert().success();
    let generate = |model: &str, flag: &str, file: &Path| {
        let mut command = detox();
        command.args(["generate", "-k", "1", "-n", "2", "--lang", "en", "-t", "1", "-m"]).arg(tiny(model));
        failure(command.arg(flag).arg(file)).1
    };
    for (model, flag, file, reason) in [
        ("gpt2.gguf", "--steer", of_llama.clone(), "architecture llama"),
        ("llama-q8_0.gguf", "--steer", of_llama.clone(), "--force"),
        ("llama.gguf", "--steer", neurons.clone(), "does not say what to do"),
        ("llama.gguf", "--control-vector", tiny("gpt2.gguf"), "gpt2"),
        ("llama.gguf", "--lora", tiny("gpt2.gguf"), "adapter"),
        ("llama.gguf", "--steer", folder.path().join("none.gguf"), "none.gguf"),
    ] {
        let said = generate(model, flag, &file);
        assert!(said.contains(reason), "{model} {flag}: {said}");
    }
    std::fs::write(&neurons, "[[0, 96]]").unwrap();
    let mut command = detox();
    command.args(["steer", "--offset", "1", "-m"]).arg(tiny("llama.gguf"));
    command.arg("--neurons").arg(&neurons).arg("-o").arg(folder.path().join("x.gguf"));
    assert!(failure(&mut command).1.contains("an index below 96 in layer 0"));
    let mut command = detox();
    command.args(["steer", "--offset", "1", "--bake", "-m"]).arg(tiny("command-r.gguf"));
    command.arg("--neurons").arg(&neurons).arg("-o").arg(folder.path().join("x.gguf"));
    let (_, said) = failure(&mut command);
    assert!(said.contains("reads no bias") && said.contains("hint: write a control vector"), "{said}");
}
