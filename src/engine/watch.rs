//! What the eval callback looks for in a graph, and does there: edits of values, and recordings of them.
//!
//! A batch reaches the graph in pieces (micro-batches), with its tokens in another order, and the last
//! block sees only the tokens whose logits were asked for. Which row of a node is which token is read from
//! where the graph writes each token's keys in the KV cache: every sequence has a stream of its own there,
//! and the tokens of one sequence keep their order.

use std::collections::VecDeque;

use super::architecture::{Architecture, BLOCK_OUTPUT, FINAL_NORM};
use super::ffi::Node;
use super::steering::{Change, Edit, Operation, When};

/// A place in the graph, in the order in which it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The residual stream before the first block, `[n_embd]` a token.
    Embedding,
    /// In a block, its layer and what of it.
    Block(usize, InBlock),
    /// The residual stream after the final norm, `[n_embd]` a token.
    FinalNorm,
}

/// A place in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InBlock {
    /// The neurons' activations, `[n_ff]` a token.
    Neurons,
    /// The residual stream as the block leaves it, `[n_embd]` a token.
    Output,
}

/// Which tokens the decode in progress is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Phase {
    #[default]
    Prompt,
    Generation,
}

/// Values recorded at one place, of the last decode.
#[derive(Debug, Clone)]
pub(super) struct Recording {
    place: Place,
    /// Which of a row's numbers; all if `None`.
    columns: Option<Vec<usize>>,
    /// Numbers in a recorded row.
    width: usize,
    /// `[n_tokens][width]`, in the batch's order.
    values: Vec<f32>,
    /// `[n_tokens]`: whether the row was seen. In the last block only outputs are.
    seen: Vec<bool>,
}

impl Recording {
    pub(super) fn new(place: Place, columns: Option<Vec<usize>>) -> Recording {
        Recording { place, columns, width: 0, values: Vec::new(), seen: Vec::new() }
    }

    /// The values of token `index` of the last batch.
    pub(super) fn row(&self, index: usize) -> Option<&[f32]> {
        let is_seen = *self.seen.get(index)?;
        is_seen.then(|| &self.values[index * self.width..(index + 1) * self.width])
    }

    /// Takes a row of the graph as token `index` of `n_tokens`.
    fn take(&mut self, index: usize, n_tokens: usize, row: &[f32]) -> Result<(), String> {
        let width = self.columns.as_ref().map_or(row.len(), Vec::len);
        if self.seen.len() != n_tokens || self.width != width {
            self.width = width;
            self.values = vec![0.0; n_tokens * width];
            self.seen = vec![false; n_tokens];
        }
        let to = &mut self.values[index * width..(index + 1) * width];
        match &self.columns {
            None => to.copy_from_slice(row),
            Some(columns) => {
                for (to, &column) in to.iter_mut().zip(columns) {
                    *to = *row.get(column).ok_or_else(|| {
                        format!("no column {column} at {:?}, which has {}", self.place, row.len())
                    })?;
                }
            }
        }
        self.seen[index] = true;
        Ok(())
    }
}

/// An edit with what can be worked out beforehand.
#[derive(Debug, Clone)]
struct Prepared {
    when: When,
    coefficient: f32,
    change: PreparedChange,
}

#[derive(Debug, Clone)]
enum PreparedChange {
    Neuron { index: usize, operation: Operation },
    Add { vector: Vec<f32> },
    Component { unit: Vec<f32>, operation: Operation },
}

/// A token of the micro-batch in progress.
#[derive(Debug, Clone, Copy)]
struct Row {
    sequence: usize,
    /// In the batch.
    index: usize,
}

/// What is looked for and done during each decode of one context.
#[derive(Debug)]
pub(super) struct Watch {
    architecture: &'static Architecture,
    n_layer: usize,
    n_seq_max: usize,
    /// By layer.
    neuron_edits: Vec<Vec<Prepared>>,
    output_edits: Vec<Vec<Prepared>>,
    recordings: Vec<Recording>,
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
    /// For each sequence the batch indices of its tokens that no micro-batch has had yet.
    queues: Vec<VecDeque<usize>>,
    is_output: Vec<bool>,
    /// The micro-batch in progress, in the graph's order; empty until it is known.
    rows: Vec<Row>,
    /// A recording of the embedding that came before the rows were known: values and width.
    unplaced: Option<(Vec<f32>, usize)>,
    /// Places with edits that were passed, each once a micro-batch.
    n_edited: usize,
    n_micro_batches: usize,
}

