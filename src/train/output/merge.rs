//! Merges LoRA adapters into a copy of a model: W + scale * B A, in the type of each tensor.
//!
//! Tensors are read, changed and written in chunks of rows, several chunks in parallel. Memory holds the adapters
//! and a few MiB a thread, whatever the size of the model. There is no intermediate 16-bit copy.
//!
//! Weights are rounded to nearest. This loses most of a change that is far smaller than a quantisation step; the
//! report says how much survived. Stochastic rounding, which is right on average, was tried and left out: on a
//! matrix of a real model, with a change made of synthetic gradients, it kept all of the change, but its noise in
//! the products with real inputs was larger than the loss by rounding to nearest, at every size tried.

use std::ops::Range;
use std::path::Path;

use ndarray::ArrayView2;
use ndarray::linalg::general_mat_mul;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::file::AtomicFile;
use crate::file::output::{Form, Paths};
use crate::finite;
use crate::gguf::blocks::{dequantize, quantize};
use crate::gguf::{GgufFile, GgufWriter, Metadata, TensorInfo, TensorSpec, TensorType, Value};
use crate::train::output::adapter::{Adapter, Factors};
use crate::train::output::merge_report::{Change, MergeReport, TensorChange};
use crate::train::output::provenance::{add, copy_of, set_version};

/// Minimum weights of a chunk, which is whole rows. About six f32 are kept for each weight: 6 MiB.
const CHUNK_WEIGHTS: usize = 1 << 18;

/// Unchanged tensors are copied in pieces of this size.
const COPY_BYTES: usize = 4 << 20;

/// `GGML_QNT_VERSION` in `ggml.h`, the version of the quantised block formats.
const QUANTIZATION_VERSION: u32 = 2;

/// Options of [`merge`].
#[derive(Debug, Clone, Default)]
pub struct MergeOptions {
    /// Type of the changed tensors; `None` keeps the type of each.
    pub tensor_type: Option<TensorType>,
    /// Added to the metadata.
    pub provenance: Metadata,
}

/// Writes a copy of `base` with `adapters`, each times its scale, added to its tensors.
///
/// Tensors without a change are copied byte for byte. So is every quantised block whose change is exactly zero,
/// unless the type changes. A model in several files becomes one file.
///
/// `progress` is called with the bytes of the base done so far and their total; its error stops the merge. The work
/// runs on rayon's current thread pool. The output gets its name only when complete.
///
/// # Errors
/// [`Error::Input`], with the base and the tensor, for: what [`Adapter::check`] refuses; a type that needs an
/// importance matrix, or longer rows; a tensor that has a scale of its own; weights that are not finite before or
/// after. [`Error::Setting`] for a scale that is not finite, or an output that is the base or a folder.
/// [`Error::Io`].
pub fn merge(
    base: &GgufFile,
    adapters: &[(Adapter, f32)],
    output: &Path,
    options: &MergeOptions,
    progress: impl FnMut(u64, u64) -> Result<()>,
) -> Result<MergeReport> {
    let (report, file) = merge_unnamed(base, adapters, output, options, progress)?;
    file.commit()?;
    Ok(report)
}

/// As [`merge`], but the output gets its name only by [`AtomicFile::commit`].
///
/// # Errors
/// Those of [`merge`].
pub fn merge_unnamed(
    base: &GgufFile,
    adapters: &[(Adapter, f32)],
    output: &Path,
    options: &MergeOptions,
    mut progress: impl FnMut(u64, u64) -> Result<()>,
) -> Result<(MergeReport, AtomicFile)> {
    Paths::new().reads(base.part_paths()).writes(output, Form::Gguf).check()?;
    for (adapter, scale) in adapters {
        adapter.check(base)?;
        if !scale.is_finite() {
            let reason = format!("expected a finite scale, found {scale}");
            return Err(Error::setting("--lora-scaled", reason));
        }
    }
    let plan = base.tensors().iter().map(|tensor| Planned::new(base, tensor, adapters, options));
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
        let on_bytes = |n: u64| {
            done += n;
            progress(done, total)
        };
        if planned.terms.is_empty() {
            copy_tensor(base, planned.tensor, &mut writer, on_bytes)?;
        } else {
            let change = planned.write(base, &mut writer, on_bytes)?;
            report.total.add(&change);
            report.tensors.push(TensorChange {
                name: planned.tensor.name().to_owned(),
                from: planned.tensor.tensor_type(),
                to: planned.tensor_type,
                change,
            });
        }
    }
    base.check_unchanged()?;
    Ok((report, writer.complete()?))
}

