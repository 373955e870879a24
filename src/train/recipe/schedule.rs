//! Learning-rate schedules.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The learning rate's course after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Stays at its peak.
    Constant,
    /// Falls linearly to 0 at the last step.
    Linear,
    /// Falls to 0 at the last step along half a cosine.
    Cosine,
}

impl ScheduleKind {
    /// The name as users type it.
    pub fn name(self) -> &'static str {
        match self {
            ScheduleKind::Constant => "constant",
            ScheduleKind::Linear => "linear",
            ScheduleKind::Cosine => "cosine",
        }
    }
}

impl FromStr for ScheduleKind {
    type Err = String;

    fn from_str(text: &str) -> Result<ScheduleKind, String> {
        let all = [ScheduleKind::Constant, ScheduleKind::Linear, ScheduleKind::Cosine];
        let found = all.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| format!("expected constant, linear or cosine, found {text:?}"))
    }
}

/// The learning rate of every step, as the schedulers of the same names in Hugging Face transformers compute it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Course after the warm-up.
    pub kind: ScheduleKind,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps of linear warm-up from 0 to the peak; step 0 has learning rate 0.
    pub warmup_steps: u64,
    /// Total steps.
    pub n_steps: u64,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * step as f64 / self.warmup_steps as f64;
        }
        let n = self.n_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let done = ((step - self.warmup_steps) as f64 / n).min(1.0);
        self.learning_rate
            * match self.kind {
                ScheduleKind::Constant => 1.0,
                ScheduleKind::Linear => 1.0 - done,
                ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_warms_up_linearly_and_then_follows_its_schedule() {
        let schedule = |kind| Schedule { kind, learning_rate: 2.0, warmup_steps: 4, n_steps: 12 };
        let rates =
            |kind, steps: &[u64]| -> Vec<f64> { steps.iter().map(|&s| schedule(kind).at(s)).collect() };
        assert_eq!(rates(ScheduleKind::Constant, &[0, 1, 3, 4, 11]), [0.0, 0.5, 1.5, 2.0, 2.0]);
        // Step 8 is half of the eight steps after the warm-up.
        assert_eq!(rates(ScheduleKind::Linear, &[4, 8, 12, 20]), [2.0, 1.0, 0.0, 0.0]);
        let cosine = rates(ScheduleKind::Cosine, &[4, 8, 12]);
        assert!(cosine.iter().zip([2.0, 1.0, 0.0]).all(|(a, b)| (a - b).abs() < 1e-12), "{cosine:?}");
    }

    #[test]
    fn without_warm_up_the_first_step_has_the_peak_learning_rate() {
        let kind = ScheduleKind::Constant;
        assert_eq!(Schedule { kind, learning_rate: 3.0, warmup_steps: 0, n_steps: 1 }.at(0), 3.0);
    }
}
