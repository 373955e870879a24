//! Typed access to metadata, and the model's hyperparameters under llama.cpp's names.

use std::borrow::Cow;
use std::collections::HashMap;

use super::file_type::{file_type_name, guessed_name};
use super::read::GgufFile;
use super::validate::refuse;
use super::{Array, Strings, Value};
use crate::error::{Error, Result};

/// The most layers a model has (`LLAMA_MAX_LAYERS` in `llama-hparams.h`).
pub(super) const MAX_LAYERS: u32 = 512;

/// The widest residual stream. Our limit, 64 times that of the widest model known.
pub(super) const MAX_EMBD: u32 = 1 << 20;

/// The most neurons in an FFN. Our limit, 256 times that of the largest model known.
pub(super) const MAX_FF: u32 = 1 << 24;

/// A Rust type that a metadata value of one type converts to.
trait FromValue<'a>: Sized {
    /// The expected type, for error messages.
    const EXPECTED: &'static str;
    fn from_value(value: &'a Value) -> Option<Self>;
}

macro_rules! from_value {
    ($rust:ty, $expected:literal, $pattern:pat => $result:expr) => {
        impl<'a> FromValue<'a> for $rust {
            const EXPECTED: &'static str = $expected;
            fn from_value(value: &'a Value) -> Option<Self> {
                match value {
                    $pattern => Some($result),
                    _ => None,
                }
            }
        }
    };
}
from_value!(u32, "u32", Value::U32(v) => *v);
from_value!(i32, "i32", Value::I32(v) => *v);
from_value!(f32, "f32", Value::F32(v) => *v);
from_value!(bool, "bool", Value::Bool(v) => *v);
from_value!(&'a str, "str", Value::Str(v) => v);
from_value!(&'a Array, "arr", Value::Array(v) => v);

impl<'a> FromValue<'a> for &'a Strings {
    const EXPECTED: &'static str = "arr of str";
    fn from_value(value: &'a Value) -> Option<Self> {
        <&Array>::from_value(value)?.strings()
    }
}

/// Metadata values by key. Getters named `…_if_present` return `None` for a missing key; the others fail.
///
/// Types must match exactly. llama.cpp too refuses a u64 if it expects a u32.
impl GgufFile {
    fn find<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        T::from_value(value).map(Some).ok_or_else(|| {
            refuse(self.path(), format!("key {key:?}: expected {}, found {}", T::EXPECTED, value.describe()))
        })
    }

    fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.find(key)?.ok_or_else(|| {
            refuse(
                self.path(),
                format!("key {key:?}: expected {}, but the file has no such key", T::EXPECTED),
            )
        })
    }

    /// The u32 under `key`.
    ///
    /// # Errors
    /// [`crate::Error::Gguf`] if the key is missing or has another type. The same holds for every getter below.
    pub fn u32(&self, key: &str) -> Result<u32> {
        self.require(key)
    }

    /// The u32 under `key`, if present.
    ///
    /// # Errors
    /// [`crate::Error::Gguf`] if the key has another type. The same holds for every `…_if_present`.
    pub fn u32_if_present(&self, key: &str) -> Result<Option<u32>> {
        self.find(key)
    }

    /// The i32 under `key`.
    ///
    /// # Errors
    /// Same as [`GgufFile::u32`].
    pub fn i32(&self, key: &str) -> Result<i32> {
        self.require(key)
    }

    /// The integer under `key`, of any width and sign: some keys are i32 from one converter and u32 from another.
    ///
    /// # Errors
    /// Same as [`GgufFile::u32`]; also if a u64 exceeds `i64::MAX`.
    pub fn integer(&self, key: &str) -> Result<i64> {
        let found = self.metadata.get(key);
        found.and_then(Value::as_integer).and_then(|v| i64::try_from(v).ok()).ok_or_else(|| {
            let found = found.map_or("nothing".into(), Value::describe);
            refuse(self.path(), format!("key {key:?}: expected an integer, found {found}"))
        })
    }

    /// The f32 under `key`.
    ///
    /// # Errors
    /// Same as [`GgufFile::u32`].
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.require(key)
    }

    /// The f32 under `key`, if present.
    ///
    /// # Errors
    /// Same as [`GgufFile::u32_if_present`].
    pub fn f32_if_present(&self, key: &str) -> Result<Option<f32>> {
        self.find(key)
    }

    /// The bool under `key`.
    ///
    /// # Errors
    /// Same as [`GgufFile::u32`].
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.require(key)
    }

    /// The bool under `key`, if present.
    ///
    /// # Errors
    /// Same as [`GgufFile::u32_if_present`].
    pub fn bool_if_present(&self, key: &str) -> Result<Option<bool>> {
        self.find(key)
    }

    /// The string under `key`.
    ///
    /// # Errors
    /// Same as [`GgufFile::u32`].
    pub fn str(&self, key: &str) -> Result<&str> {
        self.require(key)
    }

    /// The string under `key`, if present.
    ///
    /// # Errors
    /// Same as [`GgufFile::u32_if_present`].
    pub fn str_if_present(&self, key: &str) -> Result<Option<&str>> {
        self.find(key)
    }

    /// The array under `key`.
    ///
    /// # Errors
    /// Same as [`GgufFile::u32`].
    pub fn array(&self, key: &str) -> Result<&Array> {
        self.require(key)
    }

    /// The array of strings under `key`.
    ///
    /// # Errors
    /// Same as [`GgufFile::u32`].
    pub fn strings(&self, key: &str) -> Result<&Strings> {
        self.require(key)
    }
}

