//! The object behind a `detox_callback` handle: a [`Callback`] over the host's tensors, and the host's own callback.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use super::host::{HostNode, HostTable, Tensor};
use crate::plugin::Callback;

/// `detox_eval_fn`.
pub(super) type EvalFn = unsafe extern "C" fn(*mut Tensor, bool, *mut c_void) -> bool;

/// Our eval callback for one context, and the host's own behind it.
#[derive(Debug)]
pub(super) struct HostCallback {
    pub(super) callback: Callback,
    pub(super) table: HostTable,
    /// Whether the table's optional functions are needed to follow rows.
    pub(super) needs_sources: bool,
    next: Option<Next>,
    /// Whether our callback wanted the value of the node that llama.cpp asked about last.
    is_wanted: AtomicBool,
}

/// The host's own eval callback.
#[derive(Debug)]
struct Next {
    function: EvalFn,
    user_data: *mut c_void,
    /// Whether it wanted the value of the node that llama.cpp asked about last.
    is_wanted: AtomicBool,
}

// SAFETY: the pointer is only handed back to the host's own function, on the thread that decodes, as llama.cpp
// itself would do.
unsafe impl Send for Next {}
// SAFETY: as for `Send`; the other mutable field is atomic.
unsafe impl Sync for Next {}

impl HostCallback {
    /// `next` is the host's own callback with its user data.
    pub(super) fn new(
        callback: Callback,
        table: HostTable,
        needs_sources: bool,
        next: Option<(EvalFn, *mut c_void)>,
    ) -> HostCallback {
        let next =
            next.map(|(function, user_data)| Next { function, user_data, is_wanted: AtomicBool::new(false) });
        HostCallback { callback, table, needs_sources, next, is_wanted: AtomicBool::new(false) }
    }

    /// Calls our callback and then the host's, and combines their answers.
    ///
    /// # Safety
    /// - `tensor` is one that llama.cpp passed to the eval callback of a context of the host, which has not returned
    ///   yet.
    pub(super) unsafe fn eval(&self, tensor: *mut Tensor, ask: bool) -> bool {
        // SAFETY: as this function's own contract.
        let own = catch_unwind(AssertUnwindSafe(|| unsafe { self.eval_own(tensor, ask) })).unwrap_or(!ask);
        // Outside of `catch_unwind`: failures of the host's own function are not ours to catch.
        // SAFETY: as this function's own contract.
        let next = self.next.as_ref().map(|next| unsafe { next.eval(tensor, ask) });
        match ask {
            true => own || next.unwrap_or(false),
            false => own && next.unwrap_or(true),
        }
    }

    /// # Safety
    /// As [`HostCallback::eval`].
    unsafe fn eval_own(&self, tensor: *mut Tensor, ask: bool) -> bool {
        if ask || self.is_wanted.load(Ordering::Relaxed) {
            // SAFETY: as this function's own contract.
            let mut node = unsafe { HostNode::new(&self.table, tensor) };
            let answer = self.callback.eval(&mut node, ask);
            if ask {
                self.is_wanted.store(answer, Ordering::Relaxed);
            }
            return answer;
        }
        true
    }
}

impl Next {
    /// # Safety
    /// As [`HostCallback::eval`].
    unsafe fn eval(&self, tensor: *mut Tensor, ask: bool) -> bool {
        if ask || self.is_wanted.load(Ordering::Relaxed) {
            // SAFETY: the host's own callback with its own data, called as llama.cpp would call it.
            let answer = unsafe { (self.function)(tensor, ask, self.user_data) };
            if ask {
                self.is_wanted.store(answer, Ordering::Relaxed);
            }
            return answer;
        }
        true
    }
}
