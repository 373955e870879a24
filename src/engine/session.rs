//! A session: one `llama_context` with its KV cache, divided into slots.

use std::sync::Arc;

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};
use crate::finite;
use crate::graph::Architecture;
use crate::graph::place::Phase;
use crate::graph::recording::Recording;
use crate::graph::rows::Streams;
use crate::graph::watch::Watch;
use crate::memory;

use super::ffi::{self, Batch, ContextHandle, ContextParams, SequenceState};
use super::model::{LoadedSteering, Model};
use super::options::{MOST_THREADS, SessionOptions, check_threads};
use super::{Token, sample};

/// llama.cpp counts the tokens of a batch and of a context in 31 bits.
const MOST_TOKENS: usize = i32::MAX as usize;

/// llama.cpp rounds the cells of a sequence up to a multiple of this.
pub(super) const CELLS: usize = 256;

/// The slot that holds the current prompt.
pub(super) const PROMPT_SLOT: usize = 0;

impl SessionOptions {
    /// The number of threads: `n_threads`, or all cores.
    pub fn resolve_threads(&self) -> usize {
        self.n_threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    }

    /// Bytes of KV cache per token, over all layers.
    pub(super) fn kv_bytes_per_cell(&self, model: &Model) -> usize {
        // Keys and values have nearly the same width in every model, so the mean of their types is close enough.
        model.kv_bytes_per_cell() * (self.cache_type_k.bits() + self.cache_type_v.bits()) / 32
    }

    /// Tokens that one of `n_parallel` sequences holds: its share of `-c`, or `n_ctx_seq`.
    fn resolve_ctx_seq(&self, n_parallel: usize, n_ctx_seq: usize) -> Result<usize> {
        match self.n_ctx {
            Some(n_ctx) if n_ctx / n_parallel == 0 => Err(Error::setting(
                "-c/--ctx-size",
                format!("{n_ctx} tokens shared by {n_parallel} sequences leave none for each"),
            )),
            Some(n_ctx) => Ok(n_ctx / n_parallel),
            None => Ok(n_ctx_seq.max(1)),
        }
    }

    /// Checks that no count is zero or beyond llama.cpp's own limits.
    fn check_counts(&self) -> Result<()> {
        let counts = [
            ("-np/--parallel", self.n_parallel.unwrap_or(1), ffi::most_sequences() - 1),
            ("-b/--batch-size", self.n_batch, MOST_TOKENS),
            ("-ub/--ubatch-size", self.n_ubatch, MOST_TOKENS),
            ("-c/--ctx-size", self.n_ctx.unwrap_or(1), MOST_TOKENS),
            ("-t/--threads", self.n_threads.unwrap_or(1), MOST_THREADS),
            ("-tb/--threads-batch", self.n_threads_batch.unwrap_or(1), MOST_THREADS),
        ];
        match counts.iter().find(|(_, n, most)| *n == 0 || n > most) {
            Some((flag, n, most)) => {
                Err(Error::setting(*flag, format!("expected a number from 1 to {most}, found {n}")))
            }
            None => Ok(()),
        }
    }

    /// Checks that the KV cache fits into the memory of the machine, before llama.cpp allocates it.
    fn check_memory(&self, model: &Model, params: &ContextParams) -> Result<()> {
        let n_bytes = self.kv_bytes_per_cell(model).saturating_mul(params.n_ctx as usize) as u64;
        let most = memory::total_bytes();
        if n_bytes <= most {
            return Ok(());
        }
        let flag = if self.n_ctx.is_some() { "-c/--ctx-size" } else { "-np/--parallel" };
        let reason = format!(
            "a context of {} tokens for all sequences needs {} MiB of KV cache, but there are only {} MiB of memory",
            params.n_ctx,
            n_bytes >> 20,
            most >> 20
        );
        Err(Error::setting(flag, reason)
            .with_hint("lower -c/--ctx-size, -np/--parallel or -n/--n-predict, or use -ctk q8_0 -ctv q8_0"))
    }

