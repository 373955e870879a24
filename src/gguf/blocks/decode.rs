//! Dequantises blocks without ggml, for builds that do not include it.
//!
//! The results have the same bits as ggml's; builds with the engine test that. The layouts are those of
//! `ggml-common.h`. In the formulas, `d` and `m` are a block's scale and offset, and `q` is the stored number.

use crate::gguf::TensorType;

/// Numbers in a block of the types with "K" in their names.
const SUPER: usize = 256;

/// The numbers of the sixteen codes of `iq4_nl` and `iq4_xs`.
const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Dequantises one block.
type BlockReader = fn(&[u8], &mut [f32]);

/// The reader of a type; `None` if the type needs ggml.
fn reader(tensor_type: TensorType) -> Option<BlockReader> {
    Some(match tensor_type {
        TensorType::F32 => f32_number,
        TensorType::F16 => |b, y| y[0] = half(b, 0),
        TensorType::BF16 => |b, y| y[0] = f32::from_bits(u32::from(u16_at(b, 0)) << 16),
        TensorType::Q4_0 => q4_0,
        TensorType::Q4_1 => q4_1,
        TensorType::Q5_0 => q5_0,
        TensorType::Q5_1 => q5_1,
        TensorType::Q8_0 => q8_0,
        TensorType::Q2_K => q2_k,
        TensorType::Q3_K => q3_k,
        TensorType::Q4_K => q4_k,
        TensorType::Q5_K => q5_k,
        TensorType::Q6_K => q6_k,
        TensorType::IQ4_NL => iq4_nl,
        TensorType::IQ4_XS => iq4_xs,
        _ => return None,
    })
}

/// Whether the type can be read without ggml.
#[cfg(not(feature = "engine"))]
pub(super) fn knows(tensor_type: TensorType) -> bool {
    reader(tensor_type).is_some()
}

/// Dequantises whole blocks into `values`; the caller has compared the lengths.
///
/// # Errors
/// A message, if the type needs ggml.
pub(super) fn to_numbers(tensor_type: TensorType, bytes: &[u8], values: &mut [f32]) -> Result<(), String> {
    let Some(of_block) = reader(tensor_type) else {
        return Err(format!(
            "numbers of type {tensor_type} cannot be read by this build, which does not include llama.cpp"
        ));
    };
    let (block_bytes, block_len) = (tensor_type.block_bytes() as usize, tensor_type.block_len() as usize);
    for (block, values) in bytes.chunks_exact(block_bytes).zip(values.chunks_exact_mut(block_len)) {
        of_block(block, values);
    }
    Ok(())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The F16 number at byte `at`.
fn half(bytes: &[u8], at: usize) -> f32 {
    let bits = u32::from(u16_at(bytes, at));
    let sign = (bits & 0x8000) << 16;
    let (exponent, fraction) = ((bits >> 10) & 0x1f, bits & 0x3ff);
    match exponent {
        // Zero and subnormal numbers: multiples of 2^-24.
        0 => f32::from_bits(sign | (fraction as f32 / (1 << 24) as f32).to_bits()),
        // Infinity or NaN.
        31 => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 127 - 15) << 23 | fraction << 13),
    }
}

/// `d q + m`, fused if the target has the instruction, as compilers do in ggml.
fn fused(d: f32, q: i32, m: f32) -> f32 {
    if cfg!(target_feature = "fma") { d.mul_add(q as f32, m) } else { d * q as f32 + m }
}

fn low(byte: u8) -> i32 {
    i32::from(byte & 15)
}

fn high(byte: u8) -> i32 {
    i32::from(byte >> 4)
}

fn f32_number(b: &[u8], y: &mut [f32]) {
    y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
}

fn q4_0(b: &[u8], y: &mut [f32]) {
    let d = half(b, 0);
    for (i, &byte) in b[2..18].iter().enumerate() {
        y[i] = d * (low(byte) - 8) as f32;
        y[i + 16] = d * (high(byte) - 8) as f32;
    }
}

