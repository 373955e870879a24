//! Identifies the model that neurons, interventions or directions were made for.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, Metadata, TensorInfo, Value};

/// Architecture, sizes and a hash of the weights that steering depends on.
///
/// The hash covers only the start of each layer's down projection. It takes milliseconds for a model of any
/// size, and differs between two quantisations or two fine-tunes of the same model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// `general.architecture`.
    pub architecture: String,
    /// Number of blocks.
    pub n_layer: u32,
    /// Width of the residual stream.
    pub n_embd: u32,
    /// Neurons of each layer, shape `[n_layer]`; empty if the model's metadata do not give them.
    pub n_ff: Vec<u32>,
    /// SHA-256 over `ffn_down` of each layer in order, in lower-case hex.
    ///
    /// It covers the tensor's name, type and shape, and its first [`HASHED_BYTES`] bytes as stored.
    pub ffn_down_sha256: String,
}

/// Bytes hashed of each tensor.
pub const HASHED_BYTES: u64 = 64 << 10;

/// Down projections of dense layers and of mixtures of experts.
const DOWN_TENSORS: [&str; 2] = ["ffn_down.weight", "ffn_down_exps.weight"];

/// Prefix of a fingerprint's metadata keys.
const PREFIX: &str = "detox_gguf.fingerprint.";

impl Fingerprint {
    /// Computes the fingerprint of a model.
    ///
    /// # Errors
    /// [`Error::Gguf`] if the metadata lack the sizes; [`Error::Io`] if the tensors cannot be read.
    pub fn of(model: &GgufFile) -> Result<Fingerprint> {
        let n_layer = model.n_layer()?;
        let has_n_ff = model.metadata().get(&model.arch_key("feed_forward_length")?).is_some();
        let mut hash = Sha256::new();
        hash.update(b"detox-gguf ffn_down 1\0");
        for il in 0..n_layer {
            for name in DOWN_TENSORS {
                if let Some(tensor) = model.tensor(&format!("blk.{il}.{name}")) {
                    hash_start(model, tensor, &mut hash)?;
                }
            }
        }
        Ok(Fingerprint {
            architecture: model.architecture()?.to_owned(),
            n_layer,
            n_embd: model.n_embd()?,
            n_ff: if has_n_ff { model.n_ff_per_layer()? } else { Vec::new() },
            ffn_down_sha256: crate::file::hex(&hash.finalize()),
        })
    }

    /// Checks that a file made for this fingerprint can be used on `model`.
    ///
    /// `what` names the content of the file at `path`, in the plural. `force` allows other weights, but never
    /// another architecture or other sizes.
    ///
    /// # Errors
    /// [`Error::Input`] that says what differs.
    pub fn check(&self, model: &Fingerprint, what: &str, path: &Path, force: bool) -> Result<()> {
        let refuse = |reason: String, hint: &str| Err(Error::input(path, None, reason).with_hint(hint));
        if let Some(difference) = self.other_sizes(model) {
            let reason = format!("these {what} were made for a model with {difference}");
            return refuse(reason, "use the model they were made for, or make them again with this one");
        }
        if self.ffn_down_sha256 == model.ffn_down_sha256 {
            return Ok(());
        }
        let reason = format!(
            "these {what} were made for another quantisation or fine-tune of this model: \
             architecture and sizes match, but the weights of ffn_down differ"
        );
        if force {
            tracing::warn!("{}: {reason}", path.display());
            return Ok(());
        }
        refuse(reason, "use the model they were made for, or set force (--force) to skip this check")
    }

    /// Describes the first difference in architecture or sizes: "n_layer 24, and this model has 32".
    fn other_sizes(&self, model: &Fingerprint) -> Option<String> {
        let differs = |name: &str, made_for: &dyn std::fmt::Display, found: &dyn std::fmt::Display| {
            Some(format!("{name} {made_for}, and this model has {found}"))
        };
        if self.architecture != model.architecture {
            return differs("architecture", &self.architecture, &model.architecture);
        }
        if self.n_layer != model.n_layer {
            return differs("n_layer", &self.n_layer, &model.n_layer);
        }
        if self.n_embd != model.n_embd {
            return differs("n_embd", &self.n_embd, &model.n_embd);
        }
        if self.n_ff.len() != model.n_ff.len() {
            let sizes = |n: usize| format!("for {n} layers");
            return differs("n_ff", &sizes(self.n_ff.len()), &sizes(model.n_ff.len()));
        }
        let pairs = self.n_ff.iter().zip(&model.n_ff).enumerate();
        let (il, (made_for, found)) = pairs.into_iter().find(|(_, (a, b))| a != b)?;
        differs("n_ff", &format!("{made_for} in layer {il}"), found)
    }

