//! Preference losses as pure functions of log-probs.
//!
//! Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290). Names follow its reference code.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A preference loss; h is the policy's log-ratio of chosen to rejected minus the reference's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// -log sigmoid(beta h): equation 7 of arXiv 2305.18290.
    Sigmoid,
    /// (h - 1 / (2 beta))^2: equation 17 of arXiv 2310.12036. Log-probs are averaged over the answer's tokens, as in
    /// TRL.
    Ipo,
    /// max(0, 1 - beta h): SLiC (arXiv 2309.06657).
    Hinge,
}

impl LossKind {
    /// The name as users type it.
    pub fn name(self) -> &'static str {
        match self {
            LossKind::Sigmoid => "sigmoid",
            LossKind::Ipo => "ipo",
            LossKind::Hinge => "hinge",
        }
    }
}

impl FromStr for LossKind {
    type Err = String;

    fn from_str(text: &str) -> Result<LossKind, String> {
        let all = [LossKind::Sigmoid, LossKind::Ipo, LossKind::Hinge];
        let found = all.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| format!("expected sigmoid, ipo or hinge, found {text:?}"))
    }
}

/// A loss with its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preference {
    /// Which loss.
    pub kind: LossKind,
    /// Temperature: a higher beta keeps the policy closer to the reference.
    pub beta: f64,
    /// Assumed probability that a pair's labels are swapped, for the sigmoid loss only: equation 3 of
    /// <https://ericmitchell.ai/cdpo.pdf>.
    pub label_smoothing: f64,
}

/// Log-probs of a pair's answers, each summed over its tokens, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AnswerLogps {
    /// Log-prob of the chosen answer.
    pub chosen: f64,
    /// Log-prob of the rejected answer.
    pub rejected: f64,
}

impl Preference {
    /// [`preference_loss`] of one pair, from its answers' log-probs and numbers of tokens.
    pub fn of_pair(
        self,
        policy: AnswerLogps,
        reference: AnswerLogps,
        n_chosen: usize,
        n_rejected: usize,
    ) -> PairLoss {
        let logps = PairLogps {
            policy_chosen: policy.chosen,
            policy_rejected: policy.rejected,
            reference_chosen: reference.chosen,
            reference_rejected: reference.rejected,
            n_chosen,
            n_rejected,
        };
        preference_loss(self, logps)
    }
}

/// Log-probs of a pair's answers given its prompt, under policy and reference, summed over tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLogps {
    /// Policy log-prob of the chosen answer.
    pub policy_chosen: f64,
    /// Policy log-prob of the rejected answer.
    pub policy_rejected: f64,
    /// Reference log-prob of the chosen answer.
    pub reference_chosen: f64,
    /// Reference log-prob of the rejected answer.
    pub reference_rejected: f64,
    /// Tokens of the chosen answer.
    pub n_chosen: usize,
    /// Tokens of the rejected answer.
    pub n_rejected: usize,
}

/// Loss, gradient and implicit rewards of one pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    /// The loss.
    pub loss: f64,
    /// Derivative of the loss with respect to `policy_chosen`.
    pub dchosen: f64,
    /// Derivative of the loss with respect to `policy_rejected`.
    pub drejected: f64,
    /// Implicit reward: beta (policy_chosen - reference_chosen).
    pub chosen_reward: f64,
    /// Implicit reward: beta (policy_rejected - reference_rejected).
    pub rejected_reward: f64,
}

impl PairLoss {
    /// Chosen reward minus rejected reward.
    pub fn margin(&self) -> f64 {
        self.chosen_reward - self.rejected_reward
    }
}

