//! A model's weights on a device, and which of them are trained.

use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_core::SeedableRng;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::finite;
use crate::gguf::{self, GgufFile, TensorInfo};

use crate::train::device::{Device, HostMatrix};
use crate::train::model::config::Config;
use crate::train::model::embedding::Embedding;
use crate::train::model::linear::{Linear, Row, Weight};
use crate::train::model::low_rank::{self, LowRank};
use crate::train::model::parameters::{ParameterId, Parameters, Role};
use crate::train::model::pass::Pass;
use crate::train::recipe::method::Method;

/// The weights of one block.
#[derive(Debug)]
pub(super) struct Layer<D: Device> {
    pub attn_norm: NormWeights<D>,
    pub qkv: Qkv<D>,
    /// Norms over each head of q and of k, `[head_dim]` each.
    pub qk_norm: Option<(Row<D>, Row<D>)>,
    pub attn_output: Linear<D>,
    pub post_attention_norm: Option<NormWeights<D>>,
    /// `None` in a parallel block, whose FFN reads the attention's input.
    pub ffn_norm: Option<NormWeights<D>>,
    pub ffn_gate: Option<Linear<D>>,
    pub ffn_up: Linear<D>,
    pub ffn_down: Linear<D>,
    pub post_ffn_norm: Option<NormWeights<D>>,
    /// Added to the block's output, `[n_embd]`.
    pub direction: Option<ParameterId>,
}

/// The matrices of queries, keys and values.
#[derive(Debug)]
pub(super) enum Qkv<D: Device> {
    /// One matrix for all three, one after the other in its rows.
    Fused(Linear<D>),
    /// q, k and v.
    Separate([Linear<D>; 3]),
}

/// A norm's weight and bias, `[n_cols]` each.
#[derive(Debug)]
pub(super) struct NormWeights<D: Device> {
    pub weight: Row<D>,
    pub bias: Option<Row<D>>,
}

/// A model in a form that can be trained.
#[derive(Debug)]
pub struct Transformer<D: Device> {
    /// Sizes and options.
    pub config: Config,
    pub(super) embedding: Embedding<D>,
    /// Learned position embeddings, `[n_ctx_train][n_embd]`.
    pub(super) positions: Option<Row<D>>,
    pub(super) embedding_norm: Option<NormWeights<D>>,
    pub(super) layers: Vec<Layer<D>>,
    pub(super) output_norm: NormWeights<D>,
    pub(super) output: Linear<D>,
}

impl<D: Device> Transformer<D> {
    /// Loads the weights of `file` to `device` and creates the parameters of `method`, seeded by `seed`.
    ///
    /// # Errors
    /// [`Error::Model`] for an architecture that cannot be trained; [`Error::Setting`] for LoRA options that do
    /// not suit the model; [`Error::Gguf`] and [`Error::Io`] for weights that are missing, unreadable, not
    /// finite or of an unexpected shape; and those of the device.
    pub fn load(
        device: &D,
        file: &GgufFile,
        method: &Method,
        seed: u64,
    ) -> Result<(Transformer<D>, Parameters<D>)> {
        let rope_factors = match file.tensor("rope_freqs.weight") {
            Some(tensor) => Some(read_numbers(file, tensor)?),
            None => None,
        };
        let config = Config::read(file, rope_factors.as_deref())?;
        if let Method::Lora(options) = method {
            options.check(file)?;
        }
        let mut loader = Loader {
            device,
            file,
            method,
            random: ChaCha8Rng::seed_from_u64(seed),
            parameters: Parameters::default(),
        };
        let transformer = loader.transformer(config)?;
        Ok((transformer, loader.parameters))
    }
}

impl<D: Device> Layer<D> {
    /// The direction to add to the block's output in this pass.
    pub fn active_direction(&self, pass: &Pass<'_, D>) -> Option<ParameterId> {
        self.direction.filter(|_| pass.adapters.are_on())
    }
}

