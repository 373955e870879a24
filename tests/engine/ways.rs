//! Every way to apply an intervention has the same effect: control vector, callback, baked model, with and without
//! adapters. A control vector that llama.cpp would ignore is refused.

use std::path::{Path, PathBuf};

use detox_gguf::check::steering::{difference, noise_floor};
use detox_gguf::engine::steering::{LoraScaled, Operation};
use detox_gguf::engine::{Model, ModelOptions, Session, Steering, Token};
use detox_gguf::gguf::dequantize;
use detox_gguf::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value};
use detox_gguf::steer::compile::{CompileOptions, Route, compile, layer_vectors};
use detox_gguf::steer::{Fingerprint, Intervention, Interventions, Neuron, SteerFile, bake, control_vector};

use super::{exact, tiny};

const TOKENS: [Token; 9] = [1, 60, 70, 80, 90, 100, 110, 120, 130];

fn neurons(with_layer_0: bool) -> Vec<(Neuron, f32)> {
    let neuron = |layer, index| Neuron { layer, index };
    let mut all = vec![(neuron(1, 5), 3.0), (neuron(1, 60), -4.0)];
    all.extend(with_layer_0.then_some((neuron(0, 9), 5.0)));
    all
}

/// One intervention per neuron, because the offsets differ.
fn sources(offsets: &[(Neuron, f32)]) -> Vec<(SteerFile, f32)> {
    let list = offsets.iter().map(|&(n, x)| Intervention::neuron_offset(vec![n], x).unwrap()).collect();
    vec![(SteerFile::Interventions(Interventions { path: "test.json".into(), fingerprint: None, list }), 1.0)]
}

fn compiled(path: &Path, sources: &[(SteerFile, f32)], loras: &[LoraScaled], route: Route) -> Steering {
    let options = CompileOptions { route, ..CompileOptions::default() };
    compile(&GgufFile::open(path).unwrap(), sources, loras, &options).unwrap().steering
}

fn logits(path: &Path, steering: Steering) -> Vec<Vec<f32>> {
    let model = Model::open(path, &ModelOptions::default()).unwrap().with_steering(steering).unwrap();
    Session::open(&model, &exact(1), 64).unwrap().logits(&TOKENS).unwrap()
}

fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn control_vector_callback_and_baked_model_give_the_same_logits() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama", "gpt2", "bloom"] {
        let (path, offsets) = (tiny(name), neurons(true));
        let sources = sources(&offsets);
        let cheapest = compiled(&path, &sources, &[], Route::Cheapest);
        assert!(
            cheapest.control_vector.is_some() && cheapest.edits.len() == 1,
            "{name}: only layer 0 by callback"
        );
        let callback = compiled(&path, &sources, &[], Route::Callback);
        assert!(callback.control_vector.is_none() && callback.edits.len() == 3);
        let (plain, by_callback) = (logits(&path, Steering::default()), logits(&path, callback));
        assert!(largest_difference(&plain, &by_callback) > 1.0);
        let by_cheapest = logits(&path, cheapest);
        assert!(largest_difference(&by_callback, &by_cheapest) < 1e-4, "{name}");
        let model = GgufFile::open(&path).unwrap();
        let baked = folder.path().join(format!("{name}.gguf"));
        let vectors = layer_vectors(&model, &offsets, &[]).unwrap();
        bake::bake(&model, &vectors, &[], &baked, |_, _| {}).unwrap();
        let by_bias = logits(&baked, Steering::default());
        assert!(largest_difference(&by_callback, &by_bias) < 1e-4, "{name}");
    }
}

#[test]
fn a_control_vector_written_and_read_back_gives_the_same_steering() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama", "command-r", "qwen2", "qwen3"] {
        let path = tiny(name);
        let sources = sources(&neurons(false));
        let steering = compiled(&path, &sources, &[], Route::Cheapest);
        assert!(steering.edits.is_empty());
        let vector = steering.control_vector.clone().unwrap();
        let directions = vector.rows.chunks_exact(vector.n_embd).enumerate();
        let directions = directions.map(|(i, row)| (i + 1, row.to_vec())).collect();
        let file = folder.path().join(format!("{name}.gguf"));
        let fingerprint = Fingerprint::of(&GgufFile::open(&path).unwrap()).unwrap();
        control_vector::write(&file, &fingerprint, &directions, &Metadata::new()).unwrap();
        let read = vec![(SteerFile::open(&file).unwrap(), 1.0)];
        let again = compiled(&path, &read, &[], Route::Cheapest);
        assert_eq!(again, steering, "{name}");
        // Twice a half is the whole.
        let halves = [(read[0].0.clone(), 0.5), (read[0].0.clone(), 0.5)];
        assert_eq!(compiled(&path, &halves, &[], Route::Cheapest), steering);
        // With a coefficient of 0 nothing is left.
        assert!(compiled(&path, &[(read[0].0.clone(), 0.0)], &[], Route::Cheapest).is_empty());
    }
}

