//! Which samples of one prompt make a pair: rules over numbers.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use crate::engine::schedule::Finish;
use crate::error::{Error, Result};

/// What a pair must satisfy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rules {
    /// Most pairs of one prompt.
    pub per_prompt: usize,
    /// Least difference in toxicity, rejected less chosen, in [0, 1].
    pub min_margin: f64,
    /// A chosen continuation is less toxic than this, in [0, 1].
    pub chosen_below: f64,
    /// A rejected continuation is at least this toxic, in [0, 1].
    pub rejected_above: f64,
    /// Fewest tokens of a continuation.
    pub min_tokens: u32,
    /// Most tokens of the longer continuation for each of the shorter, at least 1.
    pub max_length_ratio: f64,
    /// Least mean natural log-prob of a continuation's tokens under the unsteered model.
    pub min_logprob: f64,
    /// Most difference between the two of that mean, in nats a token.
    pub max_logprob_gap: f64,
    /// Most repetition (share of 2-grams that repeat an earlier one), in [0, 1].
    pub max_repetition: f64,
}

impl Default for Rules {
    fn default() -> Self {
        Rules::DEFAULT
    }
}

impl Rules {
    /// What `pairs` takes unless told otherwise.
    pub const DEFAULT: Rules = Rules {
        per_prompt: 4,
        min_margin: 0.3,
        chosen_below: 0.2,
        rejected_above: 0.5,
        min_tokens: 5,
        max_length_ratio: 1.5,
        min_logprob: -5.0,
        max_logprob_gap: 1.0,
        max_repetition: 0.25,
    };

    /// Errors: [`Error::Setting`] for a value outside its range, and where a continuation could be both
    /// chosen and rejected.
    pub fn validate(&self) -> Result<()> {
        if self.per_prompt == 0 {
            return Err(Error::setting("--per-prompt", "expected a number from 1 up, found 0"));
        }
        for (flag, share) in [
            ("--min-margin", self.min_margin),
            ("--chosen-below", self.chosen_below),
            ("--rejected-above", self.rejected_above),
            ("--max-repetition", self.max_repetition),
        ] {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::setting(flag, format!("expected a number from 0 to 1, found {share}")));
            }
        }
        if self.chosen_below > self.rejected_above {
            return Err(Error::setting(
                "--chosen-below",
                format!(
                    "expected at most --rejected-above ({}), found {}",
                    self.rejected_above, self.chosen_below
                ),
            ));
        }
        let ratio = self.max_length_ratio;
        if !(ratio.is_finite() && ratio >= 1.0) {
            return Err(Error::setting(
                "--max-length-ratio",
                format!("expected a number from 1 up, found {ratio}"),
            ));
        }
        if self.min_logprob.is_nan() || self.min_logprob > 0.0 {
            let reason = format!("expected a number up to 0, found {}", self.min_logprob);
            return Err(Error::setting("--min-logprob", reason));
        }
        if self.max_logprob_gap.is_nan() || self.max_logprob_gap < 0.0 {
            let reason = format!("expected a number from 0 up, found {}", self.max_logprob_gap);
            return Err(Error::setting("--max-logprob-gap", reason));
        }
        Ok(())
    }

    /// Which side of a pair a continuation may be, by its toxicities; `None` between the two.
    pub fn side(&self, toxicity: &[f64]) -> Option<Side> {
        if toxicity.iter().all(|&t| t < self.chosen_below) {
            Some(Side::Chosen)
        } else if toxicity.iter().all(|&t| t >= self.rejected_above) {
            Some(Side::Rejected)
        } else {
            None
        }
    }
}

/// A side of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The one to prefer.
    Chosen,
    /// The one to avoid.
    Rejected,
}

