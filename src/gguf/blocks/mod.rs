//! Blocks of tensor data: every dequantise, quantise and block product over ggml.
//!
//! - `dequantize`: blocks to f32, with ggml's functions if the build has them, else with `decode`.
//! - `decode`: the same without ggml, for the types that models are shared in.
//! - `quantize`: f32 to blocks, with ggml's quantiser.
//! - `product`: products with quantised matrices on ggml's threads, and the aligned memory that they need.

// Builds with ggml only test it against ggml.
#[cfg(any(test, not(feature = "engine")))]
mod decode;
mod dequantize;
#[cfg(feature = "engine")]
pub(crate) mod product;
#[cfg(feature = "engine")]
mod quantize;

#[cfg(not(feature = "engine"))]
pub(crate) use dequantize::can_dequantize;
pub use dequantize::dequantize;
pub(crate) use dequantize::dequantize_raw;
#[cfg(feature = "engine")]
pub use quantize::quantize;
