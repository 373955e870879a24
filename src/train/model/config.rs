//! What a transformer is like, read from a GGUF's metadata: options, not one program for each family.

use crate::error::{Error, Result};
use crate::gguf::GgufFile;

use crate::train::device::{Activation, Attention, Norm, NormKind, Rope, RopePairs};

/// Where a token's position comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Position {
    Rope(RopePairs),
    /// A table that is added to the embeddings.
    Learned,
    Alibi,
}

/// What sets an architecture apart beyond its sizes.
struct Family {
    name: &'static str,
    norm: NormKind,
    position: Position,
    activation: Activation,
    /// The FFN multiplies by a second projection.
    gated: bool,
    /// Attention and FFN read the one norm of the block, and are added to its input together.
    parallel: bool,
    /// Embeddings are multiplied by the root of their width.
    scales_embedding: bool,
}

const LLAMA: Family = Family {
    name: "llama",
    norm: NormKind::Rms,
    position: Position::Rope(RopePairs::Adjacent),
    activation: Activation::Silu,
    gated: true,
    parallel: false,
    scales_embedding: false,
};

const GPT2: Family = Family {
    name: "gpt2",
    norm: NormKind::Layer,
    position: Position::Learned,
    activation: Activation::Gelu,
    gated: false,
    ..LLAMA
};

/// Each is tested against PyTorch (`tests/train`).
const FAMILIES: [Family; 7] = [
    LLAMA,
    Family { name: "command-r", norm: NormKind::Layer, parallel: true, ..LLAMA },
    GPT2,
    Family { name: "bloom", position: Position::Alibi, ..GPT2 },
    Family {
        name: "gemma3",
        position: Position::Rope(RopePairs::Halves),
        activation: Activation::Gelu,
        scales_embedding: true,
        ..LLAMA
    },
    Family { name: "qwen2", position: Position::Rope(RopePairs::Halves), ..LLAMA },
    Family { name: "qwen3", position: Position::Rope(RopePairs::Halves), ..LLAMA },
];

/// BLOOM's largest slope exponent, which its files do not tell (`bloom.cpp` of llama.cpp).
const BLOOM_MAX_ALIBI_BIAS: f32 = 8.0;

/// Layers of the one Gemma 3 whose attention is scaled by n_embd / n_head (`gemma3.cpp` of llama.cpp).
const GEMMA3_27B_LAYERS: u32 = 62;

/// Every how many layers one is global where Gemma 3's file does not tell (`gemma3.cpp` of llama.cpp).
const GEMMA3_PATTERN: u32 = 6;

/// Base of the rotary frequencies of local layers where the file does not tell (`llama-hparams.h`).
const LOCAL_ROPE_BASE: f32 = 10_000.0;

/// The sizes and options of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `general.architecture`.
    pub architecture: String,
    /// Blocks.
    pub n_layer: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Neurons of each block's FFN, `[n_layer]`.
    pub n_ff: Vec<usize>,
    /// Tokens in the vocabulary.
    pub n_vocab: usize,
    /// Tokens that the model was trained to see at once.
    pub n_ctx_train: usize,
    /// Norms.
    pub norm: Norm,
    /// The FFN's non-linearity.
    pub activation: Activation,
    /// Whether the FFN multiplies by a second projection.
    pub gated: bool,
    /// Whether attention and FFN read the one norm of the block.
    pub parallel: bool,
    /// Multiplies embeddings.
    pub embedding_scale: f32,
    /// Multiplies logits.
    pub logit_scale: f32,
    /// Each block's attention, `[n_layer]`.
    pub attention: Vec<Attention>,
    /// Each block's rotary position embedding, `[n_layer]`; none where positions come in otherwise.
    pub rope: Vec<Option<Rope>>,
    /// Whether a table of positions is added to the embeddings.
    pub learned_positions: bool,
}

