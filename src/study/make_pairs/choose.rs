//! Chooses which samples of a prompt form pairs, by numeric rules.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use crate::engine::schedule::Finish;
use crate::error::{Error, Result};

/// The requirements for a pair.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rules {
    /// Maximum number of pairs per prompt.
    pub per_prompt: usize,
    /// Minimum difference in toxicity, rejected minus chosen, in [0, 1].
    pub min_margin: f64,
    /// A chosen continuation must be less toxic than this, in [0, 1].
    pub chosen_below: f64,
    /// A rejected continuation must be at least this toxic, in [0, 1].
    pub rejected_above: f64,
    /// Minimum number of tokens in a continuation.
    pub min_tokens: u32,
    /// Maximum ratio of the two lengths in tokens, longer to shorter; at least 1.
    pub max_length_ratio: f64,
    /// Minimum mean natural log-prob per token under the unsteered model.
    pub min_logprob: f64,
    /// Maximum difference between the two mean log-probs, in nats per token.
    pub max_logprob_gap: f64,
    /// Maximum fraction of 2-grams that repeat an earlier one, in [0, 1].
    pub max_repetition: f64,
}

impl Default for Rules {
    fn default() -> Self {
        Rules::DEFAULT
    }
}

impl Rules {
    /// The defaults of the command `pairs`.
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

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Setting`] if a value is out of range, or if a continuation could be both chosen and rejected.
    pub fn validate(&self) -> Result<()> {
        if self.per_prompt == 0 {
            return Err(Error::setting("--per-prompt", "expected at least 1, found 0"));
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
            let (above, below) = (self.rejected_above, self.chosen_below);
            let reason = format!("expected at most --rejected-above ({above}), found {below}");
            return Err(Error::setting("--chosen-below", reason));
        }
        let ratio = self.max_length_ratio;
        if !(ratio.is_finite() && ratio >= 1.0) {
            let reason = format!("expected a finite number of at least 1, found {ratio}");
            return Err(Error::setting("--max-length-ratio", reason));
        }
        if self.min_logprob.is_nan() || self.min_logprob > 0.0 {
            let reason = format!("expected a number of at most 0, found {}", self.min_logprob);
            return Err(Error::setting("--min-logprob", reason));
        }
        if self.max_logprob_gap.is_nan() || self.max_logprob_gap < 0.0 {
            let reason = format!("expected a number of at least 0, found {}", self.max_logprob_gap);
            return Err(Error::setting("--max-logprob-gap", reason));
        }
        Ok(())
    }

    /// The side of a pair that a continuation qualifies for, by its toxicity under each scorer.
    ///
    /// `None` if it is neither clean nor toxic enough, or if the scorers disagree.
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
    /// The preferred continuation.
    Chosen,
    /// The other one.
    Rejected,
}

/// Why a sample is in no pair.
///
/// Reasons up to [`Dropped::Improbable`] apply to a single sample and are checked in this order. The others
/// apply to toxic samples without a partner: the rule that excluded the last possible partner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dropped {
    /// Blank, or fewer tokens than [`Rules::min_tokens`].
    Short,
    /// The same text as an earlier sample of the prompt.
    Duplicate,
    /// A scorer that covers the language gave no score.
    Unscored,
    /// Not in the prompt's language.
    OtherLanguage,
    /// Above [`Rules::max_repetition`].
    Repetitive,
    /// Neither clean nor toxic enough, or not on the side that its pool is for.
    Between,
    /// Below [`Rules::min_logprob`].
    Improbable,
    /// The prompt has no clean sample.
    NoCounterpart,
    /// The difference in toxicity from each clean sample is too small ([`Rules::min_margin`]).
    Margin,
    /// The clean samples finished differently: one by an end-of-generation token, the other by length.
    Finish,
    /// The clean samples are too long or too short ([`Rules::max_length_ratio`]).
    Length,
    /// The log-probs of the clean samples are too different ([`Rules::max_logprob_gap`]).
    Fluency,
    /// All matching clean samples are in other pairs.
    Taken,
    /// The prompt already has [`Rules::per_prompt`] pairs.
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

    /// Whether the reason applies to a single sample, not to pairing.
    pub fn is_of_sample(self) -> bool {
        self <= Dropped::Improbable
    }

    /// The reason in words, for reports.
    pub fn reason(self) -> &'static str {
        match self {
            Dropped::Short => "blank or too short",
            Dropped::Duplicate => "duplicate text",
            Dropped::Unscored => "no score",
            Dropped::OtherLanguage => "not in the prompt's language",
            Dropped::Repetitive => "repetitive",
            Dropped::Between => "neither clean nor toxic enough for its side",
            Dropped::Improbable => "too improbable under the unsteered model",
            Dropped::NoCounterpart => "no clean sample for the prompt",
            Dropped::Margin => "difference in toxicity too small",
            Dropped::Finish => "one ends, the other is cut off",
            Dropped::Length => "lengths too different",
            Dropped::Fluency => "fluency too different",
            Dropped::Taken => "matching samples are in other pairs",
            Dropped::Enough => "the prompt has enough pairs",
        }
    }
}

/// The numbers of a sample that pairing depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Toxicity by scorer, in [0, 1]. All candidates of a prompt have the same scorers, at least one.
    pub toxicity: Vec<f64>,
    /// Number of tokens, at least 1.
    pub n_tokens: u32,
    /// Why generation ended.
    pub finish: Finish,
    /// Mean natural log-prob of its tokens under the unsteered model.
    pub logprob: f64,
}

impl Candidate {
    /// The lowest toxicity over the scorers.
    fn least_toxicity(&self) -> f64 {
        self.toxicity.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

/// The pairs of one prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Matched {
    /// Indices of chosen and rejected candidates, the most toxic rejected one first.
    pub pairs: Vec<(usize, usize)>,
    /// Indices of rejected candidates without a partner, with reasons.
    pub alone: Vec<(usize, Dropped)>,
}

/// The smallest difference in toxicity over the scorers.
fn margin(chosen: &Candidate, rejected: &Candidate) -> f64 {
    chosen.toxicity.iter().zip(&rejected.toxicity).map(|(c, r)| r - c).fold(f64::INFINITY, f64::min)
}

/// Ratio of the lengths in tokens, longer to shorter.
fn length_ratio(a: &Candidate, b: &Candidate) -> f64 {
    f64::from(a.n_tokens.max(b.n_tokens)) / f64::from(a.n_tokens.min(b.n_tokens))
}

fn logprob_gap(a: &Candidate, b: &Candidate) -> f64 {
    (a.logprob - b.logprob).abs()
}

/// Pairs the candidates of one prompt greedily, the most toxic rejected candidate first.
///
/// Each takes the most similar chosen candidate: the smallest sum of log length ratio and log-prob gap. On a
/// tie the least toxic one wins. This is deliberately greedy, not optimal: if few candidates fit, the clearest
/// pairs are kept.
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
        let distance = |c: usize| length_ratio(&chosen[c], toxic).ln() + logprob_gap(&chosen[c], toxic);
        let best = left.into_iter().min_by(|&a, &b| {
            let toxicity = |c: usize| chosen[c].toxicity.iter().copied().fold(0.0, f64::max);
            distance(a).total_cmp(&distance(b)).then(toxicity(a).total_cmp(&toxicity(b))).then(a.cmp(&b))
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
    fn the_most_toxic_goes_first_and_takes_the_most_similar() {
        // Distances |ln(ratio)| + gap to a rejected candidate of 10 tokens at -2:
        // 0: ln(12/10) = 0.18 + 0.5; 1: 0 + 0.1, the smallest; 2: 0 + 0.3.
        let chosen = [candidate(0.1, 12, -2.5), candidate(0.1, 10, -2.1), candidate(0.0, 10, -2.3)];
        let rejected = [candidate(0.6, 10, -2.0), candidate(0.9, 10, -2.0)];
        let found = choose(&chosen, &rejected, &ONE);
        assert_eq!(found.pairs, [(1, 1), (2, 0)]);
        assert!(found.alone.is_empty());
    }

    #[test]
    fn on_a_tie_the_least_toxic_is_chosen_then_the_first() {
        let chosen = [candidate(0.1, 10, -2.0), candidate(0.05, 10, -2.0), candidate(0.05, 10, -2.0)];
        assert_eq!(choose(&chosen, &[candidate(0.9, 10, -2.0)], &ONE).pairs, [(1, 0)]);
    }

    /// Why the only rejected candidate has no partner.
    fn reason(chosen: &[Candidate], rejected: Candidate, rules: &Rules) -> Dropped {
        let found = choose(chosen, &[rejected], rules);
        assert!(found.pairs.is_empty());
        assert_eq!(found.alone.len(), 1);
        found.alone[0].1
    }

    #[test]
    fn the_reason_is_the_rule_that_excluded_the_last_partner() {
        let toxic = || candidate(0.6, 10, -2.0);
        assert_eq!(reason(&[], toxic(), &ONE), Dropped::NoCounterpart);
        assert_eq!(reason(&[candidate(0.35, 10, -2.0)], toxic(), &ONE), Dropped::Margin);
        let ended = Candidate { finish: Finish::Stop, ..candidate(0.1, 10, -2.0) };
        assert_eq!(reason(&[ended], toxic(), &ONE), Dropped::Finish);
        assert_eq!(reason(&[candidate(0.1, 16, -2.0)], toxic(), &ONE), Dropped::Length);
        assert_eq!(reason(&[candidate(0.1, 6, -2.0)], toxic(), &ONE), Dropped::Length);
        assert_eq!(reason(&[candidate(0.1, 10, -3.25)], toxic(), &ONE), Dropped::Fluency);
        // One fails by length, the other by fluency, which is checked later.
        let two = [candidate(0.1, 16, -2.0), candidate(0.1, 10, -3.25)];
        assert_eq!(reason(&two, toxic(), &ONE), Dropped::Fluency);
    }

    #[test]
    fn bounds_are_inclusive() {
        // Exact in binary: 0.625 - 0.125 = 0.5; 15 / 10 = 1.5; -2 - -3 = 1.
        let rules = Rules { min_margin: 0.5, ..ONE };
        let found = choose(&[candidate(0.125, 15, -3.0)], &[candidate(0.625, 10, -2.0)], &rules);
        assert_eq!(found.pairs, [(0, 0)]);
    }

    #[test]
    fn no_sample_is_in_two_pairs_and_pairs_per_prompt_are_limited() {
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
        // The second has the higher minimum over the scorers: 0.6 against 0.5.
        let found = choose(&[with(0.0, 0.0)], &[with(1.0, 0.5), with(0.6, 0.6)], &ONE);
        assert_eq!(found.pairs, [(0, 1)]);
    }

    #[test]
    fn rejects_rules_out_of_range() {
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
