//! Projects vectors of the residual stream to the tokens they promote.
//!
//! The projection is onto the output matrix (the paper, section 4.2; Geva et al. 2022).

use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::{Array2, ArrayView2, Axis};

use crate::engine::Token;
use crate::error::{Error, Result};
use crate::gguf::{self, GgufFile};

/// A token and the amount that a vector adds to its logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogit {
    /// The token.
    pub token: Token,
    /// Dot product of the token's row of the output matrix with the vector. As in the paper, without a norm.
    pub logit: f32,
}

/// Values to dequantise at a time: 16 MiB.
const CHUNK_VALUES: usize = 4 << 20;

/// Finds the `top` tokens of each vector, strongest first, shape `[n][top]`.
///
/// `vectors` has shape `[n][n_embd]`. The output matrix is streamed. If the model has none, its token
/// embeddings are used, which llama.cpp then shares with the output.
///
/// # Errors
/// [`Error::Setting`] for a vector whose length is not `n_embd`; [`Error::Gguf`] if the model has neither
/// matrix, or one of the wrong shape; [`Error::Io`]; [`Error::Interrupted`].
pub fn project(
    model: &GgufFile,
    vectors: &[Vec<f32>],
    top: usize,
    interrupt: &AtomicBool,
) -> Result<Vec<Vec<TokenLogit>>> {
    let n_embd = model.n_embd()? as usize;
    let refuse = |reason: String| Error::gguf(model.path(), reason);
    let tensor = model.tensor("output.weight").or_else(|| model.tensor("token_embd.weight"));
    let tensor = tensor.ok_or_else(|| {
        refuse("expected a tensor \"output.weight\" or \"token_embd.weight\", found neither".into())
    })?;
    if tensor.shape().len() != 2 || tensor.shape()[0] != n_embd as u64 {
        let (name, found) = (tensor.name(), tensor.shape());
        return Err(refuse(format!(
            "tensor {name:?}: expected rows of {n_embd} numbers, found shape {found:?}"
        )));
    }
    let n_vocab = tensor.shape()[1] as usize;
    if let Some(vector) = vectors.iter().find(|vector| vector.len() != n_embd) {
        let reason = format!("expected vectors of {n_embd} numbers, found one of {}", vector.len());
        return Err(Error::setting("vectors", reason));
    }
    let flat: Vec<f32> = vectors.iter().flatten().copied().collect();
    let vectors = Array2::from_shape_vec((vectors.len(), n_embd), flat)
        .expect("every vector has n_embd numbers, as checked above");
    let n_rows = (CHUNK_VALUES / n_embd).clamp(1, n_vocab);
    let mut bytes = vec![0; n_rows * tensor.row_bytes() as usize];
    let mut values = vec![0f32; n_rows * n_embd];
    let mut best: Vec<Vec<TokenLogit>> = vec![Vec::new(); vectors.nrows()];
    for first in (0..n_vocab).step_by(n_rows) {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let n_rows = n_rows.min(n_vocab - first);
        let bytes = &mut bytes[..n_rows * tensor.row_bytes() as usize];
        let values = &mut values[..n_rows * n_embd];
        model.read_tensor_at(tensor, first as u64 * tensor.row_bytes(), bytes)?;
        gguf::dequantize(tensor.tensor_type(), bytes, values)
            .map_err(|reason| refuse(format!("tensor {:?}: {reason}", tensor.name())))?;
        let rows = ArrayView2::from_shape((n_rows, n_embd), values).expect("as many values as the shape has");
        // [n_rows][n_vectors]
        let logits = rows.dot(&vectors.t());
        for (best, of_vector) in best.iter_mut().zip(logits.axis_iter(Axis(1))) {
            if let Some((row, &found)) = of_vector.iter().enumerate().find(|(_, logit)| !logit.is_finite()) {
                return Err(Error::not_finite(format!("the projection on token {}", first + row), found));
            }
            let tokens = of_vector.iter().enumerate();
            best.extend(tokens.map(|(i, &logit)| TokenLogit { token: (first + i) as Token, logit }));
            keep_best(best, top);
        }
    }
    Ok(best)
}

fn keep_best(tokens: &mut Vec<TokenLogit>, top: usize) {
    let order = |a: &TokenLogit, b: &TokenLogit| b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token));
    if tokens.len() > top {
        tokens.select_nth_unstable_by(top, order);
        tokens.truncate(top);
    }
    tokens.sort_unstable_by(order);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projecting_a_tokens_row_finds_that_token_with_and_without_an_output_matrix() {
        for name in ["llama", "command-r"] {
            let path = format!("{}/gguf/tiny/{name}.gguf", env!("CARGO_MANIFEST_DIR"));
            let model = GgufFile::open(path).unwrap();
            let tensor = model.tensor("output.weight").or(model.tensor("token_embd.weight")).unwrap();
            assert_eq!(tensor.name() == "token_embd.weight", name == "command-r");
            let bytes = model.read_tensor(tensor).unwrap();
            let mut values = vec![0f32; tensor.n_elements() as usize];
            gguf::dequantize(tensor.tensor_type(), &bytes, &mut values).unwrap();
            let row = |token: usize| values[token * 64..(token + 1) * 64].to_vec();
            let found = project(&model, &[row(100), row(300)], 3, &AtomicBool::new(false)).unwrap();
            for (token, found) in [100, 300].into_iter().zip(found) {
                assert_eq!(found.len(), 3);
                let expected: f32 = row(token).iter().map(|x| x * x).sum();
                let own = found.iter().find(|t| t.token == token as Token).unwrap();
                assert!((own.logit - expected).abs() < 1e-3 * expected, "{name}: {} {expected}", own.logit);
                assert!(found[0].logit >= found[1].logit && found[1].logit >= found[2].logit);
            }
        }
    }
}
