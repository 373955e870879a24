//! `steer` with directions from text and from probes, and with files to combine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use detox_gguf::engine::residual::{self, ResidualPlace};
use detox_gguf::engine::{Model, ModelOptions, Session, SessionOptions};
use detox_gguf::interp::probe::Probe;
use detox_gguf::steer::ControlVectorFile;

use super::{detox, failure, tiny};

const PAIRS: [(&str, &str); 3] = [
    ("What a dreadful noise", "What a lovely sound"),
    ("Get lost", "Come in and sit down with us"),
    ("Nobody wants to hear it", "Everybody would like to hear it"),
];

/// Runs `steer -m MODEL -o FOLDER/NAME` with `arguments`, and returns the output's path.
fn steer(folder: &Path, model: &str, name: &str, arguments: &[&str]) -> PathBuf {
    let output = folder.join(name);
    let mut command = detox();
    command.args(["steer", "-t", "1", "-m"]).arg(tiny(model)).arg("-o").arg(&output).args(arguments);
    command.assert().success();
    output
}

fn directions(path: &Path) -> BTreeMap<usize, Vec<f32>> {
    ControlVectorFile::read(path).unwrap().directions
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn contrast_file(folder: &Path, pairs: &[(&str, &str)]) -> String {
    let path = folder.join("pairs.jsonl");
    let row = |(toxic, benign): &(&str, &str)| format!("{{\"toxic\": {toxic:?}, \"benign\": {benign:?}}}\n");
    std::fs::write(&path, pairs.iter().map(row).collect::<String>()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_contrast_is_the_mean_difference_of_residual_streams_in_each_layer() {
    let folder = tempfile::tempdir().unwrap();
    let pairs = contrast_file(folder.path(), &PAIRS);
    let found = directions(&steer(folder.path(), "llama.gguf", "mean.gguf", &["--contrast", &pairs]));
    assert_eq!(found.keys().collect::<Vec<_>>(), [&1, &2]);

    let model = Model::open(&tiny("llama.gguf"), &ModelOptions::default()).unwrap();
    let options = SessionOptions { n_parallel: Some(1), n_threads: Some(1), ..SessionOptions::default() };
    let mut session = Session::open_with_callback(&model, &options, 64).unwrap();
    let mut mean = |il: usize, texts: Vec<&str>| -> Vec<f32> {
        let tokens: Vec<_> = texts.iter().map(|text| model.tokenize_prompt(text).unwrap()).collect();
        let places = [ResidualPlace::AfterBlock(il)];
        let rows = residual::record(&mut session, &tokens, &places, &AtomicBool::new(false), |_| {}).unwrap();
        let sum = |i: usize| rows.iter().map(|places| places[0][i]).sum::<f32>();
        (0..model.n_embd()).map(|i| sum(i) / rows.len() as f32).collect()
    };
    for (il, found) in &found {
        let toxic = mean(*il, PAIRS.iter().map(|p| p.0).collect());
        let benign = mean(*il, PAIRS.iter().map(|p| p.1).collect());
        let difference: Vec<f32> = toxic.iter().zip(&benign).map(|(t, b)| t - b).collect();
        let error: Vec<f32> = found.iter().zip(&difference).map(|(a, b)| a - b).collect();
        // Another batch shape and F16 keys cause rounding differences.
        let relative = (dot(&error, &error) / dot(&difference, &difference)).sqrt();
        assert!(relative < 0.02, "layer {il}: {relative}");
    }
}

#[test]
fn rejects_invalid_pairs_and_names_the_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    let good = "{\"toxic\": \"a\", \"benign\": \"b\"}\n";
    for (content, place, reason) in [
        (String::new(), "pairs.jsonl", "at least one pair"),
        (format!("{good}{{\"toxic\": \"a\"}}\n"), "pairs.jsonl:2", "benign"),
        (format!("{good}{{\"toxic\": \" \", \"benign\": \"b\"}}\n"), "pairs.jsonl:2", "an empty one"),
        (format!("{good}\n{{\"toxic\": \"a\", "), "pairs.jsonl:3", "expected JSON"),
    ] {
        std::fs::write(&path, &content).unwrap();
        let mut command = detox();
        command.args(["steer", "-m"]).arg(tiny("llama.gguf")).arg("--contrast").arg(&path);
        let (code, stderr) = failure(command.arg("-o").arg(folder.path().join("x.gguf")));
        assert!(code == 1 && stderr.contains(place) && stderr.contains(reason), "{content}: {stderr}");
    }
}

#[test]
fn a_principal_component_is_scaled_to_the_mean_difference_along_it() {
    let folder = tempfile::tempdir().unwrap();
    for (pairs, are_one) in [(&PAIRS[..], false), (&PAIRS[..1], true)] {
        let pairs = contrast_file(folder.path(), pairs);
        let with = |name: &str, method: &str| {
            directions(&steer(folder.path(), "gpt2.gguf", name, &["--contrast", &pairs, "--method", method]))
        };
        let (mean, pca) = (with("mean.gguf", "mean"), with("pca.gguf", "pca"));
        assert_eq!(mean.keys().collect::<Vec<_>>(), pca.keys().collect::<Vec<_>>());
        for (layer, pca) in &pca {
            let mean = &mean[layer];
            // With the unit vector d, pca = (mean . d) d. So pca . mean = |pca|^2, and both point the same way.
            assert!((dot(pca, mean) / dot(pca, pca) - 1.0).abs() < 1e-4, "layer {layer}");
            // The component of one pair is its difference; that of several pairs is not their mean difference.
            let cosine = dot(pca, mean) / (dot(pca, pca) * dot(mean, mean)).sqrt();
            assert_eq!(cosine > 0.999_999, are_one, "layer {layer}: {cosine}");
        }
    }
}

#[test]
fn a_probe_gives_its_unit_direction_in_the_layer_it_reads() {
    let folder = tempfile::tempdir().unwrap();
    let probe = folder.path().join("probe.gguf");
    let mut command = detox();
    command.args(["probe", "-t", "1", "--epochs", "1", "--limit", "40", "--layer", "1", "-m"]);
    command.arg(tiny("llama.gguf")).arg("-o").arg(&probe).assert().success();
    let weight = Probe::read(&probe).unwrap().weight;
    let length = dot(&weight, &weight).sqrt();
    let path = probe.to_str().unwrap();
    let found = directions(&steer(folder.path(), "llama.gguf", "one.gguf", &["--probe", path]));
    assert_eq!(found.keys().collect::<Vec<_>>(), [&1]);
    for (found, w) in found[&1].iter().zip(&weight) {
        assert!((f64::from(*found) - f64::from(*w) / length).abs() < 1e-6);
    }
    let wide = steer(folder.path(), "llama.gguf", "two.gguf", &["--probe", path, "--layers", "1", "2"]);
    let wide = directions(&wide);
    assert_eq!((&wide[&1], &wide[&2]), (&found[&1], &found[&1]));
    // A probe of another model is refused, and so is layer 0, which a control vector cannot have.
    let mut other = detox();
    other.args(["steer", "-m"]).arg(tiny("gpt2.gguf")).args(["--probe", path, "-o"]);
    let (code, stderr) = failure(other.arg(folder.path().join("x.gguf")));
    assert!(code == 1 && stderr.contains("architecture llama"), "{stderr}");
    let mut layer_0 = detox();
    layer_0.args(["steer", "-m"]).arg(tiny("llama.gguf")).args(["--probe", path, "--layers", "0", "1", "-o"]);
    let (code, stderr) = failure(layer_0.arg(folder.path().join("x.gguf")));
    assert!(code == 2 && stderr.contains("expected layers from 1 to 2, found 0 to 1"), "{stderr}");
}

#[test]
fn a_combined_file_steers_like_its_parts_together() {
    let folder = tempfile::tempdir().unwrap();
    let pairs = contrast_file(folder.path(), &PAIRS);
    let mean = steer(folder.path(), "llama.gguf", "mean.gguf", &["--contrast", &pairs]);
    let typed = |path: &Path, coefficient: &str| format!("{}:{coefficient}", path.display());
    let halves = [typed(&mean, "0.5"), typed(&mean, "1.5")];
    let sum = steer(folder.path(), "llama.gguf", "sum.gguf", &["--steer", &halves[0], "--steer", &halves[1]]);
    for (layer, direction) in directions(&mean) {
        let twice: Vec<f32> = direction.iter().map(|x| 2.0 * x).collect();
        for (a, b) in directions(&sum)[&layer].iter().zip(&twice) {
            assert!((a - b).abs() <= 1e-6 * b.abs().max(1.0), "{a} {b}");
        }
    }

    // Neurons and part of a control vector: as separate files, and as one.
    let neurons = folder.path().join("neurons.json");
    std::fs::write(&neurons, "[[0, 3], [2, 5]]").unwrap();
    let neurons = neurons.to_str().unwrap();
    let scale = ["--neurons", neurons, "--scale", "-2"];
    let edits = steer(folder.path(), "llama.gguf", "edits.json", &scale);
    let edits = edits.to_str().unwrap();
    let scaled = format!("{}:3", mean.display());
    let range = ["--control-vector-scaled", &scaled, "--control-vector-layer-range", "1", "1"];
    let both = [&["--steer", edits][..], &range].concat();
    let file = steer(folder.path(), "llama.gguf", "both.json", &both);
    let generated = |arguments: &[&str]| {
        let mut command = detox();
        command.args(["generate", "-k", "1", "-n", "8", "--temp", "0", "--lang", "en,de", "-t", "1", "-m"]);
        command.arg(tiny("llama.gguf")).args(arguments);
        String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap()
    };
    let apart = generated(&both);
    assert_eq!(generated(&["--steer", file.to_str().unwrap()]), apart);
    for less in [&[][..], &both[..2], &both[2..]] {
        assert_ne!(generated(less), apart, "every part has an effect: {less:?}");
    }
    // The layer range matters: without it the output differs.
    assert_ne!(generated(&both[..4]), apart);
}

#[test]
fn rejects_combining_files_made_for_another_model() {
    let folder = tempfile::tempdir().unwrap();
    let neurons = folder.path().join("neurons.json");
    std::fs::write(&neurons, "[[0, 3], [1, 5]]").unwrap();
    let neurons = neurons.to_str().unwrap();
    let of_llama = steer(folder.path(), "llama.gguf", "llama.json", &["--neurons", neurons, "--offset", "1"]);
    for name in ["x.json", "x.gguf"] {
        let mut command = detox();
        command.args(["steer", "-m"]).arg(tiny("gpt2.gguf")).arg("--steer").arg(&of_llama);
        let output = folder.path().join(name);
        let (code, stderr) = failure(command.arg("-o").arg(&output));
        assert!(code == 1 && stderr.contains("architecture llama"), "{stderr}");
        assert!(!output.exists());
    }
}
