//! The forward pass: from tokens to the log-probabilities of what is predicted.

use std::ops::Range;

use crate::error::Result;

use crate::train::data::pack::Packed;
use crate::train::device::{Device, Index};
use crate::train::model::linear::{Linear, Pass, Reduced, by_transposed};
use crate::train::model::transformer::{Layer, NormWeights, Qkv, Transformer};

/// A batch on the device.
#[derive(Debug)]
pub struct Batch<D: Device> {
    /// Its layout.
    pub packed: Packed,
    pub(in crate::train) rows: D::Rows,
}

impl<D: Device> Batch<D> {
    /// Takes `packed` to `device`.
    ///
    /// # Errors
    /// Of the device.
    pub fn new(device: &D, packed: Packed) -> Result<Batch<D>> {
        Ok(Batch { rows: device.rows(&packed)?, packed })
    }
}

/// What a forward pass is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Log-probabilities alone: nothing is kept.
    Score,
    /// A backward pass; with `checkpointing` only each block's input is kept, and the rest made again then.
    Train {
        /// Whether memory is saved so.
        checkpointing: bool,
    },
}

/// What the backward pass of a block needs.
#[derive(Debug)]
pub(super) struct LayerCache<D: Device> {
    pub attn_in: D::Buffer,
    /// Of one fused matrix, or of q, k and v.
    pub qkv_reduced: Vec<Reduced<D>>,
    /// q and k before their norms.
    pub raw: Option<(D::Buffer, D::Buffer)>,
    pub q: D::Buffer,
    pub k: D::Buffer,
    pub v: D::Buffer,
    pub lse: D::Buffer,
    pub attn_out: D::Buffer,
    pub output_reduced: Reduced<D>,
    /// Before the norm that follows.
    pub attn_projected: Option<D::Buffer>,
    /// The residual stream between attention and FFN.
    pub middle: Option<D::Buffer>,
    pub ffn_in: Option<D::Buffer>,
    pub gate: Option<(D::Buffer, Reduced<D>)>,
    pub up: D::Buffer,
    pub up_reduced: Reduced<D>,
    pub active: D::Buffer,
    pub down_reduced: Reduced<D>,
    /// Before the norm that follows.
    pub ffn_projected: Option<D::Buffer>,
}

/// What the backward pass needs.
#[derive(Debug)]
pub struct Cache<D: Device> {
    /// `x A` of the token embeddings, `[R][r]`.
    pub(super) embedding_reduced: Option<D::Buffer>,
    /// Before the norm of the embeddings.
    pub(super) embedded: Option<D::Buffer>,
    /// What each block reads, and what the last one leaves, `[n_layer + 1]`.
    pub(super) inputs: Vec<D::Buffer>,
    /// None where it is made again.
    pub(super) layers: Vec<Option<LayerCache<D>>>,
    /// Of each output the gradient of its log-probability with respect to the normed residual stream,
    /// `[outputs][n_embd]`; none where the output matrix is trained.
    pub(super) head: Option<D::Buffer>,
}

impl<D: Device> Transformer<D> {
    /// Log-probabilities of the outputs of `batch`, `[outputs]`, on the device, and what a backward pass needs.
    ///
    /// # Errors
    /// Of the device.
    pub fn forward(
        &self,
        pass: &Pass<'_, D>,
        batch: &Batch<D>,
        purpose: Purpose,
    ) -> Result<(D::Buffer, Option<Cache<D>>)> {
        let (embedding_reduced, embedded, mut x) = self.embed(pass, batch)?;
        let keeps = purpose != Purpose::Score;
        let keeps_layers = purpose == Purpose::Train { checkpointing: false };
        let mut inputs = Vec::new();
        let mut layers = Vec::new();
        for il in 0..self.config.n_layer {
            let (next, cache) = self.layer_forward(pass, batch, il, &x)?;
            if keeps {
                inputs.push(x);
                layers.push(keeps_layers.then_some(cache));
            }
            x = next;
        }
        let n_outputs = batch.packed.outputs.len();
        let needs_gradient = keeps && !self.output.is_trained();
        let mut head = match needs_gradient {
            true => Some(pass.device.zeros(n_outputs * self.config.n_embd)?),
            false => None,
        };
        let mut logps = pass.device.space(n_outputs)?;
        for range in self.chunks(pass.device, n_outputs) {
            let (normed, _) = self.output_rows(pass, batch, &x, range.clone())?;
            let (mut logits, _) = self.output.forward(pass, &normed, range.len())?;
            self.logprobs(pass, batch, range.clone(), needs_gradient, &mut logits, &mut logps)?;
            if let Some(head) = &mut head {
                // The loss reaches an output's logits by one number only, its log-probability's gradient.
                // So the product with the output matrix is made now, while the softmax is at hand, and
                // multiplied by that number once it is known.
                let mut dx = pass.device.zeros(range.len() * self.config.n_embd)?;
                let none = &mut [];
                self.output.backward(pass, none, &normed, &None, &logits, range.len(), &mut dx)?;
                let n = range.len() * self.config.n_embd;
                let to = range.start * self.config.n_embd;
                pass.device.add_columns(&dx, n, 0, head, n_outputs * self.config.n_embd, to, n)?;
            }
        }
        let cache = keeps.then(|| {
            inputs.push(x);
            Cache { embedding_reduced, embedded, inputs, layers, head }
        });
        Ok((logps, cache))
    }