fn q4_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (i, &byte) in b[4..20].iter().enumerate() {
        y[i] = fused(d, low(byte), m);
        y[i + 16] = fused(d, high(byte), m);
    }
}

/// The 32 five-bit numbers of a block: four bits each in `nibbles`, the fifth in the bits of `fifths`.
fn five_bits(nibbles: &[u8], fifths: &[u8]) -> [i32; 32] {
    let fifth = |i: usize| i32::from(fifths[i / 8] >> (i % 8) & 1) << 4;
    std::array::from_fn(|i| if i < 16 { low(nibbles[i]) } else { high(nibbles[i - 16]) } | fifth(i))
}

fn q5_0(b: &[u8], y: &mut [f32]) {
    let d = half(b, 0);
    for (y, q) in y.iter_mut().zip(five_bits(&b[6..22], &b[2..6])) {
        *y = d * (q - 16) as f32;
    }
}

fn q5_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (y, q) in y.iter_mut().zip(five_bits(&b[8..24], &b[4..8])) {
        *y = fused(d, q, m);
    }
}

fn q8_0(b: &[u8], y: &mut [f32]) {
    let d = half(b, 0);
    for (y, &q) in y.iter_mut().zip(&b[2..34]) {
        *y = d * f32::from(q as i8);
    }
}

/// Two bits of number `i`: of 128 numbers, number `i` is in byte `i % 32`, and each group of 32 has the next two bits.
fn two_bits(q: &[u8], i: usize) -> i32 {
    i32::from(q[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3)
}

fn q2_k(b: &[u8], y: &mut [f32]) {
    let (scales, q) = (&b[..16], &b[16..80]);
    let (d, m) = (half(b, 80), half(b, 82));
    for (i, y) in y.iter_mut().enumerate() {
        let scale = scales[i / 16];
        *y = fused(d * low(scale) as f32, two_bits(q, i), -(m * high(scale) as f32));
    }
}

fn q3_k(b: &[u8], y: &mut [f32]) {
    let (thirds, q, scales) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half(b, 108);
    for (i, y) in y.iter_mut().enumerate() {
        // Six bits: four from one of the first eight bytes, two from one of the last four.
        let group = i / 16;
        let four = if group < 8 { low(scales[group]) } else { high(scales[group - 8]) };
        let two = i32::from(scales[8 + group % 4] >> (2 * (group / 4)) & 3);
        let scale = (four | two << 4) - 32;
        // The third bit means "do not subtract 4".
        let third = thirds[i % 32] >> (i / 32) & 1;
        *y = d * scale as f32 * (two_bits(q, i) - if third == 1 { 0 } else { 4 }) as f32;
    }
}

/// Scale and offset of one of the eight groups of `q4_K` and `q5_K`, stored as six bits each in twelve bytes.
fn scale_and_offset(scales: &[u8], group: usize) -> (f32, f32) {
    let (scale, offset) = match group {
        0..4 => (scales[group] & 63, scales[group + 4] & 63),
        _ => (
            scales[group + 4] & 15 | scales[group - 4] >> 6 << 4,
            scales[group + 4] >> 4 | scales[group] >> 6 << 4,
        ),
    };
    (f32::from(scale), f32::from(offset))
}

/// Half a byte for number `i`: of 64 numbers, the first 32 are the low halves of 32 bytes, the rest the high halves.
fn half_byte(q: &[u8], i: usize) -> i32 {
    let byte = q[i / 64 * 32 + i % 32];
    if i % 64 < 32 { low(byte) } else { high(byte) }
}

fn q4_k(b: &[u8], y: &mut [f32]) {
    let (d, m, scales, q) = (half(b, 0), half(b, 2), &b[4..16], &b[16..144]);
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = scale_and_offset(scales, group);
        for (i, y) in y.iter_mut().enumerate() {
            *y = fused(d * scale, half_byte(q, 32 * group + i), -(m * offset));
        }
    }
}