    /// Checks the options and converts them to llama.cpp's.
    fn context_params(&self, n_parallel: usize, n_ctx_seq: usize) -> Result<ContextParams> {
        if n_parallel > self.n_batch {
            return Err(Error::setting(
                "-np/--parallel",
                format!("{n_parallel} sequences do not fit into a batch of {} tokens", self.n_batch),
            )
            .with_hint(format!("raise -b/--batch-size to {n_parallel}")));
        }
        let n_threads = self.resolve_threads();
        check_threads("-t/--threads", n_threads)?;
        let n_threads_batch = self.n_threads_batch.unwrap_or(n_threads);
        check_threads("-tb/--threads-batch", n_threads_batch)?;
        let n_seq_max = n_parallel + 1;
        let most_sequences = ffi::most_sequences();
        if n_seq_max > most_sequences {
            return Err(Error::setting(
                "-np/--parallel",
                format!("expected at most {} sequences, found {n_parallel}", most_sequences - 1),
            ));
        }
        let too_large = || {
            Error::setting(
                "-c/--ctx-size",
                format!("{n_seq_max} sequences of {n_ctx_seq} tokens are more than llama.cpp can count"),
            )
        };
        let n_ctx = n_ctx_seq.checked_next_multiple_of(CELLS).and_then(|n| n.checked_mul(n_seq_max));
        Ok(ContextParams {
            n_ctx: n_ctx.and_then(|n| u32::try_from(n).ok()).ok_or_else(too_large)?,
            // llama.cpp asserts that a batch has room for every sequence, the prompt slot included.
            n_batch: u32::try_from(self.n_batch.max(n_seq_max)).map_err(|_| too_large())?,
            n_ubatch: u32::try_from(self.n_ubatch).map_err(|_| too_large())?,
            n_seq_max: u32::try_from(n_seq_max).map_err(|_| too_large())?,
            n_threads: n_threads as i32,
            n_threads_batch: n_threads_batch as i32,
            flash_attention: self.flash_attention,
            cache_type_k: self.cache_type_k,
            cache_type_v: self.cache_type_v,
        })
    }
}

/// A `llama_context` with `n_parallel` slots for continuations, and one for their prompt.
#[derive(Debug)]
pub struct Session {
    pub(super) context: ContextHandle,
    pub(super) batch: Batch,
    /// Threads for sampling, as many as for decoding.
    pub(super) pool: ThreadPool,
    /// The KV of the prompt slot, in host memory; used only if the model runs on the CPU.
    prompt_state: Option<SequenceState>,
    model: Model,
    n_parallel: usize,
    n_ctx_seq: usize,
    has_control_vector: bool,
    /// Number of sequences that are exempt from edits.
    n_exempt: usize,
}

fn control_vector_is_for_all() -> Error {
    Error::setting("steering", "llama.cpp adds a control vector to all sequences, but some must be exempt")
        .with_hint("compile the intervention for the callback (steer::compile, Route::Callback)")
}

impl Session {
    /// Opens a session, steered like `model`.
    ///
    /// Each sequence holds at least `n_ctx_seq` tokens, prompt and continuation together. The eval callback is
    /// installed only if the model's steering has edits.
    ///
    /// Errors: [`Error::Setting`] if options contradict each other; [`Error::Model`] if llama.cpp cannot allocate
    /// the context.
    pub fn open(model: &Model, options: &SessionOptions, n_ctx_seq: usize) -> Result<Session> {
        let needs_callback = !model.steering().steering().edits.is_empty();
        Session::open_as(model, options, n_ctx_seq, needs_callback)
    }

    /// Opens a session like [`Session::open`], and always installs the eval callback.
    ///
    /// The callback is needed to record values, to exempt sequences from edits, and to make edits later if the
    /// model has none yet.
    ///
    /// Errors: as [`Session::open`], and [`Error::Model`] for an architecture that the callback does not support.
    pub fn open_with_callback(model: &Model, options: &SessionOptions, n_ctx_seq: usize) -> Result<Session> {
        Session::open_as(model, options, n_ctx_seq, true)
    }

