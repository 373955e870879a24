//! `activations`: measures how active neurons are in each language, before and after a change.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use crate::engine::Model;
use crate::error::{Error, Result};
use crate::file::base_name;
use crate::file::output::{FolderKind, Paths, open_folder};
use crate::gguf::GgufFile;
use crate::interp::activations::{
    ActivationPrompt, Activations, MEASURED, PromptActivation, by_language, mean_over_neurons,
};
use crate::report::json;
use crate::report::write::write_reports;
use crate::steer::NeuronFile;

use super::arguments::{EngineArguments, PromptArguments};
use super::progress::Shown;
use super::steering::SteeringArguments;
use super::{may_colour, print};

/// Arguments of `activations`.
#[derive(Debug, Args)]
#[command(
    after_help = "An activation is the neuron's own value after the non-linearity and gate, before any edit of that neuron. It \
                  contains the effect of edits in earlier layers and of adapters. So a steering file gives the same numbers \
                  by callback, as a control vector and baked into a model; for the value after an offset, add the offset."
)]
pub struct ActivationsCommand {
    /// Model A (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Model B (GGUF) [default: model A with the steering flags, if any]
    #[arg(long, value_name = "FILE")]
    model_b: Option<PathBuf>,
    /// Neurons: [[layer, index], …], or a file from `locate`
    #[arg(long, value_name = "FILE")]
    neurons: PathBuf,
    /// Folder for the report
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Tokens to generate greedily after each prompt
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    n_predict: usize,
    #[command(flatten)]
    prompts: PromptArguments,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

impl ActivationsCommand {
    /// Measures the activations, and prints and writes the report.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let file = GgufFile::open(&self.model)?;
        let neurons = NeuronFile::read_for(&self.neurons, &file, self.steering.force)?.neurons;
        let (prompts, _) = self.prompts.read()?;
        let model_b = match (&self.model_b, self.steering.is_empty()) {
            (Some(path), true) => {
                // A trained copy has different weights on purpose, so only the sizes are checked.
                let n_ff = GgufFile::open(path)?.n_ff_per_layer()?;
                if n_ff != file.n_ff_per_layer()? {
                    let reason = format!(
                        "expected the same number of layers and neurons as in {}, found different numbers in {}",
                        self.model.display(),
                        path.display()
                    );
                    return Err(Error::setting("--model-b", reason));
                }
                Some((self.engine.open(path)?, base_name(path)))
            }
            (Some(_), false) => {
                return Err(Error::setting(
                    "--model-b",
                    "expected either --model-b or steering flags, found both",
                ));
            }
            (None, true) => None,
            (None, false) => {
                let model = self.steering.open(&self.model, &self.engine)?;
                Some((model, format!("{}, steered", base_name(&self.model))))
            }
        };
        let _lock = open_folder(&self.output, FolderKind::Activations)?;
        let texts: Vec<ActivationPrompt> =
            prompts.iter().map(|p| ActivationPrompt { id: &p.id, text: &p.text }).collect();
        let measure = |model: &Model| -> Result<Vec<f64>> {
            let options = self.engine.session_options();
            let progress = &mut Shown::new();
            mean_over_neurons(model, &options, &texts, &neurons, self.n_predict, progress, interrupt)
        };
        let a = measure(&self.engine.open(&self.model)?)?;
        let b = model_b.as_ref().map(|(model, _)| measure(model)).transpose()?;
        let rows: Vec<PromptActivation> = prompts
            .iter()
            .enumerate()
            .map(|(i, prompt)| PromptActivation {
                language: prompt.language.clone(),
                a: a[i],
                b: b.as_ref().map(|b| b[i]),
            })
            .collect();
        let found = Activations {
            a: base_name(&self.model),
            b: model_b.map(|(_, name)| name),
            n_neurons: neurons.len(),
            n_predict: self.n_predict,
            measured: MEASURED.into(),
            languages: by_language(&rows),
        };
        let files = [("json", json::to_json(&found)?), ("csv", found.to_csv()), ("html", found.to_html())];
        write_reports(&self.output, "activations", &files)?;
        print(&found.to_terminal(may_colour(&std::io::stdout())))?;
        print::note(&format!("report: {}", self.output.join("activations.html").display()));
        Ok(())
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Result<Paths> {
        let paths = Paths::new().reads([&self.model, &self.neurons]).reads(&self.model_b);
        let paths = paths.reads(&self.prompts.prompts).reads(self.steering.files()?);
        Ok(paths.writes_folder(&self.output, FolderKind::Activations))
    }
}