/// Why a sample is in no pair. The first group looks at a sample alone, in this order; the second at toxic
/// ones that found no partner: the rule that took the last of them away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dropped {
    /// Blank, or fewer tokens than [`Rules::min_tokens`].
    Short,
    /// The text of an earlier sample of the same prompt.
    Duplicate,
    /// A scorer that covers the language gave no score.
    Unscored,
    /// Not in the prompt's language.
    OtherLanguage,
    /// Over [`Rules::max_repetition`].
    Repetitive,
    /// Neither clean nor toxic, or not what its set of samples is for.
    Between,
    /// Under [`Rules::min_logprob`].
    Improbable,
    /// The prompt has no clean sample.
    NoCounterpart,
    /// No clean sample is clean enough beside it ([`Rules::min_margin`]).
    Margin,
    /// The clean ones ended in another way: one with an end of text, the other cut off.
    Finish,
    /// The clean ones are too long or too short ([`Rules::max_length_ratio`]).
    Length,
    /// The clean ones are too much more or less fluent ([`Rules::max_logprob_gap`]).
    Fluency,
    /// The clean ones that match are in other pairs.
    Taken,
    /// The prompt has its [`Rules::per_prompt`] pairs.
    Enough,
}

impl Dropped {
    /// Every reason, in order.
    pub const ALL: [Dropped; 14] = [
        Dropped::Short,
        Dropped::Duplicate,
        Dropped::Unscored,
        Dropped::OtherLanguage,
        Dropped::Repetitive,
        Dropped::Between,
        Dropped::Improbable,
        Dropped::NoCounterpart,
        Dropped::Margin,
        Dropped::Finish,
        Dropped::Length,
        Dropped::Fluency,
        Dropped::Taken,
        Dropped::Enough,
    ];

    /// Whether it looks at a sample alone.
    pub fn is_of_sample(self) -> bool {
        self <= Dropped::Improbable
    }

    /// In words, for a report.
    pub fn reason(self) -> &'static str {
        match self {
            Dropped::Short => "blank or too short",
            Dropped::Duplicate => "the same text again",
            Dropped::Unscored => "no score",
            Dropped::OtherLanguage => "another language than the prompt",
            Dropped::Repetitive => "repetitive",
            Dropped::Between => "neither clean nor toxic enough for its side",
            Dropped::Improbable => "too improbable under the unsteered model",
            Dropped::NoCounterpart => "no clean sample of the prompt",
            Dropped::Margin => "margin too small",
            Dropped::Finish => "one ends, the other is cut off",
            Dropped::Length => "lengths too different",
            Dropped::Fluency => "fluency too different",
            Dropped::Taken => "its matches are in other pairs",
            Dropped::Enough => "the prompt has pairs enough",
        }
    }
}

/// What a choice looks at.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// By scorer, in [0, 1]: the same scorers for all candidates of a prompt, at least one.
    pub toxicity: Vec<f64>,
    /// Tokens, at least 1.
    pub n_tokens: u32,
    /// Why it ended.
    pub finish: Finish,
    /// Mean natural log-prob of its tokens under the unsteered model.
    pub logprob: f64,
}

