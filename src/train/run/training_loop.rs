//! The training loop: steps, evaluations and checkpoints.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::error::{Error, Result};
use crate::file::{JsonLog, base_name};
use crate::progress::Progress;

use crate::train::data::pack::Packed;
use crate::train::data::tokens::{self, TokenPair};
use crate::train::device::Device;
use crate::train::model::config::Config;
use crate::train::recipe::schedule::Schedule;
use crate::train::recipe::settings::Settings;
use crate::train::run::checkpoint::{self, Checkpoint, State};
use crate::train::run::files::RunFiles;
use crate::train::run::metrics::{EvaluationRecord, PairMeans, Record, StepRecord};
use crate::train::run::outcome::{Ending, Outcome};
use crate::train::run::reference::References;
use crate::train::run::trainer::Trainer;

/// Held-out pairs scored between two checks for an interrupt.
pub(super) const EVALUATION_PAIRS: usize = 16;

/// Trains from the start, or resumes the run in `files`.
///
/// Afterwards `trainer` holds the values with the lowest held-out loss, or the last values if no pair is held out.
///
/// # Errors
/// After any error the last checkpoint stays valid.
/// - [`Error::Interrupted`] after writing a checkpoint.
/// - [`Error::DeviceMemory`] if even the smallest passes do not fit, and [`Error::Device`]; both after trying to write
///   a checkpoint.
/// - [`Error::Training`] if a loss or gradient is not finite.
/// - [`Error::Io`] if a file cannot be written.
pub fn run<D: Device>(
    trainer: &mut Trainer<D>,
    pairs: &[TokenPair],
    settings: &Settings,
    files: &RunFiles,
    interrupt: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<(Outcome, Vec<Record>)> {
    check_lengths(&trainer.transformer.config, pairs)?;
    let (train, held_out) = tokens::split(pairs, settings.held_out, settings.seed);
    let n_steps = settings.n_steps(train.len());
    let resumed = Checkpoint::newest(files)?;
    let state = resumed.as_ref().map_or_else(State::default, |checkpoint| checkpoint.state.clone());
    let mut training = TrainingLoop::open(trainer, pairs, settings, files, state)?;
    if settings.frozen.is_some() {
        training.log_placement(progress)?;
    }
    // Before the checkpoint is loaded: the trainer still has the model's own weights.
    training.references_of_start(interrupt, progress)?;
    if let Some(checkpoint) = resumed {
        checkpoint.load(training.trainer, true)?;
    }
    progress.start("training", n_steps, training.state.step);
    let ending = training.steps(&train, &held_out, n_steps, interrupt, progress);
    progress.finish();
    let ending = ending?;
    training.restore_best()?;
    training.forget_previous_checkpoint()?;
    let TrainingLoop { records, state, .. } = training;
    let outcome = Outcome {
        ending,
        n_steps: state.step,
        n_train: train.len(),
        n_held_out: held_out.len(),
        held_out_indices: held_out.iter().map(|&i| pairs[i].index).collect(),
        best: state.best,
        seconds: state.seconds,
    };
    Ok((outcome, records))
}

/// Checks that the model has a position for every token, if it has a table of learned positions.
///
/// # Errors
/// [`Error::Setting`].
pub fn check_lengths(config: &Config, pairs: &[TokenPair]) -> Result<()> {
    // The last token of an answer is predicted but never read.
    let n_read = |pair: &TokenPair| pair.prompt.len() + pair.chosen.len().max(pair.rejected.len()) - 1;
    let longest = pairs.iter().map(n_read).max().unwrap_or(0);
    if config.learned_positions && longest > config.n_ctx_train {
        let reason = format!(
            "the longest pair has {longest} tokens, but this model has {} positions",
            config.n_ctx_train
        );
        return Err(Error::setting("--max-length", reason)
            .with_hint(format!("lower it to {} or less", config.n_ctx_train)));
    }
    Ok(())
}

/// Rows that a pair takes in a pass.
pub(super) fn n_rows(pair: &TokenPair) -> usize {
    Packed::n_rows_of(&pair.prompt, &pair.chosen, &pair.rejected)
}

/// Work that can run out of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// Forward passes only, which keep no activations.
    Score,
    /// Forward and backward passes.
    Train,
}

