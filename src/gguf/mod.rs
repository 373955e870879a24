//! Reads, validates and writes GGUF files, with no help from llama.cpp but for the numbers in blocks.
//!
//! llama.cpp ends the process on a failed assertion, so a file is read here first:
//!
//! ```text
//! path ─► foreign (what else is it?) ─► cursor (bounded reads) ─► read::validate ─► GgufFile
//!                                                                     │                │
//!                                        write (checks itself by it) ─┘                ├─► hparams (n_layer, n_embd, …)
//!                                                                                      └─► check_decoder (can it generate?)
//! ```
//!
//! [`GgufFile::open`] accepts what llama.cpp's own loader accepts, and refuses a little more: strings
//! that are not UTF-8, booleans other than 0 and 1, tensors without dimensions or elements. It reads the
//! metadata and the tensor list, never the tensor data.
//! [`check_decoder`] then asks whether the file is a language model that can generate, and looks for
//! what llama.cpp would only find by an assertion.
//!
//! No file is mapped into memory: data is read at positions ([`GgufFile::read_tensor_at`]), so a file that
//! another program truncates meanwhile is an error, not a signal. Between [`GgufFile::open`] and
//! llama.cpp's own loading the file may still change; [`GgufFile::check_unchanged`] narrows that gap to
//! the call itself, it does not close it.
//!
//! Shapes are in ggml's order, fastest axis first: a matrix that maps `n_in` to `n_out` has shape
//! `[n_in, n_out]`.
//!
//! The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; where that text and
//! `ggml/src/gguf.cpp` differ, the code decides, since it is what loads the file.

pub(crate) mod blocks;
mod cursor;
mod decoder;
mod file_hash;
mod file_type;
mod foreign;
mod hparams;
mod read;
mod split;
mod tensor;
mod validate;
mod value;
mod write;

#[cfg(not(feature = "engine"))]
pub(crate) use blocks::can_dequantize;
pub use blocks::dequantize;
#[cfg(feature = "engine")]
pub use blocks::quantize;
pub use decoder::check_decoder;
pub use file_hash::{file_sha256, model_sha256};
pub use file_type::file_type_name;
pub use read::GgufFile;
pub use tensor::{TensorInfo, TensorType};
pub use value::{Array, Metadata, Strings, Value, ValueType};
pub use write::{GgufWriter, TensorSpec};

/// The format version that is written, and the newest that is read (`GGUF_VERSION` in `gguf.h`).
pub const VERSION: u32 = 3;

/// Alignment of tensor data, in bytes, where `general.alignment` is absent (`GGUF_DEFAULT_ALIGNMENT` in `gguf.h`).
pub const DEFAULT_ALIGNMENT: u32 = 32;
