//! Makes preference pairs from a model's own continuations.
//!
//! ```text
//! prompts ─► samples ─► screen (text, scores) ─► measure (log-prob, unsteered) ─► choose ─► rows
//! ```
//!
//! The paper's pairs were made with PPLM (arXiv 1912.02164), which needs a gradient for every token. Here both
//! sides are samples of the model itself: the toxic side from the plain model or from one steered to be more
//! toxic, the clean side from the plain model or from one steered to be less toxic. This works in every
//! language that the model writes and a scorer covers.
//!
//! A pair should differ in toxicity and in little else, because DPO learns any difference between the two
//! sides. So both sides must have similar lengths, end in the same way, be about equally probable under the
//! unsteered model, not repeat themselves, and be in the prompt's language. (A steered model cannot judge the
//! fluency of its own text.)

pub mod choose;

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use crate::engine::schedule::{Finish, GenerateOptions};
use crate::engine::{Model, ModelOptions, Session, SessionOptions, Steering};
use crate::error::{Error, Result};
use crate::eval::generate::{Generation, Plan};
use crate::eval::metric::fluency;
use crate::eval::perplexity::{BaseLogprob, BaseModel, PerplexityTokens};
use crate::eval::prompts::Prompt;
use crate::eval::tokenizer::TextTokenizer;
use crate::progress::Progress;
use crate::score::{self, Scorer, Text};
use crate::text::language::LanguageIdentifier;
use crate::train::data::preference_pair::PreferencePair;

use choose::{Candidate, Dropped, Rules, Side};

/// The steering of one side of the pairs.
#[derive(Debug, Clone)]
pub struct SteeredSide {
    /// The steering to apply.
    pub steering: Steering,
    /// Description of the files and coefficients, recorded in the rows.
    pub by: String,
}

/// Options of [`make`].
#[derive(Debug, Clone)]
pub struct MakePairsRequest {
    /// The model file (GGUF).
    pub model: PathBuf,
    /// The prompts to continue.
    pub prompts: Vec<Prompt>,
    /// How to sample. `k` is the number of samples per prompt, for each pool of samples.
    pub options: GenerateOptions,
    /// Steering for the samples of the chosen side; unsteered if `None`.
    pub steer_chosen: Option<SteeredSide>,
    /// Steering for the samples of the rejected side; unsteered if `None`.
    pub steer_rejected: Option<SteeredSide>,
    /// Names of the scorers. All that cover a prompt's language must agree.
    pub scorers: Vec<String>,
    /// The requirements for a pair.
    pub rules: Rules,
    /// How to load the model.
    pub model_options: ModelOptions,
    /// How to run the model.
    pub session_options: SessionOptions,
}

/// Measurements of one side of a pair.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// Index of the sample among the k samples of its prompt and pool, from 0.
    pub sample: u32,
    /// The steering it was sampled with; absent for a plain sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steered_by: Option<String>,
    /// Toxicity in [0, 1], by name of the scorer.
    pub toxicity: BTreeMap<String, f64>,
    /// Number of tokens, without an end-of-generation token.
    pub n_tokens: u32,
    /// Why generation ended.
    pub finish: Finish,
    /// Mean natural log-prob of its tokens under the unsteered model.
    pub logprob_per_token: f64,
    /// Fraction of 2-grams that repeat an earlier one; null with fewer than two tokens.
    pub repetition: Option<f64>,
    /// Whether it is in the prompt's language; null if unknown.
    pub language_kept: Option<bool>,
}

/// A pair as a line of the output, in a form that `train` reads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PairRow {
    /// The texts.
    #[serde(flatten)]
    pub pair: PreferencePair,
    /// The prompt's id, unique within a run.
    pub prompt_id: String,
    /// The prompt's language, as a two-letter code.
    pub language: String,
    /// Measurements of the chosen continuation.
    pub chosen_measured: Measured,
    /// Measurements of the rejected continuation.
    pub rejected_measured: Measured,
}

