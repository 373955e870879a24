//! [`Device`] for a GPU: each operation compares lengths with shapes, then calls the extension.

use std::ops::Range;

use crate::error::Result;
use crate::train::data::pack::Packed;
use crate::train::device::limits::LOGIT_BYTES;
use crate::train::device::{
    Activation, AdamwStep, Attention, Device, Gemm, HostMatrix, Index, Norm, RmspropStep, Rope, RopePairs,
    Trained,
};
use crate::train::recipe::dpo::{AnswerLogps, PairLoss, Preference};

use crate::train::device::cuda::kinds::{self, AttentionKind};
use crate::train::device::cuda::{Buffer, Cuda, Matrix, Rows, ffi};

/// Rows of `n_cols` numbers in a buffer of `len`, and `n_cols`, as the extension takes them.
fn shape(len: usize, n_cols: usize) -> (i64, i64) {
    assert!(n_cols > 0 && len.is_multiple_of(n_cols), "{len} numbers in rows of {n_cols}");
    ((len / n_cols) as i64, n_cols as i64)
}

impl Device for Cuda {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Rows = Rows;

    fn describe(&self) -> String {
        format!("{}, {}, {} weights, bf16 products", self.name(), self.properties.name, self.frozen.name())
    }

    fn logit_bytes(&self) -> usize {
        LOGIT_BYTES
    }

    fn trim(&self) -> Result<()> {
        // SAFETY: the device is open.
        self.check(unsafe { ffi::detox_cuda_trim(self.raw()) })
    }

    fn zeros(&self, n: usize) -> Result<Buffer> {
        let mut buffer = Buffer::new(&self.handle, n)?;
        buffer.clear()?;
        Ok(buffer)
    }

    fn space(&self, n: usize) -> Result<Buffer> {
        Buffer::new(&self.handle, n)
    }

    fn copy(&self, x: &Buffer, n: usize) -> Result<Buffer> {
        assert_eq!(x.len(), n, "as many numbers as x has");
        let mut y = Buffer::new(&self.handle, n)?;
        // SAFETY: both have n numbers.
        self.check(unsafe { ffi::detox_cuda_copy(self.raw(), self.at(x), n as i64, self.at_mut(&mut y)) })?;
        Ok(y)
    }

    fn upload(&self, values: &[f32]) -> Result<Buffer> {
        let mut buffer = Buffer::new(&self.handle, values.len())?;
        buffer.write(values)?;
        Ok(buffer)
    }

    fn write(&self, values: &[f32], buffer: &mut Buffer) -> Result<()> {
        buffer.write(values)
    }

    fn download(&self, buffer: &Buffer) -> Result<Vec<f32>> {
        buffer.read()
    }

    fn clear(&self, buffer: &mut Buffer) -> Result<()> {
        buffer.clear()
    }

    fn matrix(&self, matrix: HostMatrix) -> Result<Matrix> {
        Matrix::new(&self.handle, matrix, self.frozen)
    }

    fn rows(&self, packed: &Packed) -> Result<Rows> {
        Rows::new(&self.handle, packed)
    }

    fn product(&self, w: &Matrix, x: &Buffer, n_rows: usize, y: &mut Buffer) -> Result<()> {
        self.products(&[w], x, n_rows, std::slice::from_mut(y))
    }

    fn products(&self, ws: &[&Matrix], x: &Buffer, n_rows: usize, ys: &mut [Buffer]) -> Result<()> {
        assert_eq!(ws.len(), ys.len(), "a buffer for each matrix");
        let fit = ws.iter().zip(&*ys).all(|(w, y)| x.len() == n_rows * w.n_in && y.len() == n_rows * w.n_out);
        assert!(fit, "x[R][I] and ys[i][R][O]");
        let raw = ws.iter().map(|w| w.multiplied(&self.handle)).collect::<Result<Vec<_>>>()?;
        let at: Vec<*mut f32> = ys.iter_mut().map(|y| self.at_mut(y)).collect();
        let (n, n_rows) = (raw.len() as i64, n_rows as i64);
        // SAFETY: the lengths match the shapes; the matrices and both lists live during the call.
        let status =
            unsafe { ffi::detox_cuda_products(self.raw(), raw.as_ptr(), n, self.at(x), n_rows, at.as_ptr()) };
        self.check(status)
    }

