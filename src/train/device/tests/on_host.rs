//! Wraps a device so that its buffers are on the host.
//!
//! Each operation uploads its operands, including those that it overwrites, and downloads the changed ones.

use std::ops::Range;

use crate::error::Result;
use crate::train::data::pack::Packed;
use crate::train::device::{
    Activation, AdamwStep, Attention, Device, Gemm, HostMatrix, Index, Norm, RmspropStep, Rope, Trained,
};
use crate::train::recipe::dpo::{AnswerLogps, PairLoss, Preference};

#[derive(Debug)]
pub struct OnHost<D: Device>(pub D);

impl<D: Device> OnHost<D> {
    /// Calls `work` with a copy of `buffer` on the device, and downloads the copy into `buffer`.
    fn changing<T>(
        &self,
        buffer: &mut Vec<f32>,
        work: impl FnOnce(&mut D::Buffer) -> Result<T>,
    ) -> Result<T> {
        let mut there = self.0.upload(buffer)?;
        let result = work(&mut there)?;
        *buffer = self.0.download(&there)?;
        Ok(result)
    }

    /// The same for a buffer that may be absent.
    fn changing_if_any<T>(
        &self,
        buffer: Option<&mut Vec<f32>>,
        work: impl FnOnce(Option<&mut D::Buffer>) -> Result<T>,
    ) -> Result<T> {
        match buffer {
            Some(buffer) => self.changing(buffer, |there| work(Some(there))),
            None => work(None),
        }
    }

    fn there(&self, buffer: &[f32]) -> Result<D::Buffer> {
        self.0.upload(buffer)
    }

    fn there_if_any(&self, buffer: Option<&Vec<f32>>) -> Result<Option<D::Buffer>> {
        buffer.map(|buffer| self.there(buffer)).transpose()
    }
}

impl<D: Device> Device for OnHost<D> {
    type Buffer = Vec<f32>;
    type Matrix = D::Matrix;
    type Rows = D::Rows;

    fn describe(&self) -> String {
        self.0.describe()
    }

    fn zeros(&self, n: usize) -> Result<Vec<f32>> {
        self.0.download(&self.0.zeros(n)?)
    }

    fn upload(&self, values: &[f32]) -> Result<Vec<f32>> {
        self.0.download(&self.0.upload(values)?)
    }

    fn copy(&self, x: &Vec<f32>, n: usize) -> Result<Vec<f32>> {
        self.0.download(&self.0.copy(&self.there(x)?, n)?)
    }

    fn write(&self, values: &[f32], buffer: &mut Vec<f32>) -> Result<()> {
        self.changing(buffer, |buffer| self.0.write(values, buffer))
    }

    fn download(&self, buffer: &Vec<f32>) -> Result<Vec<f32>> {
        Ok(buffer.clone())
    }

    fn clear(&self, buffer: &mut Vec<f32>) -> Result<()> {
        self.changing(buffer, |buffer| self.0.clear(buffer))
    }

    fn matrix(&self, matrix: HostMatrix) -> Result<D::Matrix> {
        self.0.matrix(matrix)
    }

    fn rows(&self, packed: &Packed) -> Result<D::Rows> {
        self.0.rows(packed)
    }

    fn product(&self, w: &D::Matrix, x: &Vec<f32>, n_rows: usize, y: &mut Vec<f32>) -> Result<()> {
        let x = self.there(x)?;
        self.changing(y, |y| self.0.product(w, &x, n_rows, y))
    }

    fn products(&self, ws: &[&D::Matrix], x: &Vec<f32>, n_rows: usize, ys: &mut [Vec<f32>]) -> Result<()> {
        let x = self.there(x)?;
        let mut there = ys.iter().map(|y| self.there(y)).collect::<Result<Vec<_>>>()?;
        self.0.products(ws, &x, n_rows, &mut there)?;
        ys.iter_mut().zip(&there).try_for_each(|(y, there)| {
            *y = self.0.download(there)?;
            Ok(())
        })
    }

    fn product_back(&self, w: &D::Matrix, dy: &Vec<f32>, n_rows: usize, dx: &mut Vec<f32>) -> Result<()> {
        let dy = self.there(dy)?;
        self.changing(dx, |dx| self.0.product_back(w, &dy, n_rows, dx))
    }

    fn gemm(&self, gemm: Gemm, a: &Vec<f32>, b: &Vec<f32>, c: &mut Vec<f32>) -> Result<()> {
        let (a, b) = (self.there(a)?, self.there(b)?);
        self.changing(c, |c| self.0.gemm(gemm, &a, &b, c))
    }

    fn embed(&self, w: &D::Matrix, rows: &D::Rows, scale: f32, y: &mut Vec<f32>) -> Result<()> {
        self.changing(y, |y| self.0.embed(w, rows, scale, y))
    }

