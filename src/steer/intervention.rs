//! Interventions: edits of neurons or along directions, and the file that lists them.
//!
//! ```json
//! {
//!   "detox_gguf": "interventions",
//!   "format": 1,
//!   "model": {"architecture": "gpt2", "n_layer": 24, …},
//!   "interventions": [
//!     {"what": {"neurons": [[13, 2337], [14, 6878]]}, "edit": {"offset": -2}, "when": "generation"},
//!     {"what": {"directions": {"path": "toxic.gguf", "sha256": "…"}}, "edit": "project", "layers": [8, 16]}
//!   ]
//! }
//! ```
//!
//! `edit` is `{"offset": x}`, `{"assign": x}`, `{"scale": x}` or `{"clamp": {"min": x, "max": x}}`. Directions
//! also take `"project"`, which assigns 0. Directions come from a control vector; its path is relative to the
//! folder of this file.
//!
//! Optional keys and their defaults: `model` (not checked), `when` ("both"), `layers` (all; otherwise
//! `[first, last]`, inclusive) and `coefficient` (1).

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::control_vector::ControlVectorFile;
use super::fingerprint::Fingerprint;
use super::json;
use super::neuron::{self, Neuron};
use crate::error::{Error, Result};
use crate::file::write_atomic;
use crate::gguf::file_sha256;
use crate::graph::steering::{Operation, When};

/// The neurons or directions that an intervention edits.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// Neuron activations, after the non-linearity and gate.
    Neurons(Vec<Neuron>),
    /// The residual stream, along one direction in each layer.
    Directions(Box<Directions>),
}

/// A control vector that an intervention file refers to.
#[derive(Debug, Clone, PartialEq)]
pub struct Directions {
    /// Path as written in the intervention file, relative to that file's folder.
    pub path: PathBuf,
    /// SHA-256 of the control-vector file, in lower-case hex.
    pub sha256: String,
    /// Its content.
    pub file: ControlVectorFile,
}

/// One edit of the forward pass.
///
/// Only [`Intervention::new`] makes one, so its numbers are finite, its neurons distinct, and its layers in
/// order.
#[derive(Debug, Clone, PartialEq)]
pub struct Intervention {
    target: Target,
    operation: Operation,
    when: When,
    layers: Option<(u32, u32)>,
    coefficient: f32,
}

impl Intervention {
    /// Makes an intervention after the checks that need no model.
    ///
    /// `layers` (inclusive) limits the edit to a range of layers. `coefficient` is the fraction of the change
    /// that is applied.
    ///
    /// # Errors
    /// A message for a number that is not finite, `min` above `max`, an empty list of neurons, a neuron that
    /// occurs twice, or a range of layers without any of the neurons or directions.
    pub fn new(
        target: Target,
        operation: Operation,
        when: When,
        layers: Option<(u32, u32)>,
        coefficient: f32,
    ) -> Result<Intervention, String> {
        let numbers = match operation {
            Operation::Offset(x) => vec![("offset", x)],
            Operation::Assign(x) => vec![("assign", x)],
            Operation::Scale(x) => vec![("scale", x)],
            Operation::Clamp { min, max } => vec![("min", min), ("max", max)],
        };
        for (name, x) in numbers.into_iter().chain([("coefficient", coefficient)]) {
            if !x.is_finite() {
                return Err(format!(
                    "{name:?}: expected a finite number of at most {:e}, found {x}",
                    f32::MAX
                ));
            }
        }
        if let Operation::Clamp { min, max } = operation
            && min > max
        {
            return Err(format!("\"clamp\": expected min to be at most max, found {min} and {max}"));
        }
        if let Some((start, end)) = layers
            && start > end
        {
            return Err(format!("\"layers\": expected [first, last] in order, found [{start}, {end}]"));
        }
        if let Target::Neurons(neurons) = &target {
            neuron::check_list(neurons)?;
        }
        let intervention = Intervention { target, operation, when, layers, coefficient };
        if let Some((start, end)) = layers
            && intervention.is_empty()
        {
            return Err(format!(
                "\"layers\": expected a neuron or direction in layers {start} to {end}, found none"
            ));
        }
        Ok(intervention)
    }

