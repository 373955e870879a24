//! A run of training: steps, looks at the held-out pairs, checkpoints, and the end.
//!
//! A run that was broken off goes on from its last checkpoint, and ends with the same numbers as an unbroken one:
//! the order of pairs is drawn from the seed, references are kept on disk, and lines of `metrics.jsonl` beyond the
//! checkpoint are cut off. Where memory runs out, it goes on with less of it at a time.

pub mod checkpoint;
pub mod metrics;
pub mod optimizer;
pub mod placement;
pub mod reference;
pub mod trainer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::file::JsonLog;
use crate::progress::Progress;

use super::device::Device;
use crate::train::data::pack::Packed;
use crate::train::data::tokens::{self, TokenPair};
use crate::train::device::name::Frozen;
use crate::train::model::config::Config;
use crate::train::recipe::method::MethodName;
use crate::train::recipe::settings::Settings;
use crate::train::run::metrics::{EvaluationRecord, PairMeans, PlacementRecord, Record, StepRecord};
use crate::train::run::reference::References;
use crate::train::run::trainer::Trainer;
use checkpoint::State;

/// Held-out pairs that are scored between two looks at whether the user wants to stop.
const EVALUATION_PAIRS: usize = 16;

/// Files in a run's folder.
#[derive(Debug, Clone)]
pub struct RunFiles {
    /// A line for each step and each look at the held-out pairs.
    pub metrics: PathBuf,
    /// Log-probabilities under the model as it was.
    pub references: PathBuf,
    /// Where the run goes on.
    pub checkpoint: PathBuf,
    /// The trained numbers that did best.
    pub best: PathBuf,
}

impl RunFiles {
    /// Those of `folder`.
    pub fn of(folder: &Path) -> RunFiles {
        RunFiles {
            metrics: folder.join("metrics.jsonl"),
            references: folder.join("reference.jsonl"),
            checkpoint: folder.join("checkpoint.gguf"),
            best: folder.join("best.gguf"),
        }
    }
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// All steps were made.
    Finished,
    /// The held-out loss stopped falling.
    EarlyStopping,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Why it ended.
    pub ending: Ending,
    /// Steps that were made.
    pub n_steps: u64,
    /// Pairs that were trained on.
    pub n_train: usize,
    /// Pairs that were held out.
    pub n_held_out: usize,
    /// The step whose numbers were kept, and the held-out loss there; none without held-out pairs.
    pub best: Option<(u64, f64)>,
    /// Wall-clock time of all steps and looks.
    pub seconds: f64,
}

/// Trains, or goes on; afterwards `trainer` holds the numbers that did best on the held-out pairs, or without
/// such pairs the last ones.
///
/// # Errors
/// [`Error::Interrupted`] after a checkpoint was written; [`Error::DeviceMemory`] where the least that a step takes does
/// not suffice, and [`Error::Device`], after one was tried; [`Error::Training`] where numbers are not finite any more;
/// [`Error::Io`] where a file cannot be written: what the last checkpoint holds stays.
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
    let references = References::open(&files.references)?;
    let state = match files.checkpoint.exists() {
        true => checkpoint::load(&files.checkpoint, trainer, true)?,
        false => State { step: 0, n_records: 0, looked_at: 0, best: None, n_worse: 0, seconds: 0.0 },
    };
    let (log, records) = JsonLog::open::<Record>(&files.metrics, std::iter::repeat_n(1, state.n_records))?;
    if records.len() < state.n_records {
        return Err(Error::run_folder(
            &files.metrics,
            format!("expected the {} lines of its checkpoint, found {}", state.n_records, records.len()),
        )
        .with_hint("choose another -o, or delete the folder to begin again"));
    }
    let longest = pairs.iter().map(n_rows).max().unwrap_or(0);
    let mut run = Run { trainer, pairs, longest, settings, files, log, records, state, references };
    if settings.frozen.is_some() {
        run.tell_placement(progress)?;
    }
    run.references_of_start(interrupt, progress)?;
    progress.start("training", n_steps, run.state.step);
    let ending = run.steps(&train, &held_out, n_steps, interrupt, progress);
    progress.finish();
    let ending = ending?;
    let Run { trainer, records, state, .. } = run;
    if state.best.is_some() {
        let kept = checkpoint::load(&files.best, trainer, false)?;
        // Where a process died between writing the two, and what was then computed again came out otherwise.
        if kept.best != state.best {
            progress.say(&format!(
                "the numbers kept as the best are of step {}, of before the run was broken off",
                kept.step
            ));
        }
    }
    let outcome = Outcome {
        ending,
        n_steps: state.step,
        n_train: train.len(),
        n_held_out: held_out.len(),
        best: state.best,
        seconds: state.seconds,
    };
    Ok((outcome, records))
}

