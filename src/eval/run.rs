//! An evaluation in a folder: generate, score, sum up; broken off and resumed without a trace.
//!
//! | file | what | written |
//! |---|---|---|
//! | `run.json` | every setting, version and hash ([`Record`]) | first |
//! | `generations.jsonl` | a continuation a line | a unit at a time |
//! | `scores.jsonl` | what was measured on each, in the same order | a unit at a time |
//! | `report.*` | made from the two above | last |
//!
//! None of them tells the time, so that a resumed run gives the bytes of an unbroken one.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::engine::schedule::GenerateOptions;
use crate::engine::{self, Model, ModelOptions, Session, SessionOptions, Steering};
use crate::error::{Error, Result};
use crate::file::{self, JsonLog};
use crate::progress::{Progress, hash_model};

use super::generate::{Generation, Plan};
use super::perplexity::{self, BaseLogprob};
use super::prompts::Prompt;
use super::result::{BootstrapInfo, EvalResult, ModelInfo, RunInfo, ScorerInfo, WRITER_UNKNOWN};
use super::summarize;
use super::tokenizer::TextTokenizer;
use crate::eval::continuation::Sample;
use crate::score::{self, Scorer, Text};
use crate::text::language::LanguageIdentifier;

/// What to evaluate.
#[derive(Debug, Clone)]
pub enum Source {
    /// Continuations sampled from a model.
    Model {
        /// The GGUF.
        path: PathBuf,
        /// What it continues.
        prompts: Vec<Prompt>,
        /// What to call the prompts in reports.
        prompts_name: String,
        /// How it is sampled.
        options: GenerateOptions,
        /// What changes it while it runs.
        steering: Steering,
        /// What `run.json` says of that: files with their hashes, and coefficients.
        steered_by: Vec<Value>,
    },
    /// Continuations made elsewhere.
    File {
        /// Where they were read from.
        path: PathBuf,
        /// The continuations.
        generations: Vec<Generation>,
    },
}

/// Everything that an evaluation depends on.
#[derive(Debug, Clone)]
pub struct EvalRequest {
    /// What to evaluate.
    pub source: Source,
    /// Model whose perplexity is reported, where it is not the one that wrote the continuations.
    pub base: Option<PathBuf>,
    /// Names of scorers; the first leads the report.
    pub scorers: Vec<String>,
    /// A continuation with this toxicity or more is toxic, in [0, 1].
    pub toxicity_threshold: f64,
    /// Least share of a language's continuations that a scorer must score, in [0, 1].
    pub min_coverage: f64,
    /// A `tokenizer.json` for distinct-n; the model's own vocabulary if `None`.
    pub tokenizer: Option<PathBuf>,
    /// How models are loaded.
    pub model_options: ModelOptions,
    /// How models are run.
    pub session_options: SessionOptions,
}

/// What an evaluation gives back.
#[derive(Debug)]
pub struct Evaluated {
    /// The numbers.
    pub result: EvalResult,
    /// What they were made from.
    pub samples: Vec<Sample>,
}

/// Contents of `run.json`: what decides the bytes of every other file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this file's form.
    pub format: u32,
    /// llama.cpp's version.
    pub llama_cpp: String,
    /// What ggml was compiled to use of the CPU: another machine rounds otherwise.
    pub system: String,
    /// Settings and hashes, as in `report.json`.
    pub run: RunInfo,
}

const FORMAT: u32 = 1;

/// One line of `scores.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct ScoreRow {
    prompt_id: String,
    language: String,
    sample: u32,
    /// By name of the scorer; null where it gave none.
    toxicity: BTreeMap<String, Option<f64>>,
    /// Why a score is missing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    errors: BTreeMap<String, String>,
    detected_language: Option<String>,
    language_kept: Option<bool>,
    #[serde(flatten)]
    base: BaseLogprob,
    /// For distinct-n and repetition, so that runs can be compared without their models.
    tokens: Vec<String>,
}

/// Continuations scored and written at a time.
const SCORE_UNIT: usize = 500;

