//! From what a user asks for to what llama.cpp is told: the cheapest exact way.
//!
//! A block runs in this order, and every way of steering acts at one place of it:
//!
//! ```text
//! neuron activations ─► ffn_down (+ LoRA) ─► + residual stream ─► + control vector ─► l_out
//!    callback: neurons                                             no cost             callback: directions
//! ```
//!
//! An offset `d` on neuron `i` at every token adds `d * W_down[:, i]`, a constant, to the residual stream;
//! so does an offset along a direction. Constants are moved to the control vector, which costs next to nothing,
//! unless that would change the result: layer 0 has no control vector; a norm, or a scale of quantised
//! weights, may stand behind `ffn_down`; prompt and generation may differ; and an edit that is no offset
//! may stand before or after it in the list, see `is_movable`.
//!
//! Edits of one place are made in the order of the list. Between places the block's own order holds: an edit
//! of neurons comes before every edit along directions of its layer, wherever it stands in the list.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::argument::SteerFile;
use super::control_vector::{ControlVectorFile, Rows, resolve_layer_range};
use super::fingerprint::Fingerprint;
use super::intervention::{Intervention, Interventions, Target};
use super::neuron::{self, Neuron};
use super::value_vector::ValueVectors;
use super::{choice::Choice, lora};
use crate::error::{Error, Result};
use crate::gguf::GgufFile;
use crate::graph::architecture::Architecture;
use crate::graph::steering::{Change, Edit, LoraScaled, Operation, Steering, When};

/// How to compile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CompileOptions {
    /// `--control-vector-layer-range START END`: of control-vector files. Interventions have layers of their own.
    pub layer_range: Option<(i32, i32)>,
    /// Which ways may be taken.
    pub route: Route,
    /// Allow what was made for other weights of the same architecture and sizes.
    pub force: bool,
}

/// Which ways may be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Route {
    /// The control vector for all that it can do exactly, else the callback.
    #[default]
    Cheapest,
    /// The callback for everything: to compare with, and for sessions that steer only some sequences.
    Callback,
}

/// What llama.cpp is told, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Compiled {
    /// What llama.cpp is told.
    pub steering: Steering,
    /// Sentences for the user: which way each part goes.
    pub choices: Vec<String>,
}

/// Checks everything against the model, and finds the cheapest exact way.
///
/// `sources`, each with the coefficient that was typed beside it, act in their order: those of
/// `--control-vector` first, then those of `--steer`. What changes nothing (an offset or coefficient of 0)
/// leaves nothing in the result.
///
/// # Errors
/// All that [`Fingerprint::check`], [`ControlVectorFile::check_sizes`] and [`lora::check`] refuse;
/// [`Error::Input`] for neurons that the model has not, or a direction of zeros to project on;
/// [`Error::Model`] where neurons, or anything that needs the callback, are asked for on an architecture
/// that is not known; [`Error::Setting`] for a coefficient that is not finite, or a range without effect.
pub fn compile(
    model: &GgufFile,
    sources: &[(SteerFile, f32)],
    loras: &[LoraScaled],
    options: &CompileOptions,
) -> Result<Compiled> {
    for lora in loras {
        lora::check(lora, model)?;
    }
    let loras: Vec<LoraScaled> = loras.iter().filter(|lora| lora.scale != 0.0).cloned().collect();
    let has_control_vector = sources.iter().any(|(file, _)| matches!(file, SteerFile::ControlVector(_)));
    if options.layer_range.is_some() && !has_control_vector {
        let reason = "expected a control vector to limit, found none";
        return Err(Error::setting("--control-vector-layer-range", reason));
    }

    let mut plan = Plan::new(model, options)?;
    for (file, coefficient) in sources {
        if !coefficient.is_finite() {
            let reason =
                format!("expected a finite coefficient for {}, found {coefficient}", file.path().display());
            return Err(Error::setting("coefficient", reason));
        }
        match file {
            SteerFile::ControlVector(file) => plan.add_control_vector(file, *coefficient)?,
            SteerFile::Interventions(interventions) => plan.add_interventions(interventions, *coefficient)?,
        }
    }
    plan.finish(loras)
}