    fn open_as(
        model: &Model,
        options: &SessionOptions,
        n_ctx_seq: usize,
        has_callback: bool,
    ) -> Result<Session> {
        options.check_counts()?;
        let n_parallel = options.resolve_parallel(model, n_ctx_seq);
        Session::open_with_slots(model, options, n_parallel, n_ctx_seq, has_callback)
    }

    /// Opens a session of `n_parallel` slots, even if the model's sequences are not known to share batches.
    pub(super) fn open_with_slots(
        model: &Model,
        options: &SessionOptions,
        n_parallel: usize,
        n_ctx_seq: usize,
        has_callback: bool,
    ) -> Result<Session> {
        let n_ctx_seq = options.resolve_ctx_seq(n_parallel, n_ctx_seq)?;
        // A sequence never grows beyond a table of learned positions, whatever -c says.
        let n_ctx_seq = n_ctx_seq.min(model.n_positions().unwrap_or(usize::MAX)).max(1);
        let params = options.context_params(n_parallel, n_ctx_seq)?;
        if model.on_cpu() {
            options.check_memory(model, &params)?;
        }
        let n_seq_max = n_parallel + 1;
        let watch = match has_callback {
            true => Some(Watch::new(model.graph()?, model.n_layer(), n_seq_max, Streams::PerSequence)),
            false => None,
        };
        let context = ContextHandle::new(model.handle.clone(), &params, watch).ok_or_else(|| {
            let mib = options.kv_bytes_per_cell(model).saturating_mul(params.n_ctx as usize) >> 20;
            let reason = format!(
                "llama.cpp could not open a context of {n_seq_max} sequences of {n_ctx_seq} tokens ({mib} MiB of KV cache)"
            );
            Error::model(model.path(), reason).with_hint(
                "lower -np/--parallel or -c/--ctx-size, or run again with -v to see llama.cpp's log",
            )
        })?;
        let n_threads = params.n_threads as usize;
        let pool =
            ThreadPoolBuilder::new().num_threads(n_threads).thread_name(|i| format!("sample-{i}")).build();
        let pool = pool
            .map_err(|e| Error::setting("-t/--threads", format!("cannot start {n_threads} threads: {e}")))?;
        // llama.cpp rounds the context up. Keep the requested size, so that -c is a limit and not a hint.
        let n_ctx_seq = n_ctx_seq.min(context.n_ctx_seq());
        let mut session = Session {
            context,
            batch: Batch::default(),
            pool,
            prompt_state: None,
            model: model.clone(),
            n_parallel,
            n_ctx_seq,
            has_control_vector: false,
            n_exempt: 0,
        };
        if !model.steering().steering().is_empty() {
            session.steer(&model.steering().clone())?;
        }
        Ok(session)
    }

    /// Replaces the steering, for everything decoded from now on. Existing KV does not change.
    ///
    /// Errors: [`Error::Model`] for a steering loaded for another model, and for a control vector that the
    /// architecture ignores; [`Error::Setting`] for edits in a session without the eval callback, and for a
    /// control vector while sequences are exempt.
    pub fn steer(&mut self, loaded: &LoadedSteering) -> Result<()> {
        if !Arc::ptr_eq(&loaded.model, &self.model.handle) {
            return Err(self.refusal("the steering was loaded for another model".into()));
        }
        let steering = loaded.steering();
        let rows = steering.control_vector.as_ref().map(|vector| vector.rows.as_slice());
        // Rows of zeros add nothing. Leaving them out saves their cost.
        let rows = rows.filter(|rows| rows.iter().any(|&v| v != 0.0));
        if rows.is_some() && self.n_exempt > 0 {
            return Err(control_vector_is_for_all());
        }
        match self.context.watch() {
            Some(watch) => watch.set_edits(&steering.edits),
            None if steering.edits.is_empty() => {}
            None => {
                return Err(Error::setting(
                    "steering",
                    "these edits need the eval callback, and this session was opened without it",
                ));
            }
        }
        self.context.set_loras(&loaded.loras);
        if rows.is_some() && Architecture::find(self.model.architecture()).is_none() {
            self.prove_control_vector(rows)?;
        }
        self.set_control_vector(rows)
    }

