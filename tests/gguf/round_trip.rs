//! Files read back as they were written, and damaged files never cause a panic.

use std::time::Duration;

use detox_gguf::gguf::{
    Array, GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value, check_decoder, file_sha256,
};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::bytes::ARRAY;
use crate::bytes::{
    STR, array as array_bytes, gguf, on_disk, open, pair, str_array_pair, str_pair, string, tensor, u32_pair,
};

fn array() -> impl Strategy<Value = Array> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..9).prop_map(|v| Array::from(&v[..])),
        prop::collection::vec(any::<i16>(), 0..9).prop_map(|v| Array::from(&v[..])),
        prop::collection::vec(any::<u32>(), 0..9).prop_map(|v| Array::from(&v[..])),
        prop::collection::vec(any::<f32>(), 0..9).prop_map(|v| Array::from(&v[..])),
        prop::collection::vec(any::<i64>(), 0..9).prop_map(|v| Array::from(&v[..])),
        prop::collection::vec(any::<f64>(), 0..9).prop_map(|v| Array::from(&v[..])),
        prop::collection::vec(any::<String>(), 0..9).prop_map(Array::from_iter),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f32>().prop_map(Value::F32),
        any::<f64>().prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        any::<String>().prop_map(Value::Str),
        array().prop_map(Value::Array),
    ]
}

/// A tensor of any type, with rows of whole blocks.
fn spec() -> impl Strategy<Value = TensorSpec> {
    let types = prop::sample::select(TensorType::ALL);
    ("[a-z.0-9é]{1,20}", types, 1u64..3, prop::collection::vec(1u64..4, 0..4)).prop_map(
        |(name, tensor_type, n_blocks, rest)| {
            let shape = [vec![n_blocks * tensor_type.block_len()], rest].concat();
            TensorSpec { name, shape, tensor_type }
        },
    )
}

fn metadata() -> impl Strategy<Value = Metadata> {
    let pairs = prop::collection::btree_map("k[a-z._0-9ß]{0,20}", value(), 0..8);
    let alignment = prop::option::of(prop::sample::select(vec![1u32, 8, 32, 64, 4096]));
    (pairs, alignment).prop_map(|(pairs, alignment)| {
        let mut metadata = Metadata::new();
        for (key, value) in pairs {
            metadata.set(key, value);
        }
        if let Some(alignment) = alignment {
            metadata.set("general.alignment", Value::U32(alignment));
        }
        metadata
    })
}

/// Bytes that depend on their position and tensor.
fn data(n_bytes: u64, tensor_index: usize) -> Vec<u8> {
    (0..n_bytes).map(|i| (i as usize * 7 + tensor_index * 31) as u8).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn files_read_back_as_written(
        metadata in metadata(),
        specs in prop::collection::btree_map("[a-z]{1,8}", spec(), 0..6),
        chunk_bytes in 1usize..1000,
    ) {
        let specs: Vec<_> = specs.into_iter().map(|(name, spec)| TensorSpec { name, ..spec }).collect();
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("out.gguf");
        let mut writer = GgufWriter::create(&path, &metadata, specs.clone()).unwrap();
        for (i, spec) in specs.iter().enumerate() {
            let n_rows: u64 = spec.shape[1..].iter().product();
            let bytes = data(spec.tensor_type.row_bytes(spec.shape[0]).unwrap() * n_rows, i);
            bytes.chunks(chunk_bytes).try_for_each(|chunk| writer.write(chunk)).unwrap();
        }
        writer.finish().unwrap();

        let file = GgufFile::open(&path).unwrap();
        prop_assert_eq!(file.metadata(), &metadata);
        prop_assert_eq!(file.tensors().len(), specs.len());
        for (i, (tensor, spec)) in file.tensors().iter().zip(&specs).enumerate() {
            prop_assert_eq!((tensor.name(), tensor.shape(), tensor.tensor_type()),
                            (spec.name.as_str(), &spec.shape[..], spec.tensor_type));
            let expected = data(tensor.n_bytes(), i);
            prop_assert_eq!(&file.read_tensor(tensor).unwrap(), &expected);
            let mut tail = vec![0; expected.len() / 2];
            let offset = expected.len() - tail.len();
            file.read_tensor_at(tensor, offset as u64, &mut tail).unwrap();
            prop_assert_eq!(&tail, &expected[offset..]);
            prop_assert!(tensor.offset().is_multiple_of(file.alignment()));
        }
        prop_assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), is_gguf: bool) {
        let bytes = if is_gguf { [b"GGUF\x03\0\0\0", &bytes[..]].concat() } else { bytes };
        let _ = open(&bytes);
    }
}