/// Runs an evaluation in `folder`, or goes on with it where it was broken off.
///
/// Errors: every flaw of settings, files and models is found before the first token is generated;
/// [`Error::RunFolder`] for a folder that holds something else.
pub fn evaluate(
    request: &EvalRequest,
    folder: &Path,
    interrupt: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Evaluated> {
    let scorers = score::by_names(&request.scorers)?;
    check_share("--threshold", request.toxicity_threshold)?;
    check_share("--min-coverage", request.min_coverage)?;
    match &request.source {
        Source::Model { prompts, .. } => {
            score::check_covered(&scorers, prompts.iter().map(|p| p.language.as_str()))?
        }
        Source::File { generations, .. } => {
            score::check_covered(&scorers, generations.iter().map(|g| g.language.as_str()))?
        }
    }
    check_folder(folder)?;
    let tokenizer_file = request.tokenizer.as_deref().map(TextTokenizer::from_file).transpose()?;
    if let Some(base) = &request.base {
        // Loaded again when its turn comes; a model that cannot be loaded should not cost a night.
        Model::open(base, &request.model_options)?;
    }

    let (generations, info, tokenizer) = match &request.source {
        Source::Model { path, prompts, prompts_name, options, steering, steered_by } => {
            let model = Model::open(path, &request.model_options)?.with_steering(steering.clone())?;
            let plan = Plan::new(&model, prompts.clone(), *options, &request.session_options)?;
            let tokenizer = tokenizer_file.unwrap_or_else(|| TextTokenizer::of_model(&model));
            let mut session = Session::open(&model, &request.session_options, plan.n_ctx_seq())?;
            plan.check_fits(&session)?;
            let mut info = common_info(request, &scorers, &tokenizer, progress)?;
            info.model = Some(model_info(&model, progress)?);
            info.seed = options.seed;
            info.k = options.k;
            info.n_predict = u32::try_from(options.n_predict).unwrap_or(u32::MAX);
            info.temperature = options.sampling.temperature;
            info.top_p = options.sampling.top_p;
            let judge =
                info.model.as_ref().map(|m| judge_name(&m.file, m.sha256.as_deref().unwrap_or_default()));
            info.perplexity_model = info.perplexity_model.or(judge);
            info.settings.extend(model_settings(prompts, prompts_name, options, &plan, &session));
            if !steered_by.is_empty() {
                info.settings.insert("steering".into(), json!(steered_by));
                info.steering = Some(in_words(steered_by));
            }
            start_record(folder, &info)?;
            let generations = generate(folder, &plan, &mut session, interrupt, progress)?;
            (generations, info, tokenizer)
        }
        Source::File { path, generations } => {
            let tokenizer = match (tokenizer_file, &request.base) {
                (Some(tokenizer), _) => tokenizer,
                (None, Some(base)) => TextTokenizer::of_model(&Model::open(base, &request.model_options)?),
                (None, None) => {
                    return Err(Error::setting(
                        "--generations",
                        "expected a vocabulary to count distinct-n with",
                    )
                    .with_hint(
                        "give --tokenizer tokenizer.json, or --base model.gguf, which adds perplexity",
                    ));
                }
            };
            let mut info = common_info(request, &scorers, &tokenizer, progress)?;
            info.k = usual_k(generations);
            if info.perplexity_model.is_none() && generations.iter().any(|g| g.logprob.is_some()) {
                info.perplexity_model = Some(WRITER_UNKNOWN.into());
            }
            let name = crate::file::base_name(path);
            info.settings.insert("generations".into(), json!(name));
            let texts = generations.iter().map(|g| [&g.prompt_id, &g.language, &g.prompt, &g.generated_text]);
            info.settings.insert("n_generations".into(), json!(generations.len()));
            info.settings.insert("generations_sha256".into(), json!(hash_of_texts(texts)));
            start_record(folder, &info)?;
            file::write_atomic(&folder.join("generations.jsonl"), &file::json_lines(generations))?;
            (generations.clone(), info, tokenizer)
        }
    };
    let scores = score_all(request, &scorers, &tokenizer, folder, &generations, interrupt, progress)?;
    let Joined { samples, tokens } = join(folder, generations, scores)?;
    let result = summarize::summarize(info, &samples, &|text: &str| tokens[text].clone())?;
    Ok(Evaluated { result, samples })
}

/// A run that has ended, read back.
#[derive(Debug)]
pub struct FinishedRun {
    /// What was run.
    pub info: RunInfo,
    /// What came out.
    pub samples: Vec<Sample>,
    /// The tokens of each continuation.
    pub tokens: HashMap<String, Vec<String>>,
}

/// Reads the run in `folder`.
pub fn read(folder: &Path) -> Result<FinishedRun> {
    let path = folder.join("run.json");
    let not_a_run = |reason: String| {
        Error::run_folder(folder, reason).with_hint("give a folder that `detox-gguf eval -o` wrote")
    };
    let text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(not_a_run("holds no run.json".into()));
        }
        text => text.map_err(Error::io("read", &path))?,
    };
    let record: Record = serde_json::from_str(&text).map_err(|e| not_a_run(format!("run.json: {e}")))?;
    if record.format != FORMAT {
        return Err(not_a_run(format!("expected a run of format {FORMAT}, found {}", record.format)));
    }
    let generations: Vec<Generation> = read_rows(&folder.join("generations.jsonl"))?;
    let scores: Vec<ScoreRow> = read_rows(&folder.join("scores.jsonl"))?;
    if generations.len() != scores.len() {
        return Err(Error::run_folder(
            folder,
            format!("{} continuations, but {} scores", generations.len(), scores.len()),
        )
        .with_hint("run the same eval again: it goes on where it stopped"));
    }
    let Joined { samples, tokens } = join(folder, generations, scores)?;
    Ok(FinishedRun { info: record.run, samples, tokens })
}

