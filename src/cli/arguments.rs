//! Arguments shared by several commands.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::engine::schedule::GenerateOptions;
use crate::engine::{CacheType, FlashAttention, Model, ModelOptions, Sampling, SessionOptions};
use crate::error::{Error, Result};
use crate::eval::prompts::{Prompt, PromptColumns, PromptSource};
use crate::file::base_name;
use crate::text::language;

/// Flags for loading and running the model.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "llama.cpp")]
pub struct EngineArguments {
    /// Number of sequences to decode in parallel (-np) [default: as many as fit in memory and context, up to 100]
    #[arg(long, value_name = "N")]
    pub parallel: Option<usize>,
    /// Size of the context in tokens, shared by all sequences; 0 = as needed by the prompts [default: 0]
    #[arg(short = 'c', long, value_name = "N")]
    pub ctx_size: Option<usize>,
    /// Logical maximum batch size in tokens
    #[arg(short = 'b', long, value_name = "N", default_value_t = 2048)]
    pub batch_size: usize,
    /// Physical maximum batch size in tokens (-ub)
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub ubatch_size: usize,
    /// Number of threads for generation [default: all cores]
    #[arg(short = 't', long, value_name = "N")]
    pub threads: Option<usize>,
    /// Number of threads for prompts and batches (-tb) [default: same as --threads]
    #[arg(long, value_name = "N")]
    pub threads_batch: Option<usize>,
    /// Number of layers to offload to the GPU (-ngl); -1 = all
    #[arg(long, alias = "gpu-layers", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub n_gpu_layers: i32,
    /// Flash Attention (-fa)
    #[arg(long, value_enum, default_value = "auto")]
    pub flash_attn: FlashAttentionArgument,
    /// Data type of K in the KV cache (-ctk)
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f16")]
    pub cache_type_k: CacheTypeArgument,
    /// Data type of V in the KV cache (-ctv)
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f16")]
    pub cache_type_v: CacheTypeArgument,
    /// Check the model's tensors for invalid values (NaN, infinity) while loading
    #[arg(long)]
    pub check_tensors: bool,
    /// Normalise texts to Unicode NFC before tokenising, as Hugging Face does for some models (Qwen, Command R)
    #[arg(long)]
    pub nfc: bool,
}

/// Data types of the KV cache, under llama.cpp's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, non_camel_case_types, reason = "ggml's own spelling")]
pub enum CacheTypeArgument {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
}

impl CacheTypeArgument {
    fn cache_type(self) -> CacheType {
        match self {
            CacheTypeArgument::F32 => CacheType::F32,
            CacheTypeArgument::F16 => CacheType::F16,
            CacheTypeArgument::Bf16 => CacheType::Bf16,
            CacheTypeArgument::Q8_0 => CacheType::Q8_0,
        }
    }
}

/// `on`, `off` or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FlashAttentionArgument {
    /// Always use it
    On,
    /// Never use it
    Off,
    /// Use it if the backend supports it
    Auto,
}

impl EngineArguments {
    /// Options for loading the model.
    pub fn model_options(&self) -> ModelOptions {
        ModelOptions { n_gpu_layers: self.n_gpu_layers, check_tensors: self.check_tensors, nfc: self.nfc }
    }

    /// Options for opening a session.
    pub fn session_options(&self) -> SessionOptions {
        SessionOptions {
            n_parallel: self.parallel,
            n_ctx: self.ctx_size.filter(|&n| n > 0),
            n_batch: self.batch_size,
            n_ubatch: self.ubatch_size,
            n_threads: self.threads,
            n_threads_batch: self.threads_batch,
            flash_attention: match self.flash_attn {
                FlashAttentionArgument::On => FlashAttention::On,
                FlashAttentionArgument::Off => FlashAttention::Off,
                FlashAttentionArgument::Auto => FlashAttention::Auto,
            },
            cache_type_k: self.cache_type_k.cache_type(),
            cache_type_v: self.cache_type_v.cache_type(),
        }
    }

    /// Loads a model with these options.
    pub fn open(&self, path: &Path) -> Result<Model> {
        Model::open(path, &self.model_options())
    }
}

