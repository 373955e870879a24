//! Value vectors: what each FFN neuron writes to the residual stream, a column of `ffn_down`.
//!
//! `blk.N.ffn_down.weight` has shape `[n_ff, n_embd]`, and its quantisation blocks run along `n_ff`. A value
//! vector is therefore a column that crosses one quantisation block of each row.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::gguf::{self, GgufFile, TensorInfo};
use crate::graph::steering::LoraScaled;
use crate::steer::lora;

/// The down projections of a model whose blocks all have a dense FFN.
#[derive(Debug)]
pub struct ValueVectors<'a> {
    file: &'a GgufFile,
    n_embd: usize,
    /// `ffn_down` of each block, `[n_layer]`.
    tensors: Vec<&'a TensorInfo>,
}

impl<'a> ValueVectors<'a> {
    /// Finds the down projection of every block.
    ///
    /// # Errors
    /// [`Error::Model`] for a mixture of experts, whose neurons (layer, index) does not identify;
    /// [`Error::Gguf`] if a block has no down projection of the expected shape.
    pub fn open(file: &'a GgufFile) -> Result<ValueVectors<'a>> {
        let (n_layer, n_embd) = (file.n_layer()? as usize, u64::from(file.n_embd()?));
        let n_ff = file.n_ff_per_layer()?;
        let tensors = (0..n_layer).map(|il| {
            let name = tensor_name(il);
            if let Some(expert) = file.tensor(&format!("blk.{il}.ffn_down_exps.weight")) {
                return Err(Error::model(
                    file.path(),
                    format!(
                        "expected a dense FFN in every layer, found a mixture of experts ({}), whose neurons \
                         cannot be steered",
                        expert.name()
                    ),
                ));
            }
            let expected = [u64::from(n_ff.get(il).copied().unwrap_or(0)), n_embd];
            match file.tensor(&name) {
                Some(tensor) if tensor.shape() == expected => Ok(tensor),
                found => {
                    let found = found.map_or("nothing".into(), |tensor| format!("{:?}", tensor.shape()));
                    Err(Error::gguf(
                        file.path(),
                        format!("tensor {name:?}: expected shape {expected:?}, found {found}"),
                    ))
                }
            }
        });
        let tensors = tensors.collect::<Result<_>>()?;
        Ok(ValueVectors { file, n_embd: n_embd as usize, tensors })
    }

    /// Number of blocks.
    pub fn n_layer(&self) -> usize {
        self.tensors.len()
    }

    /// Width of the residual stream, which is the length of a value vector.
    pub fn n_embd(&self) -> usize {
        self.n_embd
    }

    /// Number of neurons, and so of value vectors, in a block.
    pub fn n_ff(&self, layer: usize) -> usize {
        self.tensors[layer].shape()[0] as usize
    }

    /// Sums value vectors of a block, each times its weight, shape `[n_embd]`.
    ///
    /// `weights` are pairs of neuron index and weight. Only the quantisation blocks that contain these
    /// columns are read.
    ///
    /// # Errors
    /// [`Error::Setting`] for a neuron that the model does not have; [`Error::Io`]; [`Error::Gguf`] for a
    /// tensor type that cannot be dequantised.
    pub fn weighted_sum(&self, layer: usize, weights: &[(usize, f32)]) -> Result<Vec<f32>> {
        self.weighted_sum_with_loras(layer, weights, &[])
    }

    /// As [`ValueVectors::weighted_sum`], with LoRA adapters applied to `ffn_down`.
    ///
    /// The matrix is `W + scale * alpha / rank * B A`, summed over the adapters that contain this tensor.
    /// The adapters must have passed [`super::lora::check`].
    ///
    /// # Errors
    /// Those of [`ValueVectors::weighted_sum`], and those of reading an adapter.
    pub fn weighted_sum_with_loras(
        &self,
        layer: usize,
        weights: &[(usize, f32)],
        loras: &[LoraScaled],
    ) -> Result<Vec<f32>> {
        let Some(&tensor) = self.tensors.get(layer) else {
            let reason = format!("expected a layer below {}, found {layer}", self.n_layer());
            return Err(Error::setting("--neurons", reason));
        };
        let n_ff = self.n_ff(layer);
        if let Some((index, _)) = weights.iter().find(|(index, _)| *index >= n_ff) {
            let reason = format!("expected an index below {n_ff} in layer {layer}, found {index}");
            return Err(Error::setting("--neurons", reason));
        }
        let mut sum = vec![0f64; self.n_embd];
        let block_len = tensor.tensor_type().block_len() as usize;
        let block_bytes = tensor.tensor_type().block_bytes();
        // Columns that share a quantisation block are read together: block -> its columns and their weights.
        let mut blocks: BTreeMap<usize, Vec<(usize, f64)>> = BTreeMap::new();
        for &(index, weight) in weights {
            blocks.entry(index / block_len).or_default().push((index % block_len, f64::from(weight)));
        }
        let mut bytes = vec![0; block_bytes as usize];
        let mut values = vec![0f32; block_len];
        for (row, sum) in sum.iter_mut().enumerate() {
            for (block, columns) in &blocks {
                let offset = row as u64 * tensor.row_bytes() + *block as u64 * block_bytes;
                self.file.read_tensor_at(tensor, offset, &mut bytes)?;
                dequantize(self.file, tensor, &bytes, &mut values)?;
                *sum += columns.iter().map(|&(at, weight)| weight * f64::from(values[at])).sum::<f64>();
            }
        }
        for lora in loras {
            add_lora(lora, layer, weights, &mut sum)?;
        }
        Ok(sum.into_iter().map(|x| x as f32).collect())
    }

    /// Streams the rows of a block's down projection through `each`, in order.
    ///
    /// `each` gets the index of the first row and values of shape `[n_rows][n_ff]`. At most `most_values`
    /// values are in memory at a time, but at least one row.
    ///
    /// # Errors
    /// Those of [`ValueVectors::weighted_sum`] and of `each`.
    pub fn for_each_rows(
        &self,
        layer: usize,
        most_values: usize,
        mut each: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let tensor = self.tensors[layer];
        let n_ff = self.n_ff(layer);
        let n_rows = (most_values / n_ff).clamp(1, self.n_embd);
        let mut bytes = vec![0; n_rows * tensor.row_bytes() as usize];
        let mut values = vec![0f32; n_rows * n_ff];
        for first in (0..self.n_embd).step_by(n_rows) {
            let n_rows = n_rows.min(self.n_embd - first);
            let bytes = &mut bytes[..n_rows * tensor.row_bytes() as usize];
            let values = &mut values[..n_rows * n_ff];
            self.file.read_tensor_at(tensor, first as u64 * tensor.row_bytes(), bytes)?;
            dequantize(self.file, tensor, bytes, values)?;
            each(first, values)?;
        }
        Ok(())
    }
}

fn tensor_name(layer: usize) -> String {
    format!("blk.{layer}.ffn_down.weight")
}

/// Adds an adapter's contribution to the columns: `scale * B A[:, index]`.
fn add_lora(adapter: &LoraScaled, layer: usize, weights: &[(usize, f32)], sum: &mut [f64]) -> Result<()> {
    let file = GgufFile::open(&adapter.path)?;
    let name = tensor_name(layer);
    let pair = (file.tensor(&lora::a_name(&name)), file.tensor(&lora::b_name(&name)));
    let (Some(a), Some(b)) = pair else { return Ok(()) };
    // A is [n_ff, rank], B is [rank, n_embd].
    let (n_ff, rank) = (a.shape()[0] as usize, b.shape()[0] as usize);
    let (a, b) = (numbers(&file, a)?, numbers(&file, b)?);
    let scale: f64 = lora::scale(adapter.scale, lora::alpha(&file)?, rank);
    let inner: Vec<f64> = (0..rank)
        .map(|r| weights.iter().map(|&(i, w)| f64::from(w) * f64::from(a[r * n_ff + i])).sum())
        .collect();
    for (sum, row) in sum.iter_mut().zip(b.chunks_exact(rank)) {
        *sum += scale * row.iter().zip(&inner).map(|(&b, inner)| f64::from(b) * inner).sum::<f64>();
    }
    Ok(())
}

fn numbers(file: &GgufFile, tensor: &TensorInfo) -> Result<Vec<f32>> {
    let mut values = vec![0.0; tensor.n_elements() as usize];
    dequantize(file, tensor, &file.read_tensor(tensor)?, &mut values)?;
    Ok(values)
}

fn dequantize(file: &GgufFile, tensor: &TensorInfo, bytes: &[u8], values: &mut [f32]) -> Result<()> {
    #[cfg(not(feature = "engine"))]
    if !gguf::can_dequantize(tensor.tensor_type()) {
        return Err(Error::model(
            file.path(),
            format!(
                "tensor {:?}: this build does not include llama.cpp and cannot read type {}",
                tensor.name(),
                tensor.tensor_type()
            ),
        )
        .with_hint(
            "steer by the callback alone, which needs no weights (Route::Callback, DETOX_ROUTE_CALLBACK)",
        ));
    }
    gguf::dequantize(tensor.tensor_type(), bytes, values)
        .map_err(|reason| Error::gguf(file.path(), format!("tensor {:?}: {reason}", tensor.name())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny(name: &str) -> GgufFile {
        GgufFile::open(format!("{}/gguf/tiny/{name}.gguf", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    #[test]
    fn a_weighted_sum_adds_the_columns_times_their_weights() {
        for name in ["llama", "gpt2", "llama-q8_0"] {
            let file = tiny(name);
            let vectors = ValueVectors::open(&file).unwrap();
            let n_ff = vectors.n_ff(1);
            let weights = [(0, 2.0), (n_ff - 1, -1.0), (33, 0.5)];
            let mut expected = vec![0f32; vectors.n_embd()];
            vectors
                .for_each_rows(1, 5 * n_ff, |first, values| {
                    for (i, row) in values.chunks_exact(n_ff).enumerate() {
                        expected[first + i] = weights.iter().map(|&(column, w)| w * row[column]).sum();
                    }
                    Ok(())
                })
                .unwrap();
            assert!(expected.iter().all(|&x| x != 0.0));
            let found = vectors.weighted_sum(1, &weights).unwrap();
            for (a, b) in found.iter().zip(&expected) {
                assert!((a - b).abs() < 1e-6, "{name}: {a} {b}");
            }
        }
    }

    #[cfg(not(feature = "engine"))]
    #[test]
    fn rejects_types_that_need_ggml_and_suggests_the_callback() {
        use crate::gguf::{GgufWriter, Metadata, TensorSpec, TensorType, Value};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", Value::Str("llama".into()));
        for (key, n) in [("block_count", 1), ("embedding_length", 2), ("feed_forward_length", 256)] {
            metadata.set(format!("llama.{key}"), Value::U32(n));
        }
        let (name, shape) = ("blk.0.ffn_down.weight".to_owned(), vec![256, 2]);
        let spec = TensorSpec { name, shape, tensor_type: TensorType::IQ3_S };
        let mut writer = GgufWriter::create(&path, &metadata, vec![spec]).unwrap();
        writer.write(&[0; 2 * 110]).unwrap();
        writer.finish().unwrap();
        let file = GgufFile::open(&path).unwrap();
        let error = ValueVectors::open(&file).unwrap().weighted_sum(0, &[(3, 1.0)]).unwrap_err();
        assert!(error.to_string().contains("iq3_s"), "{error}");
        assert!(error.hint().unwrap().contains("DETOX_ROUTE_CALLBACK"));
    }

    #[test]
    fn rejects_neurons_that_the_model_does_not_have() {
        let file = tiny("llama");
        let vectors = ValueVectors::open(&file).unwrap();
        assert!(vectors.weighted_sum(3, &[]).unwrap_err().to_string().contains("below 3"));
        assert!(vectors.weighted_sum(0, &[(96, 1.0)]).unwrap_err().to_string().contains("below 96"));
    }
}