    fn gather(
        &self,
        table: &Vec<f32>,
        n_cols: usize,
        index: &Index,
        rows: &D::Rows,
        scale: f32,
        y: &mut Vec<f32>,
    ) -> Result<()> {
        let table = self.there(table)?;
        self.changing(y, |y| self.0.gather(&table, n_cols, index, rows, scale, y))
    }

    fn scatter_add(
        &self,
        dy: &Vec<f32>,
        n_cols: usize,
        index: &Index,
        rows: &D::Rows,
        scale: f32,
        dtable: &mut Vec<f32>,
    ) -> Result<()> {
        let dy = self.there(dy)?;
        self.changing(dtable, |dtable| self.0.scatter_add(&dy, n_cols, index, rows, scale, dtable))
    }

    fn norm(
        &self,
        norm: Norm,
        x: &Vec<f32>,
        weight: &Vec<f32>,
        bias: Option<&Vec<f32>>,
        n_cols: usize,
        y: &mut Vec<f32>,
    ) -> Result<()> {
        let (x, weight, bias) = (self.there(x)?, self.there(weight)?, self.there_if_any(bias)?);
        self.changing(y, |y| self.0.norm(norm, &x, &weight, bias.as_ref(), n_cols, y))
    }

    fn norm_back(
        &self,
        norm: Norm,
        x: &Vec<f32>,
        weight: &Vec<f32>,
        dy: &Vec<f32>,
        n_cols: usize,
        dx: &mut Vec<f32>,
        dweight: Option<&mut Vec<f32>>,
        dbias: Option<&mut Vec<f32>>,
    ) -> Result<()> {
        let (x, weight, dy) = (self.there(x)?, self.there(weight)?, self.there(dy)?);
        self.changing(dx, |dx| {
            self.changing_if_any(dweight, |dweight| {
                self.changing_if_any(dbias, |dbias| {
                    self.0.norm_back(norm, &x, &weight, &dy, n_cols, dx, dweight, dbias)
                })
            })
        })
    }

    fn rope(&self, rope: &Rope, rows: &D::Rows, head_dim: usize, back: bool, x: &mut Vec<f32>) -> Result<()> {
        self.changing(x, |x| self.0.rope(rope, rows, head_dim, back, x))
    }

    fn attention(
        &self,
        attention: &Attention,
        rows: &D::Rows,
        q: &Vec<f32>,
        k: &Vec<f32>,
        v: &Vec<f32>,
        out: &mut Vec<f32>,
        lse: &mut Vec<f32>,
    ) -> Result<()> {
        let (q, k, v) = (self.there(q)?, self.there(k)?, self.there(v)?);
        self.changing(out, |out| {
            self.changing(lse, |lse| self.0.attention(attention, rows, &q, &k, &v, out, lse))
        })
    }

    fn attention_back(
        &self,
        attention: &Attention,
        rows: &D::Rows,
        q: &Vec<f32>,
        k: &Vec<f32>,
        v: &Vec<f32>,
        out: &Vec<f32>,
        lse: &Vec<f32>,
        dout: &Vec<f32>,
        dq: &mut Vec<f32>,
        dk: &mut Vec<f32>,
        dv: &mut Vec<f32>,
    ) -> Result<()> {
        let (q, k, v) = (self.there(q)?, self.there(k)?, self.there(v)?);
        let (out, lse, dout) = (self.there(out)?, self.there(lse)?, self.there(dout)?);
        self.changing(dq, |dq| {
            self.changing(dk, |dk| {
                self.changing(dv, |dv| {
                    self.0.attention_back(attention, rows, &q, &k, &v, &out, &lse, &dout, dq, dk, dv)
                })
            })
        })
    }

    fn activate(
        &self,
        activation: Activation,
        gate: &Vec<f32>,
        up: Option<&Vec<f32>>,
        y: &mut Vec<f32>,
    ) -> Result<()> {
        let (gate, up) = (self.there(gate)?, self.there_if_any(up)?);
        self.changing(y, |y| self.0.activate(activation, &gate, up.as_ref(), y))
    }

    fn activate_back(
        &self,
        activation: Activation,
        gate: &Vec<f32>,
        up: Option<&Vec<f32>>,
        dy: &Vec<f32>,
        dgate: &mut Vec<f32>,
        dup: Option<&mut Vec<f32>>,
    ) -> Result<()> {
        let (gate, up, dy) = (self.there(gate)?, self.there_if_any(up)?, self.there(dy)?);
        self.changing(dgate, |dgate| {
            self.changing_if_any(dup, |dup| {
                self.0.activate_back(activation, &gate, up.as_ref(), &dy, dgate, dup)
            })
        })
    }

    fn add(&self, scale: f32, x: &Vec<f32>, y: &mut Vec<f32>) -> Result<()> {
        let x = self.there(x)?;
        self.changing(y, |y| self.0.add(scale, &x, y))
    }

    fn add_to_rows(&self, bias: &Vec<f32>, n_cols: usize, y: &mut Vec<f32>) -> Result<()> {
        let bias = self.there(bias)?;
        self.changing(y, |y| self.0.add_to_rows(&bias, n_cols, y))
    }

