//! Log-probs of continuations under a base model, for conditional perplexity.
//!
//! The model's tokenizer often splits a text in another way than the model wrote it, and that is less probable. So the
//! sampled tokens are measured by their ids if the base model shares the vocabulary of the model that wrote them.
//! They are decoded in the batches in which they were sampled: an intervention that changes nothing gives the same
//! bits. Otherwise the text is tokenised again ([`PerplexityTokens`]).

use std::fmt;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use crate::engine::logprob;
use crate::engine::schedule::{self, Written};
use crate::engine::{Model, Session, SessionOptions, Token};
use crate::error::{Error, Result};

use super::generate::{Generation, prompts_per_unit};

/// The tokens that a perplexity is measured on. Only perplexities of one kind are comparable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PerplexityTokens {
    /// The sampled tokens, known by their ids.
    Sampled,
    /// The text, tokenised again by the base model.
    Retokenised,
    /// Log-probs that came without token ids: in a run of an older version, or from another tool.
    WithoutIds,
}

impl PerplexityTokens {
    /// The tokens in words.
    pub fn in_words(self) -> &'static str {
        match self {
            PerplexityTokens::Sampled => "the sampled tokens",
            PerplexityTokens::Retokenised => "the text tokenised again",
            PerplexityTokens::WithoutIds => "log-probs without token ids, as in runs of older versions",
        }
    }
}

impl fmt::Display for PerplexityTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PerplexityTokens::Sampled => "sampled",
            PerplexityTokens::Retokenised => "retokenised",
            PerplexityTokens::WithoutIds => "without_ids",
        })
    }
}

/// The log-prob of a continuation given its prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct BaseLogprob {
    /// Sum of the tokens' natural log-probs.
    pub base_logprob: Option<f64>,
    /// Number of tokens in the sum.
    pub base_n_tokens: Option<u32>,
    /// Which tokens they are; `None` if that is not known, as in rows of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity_tokens: Option<PerplexityTokens>,
}

impl BaseLogprob {
    /// The log-prob under the model that wrote the continuation.
    pub fn of_generation(generation: &Generation) -> BaseLogprob {
        let is_sampled = generation.logprob.is_some() && generation.token_ids.is_some();
        BaseLogprob {
            base_logprob: generation.logprob,
            base_n_tokens: generation.n_tokens,
            perplexity_tokens: is_sampled.then_some(PerplexityTokens::Sampled),
        }
    }
}

/// A model that measures the log-probs of texts, including those of other models.
#[derive(Debug)]
pub struct BaseModel {
    session: Session,
    tokens: PerplexityTokens,
    /// Prompts in a unit when sampled tokens are decoded again.
    prompts_per_unit: usize,
}

/// Continuations measured at a time if the text is tokenised again.
const TEXT_UNIT: usize = 500;

/// The base model's tokens of a prompt with its continuation.
struct Split {
    /// The common prefix of the prompt's tokens and the whole text's tokens.
    prompt: Vec<Token>,
    /// The rest of the whole text's tokens.
    continuation: Vec<Token>,
}

impl BaseModel {
    /// Opens a session with room for the longest of `generations`.
    ///
    /// `tokens` comes from [`tokens_of`]. `n_predict` is the most tokens that a continuation could have when it was
    /// sampled, or 0 if that is not known. It determines the shape of the batches.
    pub fn open(
        model: &Model,
        generations: &[Generation],
        tokens: PerplexityTokens,
        n_predict: usize,
        options: &SessionOptions,
    ) -> Result<BaseModel> {
        let mut longest = 0;
        let mut k = 0;
        if tokens == PerplexityTokens::Sampled {
            let mut most_tokens = n_predict;
            for of_prompt in by_prompt(generations) {
                longest = longest.max(model.tokenize_prompt(&of_prompt[0].prompt)?.len());
                let n_tokens = of_prompt.iter().filter_map(|g| Some(g.token_ids.as_ref()?.len())).max();
                most_tokens = most_tokens.max(n_tokens.unwrap_or(0));
                k = k.max(of_prompt.len());
            }
            longest += most_tokens;
        } else {
            for generation in generations {
                let split = split(model, generation)?;
                longest = longest.max(split.prompt.len() + split.continuation.len());
            }
        }
        let session = Session::open(model, options, longest)?;
        let prompts_per_unit = prompts_per_unit(session.n_parallel(), k);
        Ok(BaseModel { session, tokens, prompts_per_unit })
    }

    /// Number of continuations in each unit of `generations`: those that are measured together.
    pub fn units(&self, generations: &[Generation]) -> Vec<usize> {
        if self.tokens == PerplexityTokens::Retokenised {
            return generations.chunks(TEXT_UNIT).map(<[_]>::len).collect();
        }
        let prompts: Vec<usize> = by_prompt(generations).map(<[_]>::len).collect();
        prompts.chunks(self.prompts_per_unit).map(|unit| unit.iter().sum()).collect()
    }

    /// One value for each of `generations`, which are one of the [`BaseModel::units`].
    pub fn logprobs(
        &mut self,
        generations: &[Generation],
        interrupt: &AtomicBool,
    ) -> Result<Vec<BaseLogprob>> {
        match self.tokens {
            PerplexityTokens::Sampled => self.of_sampled(generations, interrupt),
            _ => self.of_texts(generations, interrupt),
        }
    }

