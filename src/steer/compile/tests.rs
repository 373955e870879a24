use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

use super::*;
use crate::gguf::{GgufWriter, Metadata, TensorSpec, TensorType, Value};
use crate::steer::intervention::Directions;

fn model(name: &str) -> GgufFile {
    GgufFile::open(format!("gguf/tiny/{name}.gguf")).unwrap()
}

fn neurons(list: &[(u32, u32)]) -> Target {
    Target::Neurons(list.iter().map(|&pair| pair.into()).collect())
}

/// Directions without a fingerprint, by layer.
fn control_vector(directions: &[(usize, Vec<f32>)]) -> ControlVectorFile {
    ControlVectorFile {
        path: "cv/toxic.gguf".into(),
        model_hint: None,
        fingerprint: None,
        directions: directions.iter().cloned().collect(),
        metadata: Metadata::new(),
    }
}

fn along(directions: &[(usize, Vec<f32>)]) -> Target {
    let (path, sha256, file) = ("toxic.gguf".into(), String::new(), control_vector(directions));
    Target::Directions(Box::new(Directions { path, sha256, file }))
}

fn both(target: Target, operation: Operation) -> Intervention {
    Intervention::new(target, operation, When::Both, None, 1.0).unwrap()
}

fn source(list: Vec<Intervention>) -> (SteerFile, f32) {
    (SteerFile::Interventions(Interventions { path: "steer.json".into(), fingerprint: None, list }), 1.0)
}

fn cheapest(model: &GgufFile, list: Vec<Intervention>) -> Compiled {
    compile(model, &[source(list)], &[], &CompileOptions::default()).unwrap()
}

fn refusal(model: &GgufFile, sources: &[(SteerFile, f32)], options: CompileOptions) -> String {
    compile(model, sources, &[], &options).unwrap_err().to_string()
}

/// Reads an F32 tensor of the model as f64.
fn f64s(model: &GgufFile, name: &str) -> Vec<f64> {
    let bytes = model.read_tensor(model.tensor(name).unwrap()).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|&chunk| f64::from(f32::from_le_bytes(chunk))).collect()
}

/// Reads column `index` of a layer's down projection from the file: element `[o][i]` of ggml's
/// `[n_ff, n_embd]` is at `o * n_ff + i`.
fn value_vector(model: &GgufFile, layer: usize, index: usize) -> Vec<f64> {
    let n_ff = model.n_ff().unwrap() as usize;
    f64s(model, &format!("blk.{layer}.ffn_down.weight")).chunks(n_ff).map(|row| row[index]).collect()
}

#[test]
fn neuron_offsets_become_value_vectors_in_the_control_vector() {
    let model = model("llama");
    let n_embd = model.n_embd().unwrap() as usize;
    let offset = both(neurons(&[(2, 5), (0, 3), (2, 7)]), Operation::Offset(-2.0));
    let Compiled { steering, choices } = cheapest(&model, vec![offset]);
    assert_eq!(choices, ["3 neuron offsets: 2 as a control vector (layer 2), 1 by callback (layer 0)"]);
    let change = Change::Neuron { index: 3, operation: Operation::Offset(-2.0) };
    assert_eq!(steering.edits, [Edit { layer: 0, when: When::Both, coefficient: 1.0, change }]);
    let control_vector = steering.control_vector.unwrap();
    assert_eq!((control_vector.n_embd, control_vector.rows.len()), (n_embd, 2 * n_embd));
    assert!(control_vector.rows[..n_embd].iter().all(|&value| value == 0.0), "nothing after block 1");
    let (a, b) = (value_vector(&model, 2, 5), value_vector(&model, 2, 7));
    for (o, &found) in control_vector.rows[n_embd..].iter().enumerate() {
        let expected = -2.0 * (a[o] + b[o]);
        assert!((f64::from(found) - expected).abs() < 1e-6, "{found} {expected}");
    }
}

