//! Compiles interventions: picks the cheapest exact way to make each edit in llama.cpp.
//!
//! A block runs in this order. Each way of steering acts at one place in it:
//!
//! ```text
//! neuron activations ─► ffn_down (+ LoRA) ─► + residual stream ─► + control vector ─► l_out
//!    callback: neurons                                             no cost             callback: directions
//! ```
//!
//! An offset `d` on neuron `i` at every token adds the constant `d * W_down[:, i]` to the residual stream.
//! An offset along a direction adds a constant too. Such a constant moves to the control vector, which costs
//! next to nothing. It stays with the callback if moving it would change the result:
//!
//! - It is in layer 0, which has no control vector.
//! - A norm, or a scale of quantised weights, follows `ffn_down`.
//! - The intervention acts only on the prompt, or only on the generation.
//! - The list has another edit that is not an offset and does not commute with it; see `is_movable`.
//!
//! Edits at the same place are made in the order of the list. Across places, the block's own order holds:
//! all edits of neurons in a layer come before all edits along directions, whatever the order of the list.

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

/// Options of [`compile`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CompileOptions {
    /// `--control-vector-layer-range START END`. Limits control-vector files; interventions have their own `layers`.
    pub layer_range: Option<(i32, i32)>,
    /// Which ways of steering are allowed.
    pub route: Route,
    /// Accept files made for other weights of the same architecture and sizes.
    pub force: bool,
}

/// Which ways of steering are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Route {
    /// The control vector for every edit that it can make exactly, the callback for the rest.
    #[default]
    Cheapest,
    /// The callback for everything. For comparison, and for sessions that steer only some sequences.
    Callback,
}

/// Compiled steering, with the choices made.
#[derive(Debug, Clone, PartialEq)]
pub struct Compiled {
    /// The adapters, control vector and edits for the engine.
    pub steering: Steering,
    /// Sentences for the user: how each part is applied.
    pub choices: Vec<String>,
}

/// Checks everything against the model and picks the cheapest exact way for each edit.
///
/// Each source comes with the coefficient given on the command line. Sources act in their order: those of
/// `--control-vector` first, then those of `--steer`. Edits without effect (an offset or coefficient of 0)
/// are dropped.
///
/// # Errors
/// Those of [`Fingerprint::check`], [`ControlVectorFile::check_sizes`] and [`lora::check`].
/// [`Error::Input`] for a neuron that the model does not have, or a projection on a direction of zeros.
/// [`Error::Model`] if neurons, or an edit that needs the callback, are used on an unknown architecture.
/// [`Error::Setting`] for a coefficient that is not finite, or a layer range without effect.
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

/// Computes what neuron offsets add to the residual stream, by layer from 0.
///
/// Each vector has shape `[n_embd]`. The down projections include the given LoRA adapters.
///
/// # Errors
/// [`Error::Model`] if the architecture is unknown, or if the FFN output is scaled or normed before it is
/// added; [`Error::Setting`] for a neuron that the model does not have, and for a sum that is not finite.
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
        if !is_added_unchanged(model, architecture, layer) {
            return Err(Error::model(
                model.path(),
                format!("the FFN output of layer {layer} is scaled or normed before it is added"),
            )
            .with_hint("steer at run time with --steer, which uses the callback"));
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
            let reason = format!("their sum in layer {layer} exceeds the largest f32, {:e}", f32::MAX);
            return Err(Error::setting("neuron offsets", reason));
        }
        vectors.insert(layer, vector);
    }
    Ok(vectors)
}

/// Whether the output of `ffn_down` reaches the residual stream without a norm or a scale.
fn is_added_unchanged(model: &GgufFile, architecture: &Architecture, layer: usize) -> bool {
    // NVFP4 models have this tensor; build_ffn multiplies by it after the adapters and the bias.
    let has_scale = model.tensor(&format!("blk.{layer}.ffn_down.scale")).is_some();
    !architecture.norm_after_ffn && !has_scale
}

/// All edits in order, before a way is chosen for each.
struct Plan<'a> {
    model: &'a GgufFile,
    options: &'a CompileOptions,
    /// `None` for an unknown architecture, which supports neither neurons nor the callback.
    architecture: Option<&'static Architecture>,
    n_layer: usize,
    n_embd: usize,
    /// The model's, computed when the first file needs it.
    fingerprint: Option<Fingerprint>,
    /// Each edit with the index of its entry in `choices`.
    edits: Vec<(Edit, usize)>,
    choices: Vec<Choice>,
}

impl<'a> Plan<'a> {
    fn new(model: &'a GgufFile, options: &'a CompileOptions) -> Result<Plan<'a>> {
        // Blocks for multi-token prediction are not part of the trunk: llama.cpp counts them separately and
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
        Ok(self.fingerprint.as_ref().expect("set above if it was None"))
    }

    fn check_control_vector(&mut self, file: &ControlVectorFile) -> Result<()> {
        let force = self.options.force;
        // Origin first: "made for another model" explains more than "wrong length".
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
                let reason =
                    format!("its product with the one in {path} exceeds the largest f32, {:e}", f32::MAX);
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

    /// Checks that the model has these neurons, and that their FFNs are not mixtures of experts.
    fn check_neurons(&self, neurons: &[Neuron], intervention: &Intervention, path: &Path) -> Result<()> {
        self.require_architecture()?;
        let n_ff = self.model.n_ff_per_layer()?;
        neuron::check_range(neurons, &n_ff).map_err(|reason| Error::input(path, None, reason))?;
        for neuron in neurons.iter().filter(|n| intervention.acts_on(n.layer as usize)) {
            let name = format!("blk.{}.ffn_down.weight", neuron.layer);
            if self.model.tensor(&name).is_none() {
                return Err(Error::model(
                    self.model.path(),
                    format!(
                        "expected a tensor {name:?} for the neurons of layer {}, found none",
                        neuron.layer
                    ),
                )
                .with_hint("neurons of a mixture of experts cannot be steered; directions can"));
            }
        }
        Ok(())
    }

    /// Picks a way for each edit.
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

/// Whether an edit has no effect.
fn changes_nothing(edit: &Edit) -> bool {
    match &edit.change {
        Change::Neuron { operation: Operation::Offset(offset), .. } => offset * edit.coefficient == 0.0,
        Change::Direction { vector, operation: Operation::Offset(offset) } => {
            offset * edit.coefficient == 0.0 || vector.iter().all(|&value| value == 0.0)
        }
        _ => edit.coefficient == 0.0,
    }
}

/// Checks that an offset times its coefficient is finite, and so is every value that it adds.
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
    let reason =
        format!("its product with an offset in layer {} exceeds the largest f32, {:e}", edit.layer, f32::MAX);
    Err(Error::setting("coefficient", reason))
}

/// Positions of the edits that are not offsets, and so do not commute with offsets.
struct Order {
    /// The last such edit of each neuron, by layer and index.
    last_of_neuron: HashMap<(usize, usize), usize>,
    /// The first such edit along a direction, by layer.
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

/// Whether the control vector can replace this edit, at `position` in the list.
///
/// The control vector acts after all edits of neurons and before all edits along directions. So an offset
/// on a neuron can move only if all later edits of that neuron are offsets. An offset along a direction can
/// move only if all earlier edits along directions of its layer are offsets, because two directions are in
/// general not orthogonal.
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
            is_last && architecture.is_some_and(|known| is_added_unchanged(model, known, edit.layer))
        }
        Change::Direction { operation: Operation::Offset(_), .. } => {
            order.first_in_layer.get(&edit.layer).is_none_or(|&first| first > position)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