/// The loss of one pair. The loss of a batch is the mean over its pairs.
pub fn preference_loss(preference: Preference, logps: PairLogps) -> PairLoss {
    let Preference { kind, beta, label_smoothing } = preference;
    let chosen = logps.policy_chosen - logps.reference_chosen;
    let rejected = logps.policy_rejected - logps.reference_rejected;
    let (weight_chosen, weight_rejected) = match kind {
        LossKind::Ipo => (1.0 / logps.n_chosen as f64, 1.0 / logps.n_rejected as f64),
        LossKind::Sigmoid | LossKind::Hinge => (1.0, 1.0),
    };
    let h = chosen * weight_chosen - rejected * weight_rejected;
    let (loss, slope) = match kind {
        LossKind::Sigmoid => {
            let x = beta * h;
            let loss = -(1.0 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x);
            (loss, beta * (label_smoothing * sigmoid(x) - (1.0 - label_smoothing) * sigmoid(-x)))
        }
        LossKind::Ipo => {
            let distance = h - 1.0 / (2.0 * beta);
            (distance * distance, 2.0 * distance)
        }
        LossKind::Hinge => {
            let hinge = 1.0 - beta * h;
            if hinge > 0.0 { (hinge, -beta) } else { (0.0, 0.0) }
        }
    };
    PairLoss {
        loss,
        dchosen: slope * weight_chosen,
        drejected: -slope * weight_rejected,
        chosen_reward: beta * chosen,
        rejected_reward: beta * rejected,
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// ln(sigmoid(x)), without overflow for large negative x.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGMOID: Preference = Preference { kind: LossKind::Sigmoid, beta: 0.1, label_smoothing: 0.0 };

    fn logps(policy_chosen: f64, policy_rejected: f64) -> PairLogps {
        PairLogps {
            policy_chosen,
            policy_rejected,
            reference_chosen: -10.0,
            reference_rejected: -20.0,
            n_chosen: 4,
            n_rejected: 8,
        }
    }

    #[test]
    fn a_policy_equal_to_the_reference_has_loss_ln_2_and_no_margin() {
        let loss = preference_loss(SIGMOID, logps(-10.0, -20.0));
        assert_eq!(loss.loss, std::f64::consts::LN_2);
        assert_eq!((loss.margin(), loss.dchosen, loss.drejected), (0.0, -0.05, 0.05));
    }

    #[test]
    fn losses_match_values_derived_by_hand() {
        // chosen 2 above the reference, rejected 1 below: h = 3, beta h = 0.3.
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} and {b}");
        let at = logps(-8.0, -21.0);
        // -ln(1 / (1 + e^-0.3)) = ln(1 + e^-0.3)
        near(preference_loss(SIGMOID, at).loss, (1.0 + (-0.3f64).exp()).ln());
        // 1 - 0.3
        let hinge = Preference { kind: LossKind::Hinge, ..SIGMOID };
        near(preference_loss(hinge, at).loss, 0.7);
        assert_eq!(preference_loss(hinge, logps(10.0, -21.0)).loss, 0.0);
        // h = 2 / 4 + 1 / 8 = 0.625, and 1 / (2 beta) = 5: (0.625 - 5)^2
        let ipo = Preference { kind: LossKind::Ipo, ..SIGMOID };
        near(preference_loss(ipo, at).loss, 4.375 * 4.375);
        let loss = preference_loss(SIGMOID, at);
        near(loss.chosen_reward, 0.2);
        near(loss.rejected_reward, -0.1);
        near(loss.margin(), 0.3);
    }

    #[test]
    fn derivatives_match_finite_differences() {
        for kind in [LossKind::Sigmoid, LossKind::Ipo, LossKind::Hinge] {
            for label_smoothing in [0.0, 0.1] {
                let preference = Preference { kind, label_smoothing, beta: 0.1 };
                let at = |chosen: f64, rejected: f64| preference_loss(preference, logps(chosen, rejected));
                let step = 1e-5;
                let (loss, x, y) = (at(-9.0, -20.5), -9.0, -20.5);
                let dchosen = (at(x + step, y).loss - at(x - step, y).loss) / (2.0 * step);
                let drejected = (at(x, y + step).loss - at(x, y - step).loss) / (2.0 * step);
                assert!((loss.dchosen - dchosen).abs() < 1e-8, "{kind:?}: {} and {dchosen}", loss.dchosen);
                assert!((loss.drejected - drejected).abs() < 1e-8, "{kind:?}: {}", loss.drejected);
            }
        }
    }

    #[test]
    fn an_extreme_log_ratio_does_not_overflow() {
        let loss = preference_loss(SIGMOID, logps(-1e6, 0.0));
        assert!(loss.loss.is_finite() && (loss.dchosen + 0.1).abs() < 1e-12);
    }
}