/// What offsets on neurons add to the residual stream, by layer, each `n_embd` long: for `--bake`, and for
/// writing a control vector, which layer 0 has to be left out of. LoRA adapters are counted in.
///
/// # Errors
/// [`Error::Model`] where the architecture is not known, or what a neuron writes is not added as it is;
/// [`Error::Setting`] for neurons that the model has not, and for sums that are not finite.
pub fn layer_vectors(
    model: &GgufFile,
    offsets: &[(Neuron, f32)],
    loras: &[LoraScaled],
) -> Result<BTreeMap<usize, Vec<f32>>> {
    let architecture = Architecture::require(model.architecture()?, model.path())?;
    let neurons: Vec<Neuron> = offsets.iter().map(|(neuron, _)| *neuron).collect();
    neuron::check_range(&neurons, &model.n_ff_per_layer()?)
        .map_err(|reason| Error::setting("neuron offsets", reason))?;
    let mut weights: BTreeMap<usize, BTreeMap<usize, f32>> = BTreeMap::new();
    for (neuron, offset) in offsets {
        let layer = neuron.layer as usize;
        if !is_added_as_it_is(model, architecture, layer) {
            return Err(Error::model(
                model.path(),
                format!("what the neurons of layer {layer} write is scaled or normed before it is added"),
            )
            .with_hint("steer it while it runs: that goes by the callback"));
        }
        *weights.entry(layer).or_default().entry(neuron.index as usize).or_default() += offset;
    }
    let value_vectors = ValueVectors::open(model)?;
    let mut vectors = BTreeMap::new();
    for (layer, weights) in weights {
        let weights: Vec<(usize, f32)> = weights.into_iter().filter(|(_, weight)| *weight != 0.0).collect();
        if weights.is_empty() {
            continue;
        }
        let vector = value_vectors.weighted_sum_with_loras(layer, &weights, loras)?;
        if vector.iter().any(|value| !value.is_finite()) {
            let reason = format!("what they add in layer {layer} exceeds the largest f32, {:e}", f32::MAX);
            return Err(Error::setting("neuron offsets", reason));
        }
        vectors.insert(layer, vector);
    }
    Ok(vectors)
}

/// Whether the output of `ffn_down` reaches the residual stream without a norm or a scale.
fn is_added_as_it_is(model: &GgufFile, architecture: &Architecture, layer: usize) -> bool {
    // build_ffn multiplies by this tensor, which comes with NVFP4, behind the adapters and the bias.
    let has_scale = model.tensor(&format!("blk.{layer}.ffn_down.scale")).is_some();
    !architecture.norm_after_ffn && !has_scale
}

/// Everything asked for, as edits in order, before ways are chosen.
struct Plan<'a> {
    model: &'a GgufFile,
    options: &'a CompileOptions,
    /// `None` for an architecture that neither neurons nor the callback know.
    architecture: Option<&'static Architecture>,
    n_layer: usize,
    n_embd: usize,
    /// Read from the model when the first file has one to compare with.
    fingerprint: Option<Fingerprint>,
    /// Each with the index of its choice.
    edits: Vec<(Edit, usize)>,
    choices: Vec<Choice>,
}