/// Reads a tensor of any type into f32.
///
/// # Errors
/// [`Error::Io`]; [`Error::Gguf`] for a type that cannot be dequantised or a value that is not finite.
pub fn read_numbers(file: &GgufFile, tensor: &TensorInfo) -> Result<Vec<f32>> {
    let bytes = file.read_tensor(tensor)?;
    let mut values = vec![0.0; tensor.n_elements() as usize];
    let refuse = |reason: String| Error::gguf(file.path(), format!("tensor {:?}: {reason}", tensor.name()));
    gguf::dequantize(tensor.tensor_type(), &bytes, &mut values).map_err(refuse)?;
    Ok(values)
}

/// Refuses a matrix with a value that is not finite. Dequantises a row at a time to save memory.
fn check_finite(file: &GgufFile, tensor: &TensorInfo, bytes: &[u8]) -> Result<()> {
    let refuse = |reason: String| Error::gguf(file.path(), format!("tensor {:?}: {reason}", tensor.name()));
    let n = tensor.shape()[0] as usize;
    let rows = bytes.par_chunks(tensor.row_bytes() as usize).enumerate();
    rows.try_for_each_init(
        || vec![0.0; n],
        |values, (row, bytes)| {
            gguf::dequantize_raw(tensor.tensor_type(), bytes, values).map_err(refuse)?;
            match finite::not_finite(values) {
                Some((at, found)) => {
                    Err(refuse(format!("expected finite numbers, found {found} at element {}", row * n + at)))
                }
                None => Ok(()),
            }
        },
    )
}

/// The one matrix whose rows are looked up.
const TOKEN_EMBEDDINGS: &str = "token_embd.weight";

struct Loader<'a, D: Device> {
    device: &'a D,
    file: &'a GgufFile,
    method: &'a Method,
    random: ChaCha8Rng,
    parameters: Parameters<D>,
}

