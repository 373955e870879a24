//! Frozen matrices on a GPU.

use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result};
use crate::gguf::TensorType;
use crate::train::device::HostMatrix;
use crate::train::device::limits::NO_KERNEL_HINT;
use crate::train::device::name::Frozen;

use crate::train::device::cuda::ffi;
use crate::train::device::cuda::handle::{Handle, Memory};

/// A frozen matrix, `[n_out][n_in]`.
#[derive(Debug)]
pub struct Matrix {
    tensor_type: TensorType,
    /// Numbers in a row.
    pub n_in: usize,
    /// Rows.
    pub n_out: usize,
    frozen: Frozen,
    /// Kept where products or embeddings need them.
    blocks: Option<Memory>,
    /// Of a table, made by its first product: most tables are never multiplied with.
    rounded: OnceLock<Memory>,
}

impl Matrix {
    /// Takes a matrix to the GPU.
    ///
    /// # Errors
    /// [`Error::Setting`] where its bytes are not those of its shape, or there is no kernel for its type.
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

    /// For products.
    pub fn multiplied(&self, handle: &Arc<Handle>) -> Result<ffi::detox_cuda_matrix> {
        self.assert_of(handle);
        if self.frozen == Frozen::Bf16 && self.rounded.get().is_none() {
            self.round(handle)?;
        }
        Ok(self.raw())
    }

    /// For reading rows.
    ///
    /// # Panics
    /// Where the matrix was not taken as a table.
    pub fn read(&self, handle: &Arc<Handle>) -> ffi::detox_cuda_matrix {
        self.assert_of(handle);
        assert!(self.blocks.is_some(), "rows are read of a matrix that was taken as no table");
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

    /// Makes the copy in bf16 out of the blocks, which `handle` holds.
    fn round(&self, handle: &Arc<Handle>) -> Result<()> {
        let blocks = self.blocks.as_ref().expect("blocks are kept until they are rounded");
        let n = self.n_in * self.n_out;
        let rounded = Memory::new(handle, 2 * n)?;
        // SAFETY: `blocks` holds the blocks of n numbers of this type, whole ones, and `rounded` n numbers of two bytes.
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
        // Another thread may have been faster, with the same numbers.
        let _ = self.rounded.set(rounded);
        Ok(())
    }
}

/// Numbers and bytes of a block of this type as the kernels read it; none where no kernel does.
pub(super) fn kernel_block(tensor_type: TensorType) -> Option<(u64, u64)> {
    let (mut n_numbers, mut n_bytes) = (0, 0);
    // SAFETY: takes any number, and writes two.
    let status = unsafe { ffi::detox_cuda_block(type_id(tensor_type), &mut n_numbers, &mut n_bytes) };
    (status == ffi::DETOX_CUDA_OK).then_some((n_numbers as u64, n_bytes as u64))
}

/// ggml's number.
fn type_id(tensor_type: TensorType) -> i32 {
    tensor_type.id() as i32
}