#[test]
fn on_a_quantised_model_the_ways_differ_only_within_the_noise_of_quantisation() {
    let path = tiny("llama-q8_0");
    let sources = sources(&neurons(false));
    let model = Model::open(&path, &ModelOptions::default()).unwrap();
    let callback = compiled(&path, &sources, &[], Route::Callback);
    let cheapest = compiled(&path, &sources, &[], Route::Cheapest);
    // Random tokens: enough of them for a mean.
    let texts: Vec<Vec<Token>> =
        (0..40).map(|text| (0..20).map(|i| 10 + (text * 37 + i * i * 11 + i * 5) % 370).collect()).collect();
    let ways = difference(&model, &callback, &cheapest, &texts, &exact(1)).unwrap();
    let floor = noise_floor(&model, &callback, &texts, &exact(1)).unwrap();
    let effect = difference(&model, &Steering::default(), &callback, &texts, &exact(1)).unwrap();
    // By callback, an offset also coarsens the 31 other activations of its 8-bit block, which the control vector does
    // not. That is more than the nudge behind the noise floor, but of the same kind.
    assert!(ways.mean_kl < 4.0 * floor.mean_kl, "{ways:?} {floor:?}");
    assert!(effect.mean_kl > 20.0 * ways.mean_kl, "{effect:?} {ways:?}");
    // The baked model adds the edit at the same place as the control vector, to unchanged products.
    let folder = tempfile::tempdir().unwrap();
    let baked = folder.path().join("baked.gguf");
    let file = GgufFile::open(&path).unwrap();
    let vectors = layer_vectors(&file, &neurons(false), &[]).unwrap();
    bake::bake(&file, &vectors, &[], &baked, |_, _| {}).unwrap();
    let open = |path: &Path, steering: &Steering| {
        let model = Model::open(path, &ModelOptions::default()).unwrap();
        Session::open(&model.with_steering(steering.clone()).unwrap(), &exact(1), 64).unwrap()
    };
    let (mut by_bias, mut by_vector) = (open(&baked, &Steering::default()), open(&path, &cheapest));
    let mut by_callback = open(&path, &callback);
    let (mut to_vector, mut to_callback, mut n) = (0.0, 0.0, 0.0);
    for text in &texts {
        let rows = by_bias.logits(text).unwrap();
        let others = (by_vector.logits(text).unwrap(), by_callback.logits(text).unwrap());
        for ((row, vector), callback) in rows.iter().zip(&others.0).zip(&others.1) {
            to_vector += kl(row, vector);
            to_callback += kl(row, callback);
            n += 1.0;
        }
    }
    assert!(to_vector / n < floor.mean_kl, "{} {floor:?}", to_vector / n);
    assert!(to_callback / n < 4.0 * floor.mean_kl, "{} {floor:?}", to_callback / n);
}

/// The KL divergence of `softmax(q)` from `softmax(p)`, in nats.
fn kl(p: &[f32], q: &[f32]) -> f64 {
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        row.iter().map(|&x| f64::from(x) - sum.ln()).collect()
    };
    log_softmax(p).iter().zip(log_softmax(q)).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// An adapter for `ffn_down` of layer 1 of the tiny llama, and the model with it merged: W + scale alpha / rank B A.
