//! What the fuzz targets share: the input as a file, and a small model to read it against.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use detox_gguf::Result;
use detox_gguf::gguf::{Array, GgufFile, GgufWriter, Metadata, Strings, TensorSpec, TensorType, Value};

/// A folder for this process's files.
fn scratch() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        // scripts/fuzz.sh gives a folder and removes it, since libFuzzer ends the process without destructors.
        let parent = std::env::var_os("DETOX_GGUF_FUZZ_FOLDER").map_or_else(std::env::temp_dir, PathBuf::from);
        tempfile::Builder::new().prefix("detox-gguf-fuzz-").tempdir_in(parent).unwrap().keep()
    })
}

/// Writes the input to a file and passes its path.
pub fn with_file(data: &[u8], use_file: impl FnOnce(&Path)) {
    let path = scratch().join("input");
    std::fs::write(&path, data).unwrap();
    use_file(&path);
}

/// A llama model of two layers with the smallest sizes, in a file.
pub fn model() -> &'static GgufFile {
    static MODEL: OnceLock<GgufFile> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = scratch().join("model.gguf");
        write_model(&path).unwrap();
        GgufFile::open(&path).unwrap()
    })
}

const N_EMBD: u64 = 8;
const N_FF: u64 = 16;
const N_LAYER: u64 = 2;
const TOKENS: [&str; 6] = ["<unk>", "<s>", "</s>", "▁a", "b", "<0x0A>"];

/// Writes the model that [`model`] opens.
pub fn write_model(path: &Path) -> Result<()> {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::Str("llama".into()));
    for (key, value) in [
        ("block_count", N_LAYER),
        ("embedding_length", N_EMBD),
        ("feed_forward_length", N_FF),
        ("context_length", 64),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("rope.dimension_count", 4),
        ("vocab_size", TOKENS.len() as u64),
    ] {
        metadata.set(format!("llama.{key}"), Value::U32(value as u32));
    }
    metadata.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    metadata.set("tokenizer.ggml.model", Value::Str("llama".into()));
    let mut tokens = Strings::default();
    TOKENS.iter().for_each(|token| tokens.push(token));
    metadata.set("tokenizer.ggml.tokens", Value::Array(tokens.into()));
    metadata.set("tokenizer.ggml.scores", Value::Array(Array::from(&[0.0f32; TOKENS.len()][..])));
    metadata.set("tokenizer.ggml.token_type", Value::Array(Array::from(&[2i32, 3, 3, 1, 1, 6][..])));
    let n_vocab = TOKENS.len() as u64;
    let mut shapes = vec![("token_embd.weight".to_owned(), vec![N_EMBD, n_vocab])];
    for il in 0..N_LAYER {
        for (name, shape) in [
            ("attn_norm", vec![N_EMBD]),
            ("attn_q", vec![N_EMBD, N_EMBD]),
            ("attn_k", vec![N_EMBD, N_EMBD / 2]),
            ("attn_v", vec![N_EMBD, N_EMBD / 2]),
            ("attn_output", vec![N_EMBD, N_EMBD]),
            ("ffn_norm", vec![N_EMBD]),
            ("ffn_gate", vec![N_EMBD, N_FF]),
            ("ffn_up", vec![N_EMBD, N_FF]),
            ("ffn_down", vec![N_FF, N_EMBD]),
        ] {
            shapes.push((format!("blk.{il}.{name}.weight"), shape));
        }
    }
    shapes.push(("output_norm.weight".to_owned(), vec![N_EMBD]));
    write(path, &metadata, shapes)
}

/// Writes a GGUF file whose tensors are F32 and hold small numbers.
pub fn write(path: &Path, metadata: &Metadata, shapes: Vec<(String, Vec<u64>)>) -> Result<()> {
    let sizes: Vec<u64> = shapes.iter().map(|(_, shape)| shape.iter().product()).collect();
    let specs =
        shapes.into_iter().map(|(name, shape)| TensorSpec { name, shape, tensor_type: TensorType::F32 }).collect();
    let mut writer = GgufWriter::create(path, metadata, specs)?;
    for size in sizes {
        let values: Vec<f32> = (0..size).map(|i| (i % 7) as f32 * 0.1 - 0.3).collect();
        writer.write_f32s(&values)?;
    }
    writer.finish()
}
