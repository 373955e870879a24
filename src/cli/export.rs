//! `export`: a copy of the model with LoRA adapters inside, compared with what it was made of.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;

use crate::check::difference::Difference;
use crate::check::export::LoadedBack;
use crate::engine::steering::LoraScaled;
use crate::engine::{Model, ModelOptions, SessionOptions, Token};
use crate::error::{Error, Result};
use crate::eval::prompts::PromptSource;
use crate::file::TEMPORARY_PREFIX;
use crate::gguf::{GgufFile, Metadata, TensorType, Value, file_sha256};
use crate::progress::Progress;
use crate::steer::argument::parse_scaled;
use crate::steer::bake::check_output;
use crate::steer::{Fingerprint, lora};
use crate::train::output::Adapter;
use crate::train::output::merge::{MergeOptions, merge};
use crate::train::output::merge_report::{Change, MergeReport};

use super::print;
use super::progress::Shown;

/// Arguments of `export`.
#[derive(Debug, Args)]
pub struct ExportCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// LoRA adapter; may be repeated
    #[arg(long, value_name = "FILE")]
    lora: Vec<PathBuf>,
    /// LoRA adapters, each with its scale
    #[arg(long, value_name = "FILE:SCALE,…")]
    lora_scaled: Vec<String>,
    /// Model to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Type of the changed tensors, such as q8_0 or f16 [default: each its own]
    #[arg(long = "type", value_name = "TYPE")]
    tensor_type: Option<String>,
    /// Merge an adapter made for another quantisation or fine-tune of this model
    #[arg(long)]
    force: bool,
    /// Keep a merged model that misses more than half of the adapter's effect
    #[arg(long)]
    allow_loss: bool,
    /// Threads [default: all cores]
    #[arg(short = 't', long, value_name = "N")]
    threads: Option<usize>,
    /// Layers on an accelerator while comparing (-ngl); -1 for all
    #[arg(long, alias = "gpu-layers", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_gpu_layers: i32,
}

/// A merged model is compared on one prompt in each of these: four scripts, and not too long a wait.
const LANGUAGES: [&str; 5] = ["en", "de", "ru", "ar", "zh"];

impl ExportCommand {
    /// Merges, loads back, compares, and only then gives the file its name.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let base = GgufFile::open(&self.model)?;
        crate::gguf::check_decoder(&base)?;
        let loras = self.loras()?;
        let tensor_type = self.tensor_type.as_deref().map(parse_type).transpose()?;
        check_output(&base, &self.output)?;
        let mut adapters = Vec::new();
        for lora in &loras {
            refuse_control_vector(&lora.path)?;
            lora::check(lora, &base)?;
            Adapter::check_fingerprint(&lora.path, &base, self.force)?;
            if same_file(&lora.path, &self.output) {
                let reason = format!("{} is the adapter itself", self.output.display());
                return Err(Error::setting("-o/--output", reason));
            }
            adapters.push((Adapter::read(&lora.path, &base)?, lora.scale));
        }
        let is_zero = adapters.iter().all(|(adapter, scale)| *scale == 0.0 || adapter.is_zero());
        let options = MergeOptions { tensor_type, provenance: provenance(&base, &loras)? };

        // Beside the output, so that a rename is all that is left to do; removed with the folder if not.
        let parent = self.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = tempfile::Builder::new().prefix(TEMPORARY_PREFIX).suffix(".tmp").tempdir_in(parent);
        let folder = folder.map_err(Error::io("create", parent))?;
        let unnamed = folder.path().join("merged.gguf");
        let session_options = SessionOptions { n_threads: self.threads, ..SessionOptions::default() };
        let report = self.merge(&base, &adapters, &unnamed, &options, &session_options, interrupt)?;
        drop(adapters);
        print(&table(&report))?;

        let model_options = ModelOptions { n_gpu_layers: self.n_gpu_layers, check_tensors: false };
        let compared = LoadedBack::compare(
            &self.model,
            &loras,
            &unnamed,
            &model_options,
            &session_options,
            prompts_of,
            interrupt,
        )?;
        print(&differences(&compared))?;
        let changed: Vec<(TensorType, TensorType)> = report.tensors.iter().map(|t| (t.from, t.to)).collect();
        let advice = report.advice();
        compared.verdict(&changed, is_zero, self.allow_loss).map_err(|refusal| {
            let mut hint = advice.clone().unwrap_or("use the adapter as it is, with --lora".into());
            if refusal.can_be_allowed {
                hint.push_str("; --allow-loss keeps the merged model all the same");
            }
            Error::input(&self.output, None, format!("not written: {}", refusal.reason)).with_hint(hint)
        })?;
        std::fs::rename(&unnamed, &self.output).map_err(Error::io("write", &self.output))?;
        if let Some(advice) = advice
            && !compared.is_close()
        {
            print(&format!("{advice}\n"))?;
        }
        eprintln!("model: {}", self.output.display());
        Ok(())
    }

    fn loras(&self) -> Result<Vec<LoraScaled>> {
        let mut loras: Vec<LoraScaled> =
            self.lora.iter().map(|path| LoraScaled { path: path.clone(), scale: 1.0 }).collect();
        for text in &self.lora_scaled {
            let scaled = parse_scaled("--lora-scaled", text)?;
            loras.extend(scaled.into_iter().map(|(path, scale)| LoraScaled { path, scale }));
        }
        if loras.is_empty() {
            return Err(Error::setting("--lora", "expected an adapter to merge, found none").with_hint(
                    "give --lora FILE; a control vector or neurons are put into a model by `detox-gguf steer --bake`"
                        ));
        }
        Ok(loras)
    }

    fn merge(
        &self,
        base: &GgufFile,
        adapters: &[(Adapter, f32)],
        output: &Path,
        options: &MergeOptions,
        session_options: &SessionOptions,
        interrupt: &AtomicBool,
    ) -> Result<MergeReport> {
        let n_threads = session_options.resolve_threads();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build();
        let pool =
            pool.map_err(|e| Error::setting("-t/--threads", format!("cannot start {n_threads}: {e}")))?;
        let mut progress = Shown::new();
        let mut shown = None;
        let on_chunk = |done: u64, total: u64| {
            if interrupt.load(Ordering::SeqCst) {
                return Err(Error::Interrupted);
            }
            let before = shown.unwrap_or_else(|| {
                progress.start("merging, MiB", total >> 20, 0);
                0
            });
            progress.advance((done >> 20) - (before >> 20));
            shown = Some(done);
            Ok(())
        };
        let merged = merge_in(&pool, base, adapters, output, options, on_chunk);
        progress.finish();
        // The file that could not be written is the one that was asked for, whatever it is called meanwhile.
        merged.map_err(|error| match error {
            Error::Io { action, path, source } if path == output => {
                Error::Io { action, path: self.output.clone(), source }
            }
            other => other,
        })
    }
}

