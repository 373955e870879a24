//! An owned `llama_context`: decoding, logits, and the KV cache of its sequences.

use std::ptr::{self, NonNull};
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use super::adapter::LoraHandle;
use super::eval_callback::{CallbackState, eval_callback};
use super::model::ModelHandle;
use crate::engine::Token;
use crate::engine::options::{CacheType, FlashAttention};
use crate::graph::watch::Watch;

/// Context parameters, in llama.cpp's own terms.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct ContextParams {
    /// Cells of all sequences together.
    pub n_ctx: u32,
    pub n_batch: u32,
    pub n_ubatch: u32,
    pub n_seq_max: u32,
    pub n_threads: i32,
    pub n_threads_batch: i32,
    pub flash_attention: FlashAttention,
    pub cache_type_k: CacheType,
    pub cache_type_v: CacheType,
}

impl CacheType {
    fn raw(self) -> sys::ggml_type {
        match self {
            CacheType::F32 => sys::GGML_TYPE_F32,
            CacheType::F16 => sys::GGML_TYPE_F16,
            CacheType::Bf16 => sys::GGML_TYPE_BF16,
            CacheType::Q8_0 => sys::GGML_TYPE_Q8_0,
        }
    }
}

/// Tokens to decode, each with its sequence and position.
///
/// The four arrays have the same length `n_tokens`, as in `llama_batch`.
#[derive(Debug, Default, Clone)]
pub(in crate::engine) struct Batch {
    tokens: Vec<Token>,
    positions: Vec<i32>,
    sequences: Vec<i32>,
    outputs: Vec<i8>,
}

impl Batch {
    pub(in crate::engine) fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.outputs.clear();
    }

    pub(in crate::engine) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Adds a token; returns its index, for [`ContextHandle::logits`] after decoding.
    pub(in crate::engine) fn push(
        &mut self,
        token: Token,
        position: usize,
        sequence: usize,
        output: bool,
    ) -> usize {
        self.tokens.push(token);
        self.positions.push(position as i32);
        self.sequences.push(sequence as i32);
        self.outputs.push(i8::from(output));
        self.tokens.len() - 1
    }

    /// Checks for mistakes that would make llama.cpp abort, or fail without a reason.
    fn check(&self, model: &ModelHandle, n_batch: usize, n_seq_max: usize) -> Result<(), String> {
        if self.tokens.is_empty() {
            return Err("the batch is empty".into());
        }
        if self.tokens.len() > n_batch {
            return Err(format!("the batch holds more than n_batch = {n_batch} tokens"));
        }
        if let Some(token) = self.tokens.iter().find(|&&t| !model.holds(t)) {
            return Err(format!("token {token} is outside the vocabulary of {}", model.n_vocab()));
        }
        if let Some(s) = self.sequences.iter().find(|&&s| s < 0 || s as usize >= n_seq_max) {
            return Err(format!("sequence {s} is outside the {n_seq_max} sequences of this session"));
        }
        Ok(())
    }
}

/// A copy of one sequence's KV, independent of any context.
#[derive(Debug)]
pub(in crate::engine) struct SequenceState {
    bytes: Vec<u8>,
    /// The model that computed it.
    model: Arc<ModelHandle>,
}

/// A context over a model, with one KV stream per sequence.
#[derive(Debug)]
pub(in crate::engine) struct ContextHandle {
    context: NonNull<sys::llama_context>,
    threadpool: NonNull<sys::ggml_threadpool>,
    n_batch: usize,
    n_seq_max: usize,
    /// Which tokens of the last decoded batch have logits.
    outputs: Vec<i8>,
    /// Scratch space of `decode`: `llama_batch` needs a pointer to every token's list of sequences.
    n_sequences: Vec<i32>,
    sequence_pointers: Vec<*mut i32>,
    /// State of the eval callback, if it is installed. Came from `Box::into_raw`; llama.cpp has the same pointer,
    /// and uses it only inside `llama_decode`.
    callback: Option<NonNull<CallbackState>>,
    /// The adapters that the context uses, with their scales; dropped after it.
    loras: Vec<(Arc<LoraHandle>, f32)>,
    /// Last field: dropped after the context.
    model: Arc<ModelHandle>,
}

// SAFETY: a `llama_context` may be used from any thread, by one thread at a time, and the handle is not `Sync`. Its
// raw pointers lead to memory that it owns alone: the scratch pointers are rebuilt before each use, and
// `CallbackState` is `Send`, as asserted below.
unsafe impl Send for ContextHandle {}

