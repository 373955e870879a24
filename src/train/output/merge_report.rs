//! How much of an adapter arrived in a merged model.

use serde::Serialize;

use crate::gguf::TensorType;

/// Compares the change asked for with the change after rounding to the weights' type.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Change {
    /// Number of weights.
    pub n_weights: u64,
    /// Number of weights with a new value.
    pub n_moved: u64,
    /// `Σ wanted²`, where `wanted` is the change asked for.
    pub wanted: f64,
    /// `Σ wanted made`, where `made` is the change after rounding.
    pub along: f64,
    /// `Σ (made - wanted)²`.
    pub off: f64,
}

impl Change {
    /// The Frobenius norm of the change asked for.
    pub fn norm(&self) -> f64 {
        self.wanted.sqrt()
    }

    /// The share of the change that survived rounding: `Σ wanted made / Σ wanted²`.
    ///
    /// 1 means all of it, 0 none of it, or only noise. `None` if no change was asked for.
    pub fn survived(&self) -> Option<f64> {
        (self.wanted > 0.0).then(|| self.along / self.wanted)
    }

    /// The rounding error relative to the change, both as Frobenius norms.
    pub fn relative_error(&self) -> Option<f64> {
        (self.wanted > 0.0).then(|| (self.off / self.wanted).sqrt())
    }

    /// The share of weights with a new value.
    pub fn moved(&self) -> f64 {
        self.n_moved as f64 / self.n_weights.max(1) as f64
    }

    /// Adds the change of other weights.
    pub fn add(&mut self, other: &Change) {
        self.n_weights += other.n_weights;
        self.n_moved += other.n_moved;
        self.wanted += other.wanted;
        self.along += other.along;
        self.off += other.off;
    }
}

/// The change of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorChange {
    /// Its name.
    pub name: String,
    /// Its type in the base.
    pub from: TensorType,
    /// Its type in the merged model.
    pub to: TensorType,
    /// How much of the change survived.
    pub change: Change,
}

/// The change of all tensors.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MergeReport {
    /// Changed tensors, in file order.
    pub tensors: Vec<TensorChange>,
    /// Their sum.
    pub total: Change,
}

/// [`MergeReport::total`] for JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergeSummary {
    /// Number of changed tensors.
    pub n_tensors: usize,
    /// [`Change::norm`].
    pub norm: f64,
    /// [`Change::survived`].
    pub survived: Option<f64>,
    /// [`Change::relative_error`].
    pub relative_error: Option<f64>,
    /// [`Change::moved`].
    pub moved: f64,
}

/// A [`TensorChange`] for JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorSummary {
    /// Its name.
    pub name: String,
    /// Its type in the base.
    pub from: String,
    /// Its type in the merged model.
    pub to: String,
    /// [`Change::norm`].
    pub norm: f64,
    /// [`Change::survived`].
    pub survived: Option<f64>,
    /// [`Change::relative_error`].
    pub relative_error: Option<f64>,
    /// [`Change::moved`].
    pub moved: f64,
}

impl MergeReport {
    /// The figures of each tensor.
    pub fn tensor_summaries(&self) -> Vec<TensorSummary> {
        let summary = |tensor: &TensorChange| TensorSummary {
            name: tensor.name.clone(),
            from: tensor.from.to_string(),
            to: tensor.to.to_string(),
            norm: tensor.change.norm(),
            survived: tensor.change.survived(),
            relative_error: tensor.change.relative_error(),
            moved: tensor.change.moved(),
        };
        self.tensors.iter().map(summary).collect()
    }

    /// The figures of all tensors together.
    pub fn summary(&self) -> MergeSummary {
        MergeSummary {
            n_tensors: self.tensors.len(),
            norm: self.total.norm(),
            survived: self.total.survived(),
            relative_error: self.total.relative_error(),
            moved: self.total.moved(),
        }
    }

    /// What to do if rounding lost or added too much; `None` if the change survived.
    ///
    /// Too much is a survived share below 0.9, or a rounding error larger than the change.
    pub fn advice(&self) -> Option<String> {
        const ENOUGH: f64 = 0.9;
        let (survived, error) = (self.total.survived()?, self.total.relative_error()?);
        if survived >= ENOUGH && error <= 1.0 {
            return None;
        }
        let bits = |t: TensorType| t.block_bytes() * 8 / t.block_len();
        let finer = match self.tensors.iter().map(|t| bits(t.to)).min()? {
            0..8 => ", or write the changed tensors in a finer type (--type q8_0)",
            8..16 => ", or write the changed tensors in a finer type (--type f16)",
            16..32 => ", or write the changed tensors in a finer type (--type f32)",
            _ => "",
        };
        let noise = if error > 1.0 {
            format!(", with rounding noise {error:.1} times its size")
        } else {
            String::new()
        };
        Some(format!(
            "{:.0}% of the change survived{noise}: to keep all of it, use the adapter as it is (--lora){finer}",
            100.0 * survived
        ))
    }
}
