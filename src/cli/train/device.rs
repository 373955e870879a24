//! Where a run is computed, as users choose it.

use clap::{Args, ValueEnum};

use crate::error::{Error, Result};
use crate::train::device::name::DeviceName;

#[derive(Debug, Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArguments {
    /// cpu, or in a build with the feature cuda an NVIDIA GPU: cuda, or cuda:N for number N, from 0
    #[arg(long, value_name = "D", default_value = "cpu")]
    pub device: DeviceName,
    /// How frozen matrices lie in a GPU's memory
    #[arg(long, value_enum, default_value = "auto")]
    pub frozen: FrozenArgument,
}

/// `bf16`, `quantised` or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FrozenArgument {
    /// Two bytes a number
    Bf16,
    /// As the file's blocks; each product rounds them to bf16 again
    Quantised,
    /// In bf16 where memory suffices
    Auto,
}

#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
impl FrozenArgument {
    /// What it fixes.
    pub fn wanted(self) -> Option<crate::train::device::name::Frozen> {
        match self {
            FrozenArgument::Bf16 => Some(crate::train::device::name::Frozen::Bf16),
            FrozenArgument::Quantised => Some(crate::train::device::name::Frozen::Quantised),
            FrozenArgument::Auto => None,
        }
    }
}

impl DeviceArguments {
    /// Whether this build has the device; `products_are_chosen` where the user has said how the CPU multiplies.
    pub fn check(&self, products_are_chosen: bool) -> Result<()> {
        match self.device {
            DeviceName::Cpu if self.frozen != FrozenArgument::Auto => Err(Error::setting("--frozen", "the CPU has frozen matrices in the file's blocks always").with_hint("leave it out, or train with --device cuda")),
            DeviceName::Cpu => Ok(()),
            DeviceName::Cuda(_) if !cfg!(any(feature = "cuda", feature = "cuda-emulation")) => {
                Err(Error::setting(format!("--device {}", self.device), "this build trains on the CPU alone").with_hint(
                        "build with --features cuda (vendor/cuda/README.md says what that needs), or train with \
                         --device cpu"
                            ))
            }
            DeviceName::Cuda(_) if products_are_chosen => Err(Error::setting("--products", "they are the CPU's; a GPU rounds to bf16").with_hint("leave it out, or train with --device cpu")),
            DeviceName::Cuda(_) => Ok(()),
        }
    }
}
