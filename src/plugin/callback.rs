//! What the eval callback of one `llama_context` works with.

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

/// What a context was made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextOptions {
    /// `llama_context_params.n_seq_max`, or what `llama_n_seq_max` says.
    pub n_seq_max: usize,
    /// `llama_context_params.kv_unified`.
    pub kv_unified: bool,
}

/// The most sequences that a context is believed to have; llama.cpp allows 256.
const MOST_SEQUENCES: usize = 1 << 16;

/// A token of a batch that is about to be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Its sequence, below `n_seq_max`.
    pub sequence: usize,
    /// Whether its logits are asked for.
    pub is_output: bool,
    /// Whether it was generated, as against being of the prompt; `None` where that is not known, which only
    /// interventions on prompts or on generated tokens alone mind.
    pub is_generated: Option<bool>,
}

/// What the eval callback of one context works with: [`Callback::eval`] is called from it with every node.
///
/// All methods may be called from any thread, while another decodes: what they change takes effect from the next
/// micro-batch on. A [`Node`] that it looks at may not call them: they are refused there, but for
/// [`Callback::set_sequence`]. [`Callback::announce`] and [`Callback::check`] alone belong between two decodes. One callback is
/// for one context, which decodes on one thread at a time.
#[derive(Debug)]
pub struct Callback {
    steer: Arc<LoadedSteer>,
    n_seq_max: usize,
    streams: Streams,
    /// `[n_seq_max]`.
    is_on: Vec<AtomicBool>,
    /// Whether a thread is in [`Callback::eval`].
    is_busy: AtomicBool,
    /// Whether two threads were there at once.
    was_shared: AtomicBool,
    /// Gates that were set until now.
    n_gates: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` where there is nothing to do by callback, on an architecture that it does not know.
    watch: Option<Watch>,
    gate: Option<Gate>,
    /// Why what was decoded cannot be trusted.
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
        let streams = if is_one { Streams::One } else { Streams::OfSequences };
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

    /// Sequences of the context.
    pub fn n_seq_max(&self) -> usize {
        self.n_seq_max
    }

    /// What is behind the lock, for a function that is not the eval callback.
    fn state(&self) -> Result<MutexGuard<'_, State>> {
        if IS_EVALUATING.get() {
            return Err(Error::refused(
                "callback",
                "it was called by a function that it called itself to look at a tensor",
            )
            .with_hint("call it from elsewhere, or between two decodes"));
        }
        Ok(self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside is turned into a fault, so that what is behind a poisoned lock says so itself.
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

    /// Whether sequences can be told apart at all.
    fn check_by_sequence(&self, what: &str) -> Result<()> {
        if self.steer.control_vector.is_some() {
            return Err(Error::refused(
                what,
                "a part of this intervention is a control vector, which llama.cpp adds to all sequences",
            )
            .with_hint("load it for the callback alone (Route::Callback, DETOX_ROUTE_CALLBACK)"));
        }
        self.check_order(what)
    }

    /// Whether batches are cut in an order that can be followed.
    fn check_order(&self, what: &str) -> Result<()> {
        if self.n_seq_max > 1 && self.streams == Streams::One && self.steer.has_sliding_window {
            return Err(Error::refused(what, "with a unified KV cache and sliding windows llama.cpp may reorder a batch, so that its sequences cannot be told apart").with_hint("make the context with kv_unified = false"));
        }
        Ok(())
    }

    /// Steers a sequence, or no longer; all are steered at first.
    ///
    /// # Errors
    /// [`Error::Setting`] for a sequence that the context has not; [`Error::Refused`] where a part of the intervention is a control
    /// vector, which is for all.
    pub fn set_sequence(&self, sequence: usize, is_on: bool) -> Result<()> {
        self.check_sequence(sequence)?;
        if !is_on {
            self.check_by_sequence("sequence")?;
        }
        self.is_on[sequence].store(is_on, Ordering::Release);
        Ok(())
    }

    /// Steers each sequence only while a probe says that its text is turning toxic, see [`GateOptions`]. Every batch
    /// has to be announced from now on, unless the context has one sequence.
    ///
    /// # Errors
    /// As [`crate::interp::probe::Probe::read`] and its `check`; [`Error::Setting`] for a threshold outside [0, 1];
    /// [`Error::Refused`] as for [`Callback::set_sequence`]; [`Error::Model`] for an architecture that the callback does not know.
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

    /// Steers whatever the text from now on.
    ///
    /// # Errors
    /// [`Error::Refused`] from within a [`Node`] that [`Callback::eval`] looks at.
    pub fn remove_gate(&self) -> Result<()> {
        let mut state = self.state()?;
        if let Some(watch) = &mut state.watch {
            watch.set_reader(None);
        }
        state.gate = None;
        Ok(())
    }

    /// Does something with the gate, after it took in what was read until now.
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

    /// What the gate knows of a sequence after what was decoded until now.
    ///
    /// # Errors
    /// [`Error::Refused`] without a gate, [`Error::Setting`] for a sequence that the context has not.
    pub fn gate_state(&self, sequence: usize) -> Result<GateState> {
        self.check_sequence(sequence)?;
        self.with_gate(|gate| gate.state(sequence))
    }

    /// Forgets what was read of a sequence: call it where a sequence begins a new text.
    ///
    /// # Errors
    /// As [`Callback::gate_state`].
    pub fn reset_gate(&self, sequence: usize) -> Result<()> {
        self.check_sequence(sequence)?;
        self.with_gate(|gate| gate.reset(sequence))
    }

    /// Says what the next `llama_decode` is about. Needed where sequences are steered differently or by a gate, unless
    /// the context has one sequence, and for interventions on prompts or generated tokens alone; else it may be left
    /// out.
    ///
    /// `tokens` are those of the batch, in its order. A token of several sequences cannot be told apart: leave such a
    /// batch unannounced, while its sequences are steered alike.
    ///
    /// # Errors
    /// [`Error::Setting`] for a sequence that the context has not; [`Error::Refused`] where llama.cpp may reorder the batch in a way
    /// that cannot be followed: a unified cache with sliding windows.
    pub fn announce(&self, tokens: &[Token]) -> Result<()> {
        // Not whether sequences can be steered apart: edits beside a control vector may still be for prompts alone.
        self.check_order("batch")?;
        tokens.iter().try_for_each(|token| self.check_sequence(token.sequence))?;
        let batch = tokens.iter().map(|token| Announced {
            sequence: token.sequence,
            is_output: token.is_output,
            phase: token.is_generated.map(|is| if is { Phase::Generation } else { Phase::Prompt }),
        });
        let batch = batch.collect();
        let mut state = self.state()?;
        // Readings of the last decode must not be taken for those of this one.
        state.settle_gate();
        let State { watch: Some(watch), fault, .. } = &mut *state else { return Ok(()) };
        // What nobody checked yet is checked here, and kept for whoever does. A batch that was announced and of which
        // nothing came is another matter: llama_decode refuses one for which its cache has no room.
        if !watch.is_untouched()
            && let Err(reason) = watch.verify_ended()
        {
            fault.get_or_insert(reason);
        }
        watch.announce(batch);
        Ok(())
    }

    /// Whether everything that was decoded since the last call was steered as it should be. Call it after each
    /// `llama_decode` that succeeded: a callback cannot stop one, so that this is how a fault is told. Where no node was
    /// seen and nothing announced it cannot tell whether anything was decoded, and says that all is well.
    ///
    /// # Errors
    /// [`Error::NotSteered`] where it was not, or where a batch was announced and not all of it decoded: the logits are then neither the steered ones nor the model's own. Until this
    /// has told of a fault, nothing more is steered.
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

    /// What llama.cpp's eval callback does with a node: with `ask` before it is computed, to learn whether its value
    /// is wanted, and without afterwards. Returns what the callback returns. Never panics.
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
        // Nothing more is wanted, and the graph is computed to its end.
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
    /// Whether this thread holds a callback's lock while it looks at a node: who takes one then waits for itself, or
    /// for another thread that waits for this one.
    static IS_EVALUATING: Cell<bool> = const { Cell::new(false) };
}

/// While it lives the thread evaluates; afterwards what was before holds again.
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
    fn settle_gate(&mut self) {
        let readings = self.watch.as_mut().map(Watch::take_readings).unwrap_or_default();
        if let Some(gate) = &mut self.gate {
            readings.into_iter().for_each(|reading| gate.take(reading));
        }
    }
}
