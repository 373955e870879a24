//! A copy of a model with adapters inside: W + scale * alpha / rank * B A, in each tensor's own type.
//!
//! Tensors are read, changed and written in chunks of rows, several at once: memory holds the adapters and a
//! few MiB a thread, whatever the size of the model. No 16-bit copy is made on the way.
//!
//! Weights are rounded to nearest. A change far below a step of the blocks is mostly lost that way, and the
//! report says how much; rounding that is right on average (stochastic) was left out: on a matrix of a real model,
//! with a change made of synthetic gradients, it kept all of the change, but added more to the products with real
//! inputs than nearest missed, at every size that was tried.

use std::ops::Range;
use std::path::Path;

use ndarray::ArrayView2;
use ndarray::linalg::general_mat_mul;
use rayon::prelude::*;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::gguf::blocks::{dequantize, quantize};
use crate::gguf::{GgufFile, GgufWriter, Metadata, TensorInfo, TensorSpec, TensorType, Value};
use crate::steer::bake::check_output;
use crate::train::output::adapter::{Adapter, Factors};

/// Weights of a chunk, at least; a row is never cut. Six numbers of 4 bytes are kept for each: 6 MiB.
const CHUNK_WEIGHTS: usize = 1 << 18;

/// Bytes of an untouched tensor copied at a time.
const COPY_BYTES: usize = 4 << 20;

/// `GGML_QNT_VERSION` in `ggml.h`: of the formats of quantised blocks.
const QUANTIZATION_VERSION: u32 = 2;

/// How adapters are merged.
#[derive(Debug, Clone, Default)]
pub struct MergeOptions {
    /// The type of the changed tensors; each its own where there is none.
    pub tensor_type: Option<TensorType>,
    /// Added to the metadata: what was merged.
    pub provenance: Metadata,
}

/// How much of a change arrived in weights that can only hold some numbers.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Change {
    /// Weights of the tensors.
    pub n_weights: u64,
    /// Those that are another number than before.
    pub n_moved: u64,
    /// Sum of squares of the change asked for.
    pub wanted: f64,
    /// Sum of products of the change asked for and the one that was made.
    pub along: f64,
    /// Sum of squares of the difference of the two.
    pub off: f64,
}

impl Change {
    /// The Frobenius norm of the change asked for.
    pub fn norm(&self) -> f64 {
        self.wanted.sqrt()
    }

    /// The share of the change that is there: the projection of what was made on what was asked for, over its
    /// length. 1 is all; 0 is nothing, or nothing but noise. `None` for a change of nothing.
    pub fn survived(&self) -> Option<f64> {
        (self.wanted > 0.0).then(|| self.along / self.wanted)
    }

    /// The length of what is there and was not asked for, or lacks, in lengths of the change.
    pub fn relative_error(&self) -> Option<f64> {
        (self.wanted > 0.0).then(|| (self.off / self.wanted).sqrt())
    }

    /// The share of weights that are another number than before.
    pub fn moved(&self) -> f64 {
        self.n_moved as f64 / self.n_weights.max(1) as f64
    }

    /// Adds another tensor's.
    pub fn add(&mut self, other: &Change) {
        self.n_weights += other.n_weights;
        self.n_moved += other.n_moved;
        self.wanted += other.wanted;
        self.along += other.along;
        self.off += other.off;
    }
}

/// What became of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorChange {
    /// Its name.
    pub name: String,
    /// Its type before.
    pub from: TensorType,
    /// Its type now.
    pub to: TensorType,
    /// How much of the change arrived.
    pub change: Change,
}

/// What became of all of them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MergeReport {
    /// Changed tensors, in file order.
    pub tensors: Vec<TensorChange>,
    /// Their sum.
    pub total: Change,
}

/// A summary for JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergeSummary {
    /// Changed tensors.
    pub n_tensors: usize,
    /// [`Change::norm`].
    pub norm: f64,
    /// [`Change::survived`].
    pub survived: Option<f64>,
    /// [`Change::relative_error`].
    pub relative_error: Option<f64>,
    /// [`Change::moved`].
    pub moved: f64,
}

impl MergeReport {
    /// The numbers of all tensors together.
    pub fn summary(&self) -> MergeSummary {
        MergeSummary {
            n_tensors: self.tensors.len(),
            norm: self.total.norm(),
            survived: self.total.survived(),
            relative_error: self.total.relative_error(),
            moved: self.total.moved(),
        }
    }

