//! One test per reason to refuse a file.

use detox_gguf::Error;
use detox_gguf::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value};

use crate::bytes::*;

// Other formats.

#[test]
fn rejects_a_missing_file() {
    let error = GgufFile::open("/nowhere/model.gguf").unwrap_err();
    assert!(matches!(error, Error::Io { action: "open", .. }), "{error:?}");
}

#[test]
fn rejects_a_directory() {
    let folder = tempfile::TempDir::new().unwrap();
    let error = GgufFile::open(folder.path()).unwrap_err();
    assert_words(&error.to_string(), &["expected a file", "found a folder"]);
    assert!(!error.hint().unwrap().contains("download"));
    std::fs::write(folder.path().join("m.gguf"), "").unwrap();
    let error = GgufFile::open(folder.path()).unwrap_err();
    assert_words(&error.hint().unwrap(), &["pass a file in it", "m.gguf"]);
}

#[cfg(unix)]
#[test]
fn rejects_a_device() {
    let error = GgufFile::open("/dev/null").unwrap_err();
    assert_words(&error.to_string(), &["expected a file, found a device"]);
}

#[test]
fn rejects_an_empty_file() {
    assert_rejected(b"", &["the file is empty"]);
}

#[test]
fn rejects_an_html_page() {
    assert_rejected(
        b"\n<!DOCTYPE html><html>sign in</html>",
        &["expected it to begin with \"GGUF\"", "HTML page"],
    );
    assert_rejected(b"<html lang=\"en\">", &["HTML page"]);
}

