//! What is measured while steering does not depend on the way an edit is made: callback, control vector, bias or weights.

use std::path::{Path, PathBuf};

use detox_gguf::engine::residual::{self, ResidualPlace};
use detox_gguf::engine::schedule::Request;
use detox_gguf::engine::steering::{LoraScaled, Operation, When};
use detox_gguf::engine::{Model, ModelOptions, Session, Steering, Token, activation};
use detox_gguf::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, dequantize};
use detox_gguf::steer::compile::{CompileOptions, Route, compile, layer_vectors};
use detox_gguf::steer::{
    Fingerprint, Intervention, Interventions, Neuron, SteerFile, Target, bake, control_vector,
};

use super::{exact, tiny, uninterrupted};

const PROMPT: [Token; 9] = [1, 60, 70, 80, 90, 100, 110, 120, 130];

/// Every neuron's mean activation, `[n_layer][n_ff]`, the greedy tokens, and every residual stream, `[places][n_embd]`.
#[derive(Debug)]
struct Measured {
    activations: Vec<Vec<f32>>,
    tokens: Vec<Token>,
    streams: Vec<Vec<f32>>,
}

fn measure(path: &Path, steering: Steering) -> Measured {
    let model = Model::open(path, &ModelOptions::default()).unwrap().with_steering(steering).unwrap();
    let mut session = Session::open_with_callback(&model, &exact(2), 64).unwrap();
    let n_ff = model.n_ff().to_vec();
    let neurons: Vec<(usize, usize)> =
        n_ff.iter().enumerate().flat_map(|(il, &n)| (0..n).map(move |i| (il, i))).collect();
    let request = [Request { id: "p".into(), tokens: PROMPT.to_vec() }];
    let found = activation::record(&mut session, &request, &neurons, 4, &uninterrupted(), |_| {}).unwrap();
    let mut of_neurons = found[0].mean.iter().copied();
    let activations = n_ff.iter().map(|&n| of_neurons.by_ref().take(n).collect()).collect();
    let places = ResidualPlace::all(model.n_layer());
    let streams = residual::record(&mut session, &[PROMPT.to_vec()], &places, &uninterrupted(), |_| {});
    Measured { activations, tokens: found[0].tokens.clone(), streams: streams.unwrap().swap_remove(0) }
}

fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Asserts that two ways measured the same, within the rounding of F32 and of ggml's F16 table for GELU.
fn assert_same(a: &Measured, b: &Measured, what: &str) {
    let bound = if what.starts_with("llama") { 1e-4 } else { 1e-3 };
    assert_eq!(a.tokens, b.tokens, "{what}");
    let (activations, streams) =
        (largest_difference(&a.activations, &b.activations), largest_difference(&a.streams, &b.streams));
    assert!(activations < bound && streams < bound, "{what}: {activations} {streams}");
}

fn compiled(path: &Path, sources: &[(SteerFile, f32)], loras: &[LoraScaled], route: Route) -> Steering {
    let options = CompileOptions { route, ..CompileOptions::default() };
    compile(&GgufFile::open(path).unwrap(), sources, loras, &options).unwrap().steering
}

fn source(intervention: Intervention) -> (SteerFile, f32) {
    let list = vec![intervention];
    (SteerFile::Interventions(Interventions { path: "test.json".into(), fingerprint: None, list }), 1.0)
}

fn intervention(neuron: Neuron, operation: Operation) -> Intervention {
    Intervention::new(Target::Neurons(vec![neuron]), operation, When::Both, None, 1.0).unwrap()
}

/// Writes a copy of the model with one neuron's value vector multiplied by `factor`.
fn scale_column(path: &Path, neuron: Neuron, factor: f32, to: &Path) {
    let model = GgufFile::open(path).unwrap();
    let edited = format!("blk.{}.ffn_down.weight", neuron.layer);
    let specs = model.tensors().iter().map(|t| TensorSpec {
        name: t.name().to_owned(),
        shape: t.shape().to_vec(),
        tensor_type: t.tensor_type(),
    });
    let mut writer = GgufWriter::create(to, model.metadata(), specs.collect()).unwrap();
    for tensor in model.tensors() {
        let bytes = model.read_tensor(tensor).unwrap();
        if tensor.name() != edited {
            writer.write(&bytes).unwrap();
            continue;
        }
        let (n_ff, n_embd) = (tensor.shape()[0] as usize, tensor.shape()[1] as usize);
        let mut w = vec![0f32; n_ff * n_embd];
        dequantize(tensor.tensor_type(), &bytes, &mut w).unwrap();
        w.iter_mut().skip(neuron.index as usize).step_by(n_ff).for_each(|w| *w *= factor);
        writer.write_f32s(&w).unwrap();
    }
    writer.finish().unwrap();
}

