//! Steps of training: a model, what is trained of it, and the optimizer.

use crate::error::{Error, Result};
use crate::gguf::GgufFile;

use crate::train::data::pack::Packed;
use crate::train::data::tokens::TokenPair;
use crate::train::device::Device;
use crate::train::model::forward::{Batch, Purpose};
use crate::train::model::linear::Pass;
use crate::train::model::parameters::{ParameterId, Parameters};
use crate::train::model::transformer::{Method, Transformer};
use crate::train::recipe::dpo::{AnswerLogps, PairLoss, Preference};
use crate::train::run::optimizer::{Optimizer, OptimizerKind};

/// How steps are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOptions {
    /// The loss.
    pub preference: Preference,
    /// Which optimizer.
    pub optimizer: OptimizerKind,
    /// AdamW's.
    pub weight_decay: f32,
    /// Most rows in one pass; a pair that has more is a pass of its own.
    pub max_rows: usize,
    /// Keep each block's input alone, and make the rest again in the backward pass.
    pub checkpointing: bool,
}

/// Which model a pass goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The model as it is trained.
    Policy,
    /// The model as it was: low-rank changes and directions left out.
    Reference,
}

/// A model in training.
#[derive(Debug)]
pub struct Trainer<D: Device> {
    device: D,
    /// The weights.
    pub transformer: Transformer<D>,
    /// What is trained.
    pub parameters: Parameters<D>,
    /// How it is stepped.
    pub optimizer: Optimizer<D>,
    options: StepOptions,
    adapter_scale: f32,
    has_reference: bool,
    may_checkpoint: bool,
    is_torn: bool,
}

impl<D: Device> Trainer<D> {
    /// Loads `file` to `device` to be trained by `method`.
    ///
    /// # Errors
    /// As [`Transformer::load`].
    pub fn load(
        device: D,
        file: &GgufFile,
        method: &Method,
        seed: u64,
        options: StepOptions,
    ) -> Result<Trainer<D>> {
        let (transformer, parameters) = Transformer::load(&device, file, method, seed)?;
        let optimizer = Optimizer::new(&device, options.optimizer, options.weight_decay, &parameters)?;
        let adapter_scale = match method {
            Method::Lora(lora) => lora.scale(),
            Method::Full | Method::Vector => 1.0,
        };
        let has_reference = *method != Method::Full;
        Ok(Trainer {
            device,
            transformer,
            parameters,
            optimizer,
            options,
            adapter_scale,
            has_reference,
            may_checkpoint: true,
            is_torn: false,
        })
    }

    /// Overwrites the numbers of a parameter.
    ///
    /// # Errors
    /// Of the device.
    pub fn write_value(&mut self, parameter: ParameterId, values: &[f32]) -> Result<()> {
        self.device.write(values, &mut self.parameters.values[parameter])
    }

    /// Overwrites a state of the optimizer.
    ///
    /// # Errors
    /// Of the device.
    pub fn write_state(&mut self, parameter: ParameterId, state: usize, values: &[f32]) -> Result<()> {
        self.device.write(values, &mut self.optimizer.states[parameter][state])
    }

    /// Whether activations are made again in the backward pass, which changes no number.
    pub fn set_checkpointing(&mut self, checkpointing: bool) {
        self.options.checkpointing = checkpointing;
    }

    /// Never makes activations again, also where memory runs out: the user has said so.
    pub fn keep_activations(&mut self) {
        (self.options.checkpointing, self.may_checkpoint) = (false, false);
    }

    /// How steps are made now.
    pub fn options(&self) -> &StepOptions {
        &self.options
    }

    /// Whether a step of the optimizer failed: some of the trained numbers may have changed, and not all, or all with their
    /// gradients still there.
    pub fn is_torn(&self) -> bool {
        self.is_torn
    }

    /// After memory ran out in passes over `n_rows` rows: passes have half as many from now on, down to `longest`, those of
    /// the longest pair, which cannot be divided. False where they have no more already.
    pub fn halve_passes(&mut self, n_rows: usize, longest: usize) -> bool {
        let taken = self.options.max_rows.min(n_rows);
        let is_divisible = taken > longest;
        if is_divisible {
            self.options.max_rows = (taken / 2).max(longest);
        }
        is_divisible
    }

    /// After memory ran out in a backward pass: activations are made again from now on. False where they are already, or
    /// may not be.
    pub fn start_checkpointing(&mut self) -> bool {
        let starts = self.may_checkpoint && !self.options.checkpointing;
        self.options.checkpointing |= starts;
        starts
    }

    /// Forgets what a pass that failed has left.
    ///
    /// # Errors
    /// Of the device.
    pub fn forget_pass(&mut self) -> Result<()> {
        self.parameters.clear_gradients(&self.device)?;
        self.device.trim()
    }

    /// Where and how it runs.
    pub fn describe(&self) -> String {
        self.device.describe()
    }

    /// Where it runs.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Whether [`Side::Reference`] can be had at any time; else only before the first step, as the policy.
    pub fn has_reference(&self) -> bool {
        self.has_reference
    }

