//! An owned `llama_model`.

use std::ffi::CStr;
use std::ptr::NonNull;
use std::sync::Mutex;

use llama_cpp_sys_2 as sys;

use super::{path_bytes, start_backend, with_reason};
use crate::engine::Token;
use crate::engine::in_use::InUse;
use crate::gguf::GgufFile;

/// Load parameters, in llama.cpp's own terms.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct LoadParams {
    pub n_gpu_layers: i32,
    pub check_tensors: bool,
    /// Load only the vocabulary. Such a model can tokenize, but not run.
    pub vocab_only: bool,
}

/// A loaded model.
#[derive(Debug)]
pub(in crate::engine) struct ModelHandle {
    pub(super) model: NonNull<sys::llama_model>,
    vocab: NonNull<sys::llama_vocab>,
    _in_use: Vec<InUse>,
    /// Held while llama.cpp writes to the model's list of adapters.
    pub(super) adapters: Mutex<()>,
}

// SAFETY: a loaded `llama_model` is not written to, except for its list of adapters, which `adapters` guards.
// llama.cpp itself shares one between threads that each have their own context.
unsafe impl Send for ModelHandle {}
// SAFETY: as for `Send`; every method here only reads.
unsafe impl Sync for ModelHandle {}

impl Drop for ModelHandle {
    fn drop(&mut self) {
        // SAFETY: the pointer came from llama_model_load_from_file and is freed once. Every context over it holds an
        // `Arc` of this handle, so none is left.
        unsafe { sys::llama_model_free(self.model.as_ptr()) }
    }
}

impl ModelHandle {
    /// Loads a GGUF that `gguf::GgufFile::open` has validated. The error is what llama.cpp says, or empty.
    pub(in crate::engine) fn load(file: &GgufFile, params: LoadParams) -> Result<ModelHandle, String> {
        start_backend();
        with_reason(|| ModelHandle::load_logged(file, params))
    }

    fn load_logged(file: &GgufFile, params: LoadParams) -> Option<ModelHandle> {
        let in_use = file.part_paths().map(|part| InUse::enter("model", part)).collect();
        let path = path_bytes(file.path())?;
        // SAFETY: returns a plain struct.
        let mut raw = unsafe { sys::llama_model_default_params() };
        raw.n_gpu_layers = params.n_gpu_layers;
        raw.check_tensors = params.check_tensors;
        raw.vocab_only = params.vocab_only;
        // SAFETY: `path` is NUL-terminated and lives during the call; the pointers in `raw` are the defaults (null);
        // the backend was started above.
        let model = NonNull::new(unsafe { sys::llama_model_load_from_file(path.as_ptr(), raw) })?;
        // SAFETY: the model is alive; its vocabulary belongs to it and lives as long.
        let vocab = unsafe { sys::llama_model_get_vocab(model.as_ptr()) };
        match NonNull::new(vocab.cast_mut()) {
            Some(vocab) => Some(ModelHandle { model, vocab, _in_use: in_use, adapters: Mutex::new(()) }),
            None => {
                // SAFETY: the model came from llama_model_load_from_file and is not used again.
                unsafe { sys::llama_model_free(model.as_ptr()) };
                None
            }
        }
    }

    pub(in crate::engine) fn n_vocab(&self) -> usize {
        // SAFETY: the vocabulary lives as long as the model.
        unsafe { sys::llama_vocab_n_tokens(self.vocab.as_ptr()) }.try_into().unwrap_or(0)
    }