impl<D: Device> Loader<'_, D> {
    fn transformer(&mut self, config: Config) -> Result<Transformer<D>> {
        let (n_embd, n_vocab) = (config.n_embd, config.n_vocab);
        let name = TOKEN_EMBEDDINGS;
        let weight = self.weight(name, n_embd, n_vocab)?;
        let low_rank = match self.method {
            Method::Lora(options) if options.trains(name) => {
                let rank = options.rank;
                let a = self.initial_a(n_vocab, rank, rank);
                let (a_shape, b_shape) = (vec![n_vocab, rank], vec![n_embd, rank]);
                Some(self.low_rank(name, rank, (a_shape, &a), b_shape)?)
            }
            _ => None,
        };
        let embedding = Embedding { n_embd, scale: config.embedding_scale, weight, low_rank };
        let positions = match config.learned_positions {
            true => Some(self.row("position_embd.weight", n_embd * config.n_ctx_train)?),
            false => None,
        };
        let embedding_norm = match self.file.tensor("token_embd_norm.weight") {
            Some(_) => Some(self.norm("token_embd_norm", n_embd)?),
            None => None,
        };
        let layers = (0..config.n_layer).map(|il| self.layer(&config, il)).collect::<Result<_>>()?;
        let output_norm = self.norm("output_norm", n_embd)?;
        let output = match self.file.tensor("output.weight") {
            Some(_) => self.linear("output", n_embd, n_vocab)?,
            None => Linear {
                n_in: n_embd,
                n_out: n_vocab,
                weight: embedding.weight.clone(),
                bias: None,
                low_rank: None,
            },
        };
        Ok(Transformer { config, embedding, positions, embedding_norm, layers, output_norm, output })
    }

    fn layer(&mut self, config: &Config, il: usize) -> Result<Layer<D>> {
        let (n_embd, n_query, n_key) = (config.n_embd, config.n_query(), config.n_key());
        let n_ff = *config.n_ff.get(il).unwrap_or(&0);
        let head_dim = config.attention[il].head_dim;
        let in_block = |name: &str| format!("blk.{il}.{name}");
        let has = |name: &str| self.file.tensor(&in_block(name)).is_some();
        let (is_fused, has_qk_norm) = (has("attn_qkv.weight"), has("attn_q_norm.weight"));
        let (has_post_attention, has_post_ffn) =
            (has("post_attention_norm.weight"), has("post_ffw_norm.weight"));
        let qkv = if is_fused {
            Qkv::Fused(self.linear(&in_block("attn_qkv"), n_embd, n_query + 2 * n_key)?)
        } else {
            Qkv::Separate([
                self.linear(&in_block("attn_q"), n_embd, n_query)?,
                self.linear(&in_block("attn_k"), n_embd, n_key)?,
                self.linear(&in_block("attn_v"), n_embd, n_key)?,
            ])
        };
        let qk_norm = match has_qk_norm {
            true => Some((
                self.row(&in_block("attn_q_norm.weight"), head_dim)?,
                self.row(&in_block("attn_k_norm.weight"), head_dim)?,
            )),
            false => None,
        };
        let direction = match self.method {
            // llama.cpp has no control vector for block 0.
            Method::Vector if il > 0 => {
                let role = Role::Direction { layer: il };
                Some(self.parameters.add(self.device, role, vec![n_embd], &vec![0.0; n_embd])?)
            }
            _ => None,
        };
        Ok(Layer {
            attn_norm: self.norm(&in_block("attn_norm"), n_embd)?,
            qkv,
            qk_norm,
            attn_output: self.linear(&in_block("attn_output"), n_query, n_embd)?,
            post_attention_norm: match has_post_attention {
                true => Some(self.norm(&in_block("post_attention_norm"), n_embd)?),
                false => None,
            },
            ffn_norm: match config.parallel {
                true => None,
                false => Some(self.norm(&in_block("ffn_norm"), n_embd)?),
            },
            ffn_gate: match config.gated {
                true => Some(self.linear(&in_block("ffn_gate"), n_embd, n_ff)?),
                false => None,
            },
            ffn_up: self.linear(&in_block("ffn_up"), n_embd, n_ff)?,
            ffn_down: self.linear(&in_block("ffn_down"), n_ff, n_embd)?,
            post_ffn_norm: match has_post_ffn {
                true => Some(self.norm(&in_block("post_ffw_norm"), n_embd)?),
                false => None,
            },
            direction,
        })
    }

    /// The tensor `name`, which must have `shape` (ggml's order); trailing dimensions may be merged.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo> {
        let refuse = |reason: String| Error::gguf(self.file.path(), reason);
        let expected: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        let Some(tensor) = self.file.tensor(name) else {
            return Err(refuse(format!("tensor {name:?}: expected {expected:?}, found nothing")));
        };
        let found = tensor.shape();
        let same =
            found.iter().product::<u64>() == expected.iter().product::<u64>() && found[0] == expected[0];
        if same {
            Ok(tensor)
        } else {
            Err(refuse(format!("tensor {name:?}: expected {expected:?}, found {found:?}")))
        }
    }

    /// All values of a tensor, in f32; zeros if the device does not read them.
    fn numbers(&self, tensor: &TensorInfo) -> Result<Vec<f32>> {
        match self.device.reads_values() {
            true => read_numbers(self.file, tensor),
            false => Ok(vec![0.0; tensor.n_elements() as usize]),
        }
    }

    /// A tensor's blocks; zeros if the device does not read them.
    fn blocks(&self, tensor: &TensorInfo) -> Result<Vec<u8>> {
        if !self.device.reads_values() {
            return Ok(vec![0; tensor.n_bytes() as usize]);
        }
        let bytes = self.file.read_tensor(tensor)?;
        check_finite(self.file, tensor, &bytes)?;
        Ok(bytes)
    }

    /// The initial values of A; zeros if the device does not read them.
    fn initial_a(&mut self, n_rows: usize, n_cols: usize, fan_in: usize) -> Vec<f32> {
        match self.device.reads_values() {
            true => low_rank::initial_a(&mut self.random, n_rows, n_cols, fan_in),
            false => vec![0.0; n_rows * n_cols],
        }
    }

    /// A norm, a bias or a table of `n` values.
    fn row(&mut self, name: &str, n: usize) -> Result<Row<D>> {
        let Some(tensor) = self.file.tensor(name).filter(|tensor| tensor.n_elements() == n as u64) else {
            let found =
                self.file.tensor(name).map_or("nothing".into(), |tensor| format!("{:?}", tensor.shape()));
            let reason = format!("tensor {name:?}: expected {n} numbers, found {found}");
            return Err(Error::gguf(self.file.path(), reason));
        };
        let values = self.numbers(tensor)?;
        match self.method {
            Method::Full => {
                let shape = tensor.shape().iter().rev().map(|&n| n as usize).collect();
                let role = Role::Tensor { name: name.to_owned() };
                Ok(Row::Trained(self.parameters.add(self.device, role, shape, &values)?))
            }
            _ => Ok(Row::Frozen(self.device.upload(&values)?)),
        }
    }

    fn norm(&mut self, stem: &str, n: usize) -> Result<NormWeights<D>> {
        let bias_name = format!("{stem}.bias");
        let bias = match self.file.tensor(&bias_name) {
            Some(_) => Some(self.row(&bias_name, n)?),
            None => None,
        };
        Ok(NormWeights { weight: self.row(&format!("{stem}.weight"), n)?, bias })
    }

    fn weight(&mut self, name: &str, n_in: usize, n_out: usize) -> Result<Weight<D>> {
        let tensor = self.tensor(name, &[n_in, n_out])?;
        if *self.method == Method::Full {
            let values = self.numbers(tensor)?;
            let role = Role::Tensor { name: name.to_owned() };
            let id = self.parameters.add(self.device, role, vec![n_out, n_in], &values)?;
            return Ok(Weight::Trained(id));
        }
        let bytes = self.blocks(tensor)?;
        let matrix = HostMatrix {
            name: name.to_owned(),
            tensor_type: tensor.tensor_type(),
            n_in,
            n_out,
            bytes,
            is_table: name == TOKEN_EMBEDDINGS,
        };
        Ok(Weight::Frozen(Arc::new(self.device.matrix(matrix)?)))
    }

    fn linear(&mut self, stem: &str, n_in: usize, n_out: usize) -> Result<Linear<D>> {
        let name = format!("{stem}.weight");
        let weight = self.weight(&name, n_in, n_out)?;
        let bias_name = format!("{stem}.bias");
        let bias = match self.file.tensor(&bias_name) {
            Some(_) => Some(self.row(&bias_name, n_out)?),
            None => None,
        };
        let low_rank = match self.method {
            Method::Lora(options) if options.trains(&name) => {
                let a = self.initial_a(options.rank, n_in, n_in);
                let (a_shape, b_shape) = (vec![options.rank, n_in], vec![n_out, options.rank]);
                Some(self.low_rank(&name, options.rank, (a_shape, &a), b_shape)?)
            }
            _ => None,
        };
        Ok(Linear { n_in, n_out, weight, bias, low_rank })
    }

    /// Adds the factors of a change. B starts at zero, so the policy starts equal to the reference.
    fn low_rank(
        &mut self,
        name: &str,
        rank: usize,
        (a_shape, a): (Vec<usize>, &[f32]),
        b_shape: Vec<usize>,
    ) -> Result<LowRank> {
        let tensor = || name.to_owned();
        let b = vec![0.0; b_shape.iter().product()];
        Ok(LowRank {
            rank,
            a: self.parameters.add(self.device, Role::LoraA { tensor: tensor() }, a_shape, a)?,
            b: self.parameters.add(self.device, Role::LoraB { tensor: tensor() }, b_shape, &b)?,
        })
    }
}
