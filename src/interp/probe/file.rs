//! Reads and writes probe files: GGUF with the probe vector and its place in the model.

use std::path::Path;

#[cfg(feature = "engine")]
use crate::engine::residual::ResidualPlace;
use crate::error::{Error, Result};
use crate::gguf::{self, GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value};
use crate::steer::Fingerprint;

/// Where a probe reads the residual stream, as recorded in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbePlace {
    /// The embeddings; -2 in the file.
    Embedding,
    /// After the final norm, as in the paper; -1 in the file.
    FinalNorm,
    /// After this block, from 0.
    Block(u32),
}

impl ProbePlace {
    /// The engine's name for this place.
    #[cfg(feature = "engine")]
    pub fn residual_place(self) -> ResidualPlace {
        match self {
            ProbePlace::Embedding => ResidualPlace::Embedding,
            ProbePlace::FinalNorm => ResidualPlace::AfterFinalNorm,
            ProbePlace::Block(il) => ResidualPlace::AfterBlock(il as usize),
        }
    }

    /// The layer in which to steer along the probe's direction.
    ///
    /// That is the block the probe reads. The embeddings map to layer 1, the first with a control vector, and
    /// the final norm maps to the last layer.
    pub fn steering_layer(self, n_layer: usize) -> usize {
        match self {
            ProbePlace::Embedding => 1,
            ProbePlace::FinalNorm => n_layer.saturating_sub(1),
            ProbePlace::Block(il) => il as usize,
        }
    }

    fn number(self) -> i32 {
        match self {
            ProbePlace::Embedding => -2,
            ProbePlace::FinalNorm => -1,
            ProbePlace::Block(il) => i32::try_from(il).unwrap_or(i32::MAX),
        }
    }
}

impl std::str::FromStr for ProbePlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "final" => Ok(ProbePlace::FinalNorm),
            "embedding" => Ok(ProbePlace::Embedding),
            _ => text
                .parse()
                .map(ProbePlace::Block)
                .map_err(|_| format!("expected final, embedding, or a layer from 0, found {text:?}")),
        }
    }
}

impl std::fmt::Display for ProbePlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ProbePlace::Embedding => f.write_str("embedding"),
            ProbePlace::FinalNorm => f.write_str("final"),
            ProbePlace::Block(il) => write!(f, "{il}"),
        }
    }
}

/// A linear probe of mean residual streams.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// The probe vector, shape `[n_embd]`, finite and not zero.
    pub weight: Vec<f32>,
    /// Where it reads the residual stream.
    pub place: ProbePlace,
    /// The model whose residual stream it reads; `None` for a probe converted from another program.
    pub fingerprint: Option<Fingerprint>,
    /// Description of the training texts.
    pub source: String,
    /// Share of held-out texts classified correctly, if known.
    pub accuracy: Option<f32>,
    /// Area under the ROC curve on held-out texts, if known.
    pub auc: Option<f32>,
}

const ARCHITECTURE: &str = "detox-gguf.probe";
const FORMAT: u32 = 1;
const WEIGHT: &str = "probe.weight";

impl Probe {
    /// The probability that a text with this mean residual stream, shape `[n_embd]`, is toxic.
    pub fn probability(&self, residual_stream: &[f32]) -> f64 {
        sigmoid(self.weight.iter().zip(residual_stream).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum())
    }

    /// The probe vector scaled to length 1, shape `[n_embd]`: the direction of toxicity.
    pub fn unit_direction(&self) -> Vec<f32> {
        let norm = self.weight.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
        self.weight.iter().map(|&w| (f64::from(w) / norm) as f32).collect()
    }

