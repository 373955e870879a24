//! One training step: a model, its trained parameters, and the optimizer.

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, ModelFiles};

use crate::train::data::pack::Packed;
use crate::train::data::tokens::TokenPair;
use crate::train::device::Device;
use crate::train::model::forward::{Batch, Purpose};
use crate::train::model::parameters::{ParameterId, Parameters};
use crate::train::model::pass::{Adapters, Pass};
use crate::train::model::transformer::Transformer;
use crate::train::recipe::dpo::{AnswerLogps, PairLoss};
use crate::train::recipe::method::Method;
use crate::train::recipe::step::StepOptions;
use crate::train::run::optimizer::Optimizer;

/// Which of the two models a pass computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The model being trained.
    Policy,
    /// The frozen start: the model without its adapter or directions.
    Reference,
}

/// A model in training.
#[derive(Debug)]
pub struct Trainer<D: Device> {
    device: D,
    /// The model's weights.
    pub transformer: Transformer<D>,
    /// The trained parameters.
    pub parameters: Parameters<D>,
    /// The optimizer.
    pub optimizer: Optimizer<D>,
    options: StepOptions,
    lora_scale: f32,
    has_reference: bool,
    may_checkpoint: bool,
    is_torn: bool,
    /// The files that the weights come from.
    pub files: ModelFiles,
}

