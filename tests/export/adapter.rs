//! Writes, reads and refuses adapters.

use detox_gguf::error::Error;
use detox_gguf::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value};
use detox_gguf::steer::Fingerprint;
use detox_gguf::train::output::{Adapter, Factors};

use super::{factors, largest_difference, logits, provenance, tiny, tiny_path, write};

/// An adapter for matrices of the attention, the FFN, the embeddings and the output, each of another rank.
fn adapter(base: &GgufFile) -> Adapter {
    let names = ["blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight", "output.weight"];
    let factors = names.iter().enumerate().map(|(i, name)| factors(base, name, 3 + i, i));
    Adapter { alpha: 8.0, factors: factors.collect() }
}

#[test]
fn a_written_adapter_reads_back_equal_and_acts_in_llama_cpp() {
    let (folder, base) = (tempfile::tempdir().unwrap(), tiny("llama"));
    let path = folder.path().join("lora.gguf");
    let adapter = adapter(&base);
    let lora = write(&adapter, &path, &base);
    assert_eq!(Adapter::read(&path, &base).unwrap(), adapter);
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.str("general.type").unwrap(), "adapter");
    assert_eq!(file.str("general.architecture").unwrap(), "llama");
    assert_eq!(file.str("adapter.type").unwrap(), "lora");
    assert_eq!(file.f32("adapter.lora.alpha").unwrap(), 8.0);
    assert_eq!(file.str("detox_gguf.test").unwrap(), "yes");
    assert_eq!(Fingerprint::recorded_in(&file).unwrap(), Some(Fingerprint::of(&base).unwrap()));
    let shape = |name: &str| file.tensor(name).unwrap().shape().to_vec();
    // ggml's order: fastest axis first. The factors of the embeddings are transposed.
    let (n_embd, n_vocab) = (64, base.n_vocab().unwrap().into());
    assert_eq!(shape("blk.1.ffn_down.weight.lora_a"), [96, 4]);
    assert_eq!(shape("blk.1.ffn_down.weight.lora_b"), [4, 64]);
    assert_eq!(shape("token_embd.weight.lora_a"), [5, n_vocab]);
    assert_eq!(shape("token_embd.weight.lora_b"), [5, n_embd]);
    let effect = largest_difference(&logits(base.path(), &[lora]), &logits(base.path(), &[]));
    assert!(effect > 0.5, "{effect}");
}

#[test]
fn without_an_alpha_only_the_users_scale_counts() {
    let (folder, base) = (tempfile::tempdir().unwrap(), tiny("llama"));
    let path = folder.path().join("lora.gguf");
    let adapter = Adapter { alpha: 0.0, ..adapter(&base) };
    write(&adapter, &path, &base);
    assert!(GgufFile::open(&path).unwrap().metadata().get("adapter.lora.alpha").is_none());
    assert_eq!(Adapter::read(&path, &base).unwrap(), adapter);
    assert_eq!((adapter.scale(0.5, 4), Adapter { alpha: 8.0, ..adapter }.scale(0.5, 4)), (0.5, 1.0));
}

#[test]
fn adapters_of_another_program_are_read() {
    for name in ["llama", "gpt2", "gemma3"] {
        let adapter = Adapter::read(&tiny_path(&format!("{name}-lora")), &tiny(name)).unwrap();
        assert!(!adapter.factors.is_empty() && !adapter.is_zero());
    }
}

#[test]
fn an_adapter_is_zero_if_every_product_is() {
    let base = tiny("llama");
    let mut adapter = adapter(&base);
    adapter.factors.iter_mut().for_each(|f| f.b.fill(0.0));
    assert!(adapter.is_zero());
    adapter.factors[2].b[7] = 1e-9;
    assert!(!adapter.is_zero());
}

