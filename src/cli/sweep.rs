//! `sweep`: an intervention at several settings, against random neurons or directions.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;
use rand_core::Rng;
use serde_json::json;

use crate::engine::Steering;
use crate::engine::sample::random_stream;
use crate::engine::steering::{ControlVector, LoraScaled};
use crate::error::{Error, Result};
use crate::eval::run::Source;
use crate::gguf::GgufFile;
use crate::report::{json as report_json, sweep as report};
use crate::steer::compile::{self, CompileOptions, Compiled};
use crate::steer::neuron::random_neurons;
use crate::steer::{Intervention, Interventions, Neuron, NeuronFile, SteerFile};
use crate::study::sweep::{self, Kind, Setting};

use super::arguments::{EngineArguments, PromptArguments, SamplingArguments};
use super::eval::{MeasureArguments, write_reports};
use super::progress::Shown;
use super::steering::SteeringArguments;
use super::{may_colour, print};

/// Arguments of `sweep`.
#[derive(Debug, Args)]
pub struct SweepCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Folder for the runs and the report; the same command goes on with a sweep that was broken off
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Neurons to offset
    #[arg(long, value_name = "FILE", required_unless_present_any = ["steer", "control_vector", "control_vector_scaled"])]
    neurons: Option<PathBuf>,
    /// Offsets on the neurons [default: the paper's 0,-1,-2,-3,-4,-5]
    #[arg(
        long,
        value_name = "X,…",
        value_delimiter = ',',
        // "-1,-2" is no number to clap.
        allow_hyphen_values = true,
        requires = "neurons",
        conflicts_with = "coefficients"
    )]
    offsets: Vec<f32>,
    /// Coefficients of the steering files, in place of offsets [default: 0,0.25,0.5,1,1.5,2]
    #[arg(
        long,
        value_name = "C,…",
        value_delimiter = ',',
        // "-1,-2" is no number to clap.
        allow_hyphen_values = true,
        conflicts_with = "neurons"
    )]
    coefficients: Vec<f32>,
    /// Draws of the control: random neurons of the same layers, or random directions of the same lengths
    #[arg(long, value_name = "N", default_value_t = 1)]
    controls: u32,
    #[command(flatten)]
    prompts: PromptArguments,
    #[command(flatten)]
    sampling: SamplingArguments,
    #[command(flatten)]
    measure: MeasureArguments,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

