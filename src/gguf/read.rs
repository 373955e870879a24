//! [`GgufFile`]: an open, validated GGUF file.

use std::collections::HashMap;
use std::path::Path;

use super::Metadata;
use super::cursor::read_exact_at;
use super::split;
use super::tensor::TensorInfo;
use super::validate::{Part, validate};
use super::watched::{self, ModelFiles};
use crate::error::{Error, Result};

/// A validated GGUF file, or all files of a split model.
///
/// Holds the metadata, the tensor list and the open files. Tensor data stays on disk until it is read.
#[derive(Debug)]
pub struct GgufFile {
    pub(super) parts: Vec<Part>,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) tensor_index: HashMap<String, usize>,
}

impl GgufFile {
    /// Opens `path` and validates its header. If it is the first part of a split model, opens all parts.
    ///
    /// # Errors
    /// - [`Error::Io`] if a file cannot be read.
    /// - [`Error::Gguf`] if a file is not GGUF, or is damaged or truncated. The reason names the key or tensor.
    /// - [`Error::Input`] if it is a folder, pipe or device, or a part of a split model under a wrong name.
    /// - [`Error::Model`] if it is a later part of a split model. The hint names the first part.
    pub fn open(path: impl AsRef<Path>) -> Result<GgufFile> {
        let split::Parts { parts, metadata, tensors } = split::open_other_parts(validate(path.as_ref())?)?;
        let tensor_index = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        // Adapters, probes and checkpoints may be written and opened again by the same command; models are not.
        if tensors.iter().any(|t| t.name == "token_embd.weight") {
            parts.iter().try_for_each(|part| watched::check_held(&part.watched))?;
        }
        Ok(GgufFile { parts, metadata, tensors, tensor_index })
    }

    /// Its open files, to hash them and to notice changes.
    pub fn files(&self) -> ModelFiles {
        ModelFiles(self.parts.iter().map(|part| part.watched.clone()).collect())
    }

    /// The path passed to [`GgufFile::open`].
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// The paths of all parts in order; one path if the model is not split.
    pub fn part_paths(&self) -> impl ExactSizeIterator<Item = &Path> + '_ {
        self.parts.iter().map(|part| part.path.as_path())
    }

    /// The format version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.parts[0].version
    }

    /// Alignment of the tensor data in bytes, a power of two.
    pub fn alignment(&self) -> u64 {
        self.parts[0].alignment
    }

    /// Size on disk in bytes, all parts together.
    pub fn n_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.len).sum()
    }

    /// The metadata of the file; of the first part if the model is split.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors of all parts in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Looks up a tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensor_index.get(name).map(|&i| &self.tensors[i])
    }

    /// Reads all `tensor.n_bytes()` bytes of a tensor.
    ///
    /// # Errors
    /// Same as [`GgufFile::read_tensor_at`].
    pub fn read_tensor(&self, tensor: &TensorInfo) -> Result<Vec<u8>> {
        let mut bytes = vec![0; tensor.n_bytes as usize];
        self.read_tensor_at(tensor, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `bytes` with `tensor`'s data, starting `offset` bytes into the tensor. Safe to call from several threads.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::Input`] if it was changed since it was opened.
    ///
    /// # Panics
    /// If `offset + bytes.len()` exceeds the tensor, or `tensor` is not one of [`GgufFile::tensors`].
    pub fn read_tensor_at(&self, tensor: &TensorInfo, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        assert!(
            end.is_some_and(|end| end <= tensor.n_bytes),
            "read past the end of tensor {:?}",
            tensor.name
        );
        let part = &self.parts[tensor.part];
        let read = read_exact_at(&part.file, bytes, tensor.offset + offset);
        // Checked first: a truncated file is a changed one.
        part.watched.check_content()?;
        read.map_err(Error::io("read", &part.path))
    }

    /// Checks that every path still leads to the file that was validated, and that none has changed.
    ///
    /// # Errors
    /// [`Error::Input`] if a file changed, [`Error::Io`] if one is gone.
    pub fn check_unchanged(&self) -> Result<()> {
        self.files().check_paths()
    }
}

/// The sha256 of the model at `path`: see [`super::ModelFiles::sha256`].
///
/// # Errors
/// Same as [`GgufFile::open`] and [`super::ModelFiles::sha256`].
pub fn model_sha256(path: impl AsRef<Path>, progress: impl FnMut(u64, u64)) -> Result<String> {
    GgufFile::open(path)?.files().sha256(progress)
}
