//! Metadata: typed values under string keys, in file order.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

/// The type of a metadata value, numbered like `enum gguf_type` in `gguf.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are self-explanatory")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    Str = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// The type with this number. `None` if no version of the format uses the number.
    pub fn from_id(id: u32) -> Option<ValueType> {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, Str, Array, U64, I64, F64].get(id as usize).copied()
    }

    /// The number that stands for this type in a file.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The name llama.cpp prints (`gguf_type_name`).
    pub fn name(self) -> &'static str {
        ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64"]
            [self as usize]
    }

    /// Bytes per value. `None` for strings and arrays, which have no fixed size.
    pub fn size_bytes(self) -> Option<usize> {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            Str | Array => None,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names are self-explanatory")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(String),
    /// A string that is not UTF-8. Only reading makes one: valid UTF-8 is always [`Value::Str`].
    Bytes(Vec<u8>),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// The type of this value.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::Str(_) | Value::Bytes(_) => ValueType::Str,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The number, if this is an integer of any width.
    pub fn as_integer(&self) -> Option<i128> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::I8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::I16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::I32(v) => Some(v.into()),
            Value::U64(v) => Some(v.into()),
            Value::I64(v) => Some(v.into()),
            _ => None,
        }
    }

    /// A string from its bytes in a file.
    pub(super) fn from_bytes(bytes: Vec<u8>) -> Value {
        String::from_utf8(bytes).map_or_else(|error| Value::Bytes(error.into_bytes()), Value::Str)
    }

    /// The text, if this is a string. Invalid UTF-8 becomes U+FFFD.
    pub fn as_text(&self) -> Option<Cow<'_, str>> {
        match self {
            Value::Str(text) => Some(Cow::Borrowed(text)),
            Value::Bytes(bytes) => Some(String::from_utf8_lossy(bytes)),
            _ => None,
        }
    }

    /// Describes the type for messages, with the length and element type of an array: "arr of 5 str".
    pub fn describe(&self) -> String {
        match self {
            Value::Bytes(_) => "a str that is not UTF-8".to_owned(),
            Value::Array(array) => format!("arr of {} {}", array.len(), array.element_type()),
            other => other.value_type().name().to_owned(),
        }
    }
}

/// An array of scalars or strings. Arrays of arrays are refused, because llama.cpp does not load them.
#[derive(Clone, PartialEq)]
pub struct Array(Repr);

#[derive(Clone, PartialEq)]
enum Repr {
    /// Little-endian bytes as in the file, for every element type.
    Scalars {
        element: ValueType,
        bytes: Vec<u8>,
    },
    Strings(Strings),
}

