//! Every `unsafe` over llama.cpp: owned handles whose methods cannot be called wrongly.
//!
//! Two handles: [`ModelHandle`] owns a `llama_model`, [`ContextHandle`] owns a `llama_context` and
//! holds its model, so that the model is freed last. llama.cpp ends the process on a failed
//! assertion; what can be checked is therefore checked here before each call, in [`Batch::check`].

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};

use llama_cpp_sys_2 as sys;

use super::Token;
use super::session::FlashAttention;

/// Starts llama.cpp once for the process, and sends its log to `tracing`.
pub(super) fn start_backend() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        // SAFETY: the callback is a function that lives as long as the program and takes no user data;
        // starting the backend has no precondition, and doing it again changes nothing.
        unsafe {
            sys::llama_log_set(Some(log), ptr::null_mut());
            sys::llama_backend_init();
        }
    });
}

/// A line of llama.cpp's log that has not ended yet, with its level.
static UNFINISHED: Mutex<(tracing::Level, String)> = Mutex::new((tracing::Level::INFO, String::new()));

/// Receives llama.cpp's log, which comes in parts of lines.
extern "C" fn log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    // A panic (of a subscriber, say) must not cross into C; a lost line of log is the lesser harm.
    let _ = std::panic::catch_unwind(|| {
        // SAFETY: llama.cpp passes a terminated string that lives during the call.
        let text = unsafe { text_of(text) };
        let mut unfinished = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
        match level {
            sys::GGML_LOG_LEVEL_CONT => {}
            sys::GGML_LOG_LEVEL_ERROR => unfinished.0 = tracing::Level::ERROR,
            sys::GGML_LOG_LEVEL_WARN => unfinished.0 = tracing::Level::WARN,
            sys::GGML_LOG_LEVEL_INFO => unfinished.0 = tracing::Level::INFO,
            _ => unfinished.0 = tracing::Level::DEBUG,
        }
        unfinished.1.push_str(&text);
        if !unfinished.1.ends_with('\n') {
            return;
        }
        let (level, line) = (unfinished.0, std::mem::take(&mut unfinished.1));
        drop(unfinished);
        let line = line.trim_end();
        match level {
            tracing::Level::ERROR => tracing::error!(target: "llama.cpp", "{line}"),
            tracing::Level::WARN => tracing::warn!(target: "llama.cpp", "{line}"),
            tracing::Level::INFO => tracing::info!(target: "llama.cpp", "{line}"),
            _ => tracing::debug!(target: "llama.cpp", "{line}"),
        }
    });
}

/// The version of llama.cpp that is linked in.
pub(super) fn llama_version() -> String {
    // SAFETY: returns a pointer to a static, terminated string.
    unsafe { text_of(sys::llama_version()) }
}

/// What this build of ggml uses of the CPU, such as `CPU : AVX512 = 1 | AMX_INT8 = 1`.
pub(super) fn system_info() -> String {
    static INFO: OnceLock<String> = OnceLock::new();
    let info = INFO.get_or_init(|| {
        start_backend();
        // SAFETY: llama.cpp writes the text into one static buffer at each call; this is the only call, made
        // once, and it copies the text before it returns.
        unsafe { text_of(sys::llama_print_system_info()) }
    });
    info.clone()
}

/// The most sequences that one context can have.
pub(super) fn most_sequences() -> usize {
    // SAFETY: returns a constant.
    unsafe { sys::llama_max_parallel_sequences() }
}

/// Whether this build can compute elsewhere than on the CPU.
pub(super) fn supports_offload() -> bool {
    start_backend();
    // SAFETY: asks the registered backends, which `start_backend` has registered; changes nothing.
    unsafe { sys::llama_supports_gpu_offload() }
}

/// # Safety
/// `pointer` is null or points to a terminated string that lives during the call.
unsafe fn text_of(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: not null, and terminated by the contract above.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

/// Loading parameters, in llama.cpp's own terms.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoadParams {
    pub n_gpu_layers: i32,
    pub check_tensors: bool,
}

