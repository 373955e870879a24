//! File types: the quantisation of a whole file, under its usual name.

use super::TensorType;

/// The name `llama-quantize` uses for file type `id` (`enum llama_ftype` in `llama.h`), such as `Q4_K_M`.
/// `None` if the number is unknown or was removed.
pub fn file_type_name(id: u32) -> Option<&'static str> {
    Some(match id {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        19 => "IQ2_XXS",
        20 => "IQ2_XS",
        21 => "Q2_K_S",
        22 => "IQ3_XS",
        23 => "IQ3_XXS",
        24 => "IQ1_S",
        25 => "IQ4_NL",
        26 => "IQ3_S",
        27 => "IQ3_M",
        28 => "IQ2_S",
        29 => "IQ2_M",
        30 => "IQ4_XS",
        31 => "IQ1_M",
        32 => "BF16",
        36 => "TQ1_0",
        37 => "TQ2_0",
        38 => "MXFP4_MOE",
        39 => "NVFP4",
        40 => "Q1_0",
        41 => "Q2_0",
        _ => return None,
    })
}

/// The file type llama.cpp guesses from the most common tensor type if `general.file_type` is absent.
pub(super) fn guessed_name(most_common: TensorType) -> String {
    match most_common {
        TensorType::Q3_K => "Q3_K_M".into(),
        TensorType::Q4_K => "Q4_K_M".into(),
        TensorType::Q5_K => "Q5_K_M".into(),
        other => other.name().to_ascii_uppercase(),
    }
}
