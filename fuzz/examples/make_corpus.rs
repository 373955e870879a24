//! Writes the seeds of the fuzz targets, in this program's own formats: `cargo run --example make_corpus corpus`.
//!
//! The seeds of `rows` and `tokenizer_json` are text files, written by hand.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use detox_gguf::Result;
use detox_gguf::gguf::{GgufFile, Metadata, Value};
use detox_gguf::interp::probe::{Probe, ProbePlace};
use detox_gguf::steer::{Fingerprint, Neuron, NeuronFile, control_vector};
use detox_gguf_fuzz::{write, write_model};

fn main() -> Result<()> {
    let corpus = PathBuf::from(std::env::args().nth(1).expect("expected the corpus folder"));
    let folder = |name: &str| {
        let folder = corpus.join(name);
        std::fs::create_dir_all(&folder).expect("the corpus folder is writable");
        folder
    };
    let model_path = folder("gguf").join("model.gguf");
    write_model(&model_path)?;
    let model = GgufFile::open(&model_path)?;
    let fingerprint = Fingerprint::of(&model)?;

    write_adapter(&folder("adapter").join("adapter.gguf"))?;
    write_steering(&folder("steer"), &fingerprint)?;
    let probe = Probe {
        weight: (0..fingerprint.n_embd).map(|i| i as f32 - 3.0).collect(),
        place: ProbePlace::Block(1),
        fingerprint: Some(fingerprint),
        source: "by hand".into(),
        accuracy: Some(0.75),
        auc: Some(0.8),
    };
    probe.write(&folder("probe").join("probe.gguf"))
}

fn write_adapter(path: &Path) -> Result<()> {
    let mut metadata = Metadata::new();
    for (key, value) in
        [("general.type", "adapter"), ("general.architecture", "llama"), ("adapter.type", "lora")]
    {
        metadata.set(key, Value::Str(value.into()));
    }
    metadata.set("adapter.lora.alpha", Value::F32(4.0));
    let shapes = [
        ("blk.0.attn_q.weight.lora_a", [8, 2]),
        ("blk.0.attn_q.weight.lora_b", [2, 8]),
        ("blk.1.ffn_down.weight.lora_a", [16, 2]),
        ("blk.1.ffn_down.weight.lora_b", [2, 8]),
    ];
    write(path, &metadata, shapes.map(|(name, shape)| (name.to_owned(), shape.to_vec())).to_vec())
}

fn write_steering(folder: &Path, fingerprint: &Fingerprint) -> Result<()> {
    let directions = BTreeMap::from([(1, vec![0.5; fingerprint.n_embd as usize])]);
    control_vector::write(&folder.join("vector.gguf"), fingerprint, &directions, &Metadata::new())?;
    let neurons = [Neuron { layer: 0, index: 3 }, Neuron { layer: 1, index: 15 }];
    let file = NeuronFile {
        fingerprint: Some(fingerprint.clone()),
        neurons: neurons.into_iter().map(Into::into).collect(),
        ..NeuronFile::default()
    };
    file.write(&folder.join("neurons.json"))?;
    for (name, edits) in [
        ("offset", r#""what": {"neurons": [[0, 3], [1, 15]]}, "edit": {"offset": -1}"#),
        ("clamp", r#""what": {"neurons": [[1, 2]]}, "edit": {"clamp": {"min": 0, "max": 1}}, "when": "generated""#),
        ("assign", r#""what": {"neurons": [[0, 0]]}, "edit": {"assign": 2.5}, "coefficient": 0.5"#),
    ] {
        let text = format!(r#"{{"detox_gguf": "interventions", "format": 1, "interventions": [{{{edits}}}]}}"#);
        std::fs::write(folder.join(format!("{name}.json")), text).expect("the corpus folder is writable");
    }
    Ok(())
}
