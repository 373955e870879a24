//! Exports a model with LoRA adapters merged into its weights.
//!
//! merge ──► load back in llama.cpp ──► compare with base + adapters ──► keep or refuse

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::check::export::{Applied, LoadedBack};
use crate::engine::options::check_threads;
use crate::engine::steering::LoraScaled;
use crate::engine::{Model, ModelOptions, SessionOptions, Token};
use crate::error::{Error, Result};
use crate::eval::prompts::PromptSource;
use crate::file::output::{Form, Paths};
use crate::file::{AtomicFile, base_name, write_atomic};
use crate::gguf::{self, GgufFile, Metadata, TensorType, Value, WatchedFile, file_sha256};
use crate::progress::Progress;
use crate::report::json::to_json;
use crate::steer::{Fingerprint, lora};
use crate::train::output::Adapter;
use crate::train::output::merge::{MergeOptions, merge_unnamed};
use crate::train::output::merge_report::{MergeReport, MergeSummary, TensorSummary};

/// The merged model is compared on one prompt in each of these languages: four scripts, in seconds.
const LANGUAGES: [&str; 5] = ["en", "de", "ru", "ar", "zh"];

/// What to export, and how.
#[derive(Debug, Clone)]
pub struct ExportRequest {
    /// The base model.
    pub model: PathBuf,
    /// The adapters to merge, each with its scale.
    pub loras: Vec<LoraScaled>,
    /// The file to write.
    pub output: PathBuf,
    /// Type of the changed tensors; `None` keeps the type of each.
    pub tensor_type: Option<TensorType>,
    /// Merge adapters made for other weights than the base's.
    pub force: bool,
    /// Keep a merged model that lost more than half of the adapters' effect.
    pub allow_loss: bool,
    /// How to load the models for the comparison.
    pub model_options: ModelOptions,
    /// How to run them; its threads also do the merge.
    pub session_options: SessionOptions,
}

/// A finished step of [`export`], to be shown while the next one runs.
#[derive(Debug, Clone, Copy)]
pub enum Step<'a> {
    /// The adapters are merged.
    Merged(&'a MergeReport),
    /// The merged model was compared with the base and its adapters.
    Compared(&'a LoadedBack),
}

/// An exported model.
#[derive(Debug, Clone)]
pub struct Exported {
    /// How much of the change survived rounding.
    pub merge: MergeReport,
    /// How close the merged model is to the base with the adapters.
    pub loaded_back: LoadedBack,
    /// How to lose less, if much was lost.
    pub advice: Option<String>,
    /// The JSON record next to the output ([`record_path`]).
    pub record: PathBuf,
}

/// What the record of an export contains.
#[derive(Debug, Serialize)]
struct ExportRecord<'a> {
    /// The program's version; also marks the file as such a record.
    detox_gguf_export: &'static str,
    model: String,
    model_sha256: String,
    loras: Vec<MergedAdapter>,
    /// All changed tensors together.
    total: MergeSummary,
    tensors: Vec<TensorSummary>,
    compared: &'a LoadedBack,
}

/// A merged adapter.
#[derive(Debug, Serialize)]
struct MergedAdapter {
    file: String,
    sha256: String,
    scale: f32,
}

/// The path of the record of an export: next to the output, with the ending `.export.json`.
pub fn record_path(output: &Path) -> PathBuf {
    output.with_extension("export.json")
}

/// How every record starts.
pub const RECORD_MARK: &[u8] = b"{\n  \"detox_gguf_export\"";