    /// Decodes the sampled tokens again.
    fn of_sampled(&mut self, generations: &[Generation], interrupt: &AtomicBool) -> Result<Vec<BaseLogprob>> {
        let mut requests = Vec::new();
        let mut written: Vec<Vec<Written<'_>>> = Vec::new();
        let mut first_row = Vec::new();
        let mut n_rows = 0;
        for of_prompt in by_prompt(generations) {
            let Generation { prompt, prompt_id, .. } = &of_prompt[0];
            let tokens = self.session.model().tokenize_prompt(prompt)?;
            requests.push(schedule::Request { id: prompt_id.clone(), tokens });
            let without_ids = || Error::setting("--perplexity", "expected the ids of all sampled tokens");
            written
                .push(of_prompt.iter().map(|g| g.written().ok_or_else(without_ids)).collect::<Result<_>>()?);
            first_row.push(n_rows);
            n_rows += of_prompt.len();
        }
        let mut found = vec![BaseLogprob::default(); n_rows];
        schedule::replay(&mut self.session, &requests, &written, interrupt, |c| {
            found[first_row[c.request] + c.sample as usize] = BaseLogprob {
                base_logprob: Some(c.logprob),
                base_n_tokens: Some(c.tokens.len() as u32),
                perplexity_tokens: Some(self.tokens),
            };
            Ok(())
        })?;
        Ok(found)
    }

    /// Tokenises the texts again. An empty continuation has no value.
    ///
    /// The whole text is tokenised. Its tokens after the prompt's own tokens are the continuation. If the
    /// tokenizer merges the end of the prompt with the continuation, the merged token counts as continuation.
    fn of_texts(&mut self, generations: &[Generation], interrupt: &AtomicBool) -> Result<Vec<BaseLogprob>> {
        let mut requests: Vec<logprob::Request> = Vec::new();
        for generation in generations {
            let Split { prompt, continuation } = split(self.session.model(), generation)?;
            match requests.last_mut() {
                // Neighbouring continuations of one prompt share its KV.
                Some(last) if last.prompt == prompt => last.continuations.push(continuation),
                _ => requests.push(logprob::Request {
                    id: generation.prompt_id.clone(),
                    prompt,
                    continuations: vec![continuation],
                }),
            }
        }
        let found = logprob::score(&mut self.session, &requests, interrupt)?;
        let of_one = |of_tokens: Vec<f64>| match of_tokens.len() {
            0 => BaseLogprob::default(),
            n => BaseLogprob {
                base_logprob: Some(of_tokens.iter().sum()),
                base_n_tokens: Some(n as u32),
                perplexity_tokens: Some(self.tokens),
            },
        };
        Ok(found.into_iter().flatten().map(of_one).collect())
    }
}

/// The tokens that `model` measures: the sampled ones if it can, or those of `wanted`.
///
/// # Errors
/// [`Error::Setting`] if the sampled tokens are wanted and cannot be measured.
pub fn tokens_of(
    wanted: Option<PerplexityTokens>,
    model: &Model,
    generations: &[Generation],
) -> Result<PerplexityTokens> {
    if wanted == Some(PerplexityTokens::Retokenised) {
        return Ok(PerplexityTokens::Retokenised);
    }
    match generations.iter().find_map(|generation| obstacle(model, generation)) {
        None => Ok(PerplexityTokens::Sampled),
        Some(reason) if wanted.is_some() => Err(Error::setting("--perplexity sampled", reason)
            .with_hint("--perplexity retokenised measures the text, tokenised again")),
        Some(reason) => {
            tracing::info!("perplexity is measured on the text, tokenised again: {reason}");
            Ok(PerplexityTokens::Retokenised)
        }
    }
}

/// Why `model` cannot measure the tokens of a continuation by their ids.
fn obstacle(model: &Model, generation: &Generation) -> Option<String> {
    let of_row =
        |what: &str| format!("{what} in sample {} of prompt {:?}", generation.sample, generation.prompt_id);
    let Some(ids) = &generation.token_ids else { return Some(of_row("expected token ids, found none")) };
    let hash = model.vocabulary().hash();
    let n_vocab = model.n_vocab();
    if generation.vocabulary.as_deref() != Some(hash) {
        let found = generation.vocabulary.as_deref().unwrap_or("none");
        return Some(of_row(&format!(
            "expected token ids of the base model's vocabulary {hash}, found {found}"
        )));
    }
    if let Some(id) = ids.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= n_vocab)) {
        return Some(of_row(&format!("expected token ids below {n_vocab}, found {id}")));
    }
    // An edited text no longer belongs to its ids.
    (model.detokenize(ids) != generation.generated_text)
        .then(|| of_row("expected token ids that spell the text, found others"))
}

/// Neighbouring continuations of the same prompt.
fn by_prompt(generations: &[Generation]) -> impl Iterator<Item = &[Generation]> {
    generations
        .chunk_by(|a, b| (&a.language, &a.prompt_id, &a.prompt) == (&b.language, &b.prompt_id, &b.prompt))
}

fn split(model: &Model, generation: &Generation) -> Result<Split> {
    let alone = model.tokenize_prompt(&generation.prompt)?;
    let mut whole = model.tokenize_prompt(&format!("{}{}", generation.prompt, generation.generated_text))?;
    let mut n_common = alone.iter().zip(&whole).take_while(|(a, b)| a == b).count();
    // Something must predict the first token. An empty prompt without BOS gives that token away.
    n_common = n_common.max(usize::from(!whole.is_empty()));
    let continuation = whole.split_off(n_common);
    Ok(Split { prompt: whole, continuation })
}