#[test]
fn rejects_an_xml_error() {
    assert_rejected(b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code>", &["XML document"]);
}

#[test]
fn rejects_a_json_error() {
    assert_rejected(b"{\"error\": \"Repository not found\"}", &["JSON text"]);
}

#[test]
fn rejects_a_line_of_text() {
    assert_rejected(b"Entry not found", &["entry not found"]);
}

#[test]
fn rejects_a_zip_archive() {
    assert_rejected(
        b"PK\x03\x04\x00\x00\x08\x08archive/data.pkl",
        &["ZIP archive", "PyTorch", "convert_hf_to_gguf.py"],
    );
}

#[test]
fn rejects_a_pickle() {
    assert_rejected(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", &["Python pickle"]);
}

#[test]
fn rejects_safetensors() {
    let json = b"{\"a\":{\"dtype\":\"F32\"}}";
    let bytes = [&(json.len() as u64).to_le_bytes()[..], json].concat();
    assert_rejected(&bytes, &["safetensors"]);
}

#[test]
fn rejects_a_git_lfs_pointer() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 98362432\n";
    assert_rejected(pointer, &["git-lfs pointer", "98362432 bytes", "git lfs pull"]);
}

#[test]
fn rejects_compressed_files() {
    assert_rejected(b"\x1f\x8b\x08\x00\x00\x00\x00\x00", &["gzip"]);
    assert_rejected(b"\x28\xb5\x2f\xfd\x00\x00\x00\x00", &["zstd"]);
}

#[test]
fn rejects_the_predecessors_of_gguf() {
    for (on_disk, name) in [(b"tjgg", "ggjt"), (b"lmgg", "ggml"), (b"algg", "ggla"), (b"fmgg", "ggmf")] {
        assert_rejected(&[&on_disk[..], &[3, 0, 0, 0]].concat(), &[&format!("old {name} format")]);
    }
}

#[test]
fn rejects_a_file_of_zeros() {
    assert_rejected(&[0; 4096], &["zeros", "did not fill"]);
}

#[test]
fn rejects_unknown_bytes() {
    assert_rejected(
        b"\xde\xad\xbe\xef\x01\x02\x03\x04",
        &["expected it to begin with \"GGUF\", found \"\\xde\\xad\\xbe\\xef\""],
    );
}

// The header.

#[test]
fn rejects_a_file_that_ends_after_the_magic() {
    assert_rejected(b"GGUF", &["the format version", "ends after 4"]);
}

#[test]
fn rejects_version_1_by_name() {
    assert_rejected(b"GGUF\x01\0\0\0\0\0\0\0\0\0\0\0", &["format version 1"]);
}

#[test]
fn rejects_a_newer_version() {
    assert_rejected(
        b"GGUF\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        &["expected format version 2 or 3, found 4"],
    );
}

#[test]
fn rejects_version_0() {
    assert_rejected(&[&b"GGUF"[..], &[0; 20]].concat(), &["expected format version 2 or 3, found 0"]);
}

#[test]
fn rejects_a_big_endian_file() {
    assert_rejected(b"GGUF\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", &["big-endian", "version 3"]);
}

#[test]
fn rejects_more_keys_than_bytes() {
    assert_rejected(&header(0, 1000), &["claims 1000 metadata keys", "0 bytes follow"]);
}

#[test]
fn rejects_more_keys_than_allowed() {
    assert_rejected(&header(0, u64::MAX), &["claims 18446744073709551615 metadata keys", "at most 65536"]);
}

#[test]
fn rejects_more_tensors_than_bytes() {
    assert_rejected(&header(1000, 0), &["claims 1000 tensors", "0 bytes follow"]);
}

#[test]
fn rejects_more_tensors_than_allowed() {
    assert_rejected(&header(u64::MAX / 32, 0), &["at most 262144"]);
}

// Keys and values.

#[test]
fn rejects_an_empty_key() {
    assert_rejected(&gguf(&[u32_pair("", 1)], &[], 64), &["metadata key 0 is \"\""]);
}

#[test]
fn rejects_a_key_with_a_nul() {
    assert_rejected(&gguf(&[u32_pair("a\0b", 1)], &[], 64), &["metadata key 0 is \"a\\0b\"", "no NUL"]);
}

#[test]
fn rejects_a_key_longer_than_65535_bytes() {
    let key = "k".repeat(65_536);
    assert_rejected(
        &gguf(&[u32_pair(&key, 1)], &[], 0),
        &["metadata key 0 has 65536 bytes", "at most 65535"],
    );
    assert!(open(&gguf(&[u32_pair(&key[1..], 1)], &[], 0)).is_ok());
}

#[test]
fn rejects_a_key_length_beyond_the_file() {
    let mut bytes = header(0, 1);
    bytes.extend(u64::MAX.to_le_bytes());
    bytes.extend([0; 64]);
    assert_rejected(&bytes, &["metadata key 0 needs 18446744073709551615 bytes"]);
}

#[test]
fn rejects_a_duplicate_key() {
    assert_rejected(&gguf(&[u32_pair("a", 1), u32_pair("a", 2)], &[], 0), &["key \"a\" occurs twice"]);
}

#[test]
fn rejects_a_duplicate_key_that_is_not_utf8() {
    let bad = || [string(b"a\xff"), U32.to_le_bytes().to_vec(), vec![0; 4]].concat();
    assert_rejected(&gguf(&[bad(), bad()], &[], 0), &["key \"a\u{fffd}\" occurs twice"]);
}

#[test]
fn rejects_an_unknown_value_type() {
    assert_rejected(
        &gguf(&[pair("a", 13, [0; 8])], &[], 64),
        &["the value of key \"a\"", "from 0 to 12, found 13"],
    );
}

#[test]
fn rejects_a_bool_of_2() {
    assert_rejected(&gguf(&[pair("a", BOOL, [2])], &[], 64), &["key \"a\"", "bool of 0 or 1, found 2"]);
}

#[test]
fn rejects_a_bool_of_2_in_an_array() {
    assert_rejected(
        &gguf(&[pair("a", ARRAY, array(BOOL, 3, [0, 1, 2]))], &[], 64),
        &["key \"a\"", "bools of 0 or 1"],
    );
}

#[test]
fn rejects_a_string_longer_than_the_file() {
    let bad = pair("a", STR, (1u64 << 40).to_le_bytes());
    assert_rejected(&gguf(&[bad], &[], 64), &["the value of key \"a\" needs 1099511627776 bytes"]);
}

#[test]
fn rejects_an_array_longer_than_the_file() {
    for (id, n) in [(U32, 1u64 << 40), (STR, 1 << 40), (F32, u64::MAX), (STR, u64::MAX), (U16, 100)] {
        assert_rejected(&gguf(&[pair("a", ARRAY, array(id, n, []))], &[], 64), &["the value of key \"a\""]);
    }
}

#[test]
fn rejects_an_array_of_arrays() {
    assert_rejected(
        &gguf(&[pair("a", ARRAY, array(ARRAY, 0, []))], &[], 64),
        &["key \"a\"", "array of arrays"],
    );
}

#[test]
fn rejects_an_alignment_that_is_not_a_power_of_two() {
    for bad in [0, 12, 33] {
        let bytes = gguf(&[u32_pair("general.alignment", bad)], &[], 64);
        assert_rejected(&bytes, &["key \"general.alignment\"", "power of two", &format!("found {bad}")]);
    }
}

#[test]
fn rejects_an_alignment_of_another_type() {
    let bad = pair("general.alignment", I32, 32i32.to_le_bytes());
    assert_rejected(&gguf(&[bad], &[], 64), &["key \"general.alignment\"", "expected u32, found i32"]);
}

// Tensors.

#[test]
fn rejects_a_tensor_name_of_64_bytes() {
    let name = "t".repeat(64);
    assert_rejected(&gguf(&[], &[tensor(&name, &[8], 0, 0)], 32), &["tensor 0", "64 bytes", "at most 63"]);
    assert!(open(&gguf(&[], &[tensor(&name[1..], &[8], 0, 0)], 32)).is_ok());
}

#[test]
fn rejects_a_tensor_without_a_name() {
    assert_rejected(&gguf(&[], &[tensor("", &[8], 0, 0)], 32), &["tensor 0: the name is empty"]);
}

#[test]
fn rejects_a_tensor_name_that_is_not_utf8() {
    let mut bytes = gguf(&[], &[tensor("a\x7f", &[8], 0, 0)], 32);
    let at = bytes.iter().position(|&b| b == 0x7f).unwrap();
    bytes[at] = 0xff;
    assert_rejected(&bytes, &["the name of tensor 0 is not UTF-8 at its byte 1"]);
}

#[test]
fn rejects_a_tensor_name_with_a_nul() {
    assert_rejected(&gguf(&[], &[tensor("a\0b", &[8], 0, 0)], 32), &["NUL"]);
}

#[test]
fn rejects_a_duplicate_tensor() {
    let twice = [tensor("a", &[8], 0, 0), tensor("a", &[8], 0, 32)];
    assert_rejected(&gguf(&[], &twice, 64), &["tensor \"a\" occurs twice"]);
}

#[test]
fn rejects_a_tensor_without_dimensions() {
    assert_rejected(
        &gguf(&[], &[tensor("scalar", &[], 0, 0)], 32),
        &["tensor \"scalar\"", "1 to 4 dimensions, found 0"],
    );
}

#[test]
fn rejects_a_tensor_of_five_dimensions() {
    assert_rejected(&gguf(&[], &[tensor("a", &[1; 5], 0, 0)], 32), &["1 to 4 dimensions, found 5"]);
}

#[test]
fn rejects_a_dimension_of_zero() {
    assert_rejected(&gguf(&[], &[tensor("a", &[8, 0], 0, 0)], 32), &["tensor \"a\"", "positive", "[8, 0]"]);
}

#[test]
fn rejects_shapes_that_overflow() {
    for shape in [&[u64::MAX][..], &[1 << 32, 1 << 32], &[1 << 62, 2], &[1 << 31, 1 << 31, 1 << 31]] {
        assert_rejected(&gguf(&[], &[tensor("a", shape, 0, 0)], 32), &["tensor \"a\"", "more than 2^63 - 1"]);
    }
}

#[test]
fn rejects_an_unknown_tensor_type_by_number() {
    assert_rejected(&gguf(&[], &[tensor("a", &[8], 99, 0)], 32), &["tensor \"a\": type 99 is unknown"]);
    assert_rejected(&gguf(&[], &[tensor("a", &[8], u32::MAX, 0)], 32), &["type 4294967295 is unknown"]);
}

#[test]
fn rejects_removed_tensor_types() {
    assert_rejected(&gguf(&[], &[tensor("a", &[32], 4, 0)], 32), &["type 4 (q4_2) was removed"]);
    assert_rejected(&gguf(&[], &[tensor("a", &[32], 33, 0)], 32), &["type 33", "use q4_0"]);
    assert_rejected(&gguf(&[], &[tensor("a", &[32], 36, 0)], 32), &["type 36", "use iq4_nl"]);
}

#[test]
fn rejects_rows_that_are_not_whole_blocks() {
    let bytes = gguf(&[], &[tensor("a", &[33, 2], 2, 0)], 64);
    assert_rejected(&bytes, &["tensor \"a\": type q4_0 needs rows of a multiple of 32", "33"]);
}

#[test]
fn rejects_an_offset_that_is_not_aligned() {
    let tensors = [tensor("a", &[1], 0, 0), tensor("b", &[1], 0, 4)];
    assert_rejected(&gguf(&[], &tensors, 64), &["tensor \"b\"", "offset 32, found 4", "alignment 32"]);
}

#[test]
fn rejects_tensors_that_overlap() {
    let tensors = [tensor("a", &[16], 0, 0), tensor("b", &[8], 0, 32)];
    assert_rejected(&gguf(&[], &tensors, 96), &["tensor \"b\"", "offset 64, found 32", "overlaps"]);
}

#[test]
fn rejects_a_gap_between_tensors() {
    let tensors = [tensor("a", &[8], 0, 0), tensor("b", &[8], 0, 64)];
    assert_rejected(&gguf(&[], &tensors, 96), &["tensor \"b\"", "offset 32, found 64", "gap"]);
}

#[test]
fn rejects_tensors_out_of_order() {
    let tensors = [tensor("a", &[8], 0, 32), tensor("b", &[8], 0, 0)];
    assert_rejected(&gguf(&[], &tensors, 64), &["tensor \"a\"", "offset 0, found 32"]);
}

#[test]
fn rejects_tensors_that_end_beyond_64_bits() {
    // Each has 2^62 bytes, so the first four reach 2^64.
    let n = 1u64 << 60;
    let tensors: Vec<_> =
        (0..5u64).map(|i| tensor(&format!("t{i}"), &[n], 0, (n * 4).wrapping_mul(i))).collect();
    assert_rejected(&gguf(&[], &tensors, 0), &["beyond 2^64 bytes"]);
}

#[test]
fn rejects_a_truncated_download() {
    // The header takes 24 + (8 + 1 + 4 + 8 + 4 + 8) = 57 bytes, padded to 64.
    // The data takes 4 * 234 = 936. Total: 1000.
    let whole = gguf(&[], &[tensor("a", &[234], 0, 0)], 936);
    assert_eq!(whole.len(), 1000);
    assert!(open(&whole).is_ok());
    let words = ["expected at least 1000 bytes, found 430", "stopped at 43%", "tensor \"a\""];
    assert_rejected(&whole[..430], &words);
    assert_rejected(&whole[..999], &["found 999", "stopped at 99%"]);
}

#[test]
fn rejects_a_download_truncated_in_the_header() {
    let whole = gguf(&[str_pair("general.name", "a long enough name")], &[tensor("a", &[8], 0, 0)], 32);
    for len in 4..64 {
        assert_rejected(&whole[..len], &[]);
    }
    assert_rejected(&whole[..60], &["the value of key \"general.name\"", "the download stopped early"]);
}

// The writer.

fn spec(name: &str, shape: &[u64], tensor_type: TensorType) -> TensorSpec {
    TensorSpec { name: name.into(), shape: shape.into(), tensor_type }
}

#[test]
fn rejects_writing_a_file_that_would_not_open() {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("out.gguf");
    let metadata = Metadata::new();
    let create = |tensors| GgufWriter::create(&path, &metadata, tensors).unwrap_err().to_string();
    assert_words(&create(vec![spec("a", &[33], TensorType::Q4_0)]), &["\"a\"", "multiple of 32"]);
    assert_words(&create(vec![spec("a", &[], TensorType::F32)]), &["1 to 4 dimensions"]);
    assert_words(&create(vec![spec(&"n".repeat(64), &[1], TensorType::F32)]), &["at most 63"]);
    assert_words(
        &create(vec![spec("a", &[1], TensorType::F32), spec("a", &[1], TensorType::F32)]),
        &["twice"],
    );

    let mut metadata = Metadata::new();
    metadata.set("general.alignment", Value::U32(24));
    let error = GgufWriter::create(&path, &metadata, vec![]).unwrap_err();
    assert_words(&error.to_string(), &["power of two, found 24"]);

    let mut metadata = Metadata::new();
    metadata.set("", Value::U32(24));
    let error = GgufWriter::create(&path, &metadata, vec![]).unwrap().finish().unwrap_err();
    assert_words(&error.to_string(), &["out.gguf", "metadata key 0 is \"\""]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a refused file leaves nothing behind");
}

#[test]
fn rejects_tensor_data_of_the_wrong_length() {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("out.gguf");
    let create =
        || GgufWriter::create(&path, &Metadata::new(), vec![spec("a", &[4], TensorType::F32)]).unwrap();

    let mut writer = create();
    writer.write(&[0; 12]).unwrap();
    assert_words(&writer.finish().unwrap_err().to_string(), &["tensor \"a\": expected 16 bytes, found 12"]);

    let mut writer = create();
    writer.write(&[0; 12]).unwrap();
    assert_words(&writer.write(&[0; 5]).unwrap_err().to_string(), &["expected 4 more bytes, found 5"]);
    drop(writer);

    let mut writer = create();
    writer.write_f32s(&[1.0; 4]).unwrap();
    assert_words(&writer.write(&[0]).unwrap_err().to_string(), &["1 bytes follow after the last tensor"]);
    drop(writer);
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        0,
        "an unfinished file leaves nothing behind"
    );
}

#[test]
fn rejects_f32_data_for_a_tensor_of_another_type() {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("out.gguf");
    let mut writer =
        GgufWriter::create(path, &Metadata::new(), vec![spec("a", &[4], TensorType::F16)]).unwrap();
    assert_words(&writer.write_f32s(&[1.0; 2]).unwrap_err().to_string(), &["type f16, found f32"]);
}
