//! Quantises f32 to tensor blocks with ggml's quantiser: the same bytes as `llama-quantize` writes.

use llama_cpp_sys_2 as sys;

use super::dequantize_raw;
use crate::finite;
use crate::gguf::TensorType;

impl TensorType {
    /// Whether quantising to this type needs an importance matrix, which takes a calibration run.
    ///
    /// `llama-quantize` refuses the same types without one (`tensor_requires_imatrix` in `llama-quant.cpp`).
    pub fn needs_importance_matrix(self) -> bool {
        use TensorType::*;
        matches!(self, IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS)
    }

    /// The reason why [`quantize`] refuses rows of `n_per_row` numbers of this type; `None` if it accepts them.
    pub fn quantize_fault(self, n_per_row: u64) -> Option<String> {
        if !self.is_weight() {
            Some(format!("type {self} is not a type of weights"))
        } else if self.needs_importance_matrix() {
            Some(format!("quantising to type {self} needs an importance matrix, which is not supported"))
        } else if n_per_row == 0 || !n_per_row.is_multiple_of(self.block_len()) {
            let block_len = self.block_len();
            Some(format!("type {self} needs rows of a multiple of {block_len} numbers, found {n_per_row}"))
        } else {
            None
        }
    }
}

/// The largest magnitude in a quantised block: the largest F16, as a scale, times a code of 8 bits.
///
/// Far larger numbers overflow the sums of ggml's searches for scales, and an assertion ends the process.
const MAX_IN_BLOCK: f32 = 65504.0 * 127.0;

/// Quantises whole rows of `n_per_row` numbers. May be called from several threads.
///
/// Quantised types are rounded without an importance matrix. F32, F16 and BF16 are rounded to nearest.
///
/// # Errors
/// A message: the reason of [`TensorType::quantize_fault`], values that are not whole rows, values that are not finite,
/// or values too large for the type or for the scale of its blocks.
pub fn quantize(tensor_type: TensorType, values: &[f32], n_per_row: usize) -> Result<Vec<u8>, String> {
    if let Some(fault) = tensor_type.quantize_fault(n_per_row as u64) {
        return Err(fault);
    }
    if !values.len().is_multiple_of(n_per_row) {
        return Err(format!("expected whole rows of {n_per_row} numbers, found {} numbers", values.len()));
    }
    if let Some(fault) = finite::fault(values) {
        return Err(fault);
    }
    if tensor_type == TensorType::F32 {
        return Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect());
    }
    let too_many = || "too many numbers at once".to_owned();
    let n_rows = values.len() / n_per_row;
    let n_bytes = tensor_type.row_bytes(values.len() as u64).ok_or_else(too_many)? as usize;
    let (n_rows, n_per_row) =
        (i64::try_from(n_rows).map_err(|_| too_many())?, i64::try_from(n_per_row).map_err(|_| too_many())?);
    if tensor_type.block_len() > 1
        && let Some(at) = values.iter().position(|value| value.abs() > MAX_IN_BLOCK)
    {
        return Err(too_large(tensor_type, values, at));
    }
    // Words, because ggml writes blocks as structs with fields of 16 bits and more.
    let mut words = vec![0u64; n_bytes.div_ceil(size_of::<u64>())];
    // SAFETY: `quantize_fault` has checked that ggml can quantise to the type without an importance matrix, and that
    // rows are whole blocks. `values` holds n_rows rows of n_per_row numbers, and `words` has aligned room for their
    // blocks. ggml initialises the tables of its IQ types itself, under a lock. A null pointer means no matrix.
    let written = unsafe {
        sys::ggml_quantize_chunk(
            tensor_type.id(),
            values.as_ptr(),
            words.as_mut_ptr().cast(),
            0,
            n_rows,
            n_per_row,
            std::ptr::null(),
        )
    };
    if written != n_bytes {
        return Err(format!("expected {n_bytes} bytes of type {tensor_type} from ggml, found {written}"));
    }
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.truncate(n_bytes);
    // The number itself, or the F16 scale of its block, can be too large for the type.
    let mut read = vec![0.0; values.len()];
    dequantize_raw(tensor_type, &bytes, &mut read)?;
    match finite::not_finite(&read) {
        Some((at, _)) => Err(too_large(tensor_type, values, at)),
        None => Ok(bytes),
    }
}

/// Describes the number at `at` that did not fit, or the largest of its block.
fn too_large(tensor_type: TensorType, values: &[f32], at: usize) -> String {
    let len = tensor_type.block_len() as usize;
    let block = &values[at / len * len..][..len];
    let largest = block.iter().copied().fold(0.0, |a: f32, b| if b.abs() > a.abs() { b } else { a });
    format!("{largest:e} does not fit into type {tensor_type}")
}

#[cfg(test)]
mod tests {
    use super::super::dequantize;
    use super::*;

    /// 1.0 and -0.5 as F16.
    const ONE: [u8; 2] = [0x00, 0x3c];
    const MINUS_HALF: [u8; 2] = [0x00, 0xb8];

    fn blocks(tensor_type: TensorType, values: &[f32]) -> Vec<u8> {
        quantize(tensor_type, values, values.len()).unwrap()
    }