/// A valid model with strings, numbers, an array and tensors in its header.
fn valid_model() -> Vec<u8> {
    let pairs = [
        str_pair("general.architecture", "xverse"),
        u32_pair("xverse.block_count", 1),
        u32_pair("xverse.embedding_length", 32),
        u32_pair("xverse.context_length", 64),
        u32_pair("xverse.feed_forward_length", 32),
        u32_pair("xverse.attention.head_count", 2),
        u32_pair("general.alignment", 32),
        str_pair("tokenizer.ggml.model", "gpt2"),
        str_array_pair("tokenizer.ggml.tokens", &["a", "b", "ab", "é"]),
        str_array_pair("tokenizer.ggml.merges", &["a b"]),
    ];
    let tensors = [
        tensor("token_embd.weight", &[32, 4], 0, 0),
        tensor("blk.0.ffn_down.weight", &[32, 32], 2, 512),
        tensor("output_norm.weight", &[32], 0, 512 + 576),
    ];
    gguf(&pairs, &tensors, 512 + 576 + 128)
}

/// Opens the file and calls everything that reads its header.
fn read_all(bytes: &[u8]) {
    let Ok((_folder, file)) = open(bytes) else { return };
    let _ = check_decoder(&file);
    let _ = (file.n_ff(), file.n_head(), file.n_head_kv(), file.n_vocab(), file.quant(), file.n_params());
    for tensor in file.tensors() {
        // The data of an accepted tensor is inside the file.
        assert_eq!(file.read_tensor(tensor).unwrap().len() as u64, tensor.n_bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn damaged_files_do_not_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = valid_model();
        for (at, mask) in flips {
            let i = at.index(bytes.len());
            bytes[i] ^= mask;
        }
        if let Some(at) = cut {
            bytes.truncate(at.index(bytes.len()));
        }
        read_all(&bytes);
    }
}

/// Peak address space of this process, in bytes.
#[cfg(target_os = "linux")]
fn peak_address_space_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[cfg(target_os = "linux")]
#[test]
fn false_lengths_do_not_allocate() {
    let valid = valid_model();
    read_all(&valid);
    let before = peak_address_space_bytes();
    // Overwrites every eight bytes of the header in turn with a huge length.
    for at in 0..valid.len() - 1216 - 8 {
        for claim in [u64::MAX, 1 << 62, 1 << 40, 1 << 30, 1 << 28] {
            let mut bytes = valid.clone();
            bytes[at..at + 8].copy_from_slice(&claim.to_le_bytes());
            read_all(&bytes);
        }
    }
    // Other tests may run in this process meanwhile. Trusting a false length would allocate gigabytes.
    let grown = peak_address_space_bytes() - before;
    assert!(grown < 256 << 20, "address space grew by {grown} bytes");
}

#[test]
fn the_undamaged_model_is_valid() {
    let (_folder, file) = open(&valid_model()).unwrap();
    check_decoder(&file).unwrap();
    assert_eq!(file.n_vocab().unwrap(), 4);
    assert_eq!(file.tokens().unwrap().iter().collect::<Vec<_>>(), ["a", "b", "ab", "é"]);
}

#[test]
fn strings_that_are_not_utf8_are_copied_byte_for_byte() {
    // "Модели" in code page 1251, a token that ends in the middle of a character, and a key in Latin-1.
    let name = b"\xcc\xee\xe4\xe5\xeb\xe8";
    let tokens = [string("ok"), string(b"\xe6\xbc")].concat();
    let key = [string(b"caf\xe9"), STR.to_le_bytes().to_vec(), string("x")].concat();
    let bytes = gguf(
        &[pair("general.name", STR, string(name)), key, pair("tokens", ARRAY, array_bytes(STR, 2, tokens))],
        &[],
        0,
    );
    let (folder, file) = open(&bytes).unwrap();
    assert_eq!(file.model_name().unwrap(), "\u{fffd}".repeat(6));
    assert_eq!(file.strings("tokens").unwrap().get(1).unwrap(), "\u{fffd}");
    assert_eq!(file.metadata().iter().nth(1).unwrap().0, "caf\u{fffd}");
    let message = file.str("general.name").unwrap_err().to_string();
    assert!(
        message.contains("key \"general.name\": expected str, found a str that is not UTF-8"),
        "{message}"
    );

    let mut copy = Metadata::new();
    copy.copy_from(file.metadata(), |_| true);
    let path = folder.path().join("copy.gguf");
    GgufWriter::create(&path, &copy, vec![]).unwrap().finish().unwrap();
    // The test pads the end of a file without tensors.
    assert!(bytes.starts_with(&std::fs::read(path).unwrap()));
}

#[test]
fn reads_format_version_2() {
    let mut bytes = valid_model();
    bytes[4] = 2;
    assert_eq!(open(&bytes).unwrap().1.version(), 2);
}

#[test]
fn accepts_missing_padding_and_extra_bytes_at_the_end() {
    // 4 bytes of data where the alignment rounds to 32.
    let short = gguf(&[], &[tensor("a", &[1], 0, 0)], 4);
    assert_eq!(open(&short).unwrap().1.tensor("a").unwrap().n_bytes(), 4);
    let long = gguf(&[], &[tensor("a", &[1], 0, 0)], 1000);
    assert!(open(&long).is_ok());
}

#[test]
fn notices_that_a_file_changed_after_it_was_opened() {
    let (_folder, path) = on_disk("model.gguf", &valid_model());
    let file = GgufFile::open(&path).unwrap();
    file.check_unchanged().unwrap();
    let last = &file.tensors()[2];

    let handle = std::fs::File::options().write(true).open(&path).unwrap();
    handle.set_len(last.offset() + 1).unwrap();
    assert!(file.check_unchanged().unwrap_err().to_string().contains("changed"));
    assert!(file.read_tensor(last).is_err(), "a truncated file is an error, not a signal");

    handle.set_len(valid_model().len() as u64).unwrap();
    handle.set_modified(std::time::SystemTime::now() + Duration::from_secs(60)).unwrap();
    assert!(file.check_unchanged().is_err());
}

#[test]
fn hashes_like_sha256sum_and_reports_progress_to_the_end() {
    let (_folder, path) = on_disk("abc", b"abc");
    let mut seen = Vec::new();
    let hash = file_sha256(&path, |done, total| seen.push((done, total))).unwrap();
    // The first example of FIPS 180-2.
    assert_eq!(hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!(seen, [(3, 3)]);
    assert!(file_sha256("/nowhere", |_, _| ()).is_err());
}

#[test]
fn block_sizes_match_ggml() {
    // Bits per weight from llama.cpp's own table (llama-quantize):
    // q4_0 4.5, q4_K 4.5, q6_K 6.5625, iq2_xxs 2.0625, tq1_0 1.6875.
    for (tensor_type, bits_per_weight) in [
        (TensorType::Q4_0, 4.5),
        (TensorType::Q4_K, 4.5),
        (TensorType::Q6_K, 6.5625),
        (TensorType::IQ2_XXS, 2.0625),
        (TensorType::TQ1_0, 1.6875),
        (TensorType::F16, 16.0),
    ] {
        let found = tensor_type.block_bytes() as f64 * 8.0 / tensor_type.block_len() as f64;
        assert_eq!(found, bits_per_weight, "{tensor_type}");
    }
}