impl Candidate {
    /// The toxicity that all scorers agree on.
    fn least_toxicity(&self) -> f64 {
        self.toxicity.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

/// What came of one prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Matched {
    /// Indices of chosen and rejected, the most toxic first.
    pub pairs: Vec<(usize, usize)>,
    /// Indices of rejected candidates without a partner, and why.
    pub alone: Vec<(usize, Dropped)>,
}

/// Least margin over the scorers.
fn margin(chosen: &Candidate, rejected: &Candidate) -> f64 {
    chosen.toxicity.iter().zip(&rejected.toxicity).map(|(c, r)| r - c).fold(f64::INFINITY, f64::min)
}

/// Tokens of the longer one for each of the shorter.
fn length_ratio(a: &Candidate, b: &Candidate) -> f64 {
    f64::from(a.n_tokens.max(b.n_tokens)) / f64::from(a.n_tokens.min(b.n_tokens))
}

fn logprob_gap(a: &Candidate, b: &Candidate) -> f64 {
    (a.logprob - b.logprob).abs()
}

/// Pairs candidates of one prompt greedily: the most toxic rejected one first, each with the chosen one
/// that is most like it: least sum of log length ratio and log-prob gap, then the least toxic.
///
/// Greedy rather than optimal on purpose: where few fit, the clearest pairs are the ones to keep.
pub fn choose(chosen: &[Candidate], rejected: &[Candidate], rules: &Rules) -> Matched {
    let mut order: Vec<usize> = (0..rejected.len()).collect();
    let by_toxicity = |&a: &usize, &b: &usize| -> Ordering {
        rejected[b].least_toxicity().total_cmp(&rejected[a].least_toxicity()).then(a.cmp(&b))
    };
    order.sort_by(by_toxicity);
    let mut is_taken = vec![false; chosen.len()];
    let mut matched = Matched::default();
    for r in order {
        if matched.pairs.len() == rules.per_prompt {
            matched.alone.push((r, Dropped::Enough));
            continue;
        }
        let toxic = &rejected[r];
        let mut left: Vec<usize> = (0..chosen.len()).collect();
        let mut reason = Dropped::NoCounterpart;
        let mut keep = |why: Dropped, fits: &dyn Fn(usize) -> bool| {
            if !left.is_empty() {
                reason = why;
                left.retain(|&c| fits(c));
            }
        };
        keep(Dropped::Margin, &|c| margin(&chosen[c], toxic) >= rules.min_margin);
        keep(Dropped::Finish, &|c| chosen[c].finish == toxic.finish);
        keep(Dropped::Length, &|c| length_ratio(&chosen[c], toxic) <= rules.max_length_ratio);
        keep(Dropped::Fluency, &|c| logprob_gap(&chosen[c], toxic) <= rules.max_logprob_gap);
        keep(Dropped::Taken, &|c| !is_taken[c]);
        let unlikeness = |c: usize| length_ratio(&chosen[c], toxic).ln() + logprob_gap(&chosen[c], toxic);
        let best = left.into_iter().min_by(|&a, &b| {
            let toxicity = |c: usize| chosen[c].toxicity.iter().copied().fold(0.0, f64::max);
            unlikeness(a).total_cmp(&unlikeness(b)).then(toxicity(a).total_cmp(&toxicity(b))).then(a.cmp(&b))
        });
        match best {
            Some(c) => {
                is_taken[c] = true;
                matched.pairs.push((c, r));
            }
            None => matched.alone.push((r, reason)),
        }
    }
    matched
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(toxicity: f64, n_tokens: u32, logprob: f64) -> Candidate {
        Candidate { toxicity: vec![toxicity], n_tokens, finish: Finish::Length, logprob }
    }

    const ONE: Rules = Rules {
        per_prompt: 10,
        min_margin: 0.3,
        chosen_below: 0.2,
        rejected_above: 0.5,
        min_tokens: 1,
        max_length_ratio: 1.5,
        min_logprob: -5.0,
        max_logprob_gap: 1.0,
        max_repetition: 0.25,
    };

    #[test]
    fn the_most_toxic_goes_first_and_takes_the_one_most_like_it() {
        // Unlikeness to the rejected with 10 tokens at -2: |ln(ratio)| + gap.
        // 0: ln(12/10) = 0.18 + 0.5; 1: 0 + 0.1, the best; 2: 0 + 0.3.
        let chosen = [candidate(0.1, 12, -2.5), candidate(0.1, 10, -2.1), candidate(0.0, 10, -2.3)];
        let rejected = [candidate(0.6, 10, -2.0), candidate(0.9, 10, -2.0)];
        let found = choose(&chosen, &rejected, &ONE);
        assert_eq!(found.pairs, [(1, 1), (2, 0)]);
        assert!(found.alone.is_empty());
    }

    #[test]
    fn between_equals_the_least_toxic_is_chosen_and_then_the_first() {
        let chosen = [candidate(0.1, 10, -2.0), candidate(0.05, 10, -2.0), candidate(0.05, 10, -2.0)];
        assert_eq!(choose(&chosen, &[candidate(0.9, 10, -2.0)], &ONE).pairs, [(1, 0)]);
    }

    /// The reason why the one rejected candidate found no partner.
    fn reason(chosen: &[Candidate], rejected: Candidate, rules: &Rules) -> Dropped {
        let found = choose(chosen, &[rejected], rules);
        assert!(found.pairs.is_empty());
        assert_eq!(found.alone.len(), 1);
        found.alone[0].1
    }

    #[test]
    fn rejects_pairs_by_the_rule_that_took_the_last_partner_away() {
        let toxic = || candidate(0.6, 10, -2.0);
        assert_eq!(reason(&[], toxic(), &ONE), Dropped::NoCounterpart);
        assert_eq!(reason(&[candidate(0.35, 10, -2.0)], toxic(), &ONE), Dropped::Margin);
        let ended = Candidate { finish: Finish::Stop, ..candidate(0.1, 10, -2.0) };
        assert_eq!(reason(&[ended], toxic(), &ONE), Dropped::Finish);
        assert_eq!(reason(&[candidate(0.1, 16, -2.0)], toxic(), &ONE), Dropped::Length);
        assert_eq!(reason(&[candidate(0.1, 6, -2.0)], toxic(), &ONE), Dropped::Length);
        assert_eq!(reason(&[candidate(0.1, 10, -3.25)], toxic(), &ONE), Dropped::Fluency);
        // One fails by length, the other later, by fluency.
        let two = [candidate(0.1, 16, -2.0), candidate(0.1, 10, -3.25)];
        assert_eq!(reason(&two, toxic(), &ONE), Dropped::Fluency);
    }

    #[test]
    fn what_lies_on_a_bound_is_within_it() {
        // Exact in binary: 0.625 - 0.125 = 0.5; 15 / 10 = 1.5; -2 - -3 = 1.
        let rules = Rules { min_margin: 0.5, ..ONE };
        let found = choose(&[candidate(0.125, 15, -3.0)], &[candidate(0.625, 10, -2.0)], &rules);
        assert_eq!(found.pairs, [(0, 0)]);
    }

    #[test]
    fn no_sample_is_in_two_pairs_and_a_prompt_has_at_most_its_number() {
        let chosen = [candidate(0.1, 10, -2.0)];
        let rejected = [candidate(0.9, 10, -2.0), candidate(0.8, 10, -2.0)];
        let found = choose(&chosen, &rejected, &ONE);
        assert_eq!((found.pairs, found.alone), (vec![(0, 0)], vec![(1, Dropped::Taken)]));
        let chosen = [chosen[0].clone(), chosen[0].clone()];
        let found = choose(&chosen, &rejected, &Rules { per_prompt: 1, ..ONE });
        assert_eq!((found.pairs, found.alone), (vec![(0, 0)], vec![(1, Dropped::Enough)]));
    }

    #[test]
    fn several_scorers_must_agree() {
        let with = |a: f64, b: f64| Candidate { toxicity: vec![a, b], ..candidate(0.0, 10, -2.0) };
        assert_eq!(ONE.side(&[0.1, 0.1]), Some(Side::Chosen));
        assert_eq!(ONE.side(&[0.1, 0.2]), None);
        assert_eq!(ONE.side(&[0.5, 0.9]), Some(Side::Rejected));
        assert_eq!(ONE.side(&[0.4, 0.9]), None);
        // Margins 0.8 and 0.2.
        assert_eq!(reason(&[with(0.1, 0.3)], with(0.9, 0.5), &ONE), Dropped::Margin);
        // The second is more toxic by what both say: 0.6 over 0.5.
        let found = choose(&[with(0.0, 0.0)], &[with(1.0, 0.5), with(0.6, 0.6)], &ONE);
        assert_eq!(found.pairs, [(0, 1)]);
    }

    #[test]
    fn rejects_rules_outside_their_ranges() {
        assert!(Rules::default().validate().is_ok());
        let d = Rules::default();
        for (rules, flag) in [
            (Rules { per_prompt: 0, ..d }, "--per-prompt"),
            (Rules { min_margin: 1.5, ..d }, "--min-margin"),
            (Rules { min_margin: f64::NAN, ..d }, "--min-margin"),
            (Rules { chosen_below: -0.1, ..d }, "--chosen-below"),
            (Rules { chosen_below: 0.6, ..d }, "--chosen-below"),
            (Rules { rejected_above: 2.0, ..d }, "--rejected-above"),
            (Rules { max_repetition: -1.0, ..d }, "--max-repetition"),
            (Rules { max_length_ratio: 0.9, ..d }, "--max-length-ratio"),
            (Rules { max_length_ratio: f64::NAN, ..d }, "--max-length-ratio"),
            (Rules { min_logprob: 1.0, ..d }, "--min-logprob"),
            (Rules { min_logprob: f64::NAN, ..d }, "--min-logprob"),
            (Rules { max_logprob_gap: -1.0, ..d }, "--max-logprob-gap"),
            (Rules { max_logprob_gap: f64::NAN, ..d }, "--max-logprob-gap"),
        ] {
            let error = rules.validate().unwrap_err();
            assert!(error.is_usage() && error.to_string().starts_with(flag), "{flag}: {error}");
        }
    }
}
