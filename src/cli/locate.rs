//! `locate`: finds the FFN neurons that write toxicity.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::eval::prompts::Prompt;
use crate::file::output::{Form, Paths};
use crate::file::{base_name, write_atomic};
use crate::gguf::GgufFile;
use crate::interp::activations::ActivationPrompt;
use crate::interp::locate;
use crate::interp::probe::Probe;
use crate::report::neurons as neurons_report;
use crate::steer::{Fingerprint, Intervention, Interventions, LocatedNeuron, NeuronFile};

use super::arguments::{EngineArguments, PromptArguments};
use super::print;
use super::progress::Shown;
use super::steering::SteeringArguments;

/// Arguments of `locate`.
#[derive(Debug, Args)]
#[command(mut_arg("lang", |lang| lang.help("Languages to use, separated by commas [default: en]")))]
pub struct LocateCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Probe file from `probe`
    #[arg(long, value_name = "FILE")]
    probe: PathBuf,
    /// Neuron file to write; the ranking (.csv) and an intervention for --steer (.steer.json) go next to it
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Rank the K value vectors with the highest cosine
    #[arg(long, value_name = "K", default_value_t = 100)]
    top: usize,
    /// Number of tokens to generate after each prompt while measuring activations
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    n_predict: usize,
    /// Keep neurons whose mean activation is above X. With steering, it is measured before edits of the neurons
    /// themselves
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    min_activation: f64,
    /// Keep all ranked neurons, without running the model
    #[arg(long, conflicts_with_all = NOT_WITHOUT_ACTIVATIONS)]
    no_activations: bool,
    /// Offset to write to the intervention file
    #[arg(long, value_name = "X", default_value_t = -1.0, allow_negative_numbers = true)]
    offset: f32,
    /// Number of promoted tokens to list for each neuron
    #[arg(long, value_name = "N", default_value_t = 5)]
    tokens: usize,
    #[command(flatten)]
    prompts: PromptArguments,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

/// Arguments that have no effect if no activations are measured.
const NOT_WITHOUT_ACTIVATIONS: [&str; 14] = [
    "prompts",
    "prompt_column",
    "language_column",
    "id_column",
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
    /// Ranks neurons, measures their activations, and prints and writes the result.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let beside = self.beside()?;
        for (flag, x) in [("--offset", f64::from(self.offset)), ("--min-activation", self.min_activation)] {
            if !x.is_finite() {
                return Err(Error::setting(flag, format!("expected a finite number, found {x}")));
            }
        }
        let file = GgufFile::open(&self.model)?;
        let probe = Probe::read(&self.probe)?;
        probe.check(&file, &self.probe, self.steering.force)?;
        if !self.steering.is_empty() {
            print::note(
                "note: steering and adapters change only the activations; the value vectors are ranked as stored in \
                 the model",
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
        if let Some((ranking, _)) = &beside {
            write_atomic(ranking, neurons_report::to_csv(&neurons, &is_kept).as_bytes())?;
        }
        neurons.retain(is_kept);
        if neurons.is_empty() {
            // The error says more than a closed pipe.
            let _ = print(&shown);
            let ranking = beside
                .map_or(String::new(), |(ranking, _)| format!("; their ranking is in {}", ranking.display()));
            let reason = format!(
                "expected neurons with a mean activation above {}, found none among {n_ranked}{ranking}",
                self.min_activation
            );
            return Err(Error::setting("--min-activation", reason));
        }
        let n_kept = neurons.len();
        let settings = self.settings(n_kept, prompts_name, n_prompts);
        let kept = NeuronFile { fingerprint: Some(Fingerprint::of(&file)?), settings, neurons };
        self.write(kept, beside.as_ref().map(|(_, intervention)| intervention))?;
        print(&shown)?;
        print::note(&format!("{n_kept} of {n_ranked} neurons kept: {}", self.output.display()));
        if let Some((ranking, intervention)) = &beside {
            print::note(&format!("ranking: {}", ranking.display()));
            print::note(&format!("intervention: {}", intervention.display()));
        }
        Ok(())
    }

    /// The settings to record in the neuron file.
    fn settings(&self, n_kept: usize, prompts: Option<String>, n_prompts: usize) -> Map<String, Value> {
        let settings = json!({
            "probe": base_name(&self.probe),
            "top": self.top,
            "n_kept": n_kept,
            "prompts": prompts,
            "n_prompts": n_prompts,
            "n_predict": (!self.no_activations).then_some(self.n_predict),
            "min_activation": (!self.no_activations).then_some(self.min_activation),
            "version": crate::version(),
        });
        settings.as_object().cloned().unwrap_or_default()
    }

    /// Writes the neurons, and the intervention that offsets them if it has a path.
    fn write(&self, neurons: NeuronFile, intervention: Option<&PathBuf>) -> Result<()> {
        neurons.write(&self.output)?;
        let Some(intervention) = intervention else { return Ok(()) };
        let offset = Intervention::neuron_offset(neurons.neurons(), self.offset)
            .map_err(|reason| Error::setting("--offset", reason))?;
        let (path, fingerprint) = (intervention.clone(), neurons.fingerprint);
        Interventions { path, fingerprint, list: vec![offset] }.write(intervention)
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Result<Paths> {
        let paths = Paths::new().reads([&self.model, &self.probe]).reads(&self.prompts.prompts);
        let paths = paths.reads(self.steering.files()?).writes(&self.output, Form::Text);
        Ok(match self.beside()? {
            Some((ranking, intervention)) => paths
                .writes_beside(ranking, neurons_report::CSV_START.as_bytes())
                .writes_beside(intervention, Interventions::FILE_START.as_bytes()),
            None => paths,
        })
    }

    /// Paths of the ranking and the intervention, next to the neuron file; `None` if that is a device or a pipe.
    fn beside(&self) -> Result<Option<(PathBuf, PathBuf)>> {
        if self.output.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir()) {
            return Ok(None);
        }
        let beside = (self.output.with_extension("csv"), self.output.with_extension("steer.json"));
        if beside.0 == self.output {
            return Err(Error::setting(
                "-o/--output",
                "expected a name for JSON, such as neurons.json, found .csv: the ranking is written there",
            ));
        }
        Ok(Some(beside))
    }

    /// Reads the prompts. Like the paper, uses English ones unless `--lang` is given.
    fn read_prompts(&self) -> Result<(Vec<Prompt>, String)> {
        let mut arguments = self.prompts.clone();
        if arguments.lang.is_empty() {
            arguments.lang = vec!["en".into()];
        }
        arguments.read()
    }
}