/// Hyperparameters. Keys of the form `{arch}.…` use [`GgufFile::architecture`].
impl GgufFile {
    /// `general.architecture`, such as "llama".
    ///
    /// # Errors
    /// Same as [`GgufFile::u32`]. The same holds for every method below that returns a `Result`.
    pub fn architecture(&self) -> Result<&str> {
        self.str("general.architecture")
    }

    /// The key `{arch}.{name}`.
    ///
    /// # Errors
    /// Same as [`GgufFile::architecture`].
    pub fn arch_key(&self, name: &str) -> Result<String> {
        Ok(format!("{}.{name}", self.architecture()?))
    }

    fn arch_u32(&self, name: &str) -> Result<u32> {
        self.u32(&self.arch_key(name)?)
    }

    /// `general.name`, if present. Invalid UTF-8 becomes U+FFFD.
    pub fn model_name(&self) -> Option<Cow<'_, str>> {
        self.metadata.get("general.name").and_then(Value::as_text)
    }

    /// The u32 under `{arch}.{name}`, capped so that a damaged number can be counted to.
    fn arch_count(&self, name: &str, range: std::ops::RangeInclusive<u32>) -> Result<u32> {
        let found = self.arch_u32(name)?;
        if range.contains(&found) {
            return Ok(found);
        }
        let key = self.arch_key(name)?;
        let (min, max) = (range.start(), range.end());
        Err(Error::model(
            self.path(),
            format!("key {key:?}: expected a number from {min} to {max}, found {found}"),
        ))
    }

    /// The number of blocks, `{arch}.block_count`: 1 to 512, as in llama.cpp.
    ///
    /// # Errors
    /// Same as [`GgufFile::architecture`]; [`crate::Error::Model`] if it is out of range.
    pub fn n_layer(&self) -> Result<u32> {
        self.arch_count("block_count", 1..=MAX_LAYERS)
    }

    /// Width of the residual stream, `{arch}.embedding_length`.
    ///
    /// # Errors
    /// Same as [`GgufFile::n_layer`].
    pub fn n_embd(&self) -> Result<u32> {
        self.arch_count("embedding_length", 1..=MAX_EMBD)
    }

    /// Context length in training, in tokens, `{arch}.context_length`.
    ///
    /// # Errors
    /// Same as [`GgufFile::architecture`].
    pub fn n_ctx_train(&self) -> Result<u32> {
        self.arch_u32("context_length")
    }

    /// Neurons per FFN, `{arch}.feed_forward_length`, if it is the same in all layers.
    ///
    /// # Errors
    /// Same as [`GgufFile::architecture`]; also if layers differ. Then use [`GgufFile::n_ff_per_layer`].
    pub fn n_ff(&self) -> Result<u32> {
        self.same_in_all_layers("feed_forward_length", &self.n_ff_per_layer()?)
    }

    /// Neurons in the FFN of each layer, shape `[n_layer]`.
    ///
    /// # Errors
    /// Same as [`GgufFile::architecture`].
    pub fn n_ff_per_layer(&self) -> Result<Vec<u32>> {
        let n_ff = self.per_layer("feed_forward_length")?;
        match n_ff.iter().find(|&&n| n > MAX_FF) {
            None => Ok(n_ff),
            Some(n) => {
                let key = self.arch_key("feed_forward_length")?;
                let reason = format!("key {key:?}: expected at most {MAX_FF} neurons, found {n}");
                Err(Error::model(self.path(), reason))
            }
        }
    }

    /// Attention heads, `{arch}.attention.head_count`, if the number is the same in all layers.
    ///
    /// # Errors
    /// Same as [`GgufFile::n_ff`].
    pub fn n_head(&self) -> Result<u32> {
        self.same_in_all_layers("attention.head_count", &self.n_head_per_layer()?)
    }

    /// Attention heads of each layer, shape `[n_layer]`.
    ///
    /// # Errors
    /// Same as [`GgufFile::architecture`].
    pub fn n_head_per_layer(&self) -> Result<Vec<u32>> {
        self.per_layer("attention.head_count")
    }

    /// Key and value heads, `{arch}.attention.head_count_kv`, if the number is the same in all layers.
    /// Defaults to [`GgufFile::n_head`] if the key is absent.
    ///
    /// # Errors
    /// Same as [`GgufFile::n_ff`].
    pub fn n_head_kv(&self) -> Result<u32> {
        self.same_in_all_layers("attention.head_count_kv", &self.n_head_kv_per_layer()?)
    }

    /// Key and value heads of each layer, shape `[n_layer]`.
    /// Defaults to [`GgufFile::n_head_per_layer`] if the key is absent.
    ///
    /// # Errors
    /// Same as [`GgufFile::architecture`].
    pub fn n_head_kv_per_layer(&self) -> Result<Vec<u32>> {
        let name = "attention.head_count_kv";
        if self.metadata.get(&self.arch_key(name)?).is_none() {
            return self.n_head_per_layer();
        }
        self.per_layer(name)
    }

    /// Reads one number for all layers, or an array with one per layer, like llama.cpp's `get_key_or_arr`.
    fn per_layer(&self, name: &str) -> Result<Vec<u32>> {
        let n_layer = self.n_layer()? as usize;
        let key = self.arch_key(name)?;
        let fault = |found: String| {
            refuse(
                self.path(),
                format!("key {key:?}: expected u32, or an array of {n_layer} of them, found {found}"),
            )
        };
        match self.metadata.get(&key) {
            Some(&Value::U32(n)) => Ok(vec![n; n_layer]),
            Some(Value::Array(array)) if array.len() == n_layer => array
                .to_i64s()
                .and_then(|values| values.into_iter().map(|v| u32::try_from(v).ok()).collect())
                .ok_or_else(|| {
                    fault(format!(
                        "{} with other values",
                        self.metadata.get(&key).map_or(String::new(), Value::describe)
                    ))
                }),
            Some(other) => Err(fault(other.describe())),
            None => Err(fault("nothing".into())),
        }
    }

    fn same_in_all_layers(&self, name: &str, values: &[u32]) -> Result<u32> {
        match values {
            [first, rest @ ..] if rest.iter().all(|v| v == first) => Ok(*first),
            _ => {
                let key = self.arch_key(name)?;
                let reason = format!("key {key:?}: expected one number for all layers, found {values:?}");
                Err(refuse(self.path(), reason))
            }
        }
    }

    /// The vocabulary, `tokenizer.ggml.tokens`, in the tokenizer's spelling (not plain text), shape `[n_vocab]`.
    ///
    /// # Errors
    /// Same as [`GgufFile::u32`].
    pub fn tokens(&self) -> Result<&Strings> {
        self.strings("tokenizer.ggml.tokens")
    }

    /// The number of tokens in the vocabulary.
    ///
    /// # Errors
    /// Same as [`GgufFile::tokens`].
    pub fn n_vocab(&self) -> Result<u32> {
        let n = self.tokens()?.len();
        u32::try_from(n).map_err(|_| {
            refuse(self.path(), format!("key \"tokenizer.ggml.tokens\": {n} tokens exceed 2^32"))
        })
    }

    /// The kind of tokenizer, `tokenizer.ggml.model`: "llama" (SentencePiece), "gpt2" (byte-level BPE), …
    ///
    /// # Errors
    /// Same as [`GgufFile::u32`].
    pub fn tokenizer_model(&self) -> Result<&str> {
        self.str("tokenizer.ggml.model")
    }

    /// Number of parameters: the elements of all tensors, like llama.cpp counts them.
    pub fn n_params(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.n_elements()).fold(0, u64::saturating_add)
    }

    /// The quantisation as `llama-quantize` spells it (`Q4_K_M`), from `general.file_type`.
    ///
    /// If that is absent, "(guessed) " and the most common tensor type, like llama.cpp.
    pub fn quant(&self) -> String {
        if let Some(&Value::U32(id)) = self.metadata.get("general.file_type") {
            return file_type_name(id).map_or_else(|| format!("unknown file type {id}"), str::to_owned);
        }
        let mut counts = HashMap::new();
        for tensor in &self.tensors {
            *counts.entry(tensor.tensor_type()).or_insert(0usize) += 1;
        }
        // On a tie the lower type number wins, so that the result does not depend on the hash order.
        match counts.into_iter().max_by_key(|(t, n)| (*n, std::cmp::Reverse(t.id()))) {
            Some((most_common, _)) => format!("(guessed) {}", guessed_name(most_common)),
            None => "no tensors".into(),
        }
    }
}