impl<D: Device> Trainer<D> {
    /// Loads `file` to `device` for training with `method`.
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
        let lora_scale = match method {
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
            lora_scale,
            has_reference,
            may_checkpoint: true,
            is_torn: false,
            files: file.files(),
        })
    }

    /// Overwrites the values of a parameter.
    ///
    /// # Errors
    /// Those of the device.
    pub fn write_value(&mut self, parameter: ParameterId, values: &[f32]) -> Result<()> {
        self.device.write(values, &mut self.parameters.values[parameter])
    }

    /// Overwrites an optimizer state.
    ///
    /// # Errors
    /// Those of the device.
    pub fn write_state(&mut self, parameter: ParameterId, state: usize, values: &[f32]) -> Result<()> {
        self.device.write(values, &mut self.optimizer.states[parameter][state])
    }

    /// Turns gradient checkpointing on or off. It does not change any result.
    pub fn set_checkpointing(&mut self, checkpointing: bool) {
        self.options.checkpointing = checkpointing;
    }

    /// Turns gradient checkpointing off for good, even if memory runs out.
    pub fn keep_activations(&mut self) {
        (self.options.checkpointing, self.may_checkpoint) = (false, false);
    }

    /// The current step options.
    pub fn options(&self) -> &StepOptions {
        &self.options
    }

    /// Whether an optimizer step failed half-way. Then only some of the trained values may be updated, or all of them
    /// with their gradients not yet cleared.
    pub fn is_torn(&self) -> bool {
        self.is_torn
    }

    /// Halves the pass size after memory ran out in passes over `n_rows` rows.
    ///
    /// Passes keep at least `longest` rows, because the longest pair cannot be split. Returns false if they are that
    /// small already.
    pub fn halve_passes(&mut self, n_rows: usize, longest: usize) -> bool {
        let taken = self.options.max_rows.min(n_rows);
        let can_shrink = taken > longest;
        if can_shrink {
            self.options.max_rows = (taken / 2).max(longest);
        }
        can_shrink
    }

    /// Turns gradient checkpointing on after memory ran out in a backward pass. Returns false if it is on already or
    /// not allowed.
    pub fn start_checkpointing(&mut self) -> bool {
        let starts = self.may_checkpoint && !self.options.checkpointing;
        self.options.checkpointing |= starts;
        starts
    }

    /// Clears the gradients and cached memory that a failed pass left.
    ///
    /// # Errors
    /// Those of the device.
    pub fn forget_pass(&mut self) -> Result<()> {
        self.parameters.clear_gradients(&self.device)?;
        self.device.trim()
    }

    /// The device and its precision, for reports.
    pub fn describe(&self) -> String {
        self.device.describe()
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Whether [`Side::Reference`] is available during training. If every weight is trained, the reference is the
    /// policy before its first step.
    pub fn has_reference(&self) -> bool {
        self.has_reference
    }

    /// A pass through the policy or the reference.
    pub fn pass(&self, side: Side) -> Pass<'_, D> {
        let adapters = match side {
            Side::Policy => Adapters::On { lora_scale: self.lora_scale },
            Side::Reference => Adapters::Off,
        };
        Pass { device: &self.device, values: &self.parameters.values, adapters }
    }

    /// Splits `pairs`, in order, into passes of at most `max_rows` rows.
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

    /// Log-probs of each pair's answers, `[n_pairs]`.
    ///
    /// # Errors
    /// [`Error::Training`] if a log-prob is not finite; also those of the device.
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

    /// Policy log-probs and loss of each pair, `[n_pairs]`, without gradients.
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

    /// Adds the gradient of the mean loss over `pairs` to the parameters' gradients.
    ///
    /// Returns each pair's policy log-probs and loss, `[n_pairs]`. Pairs that exceed the pass size together are split,
    /// and their gradients accumulate.
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
            // The mean is over all pairs of the step, not only those of this pass.
            let (preference, n) = (self.options.preference, pairs.len());
            let costs = device.preference_loss(preference, rows, of_part, n, &of_outputs, &mut dlogps)?;
            if !costs.iter().all(|(policy, _)| policy.chosen.is_finite() && policy.rejected.is_finite()) {
                // A sum that is not finite has a term that is not finite: return the error that names its token.
                by_pair(&batch.packed, &device.download(&of_outputs)?)?;
            }
            let cache = cache.expect("a pass for training keeps what the backward pass needs");
            let pass = Pass {
                device: &self.device,
                values: &self.parameters.values,
                adapters: Adapters::On { lora_scale: self.lora_scale },
            };
            let (transformer, gradients) = (&self.transformer, &mut self.parameters.gradients);
            self.device.scope(|| transformer.backward(&pass, gradients, &batch, cache, &dlogps))?;
            all.extend(costs);
        }
        Ok(all)
    }

    /// Clips the gradients to a total norm of `max_gradient_norm`, updates the parameters, and clears the gradients.
    ///
    /// Returns the norm before clipping.
    ///
    /// # Errors
    /// [`Error::Training`] if the norm is not finite, before any update; also those of the device.
    pub fn step(&mut self, learning_rate: f64, max_gradient_norm: f64) -> Result<f64> {
        let norm = self.parameters.gradient_norm(&self.device)?;
        if !norm.is_finite() {
            self.parameters.clear_gradients(&self.device)?;
            return Err(Error::Training { reason: format!("the gradient norm is {norm}") });
        }
        // As PyTorch's `clip_grad_norm_`, including its 1e-6.
        let scale = (max_gradient_norm / (norm + 1e-6)).min(1.0);
        self.is_torn = true;
        self.optimizer.step(&self.device, &mut self.parameters, learning_rate, scale)?;
        // Until the gradients are cleared, a retry would apply them twice.
        self.parameters.clear_gradients(&self.device)?;
        self.is_torn = false;
        Ok(norm)
    }
}

/// Sums the log-probs of the output tokens into those of each pair's answers.
fn by_pair(packed: &Packed, of_outputs: &[f32]) -> Result<Vec<AnswerLogps>> {
    if let Some(at) = of_outputs.iter().position(|x| !x.is_finite()) {
        let reason =
            format!("the log-probability of token {} is {}", packed.outputs[at].token, of_outputs[at]);
        return Err(Error::Training { reason });
    }
    let sums = packed.sum_by_answer(of_outputs);
    Ok(sums.chunks_exact(2).map(|pair| AnswerLogps { chosen: pair[0], rejected: pair[1] }).collect())
}
