//! A loaded model: its sizes and its tokenizer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gguf::{self, GgufFile};

use super::Token;
use super::ffi::{self, LoadParams, ModelHandle};

/// How to load a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelOptions {
    /// Layers kept on an accelerator; negative for all (`-ngl`).
    pub n_gpu_layers: i32,
    /// Read every tensor once and look for values that are not numbers (`--check-tensors`).
    pub check_tensors: bool,
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions { n_gpu_layers: -1, check_tensors: false }
    }
}

/// A model in memory, ready for any number of sessions.
#[derive(Debug, Clone)]
pub struct Model {
    pub(super) handle: Arc<ModelHandle>,
    path: PathBuf,
    architecture: String,
    kv_bytes_per_cell: usize,
    on_cpu: bool,
}

impl Model {
    /// Loads the GGUF at `path`.
    ///
    /// The file is validated by our own reader first, because llama.cpp ends the process where it is
    /// surprised. Errors: [`Error::Io`], [`Error::Gguf`], and [`Error::Model`] for a file that is well
    /// formed but no model that generates text, or that llama.cpp does not know.
    pub fn open(path: &Path, options: &ModelOptions) -> Result<Model> {
        let file = GgufFile::open(path)?;
        gguf::check_decoder(&file)?;
        let architecture = file.architecture()?.to_owned();
        let refused = |reason: String, hint: &str| Error::Model {
            path: path.to_path_buf(),
            reason,
            hint: Some(hint.to_owned()),
        };
        let params = LoadParams { n_gpu_layers: options.n_gpu_layers, check_tensors: options.check_tensors };
        file.check_unchanged()?;
        let handle = ModelHandle::load(path, params).ok_or_else(|| {
            refused(
                format!("llama.cpp {} refused it (architecture {architecture:?})", super::llama_version()),
                "run again with -v to see llama.cpp's own words",
            )
        })?;
        if !handle.is_decoder_only() {
            return Err(refused(
                format!("architecture {architecture:?} does not generate text token by token"),
                "use a decoder-only model, such as one of the llama, gemma or qwen families",
            ));
        }
        let kv_bytes_per_cell = kv_bytes_per_cell(&file);
        let on_cpu = options.n_gpu_layers == 0 || !ffi::supports_offload();
        Ok(Model {
            handle: Arc::new(handle),
            path: path.to_path_buf(),
            architecture,
            kv_bytes_per_cell,
            on_cpu,
        })
    }

    /// The file it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `general.architecture` of the GGUF.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// llama.cpp's one-line description: architecture, parameters, quantisation.
    pub fn description(&self) -> String {
        self.handle.description()
    }

    /// Tokens in the vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.handle.n_vocab()
    }

    /// Tokens of context that the model was trained with.
    pub fn n_ctx_train(&self) -> usize {
        self.handle.n_ctx_train()
    }

    /// Weights in the model.
    pub fn n_params(&self) -> u64 {
        self.handle.n_params()
    }

    /// Bytes of F16 KV cache that one token takes over all layers.
    pub fn kv_bytes_per_cell(&self) -> usize {
        self.kv_bytes_per_cell
    }

    /// Whether every layer is computed on the CPU.
    pub fn on_cpu(&self) -> bool {
        self.on_cpu
    }

    /// Tokens of a prompt, as it is: with the model's own BOS if its metadata asks for one, and with
    /// text such as `<s>` read as plain text.
    ///
    /// An EOS that the metadata asks for is left out: nothing goes on after the end of a text.
    pub fn tokenize_prompt(&self, text: &str) -> Result<Vec<Token>> {
        let mut tokens = self.tokenize(text, true)?;
        if tokens.last().copied() == self.handle.added_end() {
            tokens.pop();
        }
        Ok(tokens)
    }

    /// Tokens of a piece of text, without BOS or EOS.
    pub fn tokenize_text(&self, text: &str) -> Result<Vec<Token>> {
        self.tokenize(text, false)
    }

    fn tokenize(&self, text: &str, add_special: bool) -> Result<Vec<Token>> {
        self.handle.tokenize(text, add_special, false).ok_or_else(|| Error::Model {
            path: self.path.clone(),
            reason: format!("its tokenizer cannot take a text of {} bytes", text.len()),
            hint: None,
        })
    }

    /// The bytes that one token stands for; none for control tokens.
    pub fn piece(&self, token: Token) -> Vec<u8> {
        self.handle.piece(token)
    }

    /// The text of `tokens`. A character that the last tokens leave unfinished is left out; bytes that
    /// are no UTF-8 elsewhere become U+FFFD.
    pub fn detokenize(&self, tokens: &[Token]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&t| self.piece(t)).collect();
        text_of(&bytes)
    }

    /// Whether `token` is a control token, which stands for no text.
    pub fn is_control(&self, token: Token) -> bool {
        self.handle.is_control(token)
    }

    /// Whether `token` ends a generation.
    pub fn is_end_of_generation(&self, token: Token) -> bool {
        self.handle.is_end_of_generation(token)
    }
}

/// UTF-8 with an unfinished last character dropped, and anything else that is wrong replaced.
fn text_of(bytes: &[u8]) -> String {
    let whole = match std::str::from_utf8(bytes) {
        Ok(text) => return text.to_owned(),
        // `error_len` is none exactly when the input ends in the middle of a character.
        Err(e) if e.error_len().is_none() => &bytes[..e.valid_up_to()],
        Err(_) => {
            let unfinished = bytes.utf8_chunks().last().is_some_and(|c| {
                !c.invalid().is_empty()
                    && std::str::from_utf8(c.invalid()).is_err_and(|e| e.error_len().is_none())
            });
            let tail = bytes.utf8_chunks().last().map_or(0, |c| c.invalid().len());
            if unfinished { &bytes[..bytes.len() - tail] } else { bytes }
        }
    };
    String::from_utf8_lossy(whole).into_owned()
}

/// From metadata alone: layers times heads times (key + value) times two bytes.
fn kv_bytes_per_cell(file: &GgufFile) -> usize {
    let n_layer = file.n_layer().unwrap_or(1) as usize;
    let n_embd = file.n_embd().unwrap_or(1) as usize;
    let n_head = file.n_head().unwrap_or(1).max(1) as usize;
    let n_head_kv = file.n_head_kv().unwrap_or(n_head as u32).max(1) as usize;
    let of_head = |name: &str| {
        let value = file.arch_key(name).ok().and_then(|key| file.u32_if_present(&key).ok()?);
        value.map_or(n_embd / n_head, |n| n as usize)
    };
    n_layer * n_head_kv * (of_head("attention.key_length") + of_head("attention.value_length")) * 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cut_inside_a_character_ends_before_it() {
        // "né" is 6e c3 a9; "漢" is e6 bc a2.
        assert_eq!(text_of(&[0x6e, 0xc3]), "n");
        assert_eq!(text_of(&[0x6e, 0xe6, 0xbc]), "n");
        assert_eq!(text_of(&[0x6e, 0xc3, 0xa9]), "né");
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced_where_they_stand() {
        assert_eq!(text_of(&[0x61, 0xff, 0x62]), "a\u{fffd}b");
        assert_eq!(text_of(&[0x61, 0xff, 0x62, 0xe6, 0xbc]), "a\u{fffd}b");
        assert_eq!(text_of(&[0xff]), "\u{fffd}");
        assert_eq!(text_of(&[]), "");
    }
}