impl Array {
    /// An array of scalars from little-endian bytes. `None` if the length or a boolean is invalid for the type.
    pub(super) fn from_le_bytes(element: ValueType, bytes: Vec<u8>) -> Option<Array> {
        let size = element.size_bytes()?;
        let valid =
            bytes.len().is_multiple_of(size) && (element != ValueType::Bool || bytes.iter().all(|&b| b <= 1));
        valid.then_some(Array(Repr::Scalars { element, bytes }))
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        match &self.0 {
            Repr::Scalars { element, bytes } => bytes.len() / element.size_bytes().unwrap_or(1),
            Repr::Strings(strings) => strings.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type of every element.
    pub fn element_type(&self) -> ValueType {
        match &self.0 {
            Repr::Scalars { element, .. } => *element,
            Repr::Strings(_) => ValueType::Str,
        }
    }

    /// The strings, if this is an array of strings.
    pub fn strings(&self) -> Option<&Strings> {
        match &self.0 {
            Repr::Strings(strings) => Some(strings),
            Repr::Scalars { .. } => None,
        }
    }

    /// The elements as little-endian bytes, if this is an array of scalars.
    pub fn le_bytes(&self) -> Option<&[u8]> {
        match &self.0 {
            Repr::Scalars { bytes, .. } => Some(bytes),
            Repr::Strings(_) => None,
        }
    }

    fn scalars<T, const N: usize>(&self, element: ValueType, from: fn([u8; N]) -> T) -> Option<Vec<T>> {
        match &self.0 {
            Repr::Scalars { element: found, bytes } if *found == element => {
                Some(bytes.as_chunks::<N>().0.iter().map(|&chunk| from(chunk)).collect())
            }
            _ => None,
        }
    }

    /// The elements, if this is an array of f32.
    pub fn to_f32s(&self) -> Option<Vec<f32>> {
        self.scalars(ValueType::F32, f32::from_le_bytes)
    }

    /// The elements, if this is an array of integers, or of booleans as 0 and 1.
    /// Also `None` if a u64 exceeds `i64::MAX`.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        fn widen<T: Into<i64>>(values: Option<Vec<T>>) -> Option<Vec<i64>> {
            Some(values?.into_iter().map(Into::into).collect())
        }
        match self.element_type() {
            ValueType::U8 => widen(self.scalars(ValueType::U8, u8::from_le_bytes)),
            ValueType::Bool => widen(self.scalars(ValueType::Bool, u8::from_le_bytes)),
            ValueType::I8 => widen(self.scalars(ValueType::I8, i8::from_le_bytes)),
            ValueType::U16 => widen(self.scalars(ValueType::U16, u16::from_le_bytes)),
            ValueType::I16 => widen(self.scalars(ValueType::I16, i16::from_le_bytes)),
            ValueType::U32 => widen(self.scalars(ValueType::U32, u32::from_le_bytes)),
            ValueType::I32 => widen(self.scalars(ValueType::I32, i32::from_le_bytes)),
            ValueType::I64 => self.scalars(ValueType::I64, i64::from_le_bytes),
            ValueType::U64 => {
                let values = self.scalars(ValueType::U64, u64::from_le_bytes)?;
                values.into_iter().map(|v| i64::try_from(v).ok()).collect()
            }
            ValueType::F32 | ValueType::F64 | ValueType::Str | ValueType::Array => None,
        }
    }
}

/// The most elements that `Debug` prints, to keep a vocabulary out of panic messages.
const MAX_DEBUG: usize = 8;

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Repr::Strings(strings) => strings.fmt(f),
            Repr::Scalars { element, bytes } => {
                let shown = &bytes[..bytes.len().min(MAX_DEBUG * element.size_bytes().unwrap_or(1))];
                write!(f, "{} {element} {shown:?}", self.len())
            }
        }
    }
}

impl From<Strings> for Array {
    fn from(strings: Strings) -> Array {
        Array(Repr::Strings(strings))
    }
}

impl<S: AsRef<str>> FromIterator<S> for Array {
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Array {
        Array(Repr::Strings(strings.into_iter().collect()))
    }
}

macro_rules! array_from_slice {
    ($($scalar:ty => $element:ident),*) => {$(
        impl From<&[$scalar]> for Array {
            fn from(values: &[$scalar]) -> Array {
                let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                Array(Repr::Scalars { element: ValueType::$element, bytes })
            }
        }
    )*};
}
array_from_slice!(u8 => U8, u16 => U16, u32 => U32, u64 => U64);
array_from_slice!(i8 => I8, i16 => I16, i32 => I32, i64 => I64, f32 => F32, f64 => F64);

/// Many strings in two allocations: a vocabulary of 260,000 tokens does not need 260,000.
///
/// Strings are bytes, as in the file: llama.cpp also loads files whose strings are not UTF-8.
#[derive(Clone, Default, PartialEq)]
pub struct Strings {
    bytes: Vec<u8>,
    /// End of each string in `bytes`.
    ends: Vec<usize>,
}

impl fmt::Debug for Strings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} str {:?}", self.len(), self.iter().take(MAX_DEBUG).collect::<Vec<_>>())
    }
}

impl Strings {
    /// An empty list with room for `n` strings.
    pub(super) fn with_capacity(n: usize) -> Strings {
        Strings { bytes: Vec::new(), ends: Vec::with_capacity(n) }
    }

    /// Appends one string.
    pub fn push(&mut self, string: &str) {
        self.push_bytes(string.as_bytes());
    }