impl Config {
    /// Reads a model's metadata; `rope_factors` are the numbers of `rope_freqs.weight`, where there is one.
    ///
    /// # Errors
    /// [`Error::Model`] for an architecture, or an option of one, that cannot be trained here.
    /// [`Error::Gguf`] where metadata are missing.
    pub fn read(file: &GgufFile, rope_factors: Option<&[f32]>) -> Result<Config> {
        let architecture = file.architecture()?;
        let refuse = |reason: String, hint: &str| Error::Model {
            path: file.path().to_path_buf(),
            reason,
            hint: (!hint.is_empty()).then(|| hint.to_owned()),
        };
        let Some(family) = FAMILIES.iter().find(|family| family.name == architecture) else {
            let known: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
            let reason = format!("architecture {architecture:?} cannot be trained here");
            return Err(refuse(reason, &format!("these can: {}", known.join(", "))));
        };
        let key = |name: &str| file.arch_key(name);
        let number = |name: &str| -> Result<Option<f32>> { file.f32_if_present(&key(name)?) };
        for (name, what) in [("expert_count", "experts"), ("attention.temperature_length", "scaled queries")]
        {
            if file.u32_if_present(&key(name)?)?.is_some_and(|n| n > 0) {
                return Err(refuse(format!("models with {what} cannot be trained here"), ""));
            }
        }
        for name in [
            "final_logit_softcapping",
            "attention.scale",
            "embedding_scale",
            "residual_scale",
            "attention.clamp_kqv",
        ] {
            if number(name)?.is_some_and(|x| x != 0.0) {
                return Err(refuse(format!("key {:?} is not known to the trainer", key(name)?), ""));
            }
        }

        let (n_layer, n_embd) = (file.n_layer()?, file.n_embd()?);
        let (n_head, n_head_kv) = (file.n_head()?, file.n_head_kv()?);
        let width = |name: &str| -> Result<usize> {
            Ok(file.u32_if_present(&key(name)?)?.unwrap_or(n_embd / n_head.max(1)) as usize)
        };
        let (head_dim, value_dim) = (width("attention.key_length")?, width("attention.value_length")?);
        if head_dim != value_dim || head_dim == 0 {
            let reason = format!("expected keys and values of one size, found {head_dim} and {value_dim}");
            return Err(refuse(reason, ""));
        }

        let epsilon_key = match family.norm {
            NormKind::Rms => "attention.layer_norm_rms_epsilon",
            NormKind::Layer => "attention.layer_norm_epsilon",
        };
        let norm = Norm { kind: family.norm, epsilon: file.f32(&key(epsilon_key)?)? };

        let windows = windows(file, n_layer)?;
        let scaled_dim = match family.name {
            "gemma3" if n_layer == GEMMA3_27B_LAYERS => (n_embd / n_head) as f32,
            _ => head_dim as f32,
        };
        let max_alibi_bias = if family.position == Position::Alibi { BLOOM_MAX_ALIBI_BIAS } else { 0.0 };
        let attention = |window: &Option<usize>| Attention {
            n_head: n_head as usize,
            n_head_kv: n_head_kv as usize,
            head_dim,
            scale: 1.0 / scaled_dim.sqrt(),
            window: *window,
            max_alibi_bias,
        };

        let rope = match family.position {
            Position::Rope(pairs) => {
                let n_rot = file.u32_if_present(&key("rope.dimension_count")?)?.unwrap_or(head_dim as u32);
                let n_rot = n_rot as usize;
                if n_rot > head_dim || !n_rot.is_multiple_of(2) {
                    return Err(refuse(format!("a rotation of {n_rot} numbers of {head_dim} in a head"), ""));
                }
                if let Some(factors) = rope_factors
                    && factors.len() != n_rot / 2
                {
                    let reason = format!(
                        "tensor \"rope_freqs.weight\": expected {} numbers, found {}",
                        n_rot / 2,
                        factors.len()
                    );
                    return Err(refuse(reason, ""));
                }
                let base = number("rope.freq_base")?.unwrap_or(LOCAL_ROPE_BASE);
                let local_base = number("rope.freq_base_swa")?.unwrap_or(LOCAL_ROPE_BASE);
                let scale = rope_scale(file)?;
                windows
                    .iter()
                    .map(|window| {
                        let (base, scale) = if window.is_some() { (local_base, 1.0) } else { (base, scale) };
                        let factor = |i: usize| rope_factors.map_or(1.0, |factors| f64::from(factors[i]));
                        let frequency = |i: usize| {
                            f64::from(base).powf(-((2 * i) as f64) / n_rot as f64) * scale / factor(i)
                        };
                        let frequencies = (0..n_rot / 2).map(|i| frequency(i) as f32).collect();
                        Some(Rope { pairs, frequencies })
                    })
                    .collect()
            }
            Position::Learned | Position::Alibi => vec![None; n_layer as usize],
        };

        Ok(Config {
            architecture: architecture.to_owned(),
            n_layer: n_layer as usize,
            n_embd: n_embd as usize,
            n_ff: file.n_ff_per_layer()?.into_iter().map(|n| n as usize).collect(),
            n_vocab: file.n_vocab()? as usize,
            n_ctx_train: file.n_ctx_train()? as usize,
            norm,
            activation: family.activation,
            gated: family.gated,
            parallel: family.parallel,
            embedding_scale: if family.scales_embedding { (n_embd as f32).sqrt() } else { 1.0 },
            logit_scale: number("logit_scale")?.filter(|&scale| scale != 0.0).unwrap_or(1.0),
            attention: windows.iter().map(attention).collect(),
            rope,
            learned_positions: family.position == Position::Learned,
        })
    }

