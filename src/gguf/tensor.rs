//! Tensor types, and the position of each tensor in its file.

use std::fmt;

/// The most dimensions of a tensor (`GGML_MAX_DIMS` in `ggml.h`).
pub(super) const MAX_DIMS: usize = 4;

/// The longest tensor name in bytes, plus one for the final NUL (`GGML_MAX_NAME` in `ggml.h`).
pub(super) const MAX_NAME: usize = 64;

macro_rules! tensor_types {
    ($($variant:ident = $id:literal, $name:literal, $block_len:literal, $block_bytes:literal;)*) => {
        /// The storage type of a tensor's elements, numbered like `enum ggml_type` in `ggml.h`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, non_camel_case_types, reason = "ggml's own spelling")]
        #[repr(u32)]
        pub enum TensorType { $($variant = $id),* }

        impl TensorType {
            /// All types, in order of their numbers.
            pub const ALL: &'static [TensorType] = &[$(TensorType::$variant),*];

            /// ggml's name for it (`ggml_type_name`).
            pub const fn name(self) -> &'static str {
                match self { $(TensorType::$variant => $name),* }
            }

            /// Elements per block. A row is a whole number of blocks.
            pub const fn block_len(self) -> u64 {
                match self { $(TensorType::$variant => $block_len),* }
            }

            /// Bytes per block.
            pub const fn block_bytes(self) -> u64 {
                match self { $(TensorType::$variant => $block_bytes),* }
            }
        }
    };
}

// From `type_traits` in ggml.c, with the sizes of the block structs in ggml-common.h.
tensor_types! {
    F32 = 0, "f32", 1, 4;
    F16 = 1, "f16", 1, 2;
    Q4_0 = 2, "q4_0", 32, 18;
    Q4_1 = 3, "q4_1", 32, 20;
    Q5_0 = 6, "q5_0", 32, 22;
    Q5_1 = 7, "q5_1", 32, 24;
    Q8_0 = 8, "q8_0", 32, 34;
    Q8_1 = 9, "q8_1", 32, 36;
    Q2_K = 10, "q2_K", 256, 84;
    Q3_K = 11, "q3_K", 256, 110;
    Q4_K = 12, "q4_K", 256, 144;
    Q5_K = 13, "q5_K", 256, 176;
    Q6_K = 14, "q6_K", 256, 210;
    Q8_K = 15, "q8_K", 256, 292;
    IQ2_XXS = 16, "iq2_xxs", 256, 66;
    IQ2_XS = 17, "iq2_xs", 256, 74;
    IQ3_XXS = 18, "iq3_xxs", 256, 98;
    IQ1_S = 19, "iq1_s", 256, 50;
    IQ4_NL = 20, "iq4_nl", 32, 18;
    IQ3_S = 21, "iq3_s", 256, 110;
    IQ2_S = 22, "iq2_s", 256, 82;
    IQ4_XS = 23, "iq4_xs", 256, 136;
    I8 = 24, "i8", 1, 1;
    I16 = 25, "i16", 1, 2;
    I32 = 26, "i32", 1, 4;
    I64 = 27, "i64", 1, 8;
    F64 = 28, "f64", 1, 8;
    IQ1_M = 29, "iq1_m", 256, 56;
    BF16 = 30, "bf16", 1, 2;
    TQ1_0 = 34, "tq1_0", 256, 54;
    TQ2_0 = 35, "tq2_0", 256, 66;
    MXFP4 = 39, "mxfp4", 32, 17;
    NVFP4 = 40, "nvfp4", 64, 36;
    Q1_0 = 41, "q1_0", 128, 18;
    Q2_0 = 42, "q2_0", 64, 18;
}

impl TensorType {
    /// The type with this number. The error is the reason to refuse it.
    pub(super) fn from_id(id: u32) -> Result<TensorType, String> {
        if let Some(found) = TensorType::ALL.iter().find(|t| t.id() == id) {
            return Ok(*found);
        }
        Err(match id {
            4 => "type 4 (q4_2) was removed from llama.cpp in 2023".into(),
            5 => "type 5 (q4_3) was removed from llama.cpp in 2023".into(),
            31..=33 => format!("type {id} (q4_0 repacked for one CPU) was removed from llama.cpp; use q4_0"),
            36..=38 => {
                format!("type {id} (iq4_nl repacked for one CPU) was removed from llama.cpp; use iq4_nl")
            }
            _ => format!("type {id} is unknown; the llama.cpp in use knows types up to 42"),
        })
    }

