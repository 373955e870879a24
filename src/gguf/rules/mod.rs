//! What llama.cpp asserts between loading a model and its first decode, as tables of rules.
//!
//! A broken rule would end the process without a message. Here it is an error that names the key or tensor.
//!
//! | file | rules |
//! |---|---|
//! | `keys` | type and range of single keys, of any architecture |
//! | `tokenizer` | the lists and ids of the tokenizer |
//! | `sizes` | the sizes that llama.cpp derives from several keys, with its defaults |
//! | `attention` | relations between heads, their widths and rotated dimensions |
//! | `recurrent` | relations between the sizes of recurrent layers |
//! | `windows` | the window of attention, and its pattern |
//! | `single` | keys that one architecture asserts about |
//! | `shapes` | the tensors of the architectures that this program supports by name |
//! | `types` | storage types of tensors |
//!
//! Rules follow the llama.cpp in use (llama-cpp-sys-2 0.1.161). Absent keys have llama.cpp's defaults.
//! `scripts/mutate_models.py` damages models and looks for a rule that is missing.

mod attention;
mod keys;
mod recurrent;
mod shapes;
mod single;
mod sizes;
mod tokenizer;
mod types;
mod windows;

#[cfg(feature = "engine")]
pub(super) use shapes::unexpected;

use super::read::GgufFile;
use super::{Array, Value};
use crate::error::{Error, Result};

/// Checks the rules of single keys, and those of the tokenizer.
pub(super) fn check_keys(file: &GgufFile) -> Result<()> {
    let arch = file.architecture()?;
    let prefix = format!("{arch}.");
    if !file.metadata.iter().any(|(key, _)| key.starts_with(&prefix)) {
        let key = "general.architecture";
        return Err(wrong_key(
            file,
            key,
            "the architecture that the other keys begin with",
            shown(file, key),
        ));
    }
    tokenizer::check(file)?;
    keys::check(file)
}

/// Checks the rules of the tokenizer alone.
#[cfg(feature = "engine")]
pub(super) fn check_tokenizer(file: &GgufFile) -> Result<()> {
    tokenizer::check(file)
}

/// Checks the rules of several keys and of tensors. [`check_keys`] comes first.
pub(super) fn check_sizes(file: &GgufFile) -> Result<()> {
    check_layers(file)?;
    let sizes = sizes::Sizes::read(file)?;
    shapes::check_outer(file, &sizes)?;
    attention::check(file, &sizes)?;
    windows::check(file)?;
    single::check(file, &sizes)?;
    recurrent::check(file, &sizes)?;
    types::check(file)?;
    shapes::check(file, &sizes)
}

/// Checks that `block_count` is the number of layers that have tensors. Layers that predict more tokens may have none.
fn check_layers(file: &GgufFile) -> Result<()> {
    let layer = |name: &str| name.strip_prefix("blk.")?.split_once('.')?.0.parse::<u32>().ok();
    let last = file.tensors().iter().filter_map(|tensor| layer(tensor.name())).max();
    let n_with_tensors = last.map_or(0, |last| last.saturating_add(1));
    let n_nextn = file.u32_if_present(&file.arch_key("nextn_predict_layers")?)?.unwrap_or(0);
    let n_layer = file.n_layer()?;
    if (n_layer - n_nextn..=n_layer).contains(&n_with_tensors) {
        return Ok(());
    }
    let expected = format!("{n_with_tensors}, the number of layers that have tensors");
    Err(wrong_key(file, &file.arch_key("block_count")?, &expected, n_layer))
}

/// The error for a key.
fn wrong_key(file: &GgufFile, key: &str, expected: &str, found: impl std::fmt::Display) -> Error {
    Error::model(file.path(), format!("key {key:?}: expected {expected}, found {found}"))
}

/// The error for a tensor.
fn wrong_tensor(file: &GgufFile, name: &str, expected: &str, found: impl std::fmt::Display) -> Error {
    Error::model(file.path(), format!("tensor {name:?}: expected {expected}, found {found}"))
}

/// The value under `key` for messages: a number or text itself, the length and type of an array.
fn shown(file: &GgufFile, key: &str) -> String {
    match file.metadata.get(key) {
        None => "nothing".into(),
        Some(Value::F32(v)) => v.to_string(),
        Some(Value::Bool(v)) => v.to_string(),
        Some(Value::Array(array)) => shown_array(array),
        Some(value) => match (value.as_integer(), value.as_text()) {
            (Some(n), _) => n.to_string(),
            (None, Some(text)) => format!("{:?}", text.chars().take(60).collect::<String>()),
            (None, None) => value.describe(),
        },
    }
}

fn shown_array(array: &Array) -> String {
    match array.to_i64s() {
        Some(values) if values.len() <= 16 => format!("{values:?}"),
        _ => format!("an array of {} {}", array.len(), array.element_type()),
    }
}