    fn sum_rows(&self, dy: &Vec<f32>, n_cols: usize, dbias: &mut Vec<f32>) -> Result<()> {
        let dy = self.there(dy)?;
        self.changing(dbias, |dbias| self.0.sum_rows(&dy, n_cols, dbias))
    }

    fn scale_rows(&self, factors: &Vec<f32>, first: usize, n_cols: usize, x: &mut Vec<f32>) -> Result<()> {
        let factors = self.there(factors)?;
        self.changing(x, |x| self.0.scale_rows(&factors, first, n_cols, x))
    }

    fn add_columns(
        &self,
        src: &Vec<f32>,
        src_cols: usize,
        from: usize,
        dst: &mut Vec<f32>,
        dst_cols: usize,
        to: usize,
        n: usize,
    ) -> Result<()> {
        let src = self.there(src)?;
        self.changing(dst, |dst| self.0.add_columns(&src, src_cols, from, dst, dst_cols, to, n))
    }

    fn logprobs(
        &self,
        rows: &D::Rows,
        range: Range<usize>,
        scale: f32,
        n_vocab: usize,
        gradient: bool,
        logits: &mut Vec<f32>,
        logps: &mut Vec<f32>,
    ) -> Result<()> {
        self.changing(logits, |logits| {
            let of =
                |logps: &mut D::Buffer| self.0.logprobs(rows, range, scale, n_vocab, gradient, logits, logps);
            self.changing(logps, of)
        })
    }

    fn preference_loss(
        &self,
        preference: Preference,
        rows: &D::Rows,
        references: &[AnswerLogps],
        n_pairs: usize,
        logps: &Vec<f32>,
        dlogps: &mut Vec<f32>,
    ) -> Result<Vec<(AnswerLogps, PairLoss)>> {
        let logps = self.there(logps)?;
        self.changing(dlogps, |dlogps| {
            self.0.preference_loss(preference, rows, references, n_pairs, &logps, dlogps)
        })
    }

    fn square_sum(&self, x: &Vec<f32>) -> Result<f64> {
        self.0.square_sum(&self.there(x)?)
    }

    fn square_sum_all(&self, all: &[Vec<f32>]) -> Result<f64> {
        self.0.square_sum_all(&all.iter().map(|x| self.there(x)).collect::<Result<Vec<_>>>()?)
    }

    fn rmsprop(
        &self,
        step: RmspropStep,
        gradient: &Vec<f32>,
        mean_square: &mut Vec<f32>,
        value: &mut Vec<f32>,
    ) -> Result<()> {
        let gradient = self.there(gradient)?;
        self.changing(mean_square, |mean_square| {
            self.changing(value, |value| self.0.rmsprop(step, &gradient, mean_square, value))
        })
    }

    fn adamw(
        &self,
        step: AdamwStep,
        gradient: &Vec<f32>,
        mean: &mut Vec<f32>,
        mean_square: &mut Vec<f32>,
        value: &mut Vec<f32>,
    ) -> Result<()> {
        let gradient = self.there(gradient)?;
        self.changing(mean, |mean| {
            self.changing(mean_square, |mean_square| {
                self.changing(value, |value| self.0.adamw(step, &gradient, mean, mean_square, value))
            })
        })
    }

    fn rmsprop_all(&self, step: RmspropStep, all: &mut [Trained<'_, Vec<f32>>]) -> Result<()> {
        stepped_together(&self.0, all, |all| self.0.rmsprop_all(step, all))
    }

    fn adamw_all(&self, step: AdamwStep, all: &mut [Trained<'_, Vec<f32>>]) -> Result<()> {
        stepped_together(&self.0, all, |all| self.0.adamw_all(step, all))
    }
}

fn stepped_together<D: Device>(
    device: &D,
    all: &mut [Trained<'_, Vec<f32>>],
    step: impl FnOnce(&mut [Trained<'_, D::Buffer>]) -> Result<()>,
) -> Result<()> {
    let there = |buffers: &[Vec<f32>]| buffers.iter().map(|x| device.upload(x)).collect::<Result<Vec<_>>>();
    let gradients = all.iter().map(|t| device.upload(t.gradient)).collect::<Result<Vec<_>>>()?;
    let mut states = all.iter().map(|t| there(t.states)).collect::<Result<Vec<_>>>()?;
    let mut values = all.iter().map(|t| device.upload(t.value)).collect::<Result<Vec<_>>>()?;
    let parts = gradients.iter().zip(&mut states).zip(&mut values);
    let mut trained: Vec<Trained<'_, D::Buffer>> =
        parts.map(|((gradient, states), value)| Trained { gradient, states, value }).collect();
    step(&mut trained)?;
    for (here, (states, value)) in all.iter_mut().zip(states.iter().zip(&values)) {
        for (here, state) in here.states.iter_mut().zip(states) {
            *here = device.download(state)?;
        }
        *here.value = device.download(value)?;
    }
    Ok(())
}
