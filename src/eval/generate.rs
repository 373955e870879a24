//! Generates continuations in units, so that an interrupted run can resume.

use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use crate::engine::schedule::{self, Finish, GenerateOptions, Request, Written};
use crate::engine::{Model, Session, SessionOptions, Token};
use crate::error::Result;
use crate::memory;

use super::metric::fluency;
use super::prompts::Prompt;

/// One continuation, as a line of `generations.jsonl`.
///
/// `prompt` and `generated_text` are the paper's names. Rows of other tools have no other fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// The prompt, as the model saw it.
    pub prompt: String,
    /// The continuation, without the prompt.
    pub generated_text: String,
    /// The prompt's id, unique within a run.
    pub prompt_id: String,
    /// The prompt's language, as a two-letter code.
    pub language: String,
    /// Which of the k continuations of this prompt, from 0.
    pub sample: u32,
    /// Number of tokens in the continuation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_tokens: Option<u32>,
    /// Sum of the tokens' natural log-probs under the model that wrote them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f64>,
    /// Why the continuation ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish: Option<Finish>,
    /// The ids of its tokens, in [`Generation::vocabulary`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<Token>>,
    /// The natural log-prob of each token under the model that wrote them. `logprob` is their sum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_logprobs: Option<Vec<f32>>,
    /// The vocabulary of the ids: [`crate::engine::Vocabulary::hash`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocabulary: Option<String>,
}

impl Generation {
    /// Whether the row has one value for each token, and only possible log-probs.
    pub(super) fn is_possible(&self) -> bool {
        let lengths = [
            self.n_tokens.map(|n| n as usize),
            self.token_ids.as_ref().map(Vec::len),
            self.token_logprobs.as_ref().map(Vec::len),
        ];
        let mut lengths = lengths.into_iter().flatten();
        let first = lengths.next();
        let of_tokens = self.token_logprobs.iter().flatten().map(|&logprob| f64::from(logprob));
        let mut logprobs = self.logprob.into_iter().chain(of_tokens);
        lengths.all(|n| Some(n) == first) && logprobs.all(|logprob| fluency::logprob_fault(logprob).is_none())
    }

    /// The sampled tokens, if their ids are known.
    pub(super) fn written(&self) -> Option<Written<'_>> {
        let tokens = self.token_ids.as_deref()?;
        Some(Written { tokens, finish: self.finish.unwrap_or(Finish::Length) })
    }
}

/// Prompts ready to run: tokenised, checked and divided into units.
///
/// llama.cpp's logits can differ in their last bits between batch shapes. A unit always starts from an
/// empty cache with the same prompts, so a run that resumes at a unit produces the same bytes as an
/// uninterrupted one.
#[derive(Debug)]
pub struct Plan {
    prompts: Vec<Prompt>,
    requests: Vec<Request>,
    options: GenerateOptions,
    prompts_per_unit: usize,
    n_ctx_seq: usize,
}

/// Times that a unit fills all slots.
///
/// Few rounds, so that a killed run loses little; several, so that the empty slots at the end of a unit
/// cost little.
const ROUNDS_PER_UNIT: usize = 4;

/// Checks that the continuations of one prompt fit into a quarter of the machine's memory.
fn check_samples(k: u32, n_predict: usize) -> Result<()> {
    // A row with the prompt's text, its ids, the ids and log-probs of its tokens and a few bytes of text for each.
    let row_bytes = (size_of::<Generation>() as u64 + 512).saturating_add(16 * n_predict.min(1 << 30) as u64);
    let most = memory::total_bytes() / 4 / row_bytes;
    if u64::from(k) <= most {
        return Ok(());
    }
    let reason = format!(
        "{k} continuations of {n_predict} tokens do not fit into memory: expected at most {most} per prompt"
    );
    Err(crate::Error::setting("-k/--samples", reason))
}

/// Prompts in a unit, with `k` continuations each in `n_parallel` slots.
pub(super) fn prompts_per_unit(n_parallel: usize, k: usize) -> usize {
    ROUNDS_PER_UNIT.saturating_mul(n_parallel).div_ceil(k.max(1)).max(1)
}