    /// Adds the fingerprint to a file's metadata.
    pub fn add_to(&self, metadata: &mut Metadata) {
        let mut set = |name: &str, value| metadata.set(format!("{PREFIX}{name}"), value);
        set("architecture", Value::Str(self.architecture.clone()));
        set("n_layer", Value::U32(self.n_layer));
        set("n_embd", Value::U32(self.n_embd));
        set("n_ff", Value::Array(self.n_ff.as_slice().into()));
        set("ffn_down_sha256", Value::Str(self.ffn_down_sha256.clone()));
    }

    /// Reads the fingerprint of the model that a file was made for from the file's metadata.
    ///
    /// `None` if the file has no fingerprint.
    ///
    /// # Errors
    /// [`Error::Gguf`] if the fingerprint is incomplete.
    pub fn recorded_in(file: &GgufFile) -> Result<Option<Fingerprint>> {
        if !file.metadata().iter().any(|(key, _)| key.starts_with(PREFIX)) {
            return Ok(None);
        }
        let key = |name: &str| format!("{PREFIX}{name}");
        let n_ff = file.array(&key("n_ff"))?.to_i64s();
        let n_ff = n_ff.and_then(|values| values.into_iter().map(|v| u32::try_from(v).ok()).collect());
        Ok(Some(Fingerprint {
            architecture: file.str(&key("architecture"))?.to_owned(),
            n_layer: file.u32(&key("n_layer"))?,
            n_embd: file.u32(&key("n_embd"))?,
            n_ff: n_ff.ok_or_else(|| {
                Error::gguf(file.path(), format!("key {:?}: expected an array of u32", key("n_ff")))
            })?,
            ffn_down_sha256: file.str(&key("ffn_down_sha256"))?.to_owned(),
        }))
    }
}

