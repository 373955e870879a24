//! llama.cpp's eval callback: passes each node of a graph to a [`Watch`] while the graph runs.

use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use crate::graph::watch::Watch;
use crate::graph::{Node, Shape};

/// State of the callback. llama.cpp keeps a pointer to it for the life of the context.
#[derive(Debug)]
pub(super) struct CallbackState {
    pub(super) watch: Watch,
    /// Fault found in the current decode, if any: its result cannot be trusted.
    pub(super) fault: Option<String>,
}

/// One node of the graph, valid only during the callback.
struct GraphNode {
    tensor: NonNull<sys::ggml_tensor>,
}

/// The function that llama.cpp calls for each node.
///
/// With `ask`, before the node is computed: returns whether its value is wanted. Without, after it was computed:
/// returning false ends the graph there.
pub(super) extern "C" fn eval_callback(tensor: *mut sys::ggml_tensor, ask: bool, state: *mut c_void) -> bool {
    let Some(mut state) = NonNull::new(state.cast::<CallbackState>()) else { return !ask };
    // SAFETY: `ContextHandle::new` gave this pointer to llama.cpp. It points to a `CallbackState` that is freed after
    // the context. llama.cpp calls from the thread inside `llama_decode`, one call at a time, and `ContextHandle`
    // is mutably borrowed meanwhile and does not touch the state.
    let state = unsafe { state.as_mut() };
    let Some(tensor) = NonNull::new(tensor) else { return !ask };
    if state.fault.is_some() {
        return !ask;
    }
    let mut node = GraphNode { tensor };
    // A panic must not cross into C.
    let answer = catch_unwind(AssertUnwindSafe(|| match ask {
        true => state.watch.wants(&node, state.watch.look(&node)),
        false => state.watch.sees(&mut node),
    }));
    match answer {
        Ok(Ok(answer)) => answer,
        Ok(Err(fault)) => {
            state.fault = Some(fault);
            // From here on no node is observed, and the graph runs to its end.
            !ask
        }
        Err(_) => {
            state.fault = Some("the eval callback panicked".into());
            !ask
        }
    }
}

impl GraphNode {
    fn raw(&self) -> &sys::ggml_tensor {
        // SAFETY: llama.cpp passes a tensor of the graph it is computing. It outlives the callback, and nothing
        // writes to the struct (unlike the tensor's data) during the call.
        unsafe { self.tensor.as_ref() }
    }

    /// The buffer that holds its values.
    fn buffer(&self) -> Result<*mut sys::ggml_backend_buffer, String> {
        let raw = self.raw();
        // SAFETY: a view lies in the buffer of the tensor that it views; both live as long as the graph.
        let buffer = unsafe { raw.view_src.as_ref() }.map_or(raw.buffer, |viewed| viewed.buffer);
        if buffer.is_null() || raw.data.is_null() {
            return Err(format!("node {} has no memory", String::from_utf8_lossy(self.name())));
        }
        Ok(buffer)
    }
}

impl Node for GraphNode {
    fn name(&self) -> &[u8] {
        let name = &self.raw().name;
        // SAFETY: the same memory as bytes; `c_char` and `u8` have the same layout.
        let bytes = unsafe { std::slice::from_raw_parts(name.as_ptr().cast::<u8>(), name.len()) };
        CStr::from_bytes_until_nul(bytes).map_or(bytes, CStr::to_bytes)
    }

    fn shape(&self) -> Shape {
        let raw = self.raw();
        Shape { is_f32: raw.type_ == sys::GGML_TYPE_F32, ne: raw.ne, nb: raw.nb }
    }

    fn writes_rows(&self) -> bool {
        self.raw().op == sys::GGML_OP_SET_ROWS
    }

    fn row_targets(&self) -> Option<(Vec<i64>, usize)> {
        let raw = self.raw();
        // Sources of GGML_OP_SET_ROWS: 0 the values, 1 the row indices, 2 the tensor written to.
        let (indices, target) = (NonNull::new(raw.src[1])?, NonNull::new(raw.src[2])?);
        // SAFETY: sources of a node of the graph live as long as the graph.
        let (indices, target) = unsafe { (indices.as_ref(), target.as_ref()) };
        let n = indices.ne.iter().map(|&n| n.max(0) as usize).product::<usize>();
        if indices.type_ != sys::GGML_TYPE_I64 || indices.nb[0] != size_of::<i64>() {
            return None;
        }
        let mut values = vec![0i64; n];
        // SAFETY: `values` has room for the tensor's n contiguous values of 8 bytes, and the graph's inputs are set
        // before it is computed.
        unsafe {
            sys::ggml_backend_tensor_get(indices, values.as_mut_ptr().cast(), 0, n * size_of::<i64>());
        }
        Some((values, target.ne[1].max(0) as usize))
    }

    fn values_mut(&mut self) -> Option<&mut [f32]> {
        let n = self.shape().n_values();
        let buffer = self.buffer().ok()?;
        // SAFETY: the buffer is alive, see `buffer`.
        if !unsafe { sys::ggml_backend_buffer_is_host(buffer) } {
            return None;
        }
        // SAFETY: a computed tensor of n contiguous floats in host memory, which `with_values` has checked.
        // llama.cpp has synchronised and waits for this callback, so nothing else reads or writes it.
        Some(unsafe { std::slice::from_raw_parts_mut(self.raw().data.cast::<f32>(), n) })
    }

    fn get(&self, values: &mut [f32]) -> Result<(), String> {
        self.buffer()?;
        // SAFETY: the tensor has memory, and the caller has sized `values` to its number of floats.
        unsafe {
            sys::ggml_backend_tensor_get(self.raw(), values.as_mut_ptr().cast(), 0, size_of_val(values));
        }
        Ok(())
    }

    fn set(&mut self, values: &[f32]) -> Result<(), String> {
        self.buffer()?;
        // SAFETY: the tensor has memory and as many floats as `values`, and the graph waits for this callback.
        unsafe {
            sys::ggml_backend_tensor_set(
                self.tensor.as_ptr(),
                values.as_ptr().cast(),
                0,
                size_of_val(values),
            );
        }
        Ok(())
    }
}
