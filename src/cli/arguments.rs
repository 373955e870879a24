//! Arguments that several commands share.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::engine::schedule::GenerateOptions;
use crate::engine::{CacheType, FlashAttention, Model, ModelOptions, Sampling, SessionOptions};
use crate::error::{Error, Result};
use crate::eval::prompts::{Prompt, PromptSource};
use crate::file::AtomicFile;
use crate::text::language;

/// Whether a file can be written at `output`, before anything that takes long; and that it is none of
/// `inputs`: `-o` with the name of the model would leave a model's name on something else.
pub fn check_output(output: &Path, inputs: &[&Path]) -> Result<()> {
    let refuse = |reason: String| Err(Error::setting("-o/--output", reason));
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        return refuse(format!(
            "expected a file in a folder that is there, found no folder {}",
            folder.display()
        ));
    }
    if output.is_dir() {
        return refuse(format!("expected a file to write, found the folder {}", output.display()));
    }
    if let Ok(existing) = output.canonicalize()
        && inputs.iter().any(|input| input.canonicalize().is_ok_and(|input| input == existing))
    {
        return refuse(format!("{} is read by this command, and would be overwritten", output.display()));
    }
    AtomicFile::create(output).map(drop)
}

/// How the model is loaded and run.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "llama.cpp")]
pub struct EngineArguments {
    /// Sequences decoded at once (-np) [default: as many as memory and context hold, at most 100]
    #[arg(long, value_name = "N")]
    pub parallel: Option<usize>,
    /// Tokens of context, shared by all sequences; 0 for what the prompts need [default: 0]
    #[arg(short = 'c', long, value_name = "N")]
    pub ctx_size: Option<usize>,
    /// Tokens given to llama.cpp at once
    #[arg(short = 'b', long, value_name = "N", default_value_t = 2048)]
    pub batch_size: usize,
    /// Tokens computed at once (-ub)
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub ubatch_size: usize,
    /// Threads [default: all cores]
    #[arg(short = 't', long, value_name = "N")]
    pub threads: Option<usize>,
    /// Threads for prompts and batches (-tb) [default: as --threads]
    #[arg(long, value_name = "N")]
    pub threads_batch: Option<usize>,
    /// Layers on an accelerator (-ngl); -1 for all
    #[arg(long, alias = "gpu-layers", value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub n_gpu_layers: i32,
    /// Fused attention (-fa)
    #[arg(long, value_enum, default_value = "auto")]
    pub flash_attn: FlashAttentionArgument,
    /// Keys in the KV cache (-ctk)
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f16")]
    pub cache_type_k: CacheTypeArgument,
    /// Values in the KV cache (-ctv)
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f16")]
    pub cache_type_v: CacheTypeArgument,
    /// Look for values that are no numbers while loading
    #[arg(long)]
    pub check_tensors: bool,
}

/// llama.cpp's names of types.
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
    /// Always
    On,
    /// Never
    Off,
    /// Where the backend supports it
    Auto,
}

impl EngineArguments {
    /// Loading options.
    pub fn model_options(&self) -> ModelOptions {
        ModelOptions { n_gpu_layers: self.n_gpu_layers, check_tensors: self.check_tensors }
    }

    /// Session options.
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

/// What is sampled.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArguments {
    /// Continuations of each prompt
    #[arg(short = 'k', long, value_name = "K", default_value_t = 25)]
    pub samples: u32,
    /// Most tokens in a continuation
    #[arg(short = 'n', long, alias = "predict", value_name = "N", default_value_t = 20)]
    pub n_predict: usize,
    /// Temperature; 0 is greedy
    #[arg(long, value_name = "T", default_value_t = Sampling::PAPER.temperature, allow_negative_numbers = true)]
    pub temp: f32,
    /// Sample from the most probable tokens that have this mass together
    #[arg(long, value_name = "P", default_value_t = Sampling::PAPER.top_p, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Sample from this many most probable tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = Sampling::PAPER.top_k)]
    pub top_k: u32,
    /// Leave out tokens less probable than this share of the most probable one
    #[arg(long, value_name = "P", default_value_t = Sampling::PAPER.min_p, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Seed
    #[arg(short = 's', long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
    /// Go on after an end-of-generation token
    #[arg(long)]
    pub ignore_eos: bool,
}

impl SamplingArguments {
    /// The options, with their ranges checked.
    pub fn options(&self) -> Result<GenerateOptions> {
        let sampling =
            Sampling { temperature: self.temp, top_k: self.top_k, top_p: self.top_p, min_p: self.min_p };
        sampling.validate()?;
        for (flag, n) in [("-k/--samples", self.samples as usize), ("-n/--n-predict", self.n_predict)] {
            if n == 0 {
                return Err(Error::setting(flag, "expected a number from 1 up, found 0"));
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

/// What is continued.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Prompts")]
pub struct PromptArguments {
    /// File or folder by language: RTP-LX, RTP, JSON lines or text [default: the program's own prompts]
    #[arg(long, value_name = "PATH")]
    pub prompts: Option<PathBuf>,
    /// Languages, comma separated [default: all that there are]
    #[arg(long, value_name = "L,…", value_delimiter = ',')]
    pub lang: Vec<String>,
    /// At most so many prompts a language, the first ones
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
}

impl PromptArguments {
    /// Reads the prompts; also what to call their source in reports.
    pub fn read(&self) -> Result<(Vec<Prompt>, String)> {
        let source = match &self.prompts {
            None => PromptSource::Own,
            Some(path) => PromptSource::open(path)?,
        };
        let name = match &self.prompts {
            None => "the program's own prompts".to_owned(),
            Some(path) => crate::file::base_name(path),
        };
        Ok((source.read(&self.languages()?, self.limit)?, name))
    }

    /// The languages asked for; none for all.
    pub fn languages(&self) -> Result<Vec<&'static str>> {
        language::parse_languages(&self.lang)
    }
}
