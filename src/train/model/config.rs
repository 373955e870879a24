//! Sizes and options of a transformer, read from a GGUF's metadata.
//!
//! Architectures differ by options, not by code: one forward and one backward pass serve them all.

use crate::error::{Error, Result};
use crate::gguf::GgufFile;

use crate::train::device::{Activation, Attention, Norm, NormKind, Rope, RopePairs};
use crate::train::model::metadata_keys;

/// How the model learns a token's position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Position {
    /// Queries and keys are rotated.
    Rope(RopePairs),
    /// A table is added to the embeddings.
    Learned,
    /// Attention scores get a bias that grows with distance (arXiv 2108.12409).
    Alibi,
}

/// The options of an architecture that its name implies.
struct Family {
    name: &'static str,
    norm: NormKind,
    position: Position,
    activation: Activation,
    /// The FFN's activation is multiplied by a second projection.
    gated: bool,
    /// Attention and FFN read the same normed input, and both are added to the block's input.
    parallel: bool,
    /// Embeddings are multiplied by sqrt(n_embd).
    scales_embedding: bool,
    /// Optional keys `{arch}.…` that change the computation and that are implemented.
    keys: &'static [&'static str],
}

const LLAMA: Family = Family {
    name: "llama",
    norm: NormKind::Rms,
    position: Position::Rope(RopePairs::Adjacent),
    activation: Activation::Silu,
    gated: true,
    parallel: false,
    scales_embedding: false,
    keys: &[],
};

const GPT2: Family = Family {
    name: "gpt2",
    norm: NormKind::Layer,
    position: Position::Learned,
    activation: Activation::Gelu,
    gated: false,
    ..LLAMA
};

/// The architectures that can be trained. Each is tested against PyTorch (`tests/train`).
const FAMILIES: [Family; 7] = [
    LLAMA,
    Family { name: "command-r", norm: NormKind::Layer, parallel: true, keys: &["logit_scale"], ..LLAMA },
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

/// BLOOM's largest ALiBi slope exponent. Its files do not have it (llama.cpp's `bloom.cpp`).
const BLOOM_MAX_ALIBI_BIAS: f32 = 8.0;

/// Layers of Gemma 3 27B. It scales attention by n_embd / n_head, other sizes by the head size (llama.cpp's
/// `gemma3.cpp`).
const GEMMA3_27B_LAYERS: u32 = 62;

/// Default of Gemma 3's sliding-window pattern: one layer in six is global (llama.cpp's `gemma3.cpp`).
const GEMMA3_PATTERN: u32 = 6;

/// Default base of the rotary frequencies (llama.cpp's `llama-hparams.h`).
const DEFAULT_ROPE_BASE: f32 = 10_000.0;

/// The sizes and options of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `general.architecture`.
    pub architecture: String,
    /// Number of blocks.
    pub n_layer: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Neurons of each block's FFN, `[n_layer]`.
    pub n_ff: Vec<usize>,
    /// Size of the vocabulary.
    pub n_vocab: usize,
    /// Context length the model was trained with.
    pub n_ctx_train: usize,
    /// Kind and epsilon of the norms.
    pub norm: Norm,
    /// The FFN's non-linearity.
    pub activation: Activation,
    /// Whether the FFN has a gate projection.
    pub gated: bool,
    /// Whether attention and FFN read the same normed input.
    pub parallel: bool,
    /// Multiplies the token embeddings.
    pub embedding_scale: f32,
    /// Multiplies the logits.
    pub logit_scale: f32,
    /// The attention of each block, `[n_layer]`.
    pub attention: Vec<Attention>,
    /// The rotary embedding of each block, `[n_layer]`; `None` for other position encodings.
    pub rope: Vec<Option<Rope>>,
    /// Whether a table of positions is added to the token embeddings.
    pub learned_positions: bool,
}

impl Config {
    /// Reads a model's metadata. `rope_factors` are the values of the tensor `rope_freqs.weight`, if present.
    ///
    /// # Errors
    /// [`Error::Model`] for an architecture, or an option of one, that cannot be trained; [`Error::Gguf`] for
    /// missing metadata.
    pub fn read(file: &GgufFile, rope_factors: Option<&[f32]>) -> Result<Config> {
        let architecture = file.architecture()?;
        let Some(family) = FAMILIES.iter().find(|family| family.name == architecture) else {
            let known: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
            let reason = format!("architecture {architecture:?} cannot be trained here");
            let hint = format!("these can: {}", known.join(", "));
            return Err(Error::model(file.path(), reason).with_hint(hint));
        };
        metadata_keys::refuse_unknown(file, family.keys)?;

        let (n_layer, n_embd) = (file.n_layer()?, file.n_embd()?);
        let (n_head, n_head_kv) = (file.n_head()?, file.n_head_kv()?);
        let head_dim = head_dim(file, n_embd / n_head.max(1))?;
        let epsilon_key = match family.norm {
            NormKind::Rms => "attention.layer_norm_rms_epsilon",
            NormKind::Layer => "attention.layer_norm_epsilon",
        };
        let epsilon = match positive(file, epsilon_key)? {
            Some(epsilon) => epsilon,
            None => file.f32(&file.arch_key(epsilon_key)?)?,
        };
        let norm = Norm { kind: family.norm, epsilon };
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
            Position::Rope(pairs) => rope(file, pairs, head_dim, &windows, rope_factors)?,
            Position::Learned | Position::Alibi => vec![None; n_layer as usize],
        };
        let logit_scale = if family.keys.contains(&"logit_scale") {
            positive_or_0(file, "logit_scale")?.unwrap_or(1.0)
        } else {
            1.0
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
            logit_scale,
            attention: windows.iter().map(attention).collect(),
            rope,
            learned_positions: family.position == Position::Learned,
        })
    }

    /// About how many bytes a forward pass of `n_rows` rows keeps for the backward pass.
    pub fn activation_bytes(&self, n_rows: usize) -> u64 {
        // Per row and block: the input, both norms' outputs, the residual stream between attention and FFN, and
        // a projection before its norm; q, k, v and the heads; gate, up and neuron activations.
        let per_row = |n_ff: &usize| 5 * self.n_embd + 2 * (self.n_query() + self.n_key()) + 3 * n_ff;
        let n_values: usize = self.n_ff.iter().map(per_row).sum();
        (size_of::<f32>() * n_rows * n_values) as u64
    }

    /// Width of all query heads together.
    pub fn n_query(&self) -> usize {
        self.attention.first().map_or(0, |a| a.n_head * a.head_dim)
    }

    /// Width of all key heads together.
    pub fn n_key(&self) -> usize {
        self.attention.first().map_or(0, |a| a.n_head_kv * a.head_dim)
    }
}