const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<CallbackState>();
};

impl Drop for ContextHandle {
    fn drop(&mut self) {
        // SAFETY: both pointers came from their constructors and are freed once. The context is freed before the
        // threads that it uses, and before the model, which is a field of this struct.
        unsafe {
            sys::llama_free(self.context.as_ptr());
            sys::ggml_threadpool_free(self.threadpool.as_ptr());
        }
        if let Some(state) = self.callback {
            // SAFETY: came from `Box::into_raw` and is freed once; the context that had the pointer is gone.
            drop(unsafe { Box::from_raw(state.as_ptr()) });
        }
    }
}

impl ContextHandle {
    /// Opens a context; with a `watch`, installs the eval callback, which cannot be done later.
    ///
    /// `None` if llama.cpp refuses, most often because memory runs out. Its log has the reason.
    pub(in crate::engine) fn new(
        model: Arc<ModelHandle>,
        params: &ContextParams,
        watch: Option<Watch>,
    ) -> Option<ContextHandle> {
        // SAFETY: returns a plain struct.
        let mut raw = unsafe { sys::llama_context_default_params() };
        raw.n_ctx = params.n_ctx;
        raw.n_batch = params.n_batch;
        raw.n_ubatch = params.n_ubatch;
        raw.n_seq_max = params.n_seq_max;
        raw.n_threads = params.n_threads;
        raw.n_threads_batch = params.n_threads_batch;
        raw.flash_attn_type = match params.flash_attention {
            FlashAttention::On => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
            FlashAttention::Off => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
            FlashAttention::Auto => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
        };
        // One stream per sequence: in a unified cache every token attends over the cells of all sequences.
        raw.kv_unified = false;
        raw.no_perf = true;
        raw.type_k = params.cache_type_k.raw();
        raw.type_v = params.cache_type_v.raw();
        let callback = watch.map(|watch| {
            let state = Box::into_raw(Box::new(CallbackState { watch, fault: None }));
            raw.cb_eval = Some(eval_callback);
            raw.cb_eval_user_data = state.cast();
            // SAFETY: `Box::into_raw` never returns null.
            unsafe { NonNull::new_unchecked(state) }
        });
        let free_callback = || {
            if let Some(state) = callback {
                // SAFETY: came from `Box::into_raw` above, and no context has it, because none was made.
                drop(unsafe { Box::from_raw(state.as_ptr()) });
            }
        };

        // SAFETY: returns a plain struct.
        let mut threads =
            unsafe { sys::ggml_threadpool_params_default(params.n_threads.max(params.n_threads_batch)) };
        // SAFETY: ggml filled in the parameters, and they live during the call.
        let Some(threadpool) = NonNull::new(unsafe { sys::ggml_threadpool_new(&mut threads) }) else {
            free_callback();
            return None;
        };
        // SAFETY: the model is alive and held by the handle. The pointers in `raw` are the defaults, or the callback
        // and its state, which live until the context is freed.
        let context = unsafe { sys::llama_init_from_model(model.model.as_ptr(), raw) };
        let Some(context) = NonNull::new(context) else {
            // SAFETY: came from ggml_threadpool_new; nothing else uses the pool.
            unsafe { sys::ggml_threadpool_free(threadpool.as_ptr()) };
            free_callback();
            return None;
        };
        // Without a pool, llama.cpp starts and ends threads at every decode.
        // SAFETY: both are alive, and `drop` frees the pool after the context.
        unsafe { sys::llama_attach_threadpool(context.as_ptr(), threadpool.as_ptr(), ptr::null_mut()) };
        // SAFETY: the context is alive.
        let (n_batch, n_seq_max) =
            unsafe { (sys::llama_n_batch(context.as_ptr()), sys::llama_n_seq_max(context.as_ptr())) };
        Some(ContextHandle {
            context,
            threadpool,
            n_batch: n_batch as usize,
            n_seq_max: n_seq_max as usize,
            outputs: Vec::new(),
            n_sequences: Vec::new(),
            sequence_pointers: Vec::new(),
            callback,
            loras: Vec::new(),
            model,
        })
    }

    /// Cells of each sequence; llama.cpp rounds the requested number up.
    pub(in crate::engine) fn n_ctx_seq(&self) -> usize {
        // SAFETY: the context is alive.
        unsafe { sys::llama_n_ctx_seq(self.context.as_ptr()) as usize }
    }

    pub(in crate::engine) fn n_batch(&self) -> usize {
        self.n_batch
    }