#[test]
fn rejects_adapters_that_do_not_fit_and_writes_nothing() {
    let (folder, base) = (tempfile::tempdir().unwrap(), tiny("llama"));
    let path = folder.path().join("lora.gguf");
    let refusal = |change: &dyn Fn(&mut Adapter)| {
        let mut adapter = adapter(&base);
        change(&mut adapter);
        let error = adapter.write(&path, &base, &provenance()).unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        error.to_string()
    };
    let first = |change: fn(&mut Factors)| refusal(&|adapter| change(&mut adapter.factors[0]));
    for (found, part) in [
        (
            first(|f| f.name = "blk.9.attn_q.weight".into()),
            "blk.9.attn_q.weight\": the model has no such tensor",
        ),
        (first(|f| f.name = "blk.1.ffn_down.weight".into()), "expected a matrix [96, 64]"),
        (first(|f| f.rank = 0), "rank 0"),
        (first(|f| f.a.truncate(5)), ".lora_a: expected 192 values, found 5"),
        (first(|f| f.b.push(0.0)), ".lora_b: expected 192 values, found 193"),
        (first(|f| f.b[3] = f32::NAN), ".lora_b: expected finite numbers, found NaN at 3"),
        (refusal(&|adapter| adapter.alpha = f32::INFINITY), "finite alpha"),
        (refusal(&|adapter| adapter.factors.push(adapter.factors[0].clone())), "occurs twice"),
        (refusal(&|adapter| adapter.factors.clear()), "at least one matrix"),
    ] {
        assert!(found.contains(part), "{found}");
    }
}

#[test]
fn rejects_tied_embeddings_and_adapters_of_other_models() {
    let base = tiny("gemma3");
    let adapter = Adapter { alpha: 1.0, factors: vec![factors(&base, "token_embd.weight", 2, 0)] };
    let error = adapter.check(&base).unwrap_err();
    assert!(error.to_string().contains("also the output matrix") && error.hint().is_some(), "{error}");
    let error = Adapter::read(&tiny_path("gpt2-lora"), &tiny("llama")).unwrap_err();
    assert!(error.to_string().contains("architecture"), "{error}");
    assert!(matches!(Adapter::read(&tiny_path("none"), &base), Err(Error::Io { .. })));
}

#[test]
fn rejects_an_adapter_made_for_other_weights_unless_forced() {
    let (folder, base) = (tempfile::tempdir().unwrap(), tiny("llama"));
    let path = folder.path().join("lora.gguf");
    write(&adapter(&base), &path, &base);
    Adapter::check_fingerprint(&path, &base, false).unwrap();
    let quantised = tiny("llama-q8_0");
    let error = Adapter::check_fingerprint(&path, &quantised, false).unwrap_err();
    assert!(
        error.to_string().contains("these adapters") && error.hint().unwrap().contains("--force"),
        "{error}"
    );
    Adapter::check_fingerprint(&path, &quantised, true).unwrap();
    // A file of another program records no fingerprint.
    Adapter::check_fingerprint(&tiny_path("llama-lora"), &quantised, false).unwrap();
}

#[test]
fn f16_factors_are_read_as_f32() {
    let (folder, base) = (tempfile::tempdir().unwrap(), tiny("llama"));
    let path = folder.path().join("lora.gguf");
    let mut metadata = Metadata::new();
    for (key, value) in
        [("general.type", "adapter"), ("general.architecture", "llama"), ("adapter.type", "lora")]
    {
        metadata.set(key, Value::Str(value.into()));
    }
    let spec = |suffix: &str, shape: Vec<u64>| TensorSpec {
        name: format!("blk.0.attn_q.weight{suffix}"),
        shape,
        tensor_type: TensorType::F16,
    };
    let mut writer =
        GgufWriter::create(&path, &metadata, vec![spec(".lora_a", vec![64]), spec(".lora_b", vec![1, 64])])
            .unwrap();
    // 1.0 and -0.5 as F16.
    writer.write(&[0x00, 0x3c].repeat(64)).unwrap();
    writer.write(&[0x00, 0xb8].repeat(64)).unwrap();
    writer.finish().unwrap();
    let adapter = Adapter::read(&path, &base).unwrap();
    let factors = &adapter.factors[0];
    assert_eq!((factors.rank, factors.n_in, factors.n_out), (1, 64, 64));
    assert_eq!((&factors.a, &factors.b), (&vec![1.0; 64], &vec![-0.5; 64]));
}