/// The number under `{arch}.{name}`, if present.
fn positive(file: &GgufFile, name: &str) -> Result<Option<f32>> {
    let key = file.arch_key(name)?;
    match file.f32_if_present(&key)? {
        Some(found) if !(found.is_finite() && found > 0.0) => {
            let reason = format!("key {key:?}: expected a finite number above 0, found {found}");
            Err(Error::model(file.path(), reason))
        }
        found => Ok(found),
    }
}

/// As [`positive`], with 0 for no number.
fn positive_or_0(file: &GgufFile, name: &str) -> Result<Option<f32>> {
    match file.f32_if_present(&file.arch_key(name)?)? {
        Some(0.0) => Ok(None),
        _ => positive(file, name),
    }
}

/// The size of an attention head, `default` if the metadata do not give it.
fn head_dim(file: &GgufFile, default: u32) -> Result<usize> {
    let size = |name: &str| -> Result<usize> {
        Ok(file.u32_if_present(&file.arch_key(name)?)?.unwrap_or(default) as usize)
    };
    let (key_dim, value_dim) = (size("attention.key_length")?, size("attention.value_length")?);
    if key_dim != value_dim || key_dim == 0 {
        let reason = format!("expected keys and values of one size, found {key_dim} and {value_dim}");
        return Err(Error::model(file.path(), reason));
    }
    Ok(key_dim)
}

/// The rotary embedding of each block, `[n_layer]`; `windows` says which blocks are local.
fn rope(
    file: &GgufFile,
    pairs: RopePairs,
    head_dim: usize,
    windows: &[Option<usize>],
    factors: Option<&[f32]>,
) -> Result<Vec<Option<Rope>>> {
    let n_rot = file.u32_if_present(&file.arch_key("rope.dimension_count")?)?.unwrap_or(head_dim as u32);
    let n_rot = n_rot as usize;
    if n_rot > head_dim || !n_rot.is_multiple_of(2) {
        let reason = format!(
            "expected an even number of rotated values up to the head size {head_dim}, found {n_rot}"
        );
        return Err(Error::model(file.path(), reason));
    }
    if let Some(factors) = factors
        && factors.len() != n_rot / 2
    {
        let (expected, found) = (n_rot / 2, factors.len());
        let reason = format!("tensor \"rope_freqs.weight\": expected {expected} numbers, found {found}");
        return Err(Error::model(file.path(), reason));
    }
    let base = positive(file, "rope.freq_base")?.unwrap_or(DEFAULT_ROPE_BASE);
    let local_base = positive(file, "rope.freq_base_swa")?.unwrap_or(DEFAULT_ROPE_BASE);
    let scale = rope_scale(file)?;
    let of_block = |window: &Option<usize>| {
        let (base, scale) = if window.is_some() { (local_base, 1.0) } else { (base, scale) };
        let factor = |i: usize| factors.map_or(1.0, |factors| f64::from(factors[i]));
        let frequency = |i: usize| f64::from(base).powf(-((2 * i) as f64) / n_rot as f64) * scale / factor(i);
        let frequencies = (0..n_rot / 2).map(|i| frequency(i) as f32).collect();
        Some(Rope { pairs, frequencies })
    };
    Ok(windows.iter().map(of_block).collect())
}

/// The attention window of each block in tokens, `[n_layer]`; `None` for global attention.
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
    // The last layer of each group is global. In llama.cpp a pattern of 0 means that no layer is.
    Ok((0..n_layer).map(|il| window(pattern == 0 || il % pattern + 1 < pattern)).collect())
}

/// The factor of the rotary frequencies of global layers.
fn rope_scale(file: &GgufFile) -> Result<f64> {
    let factor = match file.f32_if_present(&file.arch_key("rope.scaling.factor")?)? {
        Some(_) => positive_or_0(file, "rope.scaling.factor")?,
        None => positive_or_0(file, "rope.scale_linear")?,
    };
    match file.str_if_present(&file.arch_key("rope.scaling.type")?)? {
        Some("none") => Ok(1.0),
        None | Some("linear") => Ok(factor.map_or(1.0, |f| 1.0 / f64::from(f))),
        Some(other) => Err(Error::model(
            file.path(),
            format!("rotary scaling {other:?} is not supported by the trainer"),
        )
        .with_hint("supported: none, linear, and the factors of Llama 3")),
    }
}
