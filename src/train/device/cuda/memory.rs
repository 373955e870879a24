//! Memory of a GPU, owned.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::Result;

use crate::train::device::cuda::ffi;
use crate::train::device::cuda::handle::{Handle, assert_same};

/// Bytes on a GPU.
#[derive(Debug)]
pub struct Memory {
    handle: Arc<Handle>,
    at: NonNull<c_void>,
    n_bytes: usize,
}

// SAFETY: an address on the GPU that the host never dereferences; the calls that use it take turns.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Allocates `n_bytes` uninitialised bytes.
    pub fn new(handle: &Arc<Handle>, n_bytes: usize) -> Result<Memory> {
        let mut at = std::ptr::null_mut();
        // SAFETY: the device is open; writes one pointer.
        handle.check(unsafe { ffi::detox_cuda_allocate(handle.raw(), n_bytes, &mut at) })?;
        let at = NonNull::new(at).expect("a successful allocation has an address");
        Ok(Memory { handle: handle.clone(), at, n_bytes })
    }

    /// Copies `bytes` to the GPU.
    pub fn of(handle: &Arc<Handle>, bytes: &[u8]) -> Result<Memory> {
        let memory = Memory::new(handle, bytes.len())?;
        memory.write_bytes(bytes)?;
        Ok(memory)
    }

    /// Panics if it belongs to another handle.
    #[track_caller]
    pub fn assert_of(&self, handle: &Arc<Handle>) {
        assert_same(&self.handle, handle);
    }

    /// Its address on the GPU.
    pub fn address(&self) -> *mut c_void {
        self.at.as_ptr()
    }

    /// Overwrites it with `bytes`, of the same length.
    pub fn write_bytes(&self, bytes: &[u8]) -> Result<()> {
        assert_eq!(bytes.len(), self.n_bytes, "bytes for memory of another size");
        // SAFETY: both sides have `n_bytes` bytes, and the host's live during the call.
        let status = unsafe {
            ffi::detox_cuda_write(self.handle.raw(), bytes.as_ptr().cast(), self.n_bytes, self.address())
        };
        self.handle.check(status)
    }

    /// Sets every byte to 0.
    pub fn clear(&self) -> Result<()> {
        // SAFETY: the memory has `n_bytes` bytes.
        self.handle.check(unsafe { ffi::detox_cuda_clear(self.handle.raw(), self.n_bytes, self.address()) })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated once and released once. Operations that still use it were issued before, and run first.
        let status = unsafe { ffi::detox_cuda_release(self.handle.raw(), self.address()) };
        if let Err(error) = self.handle.check(status) {
            tracing::warn!("{error}");
        }
    }
}

/// f32 numbers on a GPU.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    len: usize,
}

impl Buffer {
    /// Allocates `len` uninitialised numbers.
    pub fn new(handle: &Arc<Handle>, len: usize) -> Result<Buffer> {
        let n_bytes = len.checked_mul(size_of::<f32>()).expect("a buffer fits into the address space");
        Ok(Buffer { memory: Memory::new(handle, n_bytes)?, len })
    }

    /// The number of numbers.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Sets every number to 0.
    pub fn clear(&mut self) -> Result<()> {
        self.memory.clear()
    }

    /// Overwrites it with `values`, of the same length.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), self.len, "numbers for a buffer of another length");
        let n_bytes = size_of_val(values);
        // SAFETY: f32 has neither padding nor invalid bytes.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), n_bytes) };
        self.memory.write_bytes(bytes)
    }

    /// Copies all numbers to the host.
    pub fn read(&self) -> Result<Vec<f32>> {
        let mut values = vec![0.0f32; self.len];
        let (handle, n_bytes) = (&self.memory.handle, self.memory.n_bytes);
        // SAFETY: both sides have `n_bytes` bytes, and any bytes are valid f32 numbers.
        let status = unsafe {
            ffi::detox_cuda_read(handle.raw(), self.memory.address(), n_bytes, values.as_mut_ptr().cast())
        };
        handle.check(status)?;
        Ok(values)
    }

    /// Panics if it belongs to another handle.
    #[track_caller]
    pub(super) fn assert_of(&self, handle: &Arc<Handle>) {
        self.memory.assert_of(handle);
    }

    /// Its address on the GPU, for reading.
    pub fn at(&self) -> *const f32 {
        self.memory.address().cast_const().cast()
    }

    /// Its address on the GPU, for writing.
    pub fn at_mut(&mut self) -> *mut f32 {
        self.memory.address().cast()
    }
}