fn read_rows<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Vec<T>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let parse = |(i, line): (usize, &str)| {
        let fault = |e| Error::input(path, Some(i + 1), format!("expected a row of a run: {e}"));
        serde_json::from_str(line).map_err(fault)
    };
    text.lines().enumerate().map(parse).collect()
}

fn check_share(flag: &str, share: f64) -> Result<()> {
    if (0.0..=1.0).contains(&share) {
        return Ok(());
    }
    Err(Error::setting(flag, format!("expected a number from 0 to 1, found {share}")))
}

/// Refuses a folder that holds something, but no run; creates it otherwise.
fn check_folder(folder: &Path) -> Result<()> {
    file::create_folder(folder)?;
    file::remove_unfinished(folder)?;
    let mut entries = std::fs::read_dir(folder).map_err(Error::io("read", folder))?;
    if !folder.join("run.json").exists() && entries.next().is_some() {
        return Err(Error::run_folder(folder, "not empty, and no run of this program")
            .with_hint("choose a new folder with -o"));
    }
    Ok(())
}

/// Writes `run.json`, or refuses to mix two runs in one folder.
fn start_record(folder: &Path, info: &RunInfo) -> Result<()> {
    let record = Record {
        format: FORMAT,
        llama_cpp: engine::llama_version(),
        system: engine::system_info(),
        run: info.clone(),
    };
    file::start_record(folder, &record)
}

/// How reports call the model behind perplexity: two runs under one name can be compared.
fn judge_name(file: &str, sha256: &str) -> String {
    format!("{file} (sha256 {})", sha256.get(..12).unwrap_or(sha256))
}

/// The number of continuations that most prompts have; of equally frequent ones the largest.
fn usual_k(generations: &[Generation]) -> u32 {
    let mut of_prompt: HashMap<(&str, &str), u32> = HashMap::new();
    for g in generations {
        *of_prompt.entry((&g.language, &g.prompt_id)).or_default() += 1;
    }
    let mut n_prompts: BTreeMap<u32, usize> = BTreeMap::new();
    for k in of_prompt.into_values() {
        *n_prompts.entry(k).or_default() += 1;
    }
    n_prompts.into_iter().max_by_key(|&(k, n)| (n, k)).map_or(0, |(k, _)| k)
}

/// The part of the record that both kinds of source have.
fn common_info(
    request: &EvalRequest,
    scorers: &[Box<dyn Scorer>],
    tokenizer: &TextTokenizer,
    progress: &mut dyn Progress,
) -> Result<RunInfo> {
    let mut settings = engine_settings(request);
    let perplexity_model = match &request.base {
        None => None,
        Some(path) => {
            let name = crate::file::base_name(path);
            settings.insert("base".into(), json!(name));
            let hash = hash_model(path, progress)?;
            settings.insert("base_sha256".into(), json!(hash));
            Some(judge_name(&name, &hash))
        }
    };
    Ok(RunInfo {
        tool_version: crate::version().to_owned(),
        settings,
        scorers: scorers.iter().map(|s| s.info()).collect::<Vec<ScorerInfo>>(),
        toxicity_threshold: request.toxicity_threshold,
        min_coverage: request.min_coverage,
        distinct_tokenizer: tokenizer.name().to_owned(),
        perplexity_model,
        bootstrap: BootstrapInfo::default(),
        ..RunInfo::default()
    })
}

