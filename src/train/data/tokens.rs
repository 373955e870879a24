//! Preference pairs as the tokens that training reads.
//!
//! The steps are those of TRL 0.8.6 (`DPOTrainer.tokenize_row`), with which the paper trains. Lengths are in tokens:
//!
//! 1. Tokenise the prompt alone, and the prompt followed by each answer. An answer's tokens are those after the
//!    prompt's. If a token spans the boundary, the prompt ends before it.
//! 2. Prepend BOS to the prompt, append EOS to each answer.
//! 3. If the prompt and the longer answer together exceed [`Limits::max_length`], keep the last
//!    [`Limits::max_prompt`] tokens of the prompt. If they still do, truncate both answers to
//!    `max_length - max_prompt` tokens, even if a shorter prompt leaves room for more.
//!
//! # Differences from TRL
//! - BOS is added only if the model's metadata ask for it, so that training and generation see the same tokens. TRL
//!   always adds the tokenizer's BOS.
//! - Both answers share one prompt. If a token spans the boundary in only one of them, it belongs to both answers.
//!   In TRL the two prompts then differ by that token.
//! - A merge may reach back more than one token. TRL refuses that, or moves the boundary by one.
//! - A truncated prompt keeps its BOS, as the first of its `max_prompt` tokens. TRL cuts it off.
//!
//! # Skipped pairs
//! Skipped pairs are counted by reason ([`Skip`]). Truncated pairs are counted too.

use std::collections::HashMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::engine::random::random_stream;
use crate::engine::random::shuffle;
use crate::engine::{Token, Vocabulary};
use crate::error::{Error, Result};

use crate::train::data::preference_pair::PreferencePair;
pub use crate::train::recipe::limits::Limits;

/// A preference pair as tokens; neither list is empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TokenPair {
    /// Its position among all pairs read, from 0.
    pub index: usize,
    /// Starts with BOS if the model's metadata ask for it.
    pub prompt: Vec<Token>,
    /// The chosen answer. Ends with EOS unless truncated or [`Limits::append_eos`] is off.
    pub chosen: Vec<Token>,
    /// The rejected answer, likewise.
    pub rejected: Vec<Token>,
}

/// Why a pair is skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Skip {
    /// The chosen or the rejected answer has no tokens.
    EmptyAnswer,
    /// Both answers have the same tokens, perhaps only after truncation.
    EqualAnswers,
    /// Truncation leaves no room for an answer.
    AllPrompt,
    /// No token precedes the answers, so nothing could predict their first token: the prompt is empty or merges with
    /// an answer, and the model adds no BOS.
    NoPrompt,
}

impl Skip {
    /// Every reason, in the order of the checks.
    pub const ALL: [Skip; 4] = [Skip::EmptyAnswer, Skip::NoPrompt, Skip::AllPrompt, Skip::EqualAnswers];

    /// The reason in words, for reports.
    pub fn reason(self) -> &'static str {
        match self {
            Skip::EmptyAnswer => "an empty answer",
            Skip::EqualAnswers => "chosen equal to rejected",
            Skip::AllPrompt => "no answer left after truncation",
            Skip::NoPrompt => "an empty prompt, and no BOS",
        }
    }

    /// What to change so that such pairs can be used.
    pub fn hint(self) -> &'static str {
        match self {
            Skip::EmptyAnswer => "give both answers at least one token after the prompt",
            Skip::EqualAnswers => {
                "give two different answers; if they differ only after a common start, raise --max-length"
            }
            Skip::AllPrompt => "raise --max-length above --max-prompt, or lower --max-prompt",
            Skip::NoPrompt => "give each pair a prompt, because this model adds no BOS before it",
        }
    }
}

/// The number of skipped pairs by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// [`Skip::EmptyAnswer`]
    pub empty_answer: usize,
    /// [`Skip::EqualAnswers`]
    pub equal_answers: usize,
    /// [`Skip::AllPrompt`]
    pub all_prompt: usize,
    /// [`Skip::NoPrompt`]
    pub no_prompt: usize,
}