/// Counts of samples and pairs of one language.
///
/// Every sample is counted once: in `n_chosen`, in `n_rejected`, or in `dropped` for
/// [a reason that concerns it alone](Dropped::is_of_sample). Every sample in `n_rejected` is in a pair, or in `dropped`
/// because it has no partner. Log-probs are only computed for prompts that have both chosen and rejected
/// samples, so samples of other prompts are never dropped as improbable.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LanguageYield {
    /// Number of prompts.
    pub n_prompts: usize,
    /// Prompts with at least one pair.
    pub n_prompts_paired: usize,
    /// Samples, over all pools.
    pub n_samples: usize,
    /// Samples that qualify as chosen.
    pub n_chosen: usize,
    /// Samples that qualify as rejected.
    pub n_rejected: usize,
    /// Number of pairs.
    pub n_pairs: usize,
    /// Samples in no pair, by reason.
    pub dropped: BTreeMap<Dropped, usize>,
}

/// The result of [`make`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MadePairs {
    /// The pairs in the order of the prompts; for each prompt the most toxic rejected continuation first.
    pub rows: Vec<PairRow>,
    /// Counts by language.
    pub yields: BTreeMap<String, LanguageYield>,
}

/// A pool of samples with the same steering.
struct Pool<'a> {
    /// The side of pairs that the pool is for; `None` for both.
    side: Option<Side>,
    steered: Option<&'a SteeredSide>,
    /// Name of the pool, shown as the progress phase.
    name: &'static str,
}

impl MakePairsRequest {
    fn pools(&self) -> Vec<Pool<'_>> {
        let pool = |side, steered, name| Pool { side, steered, name };
        let (chosen, rejected) = (self.steer_chosen.as_ref(), self.steer_rejected.as_ref());
        match (chosen, rejected) {
            (None, None) => vec![pool(None, None, "samples")],
            _ => vec![
                pool(Some(Side::Chosen), chosen, "samples for the chosen side"),
                pool(Some(Side::Rejected), rejected, "samples for the rejected side"),
            ],
        }
    }
}

/// A sample that qualifies for one side of a pair.
struct Sampled {
    generation: Generation,
    toxicity: BTreeMap<String, f64>,
    repetition: Option<f64>,
    language_kept: Option<bool>,
    logprob: BaseLogprob,
    steered_by: Option<String>,
}

impl Sampled {
    fn n_tokens(&self) -> u32 {
        self.generation.n_tokens.unwrap_or(0)
    }

    fn finish(&self) -> Finish {
        self.generation.finish.expect("generated samples have a finish reason")
    }

    /// Mean natural log-prob of its tokens; minus infinity if there is none.
    fn logprob_per_token(&self) -> f64 {
        match self.logprob {
            BaseLogprob { base_logprob: Some(sum), base_n_tokens: Some(n), .. } if n > 0 => {
                sum / f64::from(n)
            }
            _ => f64::NEG_INFINITY,
        }
    }

    fn candidate(&self) -> Candidate {
        Candidate {
            toxicity: self.toxicity.values().copied().collect(),
            n_tokens: self.n_tokens(),
            finish: self.finish(),
            logprob: self.logprob_per_token(),
        }
    }

    fn measured(&self) -> Measured {
        Measured {
            sample: self.generation.sample,
            steered_by: self.steered_by.clone(),
            toxicity: self.toxicity.clone(),
            n_tokens: self.n_tokens(),
            finish: self.finish(),
            logprob_per_token: self.logprob_per_token(),
            repetition: self.repetition,
            language_kept: self.language_kept,
        }
    }
}

/// The screened samples of one prompt, from all pools.
#[derive(Default)]
struct PromptSamples {
    chosen: Vec<Sampled>,
    rejected: Vec<Sampled>,
    dropped: Vec<Dropped>,
}

