//! What every operation of one forward or backward pass needs.

use crate::train::device::Device;

/// Whether a pass applies the adapters: low-rank changes and directions.
///
/// With adapters the model is DPO's policy, without them its reference. Weights trained by
/// [`Method::Full`](crate::train::recipe::method::Method::Full) are applied either way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Adapters {
    /// The policy.
    On {
        /// Multiplies each low-rank change ([`lora::scale`](crate::steer::lora::scale)).
        lora_scale: f32,
    },
    /// The reference.
    Off,
}

impl Adapters {
    /// Whether low-rank changes and directions are applied.
    pub fn are_on(self) -> bool {
        self != Adapters::Off
    }

    /// The scale of low-rank changes; `None` if they are not applied.
    pub fn lora_scale(self) -> Option<f32> {
        match self {
            Adapters::On { lora_scale } => Some(lora_scale),
            Adapters::Off => None,
        }
    }
}

/// What a forward or backward pass reads besides its batch.
#[derive(Debug)]
pub struct Pass<'a, D: Device> {
    /// Where it runs.
    pub device: &'a D,
    /// Values of the parameters, indexed by [`ParameterId`](crate::train::model::parameters::ParameterId).
    pub values: &'a [D::Buffer],
    /// Policy or reference.
    pub adapters: Adapters,
}
