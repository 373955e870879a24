//! Lists of neurons: reading and writing their files, and drawing random neurons for a control.
//!
//! A file has one of two forms:
//!
//! | form | recognised by |
//! |---|---|
//! | the paper's: `[[layer, index], …]` | an array |
//! | this program's, with the model's fingerprint, scores and tokens | an object with `"detox_gguf": "neurons"` |

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::fingerprint::Fingerprint;
use super::json;
use crate::error::{Error, Result};
use crate::file::write_atomic;
use crate::gguf::GgufFile;

/// One coordinate of an FFN's inner layer; `[layer, index]` in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "(u32, u32)", into = "(u32, u32)")]
pub struct Neuron {
    /// Block, from 0.
    pub layer: u32,
    /// Index among the block's `n_ff` neurons, from 0.
    pub index: u32,
}

impl From<(u32, u32)> for Neuron {
    fn from((layer, index): (u32, u32)) -> Neuron {
        Neuron { layer, index }
    }
}

impl From<Neuron> for (u32, u32) {
    fn from(neuron: Neuron) -> (u32, u32) {
        (neuron.layer, neuron.index)
    }
}

impl fmt::Display for Neuron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}]", self.layer, self.index)
    }
}

/// A neuron with its scores and the tokens it promotes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "Row", into = "Row")]
pub struct LocatedNeuron {
    /// Layer and index.
    pub neuron: Neuron,
    /// Cosine of its value vector with the probe vector.
    pub cosine: Option<f64>,
    /// Length of its value vector.
    pub norm: Option<f64>,
    /// Its mean activation over the prompts and tokens given in the file's settings.
    pub mean_activation: Option<f64>,
    /// Tokens that its value vector promotes, strongest first.
    pub tokens: Vec<String>,
}

impl From<Neuron> for LocatedNeuron {
    fn from(neuron: Neuron) -> LocatedNeuron {
        LocatedNeuron { neuron, cosine: None, norm: None, mean_activation: None, tokens: Vec::new() }
    }
}

/// The JSON form of a [`LocatedNeuron`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    layer: u32,
    index: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cosine: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    norm: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mean_activation: Option<f64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tokens: Vec<String>,
}

impl From<Row> for LocatedNeuron {
    fn from(row: Row) -> LocatedNeuron {
        let Row { layer, index, cosine, norm, mean_activation, tokens } = row;
        LocatedNeuron { neuron: Neuron { layer, index }, cosine, norm, mean_activation, tokens }
    }
}

impl From<LocatedNeuron> for Row {
    fn from(located: LocatedNeuron) -> Row {
        let LocatedNeuron { neuron, cosine, norm, mean_activation, tokens } = located;
        Row { layer: neuron.layer, index: neuron.index, cosine, norm, mean_activation, tokens }
    }
}

/// Neurons, and how they were chosen.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NeuronFile {
    /// The model they were located in; `None` if the file does not say (the paper's form never does).
    pub fingerprint: Option<Fingerprint>,
    /// How they were located; empty if the file does not say.
    pub settings: Map<String, Value>,
    /// At least one, without repeats, in the file's order (by rank if `locate` wrote it).
    pub neurons: Vec<LocatedNeuron>,
}

/// Value of `"detox_gguf"` in a neuron file.
pub(super) const KIND: &str = "neurons";

/// The JSON form of this program's files.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    detox_gguf: String,
    format: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<Fingerprint>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    settings: Map<String, Value>,
    neurons: Vec<LocatedNeuron>,
}

impl NeuronFile {
    /// Reads a file of either form.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] for any other content, an empty list, or a repeated neuron.
    pub fn read(path: &Path) -> Result<NeuronFile> {
        let text = json::read_text(path)?;
        let file = if text.trim_start().starts_with('[') {
            let what = "[[layer, index], …], two whole numbers from 0 for each neuron";
            let neurons: Vec<Neuron> = json::parse(path, &text, what)?;
            NeuronFile {
                neurons: neurons.into_iter().map(LocatedNeuron::from).collect(),
                ..Default::default()
            }
        } else {
            let form: Form = json::parse_kind(path, &text, KIND, "a neuron file")?;
            NeuronFile { fingerprint: form.model, settings: form.settings, neurons: form.neurons }
        };
        check_list(&file.neurons()).map_err(|reason| Error::input(path, None, reason))?;
        check_scores(&file.neurons).map_err(|reason| Error::input(path, None, reason))?;
        Ok(file)
    }