impl Plan {
    /// Tokenises the prompts and divides them into units.
    ///
    /// # Errors
    /// [`crate::Error::Setting`] for a setting out of range; [`crate::Error::PromptTooLong`] for a prompt
    /// beyond the model's training context.
    pub fn new(
        model: &Model,
        prompts: Vec<Prompt>,
        options: GenerateOptions,
        session_options: &SessionOptions,
    ) -> Result<Plan> {
        options.sampling.validate()?;
        let at_least_one = |flag: &str, n: usize| {
            (n > 0)
                .then_some(())
                .ok_or_else(|| crate::Error::setting(flag, "expected a number of at least 1, found 0"))
        };
        at_least_one("-k/--samples", options.k as usize)?;
        at_least_one("-n/--n-predict", options.n_predict)?;
        model.vocabulary().check_nfc(prompts.iter().map(|p| p.text.as_str()));
        let requests: Vec<Request> = prompts
            .iter()
            .map(|p| Ok(Request { id: p.id.clone(), tokens: model.tokenize_prompt(&p.text)? }))
            .collect::<Result<_>>()?;
        let longest = requests.iter().map(|r| r.tokens.len()).max().unwrap_or(0);
        let n_ctx_seq = longest.saturating_add(options.n_predict);
        // Without -c the context grows with the prompts, up to the model's training context.
        let n_ctx_train = model.n_ctx_train();
        if session_options.n_ctx.is_none() && n_ctx_train > 0 && n_ctx_seq > n_ctx_train {
            let (id, n_prompt) = requests
                .iter()
                .map(|r| (r.id.clone(), r.tokens.len()))
                .max_by_key(|(_, n)| *n)
                .unwrap_or_default();
            return Err(crate::Error::PromptTooLong {
                prompt: id,
                n_prompt,
                n_predict: options.n_predict,
                n_ctx_seq: n_ctx_train,
                is_learned: model.n_positions() == Some(n_ctx_train),
            });
        }
        check_samples(options.k, options.n_predict.min(session_options.n_ctx.unwrap_or(n_ctx_seq)))?;
        let n_parallel = session_options.resolve_parallel(model, n_ctx_seq);
        let prompts_per_unit = prompts_per_unit(n_parallel, options.k as usize);
        Ok(Plan { prompts, requests, options, prompts_per_unit, n_ctx_seq })
    }

    /// Tokens of context that a sequence needs: the longest prompt and its continuation.
    pub fn n_ctx_seq(&self) -> usize {
        self.n_ctx_seq
    }

    /// Refuses prompts that do not fit into the session's sequences.
    pub fn check_fits(&self, session: &Session) -> Result<()> {
        self.requests
            .iter()
            .try_for_each(|r| session.check_fits(&r.id, r.tokens.len(), self.options.n_predict))
    }

    /// The prompts, in order.
    pub fn prompts(&self) -> &[Prompt] {
        &self.prompts
    }

    /// Prompts in every unit except the last.
    pub fn prompts_per_unit(&self) -> usize {
        self.prompts_per_unit
    }

    /// Number of units.
    pub fn n_units(&self) -> usize {
        self.prompts.len().div_ceil(self.prompts_per_unit)
    }

    /// Continuations in each unit.
    pub fn rows_of_units(&self) -> impl Iterator<Item = usize> + '_ {
        self.prompts.chunks(self.prompts_per_unit).map(|unit| unit.len() * self.options.k as usize)
    }

    /// Continuations in all units.
    pub fn n_rows(&self) -> usize {
        self.prompts.len() * self.options.k as usize
    }

    /// The prompt of row `index` of all continuations, and its number among the prompt's k.
    pub fn row(&self, index: usize) -> (&Prompt, u32) {
        let k = self.options.k as usize;
        (&self.prompts[index / k], (index % k) as u32)
    }

    /// Generates unit `unit`: its prompts in order, k rows each. Calls `done` after every row.
    pub fn generate(
        &self,
        session: &mut Session,
        unit: usize,
        interrupt: &AtomicBool,
        mut done: impl FnMut(),
    ) -> Result<Vec<Generation>> {
        let first = unit * self.prompts_per_unit;
        let last = (first + self.prompts_per_unit).min(self.prompts.len());
        let (prompts, requests) = (&self.prompts[first..last], &self.requests[first..last]);
        let k = self.options.k as usize;
        let mut rows: Vec<Option<Generation>> = vec![None; prompts.len() * k];
        let model = session.model().clone();
        schedule::generate(session, requests, &self.options, interrupt, |c| {
            let prompt = &prompts[c.request];
            rows[c.request * k + c.sample as usize] = Some(Generation {
                prompt: prompt.text.clone(),
                generated_text: model.detokenize(&c.tokens),
                prompt_id: prompt.id.clone(),
                language: prompt.language.clone(),
                sample: c.sample,
                n_tokens: Some(c.tokens.len() as u32),
                logprob: Some(c.logprob),
                finish: Some(c.finish),
                token_ids: Some(c.tokens),
                token_logprobs: Some(c.logprobs),
                vocabulary: Some(model.vocabulary().hash().to_owned()),
            });
            done();
            Ok(())
        })?;
        Ok(rows
            .into_iter()
            .map(|row| row.expect("the schedule finishes every sample of every request"))
            .collect())
    }
}