/// Whether the model has a position for every token: a table of positions has an end.
///
/// # Errors
/// [`Error::Setting`].
pub fn check_lengths(config: &Config, pairs: &[TokenPair]) -> Result<()> {
    // The last token of an answer is predicted and never read.
    let n_read = |pair: &TokenPair| pair.prompt.len() + pair.chosen.len().max(pair.rejected.len()) - 1;
    let longest = pairs.iter().map(n_read).max().unwrap_or(0);
    if config.learned_positions && longest > config.n_ctx_train {
        let reason =
            format!("a pair has {longest} tokens to read, and this model {} positions", config.n_ctx_train);
        let hint = Some(format!("lower it to {} or less", config.n_ctx_train));
        return Err(Error::Setting { setting: "--max-length".into(), reason, hint });
    }
    Ok(())
}

/// Rows that a pair takes.
fn n_rows(pair: &TokenPair) -> usize {
    Packed::n_rows_of(&pair.prompt, &pair.chosen, &pair.rejected)
}

/// What memory may run out in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Forward passes alone, which keep nothing that could be made again.
    Score,
    /// Backward passes too.
    Train,
}

struct Run<'a, D: Device> {
    trainer: &'a mut Trainer<D>,
    pairs: &'a [TokenPair],
    /// Rows of the longest pair.
    longest: usize,
    settings: &'a Settings,
    files: &'a RunFiles,
    log: JsonLog,
    records: Vec<Record>,
    state: State,
    references: References,
}