fn adapter(folder: &Path, scale: f32) -> (PathBuf, PathBuf) {
    let model = GgufFile::open(tiny("llama")).unwrap();
    let (n_ff, n_embd, rank, alpha) = (96, 64, 4, 8.0f32);
    let number = |i: usize| ((i * 7919 % 101) as f32 - 50.0) / 100.0;
    // A has shape [n_ff, rank], B [rank, n_embd].
    let a: Vec<f32> = (0..n_ff * rank).map(number).collect();
    let b: Vec<f32> = (0..n_embd * rank).map(|i| number(i + 13)).collect();
    let name = "blk.1.ffn_down.weight";
    let mut metadata = Metadata::new();
    for (key, value) in [
        ("general.type", Value::Str("adapter".into())),
        ("general.architecture", Value::Str("llama".into())),
        ("adapter.type", Value::Str("lora".into())),
        ("adapter.lora.alpha", Value::F32(alpha)),
    ] {
        metadata.set(key, value);
    }
    let spec = |suffix: &str, shape: [usize; 2]| TensorSpec {
        name: format!("{name}{suffix}"),
        shape: shape.map(|n| n as u64).to_vec(),
        tensor_type: TensorType::F32,
    };
    let lora = folder.join("lora.gguf");
    let specs = vec![spec(".lora_a", [n_ff, rank]), spec(".lora_b", [rank, n_embd])];
    let mut writer = GgufWriter::create(&lora, &metadata, specs).unwrap();
    writer.write_f32s(&a).unwrap();
    writer.write_f32s(&b).unwrap();
    writer.finish().unwrap();

    let merged = folder.join("merged.gguf");
    let specs = model.tensors().iter().map(|t| TensorSpec {
        name: t.name().to_owned(),
        shape: t.shape().to_vec(),
        tensor_type: t.tensor_type(),
    });
    let mut writer = GgufWriter::create(&merged, model.metadata(), specs.collect()).unwrap();
    for tensor in model.tensors() {
        let bytes = model.read_tensor(tensor).unwrap();
        if tensor.name() != name {
            writer.write(&bytes).unwrap();
            continue;
        }
        let mut w = vec![0f32; n_ff * n_embd];
        dequantize(tensor.tensor_type(), &bytes, &mut w).unwrap();
        for o in 0..n_embd {
            for i in 0..n_ff {
                let product: f32 = (0..rank).map(|r| b[o * rank + r] * a[r * n_ff + i]).sum();
                w[o * n_ff + i] += scale * alpha / rank as f32 * product;
            }
        }
        writer.write_f32s(&w).unwrap();
    }
    writer.finish().unwrap();
    (lora, merged)
}

#[test]
fn an_adapter_gives_the_logits_of_merged_weights_with_and_without_an_intervention() {
    let folder = tempfile::tempdir().unwrap();
    let path = tiny("llama");
    for scale in [1.0, -0.5] {
        let (lora, merged) = adapter(folder.path(), scale);
        let loras = [LoraScaled { path: lora, scale }];
        let found = logits(&path, compiled(&path, &[], &loras, Route::Cheapest));
        assert!(largest_difference(&found, &logits(&path, Steering::default())) > 0.5);
        assert!(largest_difference(&found, &logits(&merged, Steering::default())) < 1e-3);
        // The value vectors must be those of the merged matrix.
        let sources = sources(&neurons(true));
        for route in [Route::Cheapest, Route::Callback] {
            let found = logits(&path, compiled(&path, &sources, &loras, route));
            let expected = logits(&merged, compiled(&merged, &sources, &[], Route::Callback));
            let difference = largest_difference(&found, &expected);
            assert!(difference < 1e-3, "{route:?}: {difference}");
        }
    }
}

#[test]
fn on_an_unsupported_architecture_a_control_vector_must_change_logits() {
    // minicpm is not in the table of architectures, and has the same tensors as llama.
    let model = GgufFile::open(tiny("llama")).unwrap();
    let mut metadata = Metadata::new();
    for (key, value) in model.metadata().iter() {
        let key = key.strip_prefix("llama.").map_or(key.to_owned(), |rest| format!("minicpm.{rest}"));
        metadata.set(key, value.clone());
    }
    metadata.set("general.architecture", Value::Str("minicpm".into()));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("minicpm.gguf");
    let specs = model.tensors().iter().map(|t| TensorSpec {
        name: t.name().to_owned(),
        shape: t.shape().to_vec(),
        tensor_type: t.tensor_type(),
    });
    let mut writer = GgufWriter::create(&path, &metadata, specs.collect()).unwrap();
    for tensor in model.tensors() {
        writer.write(&model.read_tensor(tensor).unwrap()).unwrap();
    }
    writer.finish().unwrap();

    let fingerprint = Fingerprint::of(&GgufFile::open(&path).unwrap()).unwrap();
    let open = |value: f32| {
        let file = folder.path().join("steer.gguf");
        let directions = [(1, vec![value; 64])].into();
        control_vector::write(&file, &fingerprint, &directions, &Metadata::new()).unwrap();
        let steering = compiled(&path, &[(SteerFile::open(&file).unwrap(), 1.0)], &[], Route::Cheapest);
        let model = Model::open(&path, &ModelOptions::default()).unwrap().with_steering(steering).unwrap();
        Session::open(&model, &exact(1), 64)
    };
    assert!(open(0.5).is_ok());
    // A tiny vector is lost in rounding, so logits do not change, as on a graph that ignores control vectors.
    let error = open(1e-40).unwrap_err();
    assert!(error.to_string().contains("architecture \"minicpm\""), "{error}");
    assert!(error.to_string().contains("logits do not change"), "{error}");
    assert!(error.hint().is_some());
}

