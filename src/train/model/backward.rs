//! The backward pass: from the gradients of the log-probabilities to those of what is trained.

use crate::error::Result;

use crate::train::device::{Device, Index};
use crate::train::model::forward::{Batch, Cache, LayerCache};
use crate::train::model::linear::{Pass, Row, Weight, added, plain};
use crate::train::model::parameters::ParameterId;
use crate::train::model::transformer::{NormWeights, Qkv, Transformer};

impl<D: Device> Transformer<D> {
    /// Adds to `gradients` those of a loss whose gradient with respect to each output's log-probability is
    /// `dlogps`, `[outputs]`.
    ///
    /// # Errors
    /// Of the device.
    pub fn backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        batch: &Batch<D>,
        mut cache: Cache<D>,
        dlogps: &D::Buffer,
    ) -> Result<()> {
        let last = cache.inputs.pop().expect("a forward pass keeps what the last block leaves");
        let mut dx = self.head_backward(pass, gradients, batch, cache.head.take(), &last, dlogps)?;
        drop(last);
        for il in (0..self.config.n_layer).rev() {
            let x = cache.inputs.pop().expect("a forward pass keeps what each block reads");
            let layer_cache = match cache.layers.pop().flatten() {
                Some(layer_cache) => layer_cache,
                None => self.layer_forward(pass, batch, il, &x)?.1,
            };
            self.layer_backward(pass, gradients, batch, il, &x, layer_cache, &mut dx)?;
        }
        self.embed_backward(pass, gradients, batch, &cache, dx)
    }

    /// The gradient of what the last block leaves, `[R][n_embd]`.
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
            Some(mut dnormed) => {
                device.scale_rows(dlogps, 0, n_embd, &mut dnormed)?;
                let all = 0..n_outputs;
                let (_, rows) = self.output_rows(pass, batch, last, all.clone())?;
                let mut drows = device.zeros(n_outputs * n_embd)?;
                self.norm_backward(pass, gradients, &self.output_norm, &rows, &dnormed, n_embd, &mut drows)?;
                device.scatter_add(&drows, n_embd, &Index::Output(all), &batch.rows, 1.0, &mut dx)?;
            }
            None => {
                // The same as in the forward pass.
                let mut logps = device.space(n_outputs)?;
                for range in self.chunks(device, n_outputs) {
                    let (normed, rows) = self.output_rows(pass, batch, last, range.clone())?;
                    let (mut logits, reduced) = self.output.forward(pass, &normed, range.len())?;
                    self.logprobs(pass, batch, range.clone(), true, &mut logits, &mut logps)?;
                    device.scale_rows(dlogps, range.start, self.config.n_vocab, &mut logits)?;
                    let mut dnormed = device.zeros(range.len() * n_embd)?;
                    let n = range.len();
                    self.output.backward(pass, gradients, &normed, &reduced, &logits, n, &mut dnormed)?;
                    let mut drows = device.zeros(n * n_embd)?;
                    let weights = &self.output_norm;
                    self.norm_backward(pass, gradients, weights, &rows, &dnormed, n_embd, &mut drows)?;
                    device.scatter_add(&drows, n_embd, &Index::Output(range), &batch.rows, 1.0, &mut dx)?;
                }
            }
        }
        Ok(dx)
    }

    /// `dx` is the gradient of what the block leaves, and becomes that of what it reads.
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
        let (config, layer, device) = (&self.config, &self.layers[il], pass.device);
        let (n_rows, n_embd, n_ff) = (batch.packed.n_rows(), config.n_embd, config.n_ff[il]);
        if let (Some(id), Some(_)) = (layer.direction, pass.adapter_scale) {
            device.sum_rows(dx, n_embd, &mut gradients[id])?;
        }

        // The FFN.
        let mut dactive = device.zeros(n_rows * n_ff)?;
        {
            let dprojected = self.unnormed(
                pass,
                gradients,
                &layer.post_ffn_norm,
                cache.ffn_projected.as_ref(),
                dx,
                n_rows,
            )?;
            let dprojected = dprojected.as_ref().unwrap_or(dx);
            let (active, reduced) = (&cache.active, &cache.down_reduced);
            layer.ffn_down.backward(pass, gradients, active, reduced, dprojected, n_rows, &mut dactive)?;
        }
        let mut dup = device.zeros(n_rows * n_ff)?;
        let mut dread = device.zeros(n_rows * n_embd)?;
        let read = cache.ffn_in.as_ref().unwrap_or(&cache.attn_in);
        match (&layer.ffn_gate, &cache.gate) {
            (Some(linear), Some((gate, reduced))) => {
                let mut dgate = device.zeros(n_rows * n_ff)?;
                let up = Some(&cache.up);
                device.activate_back(config.activation, gate, up, &dactive, &mut dgate, Some(&mut dup))?;
                linear.backward(pass, gradients, read, reduced, &dgate, n_rows, &mut dread)?;
            }
            _ => device.activate_back(config.activation, &cache.up, None, &dactive, &mut dup, None)?,
        }
        layer.ffn_up.backward(pass, gradients, read, &cache.up_reduced, &dup, n_rows, &mut dread)?;
        drop((dactive, dup));
        // In a parallel block the norm of the attention takes this gradient too; else `dx` becomes that of the
        // residual stream between the two.
        let mut dattn_in = match (&layer.ffn_norm, &cache.middle) {
            (Some(weights), Some(middle)) => {
                self.norm_backward(pass, gradients, weights, middle, &dread, n_embd, dx)?;
                device.zeros(n_rows * n_embd)?
            }
            _ => dread,
        };

        // The attention.
        let (n_query, n_key, attention) = (config.n_query(), config.n_key(), &config.attention[il]);
        let mut dattn_out = device.zeros(n_rows * n_query)?;
        {
            // In a parallel block the FFN has left `dx` as it was.
            let projected = cache.attn_projected.as_ref();
            let dprojected =
                self.unnormed(pass, gradients, &layer.post_attention_norm, projected, dx, n_rows)?;
            let dprojected = dprojected.as_ref().unwrap_or(dx);
            let (input, reduced) = (&cache.attn_out, &cache.output_reduced);
            layer.attn_output.backward(
                pass,
                gradients,
                input,
                reduced,
                dprojected,
                n_rows,
                &mut dattn_out,
            )?;
        }
        let mut dq = device.zeros(n_rows * n_query)?;
        let mut dk = device.zeros(n_rows * n_key)?;
        let mut dv = device.zeros(n_rows * n_key)?;
        let LayerCache { q, k, v, attn_out, lse, .. } = &cache;
        device.attention_back(
            attention,
            &batch.rows,
            q,
            k,
            v,
            attn_out,
            lse,
            &dattn_out,
            &mut dq,
            &mut dk,
            &mut dv,
        )?;
        if let Some(rope) = &config.rope[il] {
            device.rope(rope, &batch.rows, attention.head_dim, true, &mut dq)?;
            device.rope(rope, &batch.rows, attention.head_dim, true, &mut dk)?;
        }
        if let (Some((q_norm, k_norm)), Some((q_raw, k_raw))) = (&layer.qk_norm, &cache.raw) {
            for (norm, raw, gradient, n) in
                [(q_norm, q_raw, &mut dq, n_rows * n_query), (k_norm, k_raw, &mut dk, n_rows * n_key)]
            {
                let mut draw = device.zeros(n)?;
                let dweight = of_row(gradients, norm);
                let (kind, head_dim) = (config.norm, attention.head_dim);
                device.norm_back(kind, raw, norm.get(pass), gradient, head_dim, &mut draw, dweight, None)?;
                *gradient = draw;
            }
        }
        self.qkv_backward(pass, gradients, il, &cache, [dq, dk, dv], n_rows, &mut dattn_in)?;
        self.norm_backward(pass, gradients, &layer.attn_norm, x, &dattn_in, n_embd, dx)
    }

    #[allow(clippy::too_many_arguments, reason = "one operation's operands and gradients")]
    fn qkv_backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        il: usize,
        cache: &LayerCache<D>,
        parts: [D::Buffer; 3],
        n_rows: usize,
        dx: &mut D::Buffer,
    ) -> Result<()> {
        let (x, reduced) = (&cache.attn_in, &cache.qkv_reduced);
        match &self.layers[il].qkv {
            Qkv::Apart(linears) => {
                let all = linears.iter().zip(reduced).zip(&parts);
                all.into_iter().try_for_each(|((linear, reduced), dy)| {
                    linear.backward(pass, gradients, x, reduced, dy, n_rows, dx)
                })
            }
            Qkv::Fused(linear) => {
                let mut dall = pass.device.zeros(n_rows * linear.n_out)?;
                let widths = [self.config.n_query(), self.config.n_key(), self.config.n_key()];
                let mut to = 0;
                for (part, width) in parts.iter().zip(widths) {
                    pass.device.add_columns(part, width, 0, &mut dall, linear.n_out, to, width)?;
                    to += width;
                }
                linear.backward(pass, gradients, x, &reduced[0], &dall, n_rows, dx)
            }
        }
    }

    fn embed_backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        batch: &Batch<D>,
        cache: &Cache<D>,
        mut dx: D::Buffer,
    ) -> Result<()> {
        let Pass { device, values, .. } = pass;
        let (n_rows, n_embd) = (batch.packed.n_rows(), self.config.n_embd);
        let scale = self.config.embedding_scale;
        if let (Some(weights), Some(embedded)) = (&self.embedding_norm, &cache.embedded) {
            let mut dembedded = device.zeros(n_rows * n_embd)?;
            self.norm_backward(pass, gradients, weights, embedded, &dx, n_embd, &mut dembedded)?;
            dx = dembedded;
        }
        if let Some(id) = self.positions.as_ref().and_then(Row::trained) {
            device.scatter_add(&dx, n_embd, &Index::Position, &batch.rows, 1.0, &mut gradients[id])?;
        }
        if let Weight::Trained(id) = &self.embedding.weight {
            device.scatter_add(&dx, n_embd, &Index::Token, &batch.rows, scale, &mut gradients[*id])?;
        }
        if let (Some(low_rank), Some(adapter_scale), Some(a)) =
            (self.embedding.low_rank, pass.adapter_scale, &cache.embedding_reduced)
        {
            let (rank, alpha) = (low_rank.rank, scale * adapter_scale);
            let mut db = plain([n_embd, rank, n_rows]);
            (db.transpose_a, db.alpha) = (true, alpha);
            device.gemm(added(db), &dx, a, &mut gradients[low_rank.b])?;
            let mut da = device.zeros(n_rows * rank)?;
            let mut product = plain([n_rows, rank, n_embd]);
            product.alpha = alpha;
            device.gemm(product, &dx, &values[low_rank.b], &mut da)?;
            device.scatter_add(&da, rank, &Index::Token, &batch.rows, 1.0, &mut gradients[low_rank.a])?;
        }
        Ok(())
    }

    /// The gradient before a norm that follows a projection; `None` where none follows, and it is `dy` itself.
    fn unnormed(
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
        let (dweight, dbias) = of_ids(gradients, ids);
        pass.device.norm_back(norm, x, weight, dy, n_cols, dx, dweight, dbias)
    }
}

fn of_row<'a, D: Device>(gradients: &'a mut [D::Buffer], row: &Row<D>) -> Option<&'a mut D::Buffer> {
    row.trained().map(|id| &mut gradients[id])
}

/// Two of the gradients at once.
fn of_ids<B>(
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
