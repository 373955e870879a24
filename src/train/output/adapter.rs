//! LoRA adapters in memory and on disk.
//!
//! The file is the one that llama.cpp's `convert_lora_to_gguf.py` writes and its `--lora` reads:
//! `general.type` "adapter", `adapter.type` "lora", `adapter.lora.alpha`, and for each changed tensor of the
//! base the tensors `NAME.lora_a` and `NAME.lora_b` (`llama-adapter.cpp`). Fingerprint and provenance are in
//! keys `detox_gguf.*`, which llama.cpp ignores.

use std::collections::BTreeSet;
use std::path::Path;

use crate::engine::steering::LoraScaled;
use crate::error::{Error, Result};
use crate::file::AtomicFile;
use crate::gguf::dequantize;
use crate::gguf::{GgufFile, GgufWriter, Metadata, TensorInfo, TensorSpec, TensorType, Value};
use crate::steer::{Fingerprint, lora};
use crate::train::output::provenance::{add, set_version};

/// The hint for an adapter that does not fit the model.
const OTHER_BASE: &str = "use the model that the adapter was trained on";

/// The low-rank change of one matrix. Shapes have their slowest axis first.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// The changed tensor, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Columns of the matrix; `n_embd` for `token_embd.weight`.
    pub n_in: usize,
    /// Rows of the matrix; `n_vocab` for `token_embd.weight`.
    pub n_out: usize,
    /// Columns of B and rows of A.
    pub rank: usize,
    /// `lora_a`, `[rank][n_in]`; `[n_vocab][rank]` for `token_embd.weight`.
    pub a: Vec<f32>,
    /// `lora_b`, `[n_out][rank]`; `[n_embd][rank]` for `token_embd.weight`.
    pub b: Vec<f32>,
}

impl Factors {
    /// Whether the matrix's rows are looked up, not multiplied: the token embeddings.
    pub fn is_lookup(&self) -> bool {
        self.name == lora::EMBEDDING
    }

    /// Names and shapes of `lora_a` and `lora_b` in ggml's order, fastest axis first.
    fn tensors(&self) -> [(String, Vec<u64>); 2] {
        let (n_in, n_out, rank) = (self.n_in as u64, self.n_out as u64, self.rank as u64);
        let (a_shape, b_shape) =
            if self.is_lookup() { ([rank, n_out], [rank, n_in]) } else { ([n_in, rank], [rank, n_out]) };
        [(lora::a_name(&self.name), a_shape.to_vec()), (lora::b_name(&self.name), b_shape.to_vec())]
    }
}

/// A LoRA adapter: W becomes `W + scale * B A` for each of its matrices.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// `adapter.lora.alpha`; 0 if the file has none, as in llama.cpp.
    pub alpha: f32,
    /// One entry for each changed matrix.
    pub factors: Vec<Factors>,
}

impl Adapter {
    /// The factor of B A for a matrix of this rank ([`lora::scale`]).
    pub fn scale(&self, user_scale: f32, rank: usize) -> f32 {
        lora::scale(user_scale, self.alpha, rank)
    }

    /// Whether the adapter changes nothing: in every product B A one factor is zero.
    pub fn is_zero(&self) -> bool {
        let is_zero = |values: &[f32]| values.iter().all(|&value| value == 0.0);
        self.factors.iter().all(|factors| is_zero(&factors.a) || is_zero(&factors.b))
    }

    /// Reads an adapter for `base`, after [`lora::check`].
    ///
    /// # Errors
    /// Those of [`lora::check`]; [`Error::Input`] for an adapter that changes matrices of experts.
    pub fn read(path: &Path, base: &GgufFile) -> Result<Adapter> {
        lora::check(&LoraScaled { path: path.to_path_buf(), scale: 1.0 }, base)?;
        let file = GgufFile::open(path)?;
        let refuse =
            |name: &str, reason: &str| Error::input(path, None, format!("tensor {name:?}: {reason}"));
        let mut factors = Vec::new();
        for a in file.tensors() {
            let Some(name) = lora::tensor_of_a(a.name()) else { continue };
            let b_name = lora::b_name(name);
            let b = file.tensor(&b_name);
            let b = b.ok_or_else(|| refuse(&b_name, "it disappeared after the file was checked"))?;
            let matrix = base.tensor(name).ok_or_else(|| refuse(name, "the base has no such tensor"))?;
            let &[n_in, n_out] = matrix.shape() else {
                let reason = format!("expected a matrix, found {:?} (experts)", matrix.shape());
                return Err(refuse(name, &reason).with_hint("use the adapter as it is, with --lora"));
            };
            factors.push(Factors {
                name: name.to_owned(),
                n_in: n_in as usize,
                n_out: n_out as usize,
                rank: b.shape()[0] as usize,
                a: numbers(&file, a)?,
                b: numbers(&file, b)?,
            });
        }
        let adapter = Adapter { alpha: lora::alpha(&file)?, factors };
        adapter.check(base)?;
        Ok(adapter)
    }

