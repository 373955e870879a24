//! Flags for the device, precision and memory of a training run.

use clap::{Args, ValueEnum};

use crate::study::train::ComputeOptions;
use crate::train::device::name::{DeviceName, Frozen};
use crate::train::recipe::products::Products;

#[derive(Debug, Args)]
#[command(next_help_heading = "Computation")]
pub struct ComputeArguments {
    /// Number of threads [default: all cores]
    #[arg(short = 't', long, value_name = "N")]
    pub threads: Option<usize>,
    /// Precision of products with frozen matrices on the CPU
    #[arg(long, value_enum, default_value = "auto")]
    products: ProductsArgument,
    /// Maximum number of tokens per pass (-ub); a longer pair gets its own pass [default: 512; on a GPU, all tokens of
    /// a step, up to 4096, if they fit]
    #[arg(long, value_name = "N")]
    ubatch_size: Option<usize>,
    /// Gradient checkpointing: recompute activations in the backward pass to save memory
    #[arg(long, value_enum, default_value = "auto")]
    checkpointing: CheckpointingArgument,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArguments {
    /// cpu, cuda or cuda:N (NVIDIA GPU number N, from 0); cuda needs a build with the feature cuda
    #[arg(long, value_name = "D", default_value = "cpu")]
    pub device: DeviceName,
    /// Storage of frozen matrices in GPU memory
    #[arg(long, value_enum, default_value = "auto")]
    pub frozen: FrozenArgument,
}

/// `exact`, `fast` or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProductsArgument {
    /// In f32, with dequantised weights
    Exact,
    /// In 8-bit integers if the matrix is quantised; the other operand is rounded to 8 bits
    Fast,
    /// fast if the CPU has AVX-512 VNNI and enough memory, else exact
    Auto,
}

/// `on`, `off` or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CheckpointingArgument {
    /// Always
    On,
    /// Never, even if memory runs out
    Off,
    /// If activations would exceed a quarter of the machine's memory, or would not fit into the GPU's free memory
    Auto,
}

/// `bf16`, `quantised` or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FrozenArgument {
    /// Two bytes per weight
    Bf16,
    /// As stored in the file; dequantised to bf16 for every product
    Quantised,
    /// bf16 if it fits into GPU memory, else quantised
    Auto,
}

impl ComputeArguments {
    /// The options; those set to `auto` are `None`.
    pub fn options(&self, frozen: FrozenArgument) -> ComputeOptions {
        ComputeOptions {
            products: match self.products {
                ProductsArgument::Exact => Some(Products::Exact),
                ProductsArgument::Fast => Some(Products::Fast),
                ProductsArgument::Auto => None,
            },
            max_rows: self.ubatch_size,
            checkpointing: match self.checkpointing {
                CheckpointingArgument::On => Some(true),
                CheckpointingArgument::Off => Some(false),
                CheckpointingArgument::Auto => None,
            },
            frozen: match frozen {
                FrozenArgument::Bf16 => Some(Frozen::Bf16),
                FrozenArgument::Quantised => Some(Frozen::Quantised),
                FrozenArgument::Auto => None,
            },
        }
    }
}