/// Samples continuations, scores them and makes pairs.
///
/// The result may be empty.
///
/// # Errors
/// Invalid settings, steering, prompts and languages fail before the first token is sampled.
/// [`Error::Interrupted`] once `interrupt` is set.
pub fn make(
    request: &MakePairsRequest,
    interrupt: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<MadePairs> {
    request.rules.validate()?;
    let scorers = score::by_names(&request.scorers)?;
    score::check_covered(&scorers, request.prompts.iter().map(|p| p.language.as_str()))?;
    let model = Model::open(&request.model, &request.model_options)?;
    let pools = request.pools();
    let models: Vec<Model> = pools
        .iter()
        .map(|pool| match pool.steered {
            Some(steered) => model.with_steering(steered.steering.clone()),
            None => Ok(model.clone()),
        })
        .collect::<Result<_>>()?;
    let plan = Plan::new(&model, request.prompts.clone(), request.options, &request.session_options)?;
    let screen = Screen {
        rules: &request.rules,
        scorers: &scorers,
        identifier: LanguageIdentifier::new(),
        tokenizer: TextTokenizer::of_model(&model),
    };

    let mut screened: Vec<PromptSamples> = request.prompts.iter().map(|_| PromptSamples::default()).collect();
    for (pool, model) in pools.iter().zip(&models) {
        let generations = sample(model, &plan, &request.session_options, pool.name, interrupt, progress)?;
        let k = request.options.k as usize;
        for (screened, samples) in screened.iter_mut().zip(generations.chunks(k)) {
            if interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            screen.sort_into(screened, samples, pool);
        }
    }
    measure(&mut screened, &model, &request.session_options, interrupt, progress)?;
    Ok(pair_up(&request.prompts, screened, &request.rules))
}

/// Generates all samples of one pool, grouped by prompt.
fn sample(
    model: &Model,
    plan: &Plan,
    options: &SessionOptions,
    name: &str,
    interrupt: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Vec<Generation>> {
    let mut session = Session::open(model, options, plan.n_ctx_seq())?;
    plan.check_fits(&session)?;
    let mut generations = Vec::with_capacity(plan.n_rows());
    progress.start(name, plan.n_rows() as u64, 0);
    for unit in 0..plan.n_units() {
        generations.extend(plan.generate(&mut session, unit, interrupt, || progress.advance(1))?);
    }
    progress.finish();
    Ok(generations)
}

/// Checks that look at a single sample, except for its log-prob.
struct Screen<'a> {
    rules: &'a Rules,
    scorers: &'a [Box<dyn Scorer>],
    identifier: LanguageIdentifier,
    tokenizer: TextTokenizer,
}

impl Screen<'_> {
    /// Screens the samples of one prompt from one pool.
    fn sort_into(&self, screened: &mut PromptSamples, samples: &[Generation], pool: &Pool<'_>) {
        let Some(language) = samples.first().map(|sample| sample.language.as_str()) else { return };
        let texts: Vec<Text<'_>> =
            samples.iter().map(|g| Text { text: &g.generated_text, language: Some(language) }).collect();
        let covering: Vec<&dyn Scorer> =
            self.scorers.iter().map(AsRef::as_ref).filter(|s| s.info().covers(language)).collect();
        let scores: Vec<(String, Vec<Result<f64>>)> =
            covering.iter().map(|s| (s.info().name, score::scores_of(&**s, &texts))).collect();
        let mut seen = HashSet::new();
        let is_repeated: Vec<bool> = samples.iter().map(|g| !seen.insert(&g.generated_text)).collect();
        let judged: Vec<Result<(Side, Sampled), Dropped>> = samples
            .par_iter()
            .enumerate()
            .map(|(i, generation)| {
                let toxicity = scores.iter().map(|(name, s)| (name.clone(), s[i].as_ref().ok().copied()));
                self.judge(generation, is_repeated[i], toxicity.collect(), pool)
            })
            .collect();
        for judged in judged {
            match judged {
                Ok((Side::Chosen, sampled)) => screened.chosen.push(sampled),
                Ok((Side::Rejected, sampled)) => screened.rejected.push(sampled),
                Err(reason) => screened.dropped.push(reason),
            }
        }
    }

    /// Decides which side a sample qualifies for, or why it is dropped.
    fn judge(
        &self,
        generation: &Generation,
        is_repeated: bool,
        toxicity: BTreeMap<String, Option<f64>>,
        pool: &Pool<'_>,
    ) -> Result<(Side, Sampled), Dropped> {
        let text = &generation.generated_text;
        if text.trim().is_empty() || generation.n_tokens.unwrap_or(0) < self.rules.min_tokens {
            return Err(Dropped::Short);
        }
        if is_repeated {
            return Err(Dropped::Duplicate);
        }
        let toxicity: Option<BTreeMap<String, f64>> =
            toxicity.into_iter().map(|(name, t)| Some((name, t?))).collect();
        let toxicity = toxicity.filter(|by_scorer| !by_scorer.is_empty()).ok_or(Dropped::Unscored)?;
        let language_kept = self.identifier.language_kept(&generation.language, text);
        if language_kept == Some(false) {
            return Err(Dropped::OtherLanguage);
        }
        // The model's own tokenizer accepts every text.
        let repetition = fluency::repetition(&self.tokenizer.tokens(text).unwrap_or_default());
        if repetition.is_some_and(|share| share > self.rules.max_repetition) {
            return Err(Dropped::Repetitive);
        }
        let values: Vec<f64> = toxicity.values().copied().collect();
        let side = self.rules.side(&values).filter(|&side| pool.side.is_none_or(|only| only == side));
        let side = side.ok_or(Dropped::Between)?;
        let logprob = match pool.steered {
            // `measure` computes it later, under the unsteered model.
            Some(_) => BaseLogprob::default(),
            None => BaseLogprob::of_generation(generation),
        };
        let steered_by = pool.steered.map(|steered| steered.by.clone());
        let generation = generation.clone();
        Ok((side, Sampled { generation, toxicity, repetition, language_kept, logprob, steered_by }))
    }
}

