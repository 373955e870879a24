//! C functions for interventions: loading one, its coefficient, and its control vector.

use std::ffi::{c_char, c_void};

use super::argument::{SizedStruct, check_out, check_out_struct, path, read_options, write_struct};
use super::handle;
use super::status::{Failure, Status, guard};
use crate::plugin::{Steer, SteerOptions};
use crate::steer::Route;

/// `detox_steer_options`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct RawSteerOptions {
    pub(super) size: usize,
    pub(super) coefficient: f32,
    pub(super) route: i32,
    /// A C `bool`. Not a Rust `bool`, because C code could write bytes other than 0 and 1.
    pub(super) force: u8,
}

// SAFETY: `repr(C)`, plain numbers, the size first.
unsafe impl SizedStruct for RawSteerOptions {
    const LEAST: usize = std::mem::offset_of!(RawSteerOptions, force) + 1;
}

/// `detox_control_vector`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct RawControlVector {
    pub(super) size: usize,
    pub(super) len: usize,
    pub(super) n_embd: i32,
    pub(super) il_start: i32,
    pub(super) il_end: i32,
    pub(super) is_whole: u8,
}

// SAFETY: `repr(C)`, plain numbers, the size first.
unsafe impl SizedStruct for RawControlVector {
    const LEAST: usize = std::mem::offset_of!(RawControlVector, is_whole) + 1;
}

/// # Safety
/// - The paths are null, or NUL-terminated strings.
/// - `options` is null, or a struct that is as long as its size says.
/// - `steer` is null, or can be written to.
#[unsafe(no_mangle)]
unsafe extern "C" fn detox_steer_load(
    model_path: *const c_char,
    steer_path: *const c_char,
    options: *const RawSteerOptions,
    steer: *mut *mut c_void,
) -> Status {
    guard(|| {
        check_out("steer", steer)?;
        // SAFETY: as this function's own contract.
        let (model, file, options) = unsafe {
            let default = RawSteerOptions { size: 0, coefficient: 1.0, route: 0, force: 0 };
            let (model, file) = (path("model_path", model_path)?, path("steer_path", steer_path)?);
            (model, file, read_options("options", options, default)?)
        };
        let route = match options.route {
            0 => Route::Cheapest,
            1 => Route::Callback,
            other => {
                return Err(Failure::argument(format!(
                    "options.route: expected a detox_route, found {other}"
                )));
            }
        };
        let options = SteerOptions { coefficient: options.coefficient, route, force: options.force != 0 };
        let loaded = handle::insert_steer(Steer::load(&model, &file, &options)?);
        // SAFETY: `check_out` saw that it is neither null nor misaligned; writable by the contract.
        unsafe { steer.write(loaded) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn detox_steer_free(steer: *mut c_void) -> Status {
    guard(|| handle::free_steer(steer))
}

#[unsafe(no_mangle)]
extern "C" fn detox_set_coefficient(steer: *mut c_void, coefficient: f32) -> Status {
    guard(|| Ok(handle::steer(steer)?.set_coefficient(coefficient)?))
}

/// # Safety
/// `coefficient` is null, or can be written to.
#[unsafe(no_mangle)]
unsafe extern "C" fn detox_get_coefficient(steer: *mut c_void, coefficient: *mut f32) -> Status {
    guard(|| {
        check_out("coefficient", coefficient)?;
        let found = handle::steer(steer)?.coefficient();
        // SAFETY: `check_out` saw that it is neither null nor misaligned; writable by the contract.
        unsafe { coefficient.write(found) };
        Ok(())
    })
}

/// # Safety
/// - `vector` is null, or a struct that is as long as its size says and can be written to.
/// - `data` is null, or has room for `capacity` values.
#[unsafe(no_mangle)]
unsafe extern "C" fn detox_steer_control_vector(
    steer: *mut c_void,
    vector: *mut RawControlVector,
    data: *mut f32,
    capacity: usize,
) -> Status {
    guard(|| {
        // SAFETY: as this function's own contract.
        let size = unsafe { check_out_struct("vector", vector)? };
        let steer = handle::steer(steer)?;
        let rows = steer.control_vector().map(|found| found.rows).unwrap_or_default();
        if !data.is_null() {
            check_out("data", data)?;
            if capacity < rows.len() {
                let expected = rows.len();
                let reason = format!("capacity: expected room for {expected} values, found {capacity}");
                return Err(Failure::argument(reason));
            }
            // SAFETY: room for `capacity` values by the contract, and `capacity` is enough, as checked above.
            unsafe { std::ptr::copy_nonoverlapping(rows.as_ptr(), data, rows.len()) };
        }
        let number = |n: usize| {
            i32::try_from(n).map_err(|_| Failure::argument(format!("{n} is more than llama.cpp can count")))
        };
        let found = RawControlVector {
            size: 0,
            len: rows.len(),
            n_embd: number(steer.n_embd())?,
            il_start: 1,
            il_end: number(steer.n_layer().saturating_sub(1))?,
            is_whole: u8::from(!steer.needs_callback()),
        };
        // SAFETY: it passed `check_out_struct`, and is writable by the contract.
        unsafe { write_struct(vector, size, &found) };
        Ok(())
    })
}
