//! The eval callback of one `llama_context`, over any [`Node`].

use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::graph::place::Phase;
use crate::graph::rows::{Announced, Streams};
use crate::graph::watch::Watch;
use crate::graph::{Architecture, Node};

use super::gate::{Gate, GateOptions, GateState};
use super::loaded::LoadedSteer;

/// How the context was created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextOptions {
    /// `llama_context_params.n_seq_max`, or the result of `llama_n_seq_max`.
    pub n_seq_max: usize,
    /// `llama_context_params.kv_unified`.
    pub kv_unified: bool,
}

/// Limit on the number of sequences. llama.cpp itself allows 256.
const MOST_SEQUENCES: usize = 1 << 16;

/// A token of a batch to be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Its sequence, below `n_seq_max`.
    pub sequence: usize,
    /// Whether its logits are requested.
    pub is_output: bool,
    /// Whether it was generated rather than part of the prompt. `None` if unknown; used only by interventions on
    /// prompts alone or on generated tokens alone.
    pub is_generated: Option<bool>,
}

/// Steers one context: its eval callback calls [`Callback::eval`] with every node.
///
/// Each context needs its own callback, and must decode on one thread at a time. Methods may be called from any thread,
/// even while another thread decodes, and changes take effect from the next micro-batch on. There are two exceptions:
///
/// - [`Callback::announce`] and [`Callback::check`] must be called between two decodes.
/// - A [`Node`] must not call the callback that uses it. Such calls are refused, except for [`Callback::set_sequence`].
#[derive(Debug)]
pub struct Callback {
    steer: Arc<LoadedSteer>,
    n_seq_max: usize,
    streams: Streams,
    /// `[n_seq_max]`: whether the sequence is steered.
    is_on: Vec<AtomicBool>,
    /// Whether a thread is in [`Callback::eval`].
    is_busy: AtomicBool,
    /// Whether two threads were in [`Callback::eval`] at once.
    was_shared: AtomicBool,
    /// Number of gates set so far.
    n_gates: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` if the callback does not support the architecture. There is nothing to do then.
    watch: Option<Watch>,
    gate: Option<Gate>,
    /// Fault found since the last check, if any: the decodes since then cannot be trusted.
    fault: Option<String>,
}

impl Callback {
    pub(super) fn new(steer: Arc<LoadedSteer>, context: &ContextOptions) -> Result<Callback> {
        let n_seq_max = context.n_seq_max;
        if n_seq_max == 0 || n_seq_max > MOST_SEQUENCES {
            let reason = format!("expected 1 to {MOST_SEQUENCES} sequences, found {n_seq_max}");
            return Err(Error::setting("n_seq_max", reason));
        }
        let is_one = context.kv_unified || n_seq_max == 1;
        let streams = if is_one { Streams::One } else { Streams::PerSequence };
        let watch = steer.architecture.map(|architecture| {
            let mut watch = Watch::new(architecture, steer.n_layer, n_seq_max, streams);
            watch.set_edits(&steer.edits);
            watch
        });
        Ok(Callback {
            n_seq_max,
            streams,
            is_on: (0..n_seq_max).map(|_| AtomicBool::new(true)).collect(),
            is_busy: AtomicBool::new(false),
            was_shared: AtomicBool::new(false),
            n_gates: AtomicU64::new(0),
            state: Mutex::new(State { watch, gate: None, fault: None }),
            steer,
        })
    }

    /// Number of sequences of the context.
    pub fn n_seq_max(&self) -> usize {
        self.n_seq_max
    }

    /// Locks the state, outside of the eval callback.
    fn state(&self) -> Result<MutexGuard<'_, State>> {
        if IS_EVALUATING.get() {
            return Err(Error::refused(
                "callback",
                "it was called from within one of its own functions for reading or writing tensors",
            )
            .with_hint("call it from elsewhere, or between two decodes"));
        }
        Ok(self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock becomes a fault in the state, so a poisoned lock needs no handling of its own.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_sequence(&self, sequence: usize) -> Result<()> {
        match sequence < self.n_seq_max {
            true => Ok(()),
            false => {
                let reason = format!("expected a sequence below {}, found {sequence}", self.n_seq_max);
                Err(Error::setting("sequence", reason))
            }
        }
    }

    /// Checks that sequences can be steered differently.
    fn check_by_sequence(&self, what: &str) -> Result<()> {
        if self.steer.control_vector.is_some() {
            return Err(Error::refused(
                what,
                "part of this intervention is a control vector, which llama.cpp adds to all sequences",
            )
            .with_hint("load it for the callback (Route::Callback, DETOX_ROUTE_CALLBACK)"));
        }
        self.check_order(what)
    }

    /// Checks that the order in which llama.cpp splits batches can be followed.
    fn check_order(&self, what: &str) -> Result<()> {
        if self.n_seq_max > 1 && self.streams == Streams::One && self.steer.has_sliding_window {
            return Err(Error::refused(
                what,
                "with a unified KV cache and sliding windows llama.cpp may reorder a batch, so its sequences cannot be told apart",
            )
            .with_hint("create the context with kv_unified = false"));
        }
        Ok(())
    }

    /// Switches the steering of a sequence on or off. It starts switched on.
    ///
    /// # Errors
    /// [`Error::Setting`] for a sequence out of range; [`Error::Refused`] if part of the intervention is a control
    /// vector, because llama.cpp adds it to all sequences.
    pub fn set_sequence(&self, sequence: usize, is_on: bool) -> Result<()> {
        self.check_sequence(sequence)?;
        if !is_on {
            self.check_by_sequence("sequence")?;
        }
        self.is_on[sequence].store(is_on, Ordering::Release);
        Ok(())
    }

    /// Sets a gate: each sequence is steered only while a probe says that its text is turning toxic.
    ///
    /// See [`GateOptions`] for the exact rule. From now on every batch must be announced, unless the context has only
    /// one sequence.
    ///
    /// # Errors
    /// As [`crate::interp::probe::Probe::read`] and `Probe::check_model`; [`Error::Setting`] for a threshold outside
    /// [0, 1]; [`Error::Refused`] as for [`Callback::set_sequence`]; [`Error::Model`] for an architecture that the
    /// callback does not support.
    pub fn set_gate(&self, probe: &Path, options: &GateOptions) -> Result<()> {
        self.check_by_sequence("gate")?;
        Architecture::require(&self.steer.fingerprint.architecture, probe)?;
        let number = self.n_gates.fetch_add(1, Ordering::Relaxed);
        let (gate, reader) = Gate::open(probe, options, &self.steer, self.n_seq_max, number)?;
        let mut state = self.state()?;
        if let Some(watch) = &mut state.watch {
            watch.set_reader(Some(reader));
        }
        state.gate = Some(gate);
        Ok(())
    }

    /// Removes the gate. From now on sequences are steered regardless of their text.
    ///
    /// # Errors
    /// [`Error::Refused`] if called from within a method of a [`Node`].
    pub fn remove_gate(&self) -> Result<()> {
        let mut state = self.state()?;
        if let Some(watch) = &mut state.watch {
            watch.set_reader(None);
        }
        state.gate = None;
        Ok(())
    }

    /// Runs `act` on the gate, with all readings so far taken into account.
    fn with_gate<R>(&self, act: impl FnOnce(&mut Gate) -> R) -> Result<R> {
        let mut state = self.state()?;
        state.settle_gate();
        match &mut state.gate {
            Some(gate) => Ok(act(gate)),
            None => Err(Error::refused("gate", "this callback has none")),
        }
    }

    /// Changes the gate's threshold.
    ///
    /// # Errors
    /// [`Error::Refused`] without a gate, [`Error::Setting`] for a threshold outside [0, 1].
    pub fn set_threshold(&self, threshold: f64) -> Result<()> {
        self.with_gate(|gate| gate.set_threshold(threshold))?
    }

    /// The gate's state for a sequence, after everything decoded so far.
    ///
    /// # Errors
    /// [`Error::Refused`] without a gate, [`Error::Setting`] for a sequence out of range.
    pub fn gate_state(&self, sequence: usize) -> Result<GateState> {
        self.check_sequence(sequence)?;
        self.with_gate(|gate| gate.state(sequence))
    }

    /// Forgets the readings of a sequence. Call it when the sequence starts a new text.
    ///
    /// # Errors
    /// As [`Callback::gate_state`].
    pub fn reset_gate(&self, sequence: usize) -> Result<()> {
        self.check_sequence(sequence)?;
        self.with_gate(|gate| gate.reset(sequence))
    }

    /// Announces the tokens of the next `llama_decode`, in the batch's order.
    ///
    /// This is needed in two cases: if the context has several sequences and they are steered differently or by a gate,
    /// and for interventions on prompts alone or on generated tokens alone. Otherwise it is optional. Do not announce a
    /// batch in which a token belongs to several sequences; steer such sequences alike.
    ///
    /// # Errors
    /// [`Error::Setting`] for a sequence out of range; [`Error::Refused`] if llama.cpp may reorder the batch in a way
    /// that cannot be followed, which happens with a unified cache and sliding windows.
    pub fn announce(&self, tokens: &[Token]) -> Result<()> {
        // `check_by_sequence` would be too strict: it refuses any control vector, and edits of only prompts may come
        // with one.
        self.check_order("batch")?;
        tokens.iter().try_for_each(|token| self.check_sequence(token.sequence))?;
        let batch = tokens.iter().map(|token| Announced {
            sequence: token.sequence,
            is_output: token.is_output,
            phase: token.is_generated.map(|is| if is { Phase::Generation } else { Phase::Prompt }),
        });
        let batch = batch.collect();
        let mut state = self.state()?;
        // Readings of the last decode must not be counted as readings of this one.
        state.settle_gate();
        let State { watch: Some(watch), fault, .. } = &mut *state else { return Ok(()) };
        // If the last decode was not checked yet, check it now and keep the fault. It is no fault if no node of an
        // announced batch was seen: llama_decode refuses a batch that does not fit into its cache.
        if !watch.is_untouched()
            && let Err(reason) = watch.verify_ended()
        {
            fault.get_or_insert(reason);
        }
        watch.announce(batch);
        Ok(())
    }

    /// Checks that everything decoded since the last call was steered as it should be.
    ///
    /// Call it after each successful `llama_decode`. A callback cannot make a decode fail, so faults are reported here.
    /// Nothing is steered between a fault and the call that reports it. If no node was seen and no batch announced, it
    /// returns `Ok`, because it cannot know whether anything was decoded.
    ///
    /// # Errors
    /// [`Error::NotSteered`] if something was not steered as it should be, or if an announced batch was decoded only in
    /// part. The logits are then neither the steered ones nor the model's own.
    pub fn check(&self) -> Result<()> {
        let mut state = self.state()?;
        state.settle_gate();
        let State { watch, fault, .. } = &mut *state;
        let found = match self.was_shared.swap(false, Ordering::AcqRel) {
            true => Some("two threads decoded with one callback at once".to_owned()),
            false => fault.take().or_else(|| watch.as_ref().and_then(|watch| watch.verify_ended().err())),
        };
        let Some(reason) = found else {
            if let Some(watch) = watch {
                watch.forget_counts();
            }
            return Ok(());
        };
        *fault = None;
        if let Some(watch) = watch {
            watch.announce(Vec::new());
        }
        Err(Error::NotSteered { reason })
    }

    /// The body of the eval callback: llama.cpp calls it with `ask` before it computes a node, and without afterwards.
    ///
    /// Returns what llama.cpp's callback must return: whether the node's value is wanted, or whether the graph should
    /// continue. Never panics.
    pub fn eval<N: Node>(&self, node: &mut N, ask: bool) -> bool {
        if self.is_busy.swap(true, Ordering::AcqRel) {
            self.was_shared.store(true, Ordering::Release);
            return !ask;
        }
        let answer = {
            let _evaluating = Evaluating::begin();
            self.eval_alone(node, ask)
        };
        self.is_busy.store(false, Ordering::Release);
        answer
    }

    fn eval_alone<N: Node>(&self, node: &mut N, ask: bool) -> bool {
        let mut state = self.lock();
        if state.fault.is_some() {
            return !ask;
        }
        let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match ask {
            true => self.wants(&mut state, node),
            false => state.watch.as_mut().map_or(Ok(true), |watch| watch.sees(node)),
        }));
        let fault = match answer {
            Ok(Ok(answer)) => return answer,
            Ok(Err(fault)) => fault,
            Err(_) => "the eval callback panicked".into(),
        };
        state.fault = Some(fault);
        // From here on no node is observed, and the graph runs to its end.
        !ask
    }

    fn wants<N: Node>(&self, state: &mut State, node: &N) -> Result<bool, String> {
        let Some(watch) = &mut state.watch else { return Ok(false) };
        let look = watch.look(node);
        if look.starts_micro_batch {
            watch.verify()?;
            state.settle_gate();
            let State { watch: Some(watch), gate, .. } = state else { return Ok(false) };
            watch.set_coefficient(self.steer.coefficient());
            for (sequence, is_on) in self.is_on.iter().enumerate() {
                let is_open = gate.as_ref().is_none_or(|gate| gate.state(sequence).is_open);
                watch.set_exempt(sequence, !(is_on.load(Ordering::Acquire) && is_open));
            }
            return watch.wants(node, look);
        }
        watch.wants(node, look)
    }
}

thread_local! {
    /// Whether this thread is in [`Callback::eval`] and so holds a callback's lock.
    ///
    /// Taking a lock then could deadlock: the thread would wait for itself, or for another thread that waits for it.
    static IS_EVALUATING: Cell<bool> = const { Cell::new(false) };
}

/// Marks the thread as evaluating while it lives, and restores the earlier mark when dropped.
struct Evaluating(bool);

impl Evaluating {
    fn begin() -> Evaluating {
        Evaluating(IS_EVALUATING.replace(true))
    }
}

impl Drop for Evaluating {
    fn drop(&mut self) {
        IS_EVALUATING.set(self.0);
    }
}

impl State {
    /// Passes the readings so far to the gate.
    fn settle_gate(&mut self) {
        let readings = self.watch.as_mut().map(Watch::take_readings).unwrap_or_default();
        if let Some(gate) = &mut self.gate {
            readings.into_iter().for_each(|reading| gate.take(reading));
        }
    }
}
