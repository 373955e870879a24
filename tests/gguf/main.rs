//! Reading, refusing and writing GGUF files through the public API.

mod bytes;
mod decoder;
mod dequantize;
mod quantize;
mod rejects;
mod round_trip;
mod rules;
mod split;