/// A run in progress.
pub(super) struct TrainingLoop<'a, D: Device> {
    pub(super) trainer: &'a mut Trainer<D>,
    pairs: &'a [TokenPair],
    /// Rows of the longest pair.
    pub(super) longest: usize,
    pub(super) settings: &'a Settings,
    files: &'a RunFiles,
    log: JsonLog,
    pub(super) records: Vec<Record>,
    pub(super) state: State,
    references: References,
}

impl<'a, D: Device> TrainingLoop<'a, D> {
    /// Opens the files of a run that has come as far as `state`, and reads its metrics.
    fn open(
        trainer: &'a mut Trainer<D>,
        pairs: &'a [TokenPair],
        settings: &'a Settings,
        files: &'a RunFiles,
        mut state: State,
    ) -> Result<Self> {
        let references = References::open(&files.references)?;
        // A damaged line can have swallowed the end of another, so that later lines count among the first ones.
        let is_done = |record: &Record| match record {
            Record::Step(record) => record.step <= state.step,
            Record::Evaluation(record) => record.step <= state.evaluated_at,
            Record::Placement(record) => record.step <= state.step,
        };
        let (log, records) = JsonLog::open_independent(&files.metrics, state.n_records, is_done)?;
        if records.len() < state.n_records {
            tracing::warn!(
                "{}: expected {} lines up to step {}, as the checkpoint says, found {}; the run continues, and its \
                 plots lack the rest",
                files.metrics.display(),
                state.n_records,
                state.step,
                records.len()
            );
            state.n_records = records.len();
        }
        let longest = pairs.iter().map(n_rows).max().unwrap_or(0);
        Ok(TrainingLoop { trainer, pairs, longest, settings, files, log, records, state, references })
    }

    /// Full training only: computes all reference log-probs before the first step, while the model still is the
    /// reference.
    fn references_of_start(&mut self, interrupt: &AtomicBool, progress: &mut dyn Progress) -> Result<()> {
        if self.trainer.has_reference() {
            return Ok(());
        }
        let all: Vec<&TokenPair> = self.pairs.iter().collect();
        progress.start("reference", all.len() as u64, 0);
        for part in all.chunks(EVALUATION_PAIRS) {
            if interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            self.within_memory(part, Work::Score, progress, |run| run.references.of(run.trainer, part))?;
            progress.advance(part.len() as u64);
        }
        progress.finish();
        Ok(())
    }

    /// Loads the values of the best evaluation into the trainer, if there was one.
    fn restore_best(&mut self) -> Result<()> {
        let Some((best_step, _)) = self.state.best else { return Ok(()) };
        if best_step == self.state.step {
            return Ok(());
        }
        let path = &self.files.best;
        if !path.exists() {
            let step = self.state.step;
            tracing::warn!(
                "{}: missing, so the result has the values of the last step, {step}, instead of step {best_step}",
                path.display()
            );
            self.state.best = None;
            return Ok(());
        }
        let best = Checkpoint::open(path).map_err(|error| {
            error.with_hint(format!(
                "delete {} and repeat the command to use the values of the last step, or delete {} to train from the \
                 first step again",
                base_name(path),
                base_name(&self.files.checkpoint)
            ))
        })?;
        best.load(self.trainer, false)?;
        // They differ if the process was killed between writing the two files, and the repeated steps gave another
        // result.
        if best.state.best != self.state.best {
            let step = best.state.step;
            tracing::warn!("the best checkpoint is from step {step}, written before the run was interrupted");
        }
        Ok(())
    }