    /// Reads a file of either form and checks it against `model`.
    ///
    /// `force` accepts neurons located in another quantisation or fine-tune of the model.
    ///
    /// # Errors
    /// Those of [`NeuronFile::read`], [`NeuronFile::check_against`] and [`Fingerprint::check`].
    pub fn read_for(path: &Path, model: &GgufFile, force: bool) -> Result<NeuronFile> {
        let file = NeuronFile::read(path)?;
        file.check_against(&model.n_ff_per_layer()?, path)?;
        if let Some(fingerprint) = &file.fingerprint {
            fingerprint.check(&Fingerprint::of(model)?, "neurons", path, force)?;
        }
        Ok(file)
    }

    /// Writes this program's form, atomically.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] for a list that [`NeuronFile::read`] would refuse, and for a score
    /// that is not finite, which JSON cannot represent.
    pub fn write(&self, path: &Path) -> Result<()> {
        check_list(&self.neurons()).map_err(|reason| Error::input(path, None, reason))?;
        check_scores(&self.neurons).map_err(|reason| Error::input(path, None, reason))?;
        let form = Form {
            detox_gguf: KIND.to_owned(),
            format: json::FORMAT,
            model: self.fingerprint.clone(),
            settings: self.settings.clone(),
            neurons: self.neurons.clone(),
        };
        write_atomic(path, &json::to_bytes(&form)?)
    }

    /// The neurons without their scores, in the file's order.
    pub fn neurons(&self) -> Vec<Neuron> {
        self.neurons.iter().map(|located| located.neuron).collect()
    }

    /// Checks that a model has all these neurons.
    ///
    /// `n_ff`, shape `[n_layer]`, is the model's; `path` is this file, for messages.
    ///
    /// # Errors
    /// [`Error::Input`] that names the first neuron the model does not have.
    pub fn check_against(&self, n_ff: &[u32], path: &Path) -> Result<()> {
        check_range(&self.neurons(), n_ff).map_err(|reason| Error::input(path, None, reason))
    }
}

/// Refuses scores that no neuron can have.
fn check_scores(neurons: &[LocatedNeuron]) -> Result<(), String> {
    for LocatedNeuron { neuron, cosine, norm, mean_activation, .. } in neurons {
        // Rounding can bring a cosine just above 1.
        let is_cosine = cosine.is_none_or(|x| x.abs() <= 1.0 + 1e-6);
        let is_norm = norm.is_none_or(|x| x.is_finite() && x >= 0.0);
        let is_activation = mean_activation.is_none_or(f64::is_finite);
        let fault = [
            (is_cosine, "a cosine from -1 to 1", cosine),
            (is_norm, "a finite norm of at least 0", norm),
            (is_activation, "a finite mean activation", mean_activation),
        ];
        if let Some((_, expected, found)) = fault.into_iter().find(|(is_right, ..)| !is_right) {
            let found = found.unwrap_or(f64::NAN);
            return Err(format!("neuron {neuron}: expected {expected}, found {found}"));
        }
    }
    Ok(())
}

/// Refuses an empty list and a repeated neuron.
pub(super) fn check_list(neurons: &[Neuron]) -> Result<(), String> {
    if neurons.is_empty() {
        return Err("expected at least one neuron, found an empty list".into());
    }
    let mut seen = HashSet::with_capacity(neurons.len());
    match neurons.iter().position(|neuron| !seen.insert(*neuron)) {
        Some(at) => Err(format!("neuron {} occurs twice, again as entry {}", neurons[at], at + 1)),
        None => Ok(()),
    }
}

