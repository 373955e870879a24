//! The steering flags, shared by every command that runs a model.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use crate::engine::steering::LoraScaled;
use crate::engine::{Model, Steering};
use crate::error::{Error, Result};
use crate::gguf::{GgufFile, WatchedFile};
use crate::steer::argument::parse_scaled;
use crate::steer::compile::{self, CompileOptions, Compiled, Route};
use crate::steer::intervention::referenced_files;
use crate::steer::record::record;
use crate::steer::{ControlVectorFile, SteerArgument, SteerFile};

use super::arguments::EngineArguments;
use super::print;

/// Interventions, control vectors and adapters; they can be combined.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Steering")]
pub struct SteeringArguments {
    /// Intervention (JSON) or control vector (GGUF), with an optional coefficient; repeatable
    #[arg(long, value_name = "FILE[:COEF]")]
    pub steer: Vec<String>,
    /// Control vector; repeatable
    #[arg(long, value_name = "FILE")]
    pub control_vector: Vec<PathBuf>,
    /// Control vectors, each with its scale
    #[arg(long, value_name = "FILE:SCALE,…")]
    pub control_vector_scaled: Vec<String>,
    /// Apply control vectors only to these layers, inclusive
    #[arg(long, num_args = 2, value_names = ["START", "END"], allow_negative_numbers = true)]
    pub control_vector_layer_range: Vec<i32>,
    /// LoRA adapter; repeatable
    #[arg(long, value_name = "FILE")]
    pub lora: Vec<PathBuf>,
    /// LoRA adapters, each with its scale
    #[arg(long, value_name = "FILE:SCALE,…")]
    pub lora_scaled: Vec<String>,
    /// Accept files made for another quantisation or fine-tune of this model
    #[arg(long)]
    pub force: bool,
}

/// The flags, compiled for one model.
#[derive(Debug, Clone, Default)]
pub struct Steered {
    /// For the engine.
    pub steering: Steering,
    /// For `run.json`: each file with its hash and coefficient.
    pub by: Vec<Value>,
}

impl SteeringArguments {
    /// Whether no steering was requested.
    pub fn is_empty(&self) -> bool {
        [&self.steer, &self.control_vector_scaled, &self.lora_scaled].iter().all(|flag| flag.is_empty())
            && self.control_vector.is_empty()
            && self.control_vector_layer_range.is_empty()
            && self.lora.is_empty()
    }

    /// Opens the files, with their coefficients, in the order they are applied: control vectors, then `--steer`.
    pub fn sources(&self) -> Result<Vec<(SteerFile, f32)>> {
        let mut sources = Vec::new();
        let mut control_vector = |path: &Path, scale: f32| -> Result<()> {
            sources.push((SteerFile::ControlVector(ControlVectorFile::read(path)?), scale));
            Ok(())
        };
        for path in &self.control_vector {
            control_vector(path, 1.0)?;
        }
        for text in &self.control_vector_scaled {
            for (path, scale) in parse_scaled("--control-vector-scaled", text)? {
                control_vector(&path, scale)?;
            }
        }
        for text in &self.steer {
            sources.push(SteerArgument::parse(text)?.open()?);
        }
        Ok(sources)
    }

    /// The adapters with their scales.
    pub fn loras(&self) -> Result<Vec<LoraScaled>> {
        parse_loras(&self.lora, &self.lora_scaled)
    }

    /// Paths of all files given in the flags, and of those that intervention files refer to.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = self.control_vector.clone();
        for text in &self.control_vector_scaled {
            files.extend(parse_scaled("--control-vector-scaled", text)?.into_iter().map(|(path, _)| path));
        }
        for text in &self.steer {
            let path = SteerArgument::parse(text)?.path;
            files.extend(referenced_files(&path));
            files.push(path);
        }
        files.extend(self.loras()?.into_iter().map(|lora| lora.path));
        Ok(files)
    }

    /// Compile options for the given route.
    pub fn compile_options(&self, route: Route) -> CompileOptions {
        let layer_range = match self.control_vector_layer_range[..] {
            [start, end] => Some((start, end)),
            _ => None,
        };
        CompileOptions { layer_range, route, force: self.force }
    }

    /// Compiles the flags for the model at `path`, and prints how each part is applied.
    pub fn compile(&self, path: &Path) -> Result<Steered> {
        if self.is_empty() {
            return Ok(Steered::default());
        }
        // The files are read and hashed one after the other: both must see the same bytes.
        let files = self.files()?;
        let files = files.iter().filter(|file| file.is_file()).map(|file| WatchedFile::open(file));
        let files = files.collect::<Result<Vec<_>>>()?;
        let (sources, loras) = (self.sources()?, self.loras()?);
        let options = self.compile_options(Route::Cheapest);
        let Compiled { steering, choices } =
            compile::compile(&GgufFile::open(path)?, &sources, &loras, &options)?;
        for choice in choices {
            print::note(&format!("steering: {choice}"));
        }
        let by = record(&sources, &loras, options.layer_range)?;
        files.iter().try_for_each(WatchedFile::check_path)?;
        Ok(Steered { steering, by })
    }

    /// Loads the model at `path` and applies the steering.
    pub fn open(&self, path: &Path, engine: &EngineArguments) -> Result<Model> {
        let steered = self.compile(path)?;
        let model = engine.open(path)?;
        if steered.steering.is_empty() { Ok(model) } else { model.with_steering(steered.steering) }
    }
}

/// Refuses `--lora FILE:SCALE`, which names no file.
fn refuse_scale(path: &Path) -> Result<()> {
    let text = path.to_string_lossy();
    match text.rsplit_once(':') {
        Some((file, scale)) if !path.exists() && Path::new(file).exists() && scale.parse::<f32>().is_ok() => {
            Err(Error::setting("--lora", format!("expected a file, found {text}"))
                .with_hint(format!("--lora takes no scale: --lora-scaled {text}")))
        }
        _ => Ok(()),
    }
}

/// The adapters of `--lora`, then those of `--lora-scaled`, each with its scale.
pub fn parse_loras(lora: &[PathBuf], lora_scaled: &[String]) -> Result<Vec<LoraScaled>> {
    lora.iter().try_for_each(|path| refuse_scale(path))?;
    let mut loras: Vec<LoraScaled> =
        lora.iter().map(|path| LoraScaled { path: path.clone(), scale: 1.0 }).collect();
    for text in lora_scaled {
        let scaled = parse_scaled("--lora-scaled", text)?;
        loras.extend(scaled.into_iter().map(|(path, scale)| LoraScaled { path, scale }));
    }
    Ok(loras)
}
