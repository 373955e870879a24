//! `export`: writes a copy of a model with LoRA adapters merged into its weights.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use crate::check::difference::Difference;
use crate::check::export::LoadedBack;
use crate::engine::steering::LoraScaled;
use crate::engine::{ModelOptions, SessionOptions};
use crate::error::{Error, Result};
use crate::file::output::{Form, Paths};
use crate::gguf::TensorType;
use crate::study::export::{ExportRequest, Step, export};
use crate::text::printable;
use crate::train::output::merge_report::{Change, MergeReport};

use super::print;
use super::progress::Shown;
use super::steering::parse_loras;

/// Arguments of `export`.
#[derive(Debug, Args)]
pub struct ExportCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// LoRA adapter to merge; repeatable
    #[arg(long, value_name = "FILE")]
    lora: Vec<PathBuf>,
    /// LoRA adapters to merge, each with its scale
    #[arg(long, value_name = "FILE:SCALE,…")]
    lora_scaled: Vec<String>,
    /// Merged model to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Type of the changed tensors, such as q8_0 or f16 [default: keep each tensor's type]
    #[arg(long = "type", value_name = "TYPE")]
    tensor_type: Option<String>,
    /// Merge an adapter made for another quantisation or fine-tune of this model
    #[arg(long)]
    force: bool,
    /// Keep the merged model even if it loses more than half of the adapters' effect
    #[arg(long)]
    allow_loss: bool,
    /// Print a row for each changed tensor, not only for each kind
    #[arg(long)]
    per_tensor: bool,
    /// Number of threads [default: all cores]
    #[arg(short = 't', long, value_name = "N")]
    threads: Option<usize>,
    /// Number of layers to offload to the GPU for the comparison (-ngl); -1 = all
    #[arg(long, alias = "gpu-layers", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_gpu_layers: i32,
}

impl ExportCommand {
    /// Runs the export and prints its tables.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let request = ExportRequest {
            model: self.model.clone(),
            loras: self.loras()?,
            output: self.output.clone(),
            tensor_type: self.tensor_type.as_deref().map(parse_type).transpose()?,
            force: self.force,
            allow_loss: self.allow_loss,
            model_options: ModelOptions { n_gpu_layers: self.n_gpu_layers, ..ModelOptions::default() },
            session_options: SessionOptions { n_threads: self.threads, ..SessionOptions::default() },
        };
        // A table that cannot be printed must not stop the work.
        let mut printed = Ok(());
        let mut print_step = |step: Step<'_>| {
            let text = match step {
                Step::Merged(report) => table(report, self.per_tensor),
                Step::Compared(compared) => differences(compared),
            };
            if printed.is_ok() {
                printed = print(&text);
            }
            Ok(())
        };
        let exported = export(&request, &mut Shown::new(), &mut print_step, interrupt)?;
        printed?;
        if let Some(advice) = exported.advice {
            print(&format!("{advice}\n"))?;
        }
        print::note(&format!("record of each tensor: {}", exported.record.display()));
        print::note(&format!("model: {}", self.output.display()));
        Ok(())
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Result<Paths> {
        let loras = parse_loras(&self.lora, &self.lora_scaled)?;
        let paths = Paths::new().reads([&self.model]).reads(loras.iter().map(|lora| &lora.path));
        Ok(paths.writes(&self.output, Form::Gguf))
    }

    fn loras(&self) -> Result<Vec<LoraScaled>> {
        let loras = parse_loras(&self.lora, &self.lora_scaled)?;
        if loras.is_empty() {
            return Err(Error::setting("--lora", "expected an adapter to merge, found none").with_hint(
                "give --lora FILE; to bake a control vector or neurons into a model, use `detox-gguf steer --bake`",
            ));
        }
        Ok(loras)
    }
}

/// The tensor type of this ggml name.
fn parse_type(name: &str) -> Result<TensorType> {
    let can = TensorType::ALL.iter().filter(|t| t.quantize_fault(t.block_len()).is_none());
    let can: Vec<TensorType> = can.copied().collect();
    let found = TensorType::ALL.iter().find(|t| t.name().eq_ignore_ascii_case(name));
    match found {
        Some(found) if can.contains(found) => Ok(*found),
        _ => {
            let reason = match found {
                Some(found) if found.needs_importance_matrix() => {
                    format!("type {found} cannot be written without an importance matrix")
                }
                _ => format!("expected a tensor type, found {name:?}"),
            };
            let names: Vec<&str> = can.iter().map(|t| t.name()).collect();
            Err(Error::setting("--type", reason).with_hint(format!("choose one of {}", names.join(", "))))
        }
    }
}

/// One row for each tensor name and type, over all blocks, or for each tensor; and a row for all tensors.
fn table(report: &MergeReport, per_tensor: bool) -> String {
    // The first part of the key keeps single tensors in the order of the file.
    let mut kinds: BTreeMap<(usize, &str, String), (usize, Change)> = BTreeMap::new();
    for (i, tensor) in report.tensors.iter().enumerate() {
        let name = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        let of_block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map(|(_, name)| name);
        let types = if tensor.from == tensor.to {
            tensor.to.to_string()
        } else {
            format!("{} to {}", tensor.from, tensor.to)
        };
        let key = if per_tensor { (i, name, types) } else { (0, of_block.unwrap_or(name), types) };
        let (n, change) = kinds.entry(key).or_default();
        *n += 1;
        change.add(&tensor.change);
    }
    let width = kinds.keys().map(|(_, name, _)| name.len()).max().unwrap_or(0).max(16);
    let row = |name: &str, n: usize, types: &str, change: &Change| {
        let share = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{:.1}%", 100.0 * x));
        let noise = change.relative_error().map_or("-".to_owned(), |x| format!("{x:.3}"));
        format!(
            "{name:<width$}{n:>7} {types:<14}{:>10.3e}{:>10}{:>10}{noise:>10}\n",
            change.norm(),
            share(change.survived()),
            share(Some(change.moved()))
        )
    };
    let mut text = format!(
        "{:<width$}{:>7} {:<14}{:>10}{:>10}{:>10}{:>10}\n",
        "changed", "tensors", "type", "norm", "survived", "moved", "error"
    );
    for ((_, name, types), (n, change)) in &kinds {
        text += &row(&printable(name), *n, types, change);
    }
    text + &row("all", report.tensors.len(), "", &report.total)
}

/// The effect of the adapters, the loss of the merge and the noise floor.
fn differences(compared: &LoadedBack) -> String {
    let row = |name: &str, d: &Difference| {
        format!("{name:<42}{:>12.2e}{:>12.2e}{:>11.4}\n", d.mean_kl, d.largest_kl, d.largest_logit_difference)
    };
    let mut text = format!(
        "{:<42}{:>12}{:>12}{:>11}\n",
        format!("{} tokens, against base + adapter", compared.effect.n_tokens),
        "mean KL",
        "largest KL",
        "logit"
    );
    text += &row("base: the adapter's effect", &compared.effect);
    text += &row("merged: lost in the merge", &compared.missed);
    if let Some(rounding) = &compared.rounding {
        text += &row("adapter: its own rounding by llama.cpp", rounding);
    }
    match &compared.floor {
        Some(floor) => text += &row("noise floor (0.001 added to some neurons)", floor),
        None => text += "noise floor: unknown for this architecture\n",
    }
    text
}
