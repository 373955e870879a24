//! Which optimizer updates the parameters.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An optimizer, with PyTorch's defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// The paper's choice: smoothing 0.99, no momentum.
    Rmsprop,
    /// Betas 0.9 and 0.999.
    Adamw,
}

impl OptimizerKind {
    /// The name as users type it.
    pub fn name(self) -> &'static str {
        match self {
            OptimizerKind::Rmsprop => "rmsprop",
            OptimizerKind::Adamw => "adamw",
        }
    }

    /// Optimizer state values per trained parameter.
    pub(in crate::train) fn n_states(self) -> usize {
        match self {
            OptimizerKind::Rmsprop => 1,
            OptimizerKind::Adamw => 2,
        }
    }
}

impl FromStr for OptimizerKind {
    type Err = String;

    fn from_str(text: &str) -> Result<OptimizerKind, String> {
        let all = [OptimizerKind::Rmsprop, OptimizerKind::Adamw];
        let found = all.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| format!("expected rmsprop or adamw, found {text:?}"))
    }
}
