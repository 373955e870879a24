//! C functions for callbacks: making one, decoding with it, and steering sequences apart.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::argument::{SizedStruct, array, check_out, read_options, sequence_of};
use super::handle::{self, Running};
use super::host::{HostTable, RawTable, Tensor};
use super::host_callback::{EvalFn, HostCallback};
use super::status::{Failure, Status, guard};
use crate::error::Error;
use crate::plugin::{ContextOptions, Token};

/// `detox_callback_options`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct RawCallbackOptions {
    pub(super) size: usize,
    pub(super) n_seq_max: u32,
    pub(super) kv_unified: u8,
    pub(super) next: Option<EvalFn>,
    pub(super) next_user_data: *mut c_void,
}

// SAFETY: `repr(C)`, plain numbers and nullable pointers, the size first.
unsafe impl SizedStruct for RawCallbackOptions {
    const LEAST: usize = std::mem::offset_of!(RawCallbackOptions, next);
    const ENDS: &'static [usize] =
        &[std::mem::offset_of!(RawCallbackOptions, next_user_data), size_of::<RawCallbackOptions>()];
}

/// # Safety
/// - `table` is null, or a struct that is as long as its size says. Its functions do what the header says, until the
///   callback is freed.
/// - `options` is null, or a struct that is as long as its size says. Its `next` may be called with its user data.
/// - `callback` is null, or can be written to.
#[unsafe(no_mangle)]
unsafe extern "C" fn detox_steer_callback(
    steer: *mut c_void,
    table: *const RawTable,
    options: *const RawCallbackOptions,
    callback: *mut *mut c_void,
) -> Status {
    guard(|| {
        check_out("callback", callback)?;
        let steer = handle::steer(steer)?;
        // SAFETY: as this function's own contract.
        let (table, options) = unsafe {
            let no_data = std::ptr::null_mut();
            let default = RawCallbackOptions {
                size: 0,
                n_seq_max: 1,
                kv_unified: 0,
                next: None,
                next_user_data: no_data,
            };
            (HostTable::read(table)?, read_options("options", options, default)?)
        };
        let (n_seq_max, kv_unified) = (options.n_seq_max as usize, options.kv_unified != 0);
        let made = steer.callback(&ContextOptions { n_seq_max, kv_unified })?;
        let needs_sources = n_seq_max > 1 && !kv_unified;
        let next = options.next.map(|function| (function, options.next_user_data));
        let made = HostCallback::new(made, table, needs_sources, next);
        // SAFETY: `check_out` saw that it is neither null nor misaligned; writable by the contract.
        unsafe { callback.write(handle::insert_callback(made)) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn detox_callback_free(callback: *mut c_void) -> Status {
    guard(|| handle::free_callback(callback))
}

/// # Safety
/// `tensor` is null, or a tensor that llama.cpp passed to the eval callback of a context of this program, and that
/// callback has not returned yet.
#[unsafe(no_mangle)]
unsafe extern "C" fn detox_eval_callback(tensor: *mut Tensor, ask: bool, user_data: *mut c_void) -> bool {
    let found = catch_unwind(AssertUnwindSafe(|| Running::enter(user_data))).unwrap_or_default();
    let Some(running) = found.filter(|_| !tensor.is_null()) else { return !ask };
    // SAFETY: a live tensor by the contract, and not null.
    unsafe { running.callback().eval(tensor, ask) }
}

#[unsafe(no_mangle)]
extern "C" fn detox_check(callback: *mut c_void) -> Status {
    guard(|| Ok(handle::callback(callback)?.callback.callback.check()?))
}

/// # Safety
/// Each array is null, or has `n_tokens` entries.
#[unsafe(no_mangle)]
unsafe extern "C" fn detox_batch(
    callback: *mut c_void,
    n_tokens: usize,
    sequences: *const i32,
    outputs: *const i8,
    generated: *const i8,
) -> Status {
    guard(|| {
        let entry = handle::callback(callback)?;
        let HostCallback { callback, table, needs_sources, .. } = &entry.callback;
        if *needs_sources && !table.knows_sources() {
            let reason = "to tell the sequences of this context apart, the host table needs the functions `op` and \
                          `source`, which it lacks";
            let hint = "add them to the table, or create the context with kv_unified = true";
            return Err(Error::refused("batch", reason).with_hint(hint).into());
        }
        // llama.cpp counts a batch's tokens in an i32.
        if i32::try_from(n_tokens).is_err() {
            return Err(Failure::argument(format!(
                "n_tokens: expected at most {}, found {n_tokens}",
                i32::MAX
            )));
        }
        // SAFETY: as this function's own contract.
        let (sequences, outputs, generated) = unsafe {
            (
                array("sequences", sequences, n_tokens)?,
                array("outputs", outputs, n_tokens)?,
                array("generated", generated, n_tokens)?,
            )
        };
        if sequences.is_none() && outputs.is_none() && generated.is_none() && n_tokens > MOST_PLAIN_TOKENS {
            let reason = format!("n_tokens: expected at most {MOST_PLAIN_TOKENS}, found {n_tokens}");
            return Err(Failure::argument(reason));
        }
        let token = |i: usize| -> Result<Token, Failure> {
            let sequence = sequences.map_or(0, |all| all[i]);
            Ok(Token {
                sequence: usize::try_from(sequence).map_err(|_| {
                    Failure::argument(format!("sequences[{i}]: expected 0 or more, found {sequence}"))
                })?,
                is_output: outputs.map_or(i + 1 == n_tokens, |all| all[i] != 0),
                is_generated: generated.map(|all| all[i] != 0),
            })
        };
        let tokens = (0..n_tokens).map(token).collect::<Result<Vec<_>, _>>()?;
        Ok(callback.announce(&tokens)?)
    })
}

/// Most tokens of a batch that is announced without any array. No context holds more.
const MOST_PLAIN_TOKENS: usize = 1 << 24;

#[unsafe(no_mangle)]
extern "C" fn detox_set_sequence(callback: *mut c_void, sequence: i32, is_on: bool) -> Status {
    guard(|| {
        let sequence = sequence_of(sequence)?;
        Ok(handle::callback(callback)?.callback.callback.set_sequence(sequence, is_on)?)
    })
}
