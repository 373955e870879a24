//! C functions for gates, which steer only while a text is turning toxic.

use std::ffi::{c_char, c_void};

use super::argument::{SizedStruct, check_out, path, read_options, sequence_of};
use super::handle;
use super::status::{Status, guard};
use crate::plugin::GateOptions;

/// `detox_gate_options`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct RawGateOptions {
    pub(super) size: usize,
    pub(super) threshold: f64,
    pub(super) window: u32,
    pub(super) force: u8,
}

// SAFETY: `repr(C)`, plain numbers, the size first.
unsafe impl SizedStruct for RawGateOptions {
    const LEAST: usize = std::mem::offset_of!(RawGateOptions, force) + 1;
}

/// # Safety
/// - `probe_path` is null, or a NUL-terminated string.
/// - `options` is null, or a struct that is as long as its size says.
#[unsafe(no_mangle)]
unsafe extern "C" fn detox_gate_set(
    callback: *mut c_void,
    probe_path: *const c_char,
    options: *const RawGateOptions,
) -> Status {
    guard(|| {
        let entry = handle::callback(callback)?;
        let GateOptions { threshold, window, force } = GateOptions::default();
        let default = RawGateOptions { size: 0, threshold, window, force: u8::from(force) };
        // SAFETY: as this function's own contract.
        let (probe, options) =
            unsafe { (path("probe_path", probe_path)?, read_options("options", options, default)?) };
        let RawGateOptions { threshold, window, force, .. } = options;
        let options = GateOptions { threshold, window, force: force != 0 };
        Ok(entry.callback.callback.set_gate(&probe, &options)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn detox_gate_remove(callback: *mut c_void) -> Status {
    guard(|| Ok(handle::callback(callback)?.callback.callback.remove_gate()?))
}

#[unsafe(no_mangle)]
extern "C" fn detox_gate_set_threshold(callback: *mut c_void, threshold: f64) -> Status {
    guard(|| Ok(handle::callback(callback)?.callback.callback.set_threshold(threshold)?))
}

/// # Safety
/// `probability` and `is_open` are each null, or can be written to.
#[unsafe(no_mangle)]
unsafe extern "C" fn detox_gate_state(
    callback: *mut c_void,
    sequence: i32,
    probability: *mut f64,
    is_open: *mut bool,
) -> Status {
    guard(|| {
        if !probability.is_null() {
            check_out("probability", probability)?;
        }
        let state = handle::callback(callback)?.callback.callback.gate_state(sequence_of(sequence)?)?;
        if !probability.is_null() {
            // SAFETY: not null and aligned, and writable by the contract.
            unsafe { probability.write(state.probability.unwrap_or(-1.0)) };
        }
        if !is_open.is_null() {
            // SAFETY: not null, and writable by the contract; a byte is always aligned.
            unsafe { is_open.write(state.is_open) };
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn detox_gate_reset(callback: *mut c_void, sequence: i32) -> Status {
    guard(|| Ok(handle::callback(callback)?.callback.callback.reset_gate(sequence_of(sequence)?)?))
}
