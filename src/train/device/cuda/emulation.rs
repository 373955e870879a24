//! What tests may set of the emulated GPU, which is one for the whole process.

use crate::train::device::cuda::ffi;

/// The runtime's number for "no GPU".
pub const NO_DEVICE: i32 = 100;
/// The runtime's number for "a stub was found in place of the driver".
pub const STUB_LIBRARY: i32 = 34;
/// The runtime's number for "NVIDIA's services do not run".
pub const SYSTEM_NOT_READY: i32 = 802;
/// The runtime's number for "the program has no kernels for this GPU".
pub const NO_KERNEL_IMAGE: i32 = 209;
/// The runtime's number for "the driver is too old".
pub const INSUFFICIENT_DRIVER: i32 = 35;
/// The runtime's number for "another process holds the GPU".
pub const DEVICES_UNAVAILABLE: i32 = 46;
/// The runtime's number for "a kernel was launched with too many threads or too much memory".
pub const INVALID_CONFIGURATION: i32 = 9;
/// The runtime's number for "a kernel failed", after which nothing works.
pub const LAUNCH_FAILURE: i32 = 719;

/// How many bytes of memory it has from now on, those included that are taken.
pub fn set_memory(n_bytes: usize) {
    // SAFETY: sets a number, under a lock.
    unsafe { ffi::detox_cuda_emulation_set_memory(n_bytes) }
}

/// Bytes that are taken.
pub fn taken() -> usize {
    // SAFETY: reads a number, under a lock.
    unsafe { ffi::detox_cuda_emulation_taken() }
}

/// The most bytes that were taken at once since the last call.
pub fn peak() -> usize {
    // SAFETY: reads and sets a number, under a lock.
    unsafe { ffi::detox_cuda_emulation_peak() }
}

/// Kernels, products and clearings of memory that were launched since the last call.
pub fn launched() -> usize {
    // SAFETY: reads and sets a number.
    unsafe { ffi::detox_cuda_emulation_launched() }
}

/// Threads and blocks from the last to the first: a result that depends on it is a race.
pub fn set_reverse(reverse: bool) {
    // SAFETY: sets a flag.
    unsafe { ffi::detox_cuda_emulation_set_reverse(i32::from(reverse)) }
}

/// The error that the next look for GPUs gives; one of the runtime's numbers.
pub fn set_error(error: i32) {
    // SAFETY: sets a number.
    unsafe { ffi::detox_cuda_emulation_set_error(error) }
}

/// The error that the next launch of a kernel gives; where it `stays`, all that comes after it too, until the next call
/// of this. One of the runtime's numbers.
pub fn set_launch_error(error: i32, stays: bool) {
    // SAFETY: sets numbers.
    unsafe { ffi::detox_cuda_emulation_set_launch_error(error, i32::from(stays)) }
}
