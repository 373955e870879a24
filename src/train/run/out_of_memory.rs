//! Handles out-of-memory errors: retries with less memory, logs the choice, and keeps it for the rest of the run.

use crate::error::{Error, Result};
use crate::progress::Progress;

use crate::train::data::tokens::TokenPair;
use crate::train::device::Device;
use crate::train::device::name::Frozen;
use crate::train::recipe::method::MethodName;
use crate::train::run::metrics::{PlacementRecord, Record};
use crate::train::run::training_loop::{TrainingLoop, Work, n_rows};

impl<D: Device> TrainingLoop<'_, D> {
    /// Logs the placement with which the run starts or resumes, and prints it if it differs from the last one.
    pub(super) fn log_placement(&mut self, progress: &mut dyn Progress) -> Result<()> {
        let now = self.placement(false);
        let placement_of = |record: &Record| match record {
            Record::Placement(placement) => Some(*placement),
            _ => None,
        };
        match self.records.iter().rev().find_map(placement_of) {
            Some(before) if before.choice() == now.choice() => return Ok(()),
            Some(before) => {
                let on_device = |placement: &PlacementRecord| match before.device == now.device {
                    true => String::new(),
                    false => format!(" on {}", placement.device),
                };
                progress.say(&format!(
                    "resuming with {}{} instead of {}{}: results differ only by rounding",
                    now.in_words(),
                    on_device(&now),
                    before.in_words(),
                    on_device(&before)
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

    /// Runs `work` over `pairs`. If memory runs out, retries with less memory until nothing smaller is left.
    pub(super) fn within_memory<T>(
        &mut self,
        pairs: &[&TokenPair],
        kind: Work,
        progress: &mut dyn Progress,
        mut work: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let n_rows = pairs.iter().map(|pair| n_rows(pair)).sum();
        loop {
            let (device, reason) = match work(self) {
                // A half-applied optimizer step cannot be retried.
                Err(Error::DeviceMemory { device, reason, .. }) if !self.trainer.is_torn() => {
                    (device, reason)
                }
                result => return result,
            };
            if !self.shrink(kind, n_rows) {
                return Err(Error::device_memory(device, reason).with_hint(self.hint(kind)));
            }
            self.trainer.forget_pass()?;
            let smaller = self.placement(true);
            let (step, in_words) = (smaller.step, smaller.in_words());
            progress.say(&format!("after step {step}: {reason}; continuing with {in_words}"));
            self.record(Record::Placement(smaller))?;
        }
    }

    /// Reduces memory use from now on; false if nothing smaller is left.
    ///
    /// On the CPU passes keep their size, because it affects the last bits there.
    fn shrink(&mut self, kind: Work, n_rows: usize) -> bool {
        let is_gpu = !self.settings.device.is_cpu();
        (is_gpu && self.trainer.halve_passes(n_rows, self.longest))
            || (kind == Work::Train && self.trainer.start_checkpointing())
    }

    /// What the user can change: options with which this run can resume, and options that need a new run.
    fn hint(&self, kind: Work) -> String {
        let (is_cpu, options) = (self.settings.device.is_cpu(), self.trainer.options());
        let mut to_resume = Vec::new();
        let method = self.settings.method;
        if method != MethodName::Full && self.settings.frozen == Some(Frozen::Bf16) {
            to_resume.push("--frozen quantised");
        }
        if kind == Work::Train && !options.checkpointing {
            to_resume.push("--checkpointing on");
        }
        let memory = match is_cpu {
            true => "free memory",
            false => "free GPU memory (nvidia-smi lists the processes that use it)",
        };
        let to_resume = match to_resume.is_empty() {
            true => String::new(),
            false => format!(", or resume with {}", to_resume.join(" and ")),
        };
        let fewer_rows = if is_cpu && options.max_rows > self.longest { "--ubatch-size, " } else { "" };
        let rank = if method == MethodName::Lora { " or --rank" } else { "" };
        format!(
            "{memory}{to_resume}; or start over in a new folder (-o) with a smaller {fewer_rows}--max-length{rank}"
        )
    }
}