impl<'a> Plan<'a> {
    fn new(model: &'a GgufFile, options: &'a CompileOptions) -> Result<Plan<'a>> {
        // Blocks that predict further tokens are no part of the trunk: llama.cpp counts them apart, and
        // has no control vector for them.
        let n_nextn = model.u32_if_present(&model.arch_key("nextn_predict_layers")?)?.unwrap_or(0);
        Ok(Plan {
            model,
            options,
            architecture: Architecture::find(model.architecture()?),
            n_layer: model.n_layer()?.saturating_sub(n_nextn) as usize,
            n_embd: model.n_embd()? as usize,
            fingerprint: None,
            edits: Vec::new(),
            choices: Vec::new(),
        })
    }

    fn require_architecture(&self) -> Result<&'static Architecture> {
        Architecture::require(self.model.architecture()?, self.model.path())
    }

    fn fingerprint(&mut self) -> Result<&Fingerprint> {
        if self.fingerprint.is_none() {
            self.fingerprint = Some(Fingerprint::of(self.model)?);
        }
        Ok(self.fingerprint.as_ref().expect("it was set in the line above if it was none"))
    }

    fn check_control_vector(&mut self, file: &ControlVectorFile) -> Result<()> {
        let force = self.options.force;
        // Origin first: that it is for another model says more than that a length differs.
        file.check_origin(self.fingerprint()?, force)?;
        file.check_sizes(self.n_layer, self.n_embd)
    }

    fn add_control_vector(&mut self, file: &ControlVectorFile, coefficient: f32) -> Result<()> {
        self.check_control_vector(file)?;
        let range = resolve_layer_range(self.options.layer_range, self.n_layer)?;
        if !file.directions.keys().any(|layer| range.contains(layer)) {
            let (start, end, name) = (range.start(), range.end(), file.path.display());
            let reason = format!("expected some directions of {name} in layers {start} to {end}, found none");
            return Err(Error::setting("--control-vector-layer-range", reason));
        }
        let choice = self.choices.len();
        self.choices.push(Choice::control_vector(&file.path));
        for (&layer, direction) in file.directions.iter().filter(|(layer, _)| range.contains(layer)) {
            let change =
                Change::Direction { vector: direction.clone(), operation: Operation::Offset(coefficient) };
            self.edits.push((Edit { layer, when: When::Both, coefficient: 1.0, change }, choice));
        }
        Ok(())
    }

    fn add_interventions(&mut self, interventions: &Interventions, coefficient: f32) -> Result<()> {
        let force = self.options.force;
        if let Some(made_for) = &interventions.fingerprint {
            made_for.check(self.fingerprint()?, "interventions", &interventions.path, force)?;
        }
        for intervention in &interventions.list {
            let coefficient = coefficient * intervention.coefficient();
            if !coefficient.is_finite() {
                let path = interventions.path.display();
                let reason = format!("times that in {path} it exceeds the largest f32, {:e}", f32::MAX);
                return Err(Error::setting("coefficient", reason));
            }
            let choice = self.choices.len();
            self.choices.push(Choice::intervention(intervention));
            let edit =
                |layer, change| (Edit { layer, when: intervention.when(), coefficient, change }, choice);
            let operation = intervention.operation();
            match intervention.target() {
                Target::Neurons(neurons) => {
                    self.check_neurons(neurons, intervention, &interventions.path)?;
                    let acted_on = neurons.iter().filter(|n| intervention.acts_on(n.layer as usize));
                    self.edits.extend(acted_on.map(|n| {
                        let change = Change::Neuron { index: n.index as usize, operation };
                        edit(n.layer as usize, change)
                    }));
                }
                Target::Directions(directions) => {
                    self.check_control_vector(&directions.file)?;
                    let directions = directions.file.directions.iter();
                    for (&layer, vector) in directions.filter(|(layer, _)| intervention.acts_on(**layer)) {
                        let is_zero = vector.iter().all(|&value| value == 0.0);
                        if is_zero && !matches!(operation, Operation::Offset(_)) {
                            let reason = format!("direction.{layer}: expected a direction, found only zeros");
                            return Err(Error::input(&interventions.path, None, reason));
                        }
                        let change = Change::Direction { vector: vector.clone(), operation };
                        self.edits.push(edit(layer, change));
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether the model has these neurons, in FFNs that are not mixtures of experts.
    fn check_neurons(&self, neurons: &[Neuron], intervention: &Intervention, path: &Path) -> Result<()> {
        self.require_architecture()?;
        let n_ff = self.model.n_ff_per_layer()?;
        neuron::check_range(neurons, &n_ff).map_err(|reason| Error::input(path, None, reason))?;
        for neuron in neurons.iter().filter(|n| intervention.acts_on(n.layer as usize)) {
            let name = format!("blk.{}.ffn_down.weight", neuron.layer);
            if self.model.tensor(&name).is_none() {
                return Err(Error::model(
                    self.model.path(),
                    format!("layer {} has no neurons to name: no tensor {name:?}", neuron.layer),
                )
                .with_hint("neurons of mixtures of experts cannot be steered; directions can"));
            }
        }
        Ok(())
    }

    /// Chooses a way for each edit.
    fn finish(mut self, loras: Vec<LoraScaled>) -> Result<Compiled> {
        let mut edits = std::mem::take(&mut self.edits);
        edits.retain(|(edit, _)| !changes_nothing(edit));
        let order = Order::of(&edits);
        let mut rows = Rows::new(self.n_layer, self.n_embd);
        let mut neuron_offsets = Vec::new();
        let mut callback = Vec::new();
        for (position, (edit, choice)) in edits.into_iter().enumerate() {
            let is_moved = self.options.route == Route::Cheapest
                && is_movable(self.model, self.architecture, &order, &edit, position);
            check_finite(&edit)?;
            self.choices[choice].count(edit.layer, is_moved);
            match edit.change {
                Change::Neuron { index, operation: Operation::Offset(offset) } if is_moved => {
                    let neuron = Neuron { layer: edit.layer as u32, index: index as u32 };
                    neuron_offsets.push((neuron, offset * edit.coefficient));
                }
                Change::Direction { vector, operation: Operation::Offset(offset) } if is_moved => {
                    rows.add(edit.layer, &vector, offset * edit.coefficient);
                }
                _ => callback.push(edit),
            }
        }
        if !callback.is_empty() {
            self.require_architecture()?;
        }
        if !neuron_offsets.is_empty() {
            for (layer, vector) in layer_vectors(self.model, &neuron_offsets, &loras)? {
                rows.add(layer, &vector, 1.0);
            }
        }
        let control_vector = if rows.is_zero() { None } else { Some(rows.finish()?) };
        let steering = Steering { loras, control_vector, edits: callback };
        Ok(Compiled { steering, choices: self.choices.iter().map(Choice::to_string).collect() })
    }
}

/// Whether an edit leaves every number as it is.
fn changes_nothing(edit: &Edit) -> bool {
    match &edit.change {
        Change::Neuron { operation: Operation::Offset(offset), .. } => offset * edit.coefficient == 0.0,
        Change::Direction { vector, operation: Operation::Offset(offset) } => {
            offset * edit.coefficient == 0.0 || vector.iter().all(|&value| value == 0.0)
        }
        _ => edit.coefficient == 0.0,
    }
}

/// Whether an offset is a finite number with its coefficient, and so is every number that it adds.
fn check_finite(edit: &Edit) -> Result<()> {
    let is_finite = match &edit.change {
        Change::Neuron { operation: Operation::Offset(offset), .. } => {
            (offset * edit.coefficient).is_finite()
        }
        Change::Direction { vector, operation: Operation::Offset(offset) } => {
            let step = offset * edit.coefficient;
            vector.iter().all(|value| (value * step).is_finite())
        }
        _ => true,
    };
    if is_finite {
        return Ok(());
    }
    let reason = format!("an offset in layer {} exceeds the largest f32 with it, {:e}", edit.layer, f32::MAX);
    Err(Error::setting("coefficient", reason))
}

/// Where in the list the edits stand that are no offsets, and so do not commute with offsets.
struct Order {
    /// The last one of each neuron, by layer and index.
    last_of_neuron: HashMap<(usize, usize), usize>,
    /// The first one along a direction in each layer.
    first_in_layer: HashMap<usize, usize>,
}

impl Order {
    fn of(edits: &[(Edit, usize)]) -> Order {
        let mut order = Order { last_of_neuron: HashMap::new(), first_in_layer: HashMap::new() };
        for (position, (edit, _)) in edits.iter().enumerate() {
            match edit.change {
                Change::Neuron { operation: Operation::Offset(_), .. }
                | Change::Direction { operation: Operation::Offset(_), .. } => {}
                Change::Neuron { index, .. } => {
                    order.last_of_neuron.insert((edit.layer, index), position);
                }
                Change::Direction { .. } => {
                    order.first_in_layer.entry(edit.layer).or_insert(position);
                }
            }
        }
        order
    }
}

/// Whether the control vector does the same as this edit, at `position` of the list.
///
/// The control vector acts after all edits of neurons and before all edits along directions. So an offset
/// on a neuron must not be followed by an edit of that neuron that is no offset, and an offset along a
/// direction must not be preceded by one in its layer: the components of two directions are not
/// independent, whichever they are.
fn is_movable(
    model: &GgufFile,
    architecture: Option<&'static Architecture>,
    order: &Order,
    edit: &Edit,
    position: usize,
) -> bool {
    if edit.layer == 0 || edit.when != When::Both {
        return false;
    }
    match edit.change {
        Change::Neuron { index, operation: Operation::Offset(_) } => {
            let is_last = order.last_of_neuron.get(&(edit.layer, index)).is_none_or(|&last| last < position);
            is_last && architecture.is_some_and(|known| is_added_as_it_is(model, known, edit.layer))
        }
        Change::Direction { operation: Operation::Offset(_), .. } => {
            order.first_in_layer.get(&edit.layer).is_none_or(|&first| first > position)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
