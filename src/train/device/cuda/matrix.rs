//! Frozen matrices on a GPU.

use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result};
use crate::gguf::TensorType;
use crate::train::device::HostMatrix;
use crate::train::device::limits::NO_KERNEL_HINT;
use crate::train::device::name::Frozen;

use crate::train::device::cuda::ffi;
use crate::train::device::cuda::handle::Handle;
use crate::train::device::cuda::memory::Memory;

/// A frozen matrix, `[n_out][n_in]`.
#[derive(Debug)]
pub struct Matrix {
    tensor_type: TensorType,
    /// Numbers per row, I.
    pub n_in: usize,
    /// Rows, O.
    pub n_out: usize,
    frozen: Frozen,
    /// The file's blocks, if products or embeddings read them.
    blocks: Option<Memory>,
    /// The bf16 copy. A table gets it with its first product, since most tables are never multiplied by.
    rounded: OnceLock<Memory>,
}

impl Matrix {
    /// Loads a matrix.
    ///
    /// # Errors
    /// [`Error::Setting`] if the bytes do not match the shape, or no kernel reads the type.
    pub fn new(handle: &Arc<Handle>, matrix: HostMatrix, frozen: Frozen) -> Result<Matrix> {
        let HostMatrix { name, tensor_type, n_in, n_out, bytes, is_table } = matrix;
        let row_bytes = tensor_type.row_bytes(n_in as u64).unwrap_or(0) as usize;
        if row_bytes == 0 || row_bytes.checked_mul(n_out) != Some(bytes.len()) {
            let reason = format!(
                "expected {n_out} rows of {n_in} numbers of type {tensor_type}, found {} bytes",
                bytes.len()
            );
            return Err(Error::setting(name, reason));
        }
        if kernel_block(tensor_type) != Some((tensor_type.block_len(), tensor_type.block_bytes())) {
            let reason = format!("the GPU has no kernel for type {tensor_type}");
            return Err(Error::setting(name, reason).with_hint(NO_KERNEL_HINT));
        }
        let mut made = Matrix {
            tensor_type,
            n_in,
            n_out,
            frozen,
            blocks: Some(Memory::of(handle, &bytes)?),
            rounded: OnceLock::new(),
        };
        if frozen == Frozen::Bf16 && !is_table {
            made.round(handle)?;
            made.blocks = None;
        }
        Ok(made)
    }

    /// The matrix for products; rounds it first if it is to be kept in bf16.
    pub fn multiplied(&self, handle: &Arc<Handle>) -> Result<ffi::detox_cuda_matrix> {
        self.assert_of(handle);
        if self.frozen == Frozen::Bf16 && self.rounded.get().is_none() {
            self.round(handle)?;
        }
        Ok(self.raw())
    }

    /// The matrix for reading rows.
    ///
    /// # Panics
    /// If the matrix was not loaded as a table.
    pub fn read(&self, handle: &Arc<Handle>) -> ffi::detox_cuda_matrix {
        self.assert_of(handle);
        assert!(self.blocks.is_some(), "rows can only be read from a table");
        self.raw()
    }

    #[track_caller]
    fn assert_of(&self, handle: &Arc<Handle>) {
        self.blocks.iter().chain(self.rounded.get()).for_each(|memory| memory.assert_of(handle));
    }

    fn raw(&self) -> ffi::detox_cuda_matrix {
        ffi::detox_cuda_matrix {
            type_: type_id(self.tensor_type),
            n_in: self.n_in as i64,
            n_out: self.n_out as i64,
            blocks: self.blocks.as_ref().map_or(std::ptr::null(), |m| m.address().cast_const()),
            rounded: self.rounded.get().map_or(std::ptr::null(), |m| m.address().cast_const().cast()),
        }
    }

    /// Makes the bf16 copy from the blocks, which belong to `handle`.
    fn round(&self, handle: &Arc<Handle>) -> Result<()> {
        let blocks = self.blocks.as_ref().expect("blocks are kept until they are rounded");
        let n = self.n_in * self.n_out;
        let rounded = Memory::new(handle, 2 * n)?;
        // SAFETY: `blocks` holds whole blocks of n numbers of this type; `rounded` has room for n numbers of two bytes.
        let status = unsafe {
            ffi::detox_cuda_round_blocks(
                handle.raw(),
                type_id(self.tensor_type),
                blocks.address().cast_const(),
                n as i64,
                rounded.address().cast(),
            )
        };
        handle.check(status)?;
        // If another thread was faster, its copy has the same numbers.
        let _ = self.rounded.set(rounded);
        Ok(())
    }
}

/// Numbers and bytes in a block of this type, as the kernels read it; `None` if no kernel does.
pub(super) fn kernel_block(tensor_type: TensorType) -> Option<(u64, u64)> {
    let (mut n_numbers, mut n_bytes) = (0, 0);
    // SAFETY: accepts any number; writes two.
    let status = unsafe { ffi::detox_cuda_block(type_id(tensor_type), &mut n_numbers, &mut n_bytes) };
    (status == ffi::DETOX_CUDA_OK).then_some((n_numbers as u64, n_bytes as u64))
}

/// ggml's number of the type.
fn type_id(tensor_type: TensorType) -> i32 {
    tensor_type.id() as i32
}
