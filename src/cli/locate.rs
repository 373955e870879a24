//! `locate`: the FFN neurons that write toxicity.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::json;

use crate::engine::schedule::Request;
use crate::engine::{Model, Session, Vocabulary, activation};
use crate::error::{Error, Result};
use crate::eval::prompts::Prompt;
use crate::gguf::GgufFile;
use crate::interp::probe::Probe;
use crate::interp::{locate, vocabulary};
use crate::progress::Progress;
use crate::report::csv;
use crate::steer::value_vector::ValueVectors;
use crate::steer::{Fingerprint, Intervention, Interventions, LocatedNeuron, Neuron, NeuronFile};

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

/// Rows of the table on the terminal; files have all.
const SHOWN: usize = 20;

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
        progress.start("layers", u64::from(file.n_layer()?), 0);
        let mut n_done = 0;
        let ranked = locate::rank_value_vectors(&file, &probe.weight, self.top, interrupt, |done| {
            progress.advance((done - n_done) as u64);
            n_done = done;
        })?;
        progress.finish();
        let mut neurons: Vec<LocatedNeuron> = ranked
            .iter()
            .map(|r| LocatedNeuron {
                neuron: Neuron { layer: r.layer, index: r.index },
                cosine: Some(r.cosine),
                norm: Some(r.norm),
                mean_activation: None,
                tokens: Vec::new(),
            })
            .collect();
        self.add_tokens(&file, &mut neurons, interrupt)?;
        let prompts_name = prompts.as_ref().map(|(_, name)| name.clone());
        let n_prompts = prompts.as_ref().map_or(0, |(prompts, _)| prompts.len());
        if let Some((prompts, _)) = prompts {
            let model = self.steering.open(&self.model, &self.engine)?;
            let means =
                mean_activations(&model, &self.engine, &prompts, &neurons, self.n_predict, interrupt)?;
            let overall = |n: usize| means.iter().map(|m| f64::from(m[n])).sum::<f64>() / means.len() as f64;
            for (n, neuron) in neurons.iter_mut().enumerate() {
                neuron.mean_activation = Some(overall(n));
            }
        }
        let is_kept = |n: &LocatedNeuron| n.mean_activation.is_none_or(|a| a > self.min_activation);
        print(&table(&neurons, &is_kept))?;
        crate::file::write_atomic(&ranking, to_csv(&neurons, &is_kept).as_bytes())?;
        let kept: Vec<LocatedNeuron> = neurons.into_iter().filter(|n| is_kept(n)).collect();
        if kept.is_empty() {
            return Err(Error::setting(
                "--min-activation",
                format!(
                    "none of {} neurons has a mean activation above {}; their ranking is in {}",
                    ranked.len(),
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
        eprintln!(
            "{} of {} neurons kept: {}\nranking: {}\nintervention: {}",
            kept.neurons.len(),
            ranked.len(),
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

    fn add_tokens(
        &self,
        file: &GgufFile,
        neurons: &mut [LocatedNeuron],
        interrupt: &AtomicBool,
    ) -> Result<()> {
        if self.tokens == 0 {
            return Ok(());
        }
        let vectors = ValueVectors::open(file)?;
        let columns = neurons
            .iter()
            .map(|n| vectors.weighted_sum(n.neuron.layer as usize, &[(n.neuron.index as usize, 1.0)]));
        let columns: Vec<Vec<f32>> = columns.collect::<Result<_>>()?;
        let projected = vocabulary::project(file, &columns, self.tokens, interrupt)?;
        let vocabulary = Vocabulary::open(&self.model)?;
        for (neuron, tokens) in neurons.iter_mut().zip(projected) {
            neuron.tokens = tokens.into_iter().map(|t| vocabulary.text(t.token)).collect();
        }
        Ok(())
    }
}

/// Mean activation of each neuron after each prompt, shape `[prompts][neurons]`.
pub fn mean_activations(
    model: &Model,
    engine: &EngineArguments,
    prompts: &[Prompt],
    neurons: &[LocatedNeuron],
    n_predict: usize,
    interrupt: &AtomicBool,
) -> Result<Vec<Vec<f32>>> {
    let requests = prompts
        .iter()
        .map(|p| Ok(Request { id: p.id.clone(), tokens: model.tokenize_prompt(&p.text)? }))
        .collect::<Result<Vec<_>>>()?;
    let longest = requests.iter().map(|r| r.tokens.len()).max().unwrap_or(0);
    let mut session = Session::open_with_callback(model, &engine.session_options(), longest + n_predict)?;
    let places: Vec<(usize, usize)> =
        neurons.iter().map(|n| (n.neuron.layer as usize, n.neuron.index as usize)).collect();
    let mut progress = Shown::new();
    progress.start("prompts", requests.len() as u64, 0);
    let mut n_done = 0;
    let recorded = activation::record(&mut session, &requests, &places, n_predict, interrupt, |done| {
        progress.advance((done - n_done) as u64);
        n_done = done;
    })?;
    progress.finish();
    Ok(recorded.into_iter().map(|r| r.mean).collect())
}

fn table(neurons: &[LocatedNeuron], is_kept: &dyn Fn(&LocatedNeuron) -> bool) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["", "layer", "index", "cosine", "norm", "mean act.", "", "promotes"]);
    for (rank, n) in neurons.iter().take(SHOWN).enumerate() {
        let number = |x: Option<f64>, digits: usize| x.map_or("-".into(), |x| format!("{x:.digits$}"));
        table.add_row([
            (rank + 1).to_string(),
            n.neuron.layer.to_string(),
            n.neuron.index.to_string(),
            number(n.cosine, 3),
            number(n.norm, 2),
            number(n.mean_activation, 4),
            if is_kept(n) { "kept" } else { "" }.to_owned(),
            shortened(&n.tokens, 24),
        ]);
    }
    for column in table.column_iter_mut().take(6) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let rest = neurons.len().saturating_sub(SHOWN);
    let rest = if rest > 0 { format!("and {rest} more in the file\n") } else { String::new() };
    format!("{table}\n{rest}")
}

/// Tokens on one line of at most `width` characters, without control characters.
fn shortened(tokens: &[String], width: usize) -> String {
    let clean = |token: &String| token.trim().chars().filter(|c| !c.is_control()).collect::<String>();
    let line = tokens.iter().map(clean).collect::<Vec<_>>().join(" ");
    if line.chars().count() <= width {
        return line;
    }
    line.chars().take(width - 1).chain(['…']).collect()
}

fn to_csv(neurons: &[LocatedNeuron], is_kept: &dyn Fn(&LocatedNeuron) -> bool) -> String {
    let rows = neurons.iter().enumerate().map(|(rank, n)| {
        let number = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
        vec![
            (rank + 1).to_string(),
            n.neuron.layer.to_string(),
            n.neuron.index.to_string(),
            number(n.cosine),
            number(n.norm),
            number(n.mean_activation),
            is_kept(n).to_string(),
            n.tokens.join(" | "),
        ]
    });
    let header = ["rank", "layer", "index", "cosine", "norm", "mean_activation", "kept", "tokens"];
    csv::table_to_csv(&header, rows)
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
