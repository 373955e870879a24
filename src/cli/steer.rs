//! `steer`: makes control vectors and interventions from neurons, text or a probe, and combines files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};

use crate::check::difference::Difference;
use crate::check::steering;
use crate::engine::steering::{Operation, When};
use crate::engine::{Steering, Token};
use crate::error::{Error, Result};
use crate::eval::prompts::PromptSource;
use crate::file::base_name;
use crate::file::output::{self, Paths};
use crate::gguf::{GgufFile, Metadata, Value};
use crate::interp::contrast::{self, ContrastColumns, ContrastMethod, contrast_directions};
use crate::interp::probe::Probe;
use crate::progress::Progress;
use crate::steer::compile::{self, Compiled, Route};
use crate::steer::{
    ControlVectorFile, Fingerprint, Intervention, Interventions, Neuron, NeuronFile, SteerFile, Target, bake,
    combined, control_vector,
};

use super::arguments::EngineArguments;
use super::print;
use super::progress::Shown;
use super::steering::SteeringArguments;

/// Arguments of `steer`.
#[derive(Debug, Args)]
pub struct SteerCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// File to write: control vector (.gguf), intervention (.json), or with --bake a model (.gguf)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Write a copy of the model with the steering baked into biases of its down projections
    #[arg(long)]
    bake: bool,
    /// Skip neurons of layer 0, which a control vector cannot hold
    #[arg(long, conflicts_with = "bake", requires = "neurons")]
    without_layer_0: bool,
    /// Compare the result with steering by callback alone, on built-in prompts
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

/// Builds an intervention on neurons.
#[derive(Debug, Args)]
#[command(next_help_heading = "From neurons")]
struct NeuronArguments {
    /// Neurons: [[layer, index], …], or a file from `locate`
    #[arg(long, value_name = "FILE")]
    neurons: Option<PathBuf>,
    /// Add X to their activations
    #[arg(long, value_name = "X", allow_negative_numbers = true, requires = "neurons")]
    offset: Option<f32>,
    /// Set their activations to X
    #[arg(
        long,
        value_name = "X",
        allow_negative_numbers = true,
        requires = "neurons",
        conflicts_with = "offset"
    )]
    assign: Option<f32>,
    /// Multiply their activations by X; 0 switches them off
    #[arg(
        long,
        value_name = "X",
        allow_negative_numbers = true,
        requires = "neurons",
        conflicts_with_all = ["offset", "assign"]
    )]
    scale: Option<f32>,
    /// Limit their activations to the range from MIN to MAX
    #[arg(
        long,
        num_args = 2,
        value_names = ["MIN", "MAX"],
        allow_negative_numbers = true,
        requires = "neurons",
        conflicts_with_all = ["offset", "assign", "scale"]
    )]
    clamp: Vec<f32>,
    /// Tokens at which to change them
    #[arg(long, value_enum, default_value = "both", requires = "neurons")]
    when: WhenArgument,
}

/// `prompt`, `generation` or `both`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WhenArgument {
    /// Tokens of the prompt
    Prompt,
    /// Generated tokens
    Generation,
    /// All tokens
    Both,
}

/// Computes directions from text or from a probe.
#[derive(Debug, Args)]
#[command(next_help_heading = "From text or a probe")]
struct TextArguments {
    /// Directions from benign to toxic text; FILE is JSON or a table with toxic and benign [default: built-in pairs]
    #[arg(long, value_name = "FILE", num_args = 0..=1, group = "directions")]
    contrast: Option<Option<PathBuf>>,
    /// Column of --contrast with the toxic text [default: toxic]
    #[arg(long, value_name = "NAME", requires = "contrast")]
    toxic_column: Option<String>,
    /// Column of --contrast with the benign text [default: benign, neutral or similar]
    #[arg(long, value_name = "NAME", requires = "contrast")]
    benign_column: Option<String>,
    /// How to compute a direction from the pairs
    #[arg(long, value_enum, default_value = "mean", requires = "contrast")]
    method: MethodArgument,
    /// Use the direction of this probe, scaled to length 1
    #[arg(long, value_name = "FILE", group = "directions")]
    probe: Option<PathBuf>,
    /// Layers to add a direction to, inclusive [default: all from 1; with --probe, the layer it reads]
    #[arg(long, num_args = 2, value_names = ["START", "END"], requires = "directions")]
    layers: Vec<usize>,
}

