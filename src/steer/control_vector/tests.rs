use super::*;

/// Writes a file as another tool might: any tensors, any metadata.
fn write_raw(path: &Path, metadata: &[(&str, Value)], tensors: &[(&str, &[f32])]) {
    let mut all = Metadata::new();
    for (key, value) in metadata {
        all.set(*key, value.clone());
    }
    let spec = |(name, values): &(&str, &[f32])| TensorSpec {
        name: (*name).into(),
        shape: vec![values.len() as u64],
        tensor_type: TensorType::F32,
    };
    let mut writer = GgufWriter::create(path, &all, tensors.iter().map(spec).collect()).unwrap();
    // As bytes, because `write_f32s` refuses NaN.
    for (_, values) in tensors {
        writer.write(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    }
    writer.finish().unwrap();
}

fn kind(architecture: &str) -> (&'static str, Value) {
    ("general.architecture", Value::Str(architecture.into()))
}

fn read_raw(tensors: &[(&str, &[f32])]) -> Result<ControlVectorFile> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cv.gguf");
    write_raw(&path, &[kind(ARCHITECTURE)], tensors);
    ControlVectorFile::read(&path)
}

fn of_directions(directions: &[(usize, &[f32])]) -> ControlVectorFile {
    ControlVectorFile {
        path: "cv.gguf".into(),
        model_hint: None,
        fingerprint: None,
        directions: directions.iter().map(|(layer, values)| (*layer, values.to_vec())).collect(),
        metadata: Metadata::new(),
    }
}

fn fingerprint(n_layer: u32, n_embd: u32) -> Fingerprint {
    let (n_ff, ffn_down_sha256) = (vec![8; n_layer as usize], "ab".repeat(32));
    Fingerprint { architecture: "llama".into(), n_layer, n_embd, n_ff, ffn_down_sha256 }
}

#[test]
fn a_written_control_vector_is_read_back_with_its_origin() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cv.gguf");
    let directions = BTreeMap::from([(1, vec![0.1, -2.5]), (3, vec![0.0, 1e-30])]);
    let mut provenance = Metadata::new();
    provenance.set("detox_gguf.offset", Value::F32(-2.0));
    write(&path, &fingerprint(4, 2), &directions, &provenance).unwrap();
    let file = ControlVectorFile::read(&path).unwrap();
    assert_eq!(file.directions, directions);
    assert_eq!(file.model_hint.as_deref(), Some("llama"));
    assert_eq!(file.fingerprint, Some(fingerprint(4, 2)));
    assert_eq!(file.n_embd(), 2);
    // An i32 with the number of directions, as llama.cpp's cvector-generator writes it.
    assert_eq!(file.metadata.get(LAYER_COUNT), Some(&Value::I32(2)));
    assert_eq!(file.metadata.get("detox_gguf.offset"), Some(&Value::F32(-2.0)));
}

#[test]
fn the_count_may_be_i32_or_u32_as_other_tools_write_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cv.gguf");
    for count in [Value::I32(1), Value::U32(1)] {
        let hint = (MODEL_HINT, Value::Str("mistral".into()));
        write_raw(&path, &[kind(ARCHITECTURE), hint, (LAYER_COUNT, count)], &[("direction.2", &[1.0, 2.0])]);
        let file = ControlVectorFile::read(&path).unwrap();
        assert_eq!(file.directions, BTreeMap::from([(2, vec![1.0, 2.0])]));
        assert_eq!((file.fingerprint, file.model_hint.as_deref()), (None, Some("mistral")));
    }
    // llama.cpp does not require an architecture.
    write_raw(&path, &[], &[("direction.2", &[1.0, 2.0])]);
    assert!(ControlVectorFile::read(&path).is_ok());
}

#[test]
fn several_directions_for_one_layer_add_up() {
    let file = read_raw(&[("direction.1", &[1.0, 2.0]), ("direction.01", &[0.5, -2.0])]).unwrap();
    assert_eq!(file.directions, BTreeMap::from([(1, vec![1.5, 0.0])]));
}

