//! Compares merged models with their bases and the adapters at run time.

use std::path::Path;

use detox_gguf::check::difference::compare;
use detox_gguf::engine::steering::LoraScaled;
use detox_gguf::error::{Error, Result};
use detox_gguf::gguf::{GgufFile, GgufWriter, TensorSpec, TensorType, check_decoder};
use detox_gguf::gguf::{dequantize, quantize};
use detox_gguf::train::output::Adapter;
use detox_gguf::train::output::merge::{MergeOptions, merge};
use detox_gguf::train::output::merge_report::MergeReport;

use super::split::split_in_two;
use super::{factors, largest_difference, logits, provenance, tiny, tiny_path, write};

fn merged(
    base: &GgufFile,
    adapters: &[(Adapter, f32)],
    output: &Path,
    options: &MergeOptions,
) -> Result<MergeReport> {
    let mut last = 0;
    let report = merge(base, adapters, output, options, |done, total| {
        assert!(done > last && done <= total, "{done} of {total}");
        last = done;
        Ok(())
    })?;
    assert_eq!(last, base.tensors().iter().map(|tensor| tensor.n_bytes()).sum::<u64>());
    Ok(report)
}

/// Writes a copy of a tiny model with its matrices in another type.
fn quantised(name: &str, tensor_type: TensorType, path: &Path) -> GgufFile {
    let model = tiny(name);
    let type_of = |shape: &[u64]| if shape.len() > 1 { tensor_type } else { TensorType::F32 };
    let specs = model.tensors().iter().map(|tensor| TensorSpec {
        name: tensor.name().into(),
        shape: tensor.shape().to_vec(),
        tensor_type: type_of(tensor.shape()),
    });
    let mut writer = GgufWriter::create(path, model.metadata(), specs.collect()).unwrap();
    for tensor in model.tensors() {
        let mut values = vec![0.0; tensor.n_elements() as usize];
        dequantize(tensor.tensor_type(), &model.read_tensor(tensor).unwrap(), &mut values).unwrap();
        let n_per_row = tensor.shape()[0] as usize;
        writer.write(&quantize(type_of(tensor.shape()), &values, n_per_row).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    GgufFile::open(path).unwrap()
}

fn changed_tensors(a: &GgufFile, b: &GgufFile) -> Vec<String> {
    assert_eq!(a.tensors().len(), b.tensors().len());
    let pairs = a.tensors().iter().zip(b.tensors());
    let changed = pairs.filter(|(a_tensor, b_tensor)| {
        assert_eq!((a_tensor.name(), a_tensor.shape()), (b_tensor.name(), b_tensor.shape()));
        a_tensor.tensor_type() != b_tensor.tensor_type()
            || a.read_tensor(a_tensor).unwrap() != b.read_tensor(b_tensor).unwrap()
    });
    changed.map(|(tensor, _)| tensor.name().to_owned()).collect()
}

#[test]
fn merged_f32_models_give_the_logits_of_their_adapters() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama", "gpt2", "gemma3"] {
        let (base, lora) = (tiny(name), tiny_path(&format!("{name}-lora")));
        let adapter = Adapter::read(&lora, &base).unwrap();
        for scale in [1.0, -0.5] {
            let output = folder.path().join(format!("{name}.gguf"));
            let options = MergeOptions { provenance: provenance(), ..MergeOptions::default() };
            let report = merged(&base, &[(adapter.clone(), scale)], &output, &options).unwrap();
            let expected = logits(base.path(), &[LoraScaled { path: lora.clone(), scale }]);
            let found = logits(&output, &[]);
            let effect = largest_difference(&expected, &logits(base.path(), &[]));
            let worst = largest_difference(&expected, &found);
            assert!(effect > 0.1, "{name}: {effect}");
            assert!(worst < bound(name), "{name} at {scale}: {worst}");
            let kl = compare(&found, &expected).mean_kl;
            assert!(kl < 1e-6, "{name}: {kl}");

            let written = GgufFile::open(&output).unwrap();
            check_decoder(&written).unwrap();
            let mut names: Vec<&str> = adapter.factors.iter().map(|f| f.name.as_str()).collect();
            let mut changed = changed_tensors(&base, &written);
            names.sort_unstable();
            changed.sort_unstable();
            assert_eq!(changed, names, "{name}");
            for (key, value) in base.metadata().iter() {
                assert_eq!(written.metadata().get(key), Some(value), "{name}: {key}");
            }
            assert_eq!(written.str("detox_gguf.test").unwrap(), "yes");
            let survived = report.total.survived().unwrap();
            assert!((survived - 1.0).abs() < 1e-5 && report.advice().is_none(), "{name}: {survived}");
        }
    }
}

