//! The settings of a sweep: which runs to make, each with its steering.

use std::path::Path;

use rand_core::Rng;
use serde_json::{Value, json};

use super::{Kind, Setting};
use crate::engine::Steering;
use crate::engine::random::random_stream;
use crate::engine::steering::{ControlVector, LoraScaled};
use crate::error::{Error, Result};
use crate::file::base_name;
use crate::gguf::GgufFile;
use crate::steer::compile::{CompileOptions, Compiled, compile};
use crate::steer::neuron::random_neurons;
use crate::steer::record::record;
use crate::steer::{Intervention, Interventions, Neuron, SteerFile};

/// Default offsets: the paper's. The baseline is offset 0.
pub const OFFSETS: [f32; 5] = [-1.0, -2.0, -3.0, -4.0, -5.0];

/// Default coefficients. The baseline is coefficient 0.
pub const COEFFICIENTS: [f32; 5] = [0.25, 0.5, 1.0, 1.5, 2.0];

/// The most controls of a setting. Each is a run of its own.
const MOST_CONTROLS: u32 = 1000;

/// Random controls for each setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Controls {
    /// Number of draws; 0 for no control.
    pub n_draws: u32,
    /// Seed of the draws.
    pub seed: u64,
}

/// The runs of a sweep.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What varies, in words, for the report.
    pub what: String,
    /// The baseline, then the values sorted by size, each followed by its controls.
    pub settings: Vec<Setting>,
    /// How the steering is applied, in words. It is the same for all values.
    pub choices: Vec<String>,
}

impl Controls {
    fn check(&self) -> Result<()> {
        if self.n_draws <= MOST_CONTROLS {
            return Ok(());
        }
        let reason = format!("expected at most {MOST_CONTROLS}, found {}", self.n_draws);
        Err(Error::setting("--controls", reason))
    }
}

impl Plan {
    /// Plans a sweep of offsets on chosen neurons, with random neurons of the same layers as controls.
    ///
    /// `path` is the file that the neurons come from. An empty `offsets` means [`OFFSETS`].
    ///
    /// # Errors
    /// [`Error::Setting`] if an offset is not finite, or if all are 0. Also those of [`random_neurons`] and
    /// [`compile`].
    pub fn of_neurons(
        model: &GgufFile,
        path: &Path,
        neurons: &[Neuron],
        offsets: &[f32],
        controls: Controls,
        force: bool,
    ) -> Result<Plan> {
        controls.check()?;
        let n_ff = model.n_ff_per_layer()?;
        let options = CompileOptions { force, ..CompileOptions::default() };
        let compile_offset = |neurons: &[Neuron], offset: f32| -> Result<Compiled> {
            let intervention = Intervention::neuron_offset(neurons.to_vec(), offset)
                .map_err(|reason| Error::input(path, None, reason))?;
            let interventions =
                Interventions { path: path.to_path_buf(), fingerprint: None, list: vec![intervention] };
            compile(model, &[(SteerFile::Interventions(interventions), 1.0)], &[], &options)
        };
        let draws = (0..controls.n_draws)
            .map(|draw| random_neurons(neurons, &n_ff, controls.seed, draw))
            .collect::<Result<Vec<_>>>()?;
        let what = format!("offset on {} neurons of {}", neurons.len(), base_name(path));
        let mut plan = Plan::new(what, Steering::default(), Vec::new());
        for offset in values("--offsets", offsets, &OFFSETS)? {
            let record = |neurons: &[Neuron]| vec![json!({ "neurons": neurons, "offset": offset })];
            let compiled = compile_offset(neurons, offset)?;
            plan.push_chosen(offset, compiled, record(neurons));
            for (draw, random) in (0..).zip(&draws) {
                let steering = compile_offset(random, offset)?.steering;
                plan.push(offset, Kind::Control { draw }, steering, record(random));
            }
        }
        Ok(plan)
    }