    /// Makes the paper's intervention: an offset on neurons, at every token.
    ///
    /// # Errors
    /// As [`Intervention::new`].
    pub fn neuron_offset(neurons: Vec<Neuron>, offset: f32) -> Result<Intervention, String> {
        Intervention::new(Target::Neurons(neurons), Operation::Offset(offset), When::Both, None, 1.0)
    }

    fn is_empty(&self) -> bool {
        match &self.target {
            Target::Neurons(neurons) => !neurons.iter().any(|n| self.acts_on(n.layer as usize)),
            Target::Directions(directions) => {
                !directions.file.directions.keys().any(|&layer| self.acts_on(layer))
            }
        }
    }

    /// The neurons or directions; only those in layers that pass [`Intervention::acts_on`] are edited.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// How a neuron activation, or the component along a direction, is changed.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// The tokens it acts on.
    pub fn when(&self) -> When {
        self.when
    }

    /// Whether its range of layers includes `layer`.
    pub fn acts_on(&self, layer: usize) -> bool {
        self.layers.is_none_or(|(start, end)| (start as usize..=end as usize).contains(&layer))
    }

    /// Returns a copy with its coefficient multiplied by `coefficient`.
    ///
    /// # Errors
    /// As [`Intervention::new`], if the product is not finite.
    pub fn times(&self, coefficient: f32) -> Result<Intervention, String> {
        let Intervention { target, operation, when, layers, coefficient: own } = self.clone();
        Intervention::new(target, operation, when, layers, own * coefficient)
    }

    /// The fraction of the change that is applied.
    pub fn coefficient(&self) -> f32 {
        self.coefficient
    }
}

/// Interventions in the order in which they are applied, and the model they are for.
#[derive(Debug, Clone, PartialEq)]
pub struct Interventions {
    /// The file they were read from, for messages.
    pub path: PathBuf,
    /// The model they were made for; `None` if the file does not say.
    pub fingerprint: Option<Fingerprint>,
    /// At least one.
    pub list: Vec<Intervention>,
}

/// Value of `"detox_gguf"` in an intervention file.
pub(super) const KIND: &str = "interventions";

/// The JSON form of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    detox_gguf: String,
    format: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<Fingerprint>,
    interventions: Vec<InterventionForm>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InterventionForm {
    what: TargetForm,
    edit: EditForm,
    #[serde(default)]
    when: When,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layers: Option<(u32, u32)>,
    #[serde(default = "one")]
    coefficient: f32,
}