    /// Decodes a batch; afterwards [`ContextHandle::logits`] has the requested rows.
    pub(in crate::engine) fn decode(&mut self, batch: &mut Batch) -> Result<(), String> {
        self.outputs.clear();
        batch.check(&self.model, self.n_batch, self.n_seq_max)?;
        let n_tokens = batch.len();
        if let Some(mut state) = self.callback {
            // SAFETY: alive, see the field `callback`; no decode is in progress.
            let state = unsafe { state.as_mut() };
            state.fault = None;
            state.watch.begin(&batch.sequences, &batch.outputs);
        }
        self.n_sequences.clear();
        self.n_sequences.resize(n_tokens, 1);
        self.sequence_pointers.clear();
        self.sequence_pointers.extend(batch.sequences.iter_mut().map(ptr::from_mut));
        let raw = sys::llama_batch {
            n_tokens: n_tokens as i32,
            token: batch.tokens.as_mut_ptr(),
            embd: ptr::null_mut(),
            pos: batch.positions.as_mut_ptr(),
            n_seq_id: self.n_sequences.as_mut_ptr(),
            seq_id: self.sequence_pointers.as_mut_ptr(),
            logits: batch.outputs.as_mut_ptr(),
        };
        // SAFETY: every array of `raw` has n_tokens entries and lives during the call; each sequence list has one
        // entry, as n_seq_id says; tokens and sequences were checked above; llama_decode keeps none of the pointers.
        let code = unsafe { sys::llama_decode(self.context.as_ptr(), raw) };
        let mut is_whole = true;
        if let Some(mut state) = self.callback {
            // SAFETY: alive, as above, and the decode is over.
            let state = unsafe { state.as_mut() };
            if let Some(fault) = state.fault.take() {
                return Err(fault);
            }
            if code == 0 {
                state.watch.finish()?;
            }
            is_whole = !state.watch.stops_early();
        }
        match code {
            // The graph ended before the logits, so there are none.
            0 if !is_whole => Ok(()),
            0 => {
                self.outputs.clone_from(&batch.outputs);
                if let Some(first) = batch.outputs.iter().position(|&output| output == 1) {
                    // SAFETY: the context is alive, and the index is of a token with logits. The result is not used;
                    // `logits` says why the call is made.
                    unsafe { sys::llama_get_logits_ith(self.context.as_ptr(), first as i32) };
                }
                Ok(())
            }
            1 => Err("no room left in the KV cache".into()),
            2 => Err("aborted".into()),
            -1 => Err("invalid batch".into()),
            other => Err(format!("llama_decode returned {other}")),
        }
    }

    /// The logits after token `index` of the last batch, shape `[n_vocab]`.
    ///
    /// `None` unless the batch was decoded and the token is one of its outputs.
    pub(in crate::engine) fn logits(&self, index: usize) -> Option<&[f32]> {
        if self.outputs.get(index) != Some(&1) {
            return None;
        }
        // SAFETY: the context is alive, the index is of a token with logits, and null is handled below. The first
        // such call after a decode reorders the rows to the batch's order. `decode` makes that call, so no row moves
        // under a slice returned here.
        let row = unsafe { sys::llama_get_logits_ith(self.context.as_ptr(), index as i32) };
        // SAFETY: a non-null row has n_vocab floats and lives until the next decode.
        NonNull::new(row).map(|row| unsafe { std::slice::from_raw_parts(row.as_ptr(), self.model.n_vocab()) })
    }

    /// The watch of the eval callback, if it is installed.
    pub(in crate::engine) fn watch(&mut self) -> Option<&mut Watch> {
        // SAFETY: alive, see the field `callback`; no decode is in progress while `self` is borrowed here.
        self.callback.map(|mut state| unsafe { &mut state.as_mut().watch })
    }

    /// Sets the control vector, or removes it with `None`; false if llama.cpp refuses.
    ///
    /// `rows` are added to the residual stream, `[n_layer - 1][n_embd]`, from block 1 on.
    #[must_use]
    pub(in crate::engine) fn set_control_vector(&mut self, rows: Option<&[f32]>, n_layer: usize) -> bool {
        let n_embd = self.model.n_embd();
        if rows.is_some_and(|rows| n_layer == 0 || rows.len() != n_embd * (n_layer - 1)) {
            return false;
        }
        let (data, len) = rows.map_or((ptr::null(), 0), |rows| (rows.as_ptr(), rows.len()));
        // SAFETY: the context is alive. The buffer has a row for every layer but the first, as llama.cpp expects, and
        // is copied during the call. Null removes the vector.
        let code = unsafe {
            sys::llama_set_adapter_cvec(
                self.context.as_ptr(),
                data,
                len,
                n_embd as i32,
                1,
                n_layer as i32 - 1,
            )
        };
        code == 0
    }

