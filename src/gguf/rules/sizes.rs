//! The sizes that llama.cpp derives from several keys (`load_hparams`), with its defaults.

use super::super::read::GgufFile;
use crate::error::Result;

/// Sizes of a model whose keys have the right types.
#[derive(Debug)]
pub(super) struct Sizes {
    /// Layers that take part in generation: those for predicting several tokens come after them.
    pub(super) n_layer_main: usize,
    pub(super) n_embd: u64,
    pub(super) n_vocab: u64,
    pub(super) n_ctx_train: u64,
    /// For each layer, `[n_layer]`; 0 if the key is absent.
    pub(super) n_ff: Vec<u64>,
    /// For each layer, `[n_layer]`; 0 if the key is absent, and in recurrent layers.
    pub(super) n_head: Vec<u64>,
    /// For each layer, `[n_layer]`; by default as many as heads.
    pub(super) n_head_kv: Vec<u64>,
    /// Width of a key; 0 in a model whose first layer has no heads.
    pub(super) n_embd_head_k: u64,
    /// Width of a value.
    pub(super) n_embd_head_v: u64,
    /// Rotated dimensions of a head.
    pub(super) n_rot: u64,
    pub(super) n_expert: u64,
}

impl Sizes {
    /// Reads the sizes. [`super::keys::check`] has checked types and ranges.
    pub(super) fn read(file: &GgufFile) -> Result<Sizes> {
        let number = |name: &str| -> Result<Option<u64>> {
            Ok(file.u32_if_present(&file.arch_key(name)?)?.map(u64::from))
        };
        let n_layer = file.n_layer()? as usize;
        let per_layer = |name: &str, values: fn(&GgufFile) -> Result<Vec<u32>>| -> Result<Vec<u64>> {
            match file.metadata.get(&file.arch_key(name)?) {
                None => Ok(vec![0; n_layer]),
                Some(_) => Ok(values(file)?.into_iter().map(u64::from).collect()),
            }
        };
        let n_ff = per_layer("feed_forward_length", GgufFile::n_ff_per_layer)?;
        let n_head = per_layer("attention.head_count", GgufFile::n_head_per_layer)?;
        let n_head_kv = match file.metadata.get(&file.arch_key("attention.head_count_kv")?) {
            None => n_head.clone(),
            Some(_) => per_layer("attention.head_count_kv", GgufFile::n_head_kv_per_layer)?,
        };
        let n_embd = u64::from(file.n_embd()?);
        let (mut n_embd_head_k, mut n_embd_head_v, mut n_rot) = (0, 0, 0);
        if let Some(width) = n_embd.checked_div(n_head[0]) {
            n_embd_head_k = number("attention.key_length")?.unwrap_or(width);
            n_embd_head_v = number("attention.value_length")?.unwrap_or(width);
            n_rot = number("rope.dimension_count")?.unwrap_or(n_embd_head_k);
        } else if file.architecture()? == "plamo2" {
            n_embd_head_k = number("attention.key_length")?.unwrap_or(0);
            n_embd_head_v = number("attention.value_length")?.unwrap_or(0);
        }
        let n_nextn = number("nextn_predict_layers")?.unwrap_or(0) as usize;
        Ok(Sizes {
            n_layer_main: n_layer.saturating_sub(n_nextn),
            n_embd,
            n_vocab: u64::from(file.n_vocab()?),
            n_ctx_train: u64::from(file.n_ctx_train()?),
            n_ff,
            n_head,
            n_head_kv,
            n_embd_head_k,
            n_embd_head_v,
            n_rot,
            n_expert: number("expert_count")?.unwrap_or(0),
        })
    }
}