/// A loaded model.
#[derive(Debug)]
pub(super) struct ModelHandle {
    model: NonNull<sys::llama_model>,
    vocab: NonNull<sys::llama_vocab>,
}

// SAFETY: a `llama_model` is not written to after it was loaded (adapters are kept by contexts), and
// llama.cpp itself shares one between threads that each have their own context.
unsafe impl Send for ModelHandle {}
// SAFETY: as above: every method here only reads.
unsafe impl Sync for ModelHandle {}

impl Drop for ModelHandle {
    fn drop(&mut self) {
        // SAFETY: the pointer came from llama_model_load_from_file, is freed once, and every context
        // over it holds an `Arc` of this handle, so that none is left.
        unsafe { sys::llama_model_free(self.model.as_ptr()) }
    }
}

impl ModelHandle {
    /// Loads a GGUF that `gguf::GgufFile::open` has validated; `None` when llama.cpp refuses it.
    pub(super) fn load(path: &Path, params: LoadParams) -> Option<ModelHandle> {
        start_backend();
        let path = CString::new(path.to_str()?).ok()?;
        // SAFETY: returns a plain struct.
        let mut raw = unsafe { sys::llama_model_default_params() };
        raw.n_gpu_layers = params.n_gpu_layers;
        raw.check_tensors = params.check_tensors;
        // SAFETY: `path` is terminated and lives during the call; the pointers inside `raw` are the
        // defaults (null), and the backend was started above.
        let model = NonNull::new(unsafe { sys::llama_model_load_from_file(path.as_ptr(), raw) })?;
        // SAFETY: the model is alive; the vocabulary belongs to it and lives as long.
        let vocab = unsafe { sys::llama_model_get_vocab(model.as_ptr()) };
        match NonNull::new(vocab.cast_mut()) {
            Some(vocab) => Some(ModelHandle { model, vocab }),
            None => {
                // SAFETY: the model came from llama_model_load_from_file and is not used again.
                unsafe { sys::llama_model_free(model.as_ptr()) };
                None
            }
        }
    }

    pub(super) fn n_vocab(&self) -> usize {
        // SAFETY: the vocabulary lives as long as the model.
        unsafe { sys::llama_vocab_n_tokens(self.vocab.as_ptr()) }.try_into().unwrap_or(0)
    }