    /// Width of the residual stream.
    pub(in crate::engine) fn n_embd(&self) -> usize {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_embd(self.model.as_ptr()) }.try_into().unwrap_or(0)
    }

    pub(in crate::engine) fn n_ctx_train(&self) -> usize {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_ctx_train(self.model.as_ptr()) }.try_into().unwrap_or(0)
    }

    pub(in crate::engine) fn n_params(&self) -> u64 {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_params(self.model.as_ptr()) }
    }

    /// Whether the model generates token by token, with a decoder only.
    pub(in crate::engine) fn is_decoder_only(&self) -> bool {
        // SAFETY: the model is alive.
        unsafe {
            let model = self.model.as_ptr();
            sys::llama_model_has_decoder(model)
                && !sys::llama_model_has_encoder(model)
                && !sys::llama_model_is_diffusion(model)
        }
    }

    /// Whether each sequence has a recurrent state, instead of a KV cache or beside one.
    pub(in crate::engine) fn has_state(&self) -> bool {
        // SAFETY: the model is alive.
        unsafe {
            sys::llama_model_is_recurrent(self.model.as_ptr())
                || sys::llama_model_is_hybrid(self.model.as_ptr())
        }
    }

    /// llama.cpp's description, such as `llama 134.52M Q4_1`.
    pub(in crate::engine) fn description(&self) -> String {
        let mut buffer = [0u8; 256];
        // SAFETY: the buffer has the given length; llama.cpp writes at most that and terminates it with NUL.
        unsafe { sys::llama_model_desc(self.model.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
        CStr::from_bytes_until_nul(&buffer).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
    }

    pub(in crate::engine) fn is_end_of_generation(&self, token: Token) -> bool {
        self.holds(token)
            // SAFETY: the token is in the vocabulary, which lives as long as the model.
            && unsafe { sys::llama_vocab_is_eog(self.vocab.as_ptr(), token) }
    }

    pub(in crate::engine) fn is_control(&self, token: Token) -> bool {
        self.holds(token)
            // SAFETY: the token is in the vocabulary, which lives as long as the model.
            && unsafe { sys::llama_vocab_is_control(self.vocab.as_ptr(), token) }
    }

    pub(in crate::engine) fn holds(&self, token: Token) -> bool {
        usize::try_from(token).is_ok_and(|t| t < self.n_vocab())
    }

    /// The token that ends a text, if there is one.
    pub(in crate::engine) fn eos(&self) -> Option<Token> {
        // SAFETY: the vocabulary lives as long as the model.
        let token = unsafe { sys::llama_vocab_eos(self.vocab.as_ptr()) };
        self.holds(token).then_some(token)
    }

    /// The BOS token, if the metadata asks for it before every text.
    pub(in crate::engine) fn added_begin(&self) -> Option<Token> {
        // SAFETY: the vocabulary lives as long as the model.
        let (is_added, token) = unsafe {
            (sys::llama_vocab_get_add_bos(self.vocab.as_ptr()), sys::llama_vocab_bos(self.vocab.as_ptr()))
        };
        (is_added && self.holds(token)).then_some(token)
    }

    /// The EOS token, if the metadata asks for it after every text.
    pub(in crate::engine) fn added_end(&self) -> Option<Token> {
        // SAFETY: the vocabulary lives as long as the model.
        let is_added = unsafe { sys::llama_vocab_get_add_eos(self.vocab.as_ptr()) };
        self.eos().filter(|_| is_added)
    }

    /// Tokenizes `text`; `None` if it is longer than llama.cpp can count.
    pub(in crate::engine) fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Option<Vec<Token>> {
        let n_bytes = i32::try_from(text.len()).ok()?;
        // A token covers at least one byte, except for a few special tokens. If the buffer is still too small, the
        // result is the negated number of tokens.
        let mut tokens = vec![0 as Token; text.len() + 8];
        for _ in 0..2 {
            let room = i32::try_from(tokens.len()).ok()?;
            // SAFETY: the text and token buffers have the given lengths, and live during the call.
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

    /// The bytes of one token. Those of a control token are its name if `show_control`, and otherwise empty.
    pub(in crate::engine) fn piece(&self, token: Token, show_control: bool) -> Vec<u8> {
        if !self.holds(token) {
            return Vec::new();
        }
        let mut bytes = vec![0u8; 32];
        for _ in 0..2 {
            // SAFETY: the token is in the vocabulary, and the buffer has the given length.
            let n = unsafe {
                sys::llama_token_to_piece(
                    self.vocab.as_ptr(),
                    token,
                    bytes.as_mut_ptr().cast(),
                    bytes.len() as i32,
                    0,
                    show_control,
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