    /// A pass through one side of the model.
    pub fn pass(&self, side: Side) -> Pass<'_, D> {
        let adapter_scale = match side {
            Side::Policy => Some(self.adapter_scale),
            Side::Reference => None,
        };
        Pass { device: &self.device, values: &self.parameters.values, adapter_scale }
    }

    /// Pairs in passes of at most so many rows, in their order.
    fn passes<'a>(&self, pairs: &'a [&'a TokenPair]) -> Vec<&'a [&'a TokenPair]> {
        let mut passes = Vec::new();
        let (mut first, mut n_rows) = (0, 0);
        for (i, pair) in pairs.iter().enumerate() {
            let n = Packed::n_rows_of(&pair.prompt, &pair.chosen, &pair.rejected);
            if i > first && n_rows + n > self.options.max_rows {
                passes.push(&pairs[first..i]);
                (first, n_rows) = (i, 0);
            }
            n_rows += n;
        }
        if first < pairs.len() {
            passes.push(&pairs[first..]);
        }
        passes
    }

    fn batch(&self, pairs: &[&TokenPair]) -> Result<Batch<D>> {
        let mut packed = Packed::default();
        pairs.iter().for_each(|pair| packed.push(&pair.prompt, &pair.chosen, &pair.rejected));
        Batch::new(&self.device, packed)
    }

    /// Log-probabilities of each pair's answers, `[pairs]`.
    ///
    /// # Errors
    /// [`Error::Training`] for numbers that are not finite; of the device.
    pub fn logps(&self, side: Side, pairs: &[&TokenPair]) -> Result<Vec<AnswerLogps>> {
        let mut logps = Vec::with_capacity(pairs.len());
        for pairs in self.passes(pairs) {
            let batch = self.batch(pairs)?;
            let forward = || self.transformer.forward(&self.pass(side), &batch, Purpose::Score);
            let (of_outputs, _) = self.device.scope(forward)?;
            logps.extend(by_pair(&batch.packed, &self.device.download(&of_outputs)?)?);
        }
        Ok(logps)
    }

    /// What pairs cost, `[pairs]`, without a gradient.
    ///
    /// # Errors
    /// As [`Trainer::logps`].
    pub fn losses(
        &self,
        pairs: &[&TokenPair],
        references: &[AnswerLogps],
    ) -> Result<Vec<(AnswerLogps, PairLoss)>> {
        let policy = self.logps(Side::Policy, pairs)?;
        let cost = |((pair, policy), reference): ((&&TokenPair, AnswerLogps), &AnswerLogps)| {
            let (n_chosen, n_rejected) = (pair.chosen.len(), pair.rejected.len());
            (policy, self.options.preference.of_pair(policy, *reference, n_chosen, n_rejected))
        };
        Ok(pairs.iter().zip(policy).zip(references).map(cost).collect())
    }

    /// Adds the gradient of the mean loss of `pairs` to the parameters' gradients; gives each pair's
    /// log-probabilities and loss, `[pairs]`.
    ///
    /// # Errors
    /// As [`Trainer::logps`].
    pub fn add_gradient(
        &mut self,
        pairs: &[&TokenPair],
        references: &[AnswerLogps],
    ) -> Result<Vec<(AnswerLogps, PairLoss)>> {
        let mut all = Vec::with_capacity(pairs.len());
        let purpose = Purpose::Train { checkpointing: self.options.checkpointing };
        for part in self.passes(pairs) {
            let batch = self.batch(part)?;
            let forward = || self.transformer.forward(&self.pass(Side::Policy), &batch, purpose);
            let (of_outputs, cache) = self.device.scope(forward)?;
            let (device, rows) = (&self.device, &batch.rows);
            let of_part = &references[all.len()..all.len() + part.len()];
            let mut dlogps = device.space(batch.packed.outputs.len())?;
            // The mean is over all pairs of the step, not over those of this pass.
            let (preference, n) = (self.options.preference, pairs.len());
            let costs = device.preference_loss(preference, rows, of_part, n, &of_outputs, &mut dlogps)?;
            if !costs.iter().all(|(policy, _)| policy.chosen.is_finite() && policy.rejected.is_finite()) {
                // A sum of finite numbers is finite, so that this finds the one that is not.
                by_pair(&batch.packed, &device.download(&of_outputs)?)?;
            }
            let cache = cache.expect("a pass for training keeps what the backward pass needs");
            let pass = Pass {
                device: &self.device,
                values: &self.parameters.values,
                adapter_scale: Some(self.adapter_scale),
            };
            let (transformer, gradients) = (&self.transformer, &mut self.parameters.gradients);
            self.device.scope(|| transformer.backward(&pass, gradients, &batch, cache, &dlogps))?;
            all.extend(costs);
        }
        Ok(all)
    }

    /// One step of the optimizer against the gradients, which are cut to `max_gradient_norm` together and
    /// forgotten; gives their norm as it was.
    ///
    /// # Errors
    /// [`Error::Training`] where the norm is not finite: then nothing is stepped. Of the device.
    pub fn step(&mut self, learning_rate: f64, max_gradient_norm: f64) -> Result<f64> {
        let norm = self.parameters.gradient_norm(&self.device)?;
        if !norm.is_finite() {
            self.parameters.clear_gradients(&self.device)?;
            return Err(Error::Training { reason: format!("the gradient's norm is {norm}") });
        }
        // PyTorch's `clip_grad_norm_`, with its 1e-6.
        let scale = (max_gradient_norm / (norm + 1e-6)).min(1.0);
        self.is_torn = true;
        self.optimizer.step(&self.device, &mut self.parameters, learning_rate, scale)?;
        // Before that, the same gradients could be stepped once more.
        self.parameters.clear_gradients(&self.device)?;
        self.is_torn = false;
        Ok(norm)
    }
}

fn by_pair(packed: &Packed, of_outputs: &[f32]) -> Result<Vec<AnswerLogps>> {
    if let Some(at) = of_outputs.iter().position(|x| !x.is_finite()) {
        let reason =
            format!("the log-probability of token {} is {}", packed.outputs[at].token, of_outputs[at]);
        return Err(Error::Training { reason });
    }
    let sums = packed.sum_by_answer(of_outputs);
    Ok(sums.chunks_exact(2).map(|pair| AnswerLogps { chosen: pair[0], rejected: pair[1] }).collect())
}