    /// What to do where rounding took or added too much; `None` where the change is there.
    pub fn advice(&self) -> Option<String> {
        /// Less than this share is a loss; noise as long as the change is too.
        const ENOUGH: f64 = 0.9;
        let (survived, error) = (self.total.survived()?, self.total.relative_error()?);
        if survived >= ENOUGH && error <= 1.0 {
            return None;
        }
        let bits = |t: TensorType| t.block_bytes() * 8 / t.block_len();
        let finer = match self.tensors.iter().map(|t| bits(t.to)).min()? {
            0..8 => "q8_0",
            8..16 => "f16",
            _ => "f32",
        };
        let noise = if error > 1.0 {
            format!(", beside rounding noise of {error:.1} times its length")
        } else {
            String::new()
        };
        Some(format!(
            "{:.0}% of the change survived{noise}: to keep all of it, use the adapter as it is (--lora), or \
             write the changed tensors in a finer type (--type {finer})",
            100.0 * survived
        ))
    }
}

/// Writes a copy of `base` with `adapters`, each times its scale, added to its tensors. Every tensor that no
/// adapter changes is copied byte for byte, and so is every block of weights whose change is exactly zero,
/// unless the type changes. A model in several files becomes one.
///
/// `progress` is called with the bytes of the base that are done and their number; an error from it ends the
/// merge. Work is spread over rayon's current pool.
///
/// # Errors
/// [`Error::Input`] that names the base and the tensor: what [`Adapter::check`] refuses, a type that cannot be
/// written without an importance matrix or in rows of that length, a tensor with a scale of its own,
/// weights that are not finite before or after. [`Error::Setting`] for a scale that is not finite, or an output that
/// is the base or a folder; [`Error::Io`]. A file that is not whole is not left.
pub fn merge(
    base: &GgufFile,
    adapters: &[(Adapter, f32)],
    output: &Path,
    options: &MergeOptions,
    mut progress: impl FnMut(u64, u64) -> Result<()>,
) -> Result<MergeReport> {
    check_output(base, output)?;
    for (adapter, scale) in adapters {
        adapter.check(base)?;
        if !scale.is_finite() {
            let reason = format!("expected a finite scale, found {scale}");
            return Err(Error::setting("--lora-scaled", reason));
        }
    }
    let plan = base.tensors().iter().map(|tensor| Planned::of(base, tensor, adapters, options));
    let plan: Vec<Planned<'_>> = plan.collect::<Result<_>>()?;
    let specs = plan.iter().map(|planned| TensorSpec {
        name: planned.tensor.name().to_owned(),
        shape: planned.tensor.shape().to_vec(),
        tensor_type: planned.tensor_type,
    });
    let mut writer = GgufWriter::create(output, &metadata(base, options), specs.collect())?;
    let total = base.tensors().iter().map(TensorInfo::n_bytes).sum();
    let mut done = 0;
    let mut report = MergeReport::default();
    for planned in &plan {
        let tensor = planned.tensor;
        if planned.terms.is_empty() {
            let mut bytes = vec![0; COPY_BYTES.min(tensor.n_bytes() as usize)];
            for offset in (0..tensor.n_bytes()).step_by(COPY_BYTES) {
                let n = (tensor.n_bytes() - offset).min(COPY_BYTES as u64) as usize;
                base.read_tensor_at(tensor, offset, &mut bytes[..n])?;
                writer.write(&bytes[..n])?;
                done += n as u64;
                progress(done, total)?;
            }
            continue;
        }
        let mut change = Change::default();
        let chunks = planned.chunks();
        for some in chunks.chunks(2 * rayon::current_num_threads()) {
            let merged: Vec<(Vec<u8>, Change)> =
                some.par_iter().map(|rows| planned.merge_rows(base, rows.clone())).collect::<Result<_>>()?;
            for (rows, (bytes, of_rows)) in some.iter().zip(&merged) {
                writer.write(bytes)?;
                change.add(of_rows);
                done += tensor.row_bytes() * rows.len() as u64;
            }
            progress(done, total)?;
        }
        report.total.add(&change);
        report.tensors.push(TensorChange {
            name: tensor.name().to_owned(),
            from: tensor.tensor_type(),
            to: planned.tensor_type,
            change,
        });
    }
    base.check_unchanged()?;
    writer.finish()?;
    Ok(report)
}

