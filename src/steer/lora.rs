//! Checks a LoRA adapter before llama.cpp sees it.
//!
//! `llama_adapter_lora_init` refuses much of what does not fit, in its log only; other faults it meets by
//! an assertion that ends the process, at loading (a key of another type) or at the first decode (a shape
//! that no product takes). Its rules are in `llama-adapter.cpp`, those of the products in `build_lora_mm`
//! and `build_inp_embd` of `llama-graph.cpp`.
//!
//! For a matrix W of shape `[n_in, n_out]`, `W.lora_a` is `[n_in, rank]` and `W.lora_b` `[rank, n_out]`; W
//! becomes `W + scale * alpha / rank * B A`, or `W + scale * B A` where the adapter gives no alpha. The token
//! embeddings, `[n_embd, n_vocab]`, are looked up and not multiplied, so theirs are flipped: `lora_a`
//! is `[rank, n_vocab]` and `lora_b` `[rank, n_embd]`.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, TensorInfo, TensorType, Value};
use crate::graph::steering::LoraScaled;

/// Bytes of tensor data that are read at a time.
const CHUNK_BYTES: usize = 1 << 20;

const EMBEDDING: &str = "token_embd.weight";

/// Whether llama.cpp can apply this adapter to `model`.
///
/// Tensors of norms, which llama.cpp leaves out, are left out here too, with a warning.
///
/// # Errors
/// [`Error::Io`] and [`Error::Gguf`] as [`GgufFile::open`]. [`Error::Input`] for what is no LoRA adapter, is
/// one for another model, or holds values that are not finite. [`Error::Setting`] for a scale that is not.
pub fn check(lora: &LoraScaled, model: &GgufFile) -> Result<()> {
    if !lora.scale.is_finite() {
        let reason = format!("expected a finite scale for {}, found {}", lora.path.display(), lora.scale);
        return Err(Error::setting("--lora-scaled", reason));
    }
    let file = GgufFile::open(&lora.path)?;
    check_kind(&file, model)?;
    let mut pairs: BTreeMap<&str, Pair<'_>> = BTreeMap::new();
    let mut n_norms = 0;
    for tensor in file.tensors() {
        let name = tensor.name();
        if let Some(of) = name.strip_suffix(".lora_a") {
            pairs.entry(of).or_default().a = Some(tensor);
        } else if let Some(of) = name.strip_suffix(".lora_b") {
            pairs.entry(of).or_default().b = Some(tensor);
        } else if name.ends_with("_norm.weight") {
            n_norms += 1;
        } else {
            let reason =
                format!("tensor {name:?}: expected a name ending in .lora_a, .lora_b or _norm.weight");
            return Err(refuse(&file, reason, None));
        }
    }
    if pairs.is_empty() {
        return Err(refuse(&file, "expected pairs of tensors .lora_a and .lora_b, found none", None));
    }
    for (of, pair) in &pairs {
        check_pair(&file, model, of, pair)?;
    }
    for tensor in pairs.values().flat_map(|pair| [pair.a, pair.b]).flatten() {
        check_finite(&file, tensor)?;
    }
    if n_norms > 0 {
        tracing::warn!(
            "{}: {n_norms} tensors of norms are left out, as llama.cpp has no way to apply them",
            lora.path.display()
        );
    }
    Ok(())
}

/// The two factors for one tensor of the model.
#[derive(Default)]
struct Pair<'a> {
    a: Option<&'a TensorInfo>,
    b: Option<&'a TensorInfo>,
}

fn refuse(file: &GgufFile, reason: impl Into<String>, hint: Option<&str>) -> Error {
    Error::Input {
        path: file.path().to_path_buf(),
        line: None,
        reason: reason.into(),
        hint: hint.map(str::to_owned),
    }
}

