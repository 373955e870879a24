//! The forward pass: from tokens to the log-probabilities of the predicted tokens.

use std::ops::Range;

use crate::error::Result;

use crate::train::data::pack::Packed;
use crate::train::device::{Device, Index};
use crate::train::model::linear::{Linear, Reduced};
use crate::train::model::pass::Pass;
use crate::train::model::transformer::{Layer, NormWeights, Qkv, Transformer};

/// A batch on the device.
#[derive(Debug)]
pub struct Batch<D: Device> {
    /// Its layout.
    pub packed: Packed,
    /// The layout in the device's memory.
    pub rows: D::Rows,
}

impl<D: Device> Batch<D> {
    /// Copies `packed` to `device`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn new(device: &D, packed: Packed) -> Result<Batch<D>> {
        Ok(Batch { rows: device.rows(&packed)?, packed })
    }
}

/// The purpose of a forward pass; decides which buffers it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Log-probabilities only; nothing is kept.
    Score,
    /// A backward pass follows.
    Train {
        /// Keep only the input of each block, and recompute the rest in the backward pass. Saves memory.
        checkpointing: bool,
    },
}

/// The activations of one block.
#[derive(Debug)]
pub(super) struct LayerCache<D: Device> {
    pub attention: AttentionCache<D>,
    pub ffn: FfnCache<D>,
}

/// The activations of one block's attention.
#[derive(Debug)]
pub(super) struct AttentionCache<D: Device> {
    /// The block's input after its norm, `[n_rows][n_embd]`.
    pub input: D::Buffer,
    /// One for a fused matrix, else three: of q, k and v.
    pub qkv_reduced: Vec<Reduced<D>>,
    /// q and k before their norms, in models that have these norms.
    pub qk_raw: Option<(D::Buffer, D::Buffer)>,
    /// Queries, `[n_rows][n_query]`.
    pub q: D::Buffer,
    /// Keys, `[n_rows][n_key]`.
    pub k: D::Buffer,
    /// Values, `[n_rows][n_key]`.
    pub v: D::Buffer,
    /// Log of the softmax's denominator, `[n_rows][n_head]`.
    pub lse: D::Buffer,
    /// The weighted sums of the values, `[n_rows][n_query]`.
    pub heads: D::Buffer,
    pub output_reduced: Reduced<D>,
    /// The output projection before the norm that follows it, `[n_rows][n_embd]`; `None` without such a norm.
    pub projected: Option<D::Buffer>,
}

/// The activations of one block's FFN.
#[derive(Debug)]
pub(super) struct FfnCache<D: Device> {
    /// The residual stream between attention and FFN, `[n_rows][n_embd]`; `None` in a parallel block.
    pub residual: Option<D::Buffer>,
    /// `residual` after the FFN's norm; `None` in a parallel block, whose FFN reads the attention's input.
    pub input: Option<D::Buffer>,
    /// The gate projection, `[n_rows][n_ff]`.
    pub gate: Option<(D::Buffer, Reduced<D>)>,
    /// The up projection, `[n_rows][n_ff]`.
    pub up: D::Buffer,
    pub up_reduced: Reduced<D>,
    /// Neuron activations, `[n_rows][n_ff]`.
    pub active: D::Buffer,
    pub down_reduced: Reduced<D>,
    /// The down projection before the norm that follows it, `[n_rows][n_embd]`; `None` without such a norm.
    pub projected: Option<D::Buffer>,
}

/// What a forward pass keeps for the backward pass.
#[derive(Debug)]
pub struct Cache<D: Device> {
    /// Rows of the token embeddings' factor A, `[n_rows][rank]`.
    pub(super) embedding_reduced: Reduced<D>,
    /// The embeddings before their norm, `[n_rows][n_embd]`; `None` without such a norm.
    pub(super) embedded: Option<D::Buffer>,
    /// The input of each block, then the output of the last one: `[n_layer + 1][n_rows][n_embd]`.
    pub(super) inputs: Vec<D::Buffer>,
    /// The activations of each block; `None` with checkpointing.
    pub(super) layers: Vec<Option<LayerCache<D>>>,
    /// For each output the derivative of its log-probability with respect to the normed residual stream,
    /// `[n_outputs][n_embd]`; `None` if the output matrix is trained.
    pub(super) head: Option<D::Buffer>,
}