    pub(super) fn n_ctx_train(&self) -> usize {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_ctx_train(self.model.as_ptr()) }.try_into().unwrap_or(0)
    }

    pub(super) fn n_params(&self) -> u64 {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_params(self.model.as_ptr()) }
    }

    /// Whether tokens are generated one after the other by a decoder alone.
    pub(super) fn is_decoder_only(&self) -> bool {
        // SAFETY: the model is alive.
        unsafe {
            let model = self.model.as_ptr();
            sys::llama_model_has_decoder(model)
                && !sys::llama_model_has_encoder(model)
                && !sys::llama_model_is_diffusion(model)
        }
    }

    /// llama.cpp's description, such as `llama 134.52M Q4_1`.
    pub(super) fn description(&self) -> String {
        let mut buffer = [0u8; 256];
        // SAFETY: the buffer is as long as said; llama.cpp writes at most that and terminates it.
        unsafe { sys::llama_model_desc(self.model.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
        CStr::from_bytes_until_nul(&buffer).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
    }

    pub(super) fn is_end_of_generation(&self, token: Token) -> bool {
        self.holds(token)
            // SAFETY: the token is inside the vocabulary, which lives as long as the model.
            && unsafe { sys::llama_vocab_is_eog(self.vocab.as_ptr(), token) }
    }

    pub(super) fn is_control(&self, token: Token) -> bool {
        self.holds(token)
            // SAFETY: the token is inside the vocabulary, which lives as long as the model.
            && unsafe { sys::llama_vocab_is_control(self.vocab.as_ptr(), token) }
    }

    pub(super) fn holds(&self, token: Token) -> bool {
        usize::try_from(token).is_ok_and(|t| t < self.n_vocab())
    }

    /// The token that ends a text, if the model's metadata asks for one after every text.
    pub(super) fn added_end(&self) -> Option<Token> {
        // SAFETY: the vocabulary lives as long as the model.
        let (is_added, token) = unsafe {
            (sys::llama_vocab_get_add_eos(self.vocab.as_ptr()), sys::llama_vocab_eos(self.vocab.as_ptr()))
        };
        is_added.then_some(token)
    }

    /// Tokens of `text`; `None` when it is longer than llama.cpp can count.
    pub(super) fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Option<Vec<Token>> {
        let n_bytes = i32::try_from(text.len()).ok()?;
        // A token covers at least a byte but for a few special ones; a negative answer gives the need.
        let mut tokens = vec![0 as Token; text.len() + 8];
        for _ in 0..2 {
            let room = i32::try_from(tokens.len()).ok()?;
            // SAFETY: text and token buffers are as long as said, and live during the call.
            let n = unsafe {
                sys::llama_tokenize(
                    self.vocab.as_ptr(),
                    text.as_ptr().cast(),
                    n_bytes,
                    tokens.as_mut_ptr(),
                    room,
                    add_special,
                    parse_special,
                )
            };
            if n == i32::MIN {
                return None;
            }
            let needed = n.unsigned_abs() as usize;
            tokens.resize(needed, 0);
            if n >= 0 {
                return Some(tokens);
            }
        }
        None
    }

    /// The bytes of one token; nothing for control tokens.
    pub(super) fn piece(&self, token: Token) -> Vec<u8> {
        if !self.holds(token) {
            return Vec::new();
        }
        let mut bytes = vec![0u8; 32];
        for _ in 0..2 {
            // SAFETY: the token is inside the vocabulary; the buffer is as long as said.
            let n = unsafe {
                sys::llama_token_to_piece(
                    self.vocab.as_ptr(),
                    token,
                    bytes.as_mut_ptr().cast(),
                    bytes.len() as i32,
                    0,
                    false,
                )
            };
            bytes.resize(n.unsigned_abs() as usize, 0);
            if n >= 0 {
                return bytes;
            }
        }
        Vec::new()
    }
}

/// Context parameters, in llama.cpp's own terms.
#[derive(Debug, Clone, Copy)]
pub(super) struct ContextParams {
    /// Cells of all sequences together.
    pub n_ctx: u32,
    pub n_batch: u32,
    pub n_ubatch: u32,
    pub n_seq_max: u32,
    pub n_threads: i32,
    pub n_threads_batch: i32,
    pub flash_attention: FlashAttention,
}

/// Tokens to decode, each with its sequence and position.
///
/// Four arrays of one length `n_tokens`, as `llama_batch` wants them.
#[derive(Debug, Default, Clone)]
pub(super) struct Batch {
    tokens: Vec<Token>,
    positions: Vec<i32>,
    sequences: Vec<i32>,
    outputs: Vec<i8>,
}

impl Batch {
    pub(super) fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.outputs.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Adds a token; returns its index, under which its logits are found after decoding.
    pub(super) fn push(&mut self, token: Token, position: usize, sequence: usize, output: bool) -> usize {
        self.tokens.push(token);
        self.positions.push(position as i32);
        self.sequences.push(sequence as i32);
        self.outputs.push(i8::from(output));
        self.tokens.len() - 1
    }

    /// What llama.cpp would answer with an assertion, or an error without a reason.
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
            return Err(format!("sequence {s} is outside the {n_seq_max} of this session"));
        }
        Ok(())
    }
}

/// The KV of one sequence, outside of any context.
#[derive(Debug)]
pub(super) struct SequenceState {
    bytes: Vec<u8>,
    /// Whose it is.
    model: Arc<ModelHandle>,
}

