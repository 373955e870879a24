//! What the eval callback looks for in a graph, and does there: edits of values, and recordings of them.

use super::architecture::{Architecture, BLOCK_OUTPUT, FINAL_NORM};
use super::edit::PreparedEdit;
use super::node::{Node, with_values};
use super::place::{InBlock, Phase, Place};
use super::recording::{Reader, Reading, Recording};
use super::rows::{Announced, Row, Rows, Streams};
use super::steering::{Change, Edit, When};

/// What a node is, found once for all that is asked about it: llama.cpp asks about every node of every graph.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    place: Option<Place>,
    /// Whether a micro-batch starts with it.
    pub(crate) starts_micro_batch: bool,
}

/// What is looked for and done during each decode of one context.
#[derive(Debug)]
pub(crate) struct Watch {
    architecture: &'static Architecture,
    n_layer: usize,
    n_seq_max: usize,
    streams: Streams,
    /// By layer.
    neuron_edits: Vec<Vec<PreparedEdit>>,
    output_edits: Vec<Vec<PreparedEdit>>,
    /// Whether there is any of them: asked of every node.
    has_edits: bool,
    /// What the coefficients of all edits are multiplied by.
    coefficient: f32,
    recordings: Vec<Recording>,
    reader: Option<Reader>,
    /// What replaces the reader when the next micro-batch begins.
    next_reader: Option<Option<Reader>>,
    /// Since they were last taken.
    readings: Vec<Reading>,
    /// `[n_seq_max]`: sequences on which no edit is made.
    is_exempt: Vec<bool>,
    /// Whether the graph may end at the last recording.
    stops_early: bool,
    phase: Phase,
    progress: Progress,
}

/// Where the decode in progress stands.
#[derive(Debug, Default)]
struct Progress {
    rows: Rows,
    /// The embedding's values and width, where it comes before the rows are known.
    unplaced: Option<(Vec<f32>, usize)>,
    /// Whether the micro-batch in progress is edited at all.
    is_active: bool,
    /// Places with edits that were passed, each once a micro-batch, and those that should have been.
    n_edited: usize,
    n_to_edit: usize,
    /// The same of the reader's place.
    n_read: usize,
    n_to_read: usize,
    /// Since the decode began, or since what there was before was forgotten.
    n_micro_batches: usize,
    /// Nodes that were asked about in the same time, while there was something to do.
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

    /// Makes these edits and no others. Their layers are those of the model, which the caller saw to.
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

    /// What the coefficients of all edits are multiplied by, from the next micro-batch on.
    pub(crate) fn set_coefficient(&mut self, coefficient: f32) {
        self.coefficient = coefficient;
    }

    pub(crate) fn set_recordings(&mut self, recordings: Vec<Recording>, stops_early: bool) {
        self.recordings = recordings;
        self.stops_early = stops_early && !self.recordings.is_empty();
    }

    pub(crate) fn recordings(&self) -> &[Recording] {
        &self.recordings
    }

    /// Reads every token at one place, before the edits there are made, from the next micro-batch on.
    pub(crate) fn set_reader(&mut self, reader: Option<Reader>) {
        self.next_reader = Some(reader);
    }

    /// What was read since the last call, the tokens of one sequence in their order.
    pub(crate) fn take_readings(&mut self) -> Vec<Reading> {
        std::mem::take(&mut self.readings)
    }

    /// Returns whether that is a change.
    pub(crate) fn set_exempt(&mut self, sequence: usize, is_exempt: bool) -> bool {
        std::mem::replace(&mut self.is_exempt[sequence], is_exempt) != is_exempt
    }

