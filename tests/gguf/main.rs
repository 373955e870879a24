//! Reading, refusing and writing GGUF files, through the crate's public door.

mod bytes;
mod decoder;
mod dequantize;
mod quantize;
mod rejects;
mod round_trip;
mod split;
