//! `steer`: makes interventions from neurons, from text or from a probe, and combines them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};

use crate::check::steering::{self, Difference};
use crate::engine::steering::{Operation, When};
use crate::engine::{Steering, Token};
use crate::error::{Error, Result};
use crate::eval::prompts::PromptSource;
use crate::gguf::{GgufFile, Metadata, Value};
use crate::interp::contrast::{self, ContrastMethod, contrast_directions};
use crate::interp::probe::{Probe, ProbePlace};
use crate::progress::Progress;
use crate::steer::compile::{self, Compiled, Route};
use crate::steer::{
    ControlVectorFile, Fingerprint, Intervention, Interventions, Neuron, SteerFile, Target, bake, combined,
    control_vector,
};

use super::arguments::{EngineArguments, check_output};
use super::locate::read_neurons;
use super::print;
use super::progress::Shown;
use super::steering::SteeringArguments;

/// Arguments of `steer`.
#[derive(Debug, Args)]
pub struct SteerCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// File to write: a control vector (.gguf), interventions (.json), or with --bake a model
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Write a copy of the model with the steering inside, as biases of its down projections
    #[arg(long)]
    bake: bool,
    /// Leave neurons of layer 0 out, which no control vector can hold
    #[arg(long, conflicts_with = "bake", requires = "neurons")]
    without_layer_0: bool,
    /// Compare the ways of steering on the program's own prompts
    #[arg(long)]
    exact_check: bool,
    #[command(flatten)]
    neurons: NeuronArguments,
    #[command(flatten)]
    text: TextArguments,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

/// An intervention on neurons.
#[derive(Debug, Args)]
#[command(next_help_heading = "From neurons")]
struct NeuronArguments {
    /// Neurons: [[layer, index], …], or what `locate` wrote
    #[arg(long, value_name = "FILE")]
    neurons: Option<PathBuf>,
    /// Add this to their activations
    #[arg(long, value_name = "X", allow_negative_numbers = true, requires = "neurons")]
    offset: Option<f32>,
    /// Set their activations to this
    #[arg(
        long,
        value_name = "X",
        allow_negative_numbers = true,
        requires = "neurons",
        conflicts_with = "offset"
    )]
    assign: Option<f32>,
    /// Multiply their activations by this; 0 switches them off
    #[arg(long, value_name = "X", allow_negative_numbers = true, requires = "neurons", conflicts_with_all = ["offset", "assign"])]
    scale: Option<f32>,
    /// Keep their activations between two values
    #[arg(long, num_args = 2, value_names = ["MIN", "MAX"], allow_negative_numbers = true, requires = "neurons", conflicts_with_all = ["offset", "assign", "scale"])]
    clamp: Vec<f32>,
    /// On which tokens
    #[arg(long, value_enum, default_value = "both", requires = "neurons")]
    when: WhenArgument,
}

/// `prompt`, `generation` or `both`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WhenArgument {
    /// Those of the prompt
    Prompt,
    /// Those that follow it
    Generation,
    /// All
    Both,
}

/// Directions computed from text or a probe.
#[derive(Debug, Args)]
#[command(next_help_heading = "From text")]
struct TextArguments {
    /// Directions from toxic to benign text: JSON lines with toxic and benign [without FILE: the program's own]
    #[arg(long, value_name = "FILE", num_args = 0..=1, group = "directions")]
    contrast: Option<Option<PathBuf>>,
    /// Mean difference, or first principal component of the differences
    #[arg(long, value_enum, default_value = "mean", requires = "contrast")]
    method: MethodArgument,
    /// The direction of a probe, of length 1
    #[arg(long, value_name = "FILE", group = "directions")]
    probe: Option<PathBuf>,
    /// Layers that get a direction, both ends included [default: all from 1; with --probe the one it reads]
    #[arg(long, num_args = 2, value_names = ["START", "END"], requires = "directions")]
    layers: Vec<usize>,
}

/// How a contrastive direction is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodArgument {
    /// Mean of the toxic minus mean of the benign
    Mean,
    /// First principal component, as long as the mean difference is along it
    Pca,
}

