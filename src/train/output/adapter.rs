//! LoRA adapters in memory and on disk.
//!
//! The file is the one that llama.cpp's `convert_lora_to_gguf.py` writes and its `--lora` reads:
//! `general.type` "adapter", `adapter.type` "lora", `adapter.lora.alpha`, and tensors `<base>.lora_a` and
//! `<base>.lora_b` (`llama-adapter.cpp`). Fingerprint and provenance stand under `detox_gguf.*`, which
//! llama.cpp does not look at.

use std::collections::BTreeSet;
use std::path::Path;

use crate::engine::steering::LoraScaled;
use crate::error::{Error, Result};
use crate::gguf::dequantize;
use crate::gguf::{GgufFile, GgufWriter, Metadata, TensorInfo, TensorSpec, TensorType, Value};
use crate::steer::{Fingerprint, lora};

/// The token embeddings are looked up, not multiplied, and their factors are flipped.
const EMBEDDING: &str = "token_embd.weight";

/// The change to one matrix, as two factors of low rank. Shapes have their slowest axis first.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// The tensor of the base, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Columns of the matrix; for `token_embd.weight` this is `n_embd`.
    pub n_in: usize,
    /// Rows of the matrix; for `token_embd.weight` this is `n_vocab`.
    pub n_out: usize,
    /// Columns of B and rows of A.
    pub rank: usize,
    /// `lora_a`, shape `[rank][n_in]`; of `token_embd.weight` `[n_vocab][rank]`.
    pub a: Vec<f32>,
    /// `lora_b`, shape `[n_out][rank]`; of `token_embd.weight` `[n_embd][rank]`.
    pub b: Vec<f32>,
}

impl Factors {
    /// Whether the matrix is looked up by rows and not multiplied: that of the token embeddings.
    pub fn is_lookup(&self) -> bool {
        self.name == EMBEDDING
    }

    /// Shapes of `lora_a` and `lora_b` in ggml's order, fastest axis first.
    fn ggml_shapes(&self) -> [Vec<u64>; 2] {
        let (n_in, n_out, rank) = (self.n_in as u64, self.n_out as u64, self.rank as u64);
        if self.is_lookup() {
            [vec![rank, n_out], vec![rank, n_in]]
        } else {
            [vec![n_in, rank], vec![rank, n_out]]
        }
    }
}

/// A LoRA adapter: W becomes `W + scale * multiplier * B A` for each of its matrices.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// `adapter.lora.alpha`; 0 where there is none, as for llama.cpp.
    pub alpha: f32,
    /// Each matrix once.
    pub factors: Vec<Factors>,
}

impl Adapter {
    /// What B A is multiplied by at scale 1: alpha / rank, or 1 without an alpha
    /// (`llama_adapter_lora_weight::get_scale`).
    pub fn multiplier(&self, rank: usize) -> f32 {
        if self.alpha == 0.0 { 1.0 } else { self.alpha / rank as f32 }
    }

    /// Whether it changes nothing: every product B A is zero because a factor is.
    pub fn is_zero(&self) -> bool {
        let is_zero = |values: &[f32]| values.iter().all(|&value| value == 0.0);
        self.factors.iter().all(|factors| is_zero(&factors.a) || is_zero(&factors.b))
    }

    /// Reads an adapter for `base`, after [`lora::check`].
    ///
    /// # Errors
    /// Those of [`lora::check`]; [`Error::Input`] for one that changes matrices of experts.
    pub fn read(path: &Path, base: &GgufFile) -> Result<Adapter> {
        lora::check(&LoraScaled { path: path.to_path_buf(), scale: 1.0 }, base)?;
        let file = GgufFile::open(path)?;
        let mut factors = Vec::new();
        for tensor in file.tensors() {
            let Some(name) = tensor.name().strip_suffix(".lora_a") else { continue };
            let find = |name: &str| {
                let missing =
                    || Error::input(path, None, format!("tensor {name:?}: it is gone since the check"));
                file.tensor(name).ok_or_else(missing)
            };
            let b = find(&format!("{name}.lora_b"))?;
            let matrix = base
                .tensor(name)
                .ok_or_else(|| Error::input(path, None, format!("tensor {name:?}: the base has none")))?;
            let &[n_in, n_out] = matrix.shape() else {
                let shape = matrix.shape();
                return Err(Error::input(
                    path,
                    None,
                    format!("tensor {name:?}: expected a matrix, found {shape:?} (experts)"),
                )
                .with_hint("use the adapter as it is, with --lora"));
            };
            factors.push(Factors {
                name: name.to_owned(),
                n_in: n_in as usize,
                n_out: n_out as usize,
                rank: b.shape()[0] as usize,
                a: numbers(&file, tensor)?,
                b: numbers(&file, b)?,
            });
        }
        let adapter = Adapter { alpha: file.f32_if_present("adapter.lora.alpha")?.unwrap_or(0.0), factors };
        adapter.check(base)?;
        Ok(adapter)
    }