fn one() -> f32 {
    1.0
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum TargetForm {
    Neurons(Vec<Neuron>),
    Directions(DirectionsForm),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DirectionsForm {
    path: PathBuf,
    sha256: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum EditForm {
    Offset(f32),
    Assign(f32),
    Scale(f32),
    Clamp(ClampForm),
    Project,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClampForm {
    min: f32,
    max: f32,
}

impl Interventions {
    /// The start of every file that [`Interventions::write`] writes, by which it is recognised.
    pub const FILE_START: &str = "{\n  \"detox_gguf\": \"interventions\",";

    /// Reads an intervention file and the control vectors it refers to.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`], with the line or the number of the intervention, if the JSON is not of
    /// this form, if [`Intervention::new`] refuses it, or if a control vector has changed; those of
    /// [`ControlVectorFile::read`].
    pub fn read(path: &Path) -> Result<Interventions> {
        let text = json::read_text(path)?;
        let form: Form = json::parse_kind(path, &text, KIND, "an intervention file")?;
        if form.interventions.is_empty() {
            return Err(Error::input(path, None, "expected at least one intervention, found none"));
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        let numbered = form.interventions.into_iter().enumerate();
        let list = numbered
            .map(|(i, form)| form.validate(folder, path, &format!("intervention {}", i + 1)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Interventions { path: path.to_path_buf(), fingerprint: form.model, list })
    }

    /// Writes the interventions to `path`, atomically.
    ///
    /// Paths of control vectors are written unchanged.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] if the list is empty.
    pub fn write(&self, path: &Path) -> Result<()> {
        if self.list.is_empty() {
            return Err(Error::input(path, None, "expected at least one intervention to write, found none"));
        }
        let form = Form {
            detox_gguf: KIND.to_owned(),
            format: json::FORMAT,
            model: self.fingerprint.clone(),
            interventions: self.list.iter().map(InterventionForm::of).collect(),
        };
        write_atomic(path, &json::to_bytes(&form)?)
    }
}

impl InterventionForm {
    /// Checks the form and opens its files; `path` and `place` ("intervention 2") are for messages.
    fn validate(self, folder: &Path, path: &Path, place: &str) -> Result<Intervention> {
        let refuse = |reason: String| Error::input(path, None, format!("{place}: {reason}"));
        let target = match self.what {
            TargetForm::Neurons(neurons) => Target::Neurons(neurons),
            TargetForm::Directions(form) => Target::Directions(Box::new(form.open(folder, path, place)?)),
        };
        let operation = match self.edit {
            EditForm::Offset(x) => Operation::Offset(x),
            EditForm::Assign(x) => Operation::Assign(x),
            EditForm::Scale(x) => Operation::Scale(x),
            EditForm::Clamp(ClampForm { min, max }) => Operation::Clamp { min, max },
            EditForm::Project if matches!(target, Target::Neurons(_)) => {
                let reason =
                    "\"project\" works on directions only: to switch neurons off, assign 0 or scale by 0";
                return Err(refuse(reason.into()));
            }
            EditForm::Project => Operation::Assign(0.0),
        };
        Intervention::new(target, operation, self.when, self.layers, self.coefficient).map_err(refuse)
    }

    fn of(intervention: &Intervention) -> InterventionForm {
        let is_directions = matches!(intervention.target, Target::Directions(_));
        InterventionForm {
            what: match &intervention.target {
                Target::Neurons(neurons) => TargetForm::Neurons(neurons.clone()),
                Target::Directions(directions) => TargetForm::Directions(DirectionsForm {
                    path: directions.path.clone(),
                    sha256: directions.sha256.clone(),
                }),
            },
            edit: match intervention.operation {
                Operation::Offset(x) => EditForm::Offset(x),
                Operation::Assign(0.0) if is_directions => EditForm::Project,
                Operation::Assign(x) => EditForm::Assign(x),
                Operation::Scale(x) => EditForm::Scale(x),
                Operation::Clamp { min, max } => EditForm::Clamp(ClampForm { min, max }),
            },
            when: intervention.when,
            layers: intervention.layers,
            coefficient: intervention.coefficient,
        }
    }
}

/// Paths of the control vectors that an intervention file refers to; none for any other file.
///
/// A pipe is not read: its content could not be read again.
pub fn referenced_files(path: &Path) -> Vec<PathBuf> {
    let text = if path.is_file() { json::read_text(path).ok() } else { None };
    let form = text.and_then(|text| serde_json::from_str::<Form>(&text).ok());
    let Some(form) = form else { return Vec::new() };
    let folder = path.parent().unwrap_or(Path::new(""));
    let targets = form.interventions.into_iter().map(|intervention| intervention.what);
    let directions = targets.filter_map(|target| match target {
        TargetForm::Directions(directions) => Some(folder.join(directions.path)),
        TargetForm::Neurons(_) => None,
    });
    directions.collect()
}

impl DirectionsForm {
    fn open(self, folder: &Path, path: &Path, place: &str) -> Result<Directions> {
        let full = folder.join(&self.path);
        let found = file_sha256(&full, |_, _| {})?;
        if !found.eq_ignore_ascii_case(&self.sha256) {
            let reason = format!(
                "{place}: expected {} to have sha256 {:?}, found {found:?}",
                full.display(),
                self.sha256
            );
            return Err(Error::input(path, None, reason).with_hint(
                "the control vector has changed: restore the old file, or enter the sha256 of the new one",
            ));
        }
        let file = ControlVectorFile::read(&full)?;
        Ok(Directions { path: self.path, sha256: found, file })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::gguf::{GgufFile, Metadata};
    use crate::steer::control_vector;

    fn file(interventions: &str) -> String {
        format!(
            "{{\"detox_gguf\": \"interventions\", \"format\": 1,\n\"interventions\": [\n{interventions}]}}"
        )
    }

    fn read(content: &str) -> Result<Interventions> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("steer.json");
        std::fs::write(&path, content).unwrap();
        Interventions::read(&path)
    }

    fn refusal(interventions: &str) -> String {
        read(&file(interventions)).unwrap_err().to_string()
    }

    fn with_edit(edit: &str) -> String {
        format!("{{\"what\": {{\"neurons\": [[0, 1]]}}, \"edit\": {edit}}}")
    }

    /// Makes a folder with `cv/toxic.gguf`, directions for layers 1 and 2 of the tiny llama, and its sha256.
    fn folder_with_directions() -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("cv")).unwrap();
        let path = folder.path().join("cv/toxic.gguf");
        let model = GgufFile::open("gguf/tiny/llama.gguf").unwrap();
        let fingerprint = Fingerprint::of(&model).unwrap();
        let direction = vec![1.0; fingerprint.n_embd as usize];
        let directions = BTreeMap::from([(1, direction.clone()), (2, direction)]);
        control_vector::write(&path, &fingerprint, &directions, &Metadata::new()).unwrap();
        let sha256 = file_sha256(&path, |_, _| {}).unwrap();
        (folder, sha256)
    }

    #[test]
    fn every_kind_of_edit_is_read() {
        for (edit, operation) in [
            ("{\"offset\": -2}", Operation::Offset(-2.0)),
            ("{\"assign\": 0.5}", Operation::Assign(0.5)),
            ("{\"scale\": 0}", Operation::Scale(0.0)),
            ("{\"clamp\": {\"min\": -1, \"max\": 0}}", Operation::Clamp { min: -1.0, max: 0.0 }),
        ] {
            let read = read(&file(&with_edit(edit))).unwrap();
            let [intervention] = read.list.as_slice() else { panic!("{read:?}") };
            assert_eq!(intervention.operation(), operation);
            assert_eq!((intervention.when(), intervention.coefficient()), (When::Both, 1.0));
            assert_eq!(intervention.target(), &Target::Neurons(vec![Neuron { layer: 0, index: 1 }]));
            assert!(intervention.acts_on(0) && intervention.acts_on(999));
        }
    }

    #[test]
    fn directions_are_relative_to_the_file_and_a_projection_assigns_zero() {
        let (folder, sha256) = folder_with_directions();
        let path = folder.path().join("steer.json");
        let one = format!(
            "{{\"what\": {{\"directions\": {{\"path\": \"cv/toxic.gguf\", \"sha256\": \"{sha256}\"}}}}, \
             \"edit\": \"project\", \"when\": \"prompt\", \"layers\": [2, 9], \"coefficient\": 0.5}}"
        );
        std::fs::write(&path, file(&one)).unwrap();
        let read = Interventions::read(&path).unwrap();
        let intervention = &read.list[0];
        assert_eq!(intervention.operation(), Operation::Assign(0.0));
        assert_eq!((intervention.when(), intervention.coefficient()), (When::Prompt, 0.5));
        assert_eq!([1, 2, 9, 10].map(|il| intervention.acts_on(il)), [false, true, true, false]);
        let Target::Directions(directions) = intervention.target() else { panic!("{read:?}") };
        assert_eq!(directions.file.directions.keys().collect::<Vec<_>>(), [&1, &2]);
    }

    #[test]
    fn a_written_file_is_read_back_unchanged() {
        let (folder, sha256) = folder_with_directions();
        let path = folder.path().join("steer.json");
        let full = folder.path().join("cv/toxic.gguf");
        let directions = Target::Directions(Box::new(Directions {
            path: "cv/toxic.gguf".into(),
            sha256,
            file: ControlVectorFile::read(&full).unwrap(),
        }));
        let neurons = vec![Neuron { layer: 2, index: 3 }, Neuron { layer: 0, index: 1 }];
        let clamp = Operation::Clamp { min: -0.1, max: 1e-20 };
        let list = vec![
            Intervention::neuron_offset(neurons.clone(), -0.3).unwrap(),
            Intervention::new(Target::Neurons(neurons), clamp, When::Generation, Some((0, 1)), 0.7).unwrap(),
            Intervention::new(directions, Operation::Assign(0.0), When::Both, None, 1.0).unwrap(),
        ];
        let model = GgufFile::open("gguf/tiny/llama.gguf").unwrap();
        let written =
            Interventions { path: path.clone(), fingerprint: Some(Fingerprint::of(&model).unwrap()), list };
        written.write(&path).unwrap();
        assert_eq!(Interventions::read(&path).unwrap(), written);
    }

    #[test]
    fn rejects_numbers_that_are_not_finite() {
        // JSON has no infinity, but a number can exceed f32 (3.4e38) or f64.
        for edit in ["{\"offset\": 1e39}", "{\"assign\": -1e39}", "{\"scale\": 1e400}", "{\"offset\": NaN}"] {
            assert!(refusal(&with_edit(edit)).contains(":3: "), "{edit}");
        }
        assert!(refusal(&with_edit("{\"clamp\": {\"min\": -1e39, \"max\": 0}}")).contains("out of range"));
        let neurons = Target::Neurons(vec![Neuron { layer: 0, index: 0 }]);
        for (offset, coefficient) in [(f32::NAN, 1.0), (1.0, f32::INFINITY)] {
            let offset = Operation::Offset(offset);
            assert!(Intervention::new(neurons.clone(), offset, When::Both, None, coefficient).is_err());
        }
    }

    #[test]
    fn rejects_a_clamp_whose_min_exceeds_its_max() {
        let message = refusal(&with_edit("{\"clamp\": {\"min\": 1, \"max\": -1}}"));
        assert!(message.ends_with("expected min to be at most max, found 1 and -1"), "{message}");
    }

    #[test]
    fn rejects_unknown_keys_and_names_the_line() {
        for (one, word) in [
            (with_edit("{\"ofset\": 1}"), "ofset"),
            (with_edit("{\"offset\": 1}").replace("edit", "edits"), "edits"),
            (with_edit("{\"offset\": 1}").replace("neurons", "neurones"), "neurones"),
            (with_edit("{\"offset\": 1}, \"when\": \"always\""), "always"),
            (with_edit("{\"offset\": 1}, \"strength\": 1"), "strength"),
            (with_edit("{\"clamp\": {\"min\": 0, \"max\": 1, \"x\": 2}}"), "x"),
            (with_edit("{\"offset\": 1, \"scale\": 2}"), "expected"),
            ("{\"edit\": \"project\"}".to_owned(), "what"),
        ] {
            let error = read(&file(&one)).unwrap_err();
            assert!(matches!(error, Error::Input { line: Some(3), .. }), "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn rejects_projecting_neurons() {
        assert!(refusal(&with_edit("\"project\"")).contains("assign 0"));
    }

    #[test]
    fn rejects_an_empty_list_and_a_repeated_neuron() {
        let of = |list: &str| format!("{{\"what\": {{\"neurons\": {list}}}, \"edit\": {{\"offset\": 1}}}}");
        assert!(refusal(&of("[]")).contains("at least one neuron"));
        assert!(refusal(&of("[[0, 1], [0, 1]]")).contains("[0, 1] occurs twice"));
        assert!(refusal("").contains("at least one intervention"));
    }

    #[test]
    fn rejects_layers_out_of_order_or_without_any_target() {
        let with_layers = |layers: &str| with_edit(&format!("{{\"offset\": 1}}, \"layers\": {layers}"));
        assert!(refusal(&with_layers("[3, 2]")).contains("found [3, 2]"));
        assert!(refusal(&with_layers("[1, 5]")).contains("in layers 1 to 5, found none"));
        assert!(refusal(&with_layers("[1]")).contains(":3: "));
        assert!(refusal(&with_layers("[-1, 5]")).contains(":3: "));
    }

    #[test]
    fn rejects_a_control_vector_that_has_changed_or_is_missing() {
        let (folder, sha256) = folder_with_directions();
        let path = folder.path().join("steer.json");
        let of = |cv: &str, sha256: &str| {
            let one = format!(
                "{{\"what\": {{\"directions\": {{\"path\": \"{cv}\", \"sha256\": \"{sha256}\"}}}}, \
                 \"edit\": \"project\"}}"
            );
            std::fs::write(&path, file(&one)).unwrap();
            Interventions::read(&path).unwrap_err()
        };
        let error = of("cv/toxic.gguf", &sha256.replace(|c: char| c.is_ascii_digit(), "a"));
        assert!(error.to_string().contains("intervention 1: expected"), "{error}");
        assert!(error.hint().is_some());
        assert!(matches!(of("cv/other.gguf", &sha256), Error::Io { .. }));
    }

    #[test]
    fn rejects_a_file_of_another_kind() {
        let neurons = "{\"detox_gguf\": \"neurons\", \"format\": 1, \"neurons\": []}";
        assert!(read(neurons).unwrap_err().to_string().contains("found \"neurons\""));
        assert!(read("[[0, 1]]").is_err());
    }
}