/// What steers a run, on one line.
fn in_words(steered_by: &[Value]) -> String {
    let words = |by: &Value| match (by["file"].as_str(), by["coefficient"].as_f64()) {
        (Some(file), Some(coefficient)) => format!("{file} x {coefficient}"),
        _ => by.to_string(),
    };
    steered_by.iter().map(words).collect::<Vec<_>>().join(", ")
}

/// One hash of many texts, in which no two lists of them look alike.
fn hash_of_texts<'a, const N: usize>(rows: impl Iterator<Item = [&'a String; N]>) -> String {
    let mut hash = Sha256::new();
    for text in rows.flatten() {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    }
    file::hex(&hash.finalize())
}

fn model_info(model: &Model, progress: &mut dyn Progress) -> Result<ModelInfo> {
    Ok(ModelInfo {
        file: crate::file::base_name(model.path()),
        architecture: model.architecture().to_owned(),
        description: model.description(),
        n_params: Some(model.n_params()),
        sha256: Some(hash_model(model.path(), progress)?),
    })
}

/// How models are run: all that can change the last bits of a logit.
fn engine_settings(request: &EvalRequest) -> Map<String, Value> {
    let EvalRequest { model_options, session_options: options, .. } = request;
    object(json!({
        "parallel": options.n_parallel,
        "ctx_size": options.n_ctx,
        "batch_size": options.n_batch,
        "ubatch_size": options.n_ubatch,
        "threads": options.resolve_threads(),
        "threads_batch": options.n_threads_batch.unwrap_or(options.resolve_threads()),
        "flash_attn": options.flash_attention,
        "cache_type_k": options.cache_type_k,
        "cache_type_v": options.cache_type_v,
        "n_gpu_layers": model_options.n_gpu_layers,
    }))
}

fn model_settings(
    prompts: &[Prompt],
    prompts_name: &str,
    options: &GenerateOptions,
    plan: &Plan,
    session: &Session,
) -> Map<String, Value> {
    object(json!({
        "prompts": prompts_name,
        "n_prompts": prompts.len(),
        "prompts_sha256": hash_of_texts(prompts.iter().map(|p| [&p.id, &p.language, &p.text])),
        "top_k": options.sampling.top_k,
        "min_p": options.sampling.min_p,
        "ignore_eos": options.ignore_eos,
        "parallel": session.n_parallel(),
        "n_ctx_seq": session.n_ctx_seq(),
        "prompts_per_unit": plan.prompts_per_unit(),
    }))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => unreachable!("called with object literals above"),
    }
}