impl Watch {
    pub(super) fn new(architecture: &'static Architecture, n_layer: usize, n_seq_max: usize) -> Watch {
        Watch {
            architecture,
            n_layer,
            n_seq_max,
            neuron_edits: vec![Vec::new(); n_layer],
            output_edits: vec![Vec::new(); n_layer],
            recordings: Vec::new(),
            is_exempt: vec![false; n_seq_max],
            stops_early: false,
            phase: Phase::default(),
            progress: Progress::default(),
        }
    }

    /// Makes these edits and no others. Layers are those of the model: `Model::check_steering` saw to it.
    pub(super) fn set_edits(&mut self, edits: &[Edit]) {
        self.neuron_edits.iter_mut().chain(&mut self.output_edits).for_each(Vec::clear);
        for edit in edits {
            let (of_layers, change) = match &edit.change {
                &Change::Neuron { index, operation } => {
                    (&mut self.neuron_edits, PreparedChange::Neuron { index, operation })
                }
                Change::Direction { vector, operation: Operation::Offset(offset) } => (
                    &mut self.output_edits,
                    PreparedChange::Add { vector: vector.iter().map(|v| v * offset).collect() },
                ),
                Change::Direction { vector, operation } => {
                    let norm = vector.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
                    let unit = vector.iter().map(|&v| (f64::from(v) / norm) as f32).collect();
                    (&mut self.output_edits, PreparedChange::Component { unit, operation: *operation })
                }
            };
            of_layers[edit.layer].push(Prepared { when: edit.when, coefficient: edit.coefficient, change });
        }
    }

    pub(super) fn set_recordings(&mut self, recordings: Vec<Recording>, stops_early: bool) {
        self.recordings = recordings;
        self.stops_early = stops_early && !self.recordings.is_empty();
    }

    pub(super) fn recordings(&self) -> &[Recording] {
        &self.recordings
    }

    /// Returns whether that is a change.
    pub(super) fn set_exempt(&mut self, sequence: usize, is_exempt: bool) -> bool {
        std::mem::replace(&mut self.is_exempt[sequence], is_exempt) != is_exempt
    }