    fn product_back(&self, w: &Matrix, dy: &Buffer, n_rows: usize, dx: &mut Buffer) -> Result<()> {
        assert!(dy.len() == n_rows * w.n_out && dx.len() == n_rows * w.n_in, "dy[R][O] and dx[R][I]");
        let raw = w.multiplied(&self.handle)?;
        // SAFETY: the lengths match the shapes; the matrix lives during the call.
        let status = unsafe {
            ffi::detox_cuda_product_back(self.raw(), &raw, self.at(dy), n_rows as i64, self.at_mut(dx))
        };
        self.check(status)
    }

    fn gemm(&self, gemm: Gemm, a: &Buffer, b: &Buffer, c: &mut Buffer) -> Result<()> {
        let Gemm { m, n, k, .. } = gemm;
        assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n, "operands of {gemm:?}");
        let kind = kinds::gemm(gemm);
        // SAFETY: the lengths match the sizes.
        self.check(unsafe {
            ffi::detox_cuda_multiply(self.raw(), &kind, self.at(a), self.at(b), self.at_mut(c))
        })
    }

    fn embed(&self, w: &Matrix, rows: &Rows, scale: f32, y: &mut Buffer) -> Result<()> {
        assert!(rows.n_rows == 0 || rows.max_token < w.n_out, "a token beyond the table");
        assert_eq!(y.len(), rows.n_rows * w.n_in, "y[R][I]");
        let raw = w.read(&self.handle);
        // SAFETY: every token has a row in W, and y has the length of its shape.
        self.check(unsafe {
            ffi::detox_cuda_embed(self.raw(), &raw, self.rows_at(rows), scale, self.at_mut(y))
        })
    }

    fn gather(
        &self,
        table: &Buffer,
        n_cols: usize,
        index: &Index,
        rows: &Rows,
        scale: f32,
        y: &mut Buffer,
    ) -> Result<()> {
        let lookup = rows.lookup(index);
        lookup.assert_shapes(table.len(), y.len(), n_cols);
        // SAFETY: every index has a row in the table, and y has the length of its shape.
        let status = unsafe {
            ffi::detox_cuda_gather(
                self.raw(),
                self.at(table),
                n_cols as i64,
                lookup.kind,
                lookup.first,
                lookup.n as i64,
                self.rows_at(rows),
                scale,
                self.at_mut(y),
            )
        };
        self.check(status)
    }

    fn scatter_add(
        &self,
        dy: &Buffer,
        n_cols: usize,
        index: &Index,
        rows: &Rows,
        scale: f32,
        dtable: &mut Buffer,
    ) -> Result<()> {
        let lookup = rows.lookup(index);
        lookup.assert_shapes(dtable.len(), dy.len(), n_cols);
        // SAFETY: every index has a row in the table, and dy has the length of its shape.
        let status = unsafe {
            ffi::detox_cuda_scatter_add(
                self.raw(),
                self.at(dy),
                n_cols as i64,
                lookup.kind,
                lookup.first,
                lookup.n as i64,
                self.rows_at(rows),
                scale,
                self.at_mut(dtable),
            )
        };
        self.check(status)
    }

    fn norm(
        &self,
        norm: Norm,
        x: &Buffer,
        weight: &Buffer,
        bias: Option<&Buffer>,
        n_cols: usize,
        y: &mut Buffer,
    ) -> Result<()> {
        assert!(
            weight.len() == n_cols && bias.is_none_or(|bias| bias.len() == n_cols),
            "weight[C] and bias[C]"
        );
        assert_eq!(x.len(), y.len(), "x[R][C] and y[R][C]");
        let (n_rows, n_cols) = shape(x.len(), n_cols);
        let (kind, bias) = (kinds::norm(norm), self.address_of(bias));
        // SAFETY: the lengths match the shapes.
        let status = unsafe {
            ffi::detox_cuda_norm(
                self.raw(),
                &kind,
                self.at(x),
                self.at(weight),
                bias,
                n_rows,
                n_cols,
                self.at_mut(y),
            )
        };
        self.check(status)
    }

    fn norm_back(
        &self,
        norm: Norm,
        x: &Buffer,
        weight: &Buffer,
        dy: &Buffer,
        n_cols: usize,
        dx: &mut Buffer,
        dweight: Option<&mut Buffer>,
        dbias: Option<&mut Buffer>,
    ) -> Result<()> {
        let weights_match = dweight.as_ref().is_none_or(|w| w.len() == n_cols)
            && dbias.as_ref().is_none_or(|b| b.len() == n_cols);
        assert!(weight.len() == n_cols && weights_match, "weight[C] and its gradients");
        assert!(dy.len() == x.len() && dx.len() == x.len(), "x[R][C] and its gradients");
        let (n_rows, n_cols) = shape(x.len(), n_cols);
        let kind = kinds::norm(norm);
        let (dweight, dbias) = (self.address_of_mut(dweight), self.address_of_mut(dbias));
        // SAFETY: the lengths match the shapes.
        let status = unsafe {
            ffi::detox_cuda_norm_back(
                self.raw(),
                &kind,
                self.at(x),
                self.at(weight),
                self.at(dy),
                n_rows,
                n_cols,
                self.at_mut(dx),
                dweight,
                dbias,
            )
        };
        self.check(status)
    }

    fn rope(&self, rope: &Rope, rows: &Rows, head_dim: usize, back: bool, x: &mut Buffer) -> Result<()> {
        if rows.n_rows == 0 {
            return Ok(());
        }
        let n_pairs = rope.frequencies.len();
        assert!(2 * n_pairs <= head_dim, "the pairs fit into a head");
        let (n_heads, _) = shape(x.len(), rows.n_rows * head_dim);
        let halves = i32::from(rope.pairs == RopePairs::Halves);
        // SAFETY: x is [R][heads][D]; there are `n_pairs` frequencies, and they live during the call.
        let status = unsafe {
            ffi::detox_cuda_rope(
                self.raw(),
                self.rows_at(rows),
                rope.frequencies.as_ptr(),
                n_pairs as i32,
                halves,
                i32::from(back),
                n_heads,
                head_dim as i64,
                self.at_mut(x),
            )
        };
        self.check(status)
    }

    fn attention(
        &self,
        attention: &Attention,
        rows: &Rows,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        out: &mut Buffer,
        lse: &mut Buffer,
    ) -> Result<()> {
        let kind = AttentionKind::new(attention);
        kind.assert_shapes(rows, &[q, out], &[k, v], lse);
        // SAFETY: the lengths match the shapes; `kind` has a slope for each head and lives during the call.
        let status = unsafe {
            ffi::detox_cuda_attention(
                self.raw(),
                &kind.raw(),
                self.rows_at(rows),
                self.at(q),
                self.at(k),
                self.at(v),
                self.at_mut(out),
                self.at_mut(lse),
            )
        };
        self.check(status)
    }

    fn attention_back(
        &self,
        attention: &Attention,
        rows: &Rows,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        out: &Buffer,
        lse: &Buffer,
        dout: &Buffer,
        dq: &mut Buffer,
        dk: &mut Buffer,
        dv: &mut Buffer,
    ) -> Result<()> {
        let kind = AttentionKind::new(attention);
        kind.assert_shapes(rows, &[q, out, dout, dq], &[k, v, dk, dv], lse);
        // SAFETY: the lengths match the shapes; `kind` has a slope for each head and lives during the call.
        let status = unsafe {
            ffi::detox_cuda_attention_back(
                self.raw(),
                &kind.raw(),
                self.rows_at(rows),
                self.at(q),
                self.at(k),
                self.at(v),
                self.at(out),
                self.at(lse),
                self.at(dout),
                self.at_mut(dq),
                self.at_mut(dk),
                self.at_mut(dv),
            )
        };
        self.check(status)
    }

    fn activate(
        &self,
        activation: Activation,
        gate: &Buffer,
        up: Option<&Buffer>,
        y: &mut Buffer,
    ) -> Result<()> {
        let n = gate.len();
        assert!(y.len() == n && up.is_none_or(|up| up.len() == n), "buffers of one shape");
        let (id, up) = (kinds::activation(activation), self.address_of(up));
        // SAFETY: all lengths are the same.
        let status =
            unsafe { ffi::detox_cuda_activate(self.raw(), id, self.at(gate), up, n as i64, self.at_mut(y)) };
        self.check(status)
    }

    fn activate_back(
        &self,
        activation: Activation,
        gate: &Buffer,
        up: Option<&Buffer>,
        dy: &Buffer,
        dgate: &mut Buffer,
        dup: Option<&mut Buffer>,
    ) -> Result<()> {
        let n = gate.len();
        assert_eq!(up.is_some(), dup.is_some(), "dup if and only if up");
        let up_matches = up.is_none_or(|up| up.len() == n) && dup.as_ref().is_none_or(|dup| dup.len() == n);
        assert!(dy.len() == n && dgate.len() == n && up_matches, "buffers of one shape");
        let (id, up, dup) = (kinds::activation(activation), self.address_of(up), self.address_of_mut(dup));
        // SAFETY: all lengths are the same.
        let status = unsafe {
            ffi::detox_cuda_activate_back(
                self.raw(),
                id,
                self.at(gate),
                up,
                self.at(dy),
                n as i64,
                self.at_mut(dgate),
                dup,
            )
        };
        self.check(status)
    }

    fn add(&self, scale: f32, x: &Buffer, y: &mut Buffer) -> Result<()> {
        assert_eq!(x.len(), y.len(), "buffers of one shape");
        // SAFETY: all lengths are the same.
        self.check(unsafe {
            ffi::detox_cuda_add(self.raw(), scale, self.at(x), x.len() as i64, self.at_mut(y))
        })
    }

    fn add_to_rows(&self, bias: &Buffer, n_cols: usize, y: &mut Buffer) -> Result<()> {
        assert_eq!(bias.len(), n_cols, "bias[C]");
        let (n_rows, n_cols) = shape(y.len(), n_cols);
        // SAFETY: the lengths match the shapes.
        let status =
            unsafe { ffi::detox_cuda_add_to_rows(self.raw(), self.at(bias), n_rows, n_cols, self.at_mut(y)) };
        self.check(status)
    }

    fn sum_rows(&self, dy: &Buffer, n_cols: usize, dbias: &mut Buffer) -> Result<()> {
        assert_eq!(dbias.len(), n_cols, "dbias[C]");
        let (n_rows, n_cols) = shape(dy.len(), n_cols);
        // SAFETY: the lengths match the shapes.
        let status =
            unsafe { ffi::detox_cuda_sum_rows(self.raw(), self.at(dy), n_rows, n_cols, self.at_mut(dbias)) };
        self.check(status)
    }

    fn scale_rows(&self, factors: &Buffer, first: usize, n_cols: usize, x: &mut Buffer) -> Result<()> {
        let (n_rows, n_cols) = shape(x.len(), n_cols);
        assert!(first + n_rows as usize <= factors.len(), "a factor for each row");
        let factors = self.at(factors).wrapping_add(first);
        // SAFETY: there is a factor for each row, and the length of x matches its shape.
        let status =
            unsafe { ffi::detox_cuda_scale_rows(self.raw(), factors, n_rows, n_cols, self.at_mut(x)) };
        self.check(status)
    }

    fn add_columns(
        &self,
        src: &Buffer,
        src_cols: usize,
        from: usize,
        dst: &mut Buffer,
        dst_cols: usize,
        to: usize,
        n: usize,
    ) -> Result<()> {
        let (n_rows, _) = shape(dst.len(), dst_cols);
        assert!(src.len() >= n_rows as usize * src_cols, "a row of src for each row of dst");
        assert!(from + n <= src_cols && to + n <= dst_cols, "columns within both buffers");
        // SAFETY: the rows and columns lie within both buffers.
        let status = unsafe {
            ffi::detox_cuda_add_columns(
                self.raw(),
                self.at(src),
                src_cols as i64,
                from as i64,
                n_rows,
                self.at_mut(dst),
                dst_cols as i64,
                to as i64,
                n as i64,
            )
        };
        self.check(status)
    }

    fn logprobs(
        &self,
        rows: &Rows,
        range: Range<usize>,
        scale: f32,
        n_vocab: usize,
        gradient: bool,
        logits: &mut Buffer,
        logps: &mut Buffer,
    ) -> Result<()> {
        rows.assert_outputs(&range);
        assert!(range.is_empty() || rows.max_output < n_vocab, "a token beyond the vocabulary");
        assert_eq!(logits.len(), range.len() * n_vocab, "logits[n][V]");
        assert_eq!(logps.len(), rows.n_outputs, "logps[outputs]");
        // SAFETY: the lengths match the shapes, every token has a logit, and every output of the range has a number.
        let status = unsafe {
            ffi::detox_cuda_logprobs(
                self.raw(),
                self.rows_at(rows),
                range.start as i64,
                range.len() as i64,
                scale,
                n_vocab as i64,
                i32::from(gradient),
                self.at_mut(logits),
                self.at_mut(logps).wrapping_add(range.start),
            )
        };
        self.check(status)
    }

    fn preference_loss(
        &self,
        preference: Preference,
        rows: &Rows,
        references: &[AnswerLogps],
        n_pairs: usize,
        logps: &Buffer,
        dlogps: &mut Buffer,
    ) -> Result<Vec<(AnswerLogps, PairLoss)>> {
        assert_eq!(references.len(), rows.n_pairs, "a reference for each pair");
        assert!(logps.len() == rows.n_outputs && dlogps.len() == rows.n_outputs, "a number for each output");
        let kind = kinds::preference(preference, n_pairs);
        let of_answers: Vec<f64> = references.iter().flat_map(|r| [r.chosen, r.rejected]).collect();
        let unknown = ffi::detox_cuda_pair_cost {
            policy_chosen: f64::NAN,
            policy_rejected: f64::NAN,
            loss: f64::NAN,
            dchosen: f64::NAN,
            drejected: f64::NAN,
        };
        let mut costs = vec![unknown; rows.n_pairs];
        // SAFETY: a number for each output, two for each pair, and room for each pair's cost; all live during the call.
        let status = unsafe {
            ffi::detox_cuda_preference_loss(
                self.raw(),
                &kind,
                self.rows_at(rows),
                of_answers.as_ptr(),
                self.at(logps),
                self.at_mut(dlogps),
                costs.as_mut_ptr(),
            )
        };
        self.check(status)?;
        let pairs = costs.iter().zip(references);
        Ok(pairs.map(|(cost, reference)| kinds::pair_loss(preference, cost, *reference)).collect())
    }

    fn square_sum(&self, x: &Buffer) -> Result<f64> {
        self.sum_of_squares(std::slice::from_ref(x))
    }

    fn square_sum_all(&self, all: &[Buffer]) -> Result<f64> {
        self.sum_of_squares(all)
    }

    fn rmsprop(
        &self,
        step: RmspropStep,
        gradient: &Buffer,
        mean_square: &mut Buffer,
        value: &mut Buffer,
    ) -> Result<()> {
        self.step_rmsprop(step, &[self.parameter(gradient, None, mean_square, value)])
    }

    fn adamw(
        &self,
        step: AdamwStep,
        gradient: &Buffer,
        mean: &mut Buffer,
        mean_square: &mut Buffer,
        value: &mut Buffer,
    ) -> Result<()> {
        self.step_adamw(step, &[self.parameter(gradient, Some(mean), mean_square, value)])
    }

    fn rmsprop_all(&self, step: RmspropStep, all: &mut [Trained<'_, Buffer>]) -> Result<()> {
        let of = |t: &mut Trained<'_, Buffer>| {
            let [mean_square] = t.states else { unreachable!("RMSprop has one state") };
            self.parameter(t.gradient, None, mean_square, t.value)
        };
        self.step_rmsprop(step, &all.iter_mut().map(of).collect::<Vec<_>>())
    }

    fn adamw_all(&self, step: AdamwStep, all: &mut [Trained<'_, Buffer>]) -> Result<()> {
        let of = |t: &mut Trained<'_, Buffer>| {
            let [mean, mean_square] = t.states else { unreachable!("AdamW has two states") };
            self.parameter(t.gradient, Some(mean), mean_square, t.value)
        };
        self.step_adamw(step, &all.iter_mut().map(of).collect::<Vec<_>>())
    }
}