#[test]
fn coefficients_multiply_and_files_add_up() {
    let model = model("llama");
    let n_embd = model.n_embd().unwrap() as usize;
    let file = control_vector(&[(1, vec![1.0; n_embd])]);
    let half =
        Intervention::new(along(&[(1, vec![2.0; n_embd])]), Operation::Offset(3.0), When::Both, None, 0.5);
    let (interventions, _) = source(vec![half.unwrap()]);
    // 4 * 1, and -1 * 0.5 * 3 * 2.
    let sources = [(SteerFile::ControlVector(file), 4.0), (interventions, -1.0)];
    let compiled = compile(&model, &sources, &[], &CompileOptions::default()).unwrap();
    let rows = compiled.steering.control_vector.unwrap().rows;
    assert!(rows[..n_embd].iter().all(|&value| value == 1.0));
    assert!(rows[n_embd..].iter().all(|&value| value == 0.0));
    assert!(compiled.steering.edits.is_empty());
    assert_eq!(
        compiled.choices,
        [
            "1 direction of toxic.gguf: as a control vector (layer 1)",
            "1 direction offset: as a control vector (layer 1)"
        ]
    );
}

#[test]
fn edits_without_effect_are_dropped() {
    let model = model("llama");
    let n_embd = model.n_embd().unwrap() as usize;
    let direction = vec![(1, vec![1.0; n_embd])];
    let zeros = vec![
        both(neurons(&[(0, 1), (1, 1)]), Operation::Offset(0.0)),
        Intervention::new(neurons(&[(1, 1)]), Operation::Assign(3.0), When::Prompt, None, 0.0).unwrap(),
        both(along(&direction), Operation::Offset(-0.0)),
    ];
    let sources = [
        source(zeros),
        (SteerFile::ControlVector(control_vector(&direction)), 0.0),
        (source(vec![both(neurons(&[(0, 1)]), Operation::Offset(1.0))]).0, 0.0),
    ];
    for route in [Route::Cheapest, Route::Callback] {
        let options = CompileOptions { route, ..Default::default() };
        let compiled = compile(&model, &sources, &[], &options).unwrap();
        assert!(compiled.steering.is_empty(), "{:?}", compiled.steering);
        assert!(compiled.choices.iter().all(|choice| choice.contains("nothing to change")));
    }
    assert!(compile(&model, &[], &[], &CompileOptions::default()).unwrap().steering.is_empty());
    // A control vector and its negative cancel.
    let file = SteerFile::ControlVector(control_vector(&direction));
    let cancelled = compile(&model, &[(file.clone(), 1.5), (file, -1.5)], &[], &CompileOptions::default());
    assert_eq!(cancelled.unwrap().steering.control_vector, None);
}

#[test]
fn only_offsets_on_all_tokens_move_to_the_control_vector() {
    let model = model("llama");
    let n_embd = model.n_embd().unwrap() as usize;
    for target in [neurons(&[(1, 1)]), along(&[(1, vec![1.0; n_embd])])] {
        for (operation, when, is_moved) in [
            (Operation::Offset(1.0), When::Both, true),
            (Operation::Offset(1.0), When::Prompt, false),
            (Operation::Offset(1.0), When::Generation, false),
            (Operation::Assign(0.0), When::Both, false),
            (Operation::Scale(0.0), When::Both, false),
            (Operation::Clamp { min: -1.0, max: 0.0 }, When::Both, false),
        ] {
            let intervention = Intervention::new(target.clone(), operation, when, None, 1.0).unwrap();
            let steering = cheapest(&model, vec![intervention]).steering;
            assert_eq!(steering.control_vector.is_some(), is_moved, "{operation:?} {when:?}");
            assert_eq!(steering.edits.is_empty(), is_moved, "{operation:?} {when:?}");
        }
    }
}

#[test]
fn the_callback_route_uses_no_control_vector() {
    let model = model("llama");
    let n_embd = model.n_embd().unwrap() as usize;
    let file = SteerFile::ControlVector(control_vector(&[(2, vec![1.0; n_embd])]));
    let sources = [source(vec![both(neurons(&[(1, 1)]), Operation::Offset(1.0))]), (file, 2.0)];
    let options = CompileOptions { route: Route::Callback, ..Default::default() };
    let steering = compile(&model, &sources, &[], &options).unwrap().steering;
    assert_eq!((steering.control_vector, steering.edits.len()), (None, 2));
}

