//! Dequantises tensor blocks to f32.
//!
//! Builds with the engine use ggml's own functions, and get the numbers that llama.cpp computes with. Other builds use
//! `decode`, which knows the types that models are shared in.

#[cfg(feature = "engine")]
use llama_cpp_sys_2 as sys;

use crate::finite;
use crate::gguf::TensorType;
#[cfg(not(feature = "engine"))]
use crate::gguf::blocks::decode;

/// Dequantises the blocks in `bytes` into `values`.
///
/// # Errors
/// A message, if the type cannot be read, if bytes and values are not the same whole number of blocks, or if a value
/// is NaN or infinite.
pub fn dequantize(tensor_type: TensorType, bytes: &[u8], values: &mut [f32]) -> Result<(), String> {
    dequantize_raw(tensor_type, bytes, values)?;
    finite::fault(values).map_or(Ok(()), Err)
}

/// As [`dequantize`], without looking at the values: for tensors that were checked when they were loaded.
///
/// # Errors
/// As [`dequantize`], except for the values.
pub(crate) fn dequantize_raw(
    tensor_type: TensorType,
    bytes: &[u8],
    values: &mut [f32],
) -> Result<(), String> {
    if tensor_type.row_bytes(values.len() as u64) != Some(bytes.len() as u64) {
        return Err(format!(
            "expected the bytes of {} numbers of type {tensor_type}, found {} bytes",
            values.len(),
            bytes.len()
        ));
    }
    numbers_of(tensor_type, bytes, values)
}

/// Whether this build can dequantise the type.
#[cfg(not(feature = "engine"))]
pub(crate) fn can_dequantize(tensor_type: TensorType) -> bool {
    decode::knows(tensor_type)
}

#[cfg(not(feature = "engine"))]
fn numbers_of(tensor_type: TensorType, bytes: &[u8], values: &mut [f32]) -> Result<(), String> {
    decode::to_numbers(tensor_type, bytes, values)
}

#[cfg(feature = "engine")]
fn numbers_of(tensor_type: TensorType, bytes: &[u8], values: &mut [f32]) -> Result<(), String> {
    if tensor_type == TensorType::F32 {
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(4)) {
            *value = f32::from_le_bytes(bytes.try_into().expect("chunks of 4 have 4 bytes"));
        }
        return Ok(());
    }
    // SAFETY: every `TensorType` is one of ggml's types, so that the pointer is to an entry of its static table.
    let traits = unsafe { &*sys::ggml_get_type_traits(tensor_type.id()) };
    let Some(to_float) = traits.to_float else {
        return Err(format!("numbers of type {tensor_type} cannot be read: it is not a type of weights"));
    };
    // ggml reads blocks as structs with fields of 16 bits and more.
    let aligned = Aligned::of(bytes);
    let n = i64::try_from(values.len()).map_err(|_| "too many numbers at once".to_owned())?;
    // SAFETY: `bytes` holds exactly the blocks of n numbers of this type, as checked above, aligned for ggml's structs,
    // and `values` has room for n numbers. These functions need no tables that ggml has to initialise first.
    unsafe { to_float(aligned.bytes().as_ptr().cast(), values.as_mut_ptr(), n) };
    Ok(())
}

/// The bytes themselves if they are aligned, else an aligned copy.
#[cfg(feature = "engine")]
enum Aligned<'a> {
    Borrowed(&'a [u8]),
    Copied(Vec<u64>, usize),
}

