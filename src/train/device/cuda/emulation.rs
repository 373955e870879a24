//! Controls of the emulated GPU for tests. The process has one such GPU.

use crate::train::device::cuda::ffi;

/// The runtime's error "no GPU".
pub const NO_DEVICE: i32 = 100;
/// The runtime's error "found the toolkit's stub instead of the driver".
pub const STUB_LIBRARY: i32 = 34;
/// The runtime's error "NVIDIA's services are not running".
pub const SYSTEM_NOT_READY: i32 = 802;
/// The runtime's error "the program has no kernels for this GPU".
pub const NO_KERNEL_IMAGE: i32 = 209;
/// The runtime's error "the driver is too old".
pub const INSUFFICIENT_DRIVER: i32 = 35;
/// The runtime's error "another process holds the GPU".
pub const DEVICES_UNAVAILABLE: i32 = 46;
/// The runtime's error "a kernel was launched with too many threads or too much memory".
pub const INVALID_CONFIGURATION: i32 = 9;
/// The runtime's error "a kernel failed", after which every call fails.
pub const LAUNCH_FAILURE: i32 = 719;

/// Sets the total bytes of memory, allocated ones included.
pub fn set_memory(n_bytes: usize) {
    // SAFETY: sets a number, under a lock.
    unsafe { ffi::detox_cuda_emulation_set_memory(n_bytes) }
}

/// Bytes that are allocated.
pub fn allocated_bytes() -> usize {
    // SAFETY: reads a number, under a lock.
    unsafe { ffi::detox_cuda_emulation_taken() }
}

/// The most bytes that were allocated at once since the last call.
pub fn peak_bytes() -> usize {
    // SAFETY: reads and sets a number, under a lock.
    unsafe { ffi::detox_cuda_emulation_peak() }
}

/// Number of kernels, products and memory clears launched since the last call.
pub fn launched() -> usize {
    // SAFETY: reads and sets a number.
    unsafe { ffi::detox_cuda_emulation_launched() }
}

/// Runs threads and blocks in reverse order. A result that changes has a race.
pub fn set_reverse(reverse: bool) {
    // SAFETY: sets a flag.
    unsafe { ffi::detox_cuda_emulation_set_reverse(i32::from(reverse)) }
}

/// Makes the next query for GPUs fail with `error`, one of the runtime's.
pub fn set_error(error: i32) {
    // SAFETY: sets a number.
    unsafe { ffi::detox_cuda_emulation_set_error(error) }
}

/// Makes the next kernel launch fail with `error`, one of the runtime's.
///
/// If the error `stays`, every later call fails too, until the next call of this function.
pub fn set_launch_error(error: i32, stays: bool) {
    // SAFETY: sets numbers.
    unsafe { ffi::detox_cuda_emulation_set_launch_error(error, i32::from(stays)) }
}
