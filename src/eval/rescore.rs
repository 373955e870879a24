//! Measures the perplexity of a finished run again, and keeps everything else.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use serde_json::json;

use crate::engine::{Model, ModelOptions, SessionOptions};
use crate::error::{Error, Result};
use crate::eval::perplexity::PerplexityTokens;
use crate::eval::record::{self, ScoreRow};
use crate::eval::result::ModelPaths;
use crate::eval::run::{Evaluated, engine_settings, judge_name};
use crate::eval::scoring::{self, Judge};
use crate::eval::summarize;
use crate::file;
use crate::file::output::{FolderKind, open_folder};
use crate::progress::{Progress, hash_files};

/// A run whose perplexity is to be measured again.
#[derive(Debug, Clone)]
pub struct RescoreRequest {
    /// The folder of the finished run.
    pub run: PathBuf,
    /// The model that measures perplexity.
    pub base: PathBuf,
    /// The tokens to measure; `None` for the sampled ones if the model can.
    pub perplexity: Option<PerplexityTokens>,
    /// How the model is loaded.
    pub model_options: ModelOptions,
    /// How the model is run.
    pub session_options: SessionOptions,
}

/// Copies a finished run to `folder`, with perplexity measured again. Resumes if it was interrupted.
///
/// # Errors
/// [`Error::RunFolder`] if there is no finished run, or if `folder` contains something else.
pub fn rescore(
    request: &RescoreRequest,
    folder: &Path,
    interrupt: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Evaluated> {
    let RescoreRequest { run, base, session_options, .. } = request;
    let (there, generations, scores) = record::read_rows_of(run)?;
    // Prompts are tokenised again, so they need the normalisation that they had.
    let had_nfc = there.run.settings.get("nfc") == Some(&json!(true));
    let model_options = &ModelOptions { nfc: request.model_options.nfc || had_nfc, ..request.model_options };
    let is_same = std::fs::canonicalize(folder)
        .is_ok_and(|folder| std::fs::canonicalize(run).is_ok_and(|run| run == folder));
    if is_same {
        return Err(Error::run_folder(folder, "expected a new folder, found the run itself")
            .with_hint("choose a new folder with -o"));
    }
    let _lock = open_folder(folder, FolderKind::Eval)?;
    // Finds a broken model before anything is written.
    let files = Model::open(base, model_options)?.files().clone();
    let mut info = there.run;
    let (name, hash) = (file::base_name(base), hash_files(&files, progress)?);
    info.tool_version = crate::version().to_owned();
    info.perplexity_model = Some(judge_name(&name, &hash));
    info.settings.insert("base".into(), json!(name));
    info.settings.insert("base_sha256".into(), json!(hash));
    info.settings.insert("rescored_with".into(), json!(engine_settings(model_options, session_options)));
    let paths =
        ModelPaths { base: Some(base.to_string_lossy().into_owned()), ..there.paths.unwrap_or_default() };
    record::start(folder, &info, paths)?;
    file::write_atomic(&folder.join("generations.jsonl"), &file::json_lines(&generations)?)?;
    let judge = Judge {
        base: Some((base, &files)),
        wrote_them: false,
        wanted: request.perplexity,
        n_predict: info.n_predict as usize,
        model_options,
        session_options,
    };
    let scores = scoring::score_all(folder, &generations, &judge, interrupt, progress, |rows, logprobs| {
        let old = scores[rows].iter().cloned();
        Ok(old.zip(logprobs).map(|(row, base)| ScoreRow { base, ..row }).collect())
    })?;
    // Once more before the report, which names the model by its hash.
    files.check_content()?;
    info.perplexity_tokens = record::perplexity_tokens(&info, &generations, &scores);
    let samples = record::join(folder, generations, scores)?;
    let result = summarize::summarize(info, &samples)?;
    Ok(Evaluated { result, samples })
}
