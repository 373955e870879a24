//! `bench`: measures the speed of this build, and the cost of steering.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::{Args, Subcommand};
use comfy_table::{CellAlignment, Table, presets};

use crate::engine::bench::{self, BenchRow, SteeringRow, check_runs};
use crate::engine::{self, Model, Sampling};
use crate::error::{Error, Result};
use crate::file::output::Paths;
use crate::gguf::GgufFile;
use crate::interp::locate;
use crate::train::output::merge_bench::{self, MergeTime};

use super::arguments::EngineArguments;
use super::print;
use super::steering::SteeringArguments;

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Tokens per second at several numbers of parallel sequences
    Generate(BenchGenerate),
    /// Overhead of steering: a control vector, and the callback on one, some and all layers
    Steer(BenchSteer),
    /// Time to rank all value vectors, compared with reading and dequantising them once
    Locate(BenchLocate),
    /// Time to merge a random adapter into every matrix of a model
    Merge(BenchMerge),
}

impl BenchCommand {
    /// Runs the benchmark, and prints its results.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        match self {
            BenchCommand::Generate(arguments) => arguments.run(interrupt),
            BenchCommand::Steer(arguments) => arguments.run(interrupt),
            BenchCommand::Locate(arguments) => arguments.run(interrupt),
            BenchCommand::Merge(arguments) => arguments.run(interrupt),
        }
    }

    /// The files that the command reads. `bench merge` writes only a temporary folder.
    pub fn paths(&self) -> Result<Paths> {
        let read = |model: &PathBuf| Paths::new().reads([model]);
        match self {
            BenchCommand::Generate(arguments) => {
                Ok(read(&arguments.model).reads(arguments.steering.files()?))
            }
            BenchCommand::Steer(arguments) => Ok(read(&arguments.model)),
            BenchCommand::Locate(arguments) => Ok(read(&arguments.model)),
            BenchCommand::Merge(arguments) => Ok(read(&arguments.model).writes_scratch(&arguments.output)),
        }
    }
}

/// Arguments of `bench locate`.
#[derive(Debug, Args)]
pub struct BenchLocate {
    /// Model (GGUF); only its down projections are read
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Rounds to measure, after one warm-up; medians are printed
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
}

impl BenchLocate {
    fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        check_runs(self.runs)?;
        let times = locate::bench(&GgufFile::open(&self.model)?, self.runs, interrupt)?;
        print(&format!(
            "read and dequantise {:.2} s, rank {:.2} s, ratio {:.2}\n",
            times.read.as_secs_f64(),
            times.rank.as_secs_f64(),
            times.ratio
        ))
    }
}

/// Arguments of `bench merge`.
#[derive(Debug, Args)]
pub struct BenchMerge {
    /// Model (GGUF); it is not run, so any architecture works
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Rank of the adapter
    #[arg(long, value_name = "N", default_value_t = 64)]
    rank: usize,
    /// Folder for the merged model, which is deleted afterwards
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    output: PathBuf,
}

impl BenchMerge {
    fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::setting("--rank", "expected at least 1, found 0"));
        }
        let base = GgufFile::open(&self.model)?;
        let adapter = merge_bench::random_adapter(&base, self.rank);
        if adapter.factors.is_empty() {
            return Err(Error::input(
                &self.model,
                None,
                "expected matrices to merge an adapter into, found none",
            ));
        }
        let measured = merge_bench::measure(&base, adapter, &self.output, interrupt)?;
        let MergeTime { seconds, n_tensors, n_weights, adapter_bytes } = measured;
        print(&format!(
            "{n_tensors} tensors, {n_weights} weights, adapter {} MiB: {seconds:.1} s, {:.1} million weights/s\n",
            adapter_bytes >> 20,
            n_weights as f64 / seconds / 1e6,
        ))
    }
}

/// Arguments of `bench steer`.
#[derive(Debug, Args)]
pub struct BenchSteer {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Sequences decoded in parallel
    #[arg(long, value_name = "N", default_value_t = 25)]
    sequences: usize,
    /// Tokens in the prompt
    #[arg(long, value_name = "N", default_value_t = 16)]
    n_prompt: usize,
    /// Tokens decoded in each sequence
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    n_predict: usize,
    /// Rounds to measure, after one warm-up; each runs every kind of steering, and medians are printed
    #[arg(long, value_name = "N", default_value_t = 9)]
    runs: usize,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArguments,
}

impl BenchSteer {
    fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let model = self.engine.open(&self.model)?;
        let rows = bench::bench_steering(
            &model,
            &self.engine.session_options(),
            self.sequences,
            self.n_prompt,
            self.n_predict,
            self.runs,
            interrupt,
        )?;
        if self.json {
            return print::print_json(&format!("{:#}\n", to_json(&model, &self.model, &rows)));
        }
        print(&format!("{}, {} sequences\n{}\n", model.description(), self.sequences, steering_table(&rows)))
    }
}

/// The measurements as JSON, with the model and the system.
fn to_json<T: serde::Serialize>(model: &Model, path: &Path, rows: &[T]) -> serde_json::Value {
    serde_json::json!({
        "model": path.file_name().map(|f| f.to_string_lossy()),
        "description": model.description(),
        "n_vocab": model.n_vocab(),
        "version": crate::version(),
        "llama_cpp": engine::llama_version(),
        "system": engine::system_info(),
        "rows": rows,
    })
}

fn steering_table(rows: &[SteeringRow]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["", "tokens/s", "time vs unsteered"]);
    for row in rows {
        table.add_row([
            row.way.to_owned(),
            format!("{:.1}", row.tokens_per_second),
            format!("{:+.1}%", 100.0 * (row.relative_time - 1.0)),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Arguments of `bench generate`.
#[derive(Debug, Args)]
pub struct BenchGenerate {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Numbers of parallel sequences to measure
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 8, 25, 100])]
    sequences: Vec<usize>,
    /// Tokens in the prompt
    #[arg(long, value_name = "N", default_value_t = 16)]
    n_prompt: usize,
    /// Tokens decoded in each sequence
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    n_predict: usize,
    /// Runs per number of sequences, after one warm-up; medians are printed
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

impl BenchGenerate {
    fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let model = self.steering.open(&self.model, &self.engine)?;
        let rows = bench::bench(
            &model,
            &self.engine.session_options(),
            Sampling::PAPER,
            &self.sequences,
            self.n_prompt,
            self.n_predict,
            self.runs,
            interrupt,
        )?;
        if self.json {
            return print::print_json(&format!("{:#}\n", to_json(&model, &self.model, &rows)));
        }
        print(&format!(
            "{}, {} tokens in the vocabulary\n{}\n",
            model.description(),
            model.n_vocab(),
            table(&rows)
        ))
    }
}

fn table(rows: &[BenchRow]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["sequences", "prompt", "decoded", "tokens/s", "decode only", "sampling", "prompt/s"]);
    for row in rows {
        table.add_row([
            row.n_parallel.to_string(),
            row.n_prompt.to_string(),
            row.n_predict.to_string(),
            format!("{:.1}", row.generate_tokens_per_second),
            format!("{:.1}", row.decode_tokens_per_second),
            format!("{:.1}%", 100.0 * row.sample_share),
            format!("{:.1}", row.prompt_tokens_per_second),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