    /// Replaces the adapters.
    pub(in crate::engine) fn set_loras(&mut self, loras: &[(Arc<LoraHandle>, f32)]) {
        assert!(
            loras.iter().all(|(lora, _)| Arc::ptr_eq(&lora.model, &self.model)),
            "adapters must be loaded for the model of this context"
        );
        let mut adapters: Vec<*mut sys::llama_adapter_lora> =
            loras.iter().map(|(lora, _)| lora.adapter.as_ptr()).collect();
        let mut scales: Vec<f32> = loras.iter().map(|&(_, scale)| scale).collect();
        // SAFETY: the context is alive; both arrays have the given length and are read only during the call; the
        // adapters belong to this context's model, and `self.loras` keeps them alive while they are in use.
        unsafe {
            sys::llama_set_adapters_lora(
                self.context.as_ptr(),
                adapters.as_mut_ptr(),
                adapters.len(),
                scales.as_mut_ptr(),
            )
        };
        // Only now, so that the adapters used until now outlive the call.
        self.loras = loras.to_vec();
    }

    /// Forgets every sequence.
    pub(in crate::engine) fn clear(&mut self) {
        // SAFETY: the context is alive. A decoder's context has a memory, and null is checked for.
        unsafe {
            let memory = sys::llama_get_memory(self.context.as_ptr());
            if !memory.is_null() {
                sys::llama_memory_clear(memory, false);
            }
        }
    }

    /// Forgets one sequence.
    pub(in crate::engine) fn remove(&mut self, sequence: usize) {
        assert!(sequence < self.n_seq_max, "sequences must be slots of this session");
        // SAFETY: the context is alive, and the sequence is in range, which llama.cpp would assert.
        unsafe {
            let memory = sys::llama_get_memory(self.context.as_ptr());
            if !memory.is_null() {
                sys::llama_memory_seq_rm(memory, sequence as i32, -1, -1);
            }
        }
    }

    /// Copies the used cells of a sequence's KV; `None` if llama.cpp cannot.
    pub(in crate::engine) fn save(&mut self, sequence: usize) -> Option<SequenceState> {
        let sequence = i32::try_from(sequence).ok().filter(|&s| (s as usize) < self.n_seq_max)?;
        // SAFETY: the context is alive and the sequence in range.
        let n_bytes = unsafe { sys::llama_state_seq_get_size(self.context.as_ptr(), sequence) };
        let mut bytes = vec![0u8; n_bytes];
        // SAFETY: as above; the buffer has n_bytes, and llama.cpp writes at most that many.
        let n = unsafe {
            sys::llama_state_seq_get_data(self.context.as_ptr(), bytes.as_mut_ptr(), n_bytes, sequence)
        };
        (n > 0 && n == n_bytes).then(|| SequenceState { bytes, model: self.model.clone() })
    }

    /// Restores a saved sequence; if llama.cpp cannot, returns false and leaves the sequence empty.
    #[must_use]
    pub(in crate::engine) fn restore(&mut self, state: &SequenceState, sequence: usize) -> bool {
        let SequenceState { bytes, model } = state;
        // Bytes of another model would be misread, so they must come from a context over this same model.
        if sequence >= self.n_seq_max || !Arc::ptr_eq(model, &self.model) {
            return false;
        }
        // SAFETY: the context is alive, the sequence is in range, and `save` wrote these bytes for this model, so
        // their header and sizes are what llama.cpp expects.
        let n = unsafe {
            sys::llama_state_seq_set_data(self.context.as_ptr(), bytes.as_ptr(), bytes.len(), sequence as i32)
        };
        n > 0
    }

    /// Copies sequence `from` to `to`; the bytes are copied at the next decode.
    pub(in crate::engine) fn copy(&mut self, from: usize, to: usize) {
        assert!(
            from < self.n_seq_max && to < self.n_seq_max && from != to,
            "sequences must be slots of this session"
        );
        // SAFETY: the context is alive and both sequences are in range. Between streams only whole sequences can be
        // copied, which is what -1, -1 asks for.
        unsafe {
            let memory = sys::llama_get_memory(self.context.as_ptr());
            if !memory.is_null() {
                sys::llama_memory_seq_cp(memory, from as i32, to as i32, -1, -1);
            }
        }
    }
}