/// Checks that a model with `n_ff`, shape `[n_layer]`, has all these neurons.
pub(super) fn check_range(neurons: &[Neuron], n_ff: &[u32]) -> Result<(), String> {
    for (i, neuron) in neurons.iter().enumerate() {
        let fault = |expected: String| Err(format!("neuron {neuron}, entry {}: expected {expected}", i + 1));
        match n_ff.get(neuron.layer as usize) {
            None => return fault(format!("a layer below {}", n_ff.len())),
            Some(&n_ff) if neuron.index >= n_ff => {
                return fault(format!("an index below {n_ff} in layer {}", neuron.layer));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Draws random neurons as a control: in each layer as many as `chosen` has there, none of them chosen.
///
/// The result is sorted by layer and index. `n_ff` has shape `[n_layer]`. A neuron that occurs twice in
/// `chosen` counts once. The neurons drawn in a layer depend only on the seed, the draw, the layer, and the
/// neurons chosen in that layer.
///
/// # Errors
/// [`Error::Setting`] if a layer has too few other neurons, or lacks a chosen neuron.
pub fn random_neurons(chosen: &[Neuron], n_ff: &[u32], seed: u64, draw: u32) -> Result<Vec<Neuron>> {
    let refuse = |reason: String| Error::setting("random neurons", reason);
    check_range(chosen, n_ff).map_err(refuse)?;
    let mut by_layer: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for neuron in chosen {
        by_layer.entry(neuron.layer).or_default().insert(neuron.index);
    }
    let mut drawn = Vec::with_capacity(chosen.len());
    for (layer, taken) in by_layer {
        let n_ff = n_ff[layer as usize];
        let mut others: Vec<u32> = (0..n_ff).filter(|index| !taken.contains(index)).collect();
        if others.len() < taken.len() {
            return Err(refuse(format!(
                "expected {0} other neurons in layer {layer}, found {1}: {0} of its {n_ff} are chosen",
                taken.len(),
                others.len()
            )));
        }
        let mut random = layer_stream(seed, draw, layer);
        for i in 0..taken.len() {
            // First steps of a Fisher-Yates shuffle. The high half of a 64 x 64 bit product is uniform to
            // within n / 2^64.
            let n = (others.len() - i) as u128;
            let step = (u128::from(random.next_u64()) * n) >> 64;
            others.swap(i, i + step as usize);
        }
        others.truncate(taken.len());
        others.sort_unstable();
        drawn.extend(others.into_iter().map(|index| Neuron { layer, index }));
    }
    Ok(drawn)
}

fn layer_stream(seed: u64, draw: u32, layer: u32) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(b"detox-gguf random neurons 1\0");
    hash.update(seed.to_le_bytes());
    hash.update(draw.to_le_bytes());
    hash.update(layer.to_le_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &str) -> Result<NeuronFile> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("neurons.json");
        std::fs::write(&path, content).unwrap();
        NeuronFile::read(&path)
    }

    fn neuron(layer: u32, index: u32) -> Neuron {
        Neuron { layer, index }
    }

    fn ours(neurons: &str) -> String {
        format!("{{\"detox_gguf\": \"neurons\", \"format\": 1, \"neurons\": {neurons}}}")
    }

    #[test]
    fn the_papers_form_is_read_in_its_order() {
        let file = read("[[13, 2337],\n [0, 7248]]").unwrap();
        assert_eq!(file.neurons(), [neuron(13, 2337), neuron(0, 7248)]);
        assert_eq!((file.fingerprint, file.neurons[0].cosine), (None, None));
    }

    #[test]
    fn a_written_file_is_read_back_unchanged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("neurons.json");
        let model = crate::gguf::GgufFile::open("gguf/tiny/llama.gguf").unwrap();
        let file = NeuronFile {
            fingerprint: Some(Fingerprint::of(&model).unwrap()),
            settings: [("top".to_owned(), Value::from(100))].into_iter().collect(),
            neurons: vec![
                LocatedNeuron {
                    cosine: Some(0.1 + 0.2),
                    norm: Some(1.0),
                    mean_activation: Some(-0.5),
                    tokens: vec!["a\"\u{e9}".into(), "\n".into()],
                    ..neuron(2, 5).into()
                },
                neuron(0, 1).into(),
            ],
        };
        file.write(&path).unwrap();
        assert_eq!(NeuronFile::read(&path).unwrap(), file);
    }

    #[test]
    fn missing_scores_are_none() {
        let file = read(&ours("[{\"layer\": 2, \"index\": 3}]")).unwrap();
        assert_eq!(file.neurons, [LocatedNeuron::from(neuron(2, 3))]);
    }

    #[test]
    fn rejects_invalid_layers_and_indices_and_names_the_line() {
        for bad in ["-1", "1.5", "\"1\"", "null", "4294967296", "1e3"] {
            for content in [
                format!("[[0, 1],\n[{bad}, 2]]"),
                format!("[[0, 1],\n[2, {bad}]]"),
                ours(&format!("[\n{{\"layer\": {bad}, \"index\": 2}}]")),
            ] {
                let error = read(&content).unwrap_err();
                assert!(matches!(error, Error::Input { line: Some(2), .. }), "{content}: {error}");
            }
        }
    }

    #[test]
    fn rejects_entries_that_are_not_pairs() {
        for content in ["[[0]]", "[[0, 1, 2]]", "[0, 1]", "[[0, 1], {}]"] {
            let error = read(content).unwrap_err().to_string();
            assert!(error.contains("[[layer, index], …]"), "{error}");
        }
    }

    #[test]
    fn rejects_content_that_is_not_a_list_of_neurons() {
        for content in ["", "not json", "[[0, 1]", "{}", "3", "{\"neurons\": [[0, 1]]}", "[[0, 1]] [[0, 2]]"]
        {
            assert!(matches!(read(content), Err(Error::Input { .. })), "{content}");
        }
        let other = "{\"detox_gguf\": \"interventions\", \"format\": 1}";
        assert!(read(other).unwrap_err().to_string().contains("found \"interventions\""));
        let misspelt = ours("[{\"layer\": 0, \"index\": 1, \"cosin\": 1}]");
        assert!(read(&misspelt).unwrap_err().to_string().contains("cosin"));
    }

    #[test]
    fn rejects_an_empty_list() {
        for content in ["[]".to_owned(), ours("[]")] {
            assert!(read(&content).unwrap_err().to_string().contains("at least one neuron"));
        }
    }

    #[test]
    fn rejects_a_neuron_that_occurs_twice() {
        let error = read("[[0, 1], [1, 0], [0, 1]]").unwrap_err().to_string();
        assert!(error.ends_with("neuron [0, 1] occurs twice, again as entry 3"), "{error}");
    }

    #[test]
    fn rejects_neurons_that_the_model_does_not_have() {
        let (file, path) = (read("[[0, 7], [1, 8]]").unwrap(), Path::new("n.json"));
        file.check_against(&[8, 9], path).unwrap();
        let error = file.check_against(&[8, 8], path).unwrap_err().to_string();
        assert_eq!(error, "n.json: neuron [1, 8], entry 2: expected an index below 8 in layer 1");
        let error = file.check_against(&[8], path).unwrap_err().to_string();
        assert_eq!(error, "n.json: neuron [1, 8], entry 2: expected a layer below 1");
    }

    #[test]
    fn rejects_scores_that_json_cannot_represent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("neurons.json");
        let located = LocatedNeuron { cosine: Some(f64::NAN), ..neuron(0, 1).into() };
        let file = NeuronFile { neurons: vec![located], ..Default::default() };
        assert!(file.write(&path).unwrap_err().to_string().contains("found NaN"));
        assert!(!path.exists());
    }

    #[test]
    fn random_neurons_match_the_layers_of_the_chosen_and_exclude_them() {
        let chosen = [neuron(2, 5), neuron(0, 1), neuron(2, 0), neuron(2, 5)];
        let n_ff = [4, 4, 100];
        let drawn = random_neurons(&chosen, &n_ff, 7, 0).unwrap();
        assert_eq!(drawn.iter().map(|n| n.layer).collect::<Vec<_>>(), [0, 2, 2]);
        assert!(drawn.iter().all(|n| !chosen.contains(n)));
        assert_ne!(drawn[1], drawn[2]);
        assert_eq!(drawn, random_neurons(&chosen, &n_ff, 7, 0).unwrap());
        assert_ne!(drawn, random_neurons(&chosen, &n_ff, 7, 1).unwrap());
        assert_ne!(drawn, random_neurons(&chosen, &n_ff, 8, 0).unwrap());
        // The draw in a layer does not depend on the neurons chosen in other layers.
        assert_eq!(drawn[0], random_neurons(&chosen[1..2], &n_ff, 7, 0).unwrap()[0]);
    }

    #[test]
    fn every_other_neuron_is_drawn_equally_often() {
        // One of three other neurons, drawn 3000 times: 1000 each, with a standard error of sqrt(3000 * 2/9) = 26.
        let mut counts = [0u32; 4];
        for draw in 0..3000 {
            counts[random_neurons(&[neuron(0, 2)], &[4], 1, draw).unwrap()[0].index as usize] += 1;
        }
        assert_eq!(counts[2], 0);
        assert!([0, 1, 3].into_iter().all(|i| counts[i].abs_diff(1000) < 104), "{counts:?}");
    }

    #[test]
    fn a_layer_with_just_enough_other_neurons_gives_all_of_them() {
        let drawn = random_neurons(&[neuron(0, 1), neuron(0, 2)], &[4], 0, 0).unwrap();
        assert_eq!(drawn, [neuron(0, 0), neuron(0, 3)]);
    }

    #[test]
    fn rejects_a_layer_with_too_few_other_neurons() {
        let chosen = [neuron(0, 1), neuron(0, 2)];
        let error = random_neurons(&chosen, &[3], 0, 0).unwrap_err().to_string();
        assert!(
            error.contains("expected 2 other neurons in layer 0, found 1: 2 of its 3 are chosen"),
            "{error}"
        );
        assert!(random_neurons(&chosen, &[2], 0, 0).is_err());
    }
}
