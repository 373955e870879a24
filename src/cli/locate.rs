//! `locate`: the FFN neurons that write toxicity.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Args;
use serde_json::json;

use crate::error::{Error, Result};
use crate::eval::prompts::Prompt;
use crate::gguf::GgufFile;
use crate::interp::activations::ActivationPrompt;
use crate::interp::locate;
use crate::interp::probe::Probe;
use crate::report::neurons as neurons_report;
use crate::steer::{Fingerprint, Intervention, Interventions, LocatedNeuron, NeuronFile};

use super::arguments::{EngineArguments, PromptArguments, check_output};
use super::print;
use super::progress::Shown;
use super::steering::SteeringArguments;

/// Arguments of `locate`.
#[derive(Debug, Args)]
pub struct LocateCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Probe, as `probe` writes it
    #[arg(long, value_name = "FILE")]
    probe: PathBuf,
    /// File of neurons to write; beside it go .csv with all that were ranked, and .steer.json for --steer
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Value vectors with the highest cosine
    #[arg(long, value_name = "K", default_value_t = 100)]
    top: usize,
    /// Tokens generated after each prompt while activations are measured
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    n_predict: usize,
    /// Keep neurons whose mean activation is above this
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    min_activation: f64,
    /// Keep all that are ranked, without running the model
    #[arg(long, conflicts_with_all = NOT_WITHOUT_ACTIVATIONS)]
    no_activations: bool,
    /// Offset in the intervention file
    #[arg(long, value_name = "X", default_value_t = -1.0, allow_negative_numbers = true)]
    offset: f32,
    /// Promoted tokens shown of each neuron
    #[arg(long, value_name = "N", default_value_t = 5)]
    tokens: usize,
    #[command(flatten)]
    prompts: PromptArguments,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

/// What decides activations means nothing where none are measured.
const NOT_WITHOUT_ACTIVATIONS: [&str; 11] = [
    "prompts",
    "lang",
    "limit",
    "min_activation",
    "n_predict",
    "steer",
    "control_vector",
    "control_vector_scaled",
    "control_vector_layer_range",
    "lora",
    "lora_scaled",
];

impl LocateCommand {
    /// Ranks, measures, prints and writes.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let (ranking, intervention) = self.check_outputs()?;
        for (flag, x) in [("--offset", f64::from(self.offset)), ("--min-activation", self.min_activation)] {
            if !x.is_finite() {
                return Err(Error::setting(flag, format!("expected a finite number, found {x}")));
            }
        }
        let file = GgufFile::open(&self.model)?;
        let probe = Probe::read(&self.probe)?;
        probe.check(&file, &self.probe, self.steering.force)?;
        if !self.steering.is_empty() {
            eprintln!(
                "value vectors are ranked as the model's file has them; steering and adapters act on activations alone"
            );
        }
        let prompts = if self.no_activations { None } else { Some(self.read_prompts()?) };

        let mut progress = Shown::new();
        let mut neurons =
            locate::top_neurons(&file, &probe.weight, self.top, self.tokens, &mut progress, interrupt)?;
        let n_ranked = neurons.len();
        let prompts_name = prompts.as_ref().map(|(_, name)| name.clone());
        let n_prompts = prompts.as_ref().map_or(0, |(prompts, _)| prompts.len());
        if let Some((prompts, _)) = prompts {
            let model = self.steering.open(&self.model, &self.engine)?;
            let options = self.engine.session_options();
            let texts: Vec<ActivationPrompt> =
                prompts.iter().map(|p| ActivationPrompt { id: &p.id, text: &p.text }).collect();
            locate::add_mean_activations(
                &model,
                &options,
                &texts,
                &mut neurons,
                self.n_predict,
                &mut progress,
                interrupt,
            )?;
        }
        let is_kept = |n: &LocatedNeuron| locate::is_active(n, self.min_activation);
        let shown = neurons_report::to_terminal(&neurons, &is_kept);
        crate::file::write_atomic(&ranking, neurons_report::to_csv(&neurons, &is_kept).as_bytes())?;
        let kept: Vec<LocatedNeuron> = neurons.into_iter().filter(|n| is_kept(n)).collect();
        if kept.is_empty() {
            print(&shown)?;
            return Err(Error::setting(
                "--min-activation",
                format!(
                    "none of {} neurons has a mean activation above {}; their ranking is in {}",
                    n_ranked,
                    self.min_activation,
                    ranking.display()
                ),
            ));
        }
        let settings = json!({
            "probe": self.probe.file_name().map(|name| name.to_string_lossy()),
            "top": self.top,
            "n_kept": kept.len(),
            "prompts": prompts_name,
            "n_prompts": n_prompts,
            "n_predict": (!self.no_activations).then_some(self.n_predict),
            "min_activation": (!self.no_activations).then_some(self.min_activation),
            "version": crate::version(),
        });
        let fingerprint = Some(Fingerprint::of(&file)?);
        let settings = settings.as_object().cloned().unwrap_or_default();
        let kept = NeuronFile { fingerprint: fingerprint.clone(), settings, neurons: kept };
        kept.write(&self.output)?;
        let offset = Intervention::neuron_offset(kept.neurons(), self.offset)
            .map_err(|reason| Error::setting("--offset", reason))?;
        let list = Interventions { path: intervention.clone(), fingerprint, list: vec![offset] };
        list.write(&intervention)?;
        print(&shown)?;
        eprintln!(
            "{} of {} neurons kept: {}\nranking: {}\nintervention: {}",
            kept.neurons.len(),
            n_ranked,
            self.output.display(),
            ranking.display(),
            intervention.display()
        );
        Ok(())
    }

    /// Where the ranking and the intervention go, beside the neurons.
    fn check_outputs(&self) -> Result<(PathBuf, PathBuf)> {
        let beside = (self.output.with_extension("csv"), self.output.with_extension("steer.json"));
        if beside.0 == self.output {
            return Err(Error::setting(
                "-o/--output",
                "expected a name for JSON, such as neurons.json; the ranking goes beside it as .csv",
            ));
        }
        let read = self.steering.files()?;
        let read = read.iter().chain(&self.prompts.prompts).chain([&self.model, &self.probe]);
        let read: Vec<&Path> = read.map(PathBuf::as_path).collect();
        for output in [&self.output, &beside.0, &beside.1] {
            check_output(output, &read)?;
        }
        Ok(beside)
    }

    /// The prompts; English, as in the paper, unless languages were asked for.
    fn read_prompts(&self) -> Result<(Vec<Prompt>, String)> {
        let mut arguments = self.prompts.clone();
        if arguments.lang.is_empty() {
            arguments.lang = vec!["en".into()];
        }
        arguments.read()
    }
}

/// For commands that take `--neurons`: the file, checked against the model.
pub fn read_neurons(path: &Path, model: &GgufFile, force: bool) -> Result<NeuronFile> {
    let file = NeuronFile::read(path)?;
    file.check_against(&model.n_ff_per_layer()?, path)?;
    if let Some(fingerprint) = &file.fingerprint {
        fingerprint.check(&Fingerprint::of(model)?, "neurons", path, force)?;
    }
    Ok(file)
}
