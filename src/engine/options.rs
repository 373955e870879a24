//! Options of models and sessions: llama.cpp's flags, with llama.cpp's meanings.

use crate::error::{Error, Result};

/// ggml's own limit, `GGML_MAX_N_THREADS`.
pub(super) const MOST_THREADS: usize = 512;

/// Checks a number of threads, given with `flag`.
///
/// # Errors
/// [`Error::Setting`].
pub fn check_threads(flag: &str, n: usize) -> Result<()> {
    match (1..=MOST_THREADS).contains(&n) {
        true => Ok(()),
        false => Err(Error::setting(flag, format!("expected a number from 1 to {MOST_THREADS}, found {n}"))),
    }
}

/// How to load a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelOptions {
    /// Number of layers to offload to a GPU; negative for all (`-ngl`).
    pub n_gpu_layers: i32,
    /// Check every tensor for NaN and infinity while loading (`--check-tensors`).
    pub check_tensors: bool,
    /// Normalise every text to Unicode NFC before it is tokenised (`--nfc`).
    pub nfc: bool,
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions { n_gpu_layers: -1, check_tensors: false, nfc: false }
    }
}

/// How to open a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionOptions {
    /// Sequences decoded at once (`-np`); if `None`, chosen from memory and context.
    pub n_parallel: Option<usize>,
    /// Tokens of context, shared by all sequences (`-c`); if `None`, as many as the work needs.
    pub n_ctx: Option<usize>,
    /// Most tokens passed to llama.cpp at once (`-b`).
    pub n_batch: usize,
    /// Most tokens that llama.cpp computes at once (`-ub`).
    pub n_ubatch: usize,
    /// Threads (`-t`); if `None`, all cores.
    pub n_threads: Option<usize>,
    /// Threads for prompts and batches (`-tb`); if `None`, the same as `n_threads`.
    pub n_threads_batch: Option<usize>,
    /// Flash attention (`-fa`).
    pub flash_attention: FlashAttention,
    /// Type of the keys in the KV cache (`-ctk`).
    pub cache_type_k: CacheType,
    /// Type of the values in the KV cache (`-ctv`).
    pub cache_type_v: CacheType,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions {
            n_parallel: None,
            n_ctx: None,
            n_batch: 2048,
            n_ubatch: 512,
            n_threads: None,
            n_threads_batch: None,
            flash_attention: FlashAttention::Auto,
            cache_type_k: CacheType::default(),
            cache_type_v: CacheType::default(),
        }
    }
}

/// Whether attention runs as one fused operation (`-fa`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlashAttention {
    /// Always.
    On,
    /// Never.
    Off,
    /// If the backend supports it.
    #[default]
    Auto,
}

/// Type of the keys or values in the KV cache (`-ctk`, `-ctv`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, non_camel_case_types, reason = "ggml's own spelling")]
pub enum CacheType {
    F32,
    #[default]
    F16,
    Bf16,
    Q8_0,
}

impl CacheType {
    /// Bits per value.
    pub(super) fn bits(self) -> usize {
        match self {
            CacheType::F32 => 32,
            CacheType::F16 | CacheType::Bf16 => 16,
            // 8 bits, and a scale of two bytes per block of 32: half a bit more per value, rounded up.
            CacheType::Q8_0 => 9,
        }
    }
}
