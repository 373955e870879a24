//! Reads, validates and writes GGUF files. Only [`quantize()`] and [`dequantize()`] use llama.cpp.
//!
//! llama.cpp aborts the process on a bad file, so files are validated here first:
//!
//! ```text
//! path ─► validate ─► split (all parts) ─► GgufFile ─► hparams (n_layer, n_embd, …)
//!            │                                 └─────► check_decoder (can it generate?)
//!            ├─ cursor: bounded reads of the header
//!            └─ foreign: names other formats
//!
//! write: checks its own output with validate
//! ```
//!
//! [`GgufFile::open`] reads the metadata and the tensor list, never the tensor data. It accepts the files that
//! llama.cpp's own loader accepts, with a few exceptions: it refuses booleans other than 0 and 1, and tensors without
//! dimensions or elements. Strings and keys are bytes: those that are not UTF-8 are kept, and shown with U+FFFD.
//! [`check_decoder`] then checks that the file is a language model that can generate, and looks for everything that
//! llama.cpp would only catch by a failed assertion: `rules` holds the tables.
//!
//! Files are not memory-mapped. Data is read at positions ([`GgufFile::read_tensor_at`]), so if another program
//! truncates the file meanwhile, that is an error and not a signal. llama.cpp opens the file again by its path, and maps
//! it. [`GgufFile::check_unchanged`] after loading proves that it opened the same file, and [`ModelFiles`] notices
//! changes from then on.
//!
//! Shapes are in ggml's order, fastest axis first: a matrix that maps `n_in` to `n_out` has shape
//! `[n_in, n_out]`.
//!
//! The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. If it and `ggml/src/gguf.cpp` differ, this
//! module follows the code, because the code loads the file.

pub(crate) mod blocks;
mod cursor;
mod decoder;
mod file_hash;
mod file_type;
mod foreign;
mod hparams;
mod read;
mod regular;
mod rules;
mod split;
mod stamp;
mod tensor;
mod validate;
mod value;
mod watched;
mod write;

#[cfg(not(feature = "engine"))]
pub(crate) use blocks::can_dequantize;
pub use blocks::dequantize;
pub(crate) use blocks::dequantize_raw;
#[cfg(feature = "engine")]
pub use blocks::quantize;
pub use decoder::check_decoder;
#[cfg(feature = "engine")]
pub(crate) use decoder::{check_vocabulary, unexpected_tensor};
pub use file_hash::file_sha256;
pub use file_type::file_type_name;
pub use read::{GgufFile, model_sha256};
pub(crate) use regular::check_regular;
pub use tensor::{TensorInfo, TensorType};
pub use value::{Array, Metadata, Strings, Value, ValueType};
pub use watched::{ModelFiles, WatchedFile, hold_models};
pub use write::{GgufWriter, TensorSpec};

/// The version written, and the newest one read (`GGUF_VERSION` in `gguf.h`).
pub const VERSION: u32 = 3;

/// Alignment of tensor data in bytes if `general.alignment` is absent (`GGUF_DEFAULT_ALIGNMENT` in `gguf.h`).
pub const DEFAULT_ALIGNMENT: u32 = 32;
