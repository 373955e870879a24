//! [`Device`] for the CPU: each operation runs its plain function on the device's threads.

use std::ops::Range;

use crate::error::Result;

use crate::train::data::pack::Packed;
use crate::train::device::cpu::buffer::Fresh;
use crate::train::device::cpu::{
    Buffer, Cpu, Matrix, Products, attention, dense, elementwise, head, norm, optimizer, rope,
};
use crate::train::device::{
    Activation, AdamwStep, Attention, Device, Gemm, HostMatrix, Index, Norm, RmspropStep, Rope,
};
use crate::train::recipe::dpo::{AnswerLogps, PairLoss, Preference};

impl Device for Cpu {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Rows = Packed;

    fn describe(&self) -> String {
        let products = match self.products {
            Products::Exact => "exact",
            Products::Fast if self.kernels.is_some() => "fast (ggml)",
            Products::Fast => "fast (AVX-512 VNNI)",
        };
        let n = self.pool.current_num_threads();
        let threads = if n == 1 { "1 thread".to_owned() } else { format!("{n} threads") };
        format!("cpu, {threads}, {products} products")
    }

    fn scope<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.pool.install(work)
    }

    fn trim(&self) -> Result<()> {
        self.memory.trim();
        Ok(())
    }

    fn zeros(&self, n: usize) -> Result<Buffer> {
        let (mut buffer, fresh) = self.memory.take(n)?;
        if fresh == Fresh::Used {
            self.pool.install(|| elementwise::fill(0.0, &mut buffer));
        }
        Ok(buffer)
    }

    fn space(&self, n: usize) -> Result<Buffer> {
        let (mut buffer, _) = self.memory.take(n)?;
        // In tests, reading a number before it is written gives NaN.
        if cfg!(test) {
            buffer.fill(f32::NAN);
        }
        Ok(buffer)
    }

    fn upload(&self, values: &[f32]) -> Result<Buffer> {
        let mut buffer = self.space(values.len())?;
        buffer.copy_from_slice(values);
        Ok(buffer)
    }

    fn copy(&self, x: &Buffer, n: usize) -> Result<Buffer> {
        assert_eq!(x.len(), n, "as many numbers as x has");
        let mut buffer = self.space(n)?;
        self.pool.install(|| elementwise::copy(x, &mut buffer));
        Ok(buffer)
    }

    fn write(&self, values: &[f32], buffer: &mut Buffer) -> Result<()> {
        buffer.copy_from_slice(values);
        Ok(())
    }

    fn download(&self, buffer: &Buffer) -> Result<Vec<f32>> {
        Ok(buffer.to_vec())
    }

    fn clear(&self, buffer: &mut Buffer) -> Result<()> {
        self.pool.install(|| elementwise::fill(0.0, buffer));
        Ok(())
    }

    fn matrix(&self, matrix: HostMatrix) -> Result<Matrix> {
        #[cfg(target_arch = "x86_64")]
        let is_table = matrix.is_table;
        let mut matrix = Matrix::new(matrix)?;
        if self.kernels.is_some() {
            self.pool.install(|| matrix.keep_transposed());
        }
        #[cfg(target_arch = "x86_64")]
        if self.products == Products::Fast && self.kernels.is_none() {
            self.pool.install(|| matrix.keep_rounded(is_table));
        }
        Ok(matrix)
    }

    fn rows(&self, packed: &Packed) -> Result<Packed> {
        Ok(packed.clone())
    }

    fn product(&self, w: &Matrix, x: &Buffer, n_rows: usize, y: &mut Buffer) -> Result<()> {
        self.pool.install(|| match &self.kernels {
            Some(kernels) => w.fast_product(kernels, x, n_rows, y),
            None => w.product(x, n_rows, y),
        });
        Ok(())
    }

    fn products(&self, ws: &[&Matrix], x: &Buffer, n_rows: usize, ys: &mut [Buffer]) -> Result<()> {
        assert_eq!(ws.len(), ys.len(), "a buffer for each matrix");
        match self.kernels {
            Some(_) => ws.iter().zip(ys).try_for_each(|(w, y)| self.product(w, x, n_rows, y)),
            None => {
                self.pool.install(|| Matrix::products(ws, x, n_rows, ys));
                Ok(())
            }
        }
    }

    fn product_back(&self, w: &Matrix, dy: &Buffer, n_rows: usize, dx: &mut Buffer) -> Result<()> {
        self.pool.install(|| match &self.kernels {
            Some(kernels) => w.fast_product_back(kernels, dy, n_rows, dx),
            None => w.product_back(dy, n_rows, dx),
        });
        Ok(())
    }

    fn gemm(&self, gemm: Gemm, a: &Buffer, b: &Buffer, c: &mut Buffer) -> Result<()> {
        self.pool.install(|| dense::gemm(gemm, a, b, c));
        Ok(())
    }

    fn embed(&self, w: &Matrix, rows: &Packed, scale: f32, y: &mut Buffer) -> Result<()> {
        self.pool.install(|| w.embed(|row| rows.tokens[row] as usize, scale, y));
        Ok(())
    }

    fn gather(
        &self,
        table: &Buffer,
        n_cols: usize,
        index: &Index,
        rows: &Packed,
        scale: f32,
        y: &mut Buffer,
    ) -> Result<()> {
        self.pool.install(|| elementwise::gather(table, n_cols, |row| lookup(index, rows, row), scale, y));
        Ok(())
    }

    fn scatter_add(
        &self,
        dy: &Buffer,
        n_cols: usize,
        index: &Index,
        rows: &Packed,
        scale: f32,
        dtable: &mut Buffer,
    ) -> Result<()> {
        elementwise::scatter_add(dy, n_cols, |row| lookup(index, rows, row), scale, dtable);
        Ok(())
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
        self.pool.install(|| norm::norm(norm, x, weight, bias.map(|bias| &**bias), n_cols, y));
        Ok(())
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
        let (dweight, dbias) = (dweight.map(|dweight| &mut **dweight), dbias.map(|dbias| &mut **dbias));
        self.pool.install(|| norm::norm_back(norm, x, weight, dy, n_cols, dx, dweight, dbias));
        Ok(())
    }

    fn rope(&self, rope: &Rope, rows: &Packed, head_dim: usize, back: bool, x: &mut Buffer) -> Result<()> {
        self.pool.install(|| rope::rope(rope, &rows.positions, head_dim, back, x));
        Ok(())
    }

    fn attention(
        &self,
        attention: &Attention,
        rows: &Packed,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        out: &mut Buffer,
        lse: &mut Buffer,
    ) -> Result<()> {
        self.pool.install(|| attention::attention(attention, rows, q, k, v, out, lse));
        Ok(())
    }

    fn attention_back(
        &self,
        attention: &Attention,
        rows: &Packed,
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
        self.pool.install(|| {
            attention::attention_back(attention, rows, q, k, v, out, lse, dout, dq, dk, dv);
        });
        Ok(())
    }

    fn activate(
        &self,
        activation: Activation,
        gate: &Buffer,
        up: Option<&Buffer>,
        y: &mut Buffer,
    ) -> Result<()> {
        self.pool.install(|| elementwise::activate(activation, gate, up.map(|up| &**up), y));
        Ok(())
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
        let (up, dup) = (up.map(|up| &**up), dup.map(|dup| &mut **dup));
        self.pool.install(|| elementwise::activate_back(activation, gate, up, dy, dgate, dup));
        Ok(())
    }

    fn add(&self, scale: f32, x: &Buffer, y: &mut Buffer) -> Result<()> {
        self.pool.install(|| elementwise::add(scale, x, y));
        Ok(())
    }

    fn add_to_rows(&self, bias: &Buffer, n_cols: usize, y: &mut Buffer) -> Result<()> {
        self.pool.install(|| elementwise::add_to_rows(bias, n_cols, y));
        Ok(())
    }

    fn sum_rows(&self, dy: &Buffer, n_cols: usize, dbias: &mut Buffer) -> Result<()> {
        self.pool.install(|| elementwise::sum_rows(dy, n_cols, dbias));
        Ok(())
    }

    fn scale_rows(&self, factors: &Buffer, first: usize, n_cols: usize, x: &mut Buffer) -> Result<()> {
        let factors = &factors[first..first + x.len() / n_cols];
        self.pool.install(|| elementwise::scale_rows(factors, n_cols, x));
        Ok(())
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
        self.pool.install(|| elementwise::add_columns(src, src_cols, from, dst, dst_cols, to, n));
        Ok(())
    }

    fn logprobs(
        &self,
        rows: &Packed,
        range: Range<usize>,
        scale: f32,
        n_vocab: usize,
        gradient: bool,
        logits: &mut Buffer,
        logps: &mut Buffer,
    ) -> Result<()> {
        let outputs = &rows.outputs[range.clone()];
        let found = self.pool.install(|| head::logprobs(outputs, scale, n_vocab, gradient, logits));
        logps[range].copy_from_slice(&found);
        Ok(())
    }

    fn preference_loss(
        &self,
        preference: Preference,
        rows: &Packed,
        references: &[AnswerLogps],
        n_pairs: usize,
        logps: &Buffer,
        dlogps: &mut Buffer,
    ) -> Result<Vec<(AnswerLogps, PairLoss)>> {
        Ok(head::preference_loss(preference, rows, references, n_pairs, logps, dlogps))
    }

    fn square_sum(&self, x: &Buffer) -> Result<f64> {
        Ok(self.pool.install(|| elementwise::square_sum(x)))
    }

    fn rmsprop(
        &self,
        step: RmspropStep,
        gradient: &Buffer,
        mean_square: &mut Buffer,
        value: &mut Buffer,
    ) -> Result<()> {
        self.pool.install(|| optimizer::rmsprop(step, gradient, mean_square, value));
        Ok(())
    }

    fn adamw(
        &self,
        step: AdamwStep,
        gradient: &Buffer,
        mean: &mut Buffer,
        mean_square: &mut Buffer,
        value: &mut Buffer,
    ) -> Result<()> {
        self.pool.install(|| optimizer::adamw(step, gradient, mean, mean_square, value));
        Ok(())
    }
}

/// The table row that entry `row` of an index reads.
fn lookup(index: &Index, rows: &Packed, row: usize) -> usize {
    match index {
        Index::Token => rows.tokens[row] as usize,
        Index::Position => rows.positions[row],
        Index::Output(range) => rows.outputs[range.start + row].row,
    }
}