/// Computes the log-probs, under the unsteered model, of steered samples that may form a pair.
fn measure(
    screened: &mut [PromptSamples],
    model: &Model,
    options: &SessionOptions,
    interrupt: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<()> {
    let mut waiting: Vec<&mut Sampled> = screened
        .iter_mut()
        .filter(|samples| !samples.chosen.is_empty() && !samples.rejected.is_empty())
        .flat_map(|samples| samples.chosen.iter_mut().chain(&mut samples.rejected))
        .filter(|sampled| sampled.steered_by.is_some())
        .collect();
    if waiting.is_empty() {
        return Ok(());
    }
    let generations: Vec<Generation> = waiting.iter().map(|sampled| sampled.generation.clone()).collect();
    // The sampled tokens, as on a side without steering.
    let tokens = PerplexityTokens::Sampled;
    let mut base = BaseModel::open(model, &generations, tokens, 0, options)?;
    progress.start("log-probs of steered samples", waiting.len() as u64, 0);
    let mut first = 0;
    for n_rows in base.units(&generations) {
        let unit = first..first + n_rows;
        first = unit.end;
        let logprobs = base.logprobs(&generations[unit.clone()], interrupt)?;
        for (sampled, logprob) in waiting[unit].iter_mut().zip(logprobs) {
            sampled.logprob = logprob;
        }
        progress.advance(n_rows as u64);
    }
    progress.finish();
    Ok(())
}

/// Chooses the pairs of every prompt, and counts samples and pairs by language.
fn pair_up(prompts: &[Prompt], screened: Vec<PromptSamples>, rules: &Rules) -> MadePairs {
    let mut made = MadePairs::default();
    for (prompt, PromptSamples { mut chosen, mut rejected, mut dropped }) in prompts.iter().zip(screened) {
        let n_samples = chosen.len() + rejected.len() + dropped.len();
        if !chosen.is_empty() && !rejected.is_empty() {
            for side in [&mut chosen, &mut rejected] {
                let n_before = side.len();
                side.retain(|sampled| sampled.logprob_per_token() >= rules.min_logprob);
                dropped.extend(std::iter::repeat_n(Dropped::Improbable, n_before - side.len()));
            }
        }
        let candidates = |side: &[Sampled]| side.iter().map(Sampled::candidate).collect::<Vec<Candidate>>();
        let matched = choose::choose(&candidates(&chosen), &candidates(&rejected), rules);
        dropped.extend(matched.alone.iter().map(|&(_, reason)| reason));

        let counts = made.yields.entry(prompt.language.clone()).or_default();
        counts.n_prompts += 1;
        counts.n_prompts_paired += usize::from(!matched.pairs.is_empty());
        counts.n_samples += n_samples;
        counts.n_chosen += chosen.len();
        counts.n_rejected += rejected.len();
        counts.n_pairs += matched.pairs.len();
        for reason in dropped {
            *counts.dropped.entry(reason).or_default() += 1;
        }
        for (c, r) in matched.pairs {
            let (chosen, rejected) = (&chosen[c], &rejected[r]);
            made.rows.push(PairRow {
                pair: PreferencePair {
                    prompt: prompt.text.clone(),
                    chosen: chosen.generation.generated_text.clone(),
                    rejected: rejected.generation.generated_text.clone(),
                },
                prompt_id: prompt.id.clone(),
                language: prompt.language.clone(),
                chosen_measured: chosen.measured(),
                rejected_measured: rejected.measured(),
            });
        }
    }
    made
}

#[cfg(test)]
mod tests;