    /// Writes the probe, atomically.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NotFinite`] for a vector that is not finite; [`Error::Input`] for an accuracy or AUC
    /// outside 0 to 1.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", Value::Str(ARCHITECTURE.into()));
        metadata.set("probe.format", Value::U32(FORMAT));
        metadata.set("probe.layer", Value::I32(self.place.number()));
        metadata.set("probe.pooling", Value::Str("mean".into()));
        metadata.set("probe.n_embd", Value::U32(self.weight.len() as u32));
        metadata.set("probe.bias", Value::F32(0.0));
        metadata.set("probe.source", Value::Str(self.source.clone()));
        for (key, value) in [("probe.accuracy", self.accuracy), ("probe.auc", self.auc)] {
            if let Some(value) = value {
                check_share(key, value).map_err(|reason| Error::input(path, None, reason))?;
                metadata.set(key, Value::F32(value));
            }
        }
        if let Some(fingerprint) = &self.fingerprint {
            fingerprint.add_to(&mut metadata);
        }
        let spec = TensorSpec {
            name: WEIGHT.into(),
            shape: vec![self.weight.len() as u64],
            tensor_type: TensorType::F32,
        };
        let mut writer = GgufWriter::create(path, &metadata, vec![spec])?;
        writer.write_f32s(&self.weight)?;
        writer.finish()
    }

    /// Reads a probe.
    ///
    /// # Errors
    /// Those of [`GgufFile::open`]; [`Error::Input`] for a GGUF file that is not a probe or has a newer format,
    /// and for a vector that is zero or not finite.
    pub fn read(path: &Path) -> Result<Probe> {
        let file = GgufFile::open(path)?;
        let refuse = |reason: String| Error::input(path, None, reason);
        let found = file.str_if_present("general.architecture")?.unwrap_or("nothing");
        if found != ARCHITECTURE {
            return Err(Error::input(
                path,
                None,
                format!("expected a probe (architecture {ARCHITECTURE:?}), found {found:?}"),
            )
            .with_hint("make one with `detox-gguf probe -m MODEL -o probe.gguf`"));
        }
        let format = file.u32("probe.format")?;
        if format != FORMAT {
            return Err(refuse(format!("expected a probe of format {FORMAT}, found {format}")));
        }
        let place = match file.integer("probe.layer")? {
            -2 => ProbePlace::Embedding,
            -1 => ProbePlace::FinalNorm,
            il => ProbePlace::Block(
                u32::try_from(il)
                    .map_err(|_| refuse(format!("\"probe.layer\": expected -2 or more, found {il}")))?,
            ),
        };
        let pooling = file.str("probe.pooling")?;
        let bias = file.f32_if_present("probe.bias")?.unwrap_or(0.0);
        if pooling != "mean" || bias != 0.0 {
            let reason = format!("expected pooling \"mean\" and bias 0, found {pooling:?} and {bias}");
            return Err(refuse(reason));
        }
        let n_embd = u64::from(file.u32("probe.n_embd")?);
        let tensor =
            file.tensor(WEIGHT).ok_or_else(|| refuse(format!("expected a tensor {WEIGHT:?}, found none")))?;
        if tensor.shape() != [n_embd] {
            let found = tensor.shape();
            return Err(refuse(format!("tensor {WEIGHT:?}: expected shape [{n_embd}], found {found:?}")));
        }
        let mut weight = vec![0f32; n_embd as usize];
        gguf::dequantize(tensor.tensor_type(), &file.read_tensor(tensor)?, &mut weight)
            .map_err(|reason| refuse(format!("tensor {WEIGHT:?}: {reason}")))?;
        if weight.iter().all(|&w| w == 0.0) {
            return Err(refuse("expected a vector with a direction, found one of zeros".into()));
        }
        let share = |key: &str| -> Result<Option<f32>> {
            let value = file.f32_if_present(key)?;
            value.map_or(Ok(()), |value| check_share(key, value)).map_err(refuse)?;
            Ok(value)
        };
        Ok(Probe {
            weight,
            place,
            fingerprint: Fingerprint::recorded_in(&file)?,
            source: file.str_if_present("probe.source")?.unwrap_or_default().to_owned(),
            accuracy: share("probe.accuracy")?,
            auc: share("probe.auc")?,
        })
    }

    /// Checks that the probe was trained on `model`.
    ///
    /// `force` accepts another quantisation or fine-tune of the model. `path` is the probe's, for messages.
    ///
    /// # Errors
    /// [`Error::Input`] if the width of the residual stream or the fingerprint differs.
    pub fn check(&self, model: &GgufFile, path: &Path, force: bool) -> Result<()> {
        self.check_model(model.n_embd()? as usize, &Fingerprint::of(model)?, path, force)
    }

    /// As [`Probe::check`], for a model whose file is not open.
    pub(crate) fn check_model(
        &self,
        n_embd: usize,
        model: &Fingerprint,
        path: &Path,
        force: bool,
    ) -> Result<()> {
        if self.weight.len() != n_embd {
            let reason =
                format!("expected a probe of {n_embd} numbers for this model, found {}", self.weight.len());
            return Err(Error::input(path, None, reason));
        }
        match &self.fingerprint {
            Some(fingerprint) => fingerprint.check(model, "probe vectors", path, force),
            None => Ok(()),
        }
    }
}