/// Flags for sampling.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArguments {
    /// Number of continuations per prompt
    #[arg(short = 'k', long, value_name = "K", default_value_t = 25)]
    pub samples: u32,
    /// Maximum number of tokens in a continuation
    #[arg(short = 'n', long, alias = "predict", value_name = "N", default_value_t = 20)]
    pub n_predict: usize,
    /// Temperature; 0 = greedy
    #[arg(long, value_name = "T", default_value_t = Sampling::PAPER.temperature, allow_negative_numbers = true)]
    pub temp: f32,
    /// Top-p (nucleus) sampling: keep the most probable tokens that together reach this probability; 1 = off
    #[arg(long, value_name = "P", default_value_t = Sampling::PAPER.top_p, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Top-k sampling: keep this many of the most probable tokens; 0 = off
    #[arg(long, value_name = "K", default_value_t = Sampling::PAPER.top_k)]
    pub top_k: u32,
    /// Min-p sampling: drop tokens below this fraction of the highest probability; 0 = off
    #[arg(long, value_name = "P", default_value_t = Sampling::PAPER.min_p, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Random seed
    #[arg(short = 's', long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
    /// Keep generating after an end-of-generation token
    #[arg(long)]
    pub ignore_eos: bool,
}

impl SamplingArguments {
    /// Checks the ranges and returns the options.
    pub fn options(&self) -> Result<GenerateOptions> {
        let sampling =
            Sampling { temperature: self.temp, top_k: self.top_k, top_p: self.top_p, min_p: self.min_p };
        sampling.validate()?;
        for (flag, n) in [("-k/--samples", self.samples as usize), ("-n/--n-predict", self.n_predict)] {
            if n == 0 {
                return Err(Error::setting(flag, "expected at least 1, found 0"));
            }
        }
        Ok(GenerateOptions {
            k: self.samples,
            n_predict: self.n_predict,
            sampling,
            seed: self.seed,
            ignore_eos: self.ignore_eos,
        })
    }
}

/// Flags for choosing prompts.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Prompts")]
pub struct PromptArguments {
    /// File of prompts, or folder with a file per language: RTP-LX, RTP, JSON, CSV or text [default: built-in prompts]
    #[arg(long, value_name = "PATH")]
    pub prompts: Option<PathBuf>,
    /// Languages to use, separated by commas [default: all available]
    #[arg(long, value_name = "L,…", value_delimiter = ',')]
    pub lang: Vec<String>,
    /// Use only the first N prompts of each language
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Column with the prompt [default: prompt, text, question or similar]
    #[arg(long, value_name = "NAME")]
    pub prompt_column: Option<String>,
    /// Column with the language [default: language, lang or locale]
    #[arg(long, value_name = "NAME")]
    pub language_column: Option<String>,
    /// Column with the id [default: id or index]
    #[arg(long, value_name = "NAME")]
    pub id_column: Option<String>,
}

impl PromptArguments {
    /// Reads the prompts. Also returns the name of their source for reports.
    pub fn read(&self) -> Result<(Vec<Prompt>, String)> {
        let source = match &self.prompts {
            None => PromptSource::Own,
            Some(path) => PromptSource::open(path)?,
        };
        let name = match &self.prompts {
            None => "the program's own prompts".to_owned(),
            Some(path) => base_name(path),
        };
        let columns = PromptColumns {
            prompt: self.prompt_column.clone(),
            language: self.language_column.clone(),
            id: self.id_column.clone(),
        };
        let given = [
            ("--prompt-column", &columns.prompt),
            ("--language-column", &columns.language),
            ("--id-column", &columns.id),
        ];
        if let (None, Some((flag, _))) = (&self.prompts, given.iter().find(|(_, name)| name.is_some())) {
            return Err(Error::setting(*flag, "expected a file of prompts to read columns from, found none")
                .with_hint("give the file with --prompts"));
        }
        Ok((source.read_columns(&self.languages()?, self.limit, &columns)?, name))
    }

    /// The requested languages; empty means all.
    pub fn languages(&self) -> Result<Vec<&'static str>> {
        language::parse_languages(&self.lang)
    }
}