/// ggml looks up GELU, which gpt2 and gemma3 use, in an F16 table: the last bit of the input selects the entry.
fn bound(name: &str) -> f32 {
    if name == "llama" { 1e-4 } else { 5e-3 }
}

#[test]
fn adapters_of_different_ranks_add_up_and_those_of_embeddings_are_transposed() {
    let (folder, base) = (tempfile::tempdir().unwrap(), tiny("llama"));
    let embedding = Adapter { alpha: 0.0, factors: vec![factors(&base, "token_embd.weight", 3, 5)] };
    let both = Adapter {
        alpha: 4.0,
        factors: vec![
            factors(&base, "token_embd.weight", 2, 7),
            factors(&base, "output.weight", 5, 9),
            factors(&base, "blk.2.attn_v.weight", 1, 11),
        ],
    };
    let mut loras = vec![
        write(&embedding, &folder.path().join("embedding.gguf"), &base),
        write(&both, &folder.path().join("both.gguf"), &base),
    ];
    loras[1].scale = -0.5;
    let output = folder.path().join("merged.gguf");
    let adapters = [(embedding, 1.0), (both, -0.5)];
    let report = merged(&base, &adapters, &output, &MergeOptions::default()).unwrap();
    assert_eq!(report.tensors.len(), 3);
    let expected = logits(base.path(), &loras);
    let worst = largest_difference(&expected, &logits(&output, &[]));
    assert!(worst < 1e-4, "{worst}");
    for lora in loras {
        assert!(
            largest_difference(&expected, &logits(base.path(), &[lora])) > 0.1,
            "each adapter must have an effect"
        );
    }
}

#[test]
fn a_change_of_one_row_keeps_the_bytes_of_the_other_rows() {
    let folder = tempfile::tempdir().unwrap();
    for tensor_type in [TensorType::Q8_0, TensorType::Q4_0, TensorType::IQ4_NL] {
        let base = quantised("llama", tensor_type, &folder.path().join("base.gguf"));
        let mut factors = factors(&base, "blk.1.ffn_down.weight", 2, 3);
        let row = 5;
        for (i, b) in factors.b.iter_mut().enumerate() {
            *b = if i / 2 == row { 1.0 } else { 0.0 };
        }
        let output = folder.path().join("merged.gguf");
        let adapters = [(Adapter { alpha: 2.0, factors: vec![factors] }, 1.0)];
        merged(&base, &adapters, &output, &MergeOptions::default()).unwrap();
        let written = GgufFile::open(&output).unwrap();
        assert_eq!(changed_tensors(&base, &written), ["blk.1.ffn_down.weight"]);
        let read = |file: &GgufFile| file.read_tensor(file.tensor("blk.1.ffn_down.weight").unwrap()).unwrap();
        let row_bytes = tensor_type.row_bytes(96).unwrap() as usize;
        for (at, (a, b)) in read(&base).chunks(row_bytes).zip(read(&written).chunks(row_bytes)).enumerate() {
            assert_eq!(a != b, at == row, "{tensor_type}, row {at}");
        }
    }
}

