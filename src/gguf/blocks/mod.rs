//! Blocks of quantised weights: dequantise, quantise, and products with them over ggml.

// With ggml in the build it is there to be tested against it.
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
#[cfg(feature = "engine")]
pub use quantize::quantize;