    /// Removes the checkpoint before the last, which a finished run does not need.
    fn forget_previous_checkpoint(&self) -> Result<()> {
        let path = &self.files.previous_checkpoint;
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", path)(error))
            }
            _ => Ok(()),
        }
    }

    /// Steps and evaluates until the run ends.
    fn steps(
        &mut self,
        train: &[usize],
        held_out: &[usize],
        n_steps: u64,
        interrupt: &AtomicBool,
        progress: &mut dyn Progress,
    ) -> Result<Ending> {
        let schedule = self.settings.schedule(n_steps);
        let mut order = EpochOrder::default();
        loop {
            let step = self.state.step;
            if let Err(changed) = self.trainer.files.check_content() {
                self.save()?;
                return Err(changed);
            }
            let is_due = step.is_multiple_of(self.settings.eval_every) || step == n_steps;
            let mut stops = interrupt.load(Ordering::Relaxed);
            if step > self.state.evaluated_at && is_due && !stops {
                let evaluated = self.evaluate(held_out, interrupt, progress);
                stops = !self.save_if_the_device_failed(evaluated, progress)?;
                self.save()?;
            } else if stops {
                self.save()?;
            }
            if stops {
                progress.say(&saved_after(step));
                return Err(Error::Interrupted);
            }
            if step == n_steps {
                return Ok(Ending::Finished);
            }
            if self.state.n_worse >= self.settings.patience {
                return Ok(Ending::EarlyStopping);
            }
            let pairs = self.pairs;
            let batch: Vec<&TokenPair> =
                order.batch(step, train.len(), self.settings).map(|i| &pairs[train[i]]).collect();
            let stepped = self.step(&batch, &schedule, train.len(), progress);
            let record = self.save_if_the_device_failed(stepped, progress)?;
            self.state.seconds += record.step_seconds;
            progress.note(&note(&record));
            self.record(Record::Step(record))?;
            progress.advance(1);
        }
    }

    /// One optimizer step on `batch`, one of the steps over `n_train` pairs.
    fn step(
        &mut self,
        batch: &[&TokenPair],
        schedule: &Schedule,
        n_train: usize,
        progress: &mut dyn Progress,
    ) -> Result<StepRecord> {
        let started = Instant::now();
        let learning_rate = schedule.at(self.state.step);
        let max_grad_norm = self.settings.max_grad_norm;
        let references =
            self.within_memory(batch, Work::Score, progress, |run| run.references.of(run.trainer, batch))?;
        let (losses, grad_norm) = self.within_memory(batch, Work::Train, progress, |run| {
            let losses = run.trainer.add_gradient(batch, &references)?;
            Ok((losses, run.trainer.step(learning_rate, max_grad_norm)?))
        })?;
        self.state.step += 1;
        let per_epoch = self.settings.steps_per_epoch(n_train).max(1);
        Ok(StepRecord {
            step: self.state.step,
            epoch: self.state.step as f64 / per_epoch as f64,
            means: PairMeans::of(&losses),
            grad_norm,
            learning_rate,
            step_seconds: started.elapsed().as_secs_f64(),
            tokens: batch.iter().map(|pair| n_rows(pair) as u64).sum(),
            pairs: batch.len() as u64,
            pair_indices: batch.iter().map(|pair| pair.index).collect(),
        })
    }

    /// Scores the held-out pairs, and saves the trained values if no earlier evaluation was better.
    ///
    /// Returns false, with nothing changed, if it was interrupted.
    fn evaluate(
        &mut self,
        held_out: &[usize],
        interrupt: &AtomicBool,
        progress: &mut dyn Progress,
    ) -> Result<bool> {
        if held_out.is_empty() {
            self.state.evaluated_at = self.state.step;
            return Ok(true);
        }
        let started = Instant::now();
        let mut losses = Vec::with_capacity(held_out.len());
        for part in held_out.chunks(EVALUATION_PAIRS) {
            if interrupt.load(Ordering::Relaxed) {
                return Ok(false);
            }
            progress.note(&format!("held out: {} of {} pairs", losses.len(), held_out.len()));
            let part: Vec<&TokenPair> = part.iter().map(|&i| &self.pairs[i]).collect();
            losses.extend(self.within_memory(&part, Work::Score, progress, |run| {
                let references = run.references.of(run.trainer, &part)?;
                run.trainer.losses(&part, &references)
            })?);
        }
        let record = EvaluationRecord::new(self.state.step, PairMeans::of(&losses));
        let is_best = self.state.best.is_none_or(|(_, lowest)| record.eval_loss < lowest);
        let mut evaluated = State { evaluated_at: self.state.step, ..self.state.clone() };
        if is_best {
            (evaluated.best, evaluated.n_worse) = (Some((self.state.step, record.eval_loss)), 0);
            // Save before updating the state. If saving fails, the saved state must lead to another evaluation.
            checkpoint::save(&self.files.best, None, self.trainer, &evaluated, false)?;
        } else {
            evaluated.n_worse += 1;
        }
        self.record(Record::Evaluation(record))?;
        evaluated.n_records = self.state.n_records;
        evaluated.seconds += started.elapsed().as_secs_f64();
        self.state = evaluated;
        progress.say(&format!(
            "step {:>5}  held out: loss {:.4}  margin {:.3}  accuracy {:.0}%{}",
            record.step,
            record.eval_loss,
            record.rewards_margins,
            100.0 * record.rewards_accuracies,
            if is_best { "  best" } else { "" },
        ));
        Ok(true)
    }

    /// Appends a line to `metrics.jsonl`.
    pub(super) fn record(&mut self, record: Record) -> Result<()> {
        self.log.append(std::slice::from_ref(&record))?;
        self.records.push(record);
        self.state.n_records = self.records.len();
        Ok(())
    }

    /// Returns `result`. If the device failed before the optimizer step, first saves the progress, as far as the device
    /// still returns the trained values.
    fn save_if_the_device_failed<T>(&mut self, result: Result<T>, progress: &mut dyn Progress) -> Result<T> {
        let failed = matches!(result, Err(Error::DeviceMemory { .. } | Error::Device { .. }));
        if failed && !self.trainer.is_torn() {
            let step = self.state.step;
            match self.save() {
                Ok(()) => progress.say(&saved_after(step)),
                Err(error) => progress.say(&format!("could not save after step {step}: {error}")),
            }
        }
        result
    }

    fn save(&mut self) -> Result<()> {
        let RunFiles { checkpoint, previous_checkpoint, .. } = self.files;
        // A checkpoint of all weights is several times the size of the model: one must do.
        let previous = self.trainer.has_reference().then_some(previous_checkpoint.as_path());
        checkpoint::save(checkpoint, previous, self.trainer, &self.state, true)
    }
}