fn merge_in(
    pool: &rayon::ThreadPool,
    base: &GgufFile,
    adapters: &[(Adapter, f32)],
    output: &Path,
    options: &MergeOptions,
    on_chunk: impl FnMut(u64, u64) -> Result<()> + Send,
) -> Result<MergeReport> {
    pool.install(|| merge(base, adapters, output, options, on_chunk))
}

/// ggml's type of this name.
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
                _ => format!("expected a type of tensors, found {name:?}"),
            };
            let names: Vec<&str> = can.iter().map(|t| t.name()).collect();
            let hint = Some(format!("one of {}", names.join(", ")));
            Err(Error::Setting { setting: "--type".into(), reason, hint })
        }
    }
}

fn refuse_control_vector(path: &Path) -> Result<()> {
    if GgufFile::open(path)?.str_if_present("general.architecture")? != Some("controlvector") {
        return Ok(());
    }
    Err(Error::input(path, None, "expected a LoRA adapter, found a control vector").with_hint(
        "put it into a model with `detox-gguf steer -m MODEL --control-vector FILE --bake -o MODEL`",
    ))
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// What the merged model was made of, as its metadata tell it.
fn provenance(base: &GgufFile, loras: &[LoraScaled]) -> Result<Metadata> {
    let name = |path: &Path| crate::file::base_name(path);
    let mut parts = Vec::new();
    for lora in loras {
        let sha256 = file_sha256(&lora.path, |_, _| {})?;
        parts.push(format!("{} (sha256 {sha256}) x {}", name(&lora.path), lora.scale));
    }
    let mut metadata = Metadata::new();
    metadata.set("detox_gguf.merged", Value::Str(parts.join("; ")));
    metadata.set("detox_gguf.merged.base", Value::Str(name(base.path())));
    let of_base = Fingerprint::of(base)?.ffn_down_sha256;
    metadata.set("detox_gguf.merged.base_ffn_down_sha256", Value::Str(of_base));
    Ok(metadata)
}

/// The program's own prompts: the same texts for every model.
fn prompts_of(model: &Model) -> Result<Vec<Vec<Token>>> {
    let prompts = PromptSource::Own.read(&LANGUAGES, Some(1))?;
    prompts.iter().map(|prompt| model.tokenize_prompt(&prompt.text)).collect()
}

/// A line for the tensors of one name and one type in all blocks, and one for all.
fn table(report: &MergeReport) -> String {
    let mut kinds: BTreeMap<(&str, String), (usize, Change)> = BTreeMap::new();
    for tensor in &report.tensors {
        let name = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        let of_block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map(|(_, name)| name);
        let types = if tensor.from == tensor.to {
            tensor.to.to_string()
        } else {
            format!("{} to {}", tensor.from, tensor.to)
        };
        let (n, change) = kinds.entry((of_block.unwrap_or(name), types)).or_default();
        *n += 1;
        change.add(&tensor.change);
    }
    let row = |name: &str, n: usize, types: &str, change: &Change| {
        let share = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{:.1}%", 100.0 * x));
        let noise = change.relative_error().map_or("-".to_owned(), |x| format!("{x:.3}"));
        format!(
            "{name:<16}{n:>7} {types:<14}{:>10.3e}{:>10}{:>10}{noise:>10}\n",
            change.norm(),
            share(change.survived()),
            share(Some(change.moved()))
        )
    };
    let mut text = format!(
        "{:<16}{:>7} {:<14}{:>10}{:>10}{:>10}{:>10}\n",
        "changed", "tensors", "type", "norm", "survived", "moved", "error"
    );
    for ((name, types), (n, change)) in &kinds {
        text += &row(name, *n, types, change);
    }
    text + &row("all", report.tensors.len(), "", &report.total)
}

fn differences(compared: &LoadedBack) -> String {
    let row = |name: &str, d: &Difference| {
        format!("{name:<42}{:>12.2e}{:>12.2e}{:>11.4}\n", d.mean_kl, d.largest_kl, d.largest_logit_difference)
    };
    let mut text = format!(
        "{:<42}{:>12}{:>12}{:>11}\n",
        format!("{} tokens, from base + adapter", compared.effect.n_tokens),
        "mean KL",
        "largest KL",
        "logit"
    );
    text += &row("base: the adapter's effect", &compared.effect);
    text += &row("merged: what is missed", &compared.missed);
    match &compared.floor {
        Some(floor) => text += &row("noise floor (0.001 more on some neurons)", floor),
        None => text += "noise floor: not known for this architecture\n",
    }
    text
}
