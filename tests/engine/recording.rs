//! What the eval callback records equals PyTorch's forward hooks (`scripts/make_tiny_models.py`).

use detox_gguf::engine::Session;
use detox_gguf::engine::residual::{self, ResidualPlace};
use serde::Deserialize;

use super::{exact, go_on, golden, open, tolerance};

#[derive(Deserialize)]
struct Activations {
    prompt: Prompt,
    /// `[n_layer][n_tokens][n_embd]`
    residual_stream: Vec<Vec<Vec<f32>>>,
}

#[derive(Deserialize)]
struct Prompt {
    tokens: Vec<i32>,
}

#[test]
fn mean_residual_streams_after_every_block_equal_the_reference() {
    for name in ["llama", "command-r", "gpt2", "bloom", "gemma3", "qwen2", "qwen3"] {
        let golden: Activations = golden(&format!("{name}_activations"));
        let model = open(name);
        let mut session = Session::open_with_callback(&model, &exact(2), 64).unwrap();
        let places: Vec<ResidualPlace> = (0..model.n_layer()).map(ResidualPlace::AfterBlock).collect();
        let tokens = golden.prompt.tokens;
        // Twice the whole, in one batch; and the first two tokens between them.
        let texts = [tokens.clone(), tokens[..2].to_vec(), tokens.clone()];
        let found = residual::record(&mut session, &texts, &places, &go_on(), |_| {}).unwrap();
        for (found, n_tokens) in found.iter().zip([tokens.len(), 2, tokens.len()]) {
            for (found, expected) in found.iter().zip(&golden.residual_stream) {
                for (i, found) in found.iter().enumerate() {
                    let expected: f32 =
                        expected[..n_tokens].iter().map(|row| row[i]).sum::<f32>() / n_tokens as f32;
                    assert!((found - expected).abs() < tolerance(name), "{name}: {found} {expected}");
                }
            }
        }
    }
}
