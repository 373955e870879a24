//! `probe`: trains a linear probe of toxicity on the residual stream.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use crate::error::{Error, Result};
use crate::file::base_name;
use crate::file::output::{Form, Paths};
use crate::gguf::GgufFile;
use crate::interp::probe::{self, Fit, LabelledColumns, ProbeOptions, ProbePlace, ProbeReading};
use crate::interp::residual_streams::check_max_tokens;
use crate::steer::Fingerprint;

use super::arguments::EngineArguments;
use super::print;
use super::progress::Shown;
use super::steering::SteeringArguments;

/// Arguments of `probe`.
#[derive(Debug, Args)]
pub struct ProbeCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Labelled texts: JSON or CSV with text and label, or Jigsaw's train.csv [default: built-in texts]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Column with the text [default: text, comment_text or similar]
    #[arg(long, value_name = "NAME", requires = "data")]
    text_column: Option<String>,
    /// Column with the label, 0 or 1 [default: label, toxic or similar]
    #[arg(long, value_name = "NAME", requires = "data")]
    label_column: Option<String>,
    /// Probe file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Train on a random sample of N texts, with the same fraction of toxic ones
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Where to read the residual stream: final (after the final norm), embedding, or a layer from 0
    #[arg(long, value_name = "WHERE", default_value = "final")]
    layer: ProbePlace,
    /// Read at most N tokens of each text
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Learning rate of Adam
    #[arg(long, value_name = "X", default_value_t = ProbeOptions::default().learning_rate)]
    learning_rate: f64,
    /// Number of passes over the training texts
    #[arg(long, value_name = "N", default_value_t = ProbeOptions::default().n_epochs)]
    epochs: usize,
    /// Texts per step
    #[arg(long = "train-batch", value_name = "N", default_value_t = ProbeOptions::default().batch_size)]
    train_batch: usize,
    /// Fraction of the texts held out for evaluation
    #[arg(long, value_name = "FRACTION", default_value_t = ProbeOptions::default().held_out)]
    held_out: f64,
    /// Random seed of the sample, the held-out split and the order of the texts
    #[arg(short = 's', long, value_name = "SEED", default_value_t = ProbeOptions::default().seed)]
    seed: u64,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

impl ProbeCommand {
    /// Trains the probe, prints its held-out results, and writes it.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let options = ProbeOptions {
            learning_rate: self.learning_rate,
            n_epochs: self.epochs,
            batch_size: self.train_batch,
            held_out: self.held_out,
            seed: self.seed,
        };
        check_max_tokens(self.max_tokens)?;
        if let Some(n) = self.limit.filter(|&n| n < 4) {
            return Err(Error::setting(
                "--limit",
                format!("expected at least 4, two texts of each label, found {n}"),
            ));
        }
        let columns = LabelledColumns { text: self.text_column.clone(), label: self.label_column.clone() };
        let (labelled, source) = match &self.data {
            Some(path) => (probe::read(path, &columns)?, base_name(path)),
            None => (probe::own(), "the program's own labelled texts".to_owned()),
        };
        if labelled.n_empty > 0 {
            print::note(&format!("skipped {} rows without text", labelled.n_empty));
        }
        let labelled = match self.limit {
            Some(n) => labelled.sample(n, self.seed),
            None => labelled,
        };
        let is_toxic: Vec<bool> = labelled.texts.iter().map(|t| t.is_toxic).collect();
        probe::check(&is_toxic, &options)?;
        let fingerprint = Fingerprint::of(&GgufFile::open(&self.model)?)?;
        let model = self.steering.open(&self.model, &self.engine)?;
        let reading = ProbeReading { place: self.layer, max_tokens: self.max_tokens };
        let (probe, fit) = probe::train(
            &model,
            &self.engine.session_options(),
            fingerprint,
            &labelled,
            &source,
            reading,
            &options,
            &mut Shown::new(),
            interrupt,
        )?;
        probe.write(&self.output)?;
        print(&described(&fit, &source, labelled.n_toxic(), self.layer))?;
        if fit.best_epoch == self.epochs {
            print::note(
                "warning: the held-out loss was still falling in the last epoch; train longer with more --epochs or \
                 a higher --learning-rate",
            );
        }
        print::note(&format!("probe: {}", self.output.display()));
        Ok(())
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Result<Paths> {
        let paths = Paths::new().reads([&self.model]).reads(&self.data).reads(self.steering.files()?);
        Ok(paths.writes(&self.output, Form::Gguf))
    }
}

fn described(fit: &Fit, source: &str, n_toxic: usize, place: ProbePlace) -> String {
    let held_out = &fit.held_out;
    let n = fit.n_train + held_out.n;
    let at = match place {
        ProbePlace::FinalNorm => "after the final norm".into(),
        ProbePlace::Embedding => "at the embeddings".into(),
        ProbePlace::Block(il) => format!("after layer {il}"),
    };
    let last = fit.epochs.last().copied();
    let losses = fit.epochs.get(fit.best_epoch - 1).copied().or(last);
    let losses = losses.map_or(String::new(), |e| {
        format!(
            "loss of epoch {}       {:.4} training, {:.4} held out\n",
            fit.best_epoch, e.train_loss, e.held_out_loss
        )
    });
    format!(
        "Linear probe on the mean residual stream {at}\n\n\
         texts               {n} ({n_toxic} toxic), {source}\n\
         held out            {} ({} toxic)\n\
         accuracy            {:.1}% ({:.1}% by always guessing the more frequent label)\n\
         AUC                 {:.3}\n{losses}",
        held_out.n,
        held_out.n_toxic,
        100.0 * held_out.accuracy,
        100.0 * held_out.majority_accuracy,
        held_out.auc,
    )
}