#[test]
fn if_a_norm_follows_the_ffn_only_directions_move_to_the_control_vector() {
    let model = model("gemma3");
    let n_embd = model.n_embd().unwrap() as usize;
    let list = vec![
        both(neurons(&[(1, 1)]), Operation::Offset(1.0)),
        both(along(&[(1, vec![1.0; n_embd])]), Operation::Offset(1.0)),
    ];
    let compiled = cheapest(&model, list);
    assert!(compiled.choices[0].contains("by callback"), "{:?}", compiled.choices);
    assert!(compiled.choices[1].contains("as a control vector"), "{:?}", compiled.choices);
    let error = layer_vectors(&model, &[(Neuron { layer: 1, index: 1 }, 1.0)], &[]).unwrap_err();
    assert!(error.to_string().contains("normed"), "{error}");
}

/// Runs one token through one layer as the engine does: neurons, `ffn_down`, control vector, directions.
fn block(
    steering: &Steering,
    layer: usize,
    w_down: &[f64],
    activations: &[f64],
    residual: &[f64],
) -> Vec<f64> {
    let apply = |operation: Operation, a: f64| match operation {
        Operation::Offset(offset) => a + f64::from(offset),
        Operation::Assign(value) => f64::from(value),
        Operation::Scale(factor) => a * f64::from(factor),
        Operation::Clamp { min, max } => a.max(f64::from(min)).min(f64::from(max)),
    };
    let mut activations = activations.to_vec();
    for edit in steering.edits.iter().filter(|edit| edit.layer == layer) {
        if let Change::Neuron { index, operation } = edit.change {
            let a = &mut activations[index];
            *a += f64::from(edit.coefficient) * (apply(operation, *a) - *a);
        }
    }
    let n_ff = activations.len();
    let down = w_down.chunks(n_ff).map(|row| row.iter().zip(&activations).map(|(w, a)| w * a).sum::<f64>());
    let mut x: Vec<f64> = residual.iter().zip(down).map(|(r, d)| r + d).collect();
    if let Some(control_vector) = &steering.control_vector {
        let row = &control_vector.rows[(layer - 1) * x.len()..layer * x.len()];
        x.iter_mut().zip(row).for_each(|(x, r)| *x += f64::from(*r));
    }
    for edit in steering.edits.iter().filter(|edit| edit.layer == layer) {
        let Change::Direction { vector, operation } = &edit.change else { continue };
        let vector: Vec<f64> = vector.iter().map(|&v| f64::from(v)).collect();
        let coefficient = f64::from(edit.coefficient);
        let step = if let Operation::Offset(offset) = operation {
            coefficient * f64::from(*offset)
        } else {
            let norm = vector.iter().map(|v| v * v).sum::<f64>().sqrt();
            let c = x.iter().zip(&vector).map(|(x, v)| x * v).sum::<f64>() / norm;
            coefficient * (apply(*operation, c) - c) / norm
        };
        x.iter_mut().zip(&vector).for_each(|(x, v)| *x += step * v);
    }
    x
}

#[test]
fn the_cheapest_way_equals_the_callback_for_every_order_of_edits() {
    let model = model("llama");
    let (n_embd, n_ff) = (model.n_embd().unwrap() as usize, model.n_ff().unwrap() as usize);
    let w_down = f64s(&model, "blk.1.ffn_down.weight");
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut n_moved = 0;
    for round in 0..300 {
        let mut draw = |n: u64| random.next_u64() % n;
        // Few neurons and directions, so that edits often share one.
        let directions: Vec<Vec<f32>> =
            (0..2).map(|_| (0..n_embd).map(|_| draw(201) as f32 / 100.0 - 1.0).collect()).collect();
        let list: Vec<Intervention> = (0..2 + draw(6))
            .map(|_| {
                let x = draw(41) as f32 / 10.0 - 2.0;
                let operation = match draw(7) {
                    0 => Operation::Assign(x),
                    1 => Operation::Scale(x),
                    2 => Operation::Clamp { min: x, max: x + 1.0 },
                    _ => Operation::Offset(x),
                };
                let target = match draw(5) {
                    0 | 1 => neurons(&[(1, draw(2) as u32), (1, 9)]),
                    i => along(&[(1, directions[i as usize % 2].clone())]),
                };
                Intervention::new(target, operation, When::Both, None, draw(4) as f32 / 2.0).unwrap()
            })
            .collect();
        let activations: Vec<f64> = (0..n_ff).map(|_| draw(201) as f64 / 100.0 - 1.0).collect();
        let residual: Vec<f64> = (0..n_embd).map(|_| draw(201) as f64 / 100.0 - 1.0).collect();

        let sources = [source(list)];
        let run = |route| {
            let options = CompileOptions { route, ..Default::default() };
            let steering = compile(&model, &sources, &[], &options).unwrap().steering;
            (block(&steering, 1, &w_down, &activations, &residual), steering)
        };
        let ((cheap, steering), (reference, _)) = (run(Route::Cheapest), run(Route::Callback));
        n_moved += usize::from(steering.control_vector.is_some() && !steering.edits.is_empty());
        let largest = reference.iter().fold(1.0, |largest: f64, x| largest.max(x.abs()));
        for (a, b) in cheap.iter().zip(&reference) {
            // The rows are sums in f32.
            assert!((a - b).abs() < 1e-5 * largest, "round {round}: {a} {b}\n{:?}", sources[0]);
        }
    }
    assert!(n_moved > 100, "only {n_moved} rounds had both a control vector and callback edits");
}