#[test]
fn unchanged_blocks_of_a_changed_row_keep_their_bytes() {
    let folder = tempfile::tempdir().unwrap();
    // The iq4_nl quantiser searches for scales, and finds other ones when it requantises its own values.
    let base = quantised("llama", TensorType::IQ4_NL, &folder.path().join("base.gguf"));
    let mut factors = factors(&base, "blk.1.ffn_down.weight", 1, 3);
    // Columns 32 to 63: the middle one of three blocks.
    factors.a.iter_mut().enumerate().for_each(|(i, a)| *a = if i / 32 == 1 { 0.2 } else { 0.0 });
    factors.b.fill(1.0);
    let output = folder.path().join("merged.gguf");
    let adapters = [(Adapter { alpha: 0.0, factors: vec![factors] }, 1.0)];
    let report = merged(&base, &adapters, &output, &MergeOptions::default()).unwrap();
    let written = GgufFile::open(&output).unwrap();
    let read = |file: &GgufFile| file.read_tensor(file.tensor("blk.1.ffn_down.weight").unwrap()).unwrap();
    for (at, (a, b)) in read(&base).chunks(18).zip(read(&written).chunks(18)).enumerate() {
        assert_eq!(a != b, at % 3 == 1, "block {at}");
    }
    assert!(report.total.moved() > 0.2 && report.total.moved() < 0.34, "{}", report.total.moved());
}

#[test]
fn a_split_model_merges_into_the_same_single_file_as_the_whole_model() {
    let folder = tempfile::tempdir().unwrap();
    let base = tiny("llama");
    let split = GgufFile::open(split_in_two(&base, folder.path())).unwrap();
    let adapters =
        [(Adapter { factors: vec![factors(&base, "blk.1.ffn_down.weight", 2, 5)], alpha: 2.0 }, 1.0)];
    let [of_whole, of_split] = [(&base, "whole.gguf"), (&split, "split.gguf")].map(|(base, name)| {
        let output = folder.path().join(name);
        merged(base, &adapters, &output, &MergeOptions { tensor_type: None, provenance: provenance() })
            .unwrap();
        GgufFile::open(&output).unwrap()
    });
    assert_eq!(of_split.part_paths().len(), 1);
    assert_eq!(of_split.metadata(), of_whole.metadata());
    assert!(changed_tensors(&of_whole, &of_split).is_empty());
    assert_eq!(changed_tensors(&base, &of_split), ["blk.1.ffn_down.weight"]);
}

#[test]
fn an_interrupted_merge_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let base = tiny("llama");
    let adapters =
        [(Adapter { factors: vec![factors(&base, "blk.1.ffn_down.weight", 2, 5)], alpha: 2.0 }, 1.0)];
    let options = MergeOptions { tensor_type: None, provenance: provenance() };
    let mut n_calls = 0;
    let error = merge(&base, &adapters, &folder.path().join("merged.gguf"), &options, |_, _| {
        n_calls += 1;
        if n_calls == 3 { Err(Error::Interrupted) } else { Ok(()) }
    });
    assert!(matches!(error, Err(Error::Interrupted)), "{error:?}");
    assert_eq!((n_calls, std::fs::read_dir(folder.path()).unwrap().count()), (3, 0));
}

#[test]
fn an_adapter_of_zeros_changes_no_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let q4_0 = quantised("llama", TensorType::Q4_0, &folder.path().join("q4_0.gguf"));
    for base in [tiny("llama"), tiny("llama-q8_0"), q4_0] {
        let mut zero = factors(&base, "blk.0.ffn_up.weight", 4, 1);
        zero.b.fill(0.0);
        let scaled = Adapter { alpha: 4.0, factors: vec![factors(&base, "blk.1.attn_q.weight", 4, 1)] };
        let adapters = [(Adapter { alpha: 4.0, factors: vec![zero] }, 1.0), (scaled, 0.0)];
        let output = folder.path().join("merged.gguf");
        let report = merged(&base, &adapters, &output, &MergeOptions::default()).unwrap();
        assert_eq!((report.tensors.len(), report.total.survived(), report.total.moved()), (2, None, 0.0));
        assert_eq!(changed_tensors(&base, &GgufFile::open(&output).unwrap()), [""; 0]);
    }
}