    /// Appends one string, which need not be UTF-8.
    pub fn push_bytes(&mut self, string: &[u8]) {
        self.bytes.extend_from_slice(string);
        self.ends.push(self.bytes.len());
    }

    /// The number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are no strings.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of the string at `index`, from 0.
    pub fn bytes(&self, index: usize) -> Option<&[u8]> {
        let end = *self.ends.get(index)?;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        Some(&self.bytes[start..end])
    }

    /// The string at `index`, from 0. Invalid UTF-8 becomes U+FFFD.
    pub fn get(&self, index: usize) -> Option<Cow<'_, str>> {
        self.bytes(index).map(String::from_utf8_lossy)
    }

    /// The strings in order. Invalid UTF-8 becomes U+FFFD.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Cow<'_, str>> + '_ {
        self.iter_bytes().map(String::from_utf8_lossy)
    }

    /// The bytes of the strings in order.
    pub fn iter_bytes(&self) -> impl ExactSizeIterator<Item = &[u8]> + '_ {
        (0..self.len()).map(|i| self.bytes(i).expect("the index is below len()"))
    }
}

impl<S: AsRef<str>> FromIterator<S> for Strings {
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Strings {
        let mut all = Strings::default();
        strings.into_iter().for_each(|s| all.push(s.as_ref()));
        all
    }
}

/// Keys and values in file order. Each key occurs once.
///
/// A key that is not UTF-8 is kept and written back, but cannot be looked up: [`Metadata::get`] takes text.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<Entry>,
    /// Position of each key that is UTF-8.
    index: HashMap<String, usize>,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    /// With U+FFFD for invalid UTF-8.
    key: String,
    /// The key's bytes, if they are not UTF-8.
    raw: Option<Vec<u8>>,
    value: Value,
}

impl Metadata {
    /// Empty metadata.
    pub fn new() -> Metadata {
        Metadata::default()
    }

    /// The number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of `key`, if present.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].value)
    }

    /// Sets `key` and returns the old value. An existing key keeps its place; a new one goes to the end.
    pub fn set(&mut self, key: impl Into<String>, value: Value) -> Option<Value> {
        let key = key.into();
        if let Some(&i) = self.index.get(&key) {
            return Some(std::mem::replace(&mut self.entries[i].value, value));
        }
        self.index.insert(key.clone(), self.entries.len());
        self.entries.push(Entry { key, raw: None, value });
        None
    }

    /// Sets a key read from a file, which need not be UTF-8, and returns the old value.
    pub(super) fn set_bytes(&mut self, key: Vec<u8>, value: Value) -> Option<Value> {
        let raw = match String::from_utf8(key) {
            Ok(key) => return self.set(key, value),
            Err(error) => error.into_bytes(),
        };
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.raw.as_ref() == Some(&raw)) {
            return Some(std::mem::replace(&mut entry.value, value));
        }
        let key = String::from_utf8_lossy(&raw).into_owned();
        self.entries.push(Entry { key, raw: Some(raw), value });
        None
    }

    /// Copies from `other` the keys that `keep` accepts, with their exact bytes. Keys that are here are replaced.
    pub fn copy_from(&mut self, other: &Metadata, mut keep: impl FnMut(&str) -> bool) {
        for Entry { key, raw, value } in other.entries.iter().filter(|entry| keep(&entry.key)) {
            match raw {
                Some(raw) => self.set_bytes(raw.clone(), value.clone()),
                None => self.set(key.as_str(), value.clone()),
            };
        }
    }

    /// Keys and values in file order. A key that is not UTF-8 is shown with U+FFFD.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> + '_ {
        self.entries.iter().map(|entry| (entry.key.as_str(), &entry.value))
    }

    /// The bytes of each key, with its value, in file order.
    pub(super) fn iter_bytes(&self) -> impl Iterator<Item = (&[u8], &Value)> + '_ {
        self.entries.iter().map(|Entry { key, raw, value }| (raw.as_deref().unwrap_or(key.as_bytes()), value))
    }
}