    /// The residual stream after each block, `[n_layer][R][n_embd]`; for comparisons with a reference.
    ///
    /// # Errors
    /// Of the device.
    pub fn residual_stream(&self, pass: &Pass<'_, D>, batch: &Batch<D>) -> Result<Vec<Vec<f32>>> {
        let (.., mut x) = self.embed(pass, batch)?;
        let mut streams = Vec::new();
        for il in 0..self.config.n_layer {
            x = self.layer_forward(pass, batch, il, &x)?.0;
            streams.push(pass.device.download(&x)?);
        }
        Ok(streams)
    }

    /// Logits of every output, `[outputs][n_vocab]`; for comparisons with a reference.
    ///
    /// # Errors
    /// Of the device.
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

    /// Outputs whose logits fit into [`Device::logit_bytes`] together.
    pub(super) fn chunks(&self, device: &D, n_outputs: usize) -> impl Iterator<Item = Range<usize>> + use<D> {
        let n = (device.logit_bytes() / (4 * self.config.n_vocab)).max(1);
        (0..n_outputs).step_by(n).map(move |first| first..(first + n).min(n_outputs))
    }

    /// The rows that predict the outputs of `range`, after the last norm and before it, `[outputs][n_embd]`.
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
        let normed = self.normed(pass, &self.output_norm, &rows, range.len() * n_embd, n_embd)?;
        Ok((normed, rows))
    }

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

    pub(super) fn normed(
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

    /// The embeddings: their reduced rows, what their norm reads, and what the first block reads.
    #[allow(clippy::type_complexity, reason = "three buffers, of which two are rarely there")]
    fn embed(
        &self,
        pass: &Pass<'_, D>,
        batch: &Batch<D>,
    ) -> Result<(Option<D::Buffer>, Option<D::Buffer>, D::Buffer)> {
        let Pass { device, values, .. } = pass;
        let (n_rows, n_embd) = (batch.packed.n_rows(), self.config.n_embd);
        let scale = self.config.embedding_scale;
        let mut x = device.space(n_rows * n_embd)?;
        match &self.embedding.weight {
            crate::train::model::linear::Weight::Frozen(matrix) => {
                device.embed(matrix, &batch.rows, scale, &mut x)?
            }
            crate::train::model::linear::Weight::Trained(id) => {
                device.gather(&values[*id], n_embd, &Index::Token, &batch.rows, scale, &mut x)?;
            }
        }
        let mut reduced = None;
        if let (Some(low_rank), Some(adapter_scale)) = (self.embedding.low_rank, pass.adapter_scale) {
            let mut a = device.space(n_rows * low_rank.rank)?;
            device.gather(&values[low_rank.a], low_rank.rank, &Index::Token, &batch.rows, 1.0, &mut a)?;
            let mut change = by_transposed([n_rows, n_embd, low_rank.rank]);
            (change.alpha, change.beta) = (scale * adapter_scale, 1.0);
            device.gemm(change, &a, &values[low_rank.b], &mut x)?;
            reduced = Some(a);
        }
        if let Some(positions) = &self.positions {
            let mut added = device.space(n_rows * n_embd)?;
            device.gather(positions.get(pass), n_embd, &Index::Position, &batch.rows, 1.0, &mut added)?;
            device.add(1.0, &added, &mut x)?;
        }
        match &self.embedding_norm {
            Some(weights) => {
                let normed = self.normed(pass, weights, &x, n_rows * n_embd, n_embd)?;
                Ok((reduced, Some(x), normed))
            }
            None => Ok((reduced, None, x)),
        }
    }

    /// What block `il` leaves of `x[R][n_embd]`.
    pub(super) fn layer_forward(
        &self,
        pass: &Pass<'_, D>,
        batch: &Batch<D>,
        il: usize,
        x: &D::Buffer,
    ) -> Result<(D::Buffer, LayerCache<D>)> {
        let (config, layer, device) = (&self.config, &self.layers[il], pass.device);
        let (n_rows, n_embd, n_ff) = (batch.packed.n_rows(), config.n_embd, config.n_ff[il]);
        let (n_query, attention) = (config.n_query(), &config.attention[il]);

        let attn_in = self.normed(pass, &layer.attn_norm, x, n_rows * n_embd, n_embd)?;
        let ([mut q, mut k, v], qkv_reduced) = self.qkv(pass, layer, &attn_in, n_rows)?;
        let mut raw = None;
        if let Some((q_norm, k_norm)) = &layer.qk_norm {
            let head_dim = attention.head_dim;
            let mut normed = [device.space(n_rows * n_query)?, device.space(n_rows * config.n_key())?];
            device.norm(config.norm, &q, q_norm.get(pass), None, head_dim, &mut normed[0])?;
            device.norm(config.norm, &k, k_norm.get(pass), None, head_dim, &mut normed[1])?;
            let [q_normed, k_normed] = normed;
            raw = Some((std::mem::replace(&mut q, q_normed), std::mem::replace(&mut k, k_normed)));
        }
        if let Some(rope) = &config.rope[il] {
            device.rope(rope, &batch.rows, attention.head_dim, false, &mut q)?;
            device.rope(rope, &batch.rows, attention.head_dim, false, &mut k)?;
        }
        let mut attn_out = device.space(n_rows * n_query)?;
        let mut lse = device.space(n_rows * attention.n_head)?;
        device.attention(attention, &batch.rows, &q, &k, &v, &mut attn_out, &mut lse)?;
        let (projected, output_reduced) = layer.attn_output.forward(pass, &attn_out, n_rows)?;

        // What the block leaves: its input, and what attention and FFN add to it.
        let mut y = device.copy(x, n_rows * n_embd)?;
        let attn_projected = self.add_normed(pass, &layer.post_attention_norm, projected, n_rows, &mut y)?;

        let (mut middle, mut ffn_in) = (None, None);
        if let Some(weights) = &layer.ffn_norm {
            ffn_in = Some(self.normed(pass, weights, &y, n_rows * n_embd, n_embd)?);
            middle = Some(device.copy(&y, n_rows * n_embd)?);
        }
        let read = ffn_in.as_ref().unwrap_or(&attn_in);
        let (gate, (up, up_reduced)) = match &layer.ffn_gate {
            Some(gate) => {
                let [gate, up] = Linear::forward_all(pass, [gate, &layer.ffn_up], read, n_rows)?;
                (Some(gate), up)
            }
            None => (None, layer.ffn_up.forward(pass, read, n_rows)?),
        };
        let mut active = device.space(n_rows * n_ff)?;
        match &gate {
            Some((gate, _)) => device.activate(config.activation, gate, Some(&up), &mut active)?,
            None => device.activate(config.activation, &up, None, &mut active)?,
        }
        let (projected, down_reduced) = layer.ffn_down.forward(pass, &active, n_rows)?;
        let ffn_projected = self.add_normed(pass, &layer.post_ffn_norm, projected, n_rows, &mut y)?;
        if let Some(direction) = layer.active_direction(pass) {
            device.add_to_rows(direction, n_embd, &mut y)?;
        }
        let cache = LayerCache {
            attn_in,
            qkv_reduced,
            raw,
            q,
            k,
            v,
            lse,
            attn_out,
            output_reduced,
            attn_projected,
            middle,
            ffn_in,
            gate,
            up,
            up_reduced,
            active,
            down_reduced,
            ffn_projected,
        };
        Ok((y, cache))
    }

    /// Adds `projected`, or its norm, to `y`; gives it back where the backward pass of the norm needs it.
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
        let normed = self.normed(pass, weights, &projected, n_rows * n_embd, n_embd)?;
        pass.device.add(1.0, &normed, y)?;
        Ok(Some(projected))
    }

    #[allow(clippy::type_complexity, reason = "q, k and v, with what their matrices keep")]
    fn qkv(
        &self,
        pass: &Pass<'_, D>,
        layer: &Layer<D>,
        x: &D::Buffer,
        n_rows: usize,
    ) -> Result<([D::Buffer; 3], Vec<Reduced<D>>)> {
        let widths = [self.config.n_query(), self.config.n_key(), self.config.n_key()];
        match &layer.qkv {
            Qkv::Apart(linears) => {
                let [(q, q_reduced), (k, k_reduced), (v, v_reduced)] =
                    Linear::forward_all(pass, linears.each_ref(), x, n_rows)?;
                Ok(([q, k, v], vec![q_reduced, k_reduced, v_reduced]))
            }
            Qkv::Fused(linear) => {
                let (all, reduced) = linear.forward(pass, x, n_rows)?;
                let mut parts = [
                    pass.device.zeros(n_rows * widths[0])?,
                    pass.device.zeros(n_rows * widths[1])?,
                    pass.device.zeros(n_rows * widths[2])?,
                ];
                let mut from = 0;
                for (part, width) in parts.iter_mut().zip(widths) {
                    pass.device.add_columns(&all, linear.n_out, from, part, width, 0, width)?;
                    from += width;
                }
                Ok((parts, vec![reduced]))
            }
        }
    }
}