    /// Plans a sweep of a coefficient that scales `sources`. `loras` are the same in every run.
    ///
    /// Controls are random directions of the same lengths. There are none if the steering needs edits by
    /// callback, because such edits have no random counterpart. An empty `coefficients` means [`COEFFICIENTS`].
    ///
    /// # Errors
    /// [`Error::Setting`] if a coefficient is not finite, or if all are 0. Also those of [`compile`].
    pub fn of_files(
        model: &GgufFile,
        sources: &[(SteerFile, f32)],
        loras: &[LoraScaled],
        coefficients: &[f32],
        controls: Controls,
        options: CompileOptions,
    ) -> Result<Plan> {
        controls.check()?;
        // Compiled alone, so that the adapters are checked even if no setting uses them.
        let loras =
            compile(model, &[], loras, &CompileOptions { layer_range: None, ..options })?.steering.loras;
        let names: Vec<String> = sources.iter().map(|(source, _)| base_name(source.path())).collect();
        let baseline = Steering { loras: loras.clone(), ..Steering::default() };
        let recorded = record(&[], &loras, options.layer_range)?;
        let mut plan = Plan::new(format!("coefficient of {}", names.join(" and ")), baseline, recorded);
        for value in values("--coefficients", coefficients, &COEFFICIENTS)? {
            let scaled: Vec<(SteerFile, f32)> =
                sources.iter().map(|(source, coefficient)| (source.clone(), coefficient * value)).collect();
            let compiled = compile(model, &scaled, &loras, &options)?;
            let steered_by = record(&scaled, &loras, options.layer_range)?;
            let vector =
                compiled.steering.control_vector.clone().filter(|_| compiled.steering.edits.is_empty());
            plan.push_chosen(value, compiled, steered_by.clone());
            let Some(vector) = vector else { continue };
            for draw in 0..controls.n_draws {
                let steering = Steering {
                    loras: loras.clone(),
                    control_vector: Some(random_directions(&vector, controls.seed, draw)),
                    edits: Vec::new(),
                };
                let steered_by = vec![json!({ "random_directions_like": steered_by, "draw": draw })];
                plan.push(value, Kind::Control { draw }, steering, steered_by);
            }
        }
        Ok(plan)
    }

    fn new(what: String, baseline: Steering, steered_by: Vec<Value>) -> Plan {
        let baseline = Setting { value: 0.0, kind: Kind::Baseline, steering: baseline, steered_by };
        Plan { what, settings: vec![baseline], choices: Vec::new() }
    }

    fn push_chosen(&mut self, value: f32, compiled: Compiled, steered_by: Vec<Value>) {
        if self.settings.len() == 1 {
            self.choices = compiled.choices;
        }
        self.push(value, Kind::Chosen, compiled.steering, steered_by);
    }

    fn push(&mut self, value: f32, kind: Kind, steering: Steering, steered_by: Vec<Value>) {
        self.settings.push(Setting { value: shortest(value), kind, steering, steered_by });
    }
}

/// Checks the values of `flag`, sorts them by size, and removes 0, which is the baseline.
fn values(flag: &str, given: &[f32], default: &[f32]) -> Result<Vec<f32>> {
    let mut values = if given.is_empty() { default.to_vec() } else { given.to_vec() };
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(Error::setting(flag, format!("expected finite numbers, found {value}")));
    }
    values.retain(|&value| value != 0.0);
    values.sort_by(|a, b| a.abs().total_cmp(&b.abs()).then(a.total_cmp(b)));
    values.dedup();
    if values.is_empty() {
        return Err(Error::setting(flag, "expected a value other than 0"));
    }
    Ok(values)
}

/// Converts to f64 by way of the shortest decimal of the f32: -0.1, not -0.10000000149.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// Draws random directions of the same length in each layer, uniform on the sphere.
fn random_directions(like: &ControlVector, seed: u64, draw: u32) -> ControlVector {
    let mut random = random_stream(seed, "random directions", draw);
    // Irwin-Hall with 12 terms: nearly normal, so the direction is nearly uniform.
    let mut normal = || (0..12).map(|_| random.next_u32() as f32 / u32::MAX as f32).sum::<f32>() - 6.0;
    let norm = |row: &[f32]| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let rows = like.rows.chunks_exact(like.n_embd).flat_map(|row| {
        let drawn: Vec<f32> = row.iter().map(|_| normal()).collect();
        let scale = (norm(row) / norm(&drawn)) as f32;
        drawn.into_iter().map(move |x| x * scale)
    });
    ControlVector { n_embd: like.n_embd, rows: rows.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_directions_have_the_lengths_of_the_originals() {
        let like = ControlVector { n_embd: 4, rows: vec![3.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0] };
        let drawn = random_directions(&like, 1, 0);
        let norm = drawn.rows[..4].iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((norm - 5.0).abs() < 1e-5);
        assert_eq!(drawn.rows[4..], [0.0; 4]);
        assert_ne!(drawn, random_directions(&like, 1, 1));
        assert_eq!(drawn, random_directions(&like, 1, 0));
    }

    #[test]
    fn values_are_sorted_by_size_without_the_baseline() {
        assert_eq!(values("--offsets", &[-4.0, 0.0, -1.0, 1.0, -1.0], &OFFSETS).unwrap(), [-1.0, 1.0, -4.0]);
        assert_eq!(values("--offsets", &[], &OFFSETS).unwrap(), OFFSETS);
        assert!(values("--offsets", &[0.0], &OFFSETS).unwrap_err().is_usage());
        assert!(values("--offsets", &[f32::NAN], &OFFSETS).unwrap_err().is_usage());
    }
}
