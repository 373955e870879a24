//! The backward pass: from the derivatives of the log-probabilities to the gradients of the parameters.
//!
//! Each function mirrors the one of the same name in [`forward`](super::forward), in reverse order.
//! Gradients are added to, never overwritten, so that several passes accumulate.

use crate::error::Result;

use crate::train::device::{Device, Index};
use crate::train::model::forward::{AttentionCache, Batch, Cache, LayerCache};
use crate::train::model::linear::Row;
use crate::train::model::parameters::ParameterId;
use crate::train::model::pass::Pass;
use crate::train::model::transformer::{NormWeights, Qkv, Transformer};

impl<D: Device> Transformer<D> {
    /// Adds the gradients of a loss, given its derivative `dlogps` with respect to each log-probability.
    ///
    /// `dlogps` is `[n_outputs]`; `gradients` are those of [`Parameters`](super::parameters::Parameters).
    ///
    /// # Errors
    /// Those of the device.
    pub fn backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        batch: &Batch<D>,
        mut cache: Cache<D>,
        dlogps: &D::Buffer,
    ) -> Result<()> {
        let last = cache.inputs.pop().expect("a forward pass keeps the last block's output");
        // d loss / d residual stream, [n_rows][n_embd]: first after the last block, in the end before the first.
        let mut dx = self.head_backward(pass, gradients, batch, cache.head.take(), &last, dlogps)?;
        drop(last);
        for il in (0..self.config.n_layer).rev() {
            let x = cache.inputs.pop().expect("a forward pass keeps each block's input");
            let layer_cache = match cache.layers.pop().flatten() {
                Some(layer_cache) => layer_cache,
                // Checkpointing: recompute the block's activations.
                None => self.layer_forward(pass, batch, il, &x)?.1,
            };
            self.layer_backward(pass, gradients, batch, il, &x, layer_cache, &mut dx)?;
        }
        self.embed_backward(pass, gradients, batch, &cache, dx)
    }

    /// d loss / d the last block's output `last`; both `[n_rows][n_embd]`.
    fn head_backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        batch: &Batch<D>,
        head: Option<D::Buffer>,
        last: &D::Buffer,
        dlogps: &D::Buffer,
    ) -> Result<D::Buffer> {
        let (device, n_embd) = (pass.device, self.config.n_embd);
        let n_outputs = batch.packed.outputs.len();
        let mut dx = device.zeros(batch.packed.n_rows() * n_embd)?;
        match head {
            // d logp / d normed, from the forward pass: times d loss / d logp, it is d loss / d normed.
            Some(mut dnormed) => {
                device.scale_rows(dlogps, 0, n_embd, &mut dnormed)?;
                let all = 0..n_outputs;
                let (_, rows) = self.output_rows(pass, batch, last, all.clone())?;
                let mut drows = device.zeros(n_outputs * n_embd)?;
                self.norm_backward(pass, gradients, &self.output_norm, &rows, &dnormed, n_embd, &mut drows)?;
                device.scatter_add(&drows, n_embd, &Index::Output(all), &batch.rows, 1.0, &mut dx)?;
            }
            // The output matrix is trained: recompute the logits, a chunk at a time.
            None => {
                // Recomputed and not used: the operation writes them beside the derivatives.
                let mut logps = device.space(n_outputs)?;
                for range in self.chunks(device, n_outputs) {
                    let n = range.len();
                    let (normed, rows) = self.output_rows(pass, batch, last, range.clone())?;
                    let (mut logits, reduced) = self.output.forward(pass, &normed, n)?;
                    self.logprobs(pass, batch, range.clone(), true, &mut logits, &mut logps)?;
                    device.scale_rows(dlogps, range.start, self.config.n_vocab, &mut logits)?;
                    // d loss / d logits, [n][n_vocab].
                    let dlogits = logits;
                    let mut dnormed = device.zeros(n * n_embd)?;
                    self.output.backward(pass, gradients, &normed, &reduced, &dlogits, n, &mut dnormed)?;
                    let mut drows = device.zeros(n * n_embd)?;
                    let weights = &self.output_norm;
                    self.norm_backward(pass, gradients, weights, &rows, &dnormed, n_embd, &mut drows)?;
                    device.scatter_add(&drows, n_embd, &Index::Output(range), &batch.rows, 1.0, &mut dx)?;
                }
            }
        }
        Ok(dx)
    }

    /// Turns `dx` from the derivative at the block's output into that at its input `x`; all `[n_rows][n_embd]`.
    ///
    /// The residual connection passes `dx` on unchanged; attention and FFN add their parts to it.
    #[allow(clippy::too_many_arguments, reason = "one block's operands and gradients")]
    fn layer_backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        batch: &Batch<D>,
        il: usize,
        x: &D::Buffer,
        cache: LayerCache<D>,
        dx: &mut D::Buffer,
    ) -> Result<()> {
        if let Some(id) = self.layers[il].active_direction(pass) {
            // It is added to every row: d direction = the sum of dx over the rows.
            pass.device.sum_rows(dx, self.config.n_embd, &mut gradients[id])?;
        }
        let n_rows = batch.packed.n_rows();
        let mut dattn_input = self.ffn_backward(pass, gradients, n_rows, il, &cache, dx)?;
        self.attention_backward(pass, gradients, batch, il, &cache.attention, dx, &mut dattn_input)?;
        let weights = &self.layers[il].attn_norm;
        self.norm_backward(pass, gradients, weights, x, &dattn_input, self.config.n_embd, dx)
    }

    /// The FFN, given the derivative `dx` at the block's output.
    ///
    /// Adds the FFN's part to `dx`, which becomes the derivative between attention and FFN. In a parallel block
    /// `dx` stays unchanged.
    ///
    /// Returns the FFN's part of the derivative at the attention's normed input, `[n_rows][n_embd]`. That is zeros,
    /// except in a parallel block, where the FFN reads that input too.
    fn ffn_backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        n_rows: usize,
        il: usize,
        LayerCache { attention, ffn: cache }: &LayerCache<D>,
        dx: &mut D::Buffer,
    ) -> Result<D::Buffer> {
        let (config, layer, device) = (&self.config, &self.layers[il], pass.device);
        let (n_embd, n_ff) = (config.n_embd, config.n_ff[il]);
        // d loss / d neuron activations, [n_rows][n_ff].
        let mut dactive = device.zeros(n_rows * n_ff)?;
        {
            let (norm, projected) = (&layer.post_ffn_norm, cache.projected.as_ref());
            let dprojected = self.post_norm_backward(pass, gradients, norm, projected, dx, n_rows)?;
            let dprojected = dprojected.as_ref().unwrap_or(dx);
            let (active, reduced) = (&cache.active, &cache.down_reduced);
            layer.ffn_down.backward(pass, gradients, active, reduced, dprojected, n_rows, &mut dactive)?;
        }
        // d loss / d up and d gate, [n_rows][n_ff], and d input, [n_rows][n_embd].
        let mut dup = device.zeros(n_rows * n_ff)?;
        let mut dinput = device.zeros(n_rows * n_embd)?;
        let input = cache.input.as_ref().unwrap_or(&attention.input);
        match (&layer.ffn_gate, &cache.gate) {
            (Some(linear), Some((gate, reduced))) => {
                let mut dgate = device.zeros(n_rows * n_ff)?;
                let up = Some(&cache.up);
                device.activate_back(config.activation, gate, up, &dactive, &mut dgate, Some(&mut dup))?;
                linear.backward(pass, gradients, input, reduced, &dgate, n_rows, &mut dinput)?;
            }
            _ => device.activate_back(config.activation, &cache.up, None, &dactive, &mut dup, None)?,
        }
        layer.ffn_up.backward(pass, gradients, input, &cache.up_reduced, &dup, n_rows, &mut dinput)?;
        drop((dactive, dup));
        match (&layer.ffn_norm, &cache.residual) {
            (Some(weights), Some(residual)) => {
                self.norm_backward(pass, gradients, weights, residual, &dinput, n_embd, dx)?;
                device.zeros(n_rows * n_embd)
            }
            _ => Ok(dinput),
        }
    }

    /// The attention, given the derivative `dx` after it: adds to `dinput`, that of its normed input.
    ///
    /// Both are `[n_rows][n_embd]`. In a parallel block `dx` is still the derivative at the block's output,
    /// to which attention and FFN are both added.
    #[allow(clippy::too_many_arguments, reason = "one block's operands and gradients")]
    fn attention_backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        batch: &Batch<D>,
        il: usize,
        cache: &AttentionCache<D>,
        dx: &D::Buffer,
        dinput: &mut D::Buffer,
    ) -> Result<()> {
        let (config, layer, device) = (&self.config, &self.layers[il], pass.device);
        let n_rows = batch.packed.n_rows();
        let (n_query, n_key, attention) = (config.n_query(), config.n_key(), &config.attention[il]);
        // d loss / d heads, [n_rows][n_query].
        let mut dheads = device.zeros(n_rows * n_query)?;
        {
            let (norm, projected) = (&layer.post_attention_norm, cache.projected.as_ref());
            let dprojected = self.post_norm_backward(pass, gradients, norm, projected, dx, n_rows)?;
            let dy = dprojected.as_ref().unwrap_or(dx);
            let (heads, reduced) = (&cache.heads, &cache.output_reduced);
            layer.attn_output.backward(pass, gradients, heads, reduced, dy, n_rows, &mut dheads)?;
        }
        // [n_rows][n_query], and twice [n_rows][n_key].
        let mut dq = device.zeros(n_rows * n_query)?;
        let mut dk = device.zeros(n_rows * n_key)?;
        let mut dv = device.zeros(n_rows * n_key)?;
        let AttentionCache { q, k, v, heads, lse, .. } = cache;
        let rows = &batch.rows;
        device.attention_back(attention, rows, q, k, v, heads, lse, &dheads, &mut dq, &mut dk, &mut dv)?;
        if let Some(rope) = &config.rope[il] {
            // The derivative of a rotation is the rotation back.
            device.rope(rope, rows, attention.head_dim, true, &mut dq)?;
            device.rope(rope, rows, attention.head_dim, true, &mut dk)?;
        }
        if let (Some((q_norm, k_norm)), Some((q_raw, k_raw))) = (&layer.qk_norm, &cache.qk_raw) {
            for (norm, raw, gradient, n) in
                [(q_norm, q_raw, &mut dq, n_rows * n_query), (k_norm, k_raw, &mut dk, n_rows * n_key)]
            {
                let mut draw = device.zeros(n)?;
                let dweight = norm.trained().map(|id| &mut gradients[id]);
                let (kind, head_dim) = (config.norm, attention.head_dim);
                device.norm_back(kind, raw, norm.get(pass), gradient, head_dim, &mut draw, dweight, None)?;
                *gradient = draw;
            }
        }
        self.qkv_backward(pass, gradients, il, cache, [dq, dk, dv], n_rows, dinput)
    }

    /// Adds to `dx`, `[n_rows][n_embd]`, the derivative of the q, k and v projections.
    ///
    /// `parts` are dq `[n_rows][n_query]`, dk and dv `[n_rows][n_key]`.
    #[allow(clippy::too_many_arguments, reason = "one operation's operands and gradients")]
    fn qkv_backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        il: usize,
        cache: &AttentionCache<D>,
        parts: [D::Buffer; 3],
        n_rows: usize,
        dx: &mut D::Buffer,
    ) -> Result<()> {
        let (x, reduced) = (&cache.input, &cache.qkv_reduced);
        match &self.layers[il].qkv {
            Qkv::Separate(linears) => {
                let all = linears.iter().zip(reduced).zip(&parts);
                all.into_iter().try_for_each(|((linear, reduced), dy)| {
                    linear.backward(pass, gradients, x, reduced, dy, n_rows, dx)
                })
            }
            Qkv::Fused(linear) => {
                let mut dfused = pass.device.zeros(n_rows * linear.n_out)?;
                let widths = [self.config.n_query(), self.config.n_key(), self.config.n_key()];
                let mut to = 0;
                for (part, width) in parts.iter().zip(widths) {
                    pass.device.add_columns(part, width, 0, &mut dfused, linear.n_out, to, width)?;
                    to += width;
                }
                linear.backward(pass, gradients, x, &reduced[0], &dfused, n_rows, dx)
            }
        }
    }

    /// The embeddings, given the derivative `dx` at the first block's input, `[n_rows][n_embd]`.
    fn embed_backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        batch: &Batch<D>,
        cache: &Cache<D>,
        mut dx: D::Buffer,
    ) -> Result<()> {
        let device = pass.device;
        let (n_rows, n_embd) = (batch.packed.n_rows(), self.config.n_embd);
        if let (Some(weights), Some(embedded)) = (&self.embedding_norm, &cache.embedded) {
            let mut dembedded = device.zeros(n_rows * n_embd)?;
            self.norm_backward(pass, gradients, weights, embedded, &dx, n_embd, &mut dembedded)?;
            dx = dembedded;
        }
        if let Some(id) = self.positions.as_ref().and_then(Row::trained) {
            device.scatter_add(&dx, n_embd, &Index::Position, &batch.rows, 1.0, &mut gradients[id])?;
        }
        self.embedding.backward(pass, gradients, &batch.rows, &cache.embedding_reduced, &dx, n_rows)
    }

    /// d loss / d `projected`, `[n_rows][n_embd]`, given `dy` after the norm that follows it.
    ///
    /// `None` if no norm follows: then the derivative is `dy` itself.
    fn post_norm_backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        weights: &Option<NormWeights<D>>,
        projected: Option<&D::Buffer>,
        dy: &D::Buffer,
        n_rows: usize,
    ) -> Result<Option<D::Buffer>> {
        let (Some(weights), Some(projected)) = (weights, projected) else { return Ok(None) };
        let n_embd = self.config.n_embd;
        let mut dprojected = pass.device.zeros(n_rows * n_embd)?;
        self.norm_backward(pass, gradients, weights, projected, dy, n_embd, &mut dprojected)?;
        Ok(Some(dprojected))
    }

    /// Adds a norm's derivative to `dx`, and those of its weight and bias to `gradients` if they are trained.
    ///
    /// `x`, `dy` and `dx` have rows of `n_cols`.
    #[allow(clippy::too_many_arguments, reason = "one operation's operands and gradients")]
    fn norm_backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        weights: &NormWeights<D>,
        x: &D::Buffer,
        dy: &D::Buffer,
        n_cols: usize,
        dx: &mut D::Buffer,
    ) -> Result<()> {
        let (weight, norm) = (weights.weight.get(pass), self.config.norm);
        let ids = (weights.weight.trained(), weights.bias.as_ref().and_then(Row::trained));
        let (dweight, dbias) = two_of(gradients, ids);
        pass.device.norm_back(norm, x, weight, dy, n_cols, dx, dweight, dbias)
    }
}

/// Borrows up to two different gradients at once.
fn two_of<B>(
    gradients: &mut [B],
    ids: (Option<ParameterId>, Option<ParameterId>),
) -> (Option<&mut B>, Option<&mut B>) {
    match ids {
        (Some(first), Some(second)) => {
            let [first, second] = gradients
                .get_disjoint_mut([first, second])
                .expect("a weight and its bias are two parameters");
            (Some(first), Some(second))
        }
        (Some(first), None) => (Some(&mut gradients[first]), None),
        (None, Some(second)) => (None, Some(&mut gradients[second])),
        (None, None) => (None, None),
    }
}