/// Checks that a share is from 0 to 1.
fn check_share(key: &str, value: f32) -> Result<(), String> {
    match (0.0..=1.0).contains(&value) {
        true => Ok(()),
        false => Err(format!("key {key:?}: expected a number from 0 to 1, found {value}")),
    }
}

/// `1 / (1 + exp(-z))`.
pub(crate) fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe() -> Probe {
        Probe {
            weight: vec![0.5, -2.0],
            place: ProbePlace::Block(3),
            fingerprint: None,
            source: "own.jsonl".into(),
            accuracy: Some(0.9),
            auc: None,
        }
    }

    #[test]
    fn a_written_probe_is_read_back_unchanged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("probe.gguf");
        for place in [ProbePlace::Block(3), ProbePlace::Embedding, ProbePlace::FinalNorm] {
            let probe = Probe { place, ..probe() };
            probe.write(&path).unwrap();
            assert_eq!(Probe::read(&path).unwrap(), probe);
            assert_eq!(place.to_string().parse(), Ok(place));
        }
    }

    #[test]
    fn the_probability_is_the_sigmoid_of_the_dot_product() {
        // 0.5 * 2 - 2 * 0.5 = 0
        assert_eq!(probe().probability(&[2.0, 0.5]), 0.5);
        assert!((probe().probability(&[2.0, 0.0]) - 1.0 / (1.0 + (-1f64).exp())).abs() < 1e-12);
    }

    #[test]
    fn rejects_other_files_and_vectors_without_a_direction() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("probe.gguf");
        Probe { weight: vec![0.0, 0.0], ..probe() }.write(&path).unwrap();
        assert!(Probe::read(&path).unwrap_err().to_string().contains("found one of zeros"));
        // A probe with NaN, as another program might write it. This one does not.
        probe().write(&path).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.windows(4).rposition(|four| four == (-2f32).to_le_bytes()).unwrap();
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let error = Probe::read(&path).unwrap_err().to_string();
        assert!(error.contains("expected finite numbers, found NaN at element 1"), "{error}");
        assert!(Probe { weight: vec![f32::NAN, 1.0], ..probe() }.write(&path).is_err());
        assert!(Probe { auc: Some(f32::NAN), ..probe() }.write(&path).is_err());
        assert!(Probe { accuracy: Some(1.5), ..probe() }.write(&path).is_err());
        let model = format!("{}/gguf/tiny/llama.gguf", env!("CARGO_MANIFEST_DIR"));
        let error = Probe::read(Path::new(&model)).unwrap_err();
        assert!(error.to_string().contains("found \"llama\""), "{error}");
        let model = GgufFile::open(&model).unwrap();
        let error = probe().check(&model, &path, false).unwrap_err().to_string();
        assert!(error.contains("expected a probe of 64 numbers"), "{error}");
    }
}
