//! `probe`: a linear probe of toxicity on the residual stream.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use crate::engine::{Model, Session, SessionOptions, Token, residual};
use crate::error::{Error, Result};
use crate::gguf::GgufFile;
use crate::interp::probe::{self, Fit, Probe, ProbeOptions, ProbePlace};
use crate::progress::Progress;
use crate::steer::Fingerprint;

use super::arguments::{EngineArguments, check_output};
use super::print;
use super::progress::Shown;
use super::steering::SteeringArguments;

/// Arguments of `probe`.
#[derive(Debug, Args)]
pub struct ProbeCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Labelled texts: JSON lines or CSV with text and label, or Jigsaw's train.csv [default: the program's own]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Train on a sample of so many texts, with the same share of toxic ones
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Where to read: final (after the final norm), embedding, or after a layer, from 0
    #[arg(long, value_name = "WHERE", default_value = "final")]
    layer: ProbePlace,
    /// Most tokens of a text that are read
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Adam's step
    #[arg(long, value_name = "X", default_value_t = ProbeOptions::default().learning_rate)]
    learning_rate: f64,
    /// Passes over the texts
    #[arg(long, value_name = "N", default_value_t = ProbeOptions::default().n_epochs)]
    epochs: usize,
    /// Texts a step
    #[arg(long = "train-batch", value_name = "N", default_value_t = ProbeOptions::default().batch_size)]
    train_batch: usize,
    /// Share of the texts that is held out
    #[arg(long, value_name = "SHARE", default_value_t = ProbeOptions::default().held_out)]
    held_out: f64,
    /// Seed of the split and of the order
    #[arg(short = 's', long, value_name = "SEED", default_value_t = ProbeOptions::default().seed)]
    seed: u64,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

impl ProbeCommand {
    /// Trains, prints what the probe does on held-out texts, and saves it.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let options = ProbeOptions {
            learning_rate: self.learning_rate,
            n_epochs: self.epochs,
            batch_size: self.train_batch,
            held_out: self.held_out,
            seed: self.seed,
        };
        if self.max_tokens == 0 {
            return Err(Error::setting("--max-tokens", "expected a number from 1 up, found 0"));
        }
        if let Some(n) = self.limit.filter(|&n| n < 4) {
            return Err(Error::setting(
                "--limit",
                format!("expected two texts of each label or more, found {n}"),
            ));
        }
        let read = self.steering.files()?;
        let read = read.iter().chain(&self.data).chain([&self.model]).map(PathBuf::as_path);
        check_output(&self.output, &read.collect::<Vec<_>>())?;
        let (labelled, source) = match &self.data {
            Some(path) => (probe::read(path)?, crate::file::base_name(path)),
            None => (probe::own(), "the program's own labelled texts".to_owned()),
        };
        if labelled.n_empty > 0 {
            eprintln!("{} rows without text were left out", labelled.n_empty);
        }
        let labelled = match self.limit {
            Some(n) => labelled.sample(n, self.seed),
            None => labelled,
        };
        let is_toxic: Vec<bool> = labelled.texts.iter().map(|t| t.is_toxic).collect();
        probe::check(&is_toxic, &options)?;
        let fingerprint = Fingerprint::of(&GgufFile::open(&self.model)?)?;
        let model = self.steering.open(&self.model, &self.engine)?;
        let texts: Vec<&str> = labelled.texts.iter().map(|t| t.text.as_str()).collect();
        let places = [self.layer.residual_place()];
        let features =
            mean_residual_streams(&model, &self.engine, &texts, &places, self.max_tokens, interrupt)?;
        let features: Vec<Vec<f32>> = features.into_iter().map(|mut places| places.swap_remove(0)).collect();
        let fit = probe::fit(&features, &is_toxic, &options)?;
        let probe = Probe {
            weight: fit.weight.clone(),
            place: self.layer,
            fingerprint: Some(fingerprint),
            source: source.clone(),
            accuracy: Some(fit.held_out.accuracy as f32),
            auc: Some(fit.held_out.auc as f32),
        };
        probe.write(&self.output)?;
        print(&described(&fit, &source, labelled.n_toxic(), self.layer))?;
        if fit.best_epoch == self.epochs {
            eprintln!(
                "warning: the held-out loss was still falling in the last epoch; more --epochs or a higher --learning-rate would train further"
            );
        }
        eprintln!("probe: {}", self.output.display());
        Ok(())
    }
}

fn described(fit: &Fit, source: &str, n_toxic: usize, place: ProbePlace) -> String {
    let held_out = &fit.held_out;
    let n = fit.n_train + held_out.n;
    let at = match place {
        ProbePlace::FinalNorm => "after the final norm".into(),
        ProbePlace::Embedding => "of the embeddings".into(),
        ProbePlace::Block(il) => format!("after layer {il}"),
    };
    let last = fit.epochs.last().copied();
    let losses = fit.epochs.get(fit.best_epoch - 1).copied().or(last);
    let losses = losses.map_or(String::new(), |e| {
        format!(
            "losses of epoch {}    {:.4} trained on, {:.4} held out\n",
            fit.best_epoch, e.train_loss, e.held_out_loss
        )
    });
    format!(
        "Linear probe on the mean residual stream {at}\n\n\
         texts               {n} ({n_toxic} toxic), {source}\n\
         held out            {} ({} toxic)\n\
         accuracy            {:.1}% ({:.1}% by always answering the same)\n\
         AUC                 {:.3}\n{losses}",
        held_out.n,
        held_out.n_toxic,
        100.0 * held_out.accuracy,
        100.0 * held_out.majority_accuracy,
        held_out.auc,
    )
}

/// Slots for texts: more are not decoded faster, since a batch holds few texts.
const TEXT_SLOTS: usize = 32;

/// Mean residual streams of texts at some places, shape `[texts][places][n_embd]`, each text cut to
/// `max_tokens`.
pub fn mean_residual_streams(
    model: &Model,
    engine: &EngineArguments,
    texts: &[&str],
    places: &[residual::ResidualPlace],
    max_tokens: usize,
    interrupt: &AtomicBool,
) -> Result<Vec<Vec<Vec<f32>>>> {
    let tokens = texts.iter().map(|text| {
        let mut tokens = model.tokenize_prompt(text)?;
        tokens.truncate(max_tokens);
        Ok(tokens)
    });
    let tokens: Vec<Vec<Token>> = tokens.collect::<Result<_>>()?;
    let n_cut = tokens.iter().filter(|tokens| tokens.len() == max_tokens).count();
    if n_cut > 0 {
        eprintln!("{n_cut} texts of {max_tokens} tokens or more were read up to there");
    }
    let longest = tokens.iter().map(Vec::len).max().unwrap_or(1);
    let options = engine.session_options();
    let options = SessionOptions { n_parallel: options.n_parallel.or(Some(TEXT_SLOTS)), ..options };
    let mut session = Session::open_with_callback(model, &options, longest)?;
    let mut progress = Shown::new();
    progress.start("texts", tokens.len() as u64, 0);
    let mut n_done = 0;
    let recorded = residual::record(&mut session, &tokens, places, interrupt, |done| {
        progress.advance((done - n_done) as u64);
        n_done = done;
    })?;
    progress.finish();
    Ok(recorded)
}
