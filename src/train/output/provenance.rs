//! Metadata that every written file shares: where it came from.

use crate::gguf::{GgufFile, Metadata, Value};

/// The base's metadata for a copy of it in one file: without `split.*`, and without the keys in `drop`.
pub fn copy_of(base: &GgufFile, drop: &[&str]) -> Metadata {
    let mut metadata = Metadata::new();
    metadata.copy_from(base.metadata(), |key| !key.starts_with("split.") && !drop.contains(&key));
    metadata
}

/// Records the version of this program.
pub fn set_version(metadata: &mut Metadata) {
    metadata.set("detox_gguf.version", Value::Str(crate::version().into()));
}

/// Adds `provenance`, which replaces keys already there.
pub fn add(provenance: &Metadata, metadata: &mut Metadata) {
    metadata.copy_from(provenance, |_| true);
}
