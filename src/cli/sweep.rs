//! `sweep`: evaluates an intervention at several settings, with random controls.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use crate::engine::Steering;
use crate::error::{Error, Result};
use crate::eval::run::Source;
use crate::file::output::{FolderKind, Paths, open_folder};
use crate::gguf::GgufFile;
use crate::report::write::write_reports;
use crate::report::{json as report_json, sweep as report};
use crate::steer::{NeuronFile, Route};
use crate::study::sweep::{self, Controls, Plan};

use super::arguments::{EngineArguments, PromptArguments, SamplingArguments};
use super::eval::MeasureArguments;
use super::progress::Shown;
use super::steering::SteeringArguments;
use super::{may_colour, print};

/// Arguments of `sweep`.
#[derive(Debug, Args)]
pub struct SweepCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Folder for the runs and the report. Interrupted? Run the same command again
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Neurons to offset: [[layer, index], …], or a file from `locate`
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present_any = ["steer", "control_vector", "control_vector_scaled"]
    )]
    neurons: Option<PathBuf>,
    /// Offsets to add to the neurons' activations [default: 0,-1,-2,-3,-4,-5, as in the paper]
    #[arg(
        long,
        value_name = "X,…",
        value_delimiter = ',',
        // clap does not parse "-1,-2" as a number.
        allow_hyphen_values = true,
        requires = "neurons",
        conflicts_with = "coefficients"
    )]
    offsets: Vec<f32>,
    /// Without --neurons: coefficients for the steering files [default: 0,0.25,0.5,1,1.5,2]
    #[arg(
        long,
        value_name = "C,…",
        value_delimiter = ',',
        // clap does not parse "-1,-2" as a number.
        allow_hyphen_values = true,
        conflicts_with = "neurons"
    )]
    coefficients: Vec<f32>,
    /// Number of controls: random neurons of the same layers, or random directions of the same lengths
    #[arg(long, value_name = "N", default_value_t = 1)]
    controls: u32,
    #[command(flatten)]
    prompts: PromptArguments,
    #[command(flatten)]
    sampling: SamplingArguments,
    #[command(flatten)]
    measure: MeasureArguments,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

impl SweepCommand {
    /// Evaluates every setting, writes the reports and prints the table.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let plan = self.plan(&GgufFile::open(&self.model)?)?;
        for choice in &plan.choices {
            print::note(&format!("steering: {choice}"));
        }
        let (prompts, prompts_name) = self.prompts.read()?;
        let source = Source::Model {
            path: self.model.clone(),
            prompts,
            prompts_name,
            options: self.sampling.options()?,
            steering: Steering::default(),
            steered_by: Vec::new(),
        };
        let base = self.measure.base.clone().unwrap_or_else(|| self.model.clone());
        let request = self.measure.request(source, Some(base), &self.engine);
        // Held until the reports are written.
        let _lock = open_folder(&self.output, FolderKind::Sweep)?;
        let sweep = sweep::run(&plan, &request, &self.output, interrupt, &mut Shown::new());
        let sweep = sweep.inspect_err(|error| {
            if matches!(error, Error::Interrupted) {
                print::note(&format!("run the same command again to resume in {}", self.output.display()));
            }
        })?;
        write_reports(
            &self.output,
            "sweep",
            &[
                ("json", report_json::to_json(&sweep)?),
                ("csv", report::to_csv(&sweep)),
                ("md", report::to_markdown(&sweep)),
                ("html", report::to_html(&sweep)),
            ],
        )?;
        print(&report::to_terminal(&sweep, may_colour(&std::io::stdout())))?;
        print::note(&format!("report: {}", self.output.join("sweep.html").display()));
        Ok(())
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Result<Paths> {
        let paths = Paths::new().reads([&self.model]).reads(&self.neurons).reads(&self.prompts.prompts);
        let paths = self.measure.reads(paths).reads(self.steering.files()?);
        Ok(paths.writes_folder(&self.output, FolderKind::Sweep))
    }

    /// Plans the runs from the flags.
    fn plan(&self, file: &GgufFile) -> Result<Plan> {
        let controls = Controls { n_draws: self.controls, seed: self.sampling.seed };
        let Some(path) = &self.neurons else {
            let (sources, loras) = (self.steering.sources()?, self.steering.loras()?);
            let options = self.steering.compile_options(Route::Cheapest);
            return Plan::of_files(file, &sources, &loras, &self.coefficients, controls, options);
        };
        let neurons = NeuronFile::read_for(path, file, self.steering.force)?.neurons();
        if !self.steering.is_empty() {
            let reason = "a sweep varies either neurons or steering files, not both";
            return Err(Error::setting("--neurons", reason));
        }
        Plan::of_neurons(file, path, &neurons, &self.offsets, controls, self.steering.force)
    }
}