impl<D: Device> Transformer<D> {
    /// Computes the log-probability of each output, `[n_outputs]`, and the cache for a backward pass.
    ///
    /// There is no cache for [`Purpose::Score`].
    ///
    /// # Errors
    /// Those of the device.
    pub fn forward(
        &self,
        pass: &Pass<'_, D>,
        batch: &Batch<D>,
        purpose: Purpose,
    ) -> Result<(D::Buffer, Option<Cache<D>>)> {
        let (embedding_reduced, embedded, mut x) = self.embed(pass, batch)?;
        let is_training = purpose != Purpose::Score;
        let keeps_layers = purpose == Purpose::Train { checkpointing: false };
        let mut inputs = Vec::new();
        let mut layers = Vec::new();
        for il in 0..self.config.n_layer {
            let (next, cache) = self.layer_forward(pass, batch, il, &x)?;
            if is_training {
                inputs.push(x);
                layers.push(keeps_layers.then_some(cache));
            }
            x = next;
        }
        let (logps, head) = self.head_forward(pass, batch, &x, is_training)?;
        let cache = is_training.then(|| {
            inputs.push(x);
            Cache { embedding_reduced, embedded, inputs, layers, head }
        });
        Ok((logps, cache))
    }

    /// Computes the residual stream after each block, `[n_layer][n_rows * n_embd]`, for comparisons.
    ///
    /// # Errors
    /// Those of the device.
    pub fn residual_stream(&self, pass: &Pass<'_, D>, batch: &Batch<D>) -> Result<Vec<Vec<f32>>> {
        let (.., mut x) = self.embed(pass, batch)?;
        let mut streams = Vec::new();
        for il in 0..self.config.n_layer {
            x = self.layer_forward(pass, batch, il, &x)?.0;
            streams.push(pass.device.download(&x)?);
        }
        Ok(streams)
    }

    /// Computes the logits of each output, `[n_outputs][n_vocab]`, for comparisons.
    ///
    /// # Errors
    /// Those of the device.
    pub fn logits(&self, pass: &Pass<'_, D>, batch: &Batch<D>) -> Result<Vec<Vec<f32>>> {
        let (.., mut x) = self.embed(pass, batch)?;
        for il in 0..self.config.n_layer {
            x = self.layer_forward(pass, batch, il, &x)?.0;
        }
        let mut rows = Vec::new();
        for range in self.chunks(pass.device, batch.packed.outputs.len()) {
            let (normed, _) = self.output_rows(pass, batch, &x, range.clone())?;
            let (logits, _) = self.output.forward(pass, &normed, range.len())?;
            let logits = pass.device.download(&logits)?;
            let scaled = |row: &[f32]| row.iter().map(|x| x * self.config.logit_scale).collect();
            rows.extend(logits.chunks_exact(self.config.n_vocab).map(scaled));
        }
        Ok(rows)
    }