/// The same edit in a model's weights: the value vector times `factor`, and a bias of `value` times the value vector.
fn in_weights(path: &Path, neuron: Neuron, factor: f32, value: f32, folder: &Path) -> PathBuf {
    let (scaled, baked) = (folder.join("scaled.gguf"), folder.join("baked.gguf"));
    scale_column(path, neuron, factor, &scaled);
    let vectors = layer_vectors(&GgufFile::open(path).unwrap(), &[(neuron, value)], &[]).unwrap();
    bake::bake(&GgufFile::open(&scaled).unwrap(), &vectors, &[], &baked, |_, _| {}).unwrap();
    baked
}

#[test]
fn every_way_to_make_an_edit_gives_the_same_measurements() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama", "gpt2", "bloom"] {
        let path = tiny(name);
        let plain = measure(&path, Steering::default());
        let n_layer = plain.activations.len();
        for layer in [0, 1] {
            let neuron = Neuron { layer, index: 5 };
            // Each edit as an operation, and in weights as a factor and a bias.
            for (operation, factor, value) in [
                (Operation::Offset(3.0), 1.0, 3.0),
                (Operation::Assign(-4.0), 0.0, -4.0),
                (Operation::Scale(3.0), 3.0, 0.0),
                (Operation::Scale(0.0), 0.0, 0.0),
                (Operation::Assign(0.0), 0.0, 0.0),
                (Operation::Clamp { min: 2.0, max: 2.0 }, 0.0, 2.0),
            ] {
                let what = format!("{name}, layer {layer}, {operation:?}");
                let edit = [source(intervention(neuron, operation))];
                let callback = compiled(&path, &edit, &[], Route::Callback);
                assert!(callback.control_vector.is_none() && callback.edits.len() == 1);
                let by_callback = measure(&path, callback);
                let by_cheapest = measure(&path, compiled(&path, &edit, &[], Route::Cheapest));
                assert_same(&by_callback, &by_cheapest, &what);
                let baked = in_weights(&path, neuron, factor, value, folder.path());
                assert_same(&by_callback, &measure(&baked, Steering::default()), &what);
                // Later layers and the residual stream do show the edit.
                assert!(largest_difference(&plain.streams, &by_callback.streams) > 1e-3, "{what}");
                assert!(
                    n_layer == layer as usize + 1 || by_callback.activations != plain.activations,
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn a_neuron_is_measured_before_its_own_edit() {
    for name in ["llama", "command-r", "gpt2", "bloom", "gemma3", "qwen2", "qwen3"] {
        let path = tiny(name);
        let neuron = Neuron { layer: 0, index: 7 };
        let plain = measure(&path, Steering::default());
        let clamped = Operation::Clamp { min: 50.0, max: 60.0 };
        for operation in [Operation::Offset(50.0), Operation::Assign(50.0), clamped] {
            let edits = [source(intervention(neuron, operation))];
            let edited = measure(&path, compiled(&path, &edits, &[], Route::Callback));
            // Only tokens generated after the first depend on the edit.
            assert!(edited.activations[0][7] < 20.0, "{name}, {operation:?}: {}", edited.activations[0][7]);
            assert!(largest_difference(&plain.streams[1..2], &edited.streams[1..2]) > 0.1, "{name}");
        }
    }
}

#[test]
fn directions_and_adapters_give_the_same_measurements_in_each_way() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama", "gpt2", "gemma3"] {
        let path = tiny(name);
        let model = GgufFile::open(&path).unwrap();
        let vector = (0..model.n_embd().unwrap()).map(|i| (i as f32 * 0.7).sin()).collect();
        let file = folder.path().join("direction.gguf");
        let fingerprint = Fingerprint::of(&model).unwrap();
        control_vector::write(&file, &fingerprint, &[(1, vector)].into(), &Metadata::new()).unwrap();
        let edits = [
            (SteerFile::open(&file).unwrap(), 0.5),
            source(intervention(Neuron { layer: 1, index: 5 }, Operation::Offset(3.0))),
        ];
        let loras = [LoraScaled { path: tiny(&format!("{name}-lora")), scale: 0.5 }];
        for loras in [&[][..], &loras[..]] {
            let of = |route| measure(&path, compiled(&path, &edits, loras, route));
            assert_same(&of(Route::Callback), &of(Route::Cheapest), name);
        }
    }
}