    pub(crate) fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
    }

    /// Whether graphs end before their logits.
    pub(crate) fn stops_early(&self) -> bool {
        self.stops_early
    }

    /// A decode begins, of tokens with these sequences and outputs, shapes `[n_tokens]`.
    pub(crate) fn begin(&mut self, sequences: &[i32], outputs: &[i8]) {
        let phase = Some(self.phase);
        let tokens = sequences.iter().zip(outputs);
        self.announce(
            tokens.map(|(&s, &o)| Announced { sequence: s as usize, is_output: o == 1, phase }).collect(),
        );
    }

    /// A decode of these tokens begins. Their sequences are below `n_seq_max`, which the caller saw to.
    pub(crate) fn announce(&mut self, batch: Vec<Announced>) {
        self.progress = Progress::default();
        self.progress.rows.begin(batch, self.n_seq_max);
        for recording in &mut self.recordings {
            recording.seen.clear();
        }
    }

    /// A decode has ended. An edit that was not made, or a recording that saw nothing, means that the graph
    /// is not the one that the table of architectures describes.
    pub(crate) fn finish(&self) -> Result<(), String> {
        if self.is_idle() {
            return Ok(());
        }
        let progress = &self.progress;
        if progress.n_micro_batches == 0 || progress.rows.is_pending() {
            return Err("the graph does not write to its KV cache as it was known to".into());
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

    /// Whether the micro-batches until now, each computed to its end, were edited and read as they should be.
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

    /// As [`Watch::verify`], after a decode: one that was seen began, and one that was announced is all there.
    pub(crate) fn verify_ended(&self) -> Result<(), String> {
        if self.is_idle() {
            return Ok(());
        }
        let Progress { rows, n_micro_batches, n_asked, .. } = &self.progress;
        match (*n_micro_batches, *n_asked) {
            (0, 0) if rows.is_pending() => {
                return Err(
                    "a batch was announced, and no node of its graph was seen: is cb_eval set?".into()
                );
            }
            (0, n) if n > 0 => {
                return Err(self.unknown_graph("no micro-batch was seen to begin"));
            }
            _ => {}
        }
        self.verify()?;
        match rows.n_left() {
            0 => Ok(()),
            n => Err(format!("{n} of the {} tokens announced were not decoded", rows.batch.len())),
        }
    }

    /// Whether no node was asked about since the decode began.
    pub(crate) fn is_untouched(&self) -> bool {
        self.progress.n_micro_batches == 0 && self.progress.n_asked == 0
    }

    /// Counts anew, after what there is was verified.
    pub(crate) fn forget_counts(&mut self) {
        let progress = &mut self.progress;
        (progress.n_edited, progress.n_to_edit, progress.n_read, progress.n_to_read) = (0, 0, 0, 0);
        (progress.n_micro_batches, progress.n_asked) = (0, 0);
    }

    fn unknown_graph(&self, what: &str) -> String {
        let name = self.architecture.name;
        format!("{what}: the graph has not the nodes that were known of architecture {name:?}")
    }

    fn is_idle(&self) -> bool {
        self.recordings.is_empty() && self.reader.is_none() && self.next_reader.is_none() && !self.has_edits
    }

    /// Where the graph may end, if it may.
    fn last_place(&self) -> Option<Place> {
        let last = self.recordings.iter().map(|r| r.place).max();
        last.filter(|_| self.stops_early)
    }

    /// Whether only outputs have rows there.
    fn is_reduced(&self, place: Place) -> bool {
        match place {
            Place::Embedding => false,
            Place::Block(il, _) => il + 1 == self.n_layer,
            Place::FinalNorm => true,
        }
    }

    /// Whether the rows of the coming micro-batch are read from where its keys are written.
    fn waits_for_keys(&self) -> bool {
        self.streams == Streams::OfSequences && self.progress.rows.is_pending()
    }

    /// What a node is that is about to be computed. Where it starts a micro-batch, the caller may change the coefficient
    /// and the exemptions before [`Watch::wants`], which then takes them as they are.
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

    /// Whether the value of a node is needed, before it is computed.
    pub(crate) fn wants<N: Node>(&mut self, node: &N, look: Look) -> Result<bool, String> {
        if self.is_idle() {
            // A graph passes that nobody follows: what was announced of it is no longer to come.
            self.progress.rows.drop_rest();
            self.progress.n_asked = 0;
            return Ok(false);
        }
        self.progress.n_asked += 1;
        let Look { place, starts_micro_batch } = look;
        // The embedding is the first node of all, also where the keys tell the rows; what reads there cannot
        // come later.
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
        // Of a batch of embeddings, say, whose graph has no node for them.
        if self.progress.n_micro_batches == 0 && place != Place::Embedding && self.is_looked_at(place) {
            return Err(format!("{place:?} came before a micro-batch was seen to begin"));
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
        // The two that are asked for most come first; the embedding of some is named like a block's node.
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

    /// Learns which token each row of the coming micro-batch is.
    fn start_micro_batch<N: Node>(&mut self, node: &N) -> Result<(), String> {
        let rows = &mut self.progress.rows;
        if self.streams == Streams::OfSequences && rows.is_pending() {
            let (targets, n_cells) =
                node.row_targets().ok_or("cannot tell the tokens of a micro-batch apart")?;
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

    /// A node was computed: reads, edits and records it. Returns whether the graph goes on.
    pub(crate) fn sees<N: Node>(&mut self, node: &mut N) -> Result<bool, String> {
        let Some(place) = self.place_of(node.name()) else { return Ok(true) };
        let shape = node.shape();
        let width = shape.width();
        if place == Place::Embedding && self.waits_for_keys() {
            // It comes before the keys of the first block, which tell the rows.
            self.progress.unplaced = Some((with_values(node, false, |values| values.to_vec())?, width));
            return Ok(true);
        }
        let rows = self.progress.rows.of_node(self.is_reduced(place), shape.n_rows());
        let rows = rows.map_err(|reason| format!("{place:?}: {reason}"))?;
        let is_edited = self.is_edited(place);
        with_values(node, is_edited, |values| -> Result<(), String> {
            self.read(place, &rows, values, width)?;
            if is_edited {
                self.edit(place, &rows, values, width)?;
                self.progress.n_edited += 1;
            }
            self.record(place, &rows, values, width)
        })??;
        Ok(self.last_place() != Some(place))
    }

    /// Makes the edits of a place on its rows, `values` of shape `[n_rows][width]`.
    fn edit(&self, place: Place, rows: &[Row], values: &mut [f32], width: usize) -> Result<(), String> {
        for (row, values) in rows.iter().zip(values.chunks_exact_mut(width.max(1))) {
            if self.is_exempt(row)? {
                continue;
            }
            for edit in self.edits_at(place) {
                if !is_now(edit.when, row)? {
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
                Err("some sequences are steered and some are not, and nobody announced the batch".into())
            }
            None => Ok(self.is_exempt[0]),
        }
    }

    fn read(&mut self, place: Place, rows: &[Row], values: &[f32], width: usize) -> Result<(), String> {
        let Some(reader) = self.reader.as_ref().filter(|reader| reader.place == place) else {
            return Ok(());
        };
        for (row, values) in rows.iter().zip(values.chunks_exact(width.max(1))) {
            let sequence = row.sequence.ok_or("a probe reads by sequence, and nobody announced the batch")?;
            let product = reader.read(values).ok_or_else(|| {
                format!("the probe has {} numbers, and {place:?} has {width}", reader.weight.len())
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

/// Whether an edit is made on a token.
fn is_now(when: When, row: &Row) -> Result<bool, String> {
    match (when, row.phase) {
        (When::Both, _) => Ok(true),
        (_, None) => {
            Err("an edit is for the prompt or for what follows alone, and nobody said which token is which"
                .into())
        }
        (When::Prompt, Some(phase)) => Ok(phase == Phase::Prompt),
        (When::Generation, Some(phase)) => Ok(phase == Phase::Generation),
    }
}

/// Whether a node writes the keys of the first block: the name is that of the cache with what ggml adds for
/// a view. Each micro-batch has one such node, before every place but the embedding.
fn is_first_key_write(name: &[u8]) -> bool {
    name.strip_prefix(b"cache_").is_some_and(|rest| rest.starts_with(b"k_l0 "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_key_write_of_a_micro_batch_is_known_by_its_name() {
        assert!(is_first_key_write(b"cache_k_l0 (view)"));
        assert!(is_first_key_write(b"cache_k_l0 (reshaped) (view)"));
        assert!(!is_first_key_write(b"cache_k_l10 (view)"));
        assert!(!is_first_key_write(b"cache_v_l0 (view)"));
    }
}
