//! Values recorded by the eval callback equal those of PyTorch's forward hooks (`scripts/make_tiny_models.py`).

use detox_gguf::engine::residual::{self, ResidualPlace};
use detox_gguf::engine::schedule::Request;
use detox_gguf::engine::{Session, Token, activation};
use serde::Deserialize;

use super::{exact, golden, open, tolerance, uninterrupted};

/// The models in F32.
const MODELS: [&str; 7] = ["llama", "command-r", "gpt2", "bloom", "gemma3", "qwen2", "qwen3"];

#[derive(Deserialize)]
struct Activations {
    prompt: Prompt,
    /// `[n_layer][n_tokens][n_embd]`
    residual_stream: Vec<Vec<Vec<f32>>>,
    /// `[n_layer][n_tokens][n_ff]`
    neuron_activations: Vec<Vec<Vec<f32>>>,
}

#[derive(Deserialize)]
struct Prompt {
    tokens: Vec<Token>,
}

/// As [`tolerance`]; products with Q8_0 weights round activations to 8 bits.
fn bound(name: &str) -> f32 {
    if name == "llama-q8_0" { 0.3 } else { tolerance(name) }
}

#[test]
fn residual_streams_after_every_block_equal_the_reference_at_every_token() {
    for name in MODELS.into_iter().chain(["llama-q8_0"]) {
        let golden: Activations = golden(&format!("{name}_activations"));
        let model = open(name);
        let places: Vec<ResidualPlace> = (0..model.n_layer()).map(ResidualPlace::AfterBlock).collect();
        let tokens = golden.prompt.tokens;
        // The values of each token follow from the means over the first 1, 2, … tokens. Several texts share a batch.
        let texts: Vec<Vec<Token>> = (1..=tokens.len()).map(|n| tokens[..n].to_vec()).collect();
        let mut session = Session::open_with_callback(&model, &exact(3), 64).unwrap();
        let means = residual::record(&mut session, &texts, &places, &uninterrupted(), |_| {}).unwrap();
        for (il, of_layer) in golden.residual_stream.iter().enumerate() {
            assert_eq!(of_layer.len(), tokens.len());
            for (t, expected) in of_layer.iter().enumerate() {
                let sum_before = |i: usize| if t == 0 { 0.0 } else { t as f32 * means[t - 1][il][i] };
                let found = |i: usize| (t + 1) as f32 * means[t][il][i] - sum_before(i);
                let worst = (0..model.n_embd()).map(|i| (found(i) - expected[i]).abs()).fold(0.0, f32::max);
                assert!(worst < bound(name), "{name}, layer {il}, token {t}: {worst}");
            }
        }
    }
}

#[test]
fn activations_of_every_neuron_equal_the_reference_at_every_token() {
    for name in MODELS.into_iter().chain(["llama-q8_0"]) {
        let golden: Activations = golden(&format!("{name}_activations"));
        let model = open(name);
        let neurons: Vec<(usize, usize)> =
            model.n_ff().iter().enumerate().flat_map(|(il, &n_ff)| (0..n_ff).map(move |i| (il, i))).collect();
        let tokens = golden.prompt.tokens;
        // One step reads the last token of a prompt, so every prefix of the text is one prompt.
        let requests: Vec<Request> =
            (1..=tokens.len()).map(|n| Request { id: n.to_string(), tokens: tokens[..n].to_vec() }).collect();
        let mut session = Session::open_with_callback(&model, &exact(2), 64).unwrap();
        let found =
            activation::record(&mut session, &requests, &neurons, 1, &uninterrupted(), |_| {}).unwrap();
        for (t, found) in found.iter().enumerate() {
            assert_eq!(found.mean.len(), golden.neuron_activations.iter().map(|l| l[t].len()).sum::<usize>());
            for (&(il, i), a) in neurons.iter().zip(&found.mean) {
                let expected = golden.neuron_activations[il][t][i];
                assert!(
                    (a - expected).abs() < bound(name),
                    "{name}, neuron {il} {i}, token {t}: {a} {expected}"
                );
            }
        }
    }
}

#[derive(Deserialize)]
struct Sentences {
    texts: Vec<Text>,
    /// `[n_texts][n_layer + 1][n_embd]`
    residual_stream_mean: Vec<Vec<Vec<f32>>>,
    neurons: Vec<(usize, usize)>,
    activations: Vec<Greedy>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    tokens: Vec<Token>,
}

#[derive(Deserialize)]
struct Greedy {
    tokens: Vec<Token>,
    greedy: Vec<Token>,
    mean: Vec<f32>,
}

#[test]
fn mean_residual_streams_and_activations_of_sentences_equal_the_reference() {
    for name in MODELS {
        let golden: Sentences = golden(&format!("{name}_sentences"));
        let model = open(name);
        // As in Hugging Face's `hidden_states`, the final norm's output replaces the last block's.
        let mut places = ResidualPlace::all(model.n_layer());
        places.remove(model.n_layer());
        let texts: Vec<Vec<Token>> =
            golden.texts.iter().map(|t| model.tokenize_prompt(&t.text).unwrap()).collect();
        assert!(texts.iter().zip(&golden.texts).all(|(found, t)| *found == t.tokens), "{name}");
        let mut session = Session::open_with_callback(&model, &exact(2), 64).unwrap();
        let found = residual::record(&mut session, &texts, &places, &uninterrupted(), |_| {}).unwrap();
        for (found, expected) in found.iter().flatten().zip(golden.residual_stream_mean.iter().flatten()) {
            let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < tolerance(name), "{name}: {worst}");
        }
        let request = |(i, a): (usize, &Greedy)| Request { id: i.to_string(), tokens: a.tokens.clone() };
        let requests: Vec<Request> = golden.activations.iter().enumerate().map(request).collect();
        let n = golden.activations[0].greedy.len();
        let found = activation::record(&mut session, &requests, &golden.neurons, n, &uninterrupted(), |_| {})
            .unwrap();
        for (found, expected) in found.iter().zip(&golden.activations) {
            assert_eq!(found.tokens, expected.greedy, "{name}");
            for (a, b) in found.mean.iter().zip(&expected.mean) {
                assert!((a - b).abs() < tolerance(name), "{name}: {a} {b}");
            }
        }
    }
}