    /// Bytes that a forward pass of `n_rows` rows keeps for the backward pass, about.
    pub fn activation_bytes(&self, n_rows: usize) -> u64 {
        // Per row of a block: its input, both norms' outputs, the stream between; q, k, v and what attention
        // gives; and the FFN's inner numbers.
        let of_layer = |n_ff: &usize| 5 * self.n_embd + 2 * (self.n_query() + self.n_key()) + 3 * n_ff;
        let n_values: usize = self.n_ff.iter().map(of_layer).sum();
        (size_of::<f32>() * n_rows * n_values) as u64
    }

    /// Numbers in all query heads of a row.
    pub fn n_query(&self) -> usize {
        self.attention.first().map_or(0, |a| a.n_head * a.head_dim)
    }

    /// Numbers in all key heads of a row.
    pub fn n_key(&self) -> usize {
        self.attention.first().map_or(0, |a| a.n_head_kv * a.head_dim)
    }
}

/// The window of each layer's attention, `[n_layer]`.
fn windows(file: &GgufFile, n_layer: u32) -> Result<Vec<Option<usize>>> {
    let none = vec![None; n_layer as usize];
    if file.architecture()? != "gemma3" {
        return Ok(none);
    }
    let Some(window) = file.u32_if_present(&file.arch_key("attention.sliding_window")?)?.filter(|&n| n > 0)
    else {
        return Ok(none);
    };
    let pattern_key = file.arch_key("attention.sliding_window_pattern")?;
    let window = |is_local: bool| is_local.then_some(window as usize);
    if let Some(crate::gguf::Value::Array(array)) = file.metadata().get(&pattern_key) {
        let of_layers = array.to_i64s().filter(|values| values.len() >= n_layer as usize);
        let of_layers = of_layers.ok_or_else(|| {
            Error::model(
                file.path(),
                format!("key {pattern_key:?}: expected a number, or one for each of {n_layer} layers"),
            )
        })?;
        return Ok(of_layers.into_iter().take(n_layer as usize).map(|local| window(local != 0)).collect());
    }
    let pattern = file.u32_if_present(&pattern_key)?.unwrap_or(GEMMA3_PATTERN);
    // The last layer of each group is global; a pattern of 0 is llama.cpp's word for no global layer.
    Ok((0..n_layer).map(|il| window(pattern == 0 || il % pattern + 1 < pattern)).collect())
}

/// What rotary frequencies are multiplied by.
fn rope_scale(file: &GgufFile) -> Result<f64> {
    let factor = match file.f32_if_present(&file.arch_key("rope.scaling.factor")?)? {
        Some(factor) => Some(factor),
        None => file.f32_if_present(&file.arch_key("rope.scale_linear")?)?,
    };
    match file.str_if_present(&file.arch_key("rope.scaling.type")?)? {
        Some("none") => Ok(1.0),
        None | Some("linear") => Ok(factor.filter(|&f| f != 0.0).map_or(1.0, |f| 1.0 / f64::from(f))),
        Some(other) => {
            Err(Error::model(file.path(), format!("rotary scaling {other:?} is not known to the trainer"))
                .with_hint("it knows none and linear, and Llama 3's factors"))
        }
    }
}