    fn set_control_vector(&mut self, rows: Option<&[f32]>) -> Result<()> {
        if rows.is_none() && !self.has_control_vector {
            return Ok(());
        }
        if !self.context.set_control_vector(rows, self.model.n_layer()) {
            return Err(self.refusal("llama.cpp refused the control vector".into()));
        }
        self.has_control_vector = rows.is_some();
        Ok(())
    }

    /// Checks that a control vector changes the logits: the graphs of some architectures ignore it.
    fn prove_control_vector(&mut self, rows: Option<&[f32]>) -> Result<()> {
        let tokens = [0];
        self.set_control_vector(None)?;
        let without = self.logits(&tokens)?;
        self.set_control_vector(rows)?;
        let with = self.logits(&tokens)?;
        self.context.clear();
        if without != with {
            return Ok(());
        }
        let reason = format!(
            "this control vector has no effect: logits do not change (llama.cpp ignores control vectors on some architectures, and architecture {:?} may be one)",
            self.model.architecture()
        );
        Err(self.refusal(reason).with_hint("use a LoRA adapter instead, or a model of another architecture"))
    }

    /// Exempts a sequence from all edits, or ends its exemption.
    ///
    /// Slot 0 holds the prompt, slots 1 to `n_parallel` its continuations.
    ///
    /// Errors: [`Error::Setting`] for a slot out of range; without the eval callback; and if a control vector is
    /// set, because llama.cpp adds it to all sequences. In that case compile the intervention for the callback.
    pub fn set_exempt(&mut self, slot: usize, is_exempt: bool) -> Result<()> {
        if slot > self.n_parallel {
            let reason = format!("expected a slot from 0 to {}, found {slot}", self.n_parallel);
            return Err(Error::setting("slot", reason));
        }
        if is_exempt && self.has_control_vector {
            return Err(control_vector_is_for_all());
        }
        let Some(watch) = self.context.watch() else {
            return Err(Error::setting(
                "slot",
                "sequences can be exempt only in a session with the eval callback",
            ));
        };
        match (watch.set_exempt(slot, is_exempt), is_exempt) {
            (true, true) => self.n_exempt += 1,
            (true, false) => self.n_exempt -= 1,
            (false, _) => {}
        }
        Ok(())
    }

    fn refusal(&self, reason: String) -> Error {
        Error::model(self.model.path(), reason)
    }

    /// The session's model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Number of continuations decoded at once.
    pub fn n_parallel(&self) -> usize {
        self.n_parallel
    }

    /// Sequences that may share a batch, the prompt slot included.
    pub(super) fn most_together(&self) -> usize {
        if self.n_parallel == 1 { 1 } else { self.n_parallel + 1 }
    }

    /// Tokens that one sequence holds, prompt and continuation together.
    pub fn n_ctx_seq(&self) -> usize {
        self.n_ctx_seq
    }

    /// Checks that a prompt has tokens, and fits into a sequence with `n_predict` more.
    ///
    /// Errors: [`Error::PromptTooLong`], and [`Error::Model`] for a prompt without tokens.
    pub fn check_fits(&self, prompt: &str, n_prompt: usize, n_predict: usize) -> Result<()> {
        if n_prompt == 0 {
            return Err(Error::model(
                self.model.path(),
                format!(
                    "prompt {prompt:?} has no tokens, and this model adds no BOS: there is nothing to continue"
                ),
            )
            .with_hint("give a prompt of at least one character"));
        }
        // The last token is never decoded, so it needs no cell.
        if n_prompt.saturating_add(n_predict) > self.n_ctx_seq + 1 {
            return Err(Error::PromptTooLong {
                prompt: prompt.to_owned(),
                n_prompt,
                n_predict,
                n_ctx_seq: self.n_ctx_seq,
                is_learned: self.model.n_positions() == Some(self.n_ctx_seq),
            });
        }
        Ok(())
    }

