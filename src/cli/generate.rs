//! `generate`: samples continuations and writes them as JSON lines.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use crate::engine::Session;
use crate::error::Result;
use crate::eval::generate::Plan;
use crate::file;
use crate::file::output::Paths;
use crate::progress::Progress;

use super::arguments::{EngineArguments, PromptArguments, SamplingArguments};
use super::print::{self, Rows};
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
        let mut output = Rows::open(print::named(self.output.as_deref()))?;
        let model = self.steering.open(&self.model, &self.engine)?;
        let plan = Plan::new(&model, prompts, options, &self.engine.session_options())?;
        let mut session = Session::open(&model, &self.engine.session_options(), plan.n_ctx_seq())?;
        plan.check_fits(&session)?;
        let mut progress = Shown::new();
        progress.start("continuations", plan.n_rows() as u64, 0);
        for unit in 0..plan.n_units() {
            let rows = plan.generate(&mut session, unit, interrupt, || progress.advance(1))?;
            output.write(&file::json_lines(&rows)?)?;
        }
        progress.finish();
        output.finish()
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Result<Paths> {
        let paths =
            Paths::new().reads([&self.model]).reads(&self.prompts.prompts).reads(self.steering.files()?);
        Ok(print::writes_rows(paths, self.output.as_deref()))
    }
}