#[test]
fn files_add_up_times_their_scales() {
    let a = of_directions(&[(1, &[1.0, 2.0]), (3, &[4.0, 0.0])]);
    let b = of_directions(&[(1, &[1.0, -1.0])]);
    // Row 0 is layer 1: 2 * [1, 2] - 0.5 * [1, -1]; layer 2 has none; row 2 is 2 * [4, 0].
    let sum = combine(&[(a.clone(), 2.0), (b, -0.5)], None, 4, 2).unwrap();
    assert_eq!((sum.n_embd, sum.rows), (2, vec![1.5, 4.5, 0.0, 0.0, 8.0, 0.0]));
    // The same file twice equals twice the scale; a half and its negative cancel.
    let twice = combine(&[(a.clone(), 1.0), (a.clone(), 1.0)], None, 4, 2).unwrap();
    assert_eq!(twice, combine(&[(a.clone(), 2.0)], None, 4, 2).unwrap());
    let nothing = combine(&[(a.clone(), 0.5), (a, -0.5)], None, 4, 2).unwrap();
    assert!(nothing.rows.iter().all(|&value| value == 0.0));
}

#[test]
fn a_layer_range_is_inclusive_and_bounds_below_1_mean_the_first_and_last_layer() {
    let file = of_directions(&[(1, &[1.0]), (2, &[1.0]), (3, &[1.0])]);
    let rows = |range| combine(&[(file.clone(), 1.0)], Some(range), 4, 1).unwrap().rows;
    assert_eq!(rows((2, 3)), [0.0, 1.0, 1.0]);
    assert_eq!(rows((2, 2)), [0.0, 1.0, 0.0]);
    assert_eq!(rows((-1, 2)), [1.0, 1.0, 0.0]);
    assert_eq!(rows((2, 0)), [0.0, 1.0, 1.0]);
    assert_eq!(rows((3, 99)), [0.0, 0.0, 1.0]);
}

#[test]
fn rejects_an_empty_layer_range() {
    let file = of_directions(&[(1, &[1.0])]);
    for range in [(3, 2), (4, 5)] {
        let error = combine(&[(file.clone(), 1.0)], Some(range), 4, 1).unwrap_err();
        assert!(error.is_usage(), "{error}");
    }
}

#[test]
fn rejects_scales_and_sums_that_are_not_finite() {
    let file = of_directions(&[(2, &[1e30])]);
    assert!(combine(&[(file.clone(), f32::NAN)], None, 3, 1).is_err());
    let error = combine(&[(file, 1e30)], None, 3, 1).unwrap_err().to_string();
    assert!(error.contains("after layer 2"), "{error}");
}

#[test]
fn rejects_directions_that_do_not_fit_the_model() {
    let file = of_directions(&[(1, &[1.0, 2.0]), (4, &[1.0, 2.0])]);
    file.check_sizes(5, 2).unwrap();
    let error = file.check_sizes(4, 2).unwrap_err().to_string();
    assert!(error.contains("direction.4: expected a layer below 4"), "{error}");
    let error = file.check_sizes(5, 3).unwrap_err().to_string();
    assert!(error.contains("direction.1: expected 3 numbers"), "{error}");
    assert!(combine(&[(file, 1.0)], None, 4, 2).is_err());
}

#[test]
fn rejects_a_direction_for_layer_0() {
    let error = read_raw(&[("direction.0", &[1.0])]).unwrap_err().to_string();
    assert!(error.contains("expected layers from 1"), "{error}");
}

#[test]
fn rejects_tensors_that_are_not_directions() {
    for name in ["direction", "direction.", "direction.x", "direction.-1", "direction.1.weight", "other.1"] {
        let error = read_raw(&[("direction.1", &[1.0]), (name, &[1.0])]).unwrap_err().to_string();
        assert!(error.contains(&format!("{name:?}: expected direction.N")), "{error}");
    }
}