    /// Decodes `tokens` into the prompt slot; returns the logits after the last one, `[n_vocab]`.
    pub(super) fn load_prompt(&mut self, tokens: &[Token]) -> Result<Vec<f32>> {
        self.context.remove(PROMPT_SLOT);
        let n_batch = self.context.n_batch();
        let n_chunks = tokens.len().div_ceil(n_batch);
        let mut last = 0;
        for (i, chunk) in tokens.chunks(n_batch).enumerate() {
            self.batch.clear();
            for (j, &token) in chunk.iter().enumerate() {
                let is_last = i + 1 == n_chunks && j + 1 == chunk.len();
                last = self.batch.push(token, i * n_batch + j, PROMPT_SLOT, is_last);
            }
            self.decode_as(Phase::Prompt)?;
        }
        // llama.cpp copies a whole stream, including unused cells. On a CPU it is faster to copy only the used
        // cells through host memory; a GPU copies faster by itself.
        self.prompt_state = if self.model.on_cpu() { self.context.save(PROMPT_SLOT) } else { None };
        self.row(last).map(<[f32]>::to_vec)
    }

    /// Copies the prompt into `slot`, to be continued there.
    pub(super) fn fork_prompt(&mut self, slot: usize) {
        self.context.remove(slot);
        let restored = self.prompt_state.as_ref().is_some_and(|state| self.context.restore(state, slot));
        if !restored {
            self.context.copy(PROMPT_SLOT, slot);
        }
    }

    /// Decodes `self.batch`, whose tokens continue prompts.
    pub(super) fn decode(&mut self) -> Result<()> {
        self.decode_as(Phase::Generation)
    }

    /// Decodes `self.batch`, whose tokens are all of one phase.
    pub(super) fn decode_as(&mut self, phase: Phase) -> Result<()> {
        let n_tokens = self.batch.len();
        if let Some(watch) = self.context.watch() {
            watch.set_phase(phase);
        }
        self.context.decode(&mut self.batch).map_err(|reason| Error::Decode { n_tokens, reason })
    }

    /// The logits after token `index` of the last batch, `[n_vocab]`.
    pub(super) fn row(&self, index: usize) -> Result<&[f32]> {
        self.context.logits(index).ok_or_else(|| Error::Decode {
            n_tokens: self.batch.len(),
            reason: format!("no logits for token {index}"),
        })
    }

    /// Records at each decode from now on. With `stops_early` the graph ends at the last recorded place.
    pub(super) fn start_recording(&mut self, recordings: Vec<Recording>, stops_early: bool) -> Result<()> {
        let Some(watch) = self.context.watch() else {
            return Err(Error::setting("recording", "this session was opened without the eval callback"));
        };
        watch.set_recordings(recordings, stops_early);
        Ok(())
    }

    pub(super) fn stop_recording(&mut self) {
        if let Some(watch) = self.context.watch() {
            watch.set_recordings(Vec::new(), false);
        }
    }

    /// The values of recording number `recording` for token `index` of the last batch, all finite.
    pub(super) fn recorded(&mut self, recording: usize, index: usize) -> Result<&[f32]> {
        let n_tokens = self.batch.len();
        let hint = self.not_finite_hint();
        let path = self.model.path().to_owned();
        let recordings = self.context.watch().map(|watch| watch.recordings()).unwrap_or_default();
        let row = recordings.get(recording).and_then(|r| Some((r, r.row(index)?)));
        let (recording, row) = row.ok_or_else(|| Error::Decode {
            n_tokens,
            reason: format!("recording {recording} has no values for token {index}"),
        })?;
        match finite::not_finite(row) {
            Some((at, found)) => {
                let reason = format!("{} holds {found} at index {at}", recording.place());
                Err(Error::model(path, reason).with_hint(hint))
            }
            None => Ok(row),
        }
    }