impl Skipped {
    fn of(&mut self, reason: Skip) -> &mut usize {
        match reason {
            Skip::EmptyAnswer => &mut self.empty_answer,
            Skip::EqualAnswers => &mut self.equal_answers,
            Skip::AllPrompt => &mut self.all_prompt,
            Skip::NoPrompt => &mut self.no_prompt,
        }
    }

    /// The reasons that occurred, with their counts.
    pub fn reasons(&self) -> Vec<(Skip, usize)> {
        let mut copy = *self;
        Skip::ALL.into_iter().map(|reason| (reason, *copy.of(reason))).filter(|&(_, n)| n > 0).collect()
    }

    /// The number of skipped pairs.
    pub fn total(&self) -> usize {
        self.empty_answer + self.equal_answers + self.all_prompt + self.no_prompt
    }
}

impl std::fmt::Display for Skipped {
    /// Lists the reasons: `2 x an empty answer, 1 x chosen equal to rejected`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reasons: Vec<String> =
            self.reasons().into_iter().map(|(reason, n)| format!("{n} x {}", reason.reason())).collect();
        f.write_str(&reasons.join(", "))
    }
}

/// The result of [`tokenize`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized {
    /// The usable pairs in order, each with its index in the input.
    pub pairs: Vec<(usize, TokenPair)>,
    /// The skipped pairs.
    pub skipped: Skipped,
    /// How many of `pairs` were truncated.
    pub n_cut: usize,
}

/// Tokenises pairs by the [module's steps](self).
///
/// # Errors
/// [`Error::Setting`] for limits of 0; [`Error::Model`] for a text that the tokenizer refuses, or if
/// [`Limits::append_eos`] is on and the model has no EOS.
pub fn tokenize(vocabulary: &Vocabulary, pairs: &[PreferencePair], limits: &Limits) -> Result<Tokenized> {
    limits.validate()?;
    let eos = match (limits.append_eos, vocabulary.eos()) {
        (false, _) => None,
        (true, Some(eos)) => Some(eos),
        (true, None) => {
            return Err(Error::model(
                vocabulary.path(),
                "expected an EOS token (tokenizer.ggml.eos_token_id) to append to answers, found none",
            )
            .with_hint("train without it: --no-eos"));
        }
    };
    vocabulary.check_nfc(pairs.iter().flat_map(|p| [p.prompt.as_str(), &p.chosen, &p.rejected]));
    let found: Vec<Result<Truncated, Skip>> = pairs
        .par_iter()
        .enumerate()
        .map(|(index, pair)| {
            Ok(split_answers(vocabulary, index, pair)?
                .and_then(|pair| truncate(pair, vocabulary.bos(), eos, limits)))
        })
        .collect::<Result<_>>()?;
    let mut tokenized = Tokenized { pairs: Vec::new(), skipped: Skipped::default(), n_cut: 0 };
    for (index, found) in found.into_iter().enumerate() {
        match found {
            Ok(Truncated { pair, is_truncated }) => {
                tokenized.n_cut += usize::from(is_truncated);
                tokenized.pairs.push((index, pair));
            }
            Err(reason) => *tokenized.skipped.of(reason) += 1,
        }
    }
    Ok(tokenized)
}

/// Step 1 of the [module's steps](self), and BOS.
fn split_answers(
    vocabulary: &Vocabulary,
    index: usize,
    pair: &PreferencePair,
) -> Result<Result<TokenPair, Skip>> {
    let mut prompt = vocabulary.tokenize_prompt(&pair.prompt)?;
    let whole = |answer: &str| vocabulary.tokenize_prompt(&format!("{}{answer}", pair.prompt));
    let (mut chosen, mut rejected) = (whole(&pair.chosen)?, whole(&pair.rejected)?);
    if chosen == prompt || rejected == prompt {
        return Ok(Err(Skip::EmptyAnswer));
    }
    let n_shared = |whole: &[Token]| prompt.iter().zip(whole).take_while(|(a, b)| a == b).count();
    let n_prompt = n_shared(&chosen).min(n_shared(&rejected));
    if n_prompt == 0 {
        return Ok(Err(Skip::NoPrompt));
    }
    prompt.truncate(n_prompt);
    chosen.drain(..n_prompt);
    rejected.drain(..n_prompt);
    Ok(Ok(TokenPair { index, prompt, chosen, rejected }))
}