#[test]
fn rejects_directions_of_another_type_or_shape() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cv.gguf");
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::Str(ARCHITECTURE.into()));
    for (shape, tensor_type, words) in
        [(vec![2], TensorType::F16, "found f16"), (vec![1, 2], TensorType::F32, "one dimension")]
    {
        let n_bytes = if tensor_type == TensorType::F16 { 4 } else { 8 };
        let spec = TensorSpec { name: "direction.1".into(), shape, tensor_type };
        let mut writer = GgufWriter::create(&path, &metadata, vec![spec]).unwrap();
        writer.write(&vec![0; n_bytes]).unwrap();
        writer.finish().unwrap();
        let error = ControlVectorFile::read(&path).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn rejects_directions_of_two_lengths() {
    let error = read_raw(&[("direction.1", &[1.0]), ("direction.2", &[1.0, 2.0])]).unwrap_err().to_string();
    assert!(error.contains("expected 1 numbers"), "{error}");
}

#[test]
fn rejects_values_that_are_not_finite() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = read_raw(&[("direction.1", &[1.0, value])]).unwrap_err().to_string();
        assert!(error.contains("found") && error.ends_with("at index 1"), "{error}");
    }
}

#[test]
fn rejects_a_file_without_directions() {
    assert!(read_raw(&[]).unwrap_err().to_string().contains("found none"));
}

#[test]
fn rejects_other_gguf_files_and_names_their_kind() {
    let model = ControlVectorFile::read(Path::new("gguf/tiny/llama.gguf")).unwrap_err();
    assert!(model.to_string().contains("found a model of architecture \"llama\""), "{model}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.gguf");
    write_raw(&path, &[kind("llama"), ("general.type", Value::Str("adapter".into()))], &[]);
    let lora = ControlVectorFile::read(&path).unwrap_err();
    assert!(lora.to_string().contains("found a LoRA adapter"), "{lora}");
    assert_eq!(lora.hint().as_deref(), Some("use it with --lora"));
    write_raw(&path, &[], &[("x", &[1.0])]);
    assert!(ControlVectorFile::read(&path).unwrap_err().to_string().contains("without directions"));
}

#[test]
fn rejects_a_control_vector_of_another_model_and_force_allows_only_other_weights() {
    let (made_for, mut file) = (fingerprint(4, 1), of_directions(&[(1, &[1.0])]));
    file.fingerprint = Some(made_for.clone());
    file.check_origin(&made_for, false).unwrap();
    let quantised = Fingerprint { ffn_down_sha256: "cd".repeat(32), ..made_for.clone() };
    assert!(file.check_origin(&quantised, false).is_err());
    file.check_origin(&quantised, true).unwrap();
    let other = Fingerprint { architecture: "gpt2".into(), ..made_for };
    assert!(file.check_origin(&other, true).is_err());
}

#[test]
fn a_different_hint_without_a_fingerprint_is_not_an_error() {
    let mut file = of_directions(&[(1, &[1.0])]);
    file.model_hint = Some("mistral".into());
    file.check_origin(&fingerprint(4, 1), false).unwrap();
}

#[test]
fn rejects_writing_a_file_that_no_runtime_could_use() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cv.gguf");
    let try_write = |directions: &[(usize, Vec<f32>)]| {
        let directions = directions.iter().cloned().collect();
        write(&path, &fingerprint(4, 2), &directions, &Metadata::new()).unwrap_err()
    };
    assert!(try_write(&[]).to_string().contains("at least one direction"));
    assert!(try_write(&[(0, vec![1.0, 2.0])]).hint().unwrap().contains("--bake"));
    assert!(try_write(&[(4, vec![1.0, 2.0])]).to_string().contains("below 4"));
    assert!(try_write(&[(1, vec![1.0])]).to_string().contains("expected 2 numbers, found 1"));
    assert!(try_write(&[(1, vec![1.0, f32::NAN])]).to_string().contains("found NaN"));
    let mut taken = Metadata::new();
    taken.set(MODEL_HINT, Value::Str("other".into()));
    let directions = BTreeMap::from([(1, vec![1.0, 2.0])]);
    assert!(write(&path, &fingerprint(4, 2), &directions, &taken).is_err());
    assert!(!path.exists());
}