impl<D: Device> Run<'_, D> {
    /// Writes down with what this session begins, and says so where the one before had chosen otherwise.
    fn tell_placement(&mut self, progress: &mut dyn Progress) -> Result<()> {
        let now = self.placement(false);
        let of_placement = |record: &Record| match record {
            Record::Placement(placement) => Some(*placement),
            _ => None,
        };
        match self.records.iter().rev().find_map(of_placement) {
            Some(before) if before.choice() == now.choice() => return Ok(()),
            Some(before) => {
                let on = |of: &PlacementRecord| match before.device == now.device {
                    true => String::new(),
                    false => format!(" on {}", of.device),
                };
                progress.say(&format!(
                    "the run goes on with {}{}, and not with {}{}: numbers change by their rounding alone",
                    now.in_words(),
                    on(&now),
                    before.in_words(),
                    on(&before)
                ));
            }
            None => {}
        }
        self.record(Record::Placement(now))
    }

    fn placement(&self, out_of_memory: bool) -> PlacementRecord {
        let options = self.trainer.options();
        PlacementRecord {
            step: self.state.step,
            device: self.settings.device,
            max_rows: options.max_rows,
            checkpointing: options.checkpointing,
            frozen: self.settings.frozen,
            out_of_memory,
        }
    }

    /// For a model that is trained itself: before its first step is the only time at which it is the model as it was.
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
            self.within_memory(part, Work::Score, progress, |run| {
                run.references.of_start(run.trainer, part, run.state.step)
            })?;
            progress.advance(part.len() as u64);
        }
        progress.finish();
        Ok(())
    }

    /// Does `work` over `pairs`, and where memory runs out does it again with less of it, as long as there is less.
    fn within_memory<T>(
        &mut self,
        pairs: &[&TokenPair],
        kind: Work,
        progress: &mut dyn Progress,
        mut work: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let n_rows = pairs.iter().map(|pair| n_rows(pair)).sum();
        loop {
            let (device, reason) = match work(self) {
                // Half a step cannot be made again.
                Err(Error::DeviceMemory { device, reason, .. }) if !self.trainer.is_torn() => {
                    (device, reason)
                }
                result => return result,
            };
            if !self.shrink(kind, n_rows) {
                return Err(Error::device_memory(device, reason).with_hint(self.cures(kind)));
            }
            self.trainer.forget_pass()?;
            let smaller = self.placement(true);
            let (step, in_words) = (smaller.step, smaller.in_words());
            progress.say(&format!("after step {step}: {reason}; the run goes on with {in_words}"));
            self.record(Record::Placement(smaller))?;
        }
    }

    /// Takes less memory from now on; false where nothing smaller is left. On the CPU, passes stay as they are: their
    /// rows decide the last bits there.
    fn shrink(&mut self, kind: Work, n_rows: usize) -> bool {
        let is_gpu = !self.settings.device.is_cpu();
        (is_gpu && self.trainer.halve_passes(n_rows, self.longest))
            || (kind == Work::Train && self.trainer.start_checkpointing())
    }

    /// What helps where nothing smaller is left: what the run may go on with, and what would make another run of it.
    fn cures(&self, kind: Work) -> String {
        let (is_cpu, options) = (self.settings.device.is_cpu(), self.trainer.options());
        let mut goes_on = Vec::new();
        let method = self.settings.method;
        if method != MethodName::Full && self.settings.frozen == Some(Frozen::Bf16) {
            goes_on.push("--frozen quantised");
        }
        if kind == Work::Train && !options.checkpointing {
            goes_on.push("--checkpointing on");
        }
        let memory = match is_cpu {
            true => "free memory",
            false => "free the card's memory (nvidia-smi names the processes that hold it)",
        };
        let goes_on = match goes_on.is_empty() {
            true => String::new(),
            false => format!(", or go on with {}", goes_on.join(" and ")),
        };
        let fewer_rows = if is_cpu && options.max_rows > self.longest { "--ubatch-size, " } else { "" };
        let rank = if method == MethodName::Lora { " or --rank" } else { "" };
        format!(
            "{memory}{goes_on}; or begin anew, in another -o, with a smaller {fewer_rows}--max-length{rank}"
        )
    }

    fn steps(
        &mut self,
        train: &[usize],
        held_out: &[usize],
        n_steps: u64,
        interrupt: &AtomicBool,
        progress: &mut dyn Progress,
    ) -> Result<Ending> {
        let schedule = self.settings.schedule(n_steps);
        let per_epoch = self.settings.steps_per_epoch(train.len()).max(1);
        let mut order: (u64, Vec<usize>) = (u64::MAX, Vec::new());
        loop {
            let is_due =
                self.state.step.is_multiple_of(self.settings.eval_every) || self.state.step == n_steps;
            let mut stops = interrupt.load(Ordering::Relaxed);
            if self.state.step > self.state.looked_at && is_due && !stops {
                let looked = self.look(held_out, interrupt, progress);
                stops = !self.saved_if_the_device_failed(looked, progress)?;
                self.save()?;
            } else if stops {
                self.save()?;
            }
            if stops {
                let step = self.state.step;
                progress.say(&format!("saved after step {step}: the same command goes on from there"));
                return Err(Error::Interrupted);
            }
            if self.state.step == n_steps {
                return Ok(Ending::Finished);
            }
            if self.state.n_worse >= self.settings.patience {
                return Ok(Ending::EarlyStopping);
            }
            let started = Instant::now();
            let (epoch, in_epoch) = (self.state.step / per_epoch, (self.state.step % per_epoch) as usize);
            if order.0 != epoch {
                order = (epoch, tokens::epoch_order(train.len(), self.settings.seed, epoch as u32));
            }
            let first = in_epoch * self.settings.batch_size;
            let last = (first + self.settings.batch_size).min(train.len());
            let batch: Vec<&TokenPair> =
                order.1[first..last].iter().map(|&i| &self.pairs[train[i]]).collect();
            let stepped = self.step(&batch, schedule.at(self.state.step), per_epoch, started, progress);
            let record = self.saved_if_the_device_failed(stepped, progress)?;
            self.state.seconds += record.step_seconds;
            self.record(Record::Step(record))?;
            progress.note(&note(&record));
            progress.advance(1);
        }
    }

    fn step(
        &mut self,
        batch: &[&TokenPair],
        learning_rate: f64,
        per_epoch: u64,
        started: Instant,
        progress: &mut dyn Progress,
    ) -> Result<StepRecord> {
        let max_grad_norm = self.settings.max_grad_norm;
        let references =
            self.within_memory(batch, Work::Score, progress, |run| run.references.of(run.trainer, batch))?;
        let (losses, grad_norm) = self.within_memory(batch, Work::Train, progress, |run| {
            let losses = run.trainer.add_gradient(batch, &references)?;
            Ok((losses, run.trainer.step(learning_rate, max_grad_norm)?))
        })?;
        self.state.step += 1;
        Ok(StepRecord {
            step: self.state.step,
            epoch: self.state.step as f64 / per_epoch as f64,
            means: PairMeans::of(&losses),
            grad_norm,
            learning_rate,
            step_seconds: started.elapsed().as_secs_f64(),
            tokens: batch.iter().map(|pair| n_rows(pair) as u64).sum(),
            pairs: batch.len() as u64,
        })
    }

    /// Scores the held-out pairs, and keeps the trained numbers where none were better; false where the user
    /// wants to stop before it is done, and nothing has changed.
    fn look(
        &mut self,
        held_out: &[usize],
        interrupt: &AtomicBool,
        progress: &mut dyn Progress,
    ) -> Result<bool> {
        if held_out.is_empty() {
            self.state.looked_at = self.state.step;
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
        let is_better = self.state.best.is_none_or(|(_, least)| record.eval_loss < least);
        let mut looked = State { looked_at: self.state.step, ..self.state.clone() };
        if is_better {
            (looked.best, looked.n_worse) = (Some((self.state.step, record.eval_loss)), 0);
            // Before the state says so: where this fails, the state is saved, and must lead to another look.
            checkpoint::save(&self.files.best, self.trainer, &looked, false)?;
        } else {
            looked.n_worse += 1;
        }
        self.record(Record::Evaluation(record))?;
        looked.n_records = self.state.n_records;
        looked.seconds += started.elapsed().as_secs_f64();
        self.state = looked;
        progress.say(&format!(
            "step {:>5}  held out: loss {:.4}  margin {:.3}  accuracy {:.0}%{}",
            record.step,
            record.eval_loss,
            record.rewards_margins,
            100.0 * record.rewards_accuracies,
            if is_better { "  best" } else { "" },
        ));
        Ok(true)
    }

    fn record(&mut self, record: Record) -> Result<()> {
        self.log.append(&[record])?;
        self.records.push(record);
        self.state.n_records = self.records.len();
        Ok(())
    }

    /// Where a device failed before anything was stepped, what was trained so far is kept first, if the device still gives
    /// it; the error stays the first one.
    fn saved_if_the_device_failed<T>(&mut self, result: Result<T>, progress: &mut dyn Progress) -> Result<T> {
        let failed = matches!(result, Err(Error::DeviceMemory { .. } | Error::Device { .. }));
        if failed && !self.trainer.is_torn() {
            let step = self.state.step;
            match self.save() {
                Ok(()) => {
                    progress.say(&format!("saved after step {step}: the same command goes on from there"));
                }
                Err(error) => progress.say(&format!("step {step} could not be saved: {error}")),
            }
        }
        result
    }

    fn save(&mut self) -> Result<()> {
        checkpoint::save(&self.files.checkpoint, self.trainer, &self.state, true)
    }
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