fn hash_start(model: &GgufFile, tensor: &TensorInfo, hash: &mut Sha256) -> Result<()> {
    for text in [tensor.name(), tensor.tensor_type().name()] {
        hash.update(text.as_bytes());
        hash.update([0]);
    }
    hash.update((tensor.shape().len() as u32).to_le_bytes());
    tensor.shape().iter().for_each(|ne| hash.update(ne.to_le_bytes()));
    let mut start = vec![0; tensor.n_bytes().min(HASHED_BYTES) as usize];
    model.read_tensor_at(tensor, 0, &mut start)?;
    hash.update(&start);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{GgufWriter, TensorSpec, TensorType};

    fn tiny(name: &str) -> Fingerprint {
        Fingerprint::of(&GgufFile::open(format!("gguf/tiny/{name}.gguf")).unwrap()).unwrap()
    }

    fn message(made_for: &Fingerprint, model: &Fingerprint, force: bool) -> String {
        made_for.check(model, "neurons", Path::new("neurons.json"), force).unwrap_err().to_string()
    }

    #[test]
    fn a_quantised_model_differs_only_in_the_hash() {
        let (plain, quantised) = (tiny("llama"), tiny("llama-q8_0"));
        assert_eq!(plain, tiny("llama"));
        assert_eq!((plain.n_layer, plain.n_ff.len()), (3, 3));
        assert_eq!(plain.ffn_down_sha256.len(), 64);
        assert_ne!(plain.ffn_down_sha256, quantised.ffn_down_sha256);
        assert_eq!(
            Fingerprint { ffn_down_sha256: String::new(), ..plain },
            Fingerprint { ffn_down_sha256: String::new(), ..quantised }
        );
    }

    #[test]
    fn the_hash_covers_names_types_shapes_and_the_first_bytes() {
        // The expected hash is computed from the documentation; one tensor is longer than HASHED_BYTES.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", Value::Str("x".into()));
        for (key, n) in [("block_count", 2), ("embedding_length", 5), ("feed_forward_length", 4096)] {
            metadata.set(format!("x.{key}"), Value::U32(n));
        }
        let spec = |name: &str, shape| TensorSpec { name: name.into(), shape, tensor_type: TensorType::F32 };
        let specs = vec![
            spec("blk.1.ffn_down.weight", vec![2, 5]),
            spec("blk.0.ffn_down.weight", vec![4096, 5]),
            spec("other", vec![1]),
        ];
        let mut writer = GgufWriter::create(&path, &metadata, specs).unwrap();
        let short: Vec<f32> = (0..10).map(|i| i as f32).collect();
        let long: Vec<f32> = (0..5 * 4096).map(|i| i as f32).collect();
        writer.write_f32s(&short).unwrap();
        writer.write_f32s(&long).unwrap();
        writer.write_f32s(&[1.0]).unwrap();
        writer.finish().unwrap();

        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let mut expected = b"detox-gguf ffn_down 1\0blk.0.ffn_down.weight\0f32\0\x02\0\0\0".to_vec();
        expected.extend(b"\0\x10\0\0\0\0\0\0\x05\0\0\0\0\0\0\0");
        expected.extend(&bytes(&long)[..65536]);
        expected.extend(b"blk.1.ffn_down.weight\0f32\0\x02\0\0\0\x02\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0");
        expected.extend(bytes(&short));
        let expected: String = Sha256::digest(&expected).iter().map(|b| format!("{b:02x}")).collect();
        let found = Fingerprint::of(&GgufFile::open(&path).unwrap()).unwrap();
        assert_eq!(found.ffn_down_sha256, expected);
        assert_eq!(found.n_ff, [4096, 4096]);
    }

    #[test]
    fn a_fingerprint_is_read_back_from_metadata() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.gguf");
        let (fingerprint, mut metadata) = (tiny("gpt2"), Metadata::new());
        fingerprint.add_to(&mut metadata);
        GgufWriter::create(&path, &metadata, vec![]).unwrap().finish().unwrap();
        let file = GgufFile::open(&path).unwrap();
        assert_eq!(Fingerprint::recorded_in(&file).unwrap(), Some(fingerprint));
        let model = GgufFile::open("gguf/tiny/gpt2.gguf").unwrap();
        assert_eq!(Fingerprint::recorded_in(&model).unwrap(), None);
    }

    #[test]
    fn rejects_an_incomplete_fingerprint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.gguf");
        let mut metadata = Metadata::new();
        metadata.set("detox_gguf.fingerprint.n_layer", Value::U32(3));
        GgufWriter::create(&path, &metadata, vec![]).unwrap().finish().unwrap();
        assert!(Fingerprint::recorded_in(&GgufFile::open(&path).unwrap()).is_err());
    }

    #[test]
    fn rejects_another_architecture_or_other_sizes_even_with_force() {
        let model = tiny("llama");
        let cases: [(Fingerprint, &str); 4] = [
            (Fingerprint { architecture: "gpt2".into(), ..model.clone() }, "architecture gpt2"),
            (Fingerprint { n_layer: 24, ..model.clone() }, "n_layer 24, and this model has 3"),
            (Fingerprint { n_embd: 7, ..model.clone() }, "n_embd 7"),
            (Fingerprint { n_ff: vec![model.n_ff[0], 9, 9], ..model.clone() }, "n_ff 9 in layer 1"),
        ];
        for (made_for, part) in cases {
            for force in [false, true] {
                let message = message(&made_for, &model, force);
                assert!(message.starts_with("neurons.json: these neurons"), "{message}");
                assert!(message.contains(part), "{message}");
            }
        }
    }

    #[test]
    fn rejects_other_weights_unless_forced() {
        let (made_for, model) = (tiny("llama"), tiny("llama-q8_0"));
        let path = Path::new("neurons.json");
        let error = made_for.check(&model, "neurons", path, false).unwrap_err();
        assert!(error.to_string().contains("quantisation"), "{error}");
        assert!(error.hint().unwrap().contains("--force"));
        made_for.check(&model, "neurons", path, true).unwrap();
        made_for.check(&made_for, "neurons", path, false).unwrap();
    }
}
