//! LoRA adapters as llama.cpp applies them: names, scale, and a check before it loads one.
//!
//! For a matrix W of shape `[n_in, n_out]` (ggml's order), `W.lora_a` is `[n_in, rank]` and `W.lora_b`
//! `[rank, n_out]`. W becomes `W + scale * B A`, with the factor of [`scale`]. The token embeddings,
//! `[n_embd, n_vocab]`, are looked up, not multiplied; their factors are transposed: `lora_a` is
//! `[rank, n_vocab]` and `lora_b` `[rank, n_embd]`.
//!
//! # Why adapters are checked here first
//! `llama_adapter_lora_init` refuses most misfits, but explains them only in its log. Others fail an assertion,
//! which ends the process: when loading (a key of an unexpected type) or at the first decode (a shape that no
//! product accepts). Its rules are in llama.cpp's `llama-adapter.cpp`; those of the products are in
//! `build_lora_mm` and `build_inp_embd` of `llama-graph.cpp`.

use std::collections::BTreeMap;
use std::ops::{Div, Mul};

use crate::error::{Error, Result};
use crate::finite;
use crate::gguf::{self, GgufFile, TensorInfo, TensorType, Value};
use crate::graph::steering::LoraScaled;

/// The tensor whose rows are looked up, so that its factors are transposed.
pub const EMBEDDING: &str = "token_embd.weight";

/// Metadata key of alpha.
pub const ALPHA_KEY: &str = "adapter.lora.alpha";

/// Suffix of the tensor name of a factor A.
const A_SUFFIX: &str = ".lora_a";

/// Suffix of the tensor name of a factor B.
const B_SUFFIX: &str = ".lora_b";

/// Tensor data is read in pieces of this size.
const CHUNK_BYTES: usize = 1 << 20;

/// The LoRA scale: `user_scale * alpha / rank`, or `user_scale` if alpha is 0.
///
/// W becomes `W + scale * B A` (arXiv 2106.09685, section 4.1). llama.cpp computes the same
/// (`llama_adapter_lora_weight::get_scale`). `T` is the precision to compute in: f32, or f64 for sums in f64.
pub fn scale<T>(user_scale: f32, alpha: f32, rank: usize) -> T
where
    T: From<f32> + Mul<Output = T> + Div<Output = T>,
{
    if alpha == 0.0 {
        return T::from(user_scale);
    }
    T::from(user_scale) * (T::from(alpha) / T::from(rank as f32))
}

/// The alpha of an adapter file; 0 if it has none, as in llama.cpp.
///
/// # Errors
/// [`Error::Gguf`] for a value of another type.
pub fn alpha(file: &GgufFile) -> Result<f32> {
    Ok(file.f32_if_present(ALPHA_KEY)?.unwrap_or(0.0))
}

/// The tensor that holds the factor A for a tensor of the base.
pub fn a_name(tensor: &str) -> String {
    format!("{tensor}{A_SUFFIX}")
}

/// The tensor that holds the factor B for a tensor of the base.
pub fn b_name(tensor: &str) -> String {
    format!("{tensor}{B_SUFFIX}")
}

/// The tensor of the base whose factor A is in the tensor `name`; `None` if `name` is not a factor A.
pub fn tensor_of_a(name: &str) -> Option<&str> {
    name.strip_suffix(A_SUFFIX)
}

