//! An intervention, checked against a model's file and compiled for it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use crate::error::{Error, Result};
use crate::gguf::GgufFile;
use crate::graph::Architecture;
use crate::graph::steering::{Change, ControlVector, Edit, Operation};
use crate::steer::compile::{CompileOptions, Route, compile};
use crate::steer::{Fingerprint, SteerFile};

use super::callback::{Callback, ContextOptions};
use super::loaded::LoadedSteer;

/// How to load an intervention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SteerOptions {
    /// Multiplies the file's own coefficients. [`Steer::set_coefficient`] changes it.
    pub coefficient: f32,
    /// [`Route::Callback`] applies everything by callback, which is needed for gates and for unsteered sequences.
    pub route: Route,
    /// Allow a file made for another quantisation or fine-tune of the same model. Also allow a control vector that has
    /// no fingerprint and whose `controlvector.model_hint` is not the model's architecture.
    pub force: bool,
}

impl Default for SteerOptions {
    fn default() -> SteerOptions {
        SteerOptions { coefficient: 1.0, route: Route::Cheapest, force: false }
    }
}

/// An intervention for one model.
///
/// Clones share one coefficient. All methods may be called from any thread.
#[derive(Debug, Clone)]
pub struct Steer {
    loaded: Arc<LoadedSteer>,
}

impl Steer {
    /// Loads an intervention file or a control vector for a model.
    ///
    /// Checks it against the model's file, and finds the cheapest exact way to apply each part. Of the weights, only
    /// those of the edited neurons are read.
    ///
    /// # Errors
    /// As [`GgufFile::open`] for the model, [`SteerFile::open`] for the file, and [`compile`]; [`Error::Setting`] for
    /// a coefficient that is not finite, or too large.
    pub fn load(model: &Path, steer: &Path, options: &SteerOptions) -> Result<Steer> {
        let model = GgufFile::open(model)?;
        let source = SteerFile::open(steer)?;
        // An error rather than a warning, which nobody would read inside another program.
        if let SteerFile::ControlVector(file) = &source
            && !options.force
            && let Some(reason) = file.hint_warning(&Fingerprint::of(&model)?)
        {
            let hint = "use one that was made for this model, or set force";
            return Err(Error::input(steer, None, reason).with_hint(hint));
        }
        let sources = [(source, 1.0)];
        let how = CompileOptions { route: options.route, force: options.force, ..CompileOptions::default() };
        let compiled = compile(&model, &sources, &[], &how)?;
        let control_vector = compiled.steering.control_vector;
        let rows = control_vector.iter().flat_map(|vector| &vector.rows).map(|x| x.abs());
        let edits = compiled.steering.edits;
        let largest = edits.iter().map(largest_of).chain(rows).fold(0.0, f32::max);
        let sliding_window = model.arch_key("attention.sliding_window")?;
        let steer = Steer {
            loaded: Arc::new(LoadedSteer {
                architecture: Architecture::find(model.architecture()?),
                n_layer: model.n_layer()? as usize,
                n_embd: model.n_embd()? as usize,
                fingerprint: Fingerprint::of(&model)?,
                has_sliding_window: model.metadata().get(&sliding_window).is_some(),
                control_vector,
                edits,
                choices: compiled.choices,
                largest,
                coefficient: AtomicU32::new(0),
            }),
        };
        steer.set_coefficient(options.coefficient)?;
        Ok(steer)
    }

    /// The control vector to set with `llama_set_adapter_cvec`, at the current coefficient.
    ///
    /// It is added to the residual stream after blocks 1 and up. `None` if nothing is added. Set it again whenever the
    /// coefficient changes.
    pub fn control_vector(&self) -> Option<ControlVector> {
        let coefficient = self.coefficient();
        let vector = self.loaded.control_vector.as_ref().filter(|_| coefficient != 0.0)?;
        let rows = vector.rows.iter().map(|x| x * coefficient).collect();
        Some(ControlVector { n_embd: vector.n_embd, rows })
    }

    /// Whether some part needs the callback, beyond the control vector.
    pub fn needs_callback(&self) -> bool {
        !self.loaded.edits.is_empty()
    }

    /// How each part is applied, in sentences for the user.
    pub fn choices(&self) -> &[String] {
        &self.loaded.choices
    }

    /// Number of the model's layers (blocks).
    pub fn n_layer(&self) -> usize {
        self.loaded.n_layer
    }

    /// Width of the model's residual stream.
    pub fn n_embd(&self) -> usize {
        self.loaded.n_embd
    }

    /// The factor on the file's own coefficients.
    pub fn coefficient(&self) -> f32 {
        self.loaded.coefficient()
    }