    /// From the last block's output `x`, `[n_rows][n_embd]`, to log-probabilities, `[n_outputs]`.
    ///
    /// Also returns [`Cache::head`]. The loss depends on an output's logits only through its log-probability.
    /// So the log-probability's derivative with respect to the normed residual stream is computed here, while
    /// the softmax is at hand; the backward pass multiplies it by the loss's derivative, one number an output.
    fn head_forward(
        &self,
        pass: &Pass<'_, D>,
        batch: &Batch<D>,
        x: &D::Buffer,
        is_training: bool,
    ) -> Result<(D::Buffer, Option<D::Buffer>)> {
        let (device, n_embd) = (pass.device, self.config.n_embd);
        let n_outputs = batch.packed.outputs.len();
        let needs_gradient = is_training && !self.output.is_trained();
        let mut head = match needs_gradient {
            true => Some(device.zeros(n_outputs * n_embd)?),
            false => None,
        };
        let mut logps = device.space(n_outputs)?;
        for range in self.chunks(device, n_outputs) {
            let (normed, _) = self.output_rows(pass, batch, x, range.clone())?;
            let (mut logits, _) = self.output.forward(pass, &normed, range.len())?;
            self.logprobs(pass, batch, range.clone(), needs_gradient, &mut logits, &mut logps)?;
            if let Some(head) = &mut head {
                // `logits` now holds d logp / d logits.
                let dlogits = logits;
                let mut dnormed = device.zeros(range.len() * n_embd)?;
                let none = &mut [];
                self.output.backward(pass, none, &normed, &None, &dlogits, range.len(), &mut dnormed)?;
                let (n, to) = (range.len() * n_embd, range.start * n_embd);
                device.add_columns(&dnormed, n, 0, head, n_outputs * n_embd, to, n)?;
            }
        }
        Ok((logps, head))
    }

    /// Splits the outputs into ranges whose logits fit into [`Device::logit_bytes`].
    pub(super) fn chunks(&self, device: &D, n_outputs: usize) -> impl Iterator<Item = Range<usize>> + use<D> {
        let n = (device.logit_bytes() / (4 * self.config.n_vocab)).max(1);
        (0..n_outputs).step_by(n).map(move |first| first..(first + n).min(n_outputs))
    }

    /// The rows of `x` that predict the outputs of `range`, `[range.len()][n_embd]`: normed, and as they are.
    pub(super) fn output_rows(
        &self,
        pass: &Pass<'_, D>,
        batch: &Batch<D>,
        x: &D::Buffer,
        range: Range<usize>,
    ) -> Result<(D::Buffer, D::Buffer)> {
        let (device, n_embd) = (pass.device, self.config.n_embd);
        let mut rows = device.space(range.len() * n_embd)?;
        device.gather(x, n_embd, &Index::Output(range.clone()), &batch.rows, 1.0, &mut rows)?;
        let normed = self.norm_forward(pass, &self.output_norm, &rows, range.len() * n_embd, n_embd)?;
        Ok((normed, rows))
    }

    /// Writes the log-probabilities of the outputs of `range` into `logps`, `[n_outputs]`.
    ///
    /// With `gradient`, `logits`, `[range.len()][n_vocab]`, become their derivative with respect to the logits.
    pub(super) fn logprobs(
        &self,
        pass: &Pass<'_, D>,
        batch: &Batch<D>,
        range: Range<usize>,
        gradient: bool,
        logits: &mut D::Buffer,
        logps: &mut D::Buffer,
    ) -> Result<()> {
        let (scale, n_vocab) = (self.config.logit_scale, self.config.n_vocab);
        pass.device.logprobs(&batch.rows, range, scale, n_vocab, gradient, logits, logps)
    }

    /// The norm of `x`, which has `n` values in rows of `n_cols`.
    pub(super) fn norm_forward(
        &self,
        pass: &Pass<'_, D>,
        weights: &NormWeights<D>,
        x: &D::Buffer,
        n: usize,
        n_cols: usize,
    ) -> Result<D::Buffer> {
        let mut y = pass.device.space(n)?;
        let bias = weights.bias.as_ref().map(|bias| bias.get(pass));
        pass.device.norm(self.config.norm, x, weights.weight.get(pass), bias, n_cols, &mut y)?;
        Ok(y)
    }