/// The metadata of the copy.
fn metadata(base: &GgufFile, options: &MergeOptions) -> Metadata {
    // If the changed tensors get another type, the file type may no longer be that of most tensors. llama.cpp
    // guesses it if the key is missing.
    let stale: &[&str] = if options.tensor_type.is_some() { &["general.file_type"] } else { &[] };
    let mut metadata = copy_of(base, stale);
    let is_quantised = options.tensor_type.is_some_and(|t| t.block_len() > 1);
    if is_quantised && metadata.get("general.quantization_version").is_none() {
        metadata.set("general.quantization_version", Value::U32(QUANTIZATION_VERSION));
    }
    set_version(&mut metadata);
    add(&options.provenance, &mut metadata);
    metadata
}

/// Copies an unchanged tensor; `on_bytes` gets the size of each piece.
fn copy_tensor(
    base: &GgufFile,
    tensor: &TensorInfo,
    writer: &mut GgufWriter,
    mut on_bytes: impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let mut bytes = vec![0; COPY_BYTES.min(tensor.n_bytes() as usize)];
    for offset in (0..tensor.n_bytes()).step_by(COPY_BYTES) {
        let n = (tensor.n_bytes() - offset).min(COPY_BYTES as u64) as usize;
        base.read_tensor_at(tensor, offset, &mut bytes[..n])?;
        writer.write(&bytes[..n])?;
        on_bytes(n as u64)?;
    }
    Ok(())
}

/// One tensor of the copy.
#[derive(Debug)]
struct Planned<'a> {
    tensor: &'a TensorInfo,
    /// Its type in the copy.
    tensor_type: TensorType,
    /// The changes added to it: factors, and the scale of their product.
    terms: Vec<(&'a Factors, f32)>,
}

