//! Preference pairs as the tokens that training sees.
//!
//! The recipe is that of TRL 0.8.6 (`DPOTrainer.tokenize_row`), which the paper trains with; lengths are
//! counted in tokens:
//!
//! 1. The prompt, and the prompt with each answer behind it, are tokenised. An answer's tokens are those of
//!    the whole beyond the prompt's. Where a token reaches across the boundary, the prompt ends before it.
//! 2. BOS goes in front, and EOS behind each answer.
//! 3. Where the prompt and the longer answer together exceed [`Limits::max_length`], the prompt keeps its
//!    last [`Limits::max_prompt`] tokens; if they still do, both answers are cut to
//!    `max_length - max_prompt`, even where a shorter prompt would leave them more room.
//!
//! # Where it differs from TRL
//! - BOS is there only if the model's metadata asks for it, so that training sees what generation sees. TRL
//!   puts the tokenizer's BOS there always.
//! - Both answers share one prompt. Where a token crosses the boundary in one of them only, TRL lets the
//!   two prompts differ by that token; here it counts to both answers.
//! - A merge may reach back more than one token. TRL refuses that, or moves the boundary by one.
//! - A prompt that is cut keeps its BOS, as the first of its `max_prompt` tokens. TRL cuts it off.
//!
//! # What is skipped
//! Every pair that is left out is counted by its reason ([`Skip`]), and so is every pair that was cut.

use std::collections::HashMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::engine::random::shuffle;
use crate::engine::sample::random_stream;
use crate::engine::{Token, Vocabulary};
use crate::error::{Error, Result};

use crate::train::data::preference_pair::PreferencePair;
pub use crate::train::recipe::limits::Limits;

/// A preference pair as tokens; neither list is empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TokenPair {
    /// With BOS where the model wants one.
    pub prompt: Vec<Token>,
    /// What follows the prompt, with EOS unless it was cut off or not asked for.
    pub chosen: Vec<Token>,
    /// The same.
    pub rejected: Vec<Token>,
}

/// Why a pair is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Skip {
    /// Chosen or rejected has no text, or none that the tokenizer sees.
    EmptyAnswer,
    /// Chosen and rejected are the same tokens, perhaps only after they were cut: nothing to prefer.
    EqualAnswers,
    /// After it was cut, nothing of an answer is left behind the prompt.
    AllPrompt,
    /// No token stands before the answers, so that their first has nothing to be predicted from: the prompt
    /// is empty, or merges with the answer, and the model adds no BOS.
    NoPrompt,
}

impl Skip {
    /// Every reason, in the order of the checks.
    pub const ALL: [Skip; 4] = [Skip::EmptyAnswer, Skip::NoPrompt, Skip::AllPrompt, Skip::EqualAnswers];

    /// In words, for a report.
    pub fn reason(self) -> &'static str {
        match self {
            Skip::EmptyAnswer => "an empty answer",
            Skip::EqualAnswers => "chosen equal to rejected",
            Skip::AllPrompt => "all prompt after it was cut",
            Skip::NoPrompt => "an empty prompt, and no BOS",
        }
    }
}

/// Pairs left out, by reason.
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

    /// Reasons that occurred, with their counts.
    pub fn reasons(&self) -> Vec<(Skip, usize)> {
        let mut copy = *self;
        Skip::ALL.into_iter().map(|reason| (reason, *copy.of(reason))).filter(|&(_, n)| n > 0).collect()
    }

    /// Pairs left out.
    pub fn total(&self) -> usize {
        self.empty_answer + self.equal_answers + self.all_prompt + self.no_prompt
    }
}

impl std::fmt::Display for Skipped {
    /// `3 of 40 left out` is for the caller to say; this is the list of reasons: `2 x …, 1 x …`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reasons: Vec<String> =
            self.reasons().into_iter().map(|(reason, n)| format!("{n} x {}", reason.reason())).collect();
        f.write_str(&reasons.join(", "))
    }
}