/// How a direction is computed from pairs of texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodArgument {
    /// Mean of the toxic texts minus mean of the benign texts
    Mean,
    /// First principal component, scaled to the mean difference along it
    Pca,
}

/// The kind of file that `steer` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    ControlVector,
    Interventions,
    Model,
}

impl NeuronArguments {
    /// How to change the activations.
    fn operation(&self) -> Result<Operation> {
        let numbers = [("--offset", self.offset), ("--assign", self.assign), ("--scale", self.scale)];
        for (flag, x) in numbers.into_iter().filter_map(|(flag, x)| Some((flag, x?))) {
            if !x.is_finite() {
                let reason = format!("expected a finite number of at most {:e}, found {x}", f32::MAX);
                return Err(Error::setting(flag, reason));
            }
        }
        match (self.offset, self.assign, self.scale, &self.clamp[..]) {
            (Some(x), ..) => Ok(Operation::Offset(x)),
            (_, Some(x), ..) => Ok(Operation::Assign(x)),
            (_, _, Some(x), _) => Ok(Operation::Scale(x)),
            (.., &[min, max]) => Ok(Operation::Clamp { min, max }),
            _ => Err(Error::setting("--neurons", "expected an operation on the neurons, found none")
                .with_hint(
                    "add --offset X (the paper's intervention; a negative X suppresses them), --assign, --scale \
                     or --clamp",
                )),
        }
    }

    /// The tokens at which to change them.
    fn when(&self) -> When {
        match self.when {
            WhenArgument::Prompt => When::Prompt,
            WhenArgument::Generation => When::Generation,
            WhenArgument::Both => When::Both,
        }
    }
}