/// What `steer` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    ControlVector,
    Interventions,
    Model,
}

impl SteerCommand {
    /// Makes, combines, writes, and if asked compares.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let model = GgufFile::open(&self.model)?;
        let form = self.form()?;
        self.check_output(&model)?;
        if self.bake {
            bake::check_architecture(&model)?;
        }
        let fingerprint = Fingerprint::of(&model)?;
        let mut sources = self.steering.sources()?;
        if let Some(path) = &self.neurons.neurons {
            sources.push((self.of_neurons(path, &model, &fingerprint)?, 1.0));
        }
        if let Some(directions) = self.directions(&model, interrupt)? {
            let file = ControlVectorFile {
                path: self.output.clone(),
                model_hint: Some(fingerprint.architecture.clone()),
                fingerprint: Some(fingerprint.clone()),
                directions,
                metadata: Metadata::new(),
            };
            sources.push((SteerFile::ControlVector(file), 1.0));
        }
        if sources.is_empty() {
            return Err(Error::setting("steer", "expected something to make a steering of").with_hint("give --neurons FILE --offset X, --contrast, --probe FILE, or files to combine with --steer FILE:COEF"));
        }
        // Whatever is written, it is checked against the model first: the files say that they are for it.
        let compiled = self.compile(&model, &sources, Route::Cheapest)?;
        match form {
            Form::Model => self.write_baked(&model, &sources, compiled.steering)?,
            Form::ControlVector => self.write_control_vector(&fingerprint, &sources, compiled)?,
            Form::Interventions => {
                for choice in &compiled.choices {
                    eprintln!("{choice}");
                }
                self.write_interventions(&model, &fingerprint, &sources)?;
            }
        }
        eprintln!("{}: {}", if self.bake { "model" } else { "steering" }, self.output.display());
        if self.exact_check { self.compare_ways(&model, &sources) } else { Ok(()) }
    }

    /// What is written, and whether the rest of what was typed goes into it.
    fn form(&self) -> Result<Form> {
        let ending = self.output.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let form = match (self.bake, ending) {
            (true, _) => Form::Model,
            (false, "gguf") => Form::ControlVector,
            (false, "json") => Form::Interventions,
            _ => {
                return Err(Error::setting(
                    "-o/--output",
                    format!("expected a name ending in .gguf or .json, found {}", self.output.display()),
                ));
            }
        };
        let has_loras = !self.steering.loras()?.is_empty();
        match form {
            Form::Model if has_loras => {
                Err(Error::setting("--bake", "an adapter cannot be baked in as biases"))
            }
            Form::Interventions if has_loras => {
                Err(Error::setting("--lora", "an intervention file holds no adapter")
                    .with_hint("give --lora where the model runs, beside --steer"))
            }
            form => Ok(form),
        }
    }

    fn check_output(&self, model: &GgufFile) -> Result<()> {
        let mut read = self.steering.files()?;
        read.extend(
            self.text.contrast.iter().flatten().chain(&self.text.probe).chain(&self.neurons.neurons).cloned(),
        );
        read.extend(model.part_paths().map(Path::to_path_buf));
        check_output(&self.output, &read.iter().map(PathBuf::as_path).collect::<Vec<_>>())
    }

    fn of_neurons(&self, path: &Path, model: &GgufFile, fingerprint: &Fingerprint) -> Result<SteerFile> {
        let arguments = &self.neurons;
        let operation = match (arguments.offset, arguments.assign, arguments.scale, &arguments.clamp[..]) {
            (Some(x), ..) => Operation::Offset(x),
            (_, Some(x), ..) => Operation::Assign(x),
            (_, _, Some(x), _) => Operation::Scale(x),
            (.., &[min, max]) => Operation::Clamp { min, max },
            _ => {
                return Err(Error::setting("--neurons", "expected what to do with them").with_hint("add --offset X (the paper's intervention; negative suppresses), --assign, --scale or --clamp"));
            }
        };
        let numbers =
            [("--offset", arguments.offset), ("--assign", arguments.assign), ("--scale", arguments.scale)];
        for (flag, x) in numbers.into_iter().filter_map(|(flag, x)| Some((flag, x?))) {
            if !x.is_finite() {
                let reason = format!("expected a finite number of at most {:e}, found {x}", f32::MAX);
                return Err(Error::setting(flag, reason));
            }
        }
        let mut neurons: Vec<Neuron> = read_neurons(path, model, self.steering.force)?.neurons();
        if self.without_layer_0 {
            let n = neurons.len();
            neurons.retain(|neuron| neuron.layer > 0);
            eprintln!("{} of {n} neurons are in layer 0 and were left out", n - neurons.len());
        }
        let when = match arguments.when {
            WhenArgument::Prompt => When::Prompt,
            WhenArgument::Generation => When::Generation,
            WhenArgument::Both => When::Both,
        };
        let intervention = Intervention::new(Target::Neurons(neurons), operation, when, None, 1.0)
            .map_err(|reason| Error::input(path, None, reason))?;
        Ok(SteerFile::Interventions(Interventions {
            path: path.to_path_buf(),
            fingerprint: Some(fingerprint.clone()),
            list: vec![intervention],
        }))
    }

    /// Directions from text or a probe, by layer, if asked for.
    fn directions(
        &self,
        model: &GgufFile,
        interrupt: &AtomicBool,
    ) -> Result<Option<BTreeMap<usize, Vec<f32>>>> {
        let last = (model.n_layer()? as usize).saturating_sub(1);
        let layers = |default: (usize, usize)| -> Result<std::ops::RangeInclusive<usize>> {
            let (start, end) = match self.text.layers[..] {
                [start, end] => (start, end),
                _ => default,
            };
            if start < 1 || end > last || start > end {
                let reason = format!("expected layers from 1 to {last}, found {start} to {end}");
                return Err(Error::setting("--layers", reason));
            }
            Ok(start..=end)
        };
        if let Some(path) = &self.text.probe {
            let probe = Probe::read(path)?;
            probe.check(model, path, self.steering.force)?;
            let read = match probe.place {
                ProbePlace::Block(il) => il as usize,
                ProbePlace::Embedding => 1,
                ProbePlace::FinalNorm => last,
            };
            let unit = probe.unit_direction();
            return Ok(Some(layers((read, read))?.map(|layer| (layer, unit.clone())).collect()));
        }
        let Some(file) = &self.text.contrast else { return Ok(None) };
        let pairs = match file {
            Some(path) => contrast::read(path)?,
            None => contrast::own(),
        };
        let layers = layers((1, last))?;
        let method = match self.text.method {
            MethodArgument::Mean => ContrastMethod::Mean,
            MethodArgument::Pca => ContrastMethod::PrincipalComponent,
        };
        let options = self.engine.session_options();
        let opened = self.engine.open(&self.model)?;
        let progress = &mut Shown::new();
        contrast_directions(&opened, &options, &pairs, layers, method, progress, interrupt).map(Some)
    }

    fn compile(&self, model: &GgufFile, sources: &[(SteerFile, f32)], route: Route) -> Result<Compiled> {
        let options = self.steering.compile_options(route);
        compile::compile(model, sources, &self.steering.loras()?, &options)
    }

    fn write_control_vector(
        &self,
        fingerprint: &Fingerprint,
        sources: &[(SteerFile, f32)],
        compiled: Compiled,
    ) -> Result<()> {
        let directions = combined::as_control_vector(compiled)?;
        control_vector::write(&self.output, fingerprint, &directions, &self.provenance(sources))
    }

    fn provenance(&self, sources: &[(SteerFile, f32)]) -> Metadata {
        let mut metadata = Metadata::new();
        metadata.set("detox_gguf.version", Value::Str(crate::version().into()));
        metadata.set("detox_gguf.source", Value::Str(self.described(sources)));
        // What neurons write is then what they write under these adapters.
        let loras = self.steering.lora.iter().map(|path| path.display().to_string());
        let loras: Vec<String> = loras.chain(self.steering.lora_scaled.iter().cloned()).collect();
        if !loras.is_empty() {
            metadata.set("detox_gguf.lora", Value::Str(loras.join(", ")));
        }
        metadata
    }

    /// What it was made from, in words.
    fn described(&self, sources: &[(SteerFile, f32)]) -> String {
        let of_source = |(file, coefficient): &(SteerFile, f32)| {
            let name = crate::file::base_name(file.path());
            match file {
                SteerFile::ControlVector(_) if file.path() == self.output => match self.text.probe {
                    Some(_) => "the direction of a probe".to_owned(),
                    None => format!("contrast of text, {:?}", self.text.method).to_lowercase(),
                },
                SteerFile::Interventions(list) => {
                    let edits =
                        list.list.iter().map(|i| format!("{:?} x {}", i.operation(), i.coefficient()));
                    format!("{name} ({}) x {coefficient}", edits.collect::<Vec<_>>().join(", "))
                }
                SteerFile::ControlVector(_) => format!("{name} x {coefficient}"),
            }
        };
        sources.iter().map(of_source).collect::<Vec<_>>().join("; ")
    }

    fn write_interventions(
        &self,
        model: &GgufFile,
        fingerprint: &Fingerprint,
        sources: &[(SteerFile, f32)],
    ) -> Result<()> {
        let range = self.steering.compile_options(Route::Cheapest).layer_range;
        let layers = match range {
            None => None,
            Some(_) => {
                let layers = control_vector::resolve_layer_range(range, model.n_layer()? as usize)?;
                Some((*layers.start() as u32, *layers.end() as u32))
            }
        };
        combined::as_interventions(sources, layers, fingerprint, &self.output)?.write(&self.output)
    }

    fn write_baked(&self, model: &GgufFile, sources: &[(SteerFile, f32)], steering: Steering) -> Result<()> {
        let vectors = combined::as_layer_vectors(model, steering)?;
        let provenance = [
            ("detox_gguf.version", crate::version().to_owned()),
            ("detox_gguf.baked", self.described(sources)),
        ];
        let mut progress = Shown::new();
        let mut shown = None;
        bake::bake(model, &vectors, &provenance, &self.output, |done, total| {
            let before = *shown.get_or_insert_with(|| {
                progress.start("copying, MiB", total >> 20, 0);
                0
            });
            progress.advance((done >> 20) - (before >> 20));
            shown = Some(done);
        })?;
        progress.finish();
        Ok(())
    }

    /// Prints how far the cheapest way and the callback agree, beside the noise floor.
    fn compare_ways(&self, file: &GgufFile, sources: &[(SteerFile, f32)]) -> Result<()> {
        let cheapest = self.compile(file, sources, Route::Cheapest)?.steering;
        let callback = self.compile(file, sources, Route::Callback)?.steering;
        let model = self.engine.open(&self.model)?;
        let options = self.engine.session_options();
        let prompts = PromptSource::Own.read(&[], Some(4))?;
        let texts: Vec<Vec<Token>> =
            prompts.iter().map(|p| model.tokenize_prompt(&p.text)).collect::<Result<_>>()?;
        let effect = steering::difference(&model, &Steering::default(), &cheapest, &texts, &options)?;
        let ways = steering::difference(&model, &callback, &cheapest, &texts, &options)?;
        let floor = steering::noise_floor(&model, &callback, &texts, &options)?;
        let row = |name: &str, d: &Difference| {
            format!(
                "{name:<34}{:>12.2e}{:>12.2e}{:>12.3}\n",
                d.mean_kl, d.largest_kl, d.largest_logit_difference
            )
        };
        print(&format!(
            "{} tokens of {} prompts        mean KL  largest KL       logit\n{}{}{}",
            effect.n_tokens,
            texts.len(),
            row("effect of the steering", &effect),
            row("cheapest way against callback", &ways),
            row("noise floor (0.001 more)", &floor),
        ))
    }
}