#[derive(serde::Deserialize)]
struct LoraGolden {
    prompt: LoraPrompt,
    cases: Vec<LoraCase>,
}

#[derive(serde::Deserialize)]
struct LoraPrompt {
    tokens: Vec<Token>,
}

#[derive(serde::Deserialize)]
struct LoraCase {
    scale: f32,
    edits: Vec<NeuronOffset>,
    largest_effect: f32,
    logits: Vec<Vec<f32>>,
}

#[derive(serde::Deserialize)]
struct NeuronOffset {
    layer: u32,
    neuron: u32,
    operation: Operation,
    coefficient: f32,
}

#[test]
fn adapters_give_the_references_logits_with_and_without_an_intervention() {
    for name in ["llama", "gpt2", "gemma3"] {
        let golden: LoraGolden = super::golden(&format!("{name}_lora"));
        assert_eq!(golden.cases.iter().filter(|case| !case.edits.is_empty()).count(), 1);
        for case in golden.cases {
            let loras = [LoraScaled { path: tiny(&format!("{name}-lora")), scale: case.scale }];
            let offsets: Vec<(Neuron, f32)> = (case.edits.iter())
                .map(|edit| match edit.operation {
                    Operation::Offset(x) => {
                        (Neuron { layer: edit.layer, index: edit.neuron }, x * edit.coefficient)
                    }
                    other => panic!("expected an offset, found {other:?}"),
                })
                .collect();
            let sources = if offsets.is_empty() { Vec::new() } else { sources(&offsets) };
            for route in [Route::Cheapest, Route::Callback] {
                let steering = compiled(&tiny(name), &sources, &loras, route);
                // gemma3 has a norm after the FFN, so its neurons have no control vector.
                let by_vector = !offsets.is_empty() && route == Route::Cheapest && name != "gemma3";
                assert_eq!(steering.control_vector.is_some(), by_vector, "{name}, {route:?}");
                let model = Model::open(&tiny(name), &ModelOptions::default()).unwrap();
                let model = model.with_steering(steering).unwrap();
                let found =
                    Session::open(&model, &exact(1), 64).unwrap().logits(&golden.prompt.tokens).unwrap();
                let worst = largest_difference(&found, &case.logits);
                let bound = super::tolerance(name) * (1.0 + 0.2 * case.largest_effect);
                assert!(worst < bound && case.largest_effect > 1.0, "{name} at {}: {worst}", case.scale);
            }
        }
    }
}

#[test]
fn rejects_a_control_vector_on_an_architecture_that_ignores_it() {
    // llama.cpp's graph of plamo2 does not add control vectors.
    let (path, folder) = (tiny("plamo2"), tempfile::tempdir().unwrap());
    let model = GgufFile::open(&path).unwrap();
    let n_embd = model.n_embd().unwrap() as usize;
    let file = folder.path().join("steer.gguf");
    let directions = [(1, vec![0.5; n_embd])].into();
    let fingerprint = Fingerprint::of(&model).unwrap();
    control_vector::write(&file, &fingerprint, &directions, &Metadata::new()).unwrap();
    let steering = compiled(&path, &[(SteerFile::open(&file).unwrap(), 1.0)], &[], Route::Cheapest);
    let model = Model::open(&path, &ModelOptions::default()).unwrap().with_steering(steering).unwrap();
    let error = Session::open(&model, &exact(1), 64).unwrap_err();
    assert!(error.to_string().contains("logits do not change"), "{error}");
}