    /// Embeds the tokens: [`Cache::embedding_reduced`], [`Cache::embedded`] and the first block's input.
    #[allow(clippy::type_complexity, reason = "three buffers, two of them optional")]
    fn embed(
        &self,
        pass: &Pass<'_, D>,
        batch: &Batch<D>,
    ) -> Result<(Reduced<D>, Option<D::Buffer>, D::Buffer)> {
        let device = pass.device;
        let (n_rows, n_embd) = (batch.packed.n_rows(), self.config.n_embd);
        let (mut x, reduced) = self.embedding.forward(pass, &batch.rows, n_rows)?;
        if let Some(positions) = &self.positions {
            let mut added = device.space(n_rows * n_embd)?;
            device.gather(positions.get(pass), n_embd, &Index::Position, &batch.rows, 1.0, &mut added)?;
            device.add(1.0, &added, &mut x)?;
        }
        match &self.embedding_norm {
            Some(weights) => {
                let normed = self.norm_forward(pass, weights, &x, n_rows * n_embd, n_embd)?;
                Ok((reduced, Some(x), normed))
            }
            None => Ok((reduced, None, x)),
        }
    }

    /// Block `il`: from its input `x` to its output, both `[n_rows][n_embd]`.
    ///
    /// ```text
    /// y = x + attention(norm(x))
    /// y = y + ffn(norm(y)) + direction       in a parallel block: y = y + ffn(norm(x)) + direction
    /// ```
    pub(super) fn layer_forward(
        &self,
        pass: &Pass<'_, D>,
        batch: &Batch<D>,
        il: usize,
        x: &D::Buffer,
    ) -> Result<(D::Buffer, LayerCache<D>)> {
        let (mut y, attention) = self.attention_forward(pass, batch, il, x)?;
        let ffn = self.ffn_forward(pass, batch.packed.n_rows(), il, &attention.input, &mut y)?;
        if let Some(direction) = self.layers[il].active_direction(pass) {
            pass.device.add_to_rows(&pass.values[direction], self.config.n_embd, &mut y)?;
        }
        Ok((y, LayerCache { attention, ffn }))
    }

    /// `y = x + attention(norm(x))`, `[n_rows][n_embd]`.
    fn attention_forward(
        &self,
        pass: &Pass<'_, D>,
        batch: &Batch<D>,
        il: usize,
        x: &D::Buffer,
    ) -> Result<(D::Buffer, AttentionCache<D>)> {
        let (config, layer, device) = (&self.config, &self.layers[il], pass.device);
        let (n_rows, n_embd) = (batch.packed.n_rows(), config.n_embd);
        let (n_query, attention) = (config.n_query(), &config.attention[il]);

        let input = self.norm_forward(pass, &layer.attn_norm, x, n_rows * n_embd, n_embd)?;
        let ([mut q, mut k, v], qkv_reduced) = self.qkv_forward(pass, layer, &input, n_rows)?;
        let mut qk_raw = None;
        if let Some((q_norm, k_norm)) = &layer.qk_norm {
            let head_dim = attention.head_dim;
            let mut q_normed = device.space(n_rows * n_query)?;
            let mut k_normed = device.space(n_rows * config.n_key())?;
            device.norm(config.norm, &q, q_norm.get(pass), None, head_dim, &mut q_normed)?;
            device.norm(config.norm, &k, k_norm.get(pass), None, head_dim, &mut k_normed)?;
            qk_raw = Some((std::mem::replace(&mut q, q_normed), std::mem::replace(&mut k, k_normed)));
        }
        if let Some(rope) = &config.rope[il] {
            device.rope(rope, &batch.rows, attention.head_dim, false, &mut q)?;
            device.rope(rope, &batch.rows, attention.head_dim, false, &mut k)?;
        }
        let mut heads = device.space(n_rows * n_query)?;
        let mut lse = device.space(n_rows * attention.n_head)?;
        device.attention(attention, &batch.rows, &q, &k, &v, &mut heads, &mut lse)?;
        let (projected, output_reduced) = layer.attn_output.forward(pass, &heads, n_rows)?;

        let mut y = device.copy(x, n_rows * n_embd)?;
        let projected = self.add_normed(pass, &layer.post_attention_norm, projected, n_rows, &mut y)?;
        let cache =
            AttentionCache { input, qkv_reduced, qk_raw, q, k, v, lse, heads, output_reduced, projected };
        Ok((y, cache))
    }

