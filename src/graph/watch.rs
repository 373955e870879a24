//! Follows the nodes of a running graph, and edits and records their values.

use super::architecture::{Architecture, BLOCK_OUTPUT, FINAL_NORM};
use super::edit::PreparedEdit;
use super::node::{Node, with_values};
use super::place::{InBlock, Phase, Place};
use super::recording::{Reader, Reading, Recording};
use super::rows::{Announced, Row, Rows, Streams};
use super::steering::{Change, Edit, When};

/// The watch's view of a node. Found once per node, because llama.cpp asks about every node of every graph.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    place: Option<Place>,
    /// Whether the node starts a micro-batch.
    pub(crate) starts_micro_batch: bool,
}

/// The edits and recordings of one context, and the progress of its current decode.
#[derive(Debug)]
pub(crate) struct Watch {
    architecture: &'static Architecture,
    n_layer: usize,
    n_seq_max: usize,
    streams: Streams,
    /// Edits of neurons, `[n_layer]`.
    neuron_edits: Vec<Vec<PreparedEdit>>,
    /// Edits of the residual stream after a block, `[n_layer]`.
    output_edits: Vec<Vec<PreparedEdit>>,
    /// Whether there are any edits. Kept as a flag because every node needs it.
    has_edits: bool,
    /// Multiplies the coefficients of all edits.
    coefficient: f32,
    recordings: Vec<Recording>,
    reader: Option<Reader>,
    /// Replaces the reader when the next micro-batch starts.
    next_reader: Option<Option<Reader>>,
    /// Readings since they were last taken.
    readings: Vec<Reading>,
    /// `[n_seq_max]`: sequences that are not edited.
    is_exempt: Vec<bool>,
    /// Whether the graph ends at the last recorded place.
    stops_early: bool,
    phase: Phase,
    progress: Progress,
}

/// Progress of the current decode.
///
/// Counts are since the decode began, or since [`Watch::forget_counts`].
#[derive(Debug, Default)]
struct Progress {
    rows: Rows,
    /// The embedding's values and width, kept if it is computed before its rows are known.
    unplaced: Option<(Vec<f32>, usize)>,
    /// Whether the current micro-batch is edited at all.
    is_active: bool,
    /// Places that were edited, counted once per micro-batch.
    n_edited: usize,
    /// Places that should have been edited.
    n_to_edit: usize,
    /// Micro-batches that the probe read.
    n_read: usize,
    /// Micro-batches that the probe should have read.
    n_to_read: usize,
    /// Micro-batches that started.
    n_micro_batches: usize,
    /// Nodes that llama.cpp asked about while there was anything to edit, record or read.
    n_asked: usize,
}

impl Watch {
    pub(crate) fn new(
        architecture: &'static Architecture,
        n_layer: usize,
        n_seq_max: usize,
        streams: Streams,
    ) -> Watch {
        Watch {
            architecture,
            n_layer,
            n_seq_max,
            streams,
            neuron_edits: vec![Vec::new(); n_layer],
            output_edits: vec![Vec::new(); n_layer],
            has_edits: false,
            coefficient: 1.0,
            recordings: Vec::new(),
            reader: None,
            next_reader: None,
            readings: Vec::new(),
            is_exempt: vec![false; n_seq_max],
            stops_early: false,
            phase: Phase::default(),
            progress: Progress::default(),
        }
    }

    /// Replaces the edits. The caller has checked that their layers exist.
    pub(crate) fn set_edits(&mut self, edits: &[Edit]) {
        self.neuron_edits.iter_mut().chain(&mut self.output_edits).for_each(Vec::clear);
        self.has_edits = !edits.is_empty();
        for edit in edits {
            let of_layers = match edit.change {
                Change::Neuron { .. } => &mut self.neuron_edits,
                Change::Direction { .. } => &mut self.output_edits,
            };
            of_layers[edit.layer].push(PreparedEdit::of(edit));
        }
    }

    /// Sets the factor on the coefficients of all edits, from the next micro-batch on.
    pub(crate) fn set_coefficient(&mut self, coefficient: f32) {
        self.coefficient = coefficient;
    }