    /// Whether the file at `path` was made for the weights of `base`, as far as it says: a file of another
    /// program says nothing, and passes.
    ///
    /// # Errors
    /// As [`Fingerprint::check`]; `force` allows other weights.
    pub fn check_fingerprint(path: &Path, base: &GgufFile, force: bool) -> Result<()> {
        match Fingerprint::recorded_in(&GgufFile::open(path)?)? {
            Some(made_for) => made_for.check(&Fingerprint::of(base)?, "adapters", path, force),
            None => Ok(()),
        }
    }

    /// Whether every matrix is one of `base`, of the shape that it says, once, and finite.
    ///
    /// # Errors
    /// [`Error::Input`] that names the base and the tensor.
    pub fn check(&self, base: &GgufFile) -> Result<()> {
        let refuse = |name: &str, reason: String, hint: Option<&str>| {
            Err(Error::Input {
                path: base.path().to_path_buf(),
                line: None,
                reason: format!("adapter for tensor {name:?}: {reason}"),
                hint: hint.map(str::to_owned),
            })
        };
        let other_base = Some("use the model that the adapter was trained on");
        if !self.alpha.is_finite() {
            return refuse("*", format!("expected a finite alpha, found {}", self.alpha), None);
        }
        let mut seen = BTreeSet::new();
        for factors in &self.factors {
            let name = &factors.name;
            let Some(matrix) = base.tensor(name) else {
                return refuse(name, "the model has no such tensor".into(), other_base);
            };
            if !seen.insert(name) {
                return refuse(name, "it occurs twice".into(), None);
            }
            let (n_in, n_out, rank) = (factors.n_in, factors.n_out, factors.rank);
            if matrix.shape() != [n_in as u64, n_out as u64] || rank == 0 {
                let reason = format!(
                    "expected a matrix {:?} and a rank from 1 up, found [{n_in}, {n_out}] and rank {rank}",
                    matrix.shape()
                );
                return refuse(name, reason, other_base);
            }
            if factors.is_lookup() && base.tensor("output.weight").is_none() {
                let reason = "the model uses the token embeddings as its output too, and llama.cpp cannot apply \
                              an adapter to them";
                return refuse(name, reason.into(), Some("train the adapter without the token embeddings"));
            }
            let [shape_a, shape_b] = factors.ggml_shapes();
            for (suffix, values, shape) in
                [(".lora_a", &factors.a, shape_a), (".lora_b", &factors.b, shape_b)]
            {
                let expected = shape.iter().product::<u64>();
                if values.len() as u64 != expected {
                    let found = values.len();
                    return refuse(
                        name,
                        format!("{suffix}: expected {expected} values, found {found}"),
                        None,
                    );
                }
                if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                    let reason = format!("{suffix}: expected finite numbers, found {} at {at}", values[at]);
                    return refuse(name, reason, Some("the training diverged: lower the learning rate"));
                }
            }
        }
        Ok(())
    }

    /// Writes the adapter, for stock llama.cpp's `--lora`. `extra` is added to the metadata: where it came from.
    ///
    /// # Errors
    /// Those of [`Adapter::check`], and [`Error::Input`] for an adapter without matrices; [`Error::Io`]. A file
    /// that is not whole is not left.
    pub fn write(&self, path: &Path, base: &GgufFile, extra: &Metadata) -> Result<()> {
        self.check(base)?;
        if self.factors.is_empty() {
            return Err(Error::input(path, None, "expected an adapter of at least one matrix, found none"));
        }
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", Value::Str(base.architecture()?.to_owned()));
        metadata.set("general.type", Value::Str("adapter".into()));
        metadata.set("adapter.type", Value::Str("lora".into()));
        if self.alpha != 0.0 {
            metadata.set("adapter.lora.alpha", Value::F32(self.alpha));
        }
        metadata.set("detox_gguf.version", Value::Str(crate::version().into()));
        Fingerprint::of(base)?.add_to(&mut metadata);
        for (key, value) in extra.iter() {
            metadata.set(key, value.clone());
        }
        let specs = self.factors.iter().flat_map(|factors| {
            let [shape_a, shape_b] = factors.ggml_shapes();
            [(".lora_a", shape_a), (".lora_b", shape_b)].map(|(suffix, shape)| TensorSpec {
                name: format!("{}{suffix}", factors.name),
                shape,
                tensor_type: TensorType::F32,
            })
        });
        let mut writer = GgufWriter::create(path, &metadata, specs.collect())?;
        for factors in &self.factors {
            writer.write_f32s(&factors.a)?;
            writer.write_f32s(&factors.b)?;
        }
        writer.finish()
    }
}

/// All numbers of a tensor, whatever its type.
fn numbers(file: &GgufFile, tensor: &TensorInfo) -> Result<Vec<f32>> {
    let mut values = vec![0.0; tensor.n_elements() as usize];
    dequantize(tensor.tensor_type(), &file.read_tensor(tensor)?, &mut values)
        .map_err(|reason| Error::input(file.path(), None, format!("tensor {:?}: {reason}", tensor.name())))?;
    Ok(values)
}