    /// A hint for a value that is NaN or infinite.
    fn not_finite_hint(&self) -> &'static str {
        if self.model.steering().steering().is_empty() {
            "the file may be damaged: load it with --check-tensors, or download it again"
        } else {
            "lower the coefficients of the steering and the scales of the adapters; if the model alone gives the same \
             error, its file may be damaged (--check-tensors)"
        }
    }

    /// The error for a row of logits that defines no distribution.
    pub(super) fn no_distribution(&self) -> Error {
        // Bytes that changed under the mapping are the likeliest reason.
        if let Err(changed) = self.model.files().check_content() {
            return changed;
        }
        self.refusal("its logits contain NaN, or no finite value".into()).with_hint(self.not_finite_hint())
    }

    /// Logits after every token of one sequence, shape `[tokens.len()][n_vocab]`, all finite.
    ///
    /// For comparison with a reference; evaluation never needs whole rows.
    ///
    /// Errors: [`Error::Model`] for a logit that is NaN or infinite, which a comparison would hide.
    pub fn logits(&mut self, tokens: &[Token]) -> Result<Vec<Vec<f32>>> {
        let mut of_sequences = self.logits_of_each(&[tokens])?;
        Ok(of_sequences.pop().unwrap_or_default())
    }

    /// Logits after every token of several sequences, shape `[sequences][tokens][n_vocab]`.
    ///
    /// The sequences share batches, in slots 0, 1, …, and their tokens count as prompts.
    pub fn logits_of_each(&mut self, sequences: &[&[Token]]) -> Result<Vec<Vec<Vec<f32>>>> {
        if sequences.len() > self.n_parallel + 1 {
            let reason =
                format!("{} sequences do not fit into {} slots", sequences.len(), self.n_parallel + 1);
            return Err(Error::setting("-np/--parallel", reason));
        }
        for tokens in sequences {
            self.check_fits("", tokens.len(), 0)?;
        }
        if sequences.len() > self.most_together() {
            let alone = sequences.iter().map(|tokens| self.logits(tokens));
            return alone.collect();
        }
        self.context.clear();
        let tokens = sequences.iter().enumerate().flat_map(|(slot, tokens)| {
            tokens.iter().enumerate().map(move |(position, &token)| (slot, position, token))
        });
        let tokens: Vec<(usize, usize, Token)> = tokens.collect();
        let mut rows = vec![Vec::new(); sequences.len()];
        for chunk in tokens.chunks(self.context.n_batch()) {
            self.batch.clear();
            for &(slot, position, token) in chunk {
                self.batch.push(token, position, slot, true);
            }
            self.decode_as(Phase::Prompt)?;
            for (i, &(slot, ..)) in chunk.iter().enumerate() {
                let row = self.row(i)?;
                if let Some((token, found)) = finite::not_finite(row) {
                    let reason =
                        format!("its logits contain NaN or infinite values: {found} for token {token}");
                    return Err(self.refusal(reason).with_hint(self.not_finite_hint()));
                }
                rows[slot].push(row.to_vec());
            }
        }
        self.model.files().check_content()?;
        Ok(rows)
    }

    /// The natural log-probability of `token` under a row of logits.
    pub(super) fn logprob(&self, row: &[f32], token: Token) -> Result<f64> {
        sample::logprob(row, token).ok_or_else(|| self.no_distribution())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::engine::ModelOptions;

    #[test]
    fn copying_a_slot_in_llama_cpp_or_through_host_memory_gives_the_same_bits() {
        for name in ["llama", "gemma3"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("gguf/tiny/{name}.gguf"));
            let model = Model::open(&path, &ModelOptions::default()).unwrap();
            let options =
                SessionOptions { n_parallel: Some(2), n_threads: Some(1), ..SessionOptions::default() };
            let mut session = Session::open(&model, &options, 64).unwrap();
            let prompt = [1, 20, 30, 40, 50];
            session.load_prompt(&prompt).unwrap();
            assert!(session.prompt_state.is_some());
            session.fork_prompt(1);
            // As on a GPU: llama.cpp copies.
            session.prompt_state = None;
            session.fork_prompt(2);
            session.batch.clear();
            session.batch.push(60, prompt.len(), 1, true);
            session.batch.push(60, prompt.len(), 2, true);
            session.decode().unwrap();
            assert_eq!(session.row(0).unwrap(), session.row(1).unwrap(), "{name}");
        }
    }
}