    /// Changes the factor on the file's own coefficients.
    ///
    /// This is allowed during a decode: each micro-batch uses one coefficient throughout. At 0 the callback does
    /// nothing, and logits have the same bits as the model's own.
    ///
    /// # Errors
    /// [`Error::Setting`] if it is not finite, or so large that an edit would not be finite.
    pub fn set_coefficient(&self, coefficient: f32) -> Result<()> {
        if !coefficient.is_finite() {
            let reason = format!("expected a finite number, found {coefficient}");
            return Err(Error::setting("coefficient", reason));
        }
        if !(self.loaded.largest * coefficient).is_finite() {
            let reason =
                format!("with {coefficient:e}, an edit would exceed the largest f32, {:e}", f32::MAX);
            return Err(Error::setting("coefficient", reason));
        }
        self.loaded.set_coefficient(coefficient);
        Ok(())
    }

    /// Creates the callback for one context. Each context needs its own.
    ///
    /// # Errors
    /// [`Error::Setting`] for a number of sequences that no context can have.
    pub fn callback(&self, context: &ContextOptions) -> Result<Callback> {
        Callback::new(self.loaded.clone(), context)
    }
}

/// The largest number that the coefficient multiplies in an edit.
fn largest_of(edit: &Edit) -> f32 {
    let own = edit.coefficient.abs();
    match &edit.change {
        Change::Neuron { operation: Operation::Offset(offset), .. } => own.max((offset * own).abs()),
        Change::Direction { vector, operation: Operation::Offset(offset) } => {
            vector.iter().map(|v| (v * offset * own).abs()).fold(own, f32::max)
        }
        _ => own,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(model: &str, interventions: &str, options: &SteerOptions) -> Result<Steer> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("steer.json");
        let text = format!(
            "{{\"detox_gguf\": \"interventions\", \"format\": 1, \"interventions\": [{interventions}]}}"
        );
        std::fs::write(&path, text).unwrap();
        let model = format!("{}/gguf/tiny/{model}.gguf", env!("CARGO_MANIFEST_DIR"));
        Steer::load(Path::new(&model), &path, options)
    }

    const OFFSETS: &str = "{\"what\": {\"neurons\": [[1, 3], [2, 4]]}, \"edit\": {\"offset\": 2}}";

    #[test]
    fn the_callback_is_needed_only_beyond_a_control_vector() {
        let steer = load("llama", OFFSETS, &SteerOptions::default()).unwrap();
        assert!(!steer.needs_callback());
        assert_eq!(steer.control_vector().unwrap().rows.len(), 2 * 64);
        let options = SteerOptions { route: Route::Callback, ..SteerOptions::default() };
        let steer = load("llama", OFFSETS, &options).unwrap();
        assert!(steer.needs_callback() && steer.control_vector().is_none());
        let steer = load("gemma3", OFFSETS, &SteerOptions::default()).unwrap();
        assert!(steer.needs_callback() && steer.control_vector().is_none());
    }

    #[test]
    fn a_control_vector_with_another_model_hint_needs_force() {
        use crate::gguf::{GgufWriter, Metadata, TensorSpec, TensorType, Value};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("steer.gguf");
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/gguf/tiny/llama.gguf");
        let open = |hint: &str, force: bool| {
            let mut metadata = Metadata::new();
            metadata.set("general.architecture", Value::Str("controlvector".into()));
            metadata.set("controlvector.model_hint", Value::Str(hint.into()));
            let spec =
                TensorSpec { name: "direction.1".into(), shape: vec![64], tensor_type: TensorType::F32 };
            let mut writer = GgufWriter::create(&path, &metadata, vec![spec]).unwrap();
            writer.write_f32s(&[1.0; 64]).unwrap();
            writer.finish().unwrap();
            Steer::load(Path::new(model), &path, &SteerOptions { force, ..SteerOptions::default() })
        };
        assert!(open("llama", false).is_ok());
        let error = open("qwen2", false).unwrap_err();
        assert!(
            error.to_string().contains("qwen2") && error.hint().unwrap().contains("set force"),
            "{error}"
        );
        assert!(open("qwen2", true).is_ok());
    }

    #[test]
    fn the_coefficient_scales_the_control_vector() {
        let steer = load("llama", OFFSETS, &SteerOptions::default()).unwrap();
        let whole = steer.control_vector().unwrap().rows;
        steer.clone().set_coefficient(-0.5).unwrap();
        let half = steer.control_vector().unwrap().rows;
        assert!(whole.iter().zip(&half).all(|(a, b)| a * -0.5 == *b));
        steer.set_coefficient(0.0).unwrap();
        assert!(steer.control_vector().is_none());
    }

    #[test]
    fn rejects_coefficients_that_are_not_finite_or_make_an_edit_infinite() {
        let steer = load("llama", OFFSETS, &SteerOptions::default()).unwrap();
        for coefficient in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(steer.set_coefficient(coefficient).is_err(), "{coefficient}");
        }
        let options = SteerOptions { route: Route::Callback, ..SteerOptions::default() };
        let steer = load("llama", OFFSETS, &options).unwrap();
        assert!(steer.set_coefficient(f32::MAX).is_err(), "twice the largest f32");
        assert_eq!(steer.coefficient(), 1.0);
        let options = SteerOptions { coefficient: f32::NAN, ..options };
        assert!(load("llama", OFFSETS, &options).unwrap_err().is_usage());
    }
}