#[cfg(feature = "engine")]
impl Aligned<'_> {
    fn of(bytes: &[u8]) -> Aligned<'_> {
        if bytes.as_ptr().align_offset(align_of::<u64>()) == 0 {
            return Aligned::Borrowed(bytes);
        }
        let words = bytes.chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_ne_bytes(word)
        });
        Aligned::Copied(words.collect(), bytes.len())
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Aligned::Borrowed(bytes) => bytes,
            // SAFETY: the words are plain memory of at least `len` bytes.
            Aligned::Copied(words, len) => unsafe {
                std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), *len)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1.0 and -0.5 as F16.
    const ONE: [u8; 2] = [0x00, 0x3c];
    const MINUS_HALF: [u8; 2] = [0x00, 0xb8];

    fn numbers<const N: usize>(tensor_type: TensorType, bytes: &[u8]) -> [f32; N] {
        let mut values = [0.0; N];
        dequantize(tensor_type, bytes, &mut values).unwrap();
        values
    }

    #[test]
    fn blocks_give_the_numbers_of_their_formulas() {
        assert_eq!(numbers(TensorType::F32, &1.5f32.to_le_bytes()), [1.5]);
        assert_eq!(numbers(TensorType::F16, &[ONE, MINUS_HALF].concat()), [1.0, -0.5]);
        // The upper half of an F32.
        assert_eq!(numbers(TensorType::BF16, &[0xc0, 0x3f]), [1.5]);
        // q8_0: a scale d, then 32 signed bytes q: d q.
        let q8_0 =
            [&MINUS_HALF[..], &(0..32).map(|i| i - 16).map(|q: i8| q as u8).collect::<Vec<_>>()].concat();
        let expected: [f32; 32] = std::array::from_fn(|i| -0.5 * (i as f32 - 16.0));
        assert_eq!(numbers(TensorType::Q8_0, &q8_0), expected);
        // q4_0: d (q - 8), the low halves of 16 bytes first, then the high ones.
        let nibbles: Vec<u8> = (0..16).map(|i| (15 - i) << 4 | i).collect();
        let expected: [f32; 32] =
            std::array::from_fn(|i| if i < 16 { i as f32 - 8.0 } else { 23.0 - i as f32 });
        assert_eq!(numbers(TensorType::Q4_0, &[&ONE[..], &nibbles].concat()), expected.map(|x| x * 1.0));
        // q4_1: d q + m.
        let expected: [f32; 32] = std::array::from_fn(|i| (if i < 16 { i } else { 31 - i }) as f32 - 0.5);
        assert_eq!(numbers(TensorType::Q4_1, &[&ONE[..], &MINUS_HALF, &nibbles].concat()), expected);
    }

    #[test]
    fn unaligned_bytes_give_the_same_numbers() {
        let bytes: Vec<u8> = [&ONE[..], &(0..32).collect::<Vec<u8>>()].concat();
        let shifted: Vec<u8> = [&[0][..], &bytes].concat();
        assert_eq!(numbers::<32>(TensorType::Q8_0, &bytes), numbers::<32>(TensorType::Q8_0, &shifted[1..]));
    }

    // Without llama.cpp some types cannot be read.
    #[cfg(feature = "engine")]
    #[test]
    fn rejects_values_that_are_not_finite_in_every_type_of_block() {
        for &tensor_type in TensorType::ALL.iter().filter(|t| t.is_weight()) {
            let block = vec![0xff; tensor_type.block_bytes() as usize];
            let mut values = vec![0.0; tensor_type.block_len() as usize];
            dequantize_raw(tensor_type, &block, &mut values).unwrap();
            let is_bad = values.iter().any(|x| !x.is_finite());
            let found = dequantize(tensor_type, &block, &mut values);
            assert_eq!(found.is_err(), is_bad, "{tensor_type}");
            // A scale of all ones is NaN. MXFP4 and NVFP4 have scales without NaN.
            let has_nan = !["mxfp4", "nvfp4"].contains(&tensor_type.name());
            assert!(is_bad || !has_nan, "{tensor_type}");
        }
        let infinite = [0x00, 0x7c, 0x00, 0x3c];
        let error = dequantize(TensorType::F16, &infinite, &mut [0.0; 2]).unwrap_err();
        assert_eq!(error, "expected finite numbers, found inf at element 0");
    }

    #[test]
    fn rejects_partial_blocks_and_types_without_numbers() {
        let error = dequantize(TensorType::Q8_0, &[0; 33], &mut [0.0; 32]).unwrap_err();
        assert!(error.contains("33 bytes"), "{error}");
        assert!(dequantize(TensorType::Q8_0, &[0; 34], &mut [0.0; 31]).is_err());
        let error = dequantize(TensorType::I8, &[0; 4], &mut [0.0; 4]).unwrap_err();
        assert!(error.contains("i8"), "{error}");
    }
}