    /// The number that stands for this type in a file.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// Bytes of a row of `n_elements`. `None` if it is not a whole number of blocks, or overflows.
    pub fn row_bytes(self, n_elements: u64) -> Option<u64> {
        if !n_elements.is_multiple_of(self.block_len()) {
            return None;
        }
        (n_elements / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Whether llama.cpp can multiply by a matrix of this type.
    ///
    /// It cannot for integers, f64 and the two types of intermediate results (q8_1, q8_K).
    pub fn is_weight(self) -> bool {
        use TensorType::*;
        !matches!(self, I8 | I16 | I32 | I64 | F64 | Q8_1 | Q8_K)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Bytes of a tensor of `shape` (ggml order). The error names the rule of ggml that the shape breaks.
pub(super) fn tensor_bytes(shape: &[u64], tensor_type: TensorType) -> Result<u64, String> {
    if shape.is_empty() || shape.len() > MAX_DIMS {
        return Err(format!("expected 1 to {MAX_DIMS} dimensions, found {}", shape.len()));
    }
    if shape.contains(&0) {
        return Err(format!("expected a positive number of elements in every dimension, found {shape:?}"));
    }
    // ggml counts elements in an i64.
    let n_elements =
        shape.iter().try_fold(1u64, |n, &ne| n.checked_mul(ne)).filter(|&n| i64::try_from(n).is_ok());
    let too_large = || format!("shape {shape:?} has more than 2^63 - 1 elements or bytes");
    n_elements.ok_or_else(too_large)?;
    let Some(row_bytes) = tensor_type.row_bytes(shape[0]) else {
        let block_len = tensor_type.block_len();
        return Err(format!(
            "type {tensor_type} needs rows of a multiple of {block_len} elements, found rows of {} in {shape:?}",
            shape[0]
        ));
    };
    let n_bytes = shape[1..].iter().try_fold(row_bytes, |n, &ne| n.checked_mul(ne));
    n_bytes.filter(|&n| i64::try_from(n).is_ok()).ok_or_else(too_large)
}

/// Why this is not a valid tensor name; `None` if it is.
pub(super) fn name_fault(name: &str) -> Option<String> {
    if name.is_empty() {
        Some("the name is empty".into())
    } else if name.len() >= MAX_NAME {
        Some(format!("the name has {} bytes, but llama.cpp allows at most {}", name.len(), MAX_NAME - 1))
    } else if name.contains('\0') {
        Some("the name contains a NUL byte, and llama.cpp would truncate it there".into())
    } else {
        None
    }
}

/// A tensor of a validated file. Its data is aligned, inside the file, and does not overlap another tensor's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub(super) name: String,
    pub(super) shape: Vec<u64>,
    pub(super) tensor_type: TensorType,
    pub(super) part: usize,
    pub(super) offset: u64,
    pub(super) n_bytes: u64,
}

impl TensorInfo {
    /// The name, such as "blk.3.ffn_down.weight".
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Elements in each of its 1 to 4 dimensions, in ggml's order (fastest axis first).
    ///
    /// `ffn_down.weight` has shape `[n_ff, n_embd]`.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// The storage type of the elements.
    pub fn tensor_type(&self) -> TensorType {
        self.tensor_type
    }

    /// The part of a split model that holds it, from 0. Always 0 if the model is not split.
    pub fn part(&self) -> usize {
        self.part
    }

    /// The start of its data, in bytes from the start of that part's file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Size of its data in bytes, without padding.
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Number of elements: the product of the shape.
    pub fn n_elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes of one row, `shape()[0]` elements.
    pub fn row_bytes(&self) -> u64 {
        self.shape[0] / self.tensor_type.block_len() * self.tensor_type.block_bytes()
    }
}