/// The base's metadata, without what is no longer so, and with the provenance.
fn metadata(base: &GgufFile, options: &MergeOptions) -> Metadata {
    let mut metadata = Metadata::new();
    for (key, value) in base.metadata().iter() {
        // With another type for some tensors the file's type is what most of them have: llama.cpp finds
        // that out where the key is absent.
        let is_stale = key == "general.file_type" && options.tensor_type.is_some();
        if !key.starts_with("split.") && !is_stale {
            metadata.set(key, value.clone());
        }
    }
    let is_quantised = options.tensor_type.is_some_and(|t| t.block_len() > 1);
    if is_quantised && metadata.get("general.quantization_version").is_none() {
        metadata.set("general.quantization_version", Value::U32(QUANTIZATION_VERSION));
    }
    metadata.set("detox_gguf.version", Value::Str(crate::version().into()));
    for (key, value) in options.provenance.iter() {
        metadata.set(key, value.clone());
    }
    metadata
}

/// One tensor of the copy.
#[derive(Debug)]
struct Planned<'a> {
    tensor: &'a TensorInfo,
    /// As it is written.
    tensor_type: TensorType,
    /// What is added to it: factors, each with what their product is multiplied by.
    terms: Vec<(&'a Factors, f32)>,
}

impl<'a> Planned<'a> {
    fn of(
        base: &GgufFile,
        tensor: &'a TensorInfo,
        adapters: &'a [(Adapter, f32)],
        options: &MergeOptions,
    ) -> Result<Planned<'a>> {
        let terms = adapters.iter().flat_map(|(adapter, scale)| {
            let factors = adapter.factors.iter().filter(|factors| factors.name == tensor.name());
            factors.map(move |factors| (factors, scale * adapter.multiplier(factors.rank)))
        });
        let terms: Vec<_> = terms.collect();
        if terms.is_empty() {
            return Ok(Planned { tensor, tensor_type: tensor.tensor_type(), terms });
        }
        let refuse = |reason: String, hint: &str| {
            let reason = format!("tensor {:?}: {reason}", tensor.name());
            Err(Error::input(base.path(), None, reason).with_hint(hint))
        };
        let stem = tensor.name().strip_suffix(".weight").unwrap_or(tensor.name());
        if let Some(scale) = base.tensor(&format!("{stem}.scale")) {
            let reason =
                format!("tensor {:?} multiplies it, which llama.cpp spares an adapter", scale.name());
            return refuse(reason, "use the adapter as it is, with --lora");
        }
        let tensor_type = options.tensor_type.unwrap_or(tensor.tensor_type());
        let n_in = tensor.shape()[0];
        if let Some(fault) = tensor_type.quantize_fault(n_in) {
            let fitting = [TensorType::Q6_K, TensorType::Q8_0, TensorType::F16];
            let fitting = fitting.iter().find(|t| t.quantize_fault(n_in).is_none());
            let instead = fitting.map_or(String::new(), |t| format!("--type {t}, or "));
            return refuse(fault, &format!("write it in another type: {instead}use the adapter with --lora"));
        }
        Ok(Planned { tensor, tensor_type, terms })
    }

    /// Ranges of rows, each of about [`CHUNK_WEIGHTS`].
    fn chunks(&self) -> Vec<Range<usize>> {
        let (n_in, n_out) = (self.tensor.shape()[0] as usize, self.tensor.shape()[1] as usize);
        let n_rows = CHUNK_WEIGHTS.div_ceil(n_in);
        (0..n_out).step_by(n_rows).map(|row| row..(row + n_rows).min(n_out)).collect()
    }

    /// The bytes of some rows as they are written, and how much of their change is in them.
    fn merge_rows(&self, base: &GgufFile, rows: Range<usize>) -> Result<(Vec<u8>, Change)> {
        let tensor = self.tensor;
        let refuse = |reason: String, hint: Option<&str>| Error::Input {
            path: base.path().to_path_buf(),
            line: None,
            reason: format!("tensor {:?}, rows {} to {}: {reason}", tensor.name(), rows.start, rows.end - 1),
            hint: hint.map(str::to_owned),
        };
        let in_rows = |reason: String| refuse(reason, None);
        let n_in = tensor.shape()[0] as usize;
        let n_weights = n_in * rows.len();
        let mut blocks = vec![0; tensor.row_bytes() as usize * rows.len()];
        base.read_tensor_at(tensor, tensor.row_bytes() * rows.start as u64, &mut blocks)?;
        let mut before = vec![0.0; n_weights];
        dequantize(tensor.tensor_type(), &blocks, &mut before).map_err(in_rows)?;
        if let Some(at) = before.iter().position(|w| !w.is_finite()) {
            let reason =
                format!("expected finite weights, found {} in row {}", before[at], rows.start + at / n_in);
            return Err(refuse(reason, Some("the model is damaged: look with --check-tensors")));
        }
        let wanted = self.change_of_rows(rows.clone(), n_in);

        let merged = self.requantise(&blocks, &before, &wanted).map_err(in_rows)?;
        let mut after = vec![0.0; n_weights];
        dequantize(self.tensor_type, &merged, &mut after).map_err(in_rows)?;
        let mut change = Change { n_weights: n_weights as u64, ..Change::default() };
        for ((&before, &after), &wanted) in before.iter().zip(&after).zip(&wanted) {
            if !after.is_finite() {
                let reason = format!("{} does not fit into type {}", before + wanted, self.tensor_type);
                return Err(refuse(reason, Some("write it in a type of a wider range: --type f32 or bf16")));
            }
            let (wanted, made) = (f64::from(wanted), f64::from(after) - f64::from(before));
            change.n_moved += u64::from(made != 0.0);
            change.wanted += wanted * wanted;
            change.along += wanted * made;
            change.off += (made - wanted).powi(2);
        }
        Ok((merged, change))
    }

    /// The blocks of `before + wanted`. Those of the base where the change is zero and the type stays: a
    /// quantiser that searches for scales would find other ones.
    fn requantise(&self, blocks: &[u8], before: &[f32], wanted: &[f32]) -> Result<Vec<u8>, String> {
        let stays = self.tensor_type == self.tensor.tensor_type();
        let is_zero = |change: &[f32]| change.iter().all(|&x| x == 0.0);
        if stays && is_zero(wanted) {
            return Ok(blocks.to_vec());
        }
        let sum: Vec<f32> = before.iter().zip(wanted).map(|(w, x)| w + x).collect();
        let mut merged = quantize(self.tensor_type, &sum, self.tensor.shape()[0] as usize)?;
        if stays {
            let len = self.tensor_type.block_len() as usize;
            let n_bytes = self.tensor_type.block_bytes() as usize;
            let pairs = merged.chunks_exact_mut(n_bytes).zip(blocks.chunks_exact(n_bytes));
            for ((merged, block), change) in pairs.zip(wanted.chunks_exact(len)) {
                if is_zero(change) {
                    merged.copy_from_slice(block);
                }
            }
        }
        Ok(merged)
    }

    /// What is added to some rows, shape `[n_rows][n_in]`: the sum of `multiplier * B A`, or for what is
    /// looked up, of `multiplier * A B'`.
    fn change_of_rows(&self, rows: Range<usize>, n_in: usize) -> Vec<f32> {
        let mut change = vec![0.0; rows.len() * n_in];
        let mut sum = ndarray::ArrayViewMut2::from_shape((rows.len(), n_in), &mut change)
            .expect("the vector was made of this shape");
        for &(factors, multiplier) in &self.terms {
            let rank = factors.rank;
            // Adapter::check compared the lengths with the shape.
            let view = |values: &'a [f32], n_rows: usize, n_columns: usize| {
                ArrayView2::from_shape((n_rows, n_columns), values).expect("factors have their shapes")
            };
            let of_rows = rows.start * rank..rows.end * rank;
            if factors.is_lookup() {
                let left = view(&factors.a[of_rows], rows.len(), rank);
                general_mat_mul(
                    multiplier,
                    &left,
                    &view(&factors.b, n_in, rank).reversed_axes(),
                    1.0,
                    &mut sum,
                );
            } else {
                let left = view(&factors.b[of_rows], rows.len(), rank);
                general_mat_mul(multiplier, &left, &view(&factors.a, rank, n_in), 1.0, &mut sum);
            }
        }
        change
    }
}