fn q5_k(b: &[u8], y: &mut [f32]) {
    let (d, m, scales, fifths, q) = (half(b, 0), half(b, 2), &b[4..16], &b[16..48], &b[48..176]);
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = scale_and_offset(scales, group);
        for (i, y) in y.iter_mut().enumerate() {
            let fifth = i32::from(fifths[i] >> group & 1) << 4;
            *y = fused(d * scale, half_byte(q, 32 * group + i) | fifth, -(m * offset));
        }
    }
}

fn q6_k(b: &[u8], y: &mut [f32]) {
    let (fours, twos, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(b, 208));
    for i in 0..SUPER {
        // Each half of the block has 64 bytes of four-bit and 32 bytes of two-bit codes, for 32 numbers at a time.
        let (part, at, l) = (i / 128, i % 128 / 32, i % 32);
        let byte = fours[part * 64 + at % 2 * 32 + l];
        let four = if at < 2 { low(byte) } else { high(byte) };
        let two = i32::from(twos[part * 32 + l] >> (2 * at) & 3);
        let scale = f32::from(scales[i / 16] as i8);
        y[i] = d * scale * ((four | two << 4) - 32) as f32;
    }
}

fn iq4(code: i32) -> f32 {
    f32::from(IQ4_VALUES[code as usize])
}

fn iq4_nl(b: &[u8], y: &mut [f32]) {
    let d = half(b, 0);
    for (i, &byte) in b[2..18].iter().enumerate() {
        y[i] = d * iq4(low(byte));
        y[i + 16] = d * iq4(high(byte));
    }
}

fn iq4_xs(b: &[u8], y: &mut [f32]) {
    let (d, twos, fours, q) = (half(b, 0), u16_at(b, 2), &b[4..8], &b[8..136]);
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let four = i32::from(fours[group / 2] >> (4 * (group % 2)) & 15);
        let scale = (four | i32::from(twos >> (2 * group) & 3) << 4) - 32;
        let d = d * scale as f32;
        for (i, &byte) in q[16 * group..16 * (group + 1)].iter().enumerate() {
            y[i] = d * iq4(low(byte));
            y[i + 16] = d * iq4(high(byte));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_reads_f16_numbers() {
        for (bits, expected) in [
            (0x3c00u16, 1.0f32),
            (0xb800, -0.5),
            (0x7bff, 65504.0),
            (0x0001, 2f32.powi(-24)),
            (0x83ff, -1023.0 * 2f32.powi(-24)),
            (0x8000, -0.0),
            (0x7c00, f32::INFINITY),
            (0xfc00, f32::NEG_INFINITY),
        ] {
            assert_eq!(half(&bits.to_le_bytes(), 0).to_bits(), expected.to_bits(), "{bits:#x}");
        }
        assert!(half(&0x7e01u16.to_le_bytes(), 0).is_nan());
    }

    #[test]
    fn rejects_types_that_need_ggml_by_name() {
        let error = to_numbers(TensorType::IQ2_XXS, &[0; 66], &mut [0.0; 256]).unwrap_err();
        assert!(error.contains("iq2_xxs"), "{error}");
    }

    /// The types that can be read both ways.
    #[cfg(feature = "engine")]
    const TYPES: [TensorType; 15] = {
        use TensorType::*;
        [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS]
    };

    #[cfg(feature = "engine")]
    #[test]
    fn random_blocks_give_the_same_bits_as_ggml() {
        use rand_chacha::ChaCha8Rng;
        use rand_core::{Rng, SeedableRng};

        let mut random = ChaCha8Rng::seed_from_u64(5);
        for tensor_type in TYPES {
            // Random bytes include scales that are infinite or NaN.
            let n_blocks = 2000;
            let mut bytes = vec![0u8; n_blocks * tensor_type.block_bytes() as usize];
            random.fill_bytes(&mut bytes);
            let mut expected = vec![0f32; n_blocks * tensor_type.block_len() as usize];
            let mut found = expected.clone();
            super::super::dequantize_raw(tensor_type, &bytes, &mut expected).unwrap();
            to_numbers(tensor_type, &bytes, &mut found).unwrap();
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let is_equal = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                assert!(is_equal, "{tensor_type}, number {i}: expected {expected:e}, found {found:e}");
            }
        }
    }
}
