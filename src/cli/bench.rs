//! `bench generate`: how fast does this build generate?

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::{Args, Subcommand};
use comfy_table::{CellAlignment, Table, presets};

use crate::engine::bench::{self, BenchRow};
use crate::engine::{self, Sampling};
use crate::error::Result;

use super::arguments::EngineArguments;
use super::print;

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Tokens a second at several numbers of sequences
    Generate(BenchGenerate),
}

/// Arguments of `bench generate`.
#[derive(Debug, Args)]
pub struct BenchGenerate {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Numbers of sequences
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 8, 25, 100])]
    sequences: Vec<usize>,
    /// Tokens in the prompt
    #[arg(long, value_name = "N", default_value_t = 16)]
    n_prompt: usize,
    /// Tokens decoded in each sequence
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    n_predict: usize,
    /// Runs of each line, after one that is not counted; the median is shown
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArguments,
}

impl BenchGenerate {
    /// Measures and prints.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let model = self.engine.open(&self.model)?;
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
            let report = serde_json::json!({
                "model": self.model.file_name().map(|f| f.to_string_lossy()),
                "description": model.description(),
                "n_vocab": model.n_vocab(),
                "version": crate::version(),
                "llama_cpp": engine::llama_version(),
                "system": engine::system_info(),
                "rows": rows,
            });
            return print(&format!("{report:#}\n"));
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
