//! The trainer's operations on an NVIDIA GPU: the Rust side of the extension in `vendor/cuda`, and its only caller.
//!
//! Products with frozen matrices round both operands to bf16 and sum in f32; products of dense matrices round to TF32.
//! Everything else is f32. Sums are taken in a fixed order, so that the same command gives the same bits.
//!
//! - `ffi` has the raw bindings.
//! - `handle`, `memory`, `rows` and `matrix` own the extension's allocations.
//! - `kinds` turns options into the extension's structs.
//! - `operations` and `optimizer` check shapes and call the extension.

#[cfg(feature = "cuda-emulation")]
pub mod emulation;
mod ffi;
mod handle;
mod kinds;
mod matrix;
mod memory;
mod operations;
mod optimizer;
mod rows;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::error::Result;

use crate::train::device::name::Frozen;

use handle::Handle;
pub use handle::{Properties, count, is_present};
pub use matrix::Matrix;
pub use memory::Buffer;
pub use rows::Rows;

/// A GPU.
#[derive(Debug)]
pub struct Cuda {
    handle: Arc<Handle>,
    properties: Properties,
    frozen: Frozen,
}

impl Cuda {
    /// Opens GPU `ordinal`, counted from 0.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if there is no such GPU, or if it or its driver is too old.
    pub fn open(ordinal: usize, frozen: Frozen) -> Result<Cuda> {
        let handle = Handle::open(ordinal)?;
        let properties = handle.properties()?;
        Ok(Cuda { handle, properties, frozen })
    }

    /// Free bytes and total bytes of its memory.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the driver fails.
    pub fn memory_bytes(&self) -> Result<(u64, u64)> {
        self.handle.memory_bytes()
    }

    /// Sets how frozen matrices loaded from now on are stored.
    pub fn set_frozen(&mut self, frozen: Frozen) {
        self.frozen = frozen;
    }

    /// The driver's name for the GPU.
    pub fn model(&self) -> &str {
        &self.properties.name
    }

    /// The name on the command line, such as `cuda:0`.
    pub fn name(&self) -> String {
        format!("cuda:{}", self.handle.ordinal())
    }

    /// Sets how many bytes of a quantised matrix a product rounds at a time.
    #[cfg(test)]
    fn set_part_bytes(&self, n_bytes: usize) {
        // SAFETY: sets a number of an open device.
        self.check(unsafe { ffi::detox_cuda_set_part(self.raw(), n_bytes) }).unwrap();
    }
}

/// Arguments for the extension's calls. Operands must belong to this GPU.
impl Cuda {
    fn raw(&self) -> *mut ffi::detox_cuda_device {
        self.handle.raw()
    }

    fn check(&self, status: ffi::detox_cuda_status) -> Result<()> {
        self.handle.check(status)
    }

    fn at(&self, buffer: &Buffer) -> *const f32 {
        buffer.assert_of(&self.handle);
        buffer.at()
    }

    fn at_mut(&self, buffer: &mut Buffer) -> *mut f32 {
        buffer.assert_of(&self.handle);
        buffer.at_mut()
    }

    fn address_of(&self, buffer: Option<&Buffer>) -> *const f32 {
        buffer.map_or(std::ptr::null(), |buffer| self.at(buffer))
    }

    fn address_of_mut(&self, buffer: Option<&mut Buffer>) -> *mut f32 {
        buffer.map_or(std::ptr::null_mut(), |buffer| self.at_mut(buffer))
    }

    fn rows_at(&self, rows: &Rows) -> *const ffi::detox_cuda_rows {
        rows.assert_of(&self.handle);
        rows.raw()
    }
}