impl SteerCommand {
    /// Builds and combines the steering, writes the file, and runs the check if requested.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let model = GgufFile::open(&self.model)?;
        let form = self.form()?;
        if self.bake {
            bake::check_architecture(&model)?;
        }
        let fingerprint = Fingerprint::of(&model)?;
        let mut sources = self.steering.sources()?;
        if let Some(path) = &self.neurons.neurons {
            sources.push((self.neuron_intervention(path, &model, &fingerprint)?, 1.0));
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
            return Err(Error::setting("steer", "expected neurons, text, a probe or files, found none").with_hint(
                "use --neurons FILE --offset X, --contrast, --probe FILE, or --steer FILE:COEF to combine files",
            ));
        }
        // Every output records that it was made for this model, so the sources are checked first.
        let compiled = self.compile(&model, &sources, Route::Cheapest)?;
        match form {
            Form::Model => self.write_baked(&model, &sources, compiled.steering)?,
            Form::ControlVector => self.write_control_vector(&fingerprint, &sources, compiled)?,
            Form::Interventions => {
                for choice in &compiled.choices {
                    print::note(choice);
                }
                self.write_interventions(&model, &fingerprint, &sources)?;
            }
        }
        print::note(&format!("{}: {}", if self.bake { "model" } else { "steering" }, self.output.display()));
        if self.exact_check { self.compare_routes(&model, &sources) } else { Ok(()) }
    }

    /// Chooses the kind of output, and refuses flags that it cannot represent.
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
                Err(Error::setting("--bake", "a LoRA adapter cannot be baked in as biases"))
            }
            Form::Interventions if has_loras => {
                Err(Error::setting("--lora", "an intervention file cannot hold a LoRA adapter")
                    .with_hint("use --lora together with --steer when you run the model"))
            }
            form => Ok(form),
        }
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Result<Paths> {
        let paths =
            Paths::new().reads([&self.model]).reads(self.steering.files()?).reads(&self.neurons.neurons);
        let paths = paths.reads(self.text.contrast.iter().flatten()).reads(&self.text.probe);
        let form = if self.form()? == Form::Interventions { output::Form::Text } else { output::Form::Gguf };
        Ok(paths.writes(&self.output, form))
    }

    /// The intervention on the neurons of `--neurons`.
    fn neuron_intervention(
        &self,
        path: &Path,
        model: &GgufFile,
        fingerprint: &Fingerprint,
    ) -> Result<SteerFile> {
        let operation = self.neurons.operation()?;
        let mut neurons: Vec<Neuron> = NeuronFile::read_for(path, model, self.steering.force)?.neurons();
        if self.without_layer_0 {
            let n = neurons.len();
            neurons.retain(|neuron| neuron.layer > 0);
            print::note(&format!("skipped {} of {n} neurons: they are in layer 0", n - neurons.len()));
        }
        let when = self.neurons.when();
        let intervention = Intervention::new(Target::Neurons(neurons), operation, when, None, 1.0)
            .map_err(|reason| Error::input(path, None, reason))?;
        Ok(SteerFile::Interventions(Interventions {
            path: path.to_path_buf(),
            fingerprint: Some(fingerprint.clone()),
            list: vec![intervention],
        }))
    }

    /// Directions from text or a probe by layer, if requested.
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
            let layer = probe.place.steering_layer(last + 1);
            let unit = probe.unit_direction();
            return Ok(Some(layers((layer, layer))?.map(|layer| (layer, unit.clone())).collect()));
        }
        let Some(file) = &self.text.contrast else { return Ok(None) };
        let needs_file = |flag: &str| {
            Error::setting(flag, "expected a file of pairs, found the built-in ones")
                .with_hint("give the file: --contrast FILE")
        };
        let pairs = match file {
            Some(path) => {
                let (toxic, benign) = (self.text.toxic_column.clone(), self.text.benign_column.clone());
                contrast::read(path, &ContrastColumns { toxic, benign })?
            }
            None if self.text.toxic_column.is_some() => return Err(needs_file("--toxic-column")),
            None if self.text.benign_column.is_some() => return Err(needs_file("--benign-column")),
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
        // With adapters, the value vectors were computed from the adapted down projections.
        let loras = self.steering.lora.iter().map(|path| path.display().to_string());
        let loras: Vec<String> = loras.chain(self.steering.lora_scaled.iter().cloned()).collect();
        if !loras.is_empty() {
            metadata.set("detox_gguf.lora", Value::Str(loras.join(", ")));
        }
        metadata
    }

    /// Describes the sources in words.
    fn described(&self, sources: &[(SteerFile, f32)]) -> String {
        let of_source = |(file, coefficient): &(SteerFile, f32)| {
            let name = base_name(file.path());
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

    /// Prints how far the cheapest route and the callback differ, next to the noise floor.
    fn compare_routes(&self, file: &GgufFile, sources: &[(SteerFile, f32)]) -> Result<()> {
        let cheapest = self.compile(file, sources, Route::Cheapest)?.steering;
        let callback = self.compile(file, sources, Route::Callback)?.steering;
        let model = self.engine.open(&self.model)?;
        let options = self.engine.session_options();
        let prompts = PromptSource::Own.read(&[], Some(4))?;
        let texts: Vec<Vec<Token>> =
            prompts.iter().map(|p| model.tokenize_prompt(&p.text)).collect::<Result<_>>()?;
        let effect = steering::difference(&model, &Steering::default(), &cheapest, &texts, &options)?;
        let routes = steering::difference(&model, &callback, &cheapest, &texts, &options)?;
        let floor = steering::noise_floor(&model, &callback, &texts, &options)?;
        let row = |name: &str, d: &Difference| {
            format!(
                "{name:<34}{:>12.2e}{:>12.2e}{:>12.3}\n",
                d.mean_kl, d.largest_kl, d.largest_logit_difference
            )
        };
        print(&format!(
            "{} tokens of {} prompts        mean KL  largest KL  logit diff\n{}{}{}",
            effect.n_tokens,
            texts.len(),
            row("effect of the steering", &effect),
            row("cheapest route vs callback", &routes),
            row("noise floor (0.001 more)", &floor),
        ))
    }
}
