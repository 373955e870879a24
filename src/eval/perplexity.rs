//! Log-probs of continuations under a base model, for conditional perplexity.

use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use crate::engine::logprob::{self, Request};
use crate::engine::{Model, Session, SessionOptions, Token};
use crate::error::Result;

use super::generate::Generation;

/// The log-prob of a continuation given its prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct BaseLogprob {
    /// Sum of the tokens' natural log-probs.
    pub base_logprob: Option<f64>,
    /// Number of tokens in the sum.
    pub base_n_tokens: Option<u32>,
}

impl BaseLogprob {
    /// The log-prob under the model that wrote the continuation.
    pub fn of_generation(generation: &Generation) -> BaseLogprob {
        BaseLogprob { base_logprob: generation.logprob, base_n_tokens: generation.n_tokens }
    }
}

/// A model that measures the log-probs of texts, including those of other models.
#[derive(Debug)]
pub struct BaseModel {
    session: Session,
}

/// The base model's tokens of a prompt with its continuation.
struct Split {
    /// The common prefix of the prompt's tokens and the whole text's tokens.
    prompt: Vec<Token>,
    /// The rest of the whole text's tokens.
    continuation: Vec<Token>,
}

impl BaseModel {
    /// Opens a session with room for the longest of `generations`.
    pub fn open(model: &Model, generations: &[Generation], options: &SessionOptions) -> Result<BaseModel> {
        let mut longest = 0;
        for generation in generations {
            let split = split(model, generation)?;
            longest = longest.max(split.prompt.len() + split.continuation.len());
        }
        Ok(BaseModel { session: Session::open(model, options, longest)? })
    }

    /// One value for each of `generations`; an empty one for an empty continuation.
    ///
    /// The whole text is tokenised. Its tokens after the prompt's own tokens are the continuation. If the
    /// tokenizer merges the end of the prompt with the continuation, the merged token counts as continuation.
    pub fn logprobs(
        &mut self,
        generations: &[Generation],
        interrupt: &AtomicBool,
    ) -> Result<Vec<BaseLogprob>> {
        let mut requests: Vec<Request> = Vec::new();
        for generation in generations {
            let Split { prompt, continuation } = split(self.session.model(), generation)?;
            match requests.last_mut() {
                // Neighbouring continuations of one prompt share its KV.
                Some(last) if last.prompt == prompt => last.continuations.push(continuation),
                _ => requests.push(Request {
                    id: generation.prompt_id.clone(),
                    prompt,
                    continuations: vec![continuation],
                }),
            }
        }
        let found = logprob::score(&mut self.session, &requests, interrupt)?;
        Ok(found
            .into_iter()
            .flatten()
            .map(|of_tokens| match of_tokens.len() {
                0 => BaseLogprob::default(),
                n => {
                    BaseLogprob { base_logprob: Some(of_tokens.iter().sum()), base_n_tokens: Some(n as u32) }
                }
            })
            .collect())
    }
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