/// Checks that llama.cpp can apply an adapter to `model`.
///
/// llama.cpp skips tensors of norms; so does this check, with a warning.
///
/// # Errors
/// [`Error::Io`] and [`Error::Gguf`] as [`GgufFile::open`]. [`Error::Input`] for a file that is not a LoRA
/// adapter, fits another model, or has values that are not finite. [`Error::Setting`] for a scale that is not
/// finite.
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
        if let Some(base) = tensor_of_a(name) {
            pairs.entry(base).or_default().a = Some(tensor);
        } else if let Some(base) = name.strip_suffix(B_SUFFIX) {
            pairs.entry(base).or_default().b = Some(tensor);
        } else if name.ends_with("_norm.weight") {
            n_norms += 1;
        } else {
            let reason =
                format!("tensor {name:?}: expected a name ending in .lora_a, .lora_b or _norm.weight");
            return Err(Error::input(file.path(), None, reason));
        }
    }
    if pairs.is_empty() {
        let reason = "expected pairs of tensors .lora_a and .lora_b, found none";
        return Err(Error::input(file.path(), None, reason));
    }
    for (base, pair) in &pairs {
        check_pair(&file, model, base, pair)?;
    }
    for tensor in pairs.values().flat_map(|pair| [pair.a, pair.b]).flatten() {
        check_finite(&file, tensor)?;
    }
    if n_norms > 0 {
        tracing::warn!(
            "{}: skipping {n_norms} tensors of norms, which llama.cpp cannot apply",
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

/// Checks that the file is a LoRA adapter for the model's architecture, in one part.
fn check_kind(file: &GgufFile, model: &GgufFile) -> Result<()> {
    let refuse = |reason: String| Error::input(file.path(), None, reason);
    let architecture = file.str_if_present("general.architecture")?;
    match file.str_if_present("general.type")? {
        Some("adapter") => {}
        _ if architecture == Some("controlvector") => {
            return Err(refuse("expected a LoRA adapter, found a control vector".into())
                .with_hint("give it with --control-vector"));
        }
        found => {
            let found = found.map_or("nothing".to_owned(), |found| format!("{found:?}"));
            let what = architecture.map_or(String::new(), |name| format!(" (architecture {name:?})"));
            return Err(refuse(format!(
                "expected a LoRA adapter: key \"general.type\" should be \"adapter\", found {found}{what}"
            ))
            .with_hint(
                "convert an adapter with llama.cpp's convert_lora_to_gguf.py; a model is given with -m",
            ));
        }
    }
    let kind = file.str("adapter.type")?;
    if kind != "lora" {
        return Err(refuse(format!("key \"adapter.type\": expected \"lora\", found {kind:?}")));
    }
    let (expected, found) = (model.architecture()?, architecture.unwrap_or_default());
    if expected != found {
        return Err(refuse(format!("it is for architecture {found:?}, and this model has {expected:?}"))
            .with_hint(OTHER_BASE));
    }
    let alpha = alpha(file)?;
    if !alpha.is_finite() {
        return Err(refuse(format!("key {ALPHA_KEY:?}: expected a finite number, found {alpha}")));
    }
    if let Some(tokens) = file.metadata().get("adapter.alora.invocation_tokens") {
        let is_empty = matches!(tokens, Value::Array(tokens) if tokens.is_empty());
        if !is_empty {
            let reason =
                "it is an activated LoRA, made to act only after certain tokens; here it would act on all";
            return Err(refuse(reason.into()));
        }
    }
    if file.part_paths().len() > 1 {
        return Err(refuse("it is split into several files, and llama.cpp reads only the first".into()));
    }
    Ok(())
}

/// Hint for an adapter that fits another model.
const OTHER_BASE: &str = "use the model that the adapter was trained on";

/// Checks the factors for the tensor `name` of the model: both present, in shapes and types that llama.cpp's
/// products accept.
fn check_pair(file: &GgufFile, model: &GgufFile, name: &str, pair: &Pair<'_>) -> Result<()> {
    let refuse = |reason: &str| Error::input(file.path(), None, format!("tensor {name:?}: {reason}"));
    let (a, b) = match (pair.a, pair.b) {
        (Some(a), Some(b)) => (a, b),
        (Some(_), None) => return Err(refuse("expected .lora_a and .lora_b, found .lora_a alone")),
        (None, _) => return Err(refuse("expected .lora_a and .lora_b, found .lora_b alone")),
    };
    let Some(base) = model.tensor(name) else {
        return Err(refuse("this model has no such tensor").with_hint(OTHER_BASE));
    };
    if base.shape().len() < 2 {
        return Err(refuse("it is not a matrix in this model, and llama.cpp would skip it"));
    }
    // A model that ties the two has one tensor for both. llama.cpp would use the transposed factors in the
    // output product too, and fail an assertion.
    if name == EMBEDDING && model.tensor("output.weight").is_none() {
        return Err(refuse(
            "in this model the token embeddings are also the output matrix, and llama.cpp cannot apply an \
             adapter to them",
        )
        .with_hint("train the adapter without embed_tokens"));
    }
    // The scale of NVFP4 would multiply the adapter too; build_ffn asserts that this does not happen.
    let has_scale =
        name.strip_suffix(".weight").is_some_and(|stem| model.tensor(&format!("{stem}.scale")).is_some());
    if base.tensor_type() == TensorType::NVFP4 && has_scale {
        return Err(refuse("llama.cpp cannot apply an adapter to an NVFP4 tensor with a scale of its own"));
    }
    let rank = b.shape()[0];
    let (n_in, n_out) = (base.shape()[0], base.shape()[1]);
    let (a_shape, b_shape) =
        if name == EMBEDDING { ([rank, n_out], [rank, n_in]) } else { ([n_in, rank], [rank, n_out]) };
    for (factor, expected) in [(a, a_shape), (b, b_shape)] {
        let expected: Vec<u64> = expected.into_iter().chain(base.shape()[2..].iter().copied()).collect();
        let refuse =
            |reason| Error::input(file.path(), None, format!("tensor {:?}: {reason}", factor.name()));
        if !same_shape(factor.shape(), &expected) {
            let (base, found) = (base.shape(), factor.shape());
            return Err(refuse(format!("expected {expected:?} for a matrix {base:?}, found {found:?}"))
                .with_hint(OTHER_BASE));
        }
        if !factor.tensor_type().is_weight() {
            return Err(refuse(format!("llama.cpp cannot multiply by type {}", factor.tensor_type())));
        }
    }
    Ok(())
}

/// Compares shapes, with missing dimensions as 1: ggml drops trailing dimensions of 1, as in rank 1.
fn same_shape(found: &[u64], expected: &[u64]) -> bool {
    let n = found.len().max(expected.len());
    (0..n).all(|i| found.get(i).unwrap_or(&1) == expected.get(i).unwrap_or(&1))
}

/// Checks that all values are finite. Types that this build cannot read are not checked.
fn check_finite(file: &GgufFile, tensor: &TensorInfo) -> Result<()> {
    #[cfg(not(feature = "engine"))]
    if !gguf::can_dequantize(tensor.tensor_type()) {
        return Ok(());
    }
    let refuse = |reason: String| {
        Error::input(file.path(), None, format!("tensor {:?}: {reason}", tensor.name()))
            .with_hint("the training diverged, or the file is damaged")
    };
    let (n_bytes, len) = (tensor.tensor_type().block_bytes(), tensor.tensor_type().block_len());
    let n_blocks = tensor.n_bytes() / n_bytes;
    let most = (CHUNK_BYTES as u64 / n_bytes).clamp(1, n_blocks.max(1));
    let mut chunk = vec![0; (most * n_bytes) as usize];
    let mut values = vec![0.0; (most * len) as usize];
    for first in (0..n_blocks).step_by(most as usize) {
        let n = most.min(n_blocks - first);
        let (chunk, values) = (&mut chunk[..(n * n_bytes) as usize], &mut values[..(n * len) as usize]);
        file.read_tensor_at(tensor, first * n_bytes, chunk)?;
        gguf::dequantize_raw(tensor.tensor_type(), chunk, values).map_err(refuse)?;
        if let Some((at, _)) = finite::not_finite(values) {
            let at = first * len + at as u64;
            return Err(refuse(format!("expected finite numbers, found NaN or infinity at element {at}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Array, GgufWriter, Metadata, TensorSpec};

    /// One tensor: name, shape, type.
    type Tensor = (&'static str, Vec<u64>, TensorType);

    /// An adapter to be written; starts as one that fits.
    struct Adapter {
        metadata: Metadata,
        tensors: Vec<(String, Vec<u64>, TensorType)>,
        scale: f32,
        /// The first value of the first tensor; else 0.
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
                    // The high half of an f32 is its bf16. As an f16 it is not finite either.
                    let bits = first.to_le_bytes();
                    let is_float = tensor_type.block_len() == 1;
                    let n = if is_float { tensor_type.block_bytes() as usize } else { 2 };
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
    fn the_scale_is_the_users_times_alpha_over_rank_or_the_users_alone_if_alpha_is_0() {
        assert_eq!((scale::<f32>(1.0, 16.0, 64), scale::<f64>(-0.5, 8.0, 2)), (0.25, -2.0));
        assert_eq!((scale::<f32>(0.5, 0.0, 64), scale::<f64>(0.5, 0.0, 64)), (0.5, 0.5));
    }

    #[test]
    fn an_adapter_that_fits_is_accepted() {
        let base = model("llama");
        adapter(&down()).check(&base).unwrap();
        // llama.cpp skips norms. The model may be quantised, and alpha may be missing.
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

    /// Checks an adapter for the token embeddings.
    fn embedding(base: &GgufFile, architecture: &str, transposed: bool) -> Result<()> {
        let shape = base.tensor(EMBEDDING).unwrap().shape().to_vec();
        let (n_embd, n_vocab) = (shape[0], shape[1]);
        let (a, b) = if transposed {
            (vec![4, n_vocab], vec![4, n_embd])
        } else {
            (vec![n_embd, 4], vec![4, n_vocab])
        };
        adapter(&[
            ("token_embd.weight.lora_a", a, TensorType::F32),
            ("token_embd.weight.lora_b", b, TensorType::F32),
        ])
        .with("general.architecture", Value::Str(architecture.into()))
        .check(base)
    }

    #[test]
    fn factors_of_token_embeddings_are_transposed() {
        let base = model("llama");
        assert!(base.tensor("output.weight").is_some(), "the tiny llama must have an output matrix");
        embedding(&base, "llama", true).unwrap();
        let error = embedding(&base, "llama", false).unwrap_err().to_string();
        assert!(error.contains("token_embd.weight.lora_a"), "{error}");
    }

    #[test]
    fn rejects_token_embeddings_that_are_also_the_output() {
        let base = model("gemma3");
        assert!(base.tensor("output.weight").is_none(), "the tiny gemma3 must tie embeddings and output");
        let error = embedding(&base, "gemma3", true).unwrap_err();
        assert!(error.to_string().contains("also the output matrix"), "{error}");
        assert!(error.hint().is_some());
    }

    #[test]
    fn rejects_other_files_and_names_their_kind() {
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
    fn rejects_other_adapter_types_and_architectures() {
        let base = model("llama");
        let with =
            |key: &str, value: &str| adapter(&down()).with(key, Value::Str(value.into())).refusal(&base);
        assert!(with("adapter.type", "dora").contains("found \"dora\""));
        assert!(with("general.architecture", "gpt2").contains("this model has \"llama\""));
    }

    #[test]
    fn rejects_keys_that_would_crash_llama_cpp() {
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
    fn rejects_an_adapter_without_both_factors() {
        let base = model("llama");
        assert!(adapter(&[]).refusal(&base).contains("found none"));
        assert!(adapter(&down()[..1]).refusal(&base).contains("found .lora_a alone"));
        assert!(adapter(&down()[1..]).refusal(&base).contains("found .lora_b alone"));
    }

    #[test]
    fn rejects_tensors_with_other_names_or_for_something_that_is_not_a_matrix() {
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
        assert!(norm.contains("not a matrix"), "{norm}");
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
        // As the "finetune" of old llama.cpp wrote them.
        let mut transposed = down();
        transposed[0].1.reverse();
        assert!(adapter(&transposed).refusal(&base).contains("lora_a"));
    }

    #[test]
    fn rejects_types_that_cannot_be_multiplied() {
        let mut tensors = down();
        tensors[0].2 = TensorType::I32;
        assert!(adapter(&tensors).refusal(&model("llama")).contains("type i32"));
    }

    #[test]
    fn rejects_values_and_scales_that_are_not_finite() {
        let base = model("llama");
        // In Q8_0 the first value is the block's scale.
        for tensor_type in [TensorType::F32, TensorType::F16, TensorType::BF16, TensorType::Q8_0] {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut tensors = down();
                tensors[0].2 = tensor_type;
                let adapter = Adapter { first: Some(value), ..adapter(&tensors) };
                assert!(
                    adapter.refusal(&base).contains("finite numbers, found NaN or infinity at element 0")
                );
                Adapter { first: Some(1.5), ..adapter }.check(&base).unwrap();
            }
        }
        let adapter = Adapter { scale: f32::NAN, ..adapter(&down()) };
        assert!(adapter.check(&base).unwrap_err().is_usage());
    }
}