#[test]
fn offsets_stay_where_moving_them_would_change_the_result() {
    let model = model("llama");
    let n_embd = model.n_embd().unwrap() as usize;
    let direction = || along(&[(1, vec![1.0; n_embd]), (2, vec![1.0; n_embd])]);
    let project = |layers| {
        Intervention::new(direction(), Operation::Assign(0.0), When::Both, Some(layers), 1.0).unwrap()
    };
    let offset = || both(direction(), Operation::Offset(1.0));
    // Before the projection of layer 1, both layers' offsets move; after it, only layer 2's does.
    assert_eq!(cheapest(&model, vec![offset(), project((1, 1))]).steering.edits.len(), 1);
    let after = cheapest(&model, vec![project((1, 1)), offset()]);
    assert_eq!(
        after.choices[1],
        "2 direction offsets: 1 as a control vector (layer 2), 1 by callback (layer 1)"
    );
    // The same holds for a control-vector file that follows a projection.
    let file = SteerFile::ControlVector(control_vector(&[(1, vec![1.0; n_embd])]));
    let compiled =
        compile(&model, &[source(vec![project((1, 1))]), (file, 1.0)], &[], &CompileOptions::default())
            .unwrap();
    assert_eq!(compiled.steering.control_vector, None);

    let neuron = || neurons(&[(1, 1)]);
    let (offset, clamp) =
        (both(neuron(), Operation::Offset(1.0)), both(neuron(), Operation::Clamp { min: 0.0, max: 1.0 }));
    let before = cheapest(&model, vec![offset.clone(), clamp.clone()]).steering;
    assert_eq!((before.control_vector, before.edits.len()), (None, 2));
    let after = cheapest(&model, vec![clamp, offset.clone()]).steering;
    assert_eq!((after.control_vector.is_some(), after.edits.len()), (true, 1));
    // An edit of another neuron, or a projection after the neurons, does not prevent the move.
    let other = both(neurons(&[(1, 2)]), Operation::Scale(0.0));
    let free = cheapest(&model, vec![offset, other, project((1, 1))]).steering;
    assert_eq!((free.control_vector.is_some(), free.edits.len()), (true, 2));
}

/// Writes an adapter for `ffn_down` of layer 1 of the tiny llama: rank 2, A all 1, B all 0.5, alpha 4.
fn write_lora(path: &Path, model: &GgufFile) {
    let (n_ff, n_embd) = (u64::from(model.n_ff().unwrap()), u64::from(model.n_embd().unwrap()));
    let mut metadata = Metadata::new();
    for (key, value) in
        [("general.type", "adapter"), ("general.architecture", "llama"), ("adapter.type", "lora")]
    {
        metadata.set(key, Value::Str(value.into()));
    }
    metadata.set("adapter.lora.alpha", Value::F32(4.0));
    let spec = |name: &str, shape| TensorSpec { name: name.into(), shape, tensor_type: TensorType::F32 };
    let specs = vec![
        spec("blk.1.ffn_down.weight.lora_a", vec![n_ff, 2]),
        spec("blk.1.ffn_down.weight.lora_b", vec![2, n_embd]),
    ];
    let mut writer = GgufWriter::create(path, &metadata, specs).unwrap();
    writer.write_f32s(&vec![1.0; 2 * n_ff as usize]).unwrap();
    writer.write_f32s(&vec![0.5; 2 * n_embd as usize]).unwrap();
    writer.finish().unwrap();
}