impl SweepCommand {
    /// Evaluates every setting, and reports.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let file = GgufFile::open(&self.model)?;
        let (what, settings) = match &self.neurons {
            Some(path) => self.of_neurons(path, &file)?,
            None => self.of_files(&file)?,
        };
        let (prompts, prompts_name) = self.prompts.read()?;
        let source = Source::Model {
            path: self.model.clone(),
            prompts,
            prompts_name,
            options: self.sampling.options()?,
            steering: Steering::default(),
            steered_by: Vec::new(),
        };
        let base = self.measure.base.clone().unwrap_or_else(|| self.model.clone());
        let request = self.measure.request(source, Some(base), &self.engine);
        crate::file::create_folder(&self.output)?;
        let sweep = sweep::sweep(what, &request, &settings, &self.output, interrupt, &mut Shown::new());
        let sweep = sweep.inspect_err(|error| {
            if matches!(error, Error::Interrupted) {
                eprintln!("the same command goes on after the last whole unit in {}", self.output.display());
            }
        })?;
        write_reports(
            &self.output,
            "sweep",
            &[
                ("json", report_json::to_json(&sweep)),
                ("csv", report::to_csv(&sweep)),
                ("md", report::to_markdown(&sweep)),
                ("html", report::to_html(&sweep)),
            ],
        )?;
        print(&report::to_terminal(&sweep, may_colour(&std::io::stdout())))?;
        eprintln!("report: {}", self.output.join("sweep.html").display());
        Ok(())
    }

    /// The values without 0, which is the baseline, in order of size.
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

    /// The model with the adapters, if any: what is swept is what comes on top.
    fn baseline(&self, loras: &[LoraScaled]) -> Result<Setting> {
        Ok(Setting {
            value: 0.0,
            kind: Kind::Baseline,
            steering: Steering { loras: loras.to_vec(), ..Steering::default() },
            steered_by: self.steering.record(&[], loras)?,
        })
    }

    fn of_neurons(&self, path: &std::path::Path, file: &GgufFile) -> Result<(String, Vec<Setting>)> {
        let chosen = NeuronFile::read_for(path, file, self.steering.force)?.neurons();
        let n_ff = file.n_ff_per_layer()?;
        if !self.steering.is_empty() {
            return Err(Error::setting("--neurons", "a sweep changes neurons or steering files, not both"));
        }
        let options = CompileOptions { force: self.steering.force, ..CompileOptions::default() };
        let steering = |neurons: &[Neuron], offset: f32| -> Result<Compiled> {
            let list = Intervention::neuron_offset(neurons.to_vec(), offset)
                .map_err(|reason| Error::input(path, None, reason))?;
            let interventions =
                Interventions { path: path.to_path_buf(), fingerprint: None, list: vec![list] };
            let sources = [(SteerFile::Interventions(interventions), 1.0)];
            compile::compile(file, &sources, &[], &options)
        };
        let mut settings = vec![self.baseline(&[])?];
        let controls = (0..self.controls)
            .map(|draw| random_neurons(&chosen, &n_ff, self.sampling.seed, draw))
            .collect::<Result<Vec<_>>>()?;
        for value in Self::values("--offsets", &self.offsets, &[-1.0, -2.0, -3.0, -4.0, -5.0])? {
            let record = |neurons: &[Neuron]| vec![json!({ "neurons": neurons, "offset": value })];
            let compiled = steering(&chosen, value)?;
            say_choices(&settings, &compiled);
            settings.push(Setting {
                value: short(value),
                kind: Kind::Chosen,
                steering: compiled.steering,
                steered_by: record(&chosen),
            });
            for (draw, neurons) in controls.iter().enumerate() {
                settings.push(Setting {
                    value: short(value),
                    kind: Kind::Control { draw: draw as u32 },
                    steering: steering(neurons, value)?.steering,
                    steered_by: record(neurons),
                });
            }
        }
        let name = crate::file::base_name(path);
        Ok((format!("offset on {} neurons of {name}", chosen.len()), settings))
    }

    fn of_files(&self, file: &GgufFile) -> Result<(String, Vec<Setting>)> {
        let sources = self.steering.sources()?;
        let loras = self.steering.loras()?;
        let options = self.steering.compile_options(compile::Route::Cheapest);
        // Checked even if every setting leaves them out.
        let loras = compile::compile(file, &[], &loras, &CompileOptions { layer_range: None, ..options })?
            .steering
            .loras;
        let mut settings = vec![self.baseline(&loras)?];
        for value in Self::values("--coefficients", &self.coefficients, &[0.25, 0.5, 1.0, 1.5, 2.0])? {
            let scaled: Vec<(SteerFile, f32)> =
                sources.iter().map(|(source, coefficient)| (source.clone(), coefficient * value)).collect();
            let compiled = compile::compile(file, &scaled, &loras, &options)?;
            say_choices(&settings, &compiled);
            let steering = compiled.steering;
            let steered_by = self.steering.record(&scaled, &loras)?;
            let controls = match (&steering.control_vector, steering.edits.is_empty()) {
                (Some(vector), true) => (0..self.controls)
                    .map(|draw| (draw, random_directions(vector, self.sampling.seed, draw)))
                    .collect(),
                // Edits by callback have no counterpart that is random in the same way.
                _ => Vec::new(),
            };
            settings.push(Setting {
                value: short(value),
                kind: Kind::Chosen,
                steering,
                steered_by: steered_by.clone(),
            });
            for (draw, vector) in controls {
                settings.push(Setting {
                    value: short(value),
                    kind: Kind::Control { draw },
                    steering: Steering {
                        loras: loras.clone(),
                        control_vector: Some(vector),
                        edits: Vec::new(),
                    },
                    steered_by: vec![json!({ "random_directions_like": steered_by, "draw": draw })],
                });
            }
        }
        let names: Vec<String> = sources.iter().map(|(s, _)| crate::file::base_name(s.path())).collect();
        Ok((format!("coefficient of {}", names.join(" and ")), settings))
    }
}

/// Says which way the first setting goes; the others go the same way.
fn say_choices(settings: &[Setting], compiled: &Compiled) {
    if settings.len() == 1 {
        for choice in &compiled.choices {
            eprintln!("steering: {choice}");
        }
    }
}

/// The shortest decimal that reads back as the same f32: -0.1 and not -0.10000000149.
fn short(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// Directions of the same length in each layer, uniform on the sphere.
fn random_directions(like: &ControlVector, seed: u64, draw: u32) -> ControlVector {
    let mut random = random_stream(seed, "random directions", draw);
    // Irwin-Hall of 12: nearly normal, so that the direction is nearly uniform.
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
    fn random_directions_are_as_long_as_what_they_stand_for() {
        let like = ControlVector { n_embd: 4, rows: vec![3.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0] };
        let drawn = random_directions(&like, 1, 0);
        let norm = drawn.rows[..4].iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((norm - 5.0).abs() < 1e-5);
        assert_eq!(drawn.rows[4..], [0.0; 4]);
        assert_ne!(drawn, random_directions(&like, 1, 1));
        assert_eq!(drawn, random_directions(&like, 1, 0));
    }
}
