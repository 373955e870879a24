//! llama.cpp's eval callback: a [`Watch`] sees the nodes of a graph as they are computed.

use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use crate::engine::watch::Watch;

/// What the callback works on. llama.cpp keeps a pointer to it for the life of the context.
#[derive(Debug)]
pub(super) struct CallbackState {
    pub(super) watch: Watch,
    /// Why the decode in progress cannot be trusted.
    pub(super) fault: Option<String>,
}

/// One node of the graph, valid while the callback that got it runs.
pub(in crate::engine) struct Node {
    tensor: NonNull<sys::ggml_tensor>,
}

/// The function that llama.cpp calls: with `ask` before a node is computed, to learn whether its value is
/// wanted, and without it afterwards. Answering false afterwards ends the graph there.
pub(super) extern "C" fn eval_callback(tensor: *mut sys::ggml_tensor, ask: bool, state: *mut c_void) -> bool {
    let Some(mut state) = NonNull::new(state.cast::<CallbackState>()) else { return !ask };
    // SAFETY: the pointer is the one that `ContextHandle::new` gave to llama.cpp: a `CallbackState` that is
    // freed after the context. llama.cpp calls from the thread that is inside `llama_decode`, one call at a
    // time, and `ContextHandle`, borrowed mutably meanwhile, does not touch the state.
    let state = unsafe { state.as_mut() };
    let Some(tensor) = NonNull::new(tensor) else { return !ask };
    if state.fault.is_some() {
        return !ask;
    }
    let mut node = Node { tensor };
    // A panic must not cross into C.
    let answer = catch_unwind(AssertUnwindSafe(|| match ask {
        true => state.watch.wants(&node),
        false => state.watch.sees(&mut node),
    }));
    match answer {
        Ok(Ok(answer)) => answer,
        Ok(Err(fault)) => {
            state.fault = Some(fault);
            // Nothing more is wanted, and the graph is computed to its end.
            !ask
        }
        Err(_) => {
            state.fault = Some("the eval callback panicked".into());
            !ask
        }
    }
}

impl Node {
    fn raw(&self) -> &sys::ggml_tensor {
        // SAFETY: llama.cpp passes a tensor of the graph it is computing, which outlives the callback, and
        // nothing writes to the struct (as against the tensor's data) during it.
        unsafe { self.tensor.as_ref() }
    }

    /// Its name, such as `l_out-3`.
    pub(in crate::engine) fn name(&self) -> &[u8] {
        let name = &self.raw().name;
        // SAFETY: the same memory as bytes; `c_char` and `u8` have one layout.
        let bytes = unsafe { std::slice::from_raw_parts(name.as_ptr().cast::<u8>(), name.len()) };
        CStr::from_bytes_until_nul(bytes).map_or(bytes, CStr::to_bytes)
    }

    /// Whether it writes rows into a cache.
    pub(in crate::engine) fn is_set_rows(&self) -> bool {
        self.raw().op == sys::GGML_OP_SET_ROWS
    }

    /// Numbers in a row.
    pub(in crate::engine) fn width(&self) -> usize {
        self.raw().ne[0].max(0) as usize
    }

    /// Rows, all dimensions but the first together.
    pub(in crate::engine) fn n_rows(&self) -> usize {
        rows_of(self.raw())
    }

    /// Where the rows go that [`Node::is_set_rows`] writes, and how many rows there are to choose from.
    pub(in crate::engine) fn row_targets(&self) -> Option<(Vec<i64>, usize)> {
        let raw = self.raw();
        // Sources of GGML_OP_SET_ROWS: what is written, the indices, and what is written into.
        let (indices, target) = (NonNull::new(raw.src[1])?, NonNull::new(raw.src[2])?);
        // SAFETY: sources of a node of the graph live as long as the graph.
        let (indices, target) = unsafe { (indices.as_ref(), target.as_ref()) };
        let n = indices.ne[0].max(0) as usize * rows_of(indices);
        if indices.type_ != sys::GGML_TYPE_I64 || indices.nb[0] != size_of::<i64>() {
            return None;
        }
        let mut values = vec![0i64; n];
        // SAFETY: `values` has room for all of the tensor's n contiguous numbers of 8 bytes; inputs of the
        // graph were set before it is computed.
        unsafe {
            sys::ggml_backend_tensor_get(indices, values.as_mut_ptr().cast(), 0, n * size_of::<i64>());
        }
        Some((values, target.ne[1].max(0) as usize))
    }

    /// Lets `edit` see, and if `write` change, the node's values, shape `[n_rows][width]`.
    pub(in crate::engine) fn with_values<R>(
        &mut self,
        write: bool,
        edit: impl FnOnce(&mut [f32]) -> R,
    ) -> Result<R, String> {
        let raw = self.raw();
        let n = self.width() * self.n_rows();
        let is_contiguous = raw.nb[0] == size_of::<f32>()
            && (0..3).all(|i| raw.ne[i + 1] == 1 || raw.nb[i + 1] == raw.nb[i] * raw.ne[i].max(0) as usize);
        if raw.type_ != sys::GGML_TYPE_F32 || !is_contiguous {
            return Err(format!(
                "node {} is no plain matrix of f32, as this version of llama.cpp was known to make it",
                String::from_utf8_lossy(self.name())
            ));
        }
        if n == 0 {
            return Ok(edit(&mut []));
        }
        // SAFETY: a view lies in the buffer of what it views; both live as long as the graph.
        let buffer = unsafe { raw.view_src.as_ref() }.map_or(raw.buffer, |viewed| viewed.buffer);
        if buffer.is_null() || raw.data.is_null() {
            return Err(format!("node {} has no memory", String::from_utf8_lossy(self.name())));
        }
        // SAFETY: the buffer is alive, see above.
        if unsafe { sys::ggml_backend_buffer_is_host(buffer) } {
            // SAFETY: a computed tensor of n contiguous floats in the host's memory; llama.cpp has synchronised
            // and waits for this callback, so that nothing else reads or writes it.
            return Ok(edit(unsafe { std::slice::from_raw_parts_mut(raw.data.cast::<f32>(), n) }));
        }
        let mut values = vec![0f32; n];
        let n_bytes = n * size_of::<f32>();
        // SAFETY: `values` has room for the tensor's n floats.
        unsafe { sys::ggml_backend_tensor_get(raw, values.as_mut_ptr().cast(), 0, n_bytes) };
        let result = edit(&mut values);
        if write {
            // SAFETY: writes the n floats of a tensor that has n floats, while the graph waits.
            unsafe { sys::ggml_backend_tensor_set(self.tensor.as_ptr(), values.as_ptr().cast(), 0, n_bytes) };
        }
        Ok(result)
    }
}

fn rows_of(raw: &sys::ggml_tensor) -> usize {
    raw.ne[1..].iter().map(|&n| n.max(0) as usize).product()
}