impl<'a> Planned<'a> {
    fn new(
        base: &GgufFile,
        tensor: &'a TensorInfo,
        adapters: &'a [(Adapter, f32)],
        options: &MergeOptions,
    ) -> Result<Planned<'a>> {
        let terms = adapters.iter().flat_map(|(adapter, scale)| {
            let factors = adapter.factors.iter().filter(|factors| factors.name == tensor.name());
            factors.map(move |factors| (factors, adapter.scale(*scale, factors.rank)))
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
            let reason = format!(
                "it is multiplied by tensor {:?}, which llama.cpp does not apply to adapters",
                scale.name()
            );
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

    /// Writes the changed tensor; `on_bytes` gets the size in the base of the rows done.
    fn write(
        &self,
        base: &GgufFile,
        writer: &mut GgufWriter,
        mut on_bytes: impl FnMut(u64) -> Result<()>,
    ) -> Result<Change> {
        let mut change = Change::default();
        for chunks in self.chunks().chunks(2 * rayon::current_num_threads()) {
            let merged: Vec<(Vec<u8>, Change)> =
                chunks.par_iter().map(|rows| self.merge_rows(base, rows.clone())).collect::<Result<_>>()?;
            let mut n_bytes = 0;
            for (rows, (bytes, of_rows)) in chunks.iter().zip(&merged) {
                writer.write(bytes)?;
                change.add(of_rows);
                n_bytes += self.tensor.row_bytes() * rows.len() as u64;
            }
            on_bytes(n_bytes)?;
        }
        Ok(change)
    }

    /// Splits the rows into ranges of about [`CHUNK_WEIGHTS`] weights.
    fn chunks(&self) -> Vec<Range<usize>> {
        let (n_in, n_out) = (self.tensor.shape()[0] as usize, self.tensor.shape()[1] as usize);
        let n_rows = CHUNK_WEIGHTS.div_ceil(n_in);
        (0..n_out).step_by(n_rows).map(|row| row..(row + n_rows).min(n_out)).collect()
    }

    /// Merges some rows: their bytes in the copy, and how much of their change survived.
    fn merge_rows(&self, base: &GgufFile, rows: Range<usize>) -> Result<(Vec<u8>, Change)> {
        let tensor = self.tensor;
        let refuse = |reason: String| {
            let place = format!("tensor {:?}, rows {} to {}", tensor.name(), rows.start, rows.end - 1);
            Error::input(base.path(), None, format!("{place}: {reason}"))
        };
        let n_in = tensor.shape()[0] as usize;
        let n_weights = n_in * rows.len();
        let mut blocks = vec![0; tensor.row_bytes() as usize * rows.len()];
        base.read_tensor_at(tensor, tensor.row_bytes() * rows.start as u64, &mut blocks)?;
        let mut before = vec![0.0; n_weights];
        dequantize(tensor.tensor_type(), &blocks, &mut before).map_err(|reason| {
            refuse(reason).with_hint("the model is damaged; --check-tensors finds all such weights")
        })?;
        let wanted = self.change_of_rows(rows.clone(), n_in);
        if let Some((at, found)) = finite::not_finite(&wanted) {
            let row = rows.start + at / n_in;
            return Err(refuse(format!("the adapters change a weight of row {row} by {found}"))
                .with_hint("lower the scale of the adapters (--lora-scaled)"));
        }

        let merged = self.requantise(&blocks, &before, &wanted).map_err(|reason| {
            refuse(reason).with_hint(
                "lower the scale of the adapters (--lora-scaled), or write the changed tensors in a type with a \
                 wider range: --type f32 or bf16",
            )
        })?;
        let mut after = vec![0.0; n_weights];
        dequantize(self.tensor_type, &merged, &mut after).map_err(refuse)?;
        let mut change = Change { n_weights: n_weights as u64, ..Change::default() };
        for ((&before, &after), &wanted) in before.iter().zip(&after).zip(&wanted) {
            let (wanted, made) = (f64::from(wanted), f64::from(after) - f64::from(before));
            change.n_moved += u64::from(made != 0.0);
            change.wanted += wanted * wanted;
            change.along += wanted * made;
            change.off += (made - wanted).powi(2);
        }
        Ok((merged, change))
    }

    /// Quantises `before + wanted`.
    ///
    /// If the type stays, blocks without a change keep their bytes: a quantiser that searches for scales would
    /// find other ones.
    fn requantise(&self, blocks: &[u8], before: &[f32], wanted: &[f32]) -> Result<Vec<u8>, String> {
        let keeps_type = self.tensor_type == self.tensor.tensor_type();
        let is_zero = |change: &[f32]| change.iter().all(|&x| x == 0.0);
        if keeps_type && is_zero(wanted) {
            return Ok(blocks.to_vec());
        }
        let sum: Vec<f32> = before.iter().zip(wanted).map(|(w, x)| w + x).collect();
        let mut merged = quantize(self.tensor_type, &sum, self.tensor.shape()[0] as usize)?;
        if keeps_type {
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

    /// The change of some rows, `[n_rows][n_in]`: the sum of `scale * B A`, or of `scale * A Bᵀ` for a matrix whose
    /// rows are looked up.
    fn change_of_rows(&self, rows: Range<usize>, n_in: usize) -> Vec<f32> {
        let mut change = vec![0.0; rows.len() * n_in];
        let mut sum = ndarray::ArrayViewMut2::from_shape((rows.len(), n_in), &mut change)
            .expect("the vector has this many values");
        for &(factors, scale) in &self.terms {
            let rank = factors.rank;
            let view = |values: &'a [f32], n_rows: usize, n_columns: usize| {
                ArrayView2::from_shape((n_rows, n_columns), values)
                    .expect("Adapter::check compared the shapes")
            };
            let of_rows = rows.start * rank..rows.end * rank;
            if factors.is_lookup() {
                let (a, b) = (view(&factors.a[of_rows], rows.len(), rank), view(&factors.b, n_in, rank));
                general_mat_mul(scale, &a, &b.reversed_axes(), 1.0, &mut sum);
            } else {
                let (b, a) = (view(&factors.b[of_rows], rows.len(), rank), view(&factors.a, rank, n_in));
                general_mat_mul(scale, &b, &a, 1.0, &mut sum);
            }
        }
        change
    }
}