#[test]
fn an_adapter_on_the_down_projection_changes_the_value_vectors() {
    let model = model("llama");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.gguf");
    write_lora(&path, &model);
    let row = |scale| {
        let loras = [LoraScaled { path: path.clone(), scale }];
        let offset = source(vec![both(neurons(&[(1, 1)]), Operation::Offset(1.0))]);
        let steering = compile(&model, &[offset], &loras, &CompileOptions::default()).unwrap().steering;
        // An adapter with scale 0 is dropped.
        assert_eq!(steering.loras.len(), usize::from(scale != 0.0));
        steering.control_vector.unwrap().rows
    };
    let (without, with) = (row(0.0), row(3.0));
    let n_embd = model.n_embd().unwrap() as usize;
    for o in 0..n_embd {
        // scale * alpha / rank * (B A)[o][1] = 3 * 4 / 2 * (2 * 0.5 * 1) = 6.
        assert!((with[o] - without[o] - 6.0).abs() < 1e-5, "{} {}", with[o], without[o]);
    }
    assert_eq!(with[n_embd..], without[n_embd..]);
}

#[test]
fn layer_vectors_include_layer_0_and_add_up() {
    let model = model("llama");
    let neuron = |layer, index| Neuron { layer, index };
    let offsets = [(neuron(0, 3), 1.0), (neuron(0, 3), 1.0), (neuron(1, 4), 0.0)];
    let vectors = layer_vectors(&model, &offsets, &[]).unwrap();
    assert_eq!(vectors.keys().collect::<Vec<_>>(), [&0]);
    for (found, expected) in vectors[&0].iter().zip(value_vector(&model, 0, 3)) {
        assert!((f64::from(*found) - 2.0 * expected).abs() < 1e-6);
    }
}

#[test]
fn rejects_neurons_that_the_model_does_not_have() {
    let model = model("llama");
    let of = |layer, index| {
        let source = source(vec![both(neurons(&[(layer, index)]), Operation::Offset(1.0))]);
        refusal(&model, &[source], CompileOptions::default())
    };
    assert_eq!(of(3, 0), "steer.json: neuron [3, 0], entry 1: expected a layer below 3");
    let n_ff = model.n_ff().unwrap();
    assert!(of(0, n_ff).contains(&format!("an index below {n_ff}")));
    assert!(layer_vectors(&model, &[(Neuron { layer: 3, index: 0 }, 1.0)], &[]).is_err());
}

#[test]
fn rejects_an_unknown_architecture_only_for_neurons_and_the_callback() {
    // The compiler needs only the model's metadata.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::Str("x".into()));
    for (key, n) in [("block_count", 4), ("embedding_length", 2), ("feed_forward_length", 8)] {
        metadata.set(format!("x.{key}"), Value::U32(n));
    }
    metadata.set("x.nextn_predict_layers", Value::U32(1));
    GgufWriter::create(&path, &metadata, vec![]).unwrap().finish().unwrap();
    let model = GgufFile::open(&path).unwrap();
    let options = CompileOptions::default();

    let file = |layer| SteerFile::ControlVector(control_vector(&[(layer, vec![1.0, 2.0])]));
    let compiled = compile(&model, &[(file(2), 1.0)], &[], &options).unwrap();
    // The last of the four blocks is not part of the trunk, so the rows are for layers 1 and 2.
    assert_eq!(compiled.steering.control_vector.unwrap().rows, [0.0, 0.0, 1.0, 2.0]);
    assert!(refusal(&model, &[(file(3), 1.0)], options).contains("a layer below 3"));

    let by_callback = CompileOptions { route: Route::Callback, ..options };
    let known = "do not support architecture \"x\"";
    assert!(refusal(&model, &[(file(2), 1.0)], by_callback).contains(known));
    let on_neurons = source(vec![both(neurons(&[(0, 0)]), Operation::Offset(0.0))]);
    assert!(refusal(&model, &[on_neurons], options).contains(known));
    let project = source(vec![both(along(&[(1, vec![1.0, 0.0])]), Operation::Assign(0.0))]);
    assert!(refusal(&model, &[project], options).contains(known));
}