/// A context over a model, with its KV cache: one KV stream a sequence.
#[derive(Debug)]
pub(super) struct ContextHandle {
    context: NonNull<sys::llama_context>,
    threadpool: NonNull<sys::ggml_threadpool>,
    n_batch: usize,
    n_seq_max: usize,
    /// Which tokens of the last decoded batch have logits.
    outputs: Vec<i8>,
    /// Scratch of `decode`: `llama_batch` wants a pointer to every token's list of sequences.
    n_sequences: Vec<i32>,
    sequence_pointers: Vec<*mut i32>,
    /// Last field: dropped after the context.
    model: Arc<ModelHandle>,
}

// SAFETY: a `llama_context` may be used from any one thread at a time; the handle is not `Sync`, and
// its raw pointers lead to memory that it owns alone (the scratch pointers are rebuilt before each use).
unsafe impl Send for ContextHandle {}

impl Drop for ContextHandle {
    fn drop(&mut self) {
        // SAFETY: both pointers came from their constructors and are freed once; the context is freed
        // before the threads that it uses and before the model (a field of this struct).
        unsafe {
            sys::llama_free(self.context.as_ptr());
            sys::ggml_threadpool_free(self.threadpool.as_ptr());
        }
    }
}

impl ContextHandle {
    /// `None` when llama.cpp refuses, which it explains in its log: too little memory, most often.
    pub(super) fn new(model: Arc<ModelHandle>, params: &ContextParams) -> Option<ContextHandle> {
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
        // One stream a sequence: in a unified cache every token attends over all sequences' cells.
        raw.kv_unified = false;
        raw.no_perf = true;

        // SAFETY: returns a plain struct.
        let mut threads =
            unsafe { sys::ggml_threadpool_params_default(params.n_threads.max(params.n_threads_batch)) };
        // SAFETY: the parameters were filled in by ggml and live during the call.
        let threadpool = NonNull::new(unsafe { sys::ggml_threadpool_new(&mut threads) })?;
        // SAFETY: the model is alive and held by the handle; pointers inside `raw` are the defaults.
        let context = unsafe { sys::llama_init_from_model(model.model.as_ptr(), raw) };
        let Some(context) = NonNull::new(context) else {
            // SAFETY: nothing else has seen the threads.
            unsafe { sys::ggml_threadpool_free(threadpool.as_ptr()) };
            return None;
        };
        // Without a pool of its own llama.cpp starts and ends its threads at every decode.
        // SAFETY: both are alive; the pool is freed after the context, in `drop`.
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
            model,
        })
    }

    /// Cells that each sequence has; llama.cpp rounds up what was asked for.
    pub(super) fn n_ctx_seq(&self) -> usize {
        // SAFETY: the context is alive.
        unsafe { sys::llama_n_ctx_seq(self.context.as_ptr()) as usize }
    }

    pub(super) fn n_batch(&self) -> usize {
        self.n_batch
    }

    /// Decodes a batch; afterwards [`ContextHandle::logits`] has the rows that were asked for.
    pub(super) fn decode(&mut self, batch: &mut Batch) -> Result<(), String> {
        self.outputs.clear();
        batch.check(&self.model, self.n_batch, self.n_seq_max)?;
        let n_tokens = batch.len();
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
        // SAFETY: every array of `raw` has n_tokens entries and lives during the call, each sequence
        // list has the one entry that n_seq_id says, tokens and sequences were checked above, and
        // llama_decode keeps none of the pointers.
        let code = unsafe { sys::llama_decode(self.context.as_ptr(), raw) };
        match code {
            0 => {
                self.outputs.clone_from(&batch.outputs);
                if let Some(first) = batch.outputs.iter().position(|&output| output == 1) {
                    // SAFETY: the context is alive and the index is one whose logits were asked for; the
                    // answer is not used. See `logits` for why.
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
    /// `None` unless that token was pushed as an output and the batch was decoded.
    pub(super) fn logits(&self, index: usize) -> Option<&[f32]> {
        if self.outputs.get(index) != Some(&1) {
            return None;
        }
        // SAFETY: the context is alive, and the index is one whose logits were asked for; a null
        // answer is handled. The first such call after a decode puts the rows into the batch's order:
        // `decode` makes it, so that no row moves under a slice given out here.
        let row = unsafe { sys::llama_get_logits_ith(self.context.as_ptr(), index as i32) };
        // SAFETY: a row that is not null has n_vocab floats and lives until the next decode.
        NonNull::new(row).map(|row| unsafe { std::slice::from_raw_parts(row.as_ptr(), self.model.n_vocab()) })
    }

    /// Forgets every sequence.
    pub(super) fn clear(&mut self) {
        // SAFETY: the context is alive; a context of a decoder has a memory, and null is refused below.
        unsafe {
            let memory = sys::llama_get_memory(self.context.as_ptr());
            if !memory.is_null() {
                sys::llama_memory_clear(memory, false);
            }
        }
    }

    /// Forgets one sequence.
    pub(super) fn remove(&mut self, sequence: usize) {
        assert!(sequence < self.n_seq_max, "sequences are slots of this session");
        // SAFETY: the context is alive, the sequence is in range (llama.cpp would assert).
        unsafe {
            let memory = sys::llama_get_memory(self.context.as_ptr());
            if !memory.is_null() {
                sys::llama_memory_seq_rm(memory, sequence as i32, -1, -1);
            }
        }
    }

    /// Takes a copy of a sequence's KV, of the cells it uses; `None` when llama.cpp cannot.
    pub(super) fn save(&mut self, sequence: usize) -> Option<SequenceState> {
        let sequence = i32::try_from(sequence).ok().filter(|&s| (s as usize) < self.n_seq_max)?;
        // SAFETY: the context is alive and the sequence in range.
        let n_bytes = unsafe { sys::llama_state_seq_get_size(self.context.as_ptr(), sequence) };
        let mut bytes = vec![0u8; n_bytes];
        // SAFETY: as above; the buffer is as long as said, and llama.cpp writes at most that.
        let n = unsafe {
            sys::llama_state_seq_get_data(self.context.as_ptr(), bytes.as_mut_ptr(), n_bytes, sequence)
        };
        (n > 0 && n == n_bytes).then(|| SequenceState { bytes, model: self.model.clone() })
    }

    /// Makes `sequence` what was saved; false when llama.cpp cannot, and the sequence is then empty.
    #[must_use]
    pub(super) fn restore(&mut self, state: &SequenceState, sequence: usize) -> bool {
        let SequenceState { bytes, model } = state;
        // Another model's bytes would be read as ours: they come from a context over this very model.
        if sequence >= self.n_seq_max || !Arc::ptr_eq(model, &self.model) {
            return false;
        }
        // SAFETY: the context is alive, the sequence in range, and the bytes are as long as said and were
        // written by `save` for this model, so their header and sizes are what llama.cpp expects.
        let n = unsafe {
            sys::llama_state_seq_set_data(self.context.as_ptr(), bytes.as_ptr(), bytes.len(), sequence as i32)
        };
        n > 0
    }

    /// Makes `to` a copy of `from`; the bytes are copied at the next decode.
    pub(super) fn copy(&mut self, from: usize, to: usize) {
        assert!(
            from < self.n_seq_max && to < self.n_seq_max && from != to,
            "sequences are slots of this session"
        );
        // SAFETY: the context is alive and both sequences are in range; a copy between streams is
        // supported for whole sequences, which -1, -1 asks for.
        unsafe {
            let memory = sys::llama_get_memory(self.context.as_ptr());
            if !memory.is_null() {
                sys::llama_memory_seq_cp(memory, from as i32, to as i32, -1, -1);
            }
        }
    }
}