#[test]
fn the_report_says_how_much_of_a_small_change_survived_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    for (tensor_type, size, finer) in [(TensorType::Q8_0, 2e-4, "f16"), (TensorType::Q4_0, 4e-3, "q8_0")] {
        let base = quantised("llama", tensor_type, &folder.path().join("base.gguf"));
        // All changes have the same size, far below a quantisation step.
        let mut adapter = Adapter { alpha: 0.0, factors: Vec::new() };
        for il in 0..3 {
            for name in ["attn_q", "attn_v", "ffn_up", "ffn_down"] {
                let mut factors = factors(&base, &format!("blk.{il}.{name}.weight"), 1, il);
                factors.a.iter_mut().for_each(|a| *a = size * a.signum());
                factors.b.iter_mut().for_each(|b| *b = b.signum());
                adapter.factors.push(factors);
            }
        }
        let n_weights: usize = adapter.factors.iter().map(|f| f.n_in * f.n_out).sum();
        let report_of = |tensor_type| {
            let output = folder.path().join("merged.gguf");
            let options = MergeOptions { tensor_type, ..MergeOptions::default() };
            let report = merged(&base, &[(adapter.clone(), 1.0)], &output, &options).unwrap();
            // The survived share is the projection, computed here from both files.
            let survived = report.total.survived().unwrap();
            assert!((projection(&base, &output, &adapter) - survived).abs() < 1e-6);
            let norm = f64::from(size) * (n_weights as f64).sqrt();
            assert!((report.total.norm() / norm - 1.0).abs() < 1e-5);
            // The same merge gives the same bytes.
            let again = folder.path().join("again.gguf");
            merged(&base, &[(adapter.clone(), 1.0)], &again, &options).unwrap();
            assert!(std::fs::read(&again).unwrap() == std::fs::read(&output).unwrap());
            report
        };
        let lost = report_of(None);
        assert!(lost.total.survived().unwrap() < 0.3, "{tensor_type}: {:?}", lost.total);
        assert!(lost.total.relative_error().unwrap() > 0.7);
        let advice = lost.advice().unwrap();
        assert!(advice.contains("% of the change survived") && advice.contains("--lora"), "{advice}");
        assert!(advice.contains(&format!("--type {finer}")), "{advice}");

        let kept = report_of(Some(TensorType::F32));
        assert!((kept.total.survived().unwrap() - 1.0).abs() < 1e-4 && kept.advice().is_none());
        assert!(kept.tensors.iter().all(|t| (t.from, t.to) == (tensor_type, TensorType::F32)));
        let written = GgufFile::open(folder.path().join("merged.gguf")).unwrap();
        assert!(written.metadata().get("general.file_type").is_none());
    }
}

/// The projection of the change between two files on B A, relative to B A.
fn projection(base: &GgufFile, merged: &Path, adapter: &Adapter) -> f64 {
    let merged = GgufFile::open(merged).unwrap();
    let (mut along, mut all) = (0.0, 0.0);
    for factors in &adapter.factors {
        let read = |file: &GgufFile| {
            let tensor = file.tensor(&factors.name).unwrap();
            let mut values = vec![0.0; tensor.n_elements() as usize];
            dequantize(tensor.tensor_type(), &file.read_tensor(tensor).unwrap(), &mut values).unwrap();
            values
        };
        for (i, (before, after)) in read(base).iter().zip(read(&merged)).enumerate() {
            // Rank 1 without an alpha.
            let wanted = f64::from(factors.b[i / factors.n_in] * factors.a[i % factors.n_in]);
            along += wanted * (f64::from(after) - f64::from(*before));
            all += wanted * wanted;
        }
    }
    along / all
}