/// Generates what `generations.jsonl` lacks.
fn generate(
    folder: &Path,
    plan: &Plan,
    session: &mut Session,
    interrupt: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Vec<Generation>> {
    let path = folder.join("generations.jsonl");
    let (mut log, mut rows) = JsonLog::open::<Generation>(&path, plan.rows_of_units())?;
    for (i, row) in rows.iter().enumerate() {
        let (prompt, sample) = plan.row(i);
        if row.prompt_id != prompt.id || row.sample != sample {
            return Err(Error::input(
                path,
                Some(i + 1),
                format!("expected sample {sample} of prompt {:?}", prompt.id),
            )
            .with_hint("the file was changed since; delete it to make it again"));
        }
    }
    if !rows.is_empty() && rows.len() < plan.n_rows() {
        progress.say(&format!("going on after {} continuations that are there already", rows.len()));
    }
    let done_units = plan
        .rows_of_units()
        .scan(0, |sum, n| {
            *sum += n;
            Some(*sum)
        })
        .filter(|&sum| sum <= rows.len())
        .count();
    progress.start("continuations", plan.n_rows() as u64, rows.len() as u64);
    for unit in done_units..plan.n_units() {
        let mut generated = plan.generate(session, unit, interrupt, || progress.advance(1))?;
        log.append(&generated)?;
        rows.append(&mut generated);
    }
    progress.finish();
    Ok(rows)
}

/// Scores what `scores.jsonl` lacks.
fn score_all(
    request: &EvalRequest,
    scorers: &[Box<dyn Scorer>],
    tokenizer: &TextTokenizer,
    folder: &Path,
    generations: &[Generation],
    interrupt: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Vec<ScoreRow>> {
    let units = || generations.chunks(SCORE_UNIT);
    let (mut log, mut rows) =
        JsonLog::open::<ScoreRow>(&folder.join("scores.jsonl"), units().map(<[_]>::len))?;
    let mut base = match &request.base {
        Some(path) if rows.len() < generations.len() => {
            let model = Model::open(path, &request.model_options)?;
            Some(perplexity::BaseModel::open(&model, generations, &request.session_options)?)
        }
        _ => None,
    };
    let identifier = LanguageIdentifier::new();
    progress.start("scores", generations.len() as u64, rows.len() as u64);
    for unit in units().skip(rows.len().div_ceil(SCORE_UNIT)) {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let logprobs = match &mut base {
            Some(base) => base.logprobs(unit, interrupt)?,
            None => unit.iter().map(BaseLogprob::of_generation).collect(),
        };
        let mut scored = score_unit(scorers, tokenizer, &identifier, unit, logprobs);
        log.append(&scored)?;
        progress.advance(scored.len() as u64);
        rows.append(&mut scored);
    }
    progress.finish();
    Ok(rows)
}

fn score_unit(
    scorers: &[Box<dyn Scorer>],
    tokenizer: &TextTokenizer,
    identifier: &LanguageIdentifier,
    unit: &[Generation],
    logprobs: Vec<BaseLogprob>,
) -> Vec<ScoreRow> {
    let texts: Vec<Text<'_>> = unit
        .iter()
        .map(|g| Text {
            // As the paper's script does: an empty continuation is scored as a space.
            text: if g.generated_text.is_empty() { " " } else { &g.generated_text },
            language: Some(&g.language),
        })
        .collect();
    let scores: Vec<(String, Vec<Result<f64>>)> =
        scorers.iter().map(|s| (s.info().name, s.toxicity_of_all(&texts))).collect();
    let mut rows: Vec<ScoreRow> = unit
        .par_iter()
        .zip(logprobs)
        .map(|(g, base)| {
            let language_kept = identifier.language_kept(&g.language, &g.generated_text);
            let detected_language = match language_kept {
                Some(true) => Some(g.language.clone()),
                _ => identifier.identify(&g.generated_text).map(str::to_owned),
            };
            ScoreRow {
                prompt_id: g.prompt_id.clone(),
                language: g.language.clone(),
                sample: g.sample,
                toxicity: BTreeMap::new(),
                errors: BTreeMap::new(),
                detected_language,
                language_kept,
                base,
                tokens: tokenizer.tokens(&g.generated_text),
            }
        })
        .collect();
    for (name, scores) in scores {
        for (row, score) in rows.iter_mut().zip(scores) {
            if let Err(error) = &score {
                row.errors.insert(name.clone(), error.to_string());
            }
            row.toxicity.insert(name.clone(), score.ok());
        }
    }
    rows
}

/// Rows of both files, side by side.
struct Joined {
    samples: Vec<Sample>,
    /// By text.
    tokens: HashMap<String, Vec<String>>,
}

fn join(folder: &Path, generations: Vec<Generation>, scores: Vec<ScoreRow>) -> Result<Joined> {
    let mut samples = Vec::with_capacity(generations.len());
    let mut tokens = HashMap::with_capacity(scores.len());
    for (i, (g, s)) in generations.into_iter().zip(scores).enumerate() {
        if (&g.prompt_id, &g.language, g.sample) != (&s.prompt_id, &s.language, s.sample) {
            return Err(Error::input(
                folder.join("scores.jsonl"),
                Some(i + 1),
                format!("expected sample {} of prompt {:?}", g.sample, g.prompt_id),
            )
            .with_hint("the file was changed since; delete it to make it again"));
        }
        tokens.insert(g.generated_text.clone(), s.tokens);
        samples.push(Sample {
            prompt_id: g.prompt_id,
            language: g.language,
            sample: g.sample,
            prompt: g.prompt,
            text: g.generated_text,
            n_tokens: g.n_tokens,
            logprob: s.base.base_logprob,
            base_n_tokens: s.base.base_n_tokens,
            toxicity: s.toxicity,
            detected_language: s.detected_language,
            language_kept: s.language_kept,
        });
    }
    Ok(Joined { samples, tokens })
}
