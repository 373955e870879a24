//! Steering a session: the routes agree, undoing leaves nothing behind, and impossible steering is refused.

use std::path::Path;

use detox_gguf::engine::steering::{Change, ControlVector, Edit, LoraScaled, Operation, When};
use detox_gguf::engine::{Model, Session, SessionOptions, Steering, Token};
use detox_gguf::error::Error;
use detox_gguf::gguf::{GgufFile, TensorType};

use super::{exact, open, tiny, tolerance};

const TOKENS: [Token; 9] = [1, 60, 70, 80, 90, 100, 110, 120, 130];

/// Architectures without a norm between the FFN and the residual stream.
const WITHOUT_NORM: [&str; 6] = ["llama", "command-r", "gpt2", "bloom", "qwen2", "qwen3"];

fn neuron(layer: usize, index: usize, operation: Operation) -> Edit {
    Edit { layer, when: When::Both, coefficient: 1.0, change: Change::Neuron { index, operation } }
}

fn edits(edits: &[Edit]) -> Steering {
    Steering { edits: edits.to_vec(), ..Steering::default() }
}

/// Offsets on neurons of the last layer.
fn offsets(model: &Model) -> Vec<(usize, usize, f32)> {
    let last = model.n_layer() - 1;
    vec![(last, 3, 2.0), (last, 40, -3.0), (last, 77, 4.0)]
}

fn by_callback(model: &Model) -> Steering {
    let offsets = offsets(model);
    edits(&offsets.iter().map(|&(l, i, x)| neuron(l, i, Operation::Offset(x))).collect::<Vec<_>>())
}

/// The same offsets as a control vector. This test reads the columns of `ffn_down` itself, without the crate.
fn by_control_vector(model: &Model, name: &str) -> Steering {
    let file = GgufFile::open(tiny(name)).unwrap();
    let n_embd = model.n_embd();
    let mut rows = vec![0f32; n_embd * (model.n_layer() - 1)];
    for (layer, index, offset) in offsets(model) {
        let tensor = file.tensor(&format!("blk.{layer}.ffn_down.weight")).unwrap();
        assert_eq!(tensor.tensor_type(), TensorType::F32);
        let n_ff = tensor.shape()[0] as usize;
        let bytes = file.read_tensor(tensor).unwrap();
        for (i, row) in rows[n_embd * (layer - 1)..][..n_embd].iter_mut().enumerate() {
            let at = 4 * (i * n_ff + index);
            *row += offset * f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        }
    }
    Steering { control_vector: Some(ControlVector { n_embd, rows }), ..Steering::default() }
}

fn logits(model: &Model, steering: Steering) -> Vec<Vec<f32>> {
    let steered = model.with_steering(steering).unwrap();
    Session::open(&steered, &exact(1), 64).unwrap().logits(&TOKENS).unwrap()
}

fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn an_offset_by_callback_and_by_control_vector_gives_the_same_logits() {
    for name in WITHOUT_NORM {
        let model = open(name);
        let plain = logits(&model, Steering::default());
        let callback = logits(&model, by_callback(&model));
        let vector = logits(&model, by_control_vector(&model, name));
        assert!(largest_difference(&plain, &callback) > 1.0, "{name}: the offsets have an effect");
        let difference = largest_difference(&callback, &vector);
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn with_a_norm_after_the_ffn_a_control_vector_differs_from_the_callback() {
    let model = open("gemma3");
    let callback = logits(&model, by_callback(&model));
    let vector = logits(&model, by_control_vector(&model, "gemma3"));
    assert!(largest_difference(&callback, &vector) > 0.1);
}

#[test]
fn steering_without_effect_gives_the_bits_of_an_unsteered_run() {
    for name in ["llama", "gemma3", "llama-q8_0"] {
        let model = open(name);
        let plain = logits(&model, Steering::default());
        let n_embd = model.n_embd();
        let zeros = ControlVector { n_embd, rows: vec![0.0; n_embd * (model.n_layer() - 1)] };
        assert_eq!(plain, logits(&model, Steering { control_vector: Some(zeros), ..Steering::default() }));
        assert_eq!(plain, logits(&model, edits(&[neuron(0, 5, Operation::Offset(0.0))])), "{name}");
        assert_eq!(plain, logits(&model, edits(&[neuron(1, 5, Operation::Scale(1.0))])), "{name}");
        // Only the callback, with nothing to do.
        let mut session = Session::open_with_callback(&model, &exact(1), 64).unwrap();
        assert_eq!(plain, session.logits(&TOKENS).unwrap(), "{name}");
    }
}

#[test]
fn a_thousand_changes_of_steering_between_decodes_leave_nothing_behind() {
    for name in ["llama", "gemma3"] {
        let model = open(name);
        let mut session = Session::open_with_callback(&model, &exact(1), 64).unwrap();
        let none = model.load_steering(Steering::default()).unwrap();
        let before = session.logits(&TOKENS).unwrap();
        // Rounds 14 apart have the same steering, so their logits have the same bits.
        let mut first: Vec<Option<Vec<Vec<f32>>>> = vec![None; 14];
        for round in 0..1000 {
            let coefficient = (round % 7) as f32 - 3.0;
            let mut steering = by_callback(&model);
            steering.edits.iter_mut().for_each(|edit| edit.coefficient = coefficient);
            if round % 2 == 0 {
                let n_embd = model.n_embd();
                let rows = vec![0.01 * coefficient; n_embd * (model.n_layer() - 1)];
                steering.control_vector = Some(ControlVector { n_embd, rows });
            }
            session.steer(&model.load_steering(steering).unwrap()).unwrap();
            let logits = session.logits(&TOKENS[..3]).unwrap();
            assert_eq!(first[round % 14].get_or_insert(logits.clone()), &logits, "{name}, round {round}");
        }
        // The coefficient is 0 in round 3 (no control vector) and in round 10 (one of zeros). The rest differ.
        assert_eq!(first[3], first[10], "{name}");
        let different: std::collections::HashSet<String> = first.iter().map(|l| format!("{l:?}")).collect();
        assert_eq!(different.len(), 13, "{name}");
        session.steer(&none).unwrap();
        assert_eq!(before, session.logits(&TOKENS).unwrap(), "{name}");
    }
}

#[test]
fn steered_and_exempt_sequences_of_one_batch_equal_their_separate_runs() {
    for name in ["llama", "command-r", "gpt2", "bloom", "gemma3", "qwen2", "qwen3"] {
        let model = open(name);
        let all_layers: Vec<Edit> = (0..model.n_layer())
            .flat_map(|il| {
                let vector = (0..model.n_embd()).map(|i| if i % 3 == 0 { 0.5 } else { -0.25 }).collect();
                let direction = Change::Direction { vector, operation: Operation::Offset(1.0) };
                [
                    neuron(il, 7, Operation::Offset(3.0)),
                    Edit { layer: il, when: When::Both, coefficient: 1.0, change: direction },
                ]
            })
            .collect();
        let steered = model.with_steering(edits(&all_layers)).unwrap();
        let alone = |model: &Model, tokens: &[Token]| {
            Session::open(model, &exact(1), 64).unwrap().logits(tokens).unwrap()
        };
        // Different lengths and micro-batches of 4 mix up the order of rows and tokens.
        let options = SessionOptions { n_ubatch: 4, ..exact(2) };
        let mut session = Session::open(&steered, &options, 64).unwrap();
        session.set_exempt(1, true).unwrap();
        let sequences: [&[Token]; 3] = [&TOKENS, &TOKENS[..5], &TOKENS[2..]];
        let found = session.logits_of_each(&sequences).unwrap();
        assert!(largest_difference(&alone(&steered, sequences[1]), &alone(&model, sequences[1])) > 0.5);
        for (i, (found, tokens)) in found.iter().zip(sequences).enumerate() {
            let expected = alone(if i == 1 { &model } else { &steered }, tokens);
            let difference = largest_difference(found, &expected);
            assert!(difference < tolerance(name), "{name}, sequence {i}: {difference}");
        }
        session.set_exempt(1, false).unwrap();
        let found = session.logits_of_each(&sequences).unwrap();
        let difference = largest_difference(&found[1], &alone(&steered, sequences[1]));
        assert!(difference < tolerance(name), "{name}: {difference}");
    }
}

#[test]
fn edits_of_prompts_or_continuations_apply_to_those_tokens_only() {
    use detox_gguf::engine::logprob::{self, Request};
    let model = open("llama");
    let request = |prompt: &[Token]| Request {
        id: "p".into(),
        prompt: prompt.to_vec(),
        continuations: vec![TOKENS[4..].to_vec()],
    };
    let score = |when: Option<When>| {
        let of_layer_0 = |when| Edit { when, ..neuron(0, 9, Operation::Offset(6.0)) };
        let steered =
            model.with_steering(edits(&when.map(of_layer_0).into_iter().collect::<Vec<_>>())).unwrap();
        let mut session = Session::open(&steered, &exact(1), 64).unwrap();
        logprob::score(&mut session, &[request(&TOKENS[..4])], &super::uninterrupted()).unwrap()[0][0].clone()
    };
    let (plain, prompt) = (score(None), score(Some(When::Prompt)));
    let (generation, both) = (score(Some(When::Generation)), score(Some(When::Both)));
    // The first token is predicted from the last token of the prompt.
    assert_eq!(plain[0], generation[0]);
    assert_eq!(prompt[0], both[0]);
    assert_ne!(plain[0], prompt[0]);
    for (a, b) in [(&plain, &generation), (&prompt, &both), (&plain, &prompt), (&generation, &both)] {
        assert!(a[1..].iter().zip(&b[1..]).all(|(a, b)| a != b));
    }
}

fn refusal(model: &Model, steering: Steering) -> String {
    match model.load_steering(steering) {
        Err(error @ Error::Model { .. }) => error.to_string(),
        other => panic!("expected a refusal, found {other:?}"),
    }
}

#[test]
fn rejects_edits_that_do_not_fit_the_model() {
    let model = open("llama");
    let direction = |vector: Vec<f32>| Edit {
        layer: 0,
        when: When::Both,
        coefficient: 1.0,
        change: Change::Direction { vector, operation: Operation::Offset(1.0) },
    };
    for (edit, reason) in [
        (neuron(3, 0, Operation::Offset(1.0)), "layer 3"),
        (neuron(0, 96, Operation::Offset(1.0)), "neuron 96"),
        (neuron(0, 0, Operation::Offset(f32::NAN)), "finite"),
        (neuron(0, 0, Operation::Clamp { min: 1.0, max: 0.0 }), "finite"),
        (Edit { coefficient: f32::INFINITY, ..neuron(0, 0, Operation::Assign(1.0)) }, "finite"),
        (direction(vec![1.0; 63]), "64 values, found 63"),
        (direction(vec![0.0; 64]), "zero"),
        (direction(vec![f32::NAN; 64]), "NaN"),
    ] {
        let message = refusal(&model, edits(&[edit]));
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn rejects_control_vectors_of_another_shape_and_files_that_are_not_adapters() {
    let model = open("llama");
    let vector = |n_embd: usize, rows: Vec<f32>| Steering {
        control_vector: Some(ControlVector { n_embd, rows }),
        ..Steering::default()
    };
    assert!(refusal(&model, vector(64, vec![0.0; 64])).contains("2 rows of 64"));
    assert!(refusal(&model, vector(32, vec![0.0; 128])).contains("rows of 32"));
    assert!(refusal(&model, vector(64, vec![f32::NAN; 128])).contains("NaN"));
    let lora = |path: &Path, scale: f32| Steering {
        loras: vec![LoraScaled { path: path.to_path_buf(), scale }],
        ..Steering::default()
    };
    assert!(refusal(&model, lora(&tiny("gpt2"), 1.0)).contains("LoRA"));
    assert!(refusal(&model, lora(&tiny("gpt2"), f32::NAN)).contains("finite"));
}

#[test]
fn rejects_steering_for_another_model_and_edits_without_the_callback() {
    let (model, other) = (open("llama"), open("llama"));
    let mut session = Session::open(&model, &exact(1), 64).unwrap();
    let of_other = other.load_steering(Steering::default()).unwrap();
    assert!(session.steer(&of_other).unwrap_err().to_string().contains("another model"));
    let with_edits = model.load_steering(by_callback(&model)).unwrap();
    assert!(session.steer(&with_edits).unwrap_err().to_string().contains("callback"));
    assert!(session.set_exempt(1, true).unwrap_err().to_string().contains("callback"));
    let mut session = Session::open_with_callback(&model, &exact(1), 64).unwrap();
    assert!(session.set_exempt(2, true).unwrap_err().to_string().contains("0 to 1"));
    session.steer(&model.load_steering(by_control_vector(&model, "llama")).unwrap()).unwrap();
    assert!(session.set_exempt(1, true).unwrap_err().to_string().contains("all sequences"));
    session.steer(&model.load_steering(Steering::default()).unwrap()).unwrap();
    session.set_exempt(1, true).unwrap();
    let vector = model.load_steering(by_control_vector(&model, "llama")).unwrap();
    assert!(session.steer(&vector).unwrap_err().to_string().contains("all sequences"));
}