#[test]
fn rejects_files_of_another_model() {
    let (plain, quantised, other) = (model("llama"), model("llama-q8_0"), model("gpt2"));
    let fingerprint = Some(Fingerprint::of(&plain).unwrap());
    let list = vec![both(neurons(&[(0, 0)]), Operation::Scale(2.0))];
    let interventions = Interventions { path: "steer.json".into(), fingerprint: fingerprint.clone(), list };
    let mut file = control_vector(&[(1, vec![1.0; plain.n_embd().unwrap() as usize])]);
    file.fingerprint = fingerprint;
    let forced = CompileOptions { force: true, ..Default::default() };
    for source in [SteerFile::Interventions(interventions), SteerFile::ControlVector(file)] {
        let sources = [(source, 1.0)];
        compile(&plain, &sources, &[], &CompileOptions::default()).unwrap();
        assert!(refusal(&quantised, &sources, CompileOptions::default()).contains("quantisation"));
        compile(&quantised, &sources, &[], &forced).unwrap();
        assert!(refusal(&other, &sources, forced).contains("architecture llama"));
    }
}

#[test]
fn rejects_projecting_on_zeros() {
    let model = model("llama");
    let zeros = vec![(1, vec![0.0; model.n_embd().unwrap() as usize])];
    let source = source(vec![both(along(&zeros), Operation::Assign(0.0))]);
    assert!(refusal(&model, &[source], CompileOptions::default()).contains("found only zeros"));
}

#[test]
fn rejects_coefficients_and_sums_that_are_not_finite() {
    let model = model("llama");
    let offset = || source(vec![both(neurons(&[(1, 0)]), Operation::Offset(1e38))]).0;
    assert!(refusal(&model, &[(offset(), f32::NAN)], CompileOptions::default()).contains("finite"));
    let huge = Intervention::new(neurons(&[(1, 0)]), Operation::Scale(1.0), When::Both, None, 1e38).unwrap();
    let (file, _) = source(vec![huge]);
    assert!(refusal(&model, &[(file, 1e38)], CompileOptions::default()).contains("largest f32"));
    let direction = vec![(1, vec![1e30; model.n_embd().unwrap() as usize])];
    let file = || SteerFile::ControlVector(control_vector(&direction));
    for route in [Route::Cheapest, Route::Callback] {
        let options = CompileOptions { route, ..Default::default() };
        assert!(refusal(&model, &[(offset(), 1e38)], options).contains("largest f32"));
        assert!(refusal(&model, &[(file(), 1e30)], options).contains("largest f32"));
    }
    // Each is finite, but the sum is not.
    let offset = || source(vec![both(neurons(&[(1, 0)]), Operation::Offset(3e38))]);
    assert!(refusal(&model, &[offset(), offset()], CompileOptions::default()).contains("largest f32"));
}

#[test]
fn rejects_a_layer_range_without_effect() {
    let model = model("llama");
    let options = CompileOptions { layer_range: Some((2, 2)), ..Default::default() };
    let on_neurons = source(vec![both(neurons(&[(1, 0)]), Operation::Offset(1.0))]);
    assert!(refusal(&model, &[on_neurons], options).contains("expected a control vector to limit"));
    let file = control_vector(&[(1, vec![1.0; model.n_embd().unwrap() as usize])]);
    let sources = [(SteerFile::ControlVector(file), 1.0)];
    assert!(refusal(&model, &sources, options).contains("in layers 2 to 2, found none"));
    let options = CompileOptions { layer_range: Some((1, 1)), ..Default::default() };
    assert!(compile(&model, &sources, &[], &options).unwrap().steering.control_vector.is_some());
}

#[test]
fn rejects_an_adapter_that_does_not_fit() {
    let lora = LoraScaled { path: "gguf/tiny/llama.gguf".into(), scale: 1.0 };
    assert!(compile(&model("llama"), &[], &[lora], &CompileOptions::default()).is_err());
}