/// A pair within the limits, perhaps truncated.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Truncated {
    pair: TokenPair,
    is_truncated: bool,
}

/// Step 3 of the [module's steps](self), and EOS.
fn truncate(
    mut pair: TokenPair,
    bos: Option<Token>,
    eos: Option<Token>,
    limits: &Limits,
) -> Result<Truncated, Skip> {
    for answer in [&mut pair.chosen, &mut pair.rejected] {
        answer.extend(eos);
    }
    let longer = pair.chosen.len().max(pair.rejected.len());
    let n_prompt = pair.prompt.len();
    if n_prompt + longer > limits.max_length && n_prompt > limits.max_prompt {
        let n_bos = usize::from(pair.prompt.first().copied() == bos);
        pair.prompt.drain(n_bos..n_prompt - limits.max_prompt + n_bos);
    }
    if pair.prompt.len() + longer > limits.max_length {
        let n_left = limits.max_length.saturating_sub(limits.max_prompt);
        if n_left == 0 {
            return Err(Skip::AllPrompt);
        }
        pair.chosen.truncate(n_left);
        pair.rejected.truncate(n_left);
    }
    if pair.chosen == pair.rejected {
        return Err(Skip::EqualAnswers);
    }
    let is_truncated = pair.prompt.len() < n_prompt || pair.chosen.len().max(pair.rejected.len()) < longer;
    Ok(Truncated { pair, is_truncated })
}

/// Splits pairs into a training and a held-out set: the indices of each, in ascending order.
///
/// `fraction` of the pairs is held out, rounded up as in scikit-learn's `train_test_split`, which the paper uses. All
/// pairs of a prompt stay together, so that the held-out loss measures prompts never trained on. This can exceed the
/// fraction, but a prompt that would more than double it stays in the training set if a smaller prompt exists. At
/// least one prompt is trained on. The order of the prompts is a Fisher-Yates shuffle from a ChaCha8 stream that
/// depends on `seed` alone.
///
/// # Panics
/// If `fraction` is not in [0, 1].
pub fn split(pairs: &[TokenPair], fraction: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    assert!((0.0..=1.0).contains(&fraction), "expected a fraction in [0, 1], found {fraction}");
    let mut of_prompt: HashMap<&[Token], usize> = HashMap::new();
    let mut prompts: Vec<Vec<usize>> = Vec::new();
    for (i, pair) in pairs.iter().enumerate() {
        let prompt = *of_prompt.entry(&pair.prompt).or_insert(prompts.len());
        if prompt == prompts.len() {
            prompts.push(Vec::new());
        }
        prompts[prompt].push(i);
    }
    shuffle(&mut prompts, &mut random_stream(seed, "preference pairs: held out", 0));
    let n_held_out = (pairs.len() as f64 * fraction).ceil() as usize;
    let most = prompts.iter().map(Vec::len).min().unwrap_or(0).max(2 * n_held_out);
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    let mut n_left = prompts.len();
    for of_prompt in prompts {
        let fits = held_out.len() < n_held_out && held_out.len() + of_prompt.len() <= most;
        if fits && n_left > 1 {
            held_out.extend(of_prompt);
            n_left -= 1;
        } else {
            train.extend(of_prompt);
        }
    }
    train.sort_unstable();
    held_out.sort_unstable();
    (train, held_out)
}

/// The order of `n` pairs in an epoch; epochs count from 0.
///
/// A Fisher-Yates shuffle from a ChaCha8 stream that depends on `seed` and `epoch` alone, so that a run resumed in the
/// middle of an epoch knows which pairs are left.
pub fn epoch_order(n: usize, seed: u64, epoch: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    shuffle(&mut order, &mut random_stream(seed, "preference pairs: epoch", epoch));
    order
}

#[cfg(test)]
mod tests;