    #[test]
    fn numbers_give_the_blocks_of_their_formulas() {
        assert_eq!(blocks(TensorType::F32, &[1.5]), 1.5f32.to_le_bytes());
        assert_eq!(blocks(TensorType::F16, &[1.0, -0.5]), [ONE, MINUS_HALF].concat());
        // The upper half of an F32, rounded to nearest even: 1 + 2^-8 is halfway, and rounds to 1.
        assert_eq!(blocks(TensorType::BF16, &[1.5, 1.0 + 1.0 / 256.0]), [0xc0, 0x3f, 0x80, 0x3f]);
        // q8_0: the scale is the largest magnitude / 127, the rest is rounded to whole steps of it.
        let mut values: [f32; 32] = std::array::from_fn(|i| i as f32 - 16.0);
        (values[0], values[1], values[2]) = (-127.0, 3.4, 3.6);
        let bytes = blocks(TensorType::Q8_0, &values);
        let codes: Vec<i8> = bytes[2..].iter().map(|&byte| byte as i8).collect();
        assert_eq!((&bytes[..2], &codes[..5]), (&ONE[..], &[-127, 3, 4, -13, -12][..]));
        // q4_0: the number of largest magnitude becomes -8 steps, so that 8 makes the scale -1. A code q means q - 8
        // steps. The first half of the numbers is in the low halves of 16 bytes, the second in the high halves.
        let values: [f32; 32] = std::array::from_fn(|i| if i == 0 { 8.0 } else { i as f32 / 4.0 - 4.0 });
        let bytes = blocks(TensorType::Q4_0, &values);
        assert_eq!(bytes[..2], [0x00, 0xbc]);
        let (first, second) = (bytes[2] & 0xf, bytes[2] >> 4);
        assert_eq!((first, second), (0, 8), "8 is -8 steps of -1, and 0 is 0 steps");
        assert_eq!((bytes[6] & 0xf, bytes[6] >> 4), (11, 7), "-3 and 1 in steps of -1, plus 8");
        // q4_1: a minimum, and 15 steps to the maximum.
        let values: [f32; 32] = std::array::from_fn(|i| -0.5 + (i % 16) as f32);
        let nibbles: Vec<u8> = (0..16).map(|i| i << 4 | i).collect();
        assert_eq!(blocks(TensorType::Q4_1, &values), [&ONE[..], &MINUS_HALF, &nibbles].concat());
    }

    #[test]
    fn rows_one_by_one_give_the_same_blocks_as_together() {
        let values: Vec<f32> = (0..512).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 300.0).collect();
        for tensor_type in [TensorType::F16, TensorType::Q5_1, TensorType::Q4_K, TensorType::IQ4_XS] {
            let together = quantize(tensor_type, &values, 256).unwrap();
            let rows = values.chunks(256).flat_map(|row| quantize(tensor_type, row, 256).unwrap());
            assert_eq!(together, rows.collect::<Vec<u8>>(), "{tensor_type}");
            let mut read = vec![0.0; values.len()];
            dequantize(tensor_type, &together, &mut read).unwrap();
            let worst = read.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 0.25, "{tensor_type}: {worst}");
        }
    }

    #[test]
    fn rejects_types_that_need_an_importance_matrix_or_are_not_weights() {
        for &tensor_type in TensorType::ALL {
            let n = tensor_type.block_len() as usize;
            let values = vec![0.25; n];
            match quantize(tensor_type, &values, n) {
                Ok(bytes) => {
                    assert!(tensor_type.is_weight() && !tensor_type.needs_importance_matrix());
                    assert_eq!(bytes.len() as u64, tensor_type.block_bytes());
                }
                Err(reason) => {
                    assert!(!tensor_type.is_weight() || tensor_type.needs_importance_matrix(), "{reason}");
                    assert!(reason.contains(tensor_type.name()), "{reason}");
                }
            }
            // SAFETY: the number is one of ggml's types.
            let asserts = unsafe { sys::ggml_quantize_requires_imatrix(tensor_type.id()) };
            assert!(!asserts || tensor_type.needs_importance_matrix(), "ggml would end the process");
        }
    }

    #[test]
    fn rejects_partial_blocks_and_non_finite_numbers() {
        let refusal = |values: &[f32], n| quantize(TensorType::Q8_0, values, n).unwrap_err();
        assert!(refusal(&[0.0; 33], 33).contains("multiple of 32 numbers, found 33"));
        assert!(refusal(&[0.0; 48], 32).contains("found 48 numbers"));
        assert!(refusal(&[], 0).contains("found 0"));
        let mut values = [0.0; 32];
        values[7] = f32::NAN;
        assert!(refusal(&values, 32).contains("found NaN at element 7"));
        let error = quantize(TensorType::F16, &values, 32).unwrap_err();
        assert!(error.contains("found NaN at element 7"), "{error}");
    }

    #[test]
    fn rejects_numbers_too_large_for_the_type_or_the_scale_of_their_block() {
        let types = TensorType::ALL.iter().filter(|t| t.is_weight() && !t.needs_importance_matrix());
        for &tensor_type in types {
            let mut values = vec![0.25; 2 * tensor_type.block_len() as usize];
            // The largest that is passed to ggml, which must not end the process.
            *values.last_mut().unwrap() = MAX_IN_BLOCK;
            quantize(tensor_type, &values, values.len()).ok();
            *values.last_mut().unwrap() = -1e30;
            match quantize(tensor_type, &values, values.len()) {
                Ok(bytes) => {
                    let mut read = vec![0.0; values.len()];
                    dequantize(tensor_type, &bytes, &mut read).unwrap();
                }
                Err(error) => assert_eq!(error, format!("-1e30 does not fit into type {tensor_type}")),
            }
            let wide = ["f32", "bf16"].contains(&tensor_type.name());
            let scaled = ["f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"].contains(&tensor_type.name());
            let refused = quantize(tensor_type, &values, values.len()).is_err();
            assert!(!wide || !refused, "{tensor_type}");
            assert!(!scaled || refused, "{tensor_type}");
        }
    }
}
