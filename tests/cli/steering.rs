//! From labelled text to a steered model, on a tiny model: probe, locate, steer, sweep, activations, retrieval.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{contents, detox, differing, failure, small_eval, tiny};

/// Runs `probe` and `locate` in `folder`, and returns the paths of the probe and the neuron file.
fn located(folder: &Path, model: &str) -> (PathBuf, PathBuf) {
    let (probe, neurons) = (folder.join("probe.gguf"), folder.join("neurons.json"));
    let output = detox()
        .args(["probe", "-t", "1", "--epochs", "2", "-m"])
        .arg(tiny(model))
        .arg("-o")
        .arg(&probe)
        .assert()
        .success();
    let stdout = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    assert!(
        stdout.contains("AUC") && stdout.contains("by always guessing the more frequent label"),
        "{stdout}"
    );
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
fn five_commands_lead_from_text_to_a_steered_evaluation() {
    let folder = tempfile::tempdir().unwrap();
    let (_, neurons) = located(folder.path(), "llama.gguf");
    assert!(folder.path().join("neurons.csv").exists());
    let intervention = folder.path().join("neurons.steer.json");
    let (plain, steered) = (folder.path().join("plain"), folder.path().join("steered"));
    small_eval(&plain).assert().success();
    let mut steer = intervention.clone().into_os_string();
    steer.push(":3");
    let output = small_eval(&steered).arg("--steer").arg(&steer).assert().success();
    let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(stderr.contains("steering: 20 neuron offsets"), "{stderr}");
    assert!(differing(&plain, &steered).contains(&"generations.jsonl".to_owned()));
    let record: serde_json::Value = serde_json::from_slice(&contents(&steered)["run.json"]).unwrap();
    assert_eq!(record["run"]["settings"]["steering"][0]["coefficient"], 3.0);
    assert!(record["run"]["steering"].as_str().unwrap().contains("neurons.steer.json"));
    // Perplexity is measured under the unsteered model.
    assert!(record["run"]["perplexity_model"].as_str().unwrap().starts_with("llama.gguf"));
    assert!(record["run"]["settings"]["base"].is_string());

    // The same neurons as a control vector, which cannot hold layer 0.
    let has_layer_0 = std::fs::read_to_string(&neurons).unwrap().contains("\"layer\": 0");
    let vector = folder.path().join("steer.gguf");
    let mut command = detox();
    command.args(["steer", "--offset", "-3", "-t", "1", "-m"]).arg(tiny("llama.gguf"));
    command.arg("--neurons").arg(&neurons).arg("-o").arg(&vector);
    if has_layer_0 {
        let (code, stderr) = failure(&mut command);
        assert!(code == 2 && stderr.contains("--without-layer-0"), "{stderr}");
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
fn a_sweep_resumes_and_writes_the_same_bytes_as_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let (_, neurons) = located(folder.path(), "gemma3.gguf");
    let sweep = |output: &Path| {
        let mut command = detox();
        command.args(["sweep", "--offsets", "-1,-4,0", "--lang", "en", "--limit", "3", "-k", "2", "-n", "4"]);
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
    // Simulate a kill after the second run.
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
fn activations_of_a_steered_model_do_not_depend_on_the_way_it_is_steered() {
    let folder = tempfile::tempdir().unwrap();
    let neurons = folder.path().join("neurons.json");
    std::fs::write(&neurons, "[[0, 3], [1, 5]]").unwrap();
    // The callback edits layer 0 and a control vector layer 1. In the baked model both are biases.
    let (intervention, baked) = (folder.path().join("steer.json"), folder.path().join("baked.gguf"));
    for (file, flags) in [(&intervention, &[][..]), (&baked, &["--bake"][..])] {
        let mut command = detox();
        command.args(["steer", "--offset", "-2", "-m"]).arg(tiny("gpt2.gguf")).args(flags);
        command.arg("--neurons").arg(&neurons).arg("-o").arg(file).assert().success();
    }
    let measure = |flag: &str, file: &Path| -> serde_json::Value {
        let output = folder.path().join(flag.trim_start_matches('-'));
        let mut command = detox();
        command.args(["activations", "--lang", "en,de", "--limit", "3", "-n", "4", "-t", "1", "-m"]);
        command.arg(tiny("gpt2.gguf")).arg("--neurons").arg(&neurons).arg(flag).arg(file);
        command.arg("-o").arg(&output).assert().success();
        let page = String::from_utf8(contents(&output)["activations.html"].clone()).unwrap();
        assert!(page.contains("Measured before edits of the neurons themselves."));
        serde_json::from_slice(&contents(&output)["activations.json"]).unwrap()
    };
    let (steered, other) = (measure("--steer", &intervention), measure("--model-b", &baked));
    assert_eq!(steered["measured"], "before_edits");
    let languages = |found: &serde_json::Value| found["languages"].as_array().unwrap().clone();
    for (steered, other) in languages(&steered).iter().zip(languages(&other)) {
        let value = |of: &serde_json::Value| of["b"]["value"].as_f64().unwrap();
        assert!((value(steered) - value(&other)).abs() < 5e-3, "{steered} {other}");
        assert_ne!(value(steered), steered["a"]["value"].as_f64().unwrap());
    }
}

#[test]
fn identical_sentences_retrieve_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let aligned = folder.path().join("aligned");
    std::fs::create_dir(&aligned).unwrap();
    let sentences = ["The cat sleeps", "A house in the rain", "Bread and butter", "He sings loudly at night"];
    let lines = |order: &[usize]| {
        order.iter().map(|&i| format!("{{\"text\": {:?}, \"id\": {i}}}\n", sentences[i])).collect::<String>()
    };
    // The same sentences in another order; they are aligned by id.
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
fn rejects_steering_files_of_another_kind_or_model_with_a_hint() {
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
        ("llama.gguf", "--steer", neurons.clone(), "does not say how to change them"),
        ("llama.gguf", "--control-vector", tiny("gpt2.gguf"), "gpt2"),
        ("llama.gguf", "--lora", tiny("gpt2.gguf"), "adapter"),
        ("llama.gguf", "--steer", folder.path().join("none.gguf"), "none.gguf"),
    ] {
        let stderr = generate(model, flag, &file);
        assert!(stderr.contains(reason), "{model} {flag}: {stderr}");
    }
    std::fs::write(&neurons, "[[0, 96]]").unwrap();
    let mut command = detox();
    command.args(["steer", "--offset", "1", "-m"]).arg(tiny("llama.gguf"));
    command.arg("--neurons").arg(&neurons).arg("-o").arg(folder.path().join("x.gguf"));
    assert!(failure(&mut command).1.contains("an index below 96 in layer 0"));
    let mut command = detox();
    command.args(["steer", "--offset", "1", "--bake", "-m"]).arg(tiny("command-r.gguf"));
    command.arg("--neurons").arg(&neurons).arg("-o").arg(folder.path().join("x.gguf"));
    let (_, stderr) = failure(&mut command);
    assert!(stderr.contains("reads no bias") && stderr.contains("hint: write a control vector"), "{stderr}");
}

#[test]
fn rejects_an_output_that_is_also_an_input_and_leaves_it_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let (model, neurons) = (folder.path().join("model.gguf"), folder.path().join("neurons.json"));
    std::fs::copy(tiny("llama.gguf"), &model).unwrap();
    std::fs::write(&neurons, "[[1, 3]]").unwrap();
    let before = contents(folder.path());
    let flag = |flag: &str, path: &Path| vec![flag.into(), path.as_os_str().to_owned()];
    let steer =
        [vec!["steer".into()], flag("--neurons", &neurons), flag("--offset", Path::new("-3"))].concat();
    for (arguments, output) in [
        (steer.clone(), &model),
        (steer, &neurons),
        (vec!["steer".into(), "--contrast".into()], &model),
        (vec!["probe".into()], &model),
        (vec!["generate".into()], &model),
        ([vec!["locate".into()], flag("--probe", &neurons)].concat(), &model),
        ([vec!["locate".into()], flag("--probe", &neurons)].concat(), &neurons),
    ] {
        let mut command = detox();
        let (code, stderr) = failure(command.args(&arguments).arg("-m").arg(&model).arg("-o").arg(output));
        assert!(code == 2 && stderr.contains("would be overwritten"), "{arguments:?}: {stderr}");
        assert_eq!(contents(folder.path()), before, "{arguments:?}");
    }
}

#[test]
fn rejects_flags_without_effect_and_errors_that_would_come_late() {
    let folder = tempfile::tempdir().unwrap();
    let (probe, neurons) = located(folder.path(), "llama.gguf");
    let [probe, neurons] = [&probe, &neurons].map(|path| path.to_str().unwrap());
    let lora = tiny("llama-lora.gguf");
    let lora = lora.to_str().unwrap();
    let out = folder.path().join("out");
    let [json, csv, missing] = ["x.json", "x.csv", "none/x.gguf"].map(|name| out.join(name));
    let [json, csv, missing] = [&json, &csv, &missing].map(|path| path.to_str().unwrap());
    for (reason, arguments) in [
        (
            "--contrast",
            &["steer", "--neurons", neurons, "--offset", "1", "--layers", "1", "1", "-o", json][..],
        ),
        ("--neurons", &["steer", "--contrast", "--without-layer-0", "-o", json]),
        (
            "cannot hold a LoRA adapter",
            &["steer", "--neurons", neurons, "--offset", "1", "--lora", lora, "-o", json],
        ),
        ("--scale: expected a finite", &["steer", "--neurons", neurons, "--scale", "nan", "-o", json]),
        ("nothing would change", &["steer", "--neurons", neurons, "--offset", "0", "--bake", "-o", json]),
        ("not both", &["sweep", "--neurons", neurons, "--control-vector-layer-range", "1", "1", "-o", json]),
        ("--offsets: expected finite", &["sweep", "--neurons", neurons, "--offsets", "-1,nan", "-o", json]),
        ("a control vector to limit", &["eval", "--control-vector-layer-range", "1", "1", "-o", json]),
        (
            "cannot be used with",
            &["locate", "--probe", probe, "--no-activations", "--lora", lora, "-o", json],
        ),
        ("a name for JSON", &["locate", "--probe", probe, "-o", csv]),
        ("--offset: expected a finite", &["locate", "--probe", probe, "--offset", "nan", "-o", json]),
        ("--train-batch", &["probe", "--train-batch", "0", "-o", json]),
        ("--limit", &["probe", "--limit", "3", "-o", json]),
        ("no folder", &["probe", "-o", missing]),
    ] {
        std::fs::create_dir_all(&out).unwrap();
        let (code, stderr) = failure(detox().args(arguments).arg("-m").arg(tiny("llama.gguf")));
        assert!(code == 2 && stderr.contains(reason), "{arguments:?}: {stderr}");
        assert!(
            !stderr.contains("texts:") && !stderr.contains("prompts:"),
            "{arguments:?} ran first: {stderr}"
        );
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0, "{arguments:?}");
    }
}

#[test]
fn a_sweep_of_coefficients_detects_a_changed_file_and_its_baseline_has_the_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let vector = folder.path().join("steer.gguf");
    let make = |method: &str| {
        let mut command = detox();
        command.args(["steer", "--contrast", "--method", method, "-t", "1", "-m"]).arg(tiny("llama.gguf"));
        command.arg("-o").arg(&vector).assert().success();
    };
    make("mean");
    let output = folder.path().join("sweep");
    let sweep = || {
        let mut command = detox();
        command.args([
            "sweep",
            "--coefficients",
            "-1,-2",
            "--lang",
            "en",
            "--limit",
            "2",
            "-k",
            "2",
            "-n",
            "4",
        ]);
        command.args(["-np", "2", "-t", "1", "-m"]).arg(tiny("llama.gguf")).arg("--steer").arg(&vector);
        command.arg("--lora").arg(tiny("llama-lora.gguf")).arg("-o").arg(&output);
        command
    };
    let stderr = sweep().assert().success().get_output().stderr.clone();
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(stderr.contains("steering: 2 directions of steer.gguf: as a control vector"), "{stderr}");
    // The baseline is the adapted model. It has the same bytes as `eval` with the adapter alone.
    let alone = folder.path().join("alone");
    let mut command = detox();
    command.args(["eval", "--lang", "en", "--limit", "2", "-k", "2", "-n", "4", "-np", "2", "-t", "1", "-m"]);
    command.arg(tiny("llama.gguf")).arg("--lora").arg(tiny("llama-lora.gguf"));
    command.arg("-o").arg(&alone).assert().success();
    let baseline = contents(&output.join("baseline"));
    assert_eq!(baseline["generations.jsonl"], contents(&alone)["generations.jsonl"]);
    for run in ["chosen_-1", "control_0_-1"] {
        assert_ne!(baseline["generations.jsonl"], contents(&output.join(run))["generations.jsonl"], "{run}");
    }
    sweep().assert().success();
    make("pca");
    let (code, stderr) = failure(&mut sweep());
    assert!(code == 1 && stderr.contains("holds another run"), "{stderr}");
}

