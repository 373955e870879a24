//! The window of attention, and the pattern of the layers that have one.

use super::super::Value;
use super::super::read::GgufFile;
use super::{shown, wrong_key};
use crate::error::Result;

/// Architectures that read a pattern and then assert that some layer has a window (`is_swa_any`).
const PATTERNED: &[&str] = &[
    "afmoe",
    "cohere2",
    "cohere2moe",
    "exaone-moe",
    "exaone4",
    "gemma2",
    "gemma3",
    "gemma3n",
    "gemma4",
    "gpt-oss",
    "granite_swa",
    "laguna",
    "llama4",
    "maple",
    "mellum",
    "mimo2",
    "muse-glimmer",
    "olmo2",
    "plamo3",
    "smallthinker",
    "spark2_5",
    "step35",
];

/// Those of [`PATTERNED`] that have a window even without `attention.sliding_window`.
const WINDOW_BY_DEFAULT: &[&str] = &["exaone4", "gemma2", "llama4"];

/// The number of layers of the only exaone4 model with windows.
const EXAONE4_LAYERS: u32 = 64;

/// Checks the window and its pattern.
pub(super) fn check(file: &GgufFile) -> Result<()> {
    let arch = file.architecture()?;
    let n_layer = file.n_layer()?;
    if !PATTERNED.contains(&arch) || arch == "exaone4" && n_layer != EXAONE4_LAYERS {
        return Ok(());
    }
    let key = file.arch_key("attention.sliding_window")?;
    let window = match file.metadata.get(&key) {
        None => WINDOW_BY_DEFAULT.contains(&arch).then_some(1),
        Some(Value::U32(n)) => Some(*n),
        // llama.cpp refuses another type.
        Some(_) => return Ok(()),
    };
    if window == Some(0) && arch == "gemma2" {
        return Err(wrong_key(file, &key, "a u32 above 0", 0));
    }
    check_pattern(file, n_layer, window.is_some_and(|n| n > 0))
}

/// A number is a period: the last layer of each has no window, or the first.
fn check_pattern(file: &GgufFile, n_layer: u32, has_window: bool) -> Result<()> {
    let key = file.arch_key("attention.sliding_window_pattern")?;
    let is_short = |len: usize| len <= n_layer as usize;
    let is_sound = match file.metadata.get(&key) {
        None => true,
        Some(Value::U32(n)) => *n != 1 || !has_window,
        Some(Value::Array(array)) => array.to_i64s().is_some_and(|layers| {
            is_short(layers.len()) && (!has_window || layers.iter().any(|&layer| layer != 0))
        }),
        Some(_) => false,
    };
    if is_sound {
        return Ok(());
    }
    let expected = match has_window {
        true => format!("a u32 other than 1, or an array of at most {n_layer} bool with a true"),
        false => format!("a u32, or an array of at most {n_layer} bool"),
    };
    Err(wrong_key(file, &key, &expected, shown(file, &key)))
}