#[test]
fn rejects_merges_that_cannot_be_done_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let base = tiny("llama");
    let name = "blk.1.ffn_down.weight";
    let adapter = |base: &GgufFile| Adapter { alpha: 1.0, factors: vec![factors(base, name, 2, 0)] };
    let output = folder.path().join("merged.gguf");
    let refusal = |adapters: &[(Adapter, f32)], options: &MergeOptions| {
        let error = merged(&base, adapters, &output, options).unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        (error.to_string(), error.hint().unwrap_or_default())
    };
    let of_type = |t| MergeOptions { tensor_type: Some(t), ..MergeOptions::default() };
    let plain = MergeOptions::default();
    let (reason, hint) = refusal(&[(adapter(&base), 1.0)], &of_type(TensorType::IQ2_XXS));
    assert!(reason.contains(name) && reason.contains("importance matrix"), "{reason}");
    assert!(hint.contains("--type q8_0") && hint.contains("--lora"), "{hint}");
    let (reason, _) = refusal(&[(adapter(&base), 1.0)], &of_type(TensorType::Q4_K));
    assert!(reason.contains("multiple of 256 numbers, found 96"), "{reason}");
    let (reason, _) = refusal(&[(adapter(&base), 1.0)], &of_type(TensorType::I8));
    assert!(reason.contains("not a type of weights"), "{reason}");
    let (reason, _) = refusal(&[(adapter(&base), f32::NAN)], &plain);
    assert!(reason.contains("finite scale"), "{reason}");
    let (reason, hint) = refusal(&[(adapter(&base), 1e9)], &of_type(TensorType::F16));
    assert!(reason.contains("does not fit into type f16") && hint.contains("--type f32"), "{reason}");
    let mut huge = adapter(&base);
    huge.factors[0].a.fill(3e38);
    let (reason, _) = refusal(&[(huge, 3e38)], &plain);
    assert!(reason.contains("the adapters change a weight of row 0 by"), "{reason}");
    let other = Adapter::read(&tiny_path("gpt2-lora"), &tiny("gpt2")).unwrap();
    assert!(refusal(&[(other, 1.0)], &plain).0.contains("expected a matrix [96, 64]"));

    // An error of the progress callback stops the merge.
    let error = merge(&base, &[(adapter(&base), 1.0)], &output, &plain, |_, _| Err(Error::Interrupted));
    assert!(matches!(error, Err(Error::Interrupted)));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let error = merged(&base, &[(adapter(&base), 1.0)], base.path(), &plain).unwrap_err();
    assert!(error.to_string().contains("is an input of this command"), "{error}");
    let error = merged(&base, &[(adapter(&base), 1.0)], folder.path(), &plain).unwrap_err();
    assert!(error.to_string().contains("the folder"), "{error}");
}

#[test]
fn rejects_weights_that_are_not_finite_and_tensors_with_a_scale_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny("llama");
    let name = "blk.1.ffn_down.weight";
    let copy = |path: &Path, bad: bool| {
        let mut specs: Vec<TensorSpec> = Vec::new();
        for tensor in model.tensors() {
            let (name, shape) = (tensor.name().to_owned(), tensor.shape().to_vec());
            specs.push(TensorSpec { name, shape, tensor_type: tensor.tensor_type() });
        }
        if !bad {
            let shape = vec![1];
            specs.push(TensorSpec {
                name: "blk.1.ffn_down.scale".into(),
                shape,
                tensor_type: TensorType::F32,
            });
        }
        let mut writer = GgufWriter::create(path, model.metadata(), specs).unwrap();
        for tensor in model.tensors() {
            let mut bytes = model.read_tensor(tensor).unwrap();
            if bad && tensor.name() == name {
                // Element 200.
                bytes[4 * 200..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
            }
            writer.write(&bytes).unwrap();
        }
        if !bad {
            writer.write_f32s(&[1.0]).unwrap();
        }
        writer.finish().unwrap();
        GgufFile::open(path).unwrap()
    };
    for (bad, part) in
        [(true, "expected finite numbers, found NaN at element 200"), (false, "ffn_down.scale")]
    {
        let base = copy(&folder.path().join("base.gguf"), bad);
        let adapter = Adapter { alpha: 1.0, factors: vec![factors(&base, name, 2, 0)] };
        let output = folder.path().join("merged.gguf");
        let error = merged(&base, &[(adapter, 1.0)], &output, &MergeOptions::default()).unwrap_err();
        assert!(error.to_string().contains(part) && error.to_string().contains(name), "{error}");
        assert!(error.hint().is_some() && !output.exists());
    }
}