/// Expected maximum toxicity by language, from the report of a run folder.
fn emt_by_language(run: &Path) -> BTreeMap<String, f64> {
    let report: serde_json::Value = serde_json::from_slice(&contents(run)["report.json"]).unwrap();
    let emt = |l: &serde_json::Value| {
        let metrics = l["metrics"].as_array().unwrap();
        let emt = metrics.iter().find(|m| m["name"] == "lexical/expected_maximum_toxicity").unwrap();
        (l["language"].as_str().unwrap().to_owned(), emt["estimate"]["value"].as_f64().unwrap())
    };
    report["languages"].as_array().unwrap().iter().map(emt).collect()
}

#[test]
fn retrieval_is_correlated_with_the_fall_of_toxicity_between_two_runs() {
    let folder = tempfile::tempdir().unwrap();
    let aligned = folder.path().join("aligned");
    std::fs::create_dir(&aligned).unwrap();
    let languages = ["en", "de", "fr", "es", "it"];
    for (i, language) in languages.iter().enumerate() {
        // Each language is longer than the one before, and so less similar to English.
        let row = |n: usize| format!("{{\"text\": \"sentence {n} {}\"}}\n", "la ".repeat(i * n));
        std::fs::write(aligned.join(format!("{language}.jsonl")), (1..7).map(row).collect::<String>())
            .unwrap();
    }
    let neurons = folder.path().join("neurons.json");
    std::fs::write(&neurons, "[[0, 3], [1, 5]]").unwrap();
    let intervention = folder.path().join("steer.json");
    let mut command = detox();
    command.args(["steer", "--assign", "9", "-m"]).arg(tiny("llama.gguf"));
    command.arg("--neurons").arg(&neurons).arg("-o").arg(&intervention).assert().success();
    let eval = |output: &Path, more: &[&std::ffi::OsStr]| {
        let mut command = detox();
        command.args(["eval", "--lang", &languages.join(","), "--limit", "3", "-k", "4", "-n", "6"]);
        command.args(["-np", "2", "-t", "1", "-m"]).arg(tiny("llama.gguf")).arg("-o").arg(output);
        command.args(more).assert().success();
        emt_by_language(output)
    };
    let (before, after) = (folder.path().join("before"), folder.path().join("after"));
    let emt_before = eval(&before, &[]);
    let emt_after = eval(&after, &["--steer".as_ref(), intervention.as_os_str()]);

    let output = folder.path().join("out");
    let mut command = detox();
    command.args(["retrieval", "-t", "1", "-m"]).arg(tiny("llama.gguf")).arg("--aligned").arg(&aligned);
    command.arg("--before").arg(&before).arg("--after").arg(&after).arg("-o").arg(&output);
    let output_of = command.assert().success();
    let table = String::from_utf8(output_of.get_output().stdout.clone()).unwrap();
    assert!(table.contains("Pearson r =") && table.lines().all(|line| line.chars().count() <= 80), "{table}");
    let found: serde_json::Value = serde_json::from_slice(&contents(&output)["retrieval.json"]).unwrap();
    let rows = found["languages"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    let column = |name: &str| rows.iter().map(|l| l[name].as_f64().unwrap()).collect::<Vec<f64>>();
    for (row, fall) in rows.iter().zip(column("toxicity_fall")) {
        let language = row["language"].as_str().unwrap();
        assert!((fall - (1.0 - emt_after[language] / emt_before[language])).abs() < 1e-9, "{language}");
        // The means are over both directions and all places.
        let places = row["places"].as_array().unwrap();
        let mean = |name: &str| places.iter().map(|p| p[name].as_f64().unwrap()).sum::<f64>() / 4.0;
        let both = (mean("forward_accuracy") + mean("backward_accuracy")) / 2.0;
        assert!(places.len() == 4 && (row["mean_accuracy"].as_f64().unwrap() - both).abs() < 1e-9);
        assert!((row["mean_cosine"].as_f64().unwrap() - mean("mean_cosine")).abs() < 1e-9);
    }
    // Compute r from its definition.
    let centred = |values: Vec<f64>| {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        values.into_iter().map(|v| v - mean).collect::<Vec<f64>>()
    };
    let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for (i, (of, name)) in
        [("top-1 accuracy", "mean_accuracy"), ("mean cosine", "mean_cosine")].iter().enumerate()
    {
        let (x, y) = (centred(column(name)), centred(column("toxicity_fall")));
        let r = sum(&x, &y) / (sum(&x, &x) * sum(&y, &y)).sqrt();
        let correlation = &found["correlations"][i];
        assert_eq!(&correlation["of"], of);
        assert!((correlation["correlation"]["r"].as_f64().unwrap() - r).abs() < 1e-9, "{correlation}");
        assert_eq!(correlation["correlation"]["n"], 4);
    }
}

#[test]
fn activations_compare_a_model_with_an_adapter_or_with_another_model() {
    let folder = tempfile::tempdir().unwrap();
    let neurons = folder.path().join("neurons.json");
    std::fs::write(&neurons, "[[0, 3], [1, 5]]").unwrap();
    let measure = |name: &str, flag: &str, file: PathBuf| -> serde_json::Value {
        let output = folder.path().join(name);
        let mut command = detox();
        command.args(["activations", "--lang", "en,de", "--limit", "3", "-n", "4", "-t", "1", "-m"]);
        command.arg(tiny("llama.gguf")).arg("--neurons").arg(&neurons).arg(flag).arg(file);
        command.arg("-o").arg(&output).assert().success();
        assert!(String::from_utf8(contents(&output)["activations.html"].clone()).unwrap().contains("<svg"));
        serde_json::from_slice(&contents(&output)["activations.json"]).unwrap()
    };
    let adapted = measure("lora", "--lora", tiny("llama-lora.gguf"));
    let other = measure("other", "--model-b", tiny("llama-q8_0.gguf"));
    let same = measure("same", "--model-b", tiny("llama.gguf"));
    let languages = |found: &serde_json::Value| found["languages"].as_array().unwrap().clone();
    for (found, differs) in [(&adapted, true), (&other, true), (&same, false)] {
        for (language, reference) in languages(found).iter().zip(languages(&same)) {
            let value = |of: &str| language[of]["value"].as_f64().unwrap();
            assert_eq!(language["a"], reference["a"]);
            assert!((value("difference") - (value("b") - value("a"))).abs() < 1e-9, "{language}");
            assert_eq!(value("difference") != 0.0, differs, "{language}");
        }
    }
}