    /// `y += ffn(norm(y))`, or `y += ffn(attn_input)` in a parallel block; `y` is `[n_rows][n_embd]`.
    fn ffn_forward(
        &self,
        pass: &Pass<'_, D>,
        n_rows: usize,
        il: usize,
        attn_input: &D::Buffer,
        y: &mut D::Buffer,
    ) -> Result<FfnCache<D>> {
        let (config, layer, device) = (&self.config, &self.layers[il], pass.device);
        let (n_embd, n_ff) = (config.n_embd, config.n_ff[il]);
        let (mut residual, mut input) = (None, None);
        if let Some(weights) = &layer.ffn_norm {
            input = Some(self.norm_forward(pass, weights, y, n_rows * n_embd, n_embd)?);
            residual = Some(device.copy(y, n_rows * n_embd)?);
        }
        let x = input.as_ref().unwrap_or(attn_input);
        let (gate, (up, up_reduced)) = match &layer.ffn_gate {
            Some(gate) => {
                let [gate, up] = Linear::forward_all(pass, [gate, &layer.ffn_up], x, n_rows)?;
                (Some(gate), up)
            }
            None => (None, layer.ffn_up.forward(pass, x, n_rows)?),
        };
        let mut active = device.space(n_rows * n_ff)?;
        match &gate {
            Some((gate, _)) => device.activate(config.activation, gate, Some(&up), &mut active)?,
            None => device.activate(config.activation, &up, None, &mut active)?,
        }
        let (projected, down_reduced) = layer.ffn_down.forward(pass, &active, n_rows)?;
        let projected = self.add_normed(pass, &layer.post_ffn_norm, projected, n_rows, y)?;
        Ok(FfnCache { residual, input, gate, up, up_reduced, active, down_reduced, projected })
    }

    /// Adds `projected` to `y`, after a norm if there are `weights`; all `[n_rows][n_embd]`.
    ///
    /// Returns `projected` if the backward pass of that norm needs it.
    fn add_normed(
        &self,
        pass: &Pass<'_, D>,
        weights: &Option<NormWeights<D>>,
        projected: D::Buffer,
        n_rows: usize,
        y: &mut D::Buffer,
    ) -> Result<Option<D::Buffer>> {
        let n_embd = self.config.n_embd;
        let Some(weights) = weights else {
            pass.device.add(1.0, &projected, y)?;
            return Ok(None);
        };
        let normed = self.norm_forward(pass, weights, &projected, n_rows * n_embd, n_embd)?;
        pass.device.add(1.0, &normed, y)?;
        Ok(Some(projected))
    }

    /// q `[n_rows][n_query]`, k and v `[n_rows][n_key]`, from `x`, `[n_rows][n_embd]`.
    #[allow(clippy::type_complexity, reason = "q, k and v, and what their matrices keep")]
    fn qkv_forward(
        &self,
        pass: &Pass<'_, D>,
        layer: &Layer<D>,
        x: &D::Buffer,
        n_rows: usize,
    ) -> Result<([D::Buffer; 3], Vec<Reduced<D>>)> {
        let widths = [self.config.n_query(), self.config.n_key(), self.config.n_key()];
        match &layer.qkv {
            Qkv::Separate(linears) => {
                let [(q, q_reduced), (k, k_reduced), (v, v_reduced)] =
                    Linear::forward_all(pass, linears.each_ref(), x, n_rows)?;
                Ok(([q, k, v], vec![q_reduced, k_reduced, v_reduced]))
            }
            Qkv::Fused(linear) => {
                let (fused, reduced) = linear.forward(pass, x, n_rows)?;
                let mut parts = [
                    pass.device.zeros(n_rows * widths[0])?,
                    pass.device.zeros(n_rows * widths[1])?,
                    pass.device.zeros(n_rows * widths[2])?,
                ];
                let mut from = 0;
                for (part, width) in parts.iter_mut().zip(widths) {
                    pass.device.add_columns(&fused, linear.n_out, from, part, width, 0, width)?;
                    from += width;
                }
                Ok((parts, vec![reduced]))
            }
        }
    }
}