/// What came of a list of pairs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized {
    /// Each pair that is left, with its index in the list, in order.
    pub pairs: Vec<(usize, TokenPair)>,
    /// The others.
    pub skipped: Skipped,
    /// How many of `pairs` lost tokens of the prompt or of an answer to the limits.
    pub n_cut: usize,
}

/// Tokenises pairs by the [module's recipe](self).
///
/// # Errors
/// [`Error::Setting`] for limits of 0; [`Error::Model`] where EOS is asked for and the model has none, and
/// for a text that the tokenizer cannot take.
pub fn tokenize(vocabulary: &Vocabulary, pairs: &[PreferencePair], limits: &Limits) -> Result<Tokenized> {
    limits.validate()?;
    let eos = match (limits.append_eos, vocabulary.eos()) {
        (false, _) => None,
        (true, Some(eos)) => Some(eos),
        (true, None) => {
            return Err(Error::model(
                vocabulary.path(),
                "expected an EOS token (tokenizer.ggml.eos_token_id) to end answers with, found none",
            )
            .with_hint("train without it: --no-eos"));
        }
    };
    let found: Vec<Result<Cut, Skip>> = pairs
        .par_iter()
        .map(|pair| {
            Ok(split_answers(vocabulary, pair)?.and_then(|pair| cut(pair, vocabulary.bos(), eos, limits)))
        })
        .collect::<Result<_>>()?;
    let mut tokenized = Tokenized { pairs: Vec::new(), skipped: Skipped::default(), n_cut: 0 };
    for (index, found) in found.into_iter().enumerate() {
        match found {
            Ok(Cut { pair, is_cut }) => {
                tokenized.n_cut += usize::from(is_cut);
                tokenized.pairs.push((index, pair));
            }
            Err(reason) => *tokenized.skipped.of(reason) += 1,
        }
    }
    Ok(tokenized)
}

/// Step 1 of the [recipe](self), and BOS.
fn split_answers(vocabulary: &Vocabulary, pair: &PreferencePair) -> Result<Result<TokenPair, Skip>> {
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
    Ok(Ok(TokenPair { prompt, chosen, rejected }))
}

/// A pair within the limits.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Cut {
    pair: TokenPair,
    is_cut: bool,
}

/// Steps 2 and 3 of the [recipe](self).
fn cut(mut pair: TokenPair, bos: Option<Token>, eos: Option<Token>, limits: &Limits) -> Result<Cut, Skip> {
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
    let is_cut = pair.prompt.len() < n_prompt || pair.chosen.len().max(pair.rejected.len()) < longer;
    Ok(Cut { pair, is_cut })
}

/// Indices of pairs to train on and to hold out, each in ascending order.
///
/// `fraction` of the pairs, rounded up (as scikit-learn's `train_test_split`, which the paper uses), is
/// held out, and with a pair every other pair of its prompt: what is held out is to tell of prompts that were
/// never seen. A prompt that would make it more than twice the share is left to train on while there are
/// smaller ones, and one prompt at least is. Prompts are taken from an order drawn by Fisher-Yates from
/// a ChaCha8 stream that `seed` alone decides.
///
/// # Panics
/// Unless `fraction` is in [0, 1].
pub fn split(pairs: &[TokenPair], fraction: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    assert!((0.0..=1.0).contains(&fraction), "a fraction in [0, 1], found {fraction}");
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

/// The order of `n` pairs in epoch `epoch`, from 0.
///
/// Drawn by Fisher-Yates from a ChaCha8 stream that `seed` and `epoch` alone decide, so that a run that
/// is resumed in the middle of an epoch knows what is left of it.
pub fn epoch_order(n: usize, seed: u64, epoch: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    shuffle(&mut order, &mut random_stream(seed, "preference pairs: epoch", epoch));
    order
}

#[cfg(test)]
mod tests;