/// Merges adapters into a copy of a model, loads it back, compares it, and keeps it only if it is close enough.
///
/// The output appears under its name only after the comparison. `on_step` is called after each step, even if the
/// model is then refused.
///
/// # Errors
/// Those of [`lora::check`], [`Adapter::check_fingerprint`], [`merge_unnamed`] and [`LoadedBack::compare`];
/// [`Error::Input`] for a merged model that is refused ([`LoadedBack::verdict`]); [`Error::Interrupted`].
pub fn export(
    request: &ExportRequest,
    progress: &mut (dyn Progress + Send),
    on_step: &mut dyn FnMut(Step<'_>) -> Result<()>,
    interrupt: &AtomicBool,
) -> Result<Exported> {
    let ExportRequest { model, loras, output, .. } = request;
    check_threads("-t/--threads", request.session_options.resolve_threads())?;
    let base = GgufFile::open(model)?;
    gguf::check_decoder(&base)?;
    let record = record_path(output);
    let paths = Paths::new().reads(base.part_paths()).reads(loras.iter().map(|lora| &lora.path));
    paths.writes(output, Form::Gguf).writes_beside(&record, RECORD_MARK).check()?;
    let watched = loras.iter().map(|lora| WatchedFile::open(&lora.path)).collect::<Result<Vec<_>>>()?;
    let adapters = read_adapters(request, &base)?;
    let is_zero = adapters.iter().all(|(adapter, scale)| *scale == 0.0 || adapter.is_zero());
    let merged_adapters = describe(loras)?;
    let provenance = provenance(&base, &merged_adapters)?;
    let options = MergeOptions { tensor_type: request.tensor_type, provenance };

    let (merged, file) = merge_with_progress(request, &base, &adapters, &options, progress, interrupt)?;
    let unnamed = file.path_for_reading();
    let (in_f32, _copies) = in_f32(request, &base, &adapters)?;
    drop(adapters);
    on_step(Step::Merged(&merged))?;

    let loaded_back = LoadedBack::compare(
        model,
        Applied { given: loras, in_f32: &in_f32 },
        &unnamed,
        &request.model_options,
        &request.session_options,
        prompts,
        interrupt,
    )
    .map_err(|error| match error {
        // Name the file that the user asked for, not the temporary one.
        Error::Model { path, reason, .. } if path == unnamed => {
            // The base itself may be what llama.cpp refuses.
            if let Err(of_base) =
                Model::open(model, &ModelOptions { check_tensors: true, ..request.model_options })
            {
                return of_base;
            }
            Error::input(output, None, format!("not written: merged with these adapters, {reason}"))
                .with_hint("lower the scale of the adapters (--lora-scaled)")
        }
        other => other.with_path(&unnamed, output),
    })?;
    on_step(Step::Compared(&loaded_back))?;
    let changed: Vec<(TensorType, TensorType)> = merged.tensors.iter().map(|t| (t.from, t.to)).collect();
    let advice = merged.advice();
    loaded_back.verdict(&changed, is_zero, request.allow_loss).map_err(|refusal| {
        let mut hint = advice.clone().unwrap_or_else(|| match refusal.is_too_small {
            true => {
                "train the adapter for more steps or at a larger --learning-rate, or raise its scale".into()
            }
            false => "use the adapter as it is, with --lora".into(),
        });
        if refusal.can_be_allowed {
            hint.push_str("; --allow-loss keeps the merged model anyway");
        }
        Error::input(output, None, format!("not written: {}", refusal.reason)).with_hint(hint)
    })?;
    // Its metadata names the adapters by their hashes.
    watched.iter().try_for_each(WatchedFile::check_path)?;
    base.files().check_content()?;
    file.commit()?;
    let content = ExportRecord {
        detox_gguf_export: crate::version(),
        model: base_name(model),
        model_sha256: base.files().sha256(|_, _| {})?,
        loras: merged_adapters,
        total: merged.summary(),
        tensors: merged.tensor_summaries(),
        compared: &loaded_back,
    };
    write_atomic(&record, to_json(&content)?.as_bytes())?;
    let advice = advice.filter(|_| !loaded_back.is_close());
    Ok(Exported { merge: merged, loaded_back, advice, record })
}

/// Checks and reads the adapters, each with its scale.
fn read_adapters(request: &ExportRequest, base: &GgufFile) -> Result<Vec<(Adapter, f32)>> {
    let mut adapters = Vec::new();
    for lora in &request.loras {
        refuse_control_vector(&lora.path)?;
        lora::check(lora, base)?;
        Adapter::check_fingerprint(&lora.path, base, request.force)?;
        adapters.push((Adapter::read(&lora.path, base)?, lora.scale));
    }
    Ok(adapters)
}

/// The adapters for the comparison, each in F32. Those of other types are copied to files that have no name and last
/// as long as the second value.
fn in_f32(
    request: &ExportRequest,
    base: &GgufFile,
    adapters: &[(Adapter, f32)],
) -> Result<(Vec<LoraScaled>, Vec<AtomicFile>)> {
    let mut copies = Vec::new();
    let mut in_f32 = Vec::with_capacity(adapters.len());
    for (lora, (adapter, _)) in request.loras.iter().zip(adapters) {
        let file = GgufFile::open(&lora.path)?;
        if file.tensors().iter().all(|tensor| tensor.tensor_type() == TensorType::F32) {
            in_f32.push(lora.clone());
            continue;
        }
        let copy = adapter.write_unnamed(&request.output, base, &Metadata::new())?;
        in_f32.push(LoraScaled { path: copy.path_for_reading(), scale: lora.scale });
        copies.push(copy);
    }
    Ok((in_f32, copies))
}

/// Runs [`merge_unnamed`] on the session's number of threads.
fn merge_with_progress(
    request: &ExportRequest,
    base: &GgufFile,
    adapters: &[(Adapter, f32)],
    options: &MergeOptions,
    progress: &mut (dyn Progress + Send),
    interrupt: &AtomicBool,
) -> Result<(MergeReport, AtomicFile)> {
    let n_threads = request.session_options.resolve_threads();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build();
    let pool =
        pool.map_err(|e| Error::setting("-t/--threads", format!("cannot start {n_threads} threads: {e}")))?;
    let mut shown = None;
    let on_bytes = |done: u64, total: u64| {
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
    let merged = pool.install(|| merge_unnamed(base, adapters, &request.output, options, on_bytes));
    progress.finish();
    merged
}

fn refuse_control_vector(path: &Path) -> Result<()> {
    if GgufFile::open(path)?.str_if_present("general.architecture")? != Some("controlvector") {
        return Ok(());
    }
    Err(Error::input(path, None, "expected a LoRA adapter, found a control vector")
        .with_hint("bake it into a model: `detox-gguf steer -m MODEL --control-vector FILE --bake -o MODEL`"))
}

/// The adapters by name, hash and scale.
fn describe(loras: &[LoraScaled]) -> Result<Vec<MergedAdapter>> {
    let describe = |lora: &LoraScaled| {
        let sha256 = file_sha256(&lora.path, |_, _| {})?;
        Ok(MergedAdapter { file: base_name(&lora.path), sha256, scale: lora.scale })
    };
    loras.iter().map(describe).collect()
}

/// Metadata of the merged model: its base and the adapters.
fn provenance(base: &GgufFile, adapters: &[MergedAdapter]) -> Result<Metadata> {
    let part = |a: &MergedAdapter| format!("{} (sha256 {}) x {}", a.file, a.sha256, a.scale);
    let parts: Vec<String> = adapters.iter().map(part).collect();
    let mut metadata = Metadata::new();
    metadata.set("detox_gguf.merged", Value::Str(parts.join("; ")));
    metadata.set("detox_gguf.merged.base", Value::Str(base_name(base.path())));
    let ffn_down_sha256 = Fingerprint::of(base)?.ffn_down_sha256;
    metadata.set("detox_gguf.merged.base_ffn_down_sha256", Value::Str(ffn_down_sha256));
    Ok(metadata)
}

/// Built-in prompts, the same texts for every model.
fn prompts(model: &Model) -> Result<Vec<Vec<Token>>> {
    let prompts = PromptSource::Own.read(&LANGUAGES, Some(1))?;
    prompts.iter().map(|prompt| model.tokenize_prompt(&prompt.text)).collect()
}