/// An adapter, of kind LoRA, for the model's architecture, in one file.
fn check_kind(file: &GgufFile, model: &GgufFile) -> Result<()> {
    let architecture = file.str_if_present("general.architecture")?;
    match file.str_if_present("general.type")? {
        Some("adapter") => {}
        _ if architecture == Some("controlvector") => {
            let reason = "expected a LoRA adapter, found a control vector";
            return Err(refuse(file, reason, Some("give it with --control-vector")));
        }
        found => {
            let found = found.map_or("nothing".to_owned(), |found| format!("{found:?}"));
            let what = architecture.map_or(String::new(), |name| format!(" (architecture {name:?})"));
            let reason = format!(
                "expected a LoRA adapter: key \"general.type\" should be \"adapter\", found {found}{what}"
            );
            let hint =
                "convert an adapter with llama.cpp's convert_lora_to_gguf.py; a model is given with -m";
            return Err(refuse(file, reason, Some(hint)));
        }
    }
    let kind = file.str("adapter.type")?;
    if kind != "lora" {
        let reason = format!("key \"adapter.type\": expected \"lora\", found {kind:?}");
        return Err(refuse(file, reason, None));
    }
    let (expected, found) = (model.architecture()?, architecture.unwrap_or_default());
    if expected != found {
        let reason = format!("it is for architecture {found:?}, and this model has {expected:?}");
        return Err(refuse(file, reason, Some("use the model that it was trained on")));
    }
    if let Some(alpha) = file.f32_if_present("adapter.lora.alpha")?
        && !alpha.is_finite()
    {
        let reason = format!("key \"adapter.lora.alpha\": expected a finite number, found {alpha}");
        return Err(refuse(file, reason, None));
    }
    if let Some(tokens) = file.metadata().get("adapter.alora.invocation_tokens") {
        let is_empty = matches!(tokens, Value::Array(tokens) if tokens.is_empty());
        if !is_empty {
            let reason = "it is an activated LoRA, which acts only after tokens of its own, and here it \
                          would act on all";
            return Err(refuse(file, reason, None));
        }
    }
    if file.part_paths().len() > 1 {
        return Err(refuse(file, "it is split into several files, of which llama.cpp reads one", None));
    }
    Ok(())
}

/// Both factors, of shapes that llama.cpp's products take, for a tensor that is multiplied with.
fn check_pair(file: &GgufFile, model: &GgufFile, of: &str, pair: &Pair<'_>) -> Result<()> {
    let in_tensor = |reason: String, hint| Err(refuse(file, format!("tensor {of:?}: {reason}"), hint));
    let (a, b) = match (pair.a, pair.b) {
        (Some(a), Some(b)) => (a, b),
        (a, _) => {
            let (has, lacks) = if a.is_some() { (".lora_a", ".lora_b") } else { (".lora_b", ".lora_a") };
            return in_tensor(format!("expected {has} and {lacks}, found {has} alone"), None);
        }
    };
    let other_base = Some("use the model that it was trained on");
    let Some(base) = model.tensor(of) else {
        return in_tensor("this model has no such tensor".into(), other_base);
    };
    if base.shape().len() < 2 {
        return in_tensor("it is no matrix in this model, and llama.cpp would leave it out".into(), None);
    }
    // One that is tied to the output is one tensor to llama.cpp: it multiplies by the flipped factors
    // there too, and ends the process by an assertion.
    if of == EMBEDDING && model.tensor("output.weight").is_none() {
        return in_tensor(
            "this model uses the token embeddings as its output too, where llama.cpp cannot apply an adapter"
                .into(),
            Some("train the adapter without embed_tokens"),
        );
    }
    // The scale of NVFP4 would be applied to the adapter too; build_ffn asserts that this does not happen.
    let has_scale =
        of.strip_suffix(".weight").is_some_and(|stem| model.tensor(&format!("{stem}.scale")).is_some());
    if base.tensor_type() == TensorType::NVFP4 && has_scale {
        return in_tensor("llama.cpp applies no adapter to nvfp4 with a scale of its own".into(), None);
    }
    let rank = b.shape()[0];
    let (n_in, n_out) = (base.shape()[0], base.shape()[1]);
    let (shape_a, shape_b) =
        if of == EMBEDDING { ([rank, n_out], [rank, n_in]) } else { ([n_in, rank], [rank, n_out]) };
    for (factor, expected) in [(a, shape_a), (b, shape_b)] {
        let expected: Vec<u64> = expected.into_iter().chain(base.shape()[2..].iter().copied()).collect();
        if !same_shape(factor.shape(), &expected) {
            let (name, found) = (factor.name(), factor.shape());
            let reason = format!(
                "tensor {name:?}: expected {expected:?} for a matrix {:?}, found {found:?}",
                base.shape()
            );
            return Err(refuse(file, reason, other_base));
        }
        if !factor.tensor_type().is_weight() {
            let (name, found) = (factor.name(), factor.tensor_type());
            let reason = format!("tensor {name:?}: llama.cpp cannot multiply by type {found}");
            return Err(refuse(file, reason, None));
        }
    }
    Ok(())
}

