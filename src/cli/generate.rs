//! `generate`: samples continuations and writes them as JSON lines.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use crate::engine::Session;
use crate::error::Result;
use crate::eval::generate::Plan;
use crate::file::{self, AtomicFile};
use crate::progress::Progress;

use super::arguments::{EngineArguments, PromptArguments, SamplingArguments, check_output};
use super::print;
use super::progress::Shown;
use super::steering::SteeringArguments;

/// Arguments of `generate`.
#[derive(Debug, Args)]
pub struct GenerateCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// File to write (JSON lines) [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    prompts: PromptArguments,
    #[command(flatten)]
    sampling: SamplingArguments,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

impl GenerateCommand {
    /// Generates and writes one unit at a time.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let options = self.sampling.options()?;
        let (prompts, _) = self.prompts.read()?;
        if let Some(output) = &self.output {
            let read = self.steering.files()?;
            let read = read.iter().chain(&self.prompts.prompts).chain([&self.model]).map(PathBuf::as_path);
            check_output(output, &read.collect::<Vec<_>>())?;
        }
        let mut output = self.output.as_deref().map(AtomicFile::create).transpose()?;
        let model = self.steering.open(&self.model, &self.engine)?;
        let plan = Plan::new(&model, prompts, options, &self.engine.session_options())?;
        let mut session = Session::open(&model, &self.engine.session_options(), plan.n_ctx_seq())?;
        plan.check_fits(&session)?;
        let mut progress = Shown::new();
        progress.start("continuations", plan.n_rows() as u64, 0);
        for unit in 0..plan.n_units() {
            let rows = plan.generate(&mut session, unit, interrupt, || progress.advance(1))?;
            let lines = file::json_lines(&rows)?;
            match &mut output {
                Some(output) => output.write_all(&lines)?,
                None => print(&String::from_utf8_lossy(&lines))?,
            }
        }
        progress.finish();
        output.map_or(Ok(()), AtomicFile::commit)
    }
}