/// The order of the training pairs in one epoch, shuffled from the seed.
#[derive(Debug, Default)]
struct EpochOrder {
    /// The epoch, and its order; `None` before the first step.
    current: Option<(u64, Vec<usize>)>,
}

impl EpochOrder {
    /// Indices of the training pairs of step `step`, counted from 0.
    fn batch(&mut self, step: u64, n_train: usize, settings: &Settings) -> impl Iterator<Item = usize> {
        let per_epoch = settings.steps_per_epoch(n_train).max(1);
        let (epoch, in_epoch) = (step / per_epoch, (step % per_epoch) as usize);
        let order = match self.current.take() {
            Some((of, order)) if of == epoch => order,
            _ => tokens::epoch_order(n_train, settings.seed, epoch as u32),
        };
        let first = in_epoch * settings.batch_size;
        let last = (first + settings.batch_size).min(n_train);
        let batch = order[first..last].to_vec();
        self.current = Some((epoch, order));
        batch.into_iter()
    }
}

fn saved_after(step: u64) -> String {
    format!("saved after step {step}; run the same command again to resume")
}

/// A step in at most 78 columns.
fn note(record: &StepRecord) -> String {
    let means = &record.means;
    format!(
        "loss {:.4}  rewards {:+.2} {:+.2}  margin {:.2}  acc {:.2}\n\
         logps {:.0} {:.0}  grad {:.2}  lr {:.1e}  {:.0} tok/s",
        means.loss,
        means.rewards_chosen,
        means.rewards_rejected,
        means.rewards_margins,
        means.rewards_accuracies,
        means.logps_chosen,
        means.logps_rejected,
        record.grad_norm,
        record.learning_rate,
        record.tokens as f64 / record.step_seconds.max(1e-9),
    )
}