/// ggml leaves out trailing dimensions of 1: a factor of rank 1 may be written with one dimension.
fn same_shape(found: &[u64], expected: &[u64]) -> bool {
    let n = found.len().max(expected.len());
    (0..n).all(|i| found.get(i).unwrap_or(&1) == expected.get(i).unwrap_or(&1))
}

/// Every value of the plain types; blocks of quantised types are taken as they are.
fn check_finite(file: &GgufFile, tensor: &TensorInfo) -> Result<()> {
    let is_finite: fn(&[u8]) -> bool = match tensor.tensor_type() {
        TensorType::F32 => |bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).is_finite(),
        // All bits of the exponent set is infinity or NaN.
        TensorType::F16 => |bytes| u16::from_le_bytes([bytes[0], bytes[1]]) & 0x7c00 != 0x7c00,
        TensorType::BF16 => |bytes| u16::from_le_bytes([bytes[0], bytes[1]]) & 0x7f80 != 0x7f80,
        _ => return Ok(()),
    };
    let width = tensor.tensor_type().block_bytes() as usize;
    let mut chunk = vec![0; CHUNK_BYTES.min(tensor.n_bytes() as usize)];
    let mut done = 0;
    while done < tensor.n_bytes() {
        let n = (tensor.n_bytes() - done).min(chunk.len() as u64) as usize;
        file.read_tensor_at(tensor, done, &mut chunk[..n])?;
        if let Some(i) = chunk[..n].chunks_exact(width).position(|bytes| !is_finite(bytes)) {
            let at = done as usize / width + i;
            let reason =
                format!("tensor {:?}: expected finite numbers, found another at {at}", tensor.name());
            return Err(refuse(file, reason, Some("the training diverged, or the file is damaged")));
        }
        done += n as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Array, GgufWriter, Metadata, TensorSpec};

    /// One tensor: name, shape, type.
    type Tensor = (&'static str, Vec<u64>, TensorType);

    /// What a test changes in an adapter that fits.
    struct Adapter {
        metadata: Metadata,
        tensors: Vec<(String, Vec<u64>, TensorType)>,
        scale: f32,
        /// Written into the first tensor's first value.
        first: Option<f32>,
    }

    fn model(name: &str) -> GgufFile {
        GgufFile::open(format!("gguf/tiny/{name}.gguf")).unwrap()
    }

    fn metadata(keys: &[(&str, &str)]) -> Metadata {
        let mut metadata = Metadata::new();
        for (key, value) in keys {
            metadata.set(*key, Value::Str((*value).into()));
        }
        metadata
    }

    /// An adapter of rank 4 for the tiny llama, with these tensors.
    fn adapter(tensors: &[Tensor]) -> Adapter {
        let mut metadata = metadata(&[
            ("general.type", "adapter"),
            ("general.architecture", "llama"),
            ("adapter.type", "lora"),
        ]);
        metadata.set("adapter.lora.alpha", Value::F32(16.0));
        let tensors =
            tensors.iter().map(|(name, shape, t)| ((*name).to_owned(), shape.clone(), *t)).collect();
        Adapter { metadata, tensors, scale: 1.0, first: None }
    }

    /// Both factors for `ffn_down` of layer 1, `[n_ff, n_embd]`.
    fn down() -> Vec<Tensor> {
        let shape = model("llama").tensor("blk.1.ffn_down.weight").unwrap().shape().to_vec();
        vec![
            ("blk.1.ffn_down.weight.lora_a", vec![shape[0], 4], TensorType::F32),
            ("blk.1.ffn_down.weight.lora_b", vec![4, shape[1]], TensorType::F32),
        ]
    }

    impl Adapter {
        fn with(mut self, key: &str, value: Value) -> Adapter {
            self.metadata.set(key, value);
            self
        }

        fn check(&self, base: &GgufFile) -> Result<()> {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("lora.gguf");
            let specs = self.tensors.iter().map(|(name, shape, tensor_type)| TensorSpec {
                name: name.clone(),
                shape: shape.clone(),
                tensor_type: *tensor_type,
            });
            let mut writer = GgufWriter::create(&path, &self.metadata, specs.collect()).unwrap();
            for (i, (_, shape, tensor_type)) in self.tensors.iter().enumerate() {
                let n_rows: u64 = shape[1..].iter().product();
                let mut bytes = vec![0; (tensor_type.row_bytes(shape[0]).unwrap() * n_rows) as usize];
                if let Some(first) = self.first.filter(|_| i == 0) {
                    // The high half of an f32 is its bf16; an f16 with these exponents is not finite either.
                    let bits = first.to_le_bytes();
                    let n = bytes.len().min(tensor_type.block_bytes() as usize);
                    bytes[..n].copy_from_slice(&bits[4 - n..]);
                }
                writer.write(&bytes).unwrap();
            }
            writer.finish().unwrap();
            check(&LoraScaled { path, scale: self.scale }, base)
        }

        fn refusal(&self, base: &GgufFile) -> String {
            self.check(base).unwrap_err().to_string()
        }
    }

    #[test]
    fn an_adapter_that_fits_is_accepted() {
        let base = model("llama");
        adapter(&down()).check(&base).unwrap();
        // Norms are left out by llama.cpp; the model may be quantised; alpha may be missing.
        let mut tensors = down();
        tensors.push(("blk.0.attn_norm.weight", vec![8], TensorType::F32));
        adapter(&tensors).check(&model("llama-q8_0")).unwrap();
        let mut without_alpha = adapter(&down());
        without_alpha.metadata = metadata(&[
            ("general.type", "adapter"),
            ("general.architecture", "llama"),
            ("adapter.type", "lora"),
        ]);
        without_alpha.check(&base).unwrap();
    }

    #[test]
    fn factors_of_rank_1_may_have_one_dimension() {
        let base = model("llama");
        let shape = base.tensor("blk.1.ffn_down.weight").unwrap().shape().to_vec();
        adapter(&[
            ("blk.1.ffn_down.weight.lora_a", vec![shape[0]], TensorType::F32),
            ("blk.1.ffn_down.weight.lora_b", vec![1, shape[1]], TensorType::F32),
        ])
        .check(&base)
        .unwrap();
    }

    /// Token embeddings of a model whose output is a tensor of its own, or is not.
    fn embedding(base: &GgufFile, architecture: &str, flipped: bool) -> Result<()> {
        let shape = base.tensor(EMBEDDING).unwrap().shape().to_vec();
        let (n_embd, n_vocab) = (shape[0], shape[1]);
        let (a, b) =
            if flipped { (vec![4, n_vocab], vec![4, n_embd]) } else { (vec![n_embd, 4], vec![4, n_vocab]) };
        adapter(&[
            ("token_embd.weight.lora_a", a, TensorType::F32),
            ("token_embd.weight.lora_b", b, TensorType::F32),
        ])
        .with("general.architecture", Value::Str(architecture.into()))
        .check(base)
    }

    #[test]
    fn factors_of_token_embeddings_are_flipped() {
        let base = model("llama");
        assert!(base.tensor("output.weight").is_some(), "the tiny llama has an output of its own");
        embedding(&base, "llama", true).unwrap();
        let error = embedding(&base, "llama", false).unwrap_err().to_string();
        assert!(error.contains("token_embd.weight.lora_a"), "{error}");
    }

    #[test]
    fn rejects_token_embeddings_that_are_the_output_too() {
        let base = model("gemma3");
        assert!(base.tensor("output.weight").is_none(), "the tiny gemma3 is tied");
        let error = embedding(&base, "gemma3", true).unwrap_err();
        assert!(error.to_string().contains("as its output too"), "{error}");
        assert!(error.hint().is_some());
    }

    #[test]
    fn rejects_other_files_by_what_they_are() {
        let base = model("llama");
        let of = |path: &str| check(&LoraScaled { path: path.into(), scale: 1.0 }, &base).unwrap_err();
        let error = of("gguf/tiny/gpt2.gguf").to_string();
        assert!(error.contains("expected a LoRA adapter") && error.contains("\"gpt2\""), "{error}");
        assert!(matches!(of("no/such/file"), Error::Io { .. }));
        let mut control_vector = adapter(&[]);
        control_vector.metadata = metadata(&[("general.architecture", "controlvector")]);
        let error = control_vector.check(&base).unwrap_err();
        assert_eq!(error.hint().as_deref(), Some("give it with --control-vector"));
    }

    #[test]
    fn rejects_another_kind_of_adapter_or_another_architecture() {
        let base = model("llama");
        let with =
            |key: &str, value: &str| adapter(&down()).with(key, Value::Str(value.into())).refusal(&base);
        assert!(with("adapter.type", "dora").contains("found \"dora\""));
        assert!(with("general.architecture", "gpt2").contains("this model has \"llama\""));
    }

    #[test]
    fn rejects_keys_that_would_end_the_process() {
        let base = model("llama");
        for (key, value) in [
            ("adapter.lora.alpha", Value::U32(16)),
            ("adapter.lora.alpha", Value::F32(f32::NAN)),
            ("adapter.type", Value::U32(1)),
            ("general.type", Value::Bool(true)),
        ] {
            assert!(adapter(&down()).with(key, value).refusal(&base).contains(key));
        }
    }

    #[test]
    fn rejects_an_activated_lora() {
        let tokens = Value::Array(Array::from(&[1u32, 2][..]));
        let activated = adapter(&down()).with("adapter.alora.invocation_tokens", tokens);
        assert!(activated.refusal(&model("llama")).contains("activated LoRA"));
    }

    #[test]
    fn rejects_an_adapter_without_pairs() {
        let base = model("llama");
        assert!(adapter(&[]).refusal(&base).contains("found none"));
        assert!(adapter(&down()[..1]).refusal(&base).contains("found .lora_a alone"));
        assert!(adapter(&down()[1..]).refusal(&base).contains("found .lora_b alone"));
    }

    #[test]
    fn rejects_tensors_of_other_names_or_of_no_matrix_in_the_model() {
        let base = model("llama");
        let with = |name: &'static str| {
            let mut tensors = down();
            tensors.push((name, vec![4], TensorType::F32));
            adapter(&tensors).refusal(&base)
        };
        assert!(with("blk.0.attn_q.bias").contains("expected a name ending in"));
        let pair =
            |a, b| adapter(&[(a, vec![4], TensorType::F32), (b, vec![4], TensorType::F32)]).refusal(&base);
        let missing = pair("blk.99.ffn_down.weight.lora_a", "blk.99.ffn_down.weight.lora_b");
        assert!(missing.contains("no such tensor"), "{missing}");
        let norm = pair("output_norm.weight.lora_a", "output_norm.weight.lora_b");
        assert!(norm.contains("no matrix"), "{norm}");
    }

    #[test]
    fn rejects_factors_whose_shapes_do_not_fit() {
        let base = model("llama");
        for (which, change) in
            [(0, vec![7, 4]), (0, vec![4, 4]), (1, vec![5, 32]), (1, vec![4, 7]), (1, vec![4])]
        {
            let mut tensors = down();
            tensors[which].1 = change;
            let error = adapter(&tensors).refusal(&base);
            assert!(error.contains("expected [") && error.contains("found ["), "{error}");
        }
        // As "finetune" of old llama.cpp wrote them: not transposed.
        let mut transposed = down();
        transposed[0].1.reverse();
        assert!(adapter(&transposed).refusal(&base).contains("lora_a"));
    }

    #[test]
    fn rejects_types_that_nothing_is_multiplied_by() {
        let mut tensors = down();
        tensors[0].2 = TensorType::I32;
        assert!(adapter(&tensors).refusal(&model("llama")).contains("type i32"));
    }

    #[test]
    fn rejects_values_and_scales_that_are_not_finite() {
        let base = model("llama");
        for tensor_type in [TensorType::F32, TensorType::F16, TensorType::BF16] {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut tensors = down();
                tensors[0].2 = tensor_type;
                let adapter = Adapter { first: Some(value), ..adapter(&tensors) };
                assert!(adapter.refusal(&base).contains("finite numbers, found another at 0"));
                Adapter { first: Some(1.5), ..adapter }.check(&base).unwrap();
            }
        }
        let adapter = Adapter { scale: f32::NAN, ..adapter(&down()) };
        assert!(adapter.check(&base).unwrap_err().is_usage());
    }
}
