//! An open GPU, and the extension's statuses as errors.

use std::ffi::CStr;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{Error, Result};

use crate::train::device::cuda::ffi;

/// An open GPU.
#[derive(Debug)]
pub struct Handle {
    raw: NonNull<ffi::detox_cuda_device>,
    ordinal: usize,
}

// SAFETY: the extension may be called from any thread; its own lock makes the calls take turns.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// What the driver reports about a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// The driver's name for it.
    pub name: String,
    /// Major and minor.
    pub compute_capability: (i32, i32),
    /// The driver's CUDA version, as 1000 major + 10 minor.
    pub driver_version: i32,
}

impl Handle {
    /// Opens GPU `ordinal`.
    pub fn open(ordinal: usize) -> Result<Arc<Handle>> {
        let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let mut raw = std::ptr::null_mut();
        // SAFETY: accepts any number; writes one pointer to `raw`.
        check(ordinal, unsafe { ffi::detox_cuda_open(number, &mut raw) })?;
        let raw = NonNull::new(raw).expect("a device that was opened has an address");
        Ok(Arc::new(Handle { raw, ordinal }))
    }

    /// The pointer for calls of the extension, valid as long as `self`.
    pub fn raw(&self) -> *mut ffi::detox_cuda_device {
        self.raw.as_ptr()
    }

    /// The GPU's number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Turns a status into a result. Call it right after the operation, on the same thread.
    pub fn check(&self, status: ffi::detox_cuda_status) -> Result<()> {
        check(self.ordinal, status)
    }

    /// Asks the driver for the GPU's properties.
    pub fn properties(&self) -> Result<Properties> {
        // SAFETY: plain numbers and bytes, for which zeros are valid.
        let mut found: ffi::detox_cuda_properties = unsafe { std::mem::zeroed() };
        // SAFETY: the device is open; writes one struct to `found`.
        self.check(unsafe { ffi::detox_cuda_describe(self.raw(), &mut found) })?;
        let bytes = found.name.map(|c| c as u8);
        let name = CStr::from_bytes_until_nul(&bytes).map(|name| name.to_string_lossy().into_owned());
        Ok(Properties {
            name: name.unwrap_or_else(|_| "a GPU".into()),
            compute_capability: (found.major, found.minor),
            driver_version: found.driver_version,
        })
    }

    /// Free bytes and total bytes of its memory.
    pub fn memory_bytes(&self) -> Result<(u64, u64)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the device is open; writes two numbers.
        self.check(unsafe { ffi::detox_cuda_memory(self.raw(), &mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: opened once and closed once. Memory and batches hold an `Arc` of the handle, so none is left.
        unsafe { ffi::detox_cuda_close(self.raw()) }
    }
}

/// Counts the GPUs of this machine.
///
/// # Errors
/// [`Error::Device`] if the driver is missing or fails.
pub fn count() -> Result<usize> {
    let mut n = 0;
    // SAFETY: writes one number to `n`.
    check(0, unsafe { ffi::detox_cuda_count(&mut n) })?;
    Ok(usize::try_from(n).unwrap_or(0))
}

/// Whether this machine has a GPU that programs can use.
///
/// If the runtime fails and NVIDIA's device node does not exist, the machine has no GPU. If the node exists, the driver
/// is at fault, which is an error.
///
/// # Errors
/// As [`count`].
pub fn is_present() -> Result<bool> {
    presence(count(), || std::path::Path::new("/dev/nvidiactl").exists())
}

fn presence(count: Result<usize>, has_node: impl FnOnce() -> bool) -> Result<bool> {
    match count {
        Ok(n) => Ok(n > 0),
        Err(_) if !has_node() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Turns the status of a call on GPU `ordinal` into a result, with a hint if there is a cure.
fn check(ordinal: usize, status: ffi::detox_cuda_status) -> Result<()> {
    if status == ffi::DETOX_CUDA_OK {
        return Ok(());
    }
    // SAFETY: a zero-terminated string that is valid until this thread's next call.
    let reason = unsafe { CStr::from_ptr(ffi::detox_cuda_last_error()) }.to_string_lossy().into_owned();
    let device = format!("cuda:{ordinal}");
    let hint = match status {
        ffi::DETOX_CUDA_OUT_OF_MEMORY => {
            let hint = "free the card's memory (nvidia-smi lists the processes that hold it), or train with \
                        --frozen quantised, --checkpointing on, or a smaller --ubatch-size or --rank";
            return Err(Error::device_memory(device, reason).with_hint(hint));
        }
        ffi::DETOX_CUDA_NO_DEVICE => Some(
            "nvidia-smi lists the GPUs, and CUDA_VISIBLE_DEVICES may hide some of them; or train with --device cpu",
        ),
        ffi::DETOX_CUDA_DRIVER => Some(
            "install a newer NVIDIA driver (nvidia-smi prints the CUDA version it supports), or train with --device \
             cpu",
        ),
        ffi::DETOX_CUDA_UNSUPPORTED => Some("train with --device cpu"),
        ffi::DETOX_CUDA_BUILD => Some(
            "build for this GPU with DETOX_CUDA_ARCH (the compute capability without the dot, such as 89), or train \
             with --device cpu",
        ),
        _ => None,
    };
    Err(Error::device(device, reason).with_optional_hint(hint))
}

/// Panics if an operand belongs to another handle than the operation.
///
/// Another handle means another GPU's memory, or memory that this GPU uses in another stream, without order.
#[track_caller]
pub(super) fn assert_same(found: &Arc<Handle>, wanted: &Arc<Handle>) {
    assert!(
        Arc::ptr_eq(found, wanted),
        "an operation on cuda:{} was given an operand of another handle, on cuda:{}",
        wanted.ordinal,
        found.ordinal
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_fails_is_an_error_only_if_the_device_node_exists() {
        let failed = || Err(Error::device("cuda:0", "broken"));
        assert_eq!(presence(failed(), || true).unwrap_err().to_string(), "cuda:0: broken");
        assert!(!presence(failed(), || false).unwrap());
        assert!(!presence(Ok(0), || true).unwrap());
        assert!(presence(Ok(2), || true).unwrap());
    }
}