    pub(super) fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
    }

    /// Whether graphs end before their logits.
    pub(super) fn stops_early(&self) -> bool {
        self.stops_early
    }

    /// A decode begins, of tokens with these sequences and outputs, shapes `[n_tokens]`.
    pub(super) fn begin(&mut self, sequences: &[i32], outputs: &[i8]) {
        let mut queues = vec![VecDeque::new(); self.n_seq_max];
        for (index, &sequence) in sequences.iter().enumerate() {
            queues[sequence as usize].push_back(index);
        }
        let is_output = outputs.iter().map(|&output| output == 1).collect();
        self.progress = Progress { queues, is_output, ..Progress::default() };
        for recording in &mut self.recordings {
            recording.seen.clear();
        }
    }

    /// A decode has ended. An edit that was not made, or a recording that saw nothing, means that the graph
    /// is not the one that the table of architectures describes.
    pub(super) fn finish(&self) -> Result<(), String> {
        if self.is_idle() {
            return Ok(());
        }
        let progress = &self.progress;
        if progress.n_micro_batches == 0 || progress.queues.iter().any(|queue| !queue.is_empty()) {
            return Err("the graph does not write to its KV cache as it was known to".into());
        }
        let last = self.last_place();
        let edited = (0..self.n_layer).flat_map(|il| {
            [(InBlock::Neurons, &self.neuron_edits), (InBlock::Output, &self.output_edits)]
                .map(|(place, edits)| (Place::Block(il, place), !edits[il].is_empty()))
        });
        let n_edited =
            edited.filter(|&(place, has_edits)| has_edits && last.is_none_or(|l| place <= l)).count();
        if progress.n_edited != n_edited * progress.n_micro_batches {
            return Err(format!(
                "{} of {} edits were made: the graph has not the nodes that were known of architecture {:?}",
                progress.n_edited,
                n_edited * progress.n_micro_batches,
                self.architecture.name
            ));
        }
        match self.recordings.iter().find(|r| !r.seen.contains(&true)) {
            Some(unseen) if progress.is_output.contains(&true) || !self.is_reduced(unseen.place) => {
                Err(format!(
                    "nothing was recorded at {:?}: the graph has not the nodes that were known of architecture {:?}",
                    unseen.place, self.architecture.name
                ))
            }
            _ => Ok(()),
        }
    }

    fn is_idle(&self) -> bool {
        let edits = self.neuron_edits.iter().chain(&self.output_edits);
        self.recordings.is_empty() && edits.into_iter().all(Vec::is_empty)
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

    /// Whether the value of a node is needed, before it is computed.
    pub(super) fn wants(&mut self, node: &Node) -> Result<bool, String> {
        if self.is_idle() {
            return Ok(false);
        }
        let name = node.name();
        if node.is_set_rows() && is_first_key_write(name) {
            self.start_micro_batch(node)?;
            return Ok(false);
        }
        let Some(place) = self.place_of(name) else { return Ok(false) };
        Ok(!self.edits_at(place).is_empty() || self.recordings.iter().any(|r| r.place == place))
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

    fn edits_at(&self, place: Place) -> &[Prepared] {
        match place {
            Place::Block(il, InBlock::Neurons) => &self.neuron_edits[il],
            Place::Block(il, InBlock::Output) => &self.output_edits[il],
            Place::Embedding | Place::FinalNorm => &[],
        }
    }

    /// Learns which token each row of the coming micro-batch is, from where its keys are written.
    fn start_micro_batch(&mut self, node: &Node) -> Result<(), String> {
        let unknown = || "cannot tell the tokens of a micro-batch apart".to_owned();
        let (targets, n_cells) = node.row_targets().ok_or_else(unknown)?;
        // All streams have one length and lie one after the other.
        let n_cells = match n_cells {
            0 => return Err(unknown()),
            n if n % self.n_seq_max != 0 => return Err(unknown()),
            n => n / self.n_seq_max,
        };
        let progress = &mut self.progress;
        progress.n_micro_batches += 1;
        progress.rows.clear();
        for target in targets {
            let sequence = usize::try_from(target).map_err(|_| unknown())? / n_cells;
            let queue = progress.queues.get_mut(sequence).ok_or_else(unknown)?;
            let index = queue.pop_front().ok_or_else(unknown)?;
            progress.rows.push(Row { sequence, index });
        }
        if let Some((values, width)) = progress.unplaced.take() {
            let rows = std::mem::take(&mut self.progress.rows);
            let result = self.record(Place::Embedding, &rows, &values, width);
            self.progress.rows = rows;
            result?;
        }
        Ok(())
    }

    /// A node was computed: records and edits it. Returns whether the graph goes on.
    pub(super) fn sees(&mut self, node: &mut Node) -> Result<bool, String> {
        let Some(place) = self.place_of(node.name()) else { return Ok(true) };
        let width = node.width();
        if place == Place::Embedding {
            // It comes before the keys of the first block, which tell the rows.
            self.progress.unplaced = Some((node.with_values(false, |values| values.to_vec())?, width));
            return Ok(true);
        }
        let mut rows = std::mem::take(&mut self.progress.rows);
        let of_place: Vec<Row> = match self.is_reduced(place) {
            true => rows.iter().copied().filter(|row| self.progress.is_output[row.index]).collect(),
            false => std::mem::take(&mut rows),
        };
        if of_place.len() != node.n_rows() {
            return Err(format!("expected {} rows at {place:?}, found {}", of_place.len(), node.n_rows()));
        }
        let has_edits = !self.edits_at(place).is_empty();
        node.with_values(has_edits, |values| -> Result<(), String> {
            if has_edits {
                self.edit(place, &of_place, values, width)?;
                self.progress.n_edited += 1;
            }
            self.record(place, &of_place, values, width)
        })??;
        self.progress.rows = if self.is_reduced(place) { rows } else { of_place };
        Ok(self.last_place() != Some(place))
    }

    /// Makes the edits of a place on its rows, `values` of shape `[n_rows][width]`.
    fn edit(&self, place: Place, rows: &[Row], values: &mut [f32], width: usize) -> Result<(), String> {
        let is_now = |when: When| match when {
            When::Both => true,
            When::Prompt => self.phase == Phase::Prompt,
            When::Generation => self.phase == Phase::Generation,
        };
        for (row, values) in rows.iter().zip(values.chunks_exact_mut(width.max(1))) {
            if self.is_exempt[row.sequence] {
                continue;
            }
            for edit in self.edits_at(place).iter().filter(|edit| is_now(edit.when)) {
                edit.apply(values)
                    .ok_or_else(|| format!("an edit at {place:?} does not fit its width {width}"))?;
            }
        }
        Ok(())
    }

    fn record(&mut self, place: Place, rows: &[Row], values: &[f32], width: usize) -> Result<(), String> {
        let n_tokens = self.progress.is_output.len();
        for recording in self.recordings.iter_mut().filter(|r| r.place == place) {
            for (row, values) in rows.iter().zip(values.chunks_exact(width.max(1))) {
                recording.take(row.index, n_tokens, values)?;
            }
        }
        Ok(())
    }
}

impl Prepared {
    /// Edits one row; `None` if it is shorter than the edit needs.
    fn apply(&self, row: &mut [f32]) -> Option<()> {
        let coefficient = self.coefficient;
        match &self.change {
            PreparedChange::Neuron { index, operation } => {
                let a = row.get_mut(*index)?;
                *a = changed(*a, *operation, coefficient);
            }
            PreparedChange::Add { vector } if vector.len() == row.len() => {
                for (x, v) in row.iter_mut().zip(vector) {
                    *x += coefficient * v;
                }
            }
            PreparedChange::Component { unit, operation } if unit.len() == row.len() => {
                let component: f64 = row.iter().zip(unit).map(|(&x, &u)| f64::from(x) * f64::from(u)).sum();
                let component = component as f32;
                let difference = changed(component, *operation, coefficient) - component;
                for (x, u) in row.iter_mut().zip(unit) {
                    *x += difference * u;
                }
            }
            PreparedChange::Add { .. } | PreparedChange::Component { .. } => return None,
        }
        Some(())
    }
}

/// `a + coefficient * (operation(a) - a)`, without rounding where the coefficient is 1.
fn changed(a: f32, operation: Operation, coefficient: f32) -> f32 {
    match operation {
        Operation::Offset(offset) => a + coefficient * offset,
        _ if coefficient == 1.0 => operation.apply(a),
        _ => a + coefficient * (operation.apply(a) - a),
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

    fn edit(coefficient: f32, change: PreparedChange) -> Prepared {
        Prepared { when: When::Both, coefficient, change }
    }

    #[test]
    fn a_neuron_is_changed_by_the_share_that_the_coefficient_says() {
        for (operation, coefficient, expected) in [
            (Operation::Offset(-3.0), 0.5, 0.5),
            (Operation::Assign(6.0), 1.0, 6.0),
            (Operation::Assign(6.0), 0.25, 3.0),
            (Operation::Scale(0.0), 1.0, 0.0),
            (Operation::Scale(3.0), 0.5, 4.0),
            (Operation::Clamp { min: -1.0, max: 1.0 }, 1.0, 1.0),
            (Operation::Clamp { min: -1.0, max: 1.0 }, 2.0, 0.0),
        ] {
            let mut row = [9.0, 2.0];
            edit(coefficient, PreparedChange::Neuron { index: 1, operation }).apply(&mut row).unwrap();
            assert_eq!(row, [9.0, expected], "{operation:?} by {coefficient}");
        }
    }

    #[test]
    fn a_component_is_changed_along_its_direction_alone() {
        // Along (0.6, 0.8) the row (5, 0) has the component 3; what is left of it is (3.2, -2.4).
        let unit = vec![0.6, 0.8];
        let mut row = [5.0, 0.0];
        let assign = PreparedChange::Component { unit: unit.clone(), operation: Operation::Assign(0.0) };
        edit(1.0, assign).apply(&mut row).unwrap();
        assert!((row[0] - 3.2).abs() < 1e-6 && (row[1] + 2.4).abs() < 1e-6, "{row:?}");
        let mut row = [5.0, 0.0];
        let clamp =
            PreparedChange::Component { unit, operation: Operation::Clamp { min: f32::MIN, max: 1.0 } };
        edit(1.0, clamp).apply(&mut row).unwrap();
        assert!((row[0] - 3.8).abs() < 1e-6 && (row[1] + 1.6).abs() < 1e-6, "{row:?}");
    }

    #[test]
    fn rejects_an_edit_that_does_not_fit_the_row() {
        let mut row = [0.0; 2];
        let neuron = PreparedChange::Neuron { index: 2, operation: Operation::Assign(1.0) };
        assert!(edit(1.0, neuron).apply(&mut row).is_none());
        assert!(edit(1.0, PreparedChange::Add { vector: vec![1.0; 3] }).apply(&mut row).is_none());
    }

    #[test]
    fn the_first_key_write_of_a_micro_batch_is_known_by_its_name() {
        assert!(is_first_key_write(b"cache_k_l0 (view)"));
        assert!(is_first_key_write(b"cache_k_l0 (reshaped) (view)"));
        assert!(!is_first_key_write(b"cache_k_l10 (view)"));
        assert!(!is_first_key_write(b"cache_v_l0 (view)"));
    }
}
