//! Describes in one sentence how each part of the steering is applied.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use super::intervention::{Intervention, Target};
use crate::file::base_name;
use crate::graph::steering::Operation;

/// One control vector or intervention, and how its edits are made.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Choice {
    /// The noun, singular and plural: "neuron offset", "neuron offsets".
    nouns: (String, String),
    by_control_vector: Part,
    by_callback: Part,
}

/// The edits that are made one way.
#[derive(Debug, Clone, Default, PartialEq)]
struct Part {
    n: usize,
    layers: BTreeSet<usize>,
}

impl Choice {
    pub(super) fn control_vector(path: &Path) -> Choice {
        let name = base_name(path);
        Choice::of((format!("direction of {name}"), format!("directions of {name}")))
    }

    pub(super) fn intervention(intervention: &Intervention) -> Choice {
        let (is_neurons, what) = match intervention.target() {
            Target::Neurons(_) => (true, "neuron"),
            Target::Directions(_) => (false, "direction"),
        };
        let edit = match intervention.operation() {
            Operation::Offset(_) => "offset",
            Operation::Assign(0.0) if !is_neurons => "projection",
            Operation::Assign(_) => "assignment",
            Operation::Scale(_) => "scaling",
            Operation::Clamp { .. } => "clamp",
        };
        Choice::of((format!("{what} {edit}"), format!("{what} {edit}s")))
    }

    fn of(nouns: (String, String)) -> Choice {
        Choice { nouns, by_control_vector: Part::default(), by_callback: Part::default() }
    }

    /// Counts one edit in `layer`.
    pub(super) fn count(&mut self, layer: usize, is_moved: bool) {
        let part = if is_moved { &mut self.by_control_vector } else { &mut self.by_callback };
        part.n += 1;
        part.layers.insert(layer);
    }
}

impl fmt::Display for Choice {
    /// "36 neuron offsets: 35 as a control vector (layers 1 to 23), 1 by callback (layer 0)".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.by_control_vector.n + self.by_callback.n;
        if n == 0 {
            return write!(f, "{}: nothing to change, all are 0", self.nouns.1);
        }
        let noun = if n == 1 { &self.nouns.0 } else { &self.nouns.1 };
        write!(f, "{n} {noun}: ")?;
        let parts = [(&self.by_control_vector, "as a control vector"), (&self.by_callback, "by callback")];
        for (i, (part, way)) in parts.into_iter().filter(|(part, _)| part.n > 0).enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            let count = if part.n == n { String::new() } else { format!("{} ", part.n) };
            write!(f, "{comma}{count}{way} ({})", layers(&part.layers))?;
        }
        Ok(())
    }
}

/// "layer 0", "layers 1 to 23", or with gaps "3 layers from 1 to 23".
fn layers(layers: &BTreeSet<usize>) -> String {
    match (layers.first(), layers.last()) {
        (Some(first), Some(last)) if first == last => format!("layer {first}"),
        (Some(first), Some(last)) if last - first + 1 == layers.len() => format!("layers {first} to {last}"),
        (Some(first), Some(last)) => format!("{} layers from {first} to {last}", layers.len()),
        _ => "no layer".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steer::neuron::Neuron;

    fn offsets() -> Choice {
        Choice::intervention(&Intervention::neuron_offset(vec![Neuron { layer: 0, index: 0 }], 1.0).unwrap())
    }

    #[test]
    fn the_sentence_counts_the_edits_of_each_way_and_names_their_layers() {
        let mut choice = offsets();
        choice.count(0, false);
        assert_eq!(choice.to_string(), "1 neuron offset: by callback (layer 0)");
        (1..=23).chain([23]).for_each(|layer| choice.count(layer, true));
        assert_eq!(
            choice.to_string(),
            "25 neuron offsets: 24 as a control vector (layers 1 to 23), 1 by callback (layer 0)"
        );
    }

    #[test]
    fn layers_with_gaps_are_counted() {
        let mut choice = Choice::control_vector(Path::new("cv/toxic.gguf"));
        [1, 4, 9].into_iter().for_each(|layer| choice.count(layer, true));
        let expected = "3 directions of toxic.gguf: as a control vector (3 layers from 1 to 9)";
        assert_eq!(choice.to_string(), expected);
    }

    #[test]
    fn an_intervention_without_effect_is_reported() {
        assert_eq!(offsets().to_string(), "neuron offsets: nothing to change, all are 0");
    }
}