    /// Checks that the file at `path` was made for the weights of `base`, if it records a fingerprint.
    ///
    /// Files of other programs record none and pass.
    ///
    /// # Errors
    /// Those of [`Fingerprint::check`]; `force` allows other weights.
    pub fn check_fingerprint(path: &Path, base: &GgufFile, force: bool) -> Result<()> {
        match Fingerprint::recorded_in(&GgufFile::open(path)?)? {
            Some(made_for) => made_for.check(&Fingerprint::of(base)?, "adapters", path, force),
            None => Ok(()),
        }
    }

    /// Checks that every matrix is in `base` with the expected shape, occurs once and is finite.
    ///
    /// # Errors
    /// [`Error::Input`] with the base and the tensor.
    pub fn check(&self, base: &GgufFile) -> Result<()> {
        if !self.alpha.is_finite() {
            let reason = format!("adapter: expected a finite alpha, found {}", self.alpha);
            return Err(Error::input(base.path(), None, reason));
        }
        let mut seen = BTreeSet::new();
        for factors in &self.factors {
            factors.check(base)?;
            if !seen.insert(&factors.name) {
                let reason = format!("adapter for tensor {:?}: it occurs twice", factors.name);
                return Err(Error::input(base.path(), None, reason));
            }
        }
        Ok(())
    }

    /// Writes the adapter for llama.cpp's `--lora`. `provenance` is added to the metadata.
    ///
    /// The file gets its name only when complete.
    ///
    /// # Errors
    /// Those of [`Adapter::check`]; [`Error::Input`] for an adapter without matrices; [`Error::Io`].
    pub fn write(&self, path: &Path, base: &GgufFile, provenance: &Metadata) -> Result<()> {
        self.write_unnamed(path, base, provenance)?.commit()
    }

    /// As [`Adapter::write`], but the file gets its name only by [`AtomicFile::commit`].
    ///
    /// # Errors
    /// As [`Adapter::write`].
    pub fn write_unnamed(&self, path: &Path, base: &GgufFile, provenance: &Metadata) -> Result<AtomicFile> {
        self.check(base)?;
        if self.factors.is_empty() {
            return Err(Error::input(path, None, "expected an adapter of at least one matrix, found none"));
        }
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", Value::Str(base.architecture()?.to_owned()));
        metadata.set("general.type", Value::Str("adapter".into()));
        metadata.set("adapter.type", Value::Str("lora".into()));
        if self.alpha != 0.0 {
            metadata.set(lora::ALPHA_KEY, Value::F32(self.alpha));
        }
        set_version(&mut metadata);
        Fingerprint::of(base)?.add_to(&mut metadata);
        add(provenance, &mut metadata);
        let spec = |(name, shape)| TensorSpec { name, shape, tensor_type: TensorType::F32 };
        let specs = self.factors.iter().flat_map(|factors| factors.tensors().map(spec)).collect();
        let mut writer = GgufWriter::create(path, &metadata, specs)?;
        for factors in &self.factors {
            writer.write_f32s(&factors.a)?;
            writer.write_f32s(&factors.b)?;
        }
        writer.complete()
    }
}

impl Factors {
    /// Checks that the matrix is in `base` and the factors have their shapes and are finite.
    fn check(&self, base: &GgufFile) -> Result<()> {
        let refuse = |reason: String| {
            Error::input(base.path(), None, format!("adapter for tensor {:?}: {reason}", self.name))
        };
        let Some(matrix) = base.tensor(&self.name) else {
            return Err(refuse("the model has no such tensor".into()).with_hint(OTHER_BASE));
        };
        let (n_in, n_out, rank) = (self.n_in, self.n_out, self.rank);
        if matrix.shape() != [n_in as u64, n_out as u64] || rank == 0 {
            let reason = format!(
                "expected a matrix {:?} and a rank from 1 up, found [{n_in}, {n_out}] and rank {rank}",
                matrix.shape()
            );
            return Err(refuse(reason).with_hint(OTHER_BASE));
        }
        if self.is_lookup() && base.tensor("output.weight").is_none() {
            let reason = "in this model the token embeddings are also the output matrix, and llama.cpp cannot \
                          apply an adapter to them";
            return Err(refuse(reason.into()).with_hint("train the adapter without the token embeddings"));
        }
        for ((name, shape), values) in self.tensors().into_iter().zip([&self.a, &self.b]) {
            // .lora_a or .lora_b.
            let suffix = &name[self.name.len()..];
            let expected = shape.iter().product::<u64>();
            if values.len() as u64 != expected {
                return Err(refuse(format!("{suffix}: expected {expected} values, found {}", values.len())));
            }
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                let reason = format!("{suffix}: expected finite numbers, found {} at {at}", values[at]);
                return Err(refuse(reason).with_hint("the training diverged: lower the learning rate"));
            }
        }
        Ok(())
    }
}

/// Reads a tensor of any type into f32.
fn numbers(file: &GgufFile, tensor: &TensorInfo) -> Result<Vec<f32>> {
    let mut values = vec![0.0; tensor.n_elements() as usize];
    dequantize(tensor.tensor_type(), &file.read_tensor(tensor)?, &mut values)
        .map_err(|reason| Error::input(file.path(), None, format!("tensor {:?}: {reason}", tensor.name())))?;
    Ok(values)
}
