//! Options of models and sessions: llama.cpp's flags, with llama.cpp's meanings.

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

/// Whether attention runs in one fused operation (`-fa`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlashAttention {
    /// Always.
    On,
    /// Never.
    Off,
    /// Where the backend supports it.
    #[default]
    Auto,
}

/// How keys or values are kept in the KV cache (`-ctk`, `-ctv`).
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
    /// Bits of one number.
    pub(super) fn bits(self) -> usize {
        match self {
            CacheType::F32 => 32,
            CacheType::F16 | CacheType::Bf16 => 16,
            // Blocks of 32 have a scale of two bytes; half a bit a number, rounded up.
            CacheType::Q8_0 => 9,
        }
    }
}

/// llama.cpp's flags for a context, with llama.cpp's meanings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionOptions {
    /// Sequences decoded at once (`-np`); chosen from memory and context if `None`.
    pub n_parallel: Option<usize>,
    /// Tokens of context, all sequences together (`-c`); as much as the work needs if `None`.
    pub n_ctx: Option<usize>,
    /// Tokens given to llama.cpp at once (`-b`).
    pub n_batch: usize,
    /// Tokens computed at once (`-ub`).
    pub n_ubatch: usize,
    /// Threads (`-t`); all cores if `None`.
    pub n_threads: Option<usize>,
    /// Threads for prompts and batches (`-tb`); as `n_threads` if `None`.
    pub n_threads_batch: Option<usize>,
    /// Fused attention (`-fa`).
    pub flash_attention: FlashAttention,
    /// Keys in the cache (`-ctk`).
    pub cache_type_k: CacheType,
    /// Values in the cache (`-ctv`).
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