    /// Replaces the recordings. With `stops_early` the graph ends at the last recorded place.
    pub(crate) fn set_recordings(&mut self, recordings: Vec<Recording>, stops_early: bool) {
        self.recordings = recordings;
        self.stops_early = stops_early && !self.recordings.is_empty();
    }

    pub(crate) fn recordings(&self) -> &[Recording] {
        &self.recordings
    }

    /// Sets the probe, from the next micro-batch on. It reads each token before the edits at its place are made.
    pub(crate) fn set_reader(&mut self, reader: Option<Reader>) {
        self.next_reader = Some(reader);
    }

    /// Takes the readings since the last call; those of one sequence are in the order of its tokens.
    pub(crate) fn take_readings(&mut self) -> Vec<Reading> {
        std::mem::take(&mut self.readings)
    }

    /// Sets whether a sequence is exempt from edits; returns whether that changed.
    pub(crate) fn set_exempt(&mut self, sequence: usize, is_exempt: bool) -> bool {
        std::mem::replace(&mut self.is_exempt[sequence], is_exempt) != is_exempt
    }

    pub(crate) fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
    }

    /// Whether graphs end before the logits are computed.
    pub(crate) fn stops_early(&self) -> bool {
        self.stops_early
    }

    /// Starts a decode. `sequences` and `outputs` describe its tokens, `[n_tokens]` each.
    pub(crate) fn begin(&mut self, sequences: &[i32], outputs: &[i8]) {
        let phase = Some(self.phase);
        let tokens = sequences.iter().zip(outputs);
        self.announce(
            tokens.map(|(&s, &o)| Announced { sequence: s as usize, is_output: o == 1, phase }).collect(),
        );
    }

    /// Starts a decode of these tokens. The caller has checked that their sequences are below `n_seq_max`.
    pub(crate) fn announce(&mut self, batch: Vec<Announced>) {
        self.progress = Progress::default();
        self.progress.rows.begin(batch, self.n_seq_max);
        for recording in &mut self.recordings {
            recording.seen.clear();
        }
    }

    /// Checks a decode that has ended.
    ///
    /// If an edit was not made or a recording saw nothing, the graph differs from the table of architectures.
    pub(crate) fn finish(&self) -> Result<(), String> {
        if self.is_idle() {
            return Ok(());
        }
        let progress = &self.progress;
        if progress.n_micro_batches == 0 || progress.rows.is_pending() {
            return Err(
                "the graph does not write its KV cache as the supported versions of llama.cpp do".into()
            );
        }
        self.verify()?;
        let has_output = progress.rows.batch.iter().any(|token| token.is_output);
        match self.recordings.iter().find(|r| !r.seen.contains(&true)) {
            Some(unseen) if has_output || !self.is_reduced(unseen.place) => {
                Err(self.unknown_graph(&format!("nothing was recorded at {:?}", unseen.place)))
            }
            _ => Ok(()),
        }
    }

    /// Checks that the micro-batches so far, all of them complete, were edited and read as they should be.
    pub(crate) fn verify(&self) -> Result<(), String> {
        let Progress { n_edited, n_to_edit, n_read, n_to_read, .. } = self.progress;
        if n_edited != n_to_edit {
            return Err(self.unknown_graph(&format!("{n_edited} of {n_to_edit} edits were made")));
        }
        if n_read != n_to_read {
            return Err(self.unknown_graph(&format!("the probe read {n_read} of {n_to_read} micro-batches")));
        }
        Ok(())
    }

    /// Checks like [`Watch::verify`] after a decode, and that all announced tokens were decoded.
    pub(crate) fn verify_ended(&self) -> Result<(), String> {
        if self.is_idle() {
            return Ok(());
        }
        let Progress { rows, n_micro_batches, n_asked, .. } = &self.progress;
        match (*n_micro_batches, *n_asked) {
            (0, 0) if rows.is_pending() => {
                return Err(
                    "a batch was announced, but no node of its graph was seen: is cb_eval set?".into()
                );
            }
            (0, n) if n > 0 => {
                return Err(self.unknown_graph("no micro-batch was seen to start"));
            }
            _ => {}
        }
        self.verify()?;
        match rows.n_left() {
            0 => Ok(()),
            n => Err(format!("{n} of the {} tokens announced were not decoded", rows.batch.len())),
        }
    }

    /// Whether llama.cpp asked about no node since the decode began.
    pub(crate) fn is_untouched(&self) -> bool {
        self.progress.n_micro_batches == 0 && self.progress.n_asked == 0
    }

    /// Resets the counts after they were verified.
    pub(crate) fn forget_counts(&mut self) {
        let progress = &mut self.progress;
        (progress.n_edited, progress.n_to_edit, progress.n_read, progress.n_to_read) = (0, 0, 0, 0);
        (progress.n_micro_batches, progress.n_asked) = (0, 0);
    }

    fn unknown_graph(&self, what: &str) -> String {
        let name = self.architecture.name;
        format!("{what}: the graph does not have the nodes expected of architecture {name:?}")
    }

    fn is_idle(&self) -> bool {
        self.recordings.is_empty() && self.reader.is_none() && self.next_reader.is_none() && !self.has_edits
    }

    /// The place at which the graph ends, if it ends early.
    fn last_place(&self) -> Option<Place> {
        let last = self.recordings.iter().map(|r| r.place).max();
        last.filter(|_| self.stops_early)
    }

    /// Whether only outputs have rows at a place.
    fn is_reduced(&self, place: Place) -> bool {
        match place {
            Place::Embedding => false,
            Place::Block(il, _) => il + 1 == self.n_layer,
            Place::FinalNorm => true,
        }
    }

    /// Whether the rows of the next micro-batch will be known only when its keys are written.
    fn waits_for_keys(&self) -> bool {
        self.streams == Streams::PerSequence && self.progress.rows.is_pending()
    }

    /// Looks at a node that is about to be computed.
    ///
    /// If it starts a micro-batch, the caller may change the coefficient and the exemptions before it calls
    /// [`Watch::wants`], which puts them into effect.
    pub(crate) fn look<N: Node>(&self, node: &N) -> Look {
        if self.is_idle() {
            return Look { place: None, starts_micro_batch: false };
        }
        let name = node.name();
        let place = self.place_of(name);
        let starts_micro_batch = match self.waits_for_keys() {
            true => is_first_key_write(name) && node.writes_rows(),
            false => place == Some(Place::Embedding),
        };
        Look { place, starts_micro_batch }
    }

    /// Whether the value of a node is needed. Called before the node is computed.
    pub(crate) fn wants<N: Node>(&mut self, node: &N, look: Look) -> Result<bool, String> {
        if self.is_idle() {
            // An unobserved graph: skip it, with the tokens that were announced for it.
            self.progress.rows.drop_rest();
            self.progress.n_asked = 0;
            return Ok(false);
        }
        self.progress.n_asked += 1;
        let Look { place, starts_micro_batch } = look;
        // The embedding is the first node, even if the micro-batch starts only with the first keys. A new reader of
        // the embedding must take effect there, because it cannot read later.
        let reads_embedding =
            |next: &Option<Reader>| next.as_ref().is_some_and(|reader| reader.place == Place::Embedding);
        if place == Some(Place::Embedding)
            || starts_micro_batch && !self.next_reader.as_ref().is_some_and(reads_embedding)
        {
            self.reader = self.next_reader.take().unwrap_or(self.reader.take());
        }
        if starts_micro_batch {
            self.start_micro_batch(node)?;
        }
        let Some(place) = place else { return Ok(false) };
        // This happens, for example, with a batch of embeddings, whose graph has no embedding node.
        if self.progress.n_micro_batches == 0 && place != Place::Embedding && self.is_looked_at(place) {
            return Err(format!("{place:?} was reached before a micro-batch was seen to start"));
        }
        Ok(self.is_edited(place)
            || self.recordings.iter().any(|r| r.place == place)
            || self.reader.as_ref().is_some_and(|reader| reader.place == place))
    }

    fn place_of(&self, name: &[u8]) -> Option<Place> {
        let layer_after = |prefix: &str| -> Option<usize> {
            let digits = name.strip_prefix(prefix.as_bytes())?.strip_prefix(b"-")?;
            std::str::from_utf8(digits).ok()?.parse().ok().filter(|&il| il < self.n_layer)
        };
        // The two most frequent places come first. Some architectures name the embedding like a block's node.
        if let Some(il) = layer_after(self.architecture.neurons) {
            return Some(Place::Block(il, InBlock::Neurons));
        }
        if let Some(il) = layer_after(BLOCK_OUTPUT) {
            return Some(Place::Block(il, InBlock::Output));
        }
        match name {
            _ if name == FINAL_NORM.as_bytes() => Some(Place::FinalNorm),
            _ if name == self.architecture.embedding.as_bytes() => Some(Place::Embedding),
            _ => None,
        }
    }

    fn edits_at(&self, place: Place) -> &[PreparedEdit] {
        match place {
            Place::Block(il, InBlock::Neurons) => &self.neuron_edits[il],
            Place::Block(il, InBlock::Output) => &self.output_edits[il],
            Place::Embedding | Place::FinalNorm => &[],
        }
    }

    fn is_looked_at(&self, place: Place) -> bool {
        !self.edits_at(place).is_empty() || self.reader.as_ref().is_some_and(|reader| reader.place == place)
    }

    fn is_edited(&self, place: Place) -> bool {
        self.progress.is_active && !self.edits_at(place).is_empty()
    }

    /// Finds the token of each row of the micro-batch that starts, and counts its edits and readings.
    fn start_micro_batch<N: Node>(&mut self, node: &N) -> Result<(), String> {
        let rows = &mut self.progress.rows;
        if self.streams == Streams::PerSequence && rows.is_pending() {
            let (targets, n_cells) =
                node.row_targets().ok_or("cannot tell which tokens are in a micro-batch")?;
            rows.take_by_keys(&targets, n_cells)?;
        } else if rows.is_pending() {
            rows.take_in_order(node.shape().n_rows())?;
        } else {
            rows.take_unknown(node.shape().n_rows(), self.n_seq_max)?;
        }
        let last = self.last_place();
        let is_reached = |place: Place| last.is_none_or(|last| place <= last);
        let edited = (0..self.n_layer).flat_map(|il| {
            [(InBlock::Neurons, &self.neuron_edits), (InBlock::Output, &self.output_edits)]
                .map(|(place, edits)| (Place::Block(il, place), !edits[il].is_empty()))
        });
        let n_edited = edited.filter(|&(place, has_edits)| has_edits && is_reached(place)).count();
        let is_active = self.coefficient != 0.0 && self.is_exempt.contains(&false);
        let progress = &mut self.progress;
        progress.n_micro_batches += 1;
        progress.is_active = is_active;
        progress.n_to_edit += if is_active { n_edited } else { 0 };
        progress.n_to_read +=
            usize::from(self.reader.as_ref().is_some_and(|reader| is_reached(reader.place)));
        if let Some((values, width)) = progress.unplaced.take() {
            let rows = self.progress.rows.of_node(false, values.len() / width.max(1))?;
            self.read(Place::Embedding, &rows, &values, width)?;
            self.record(Place::Embedding, &rows, &values, width)?;
        }
        Ok(())
    }

    /// Reads, edits and records a node that was computed; returns whether the graph should continue.
    ///
    /// A recording must not depend on the way an edit is made, so each place has one order. Neurons are recorded before
    /// their edits, because a control vector or a bias that stands for an edit acts only later. The residual stream is
    /// recorded after its edits, because it already contains the control vector.
    pub(crate) fn sees<N: Node>(&mut self, node: &mut N) -> Result<bool, String> {
        let Some(place) = self.place_of(node.name()) else { return Ok(true) };
        let shape = node.shape();
        let width = shape.width();
        if place == Place::Embedding && self.waits_for_keys() {
            // The rows are known only once the keys of the first block are written, which is after the embedding.
            self.progress.unplaced = Some((with_values(node, false, |values| values.to_vec())?, width));
            return Ok(true);
        }
        let rows = self.progress.rows.of_node(self.is_reduced(place), shape.n_rows());
        let rows = rows.map_err(|reason| format!("{place:?}: {reason}"))?;
        let is_edited = self.is_edited(place);
        with_values(node, is_edited, |values| -> Result<(), String> {
            self.read(place, &rows, values, width)?;
            let before_edits = matches!(place, Place::Block(_, InBlock::Neurons));
            if before_edits {
                self.record(place, &rows, values, width)?;
            }
            if is_edited {
                self.edit(place, &rows, values, width)?;
                self.progress.n_edited += 1;
            }
            if !before_edits {
                self.record(place, &rows, values, width)?;
            }
            Ok(())
        })??;
        Ok(self.last_place() != Some(place))
    }

    /// Makes the edits of a place, on `values` of shape `[n_rows][width]`.
    fn edit(&self, place: Place, rows: &[Row], values: &mut [f32], width: usize) -> Result<(), String> {
        for (row, values) in rows.iter().zip(values.chunks_exact_mut(width.max(1))) {
            if self.is_exempt(row)? {
                continue;
            }
            for edit in self.edits_at(place) {
                if !applies_to(edit.when, row)? {
                    continue;
                }
                edit.apply(values, self.coefficient)
                    .ok_or_else(|| format!("an edit at {place:?} does not fit its width {width}"))?;
            }
        }
        Ok(())
    }

    fn is_exempt(&self, row: &Row) -> Result<bool, String> {
        match row.sequence {
            Some(sequence) => Ok(self.is_exempt[sequence]),
            None if self.is_exempt.contains(&true) && self.is_exempt.contains(&false) => {
                Err("some sequences are steered and some are not, but the batch was not announced".into())
            }
            None => Ok(self.is_exempt[0]),
        }
    }

    fn read(&mut self, place: Place, rows: &[Row], values: &[f32], width: usize) -> Result<(), String> {
        let Some(reader) = self.reader.as_ref().filter(|reader| reader.place == place) else {
            return Ok(());
        };
        for (row, values) in rows.iter().zip(values.chunks_exact(width.max(1))) {
            let sequence =
                row.sequence.ok_or("a probe reads by sequence, but the batch was not announced")?;
            let product = reader.read(values).ok_or_else(|| {
                format!("the probe has width {}, but {place:?} has width {width}", reader.weight.len())
            })?;
            self.readings.push(Reading { reader: reader.number, sequence, product });
        }
        self.progress.n_read += 1;
        Ok(())
    }

    fn record(&mut self, place: Place, rows: &[Row], values: &[f32], width: usize) -> Result<(), String> {
        let n_tokens = self.progress.rows.batch.len();
        for recording in self.recordings.iter_mut().filter(|r| r.place == place) {
            for (row, values) in rows.iter().zip(values.chunks_exact(width.max(1))) {
                recording.take(row.index, n_tokens, values)?;
            }
        }
        Ok(())
    }
}

/// Whether an edit applies to a token.
fn applies_to(when: When, row: &Row) -> Result<bool, String> {
    match (when, row.phase) {
        (When::Both, _) => Ok(true),
        (_, None) => {
            let reason = "an edit applies only to the prompt or only to generated tokens, but the batch does not say \
                          which is which";
            Err(reason.into())
        }
        (When::Prompt, Some(phase)) => Ok(phase == Phase::Prompt),
        (When::Generation, Some(phase)) => Ok(phase == Phase::Generation),
    }
}

/// Whether a node writes the keys of the first block.
///
/// The name is the cache's, with the suffix that ggml adds for a view. Each micro-batch has one such node, before
/// every place except the embedding.
fn is_first_key_write(name: &[u8]) -> bool {
    name.strip_prefix(b"cache_").is_some_and(|rest| rest.starts_with(b"k_l0 "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_key_write_of_a_micro_batch_is_recognised_by_its_name() {
        assert!(is_first_key_write(b"cache_k_l0 (view)"));
        assert!(is_first_key_write(b"cache_k_l0 (reshaped) (view)"));
        assert!(!is_first_key_write(b"cache_k_l10 (view)"));
        assert!(!is_first_key_write(b"cache_v_l0 (view)"));
    }
}
