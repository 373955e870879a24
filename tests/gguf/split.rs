//! Split models.

use std::path::{Path, PathBuf};

use detox_gguf::Error;
use detox_gguf::gguf::GgufFile;
use tempfile::TempDir;

use crate::bytes::*;

/// Part `no` (from 0) of `count`, with one tensor of 8 f32 numbers.
fn part(no: u16, count: u16, tensor_name: &str, n_tensors: i32) -> Vec<u8> {
    let pairs = [
        pair("split.no", U16, no.to_le_bytes()),
        pair("split.count", U16, count.to_le_bytes()),
        pair("split.tensors.count", I32, n_tensors.to_le_bytes()),
    ];
    gguf(&pairs, &[tensor(tensor_name, &[8], 0, 0)], 32)
}

fn folder_of(parts: &[(&str, Vec<u8>)]) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    for (name, bytes) in parts {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let first = folder.path().join(parts[0].0);
    (folder, first)
}

#[track_caller]
fn assert_refused(path: &Path, words: &[&str]) {
    assert_words(&GgufFile::open(path).unwrap_err().to_string(), words);
}

#[test]
fn reads_a_split_model_from_all_parts() {
    let (_folder, first) = folder_of(&[
        ("m-00001-of-00003.gguf", part(0, 3, "a", 3)),
        ("m-00002-of-00003.gguf", part(1, 3, "b", 3)),
        ("m-00003-of-00003.gguf", part(2, 3, "c", 3)),
    ]);
    let file = GgufFile::open(&first).unwrap();
    assert_eq!(file.part_paths().len(), 3);
    assert_eq!(
        file.tensors().iter().map(|t| (t.name(), t.part())).collect::<Vec<_>>(),
        [("a", 0), ("b", 1), ("c", 2)]
    );
    assert_eq!(file.n_params(), 24);
    let c = file.tensor("c").unwrap();
    assert_eq!(file.read_tensor(c).unwrap(), (0..32).collect::<Vec<u8>>());
}

#[test]
fn a_single_part_opens_like_an_unsplit_model() {
    assert!(open(&part(0, 1, "a", 1)).is_ok());
}

#[test]
fn rejects_a_later_part_and_names_the_first() {
    let (_folder, first) = folder_of(&[("m-00002-of-00002.gguf", part(1, 2, "b", 2))]);
    let error = GgufFile::open(first).unwrap_err();
    assert!(matches!(error, Error::Model { .. }));
    assert_words(&error.to_string(), &["part 2 of 2"]);
    assert_words(&error.hint().unwrap(), &["m-00001-of-00002.gguf"]);
}

#[test]
fn rejects_a_split_model_with_a_missing_part() {
    let (_folder, first) = folder_of(&[("m-00001-of-00002.gguf", part(0, 2, "a", 2))]);
    assert_refused(&first, &["part 2 of 2 is missing", "m-00002-of-00002.gguf"]);
    assert_words(&GgufFile::open(first).unwrap_err().hint().unwrap(), &["download that part"]);
}

#[test]
fn rejects_a_split_model_with_a_damaged_part() {
    let second = part(1, 2, "b", 2);
    let (_folder, first) = folder_of(&[
        ("m-00001-of-00002.gguf", part(0, 2, "a", 2)),
        ("m-00002-of-00002.gguf", second[..second.len() - 1].to_vec()),
    ]);
    assert_refused(&first, &["m-00002-of-00002.gguf", "the download stopped at"]);
}

#[test]
fn rejects_a_first_part_under_another_name() {
    let (_folder, first) = folder_of(&[("renamed.gguf", part(0, 2, "a", 2))]);
    assert_refused(&first, &["first of 2 parts", "-00001-of-00002.gguf"]);
    let hint = |path: &Path| GgufFile::open(path).unwrap_err().hint().unwrap();
    assert_words(&hint(&first), &["rename it to model-00001-of-00002.gguf"]);
    // The hint works when it is followed.
    std::fs::write(first.with_file_name("m-00002-of-00002.gguf"), part(1, 2, "b", 2)).unwrap();
    assert_words(&hint(&first), &["rename it to m-00001-of-00002.gguf"]);
    let renamed = first.with_file_name("m-00001-of-00002.gguf");
    std::fs::rename(&first, &renamed).unwrap();
    GgufFile::open(&renamed).unwrap();
}

#[test]
fn rejects_parts_that_were_joined_byte_for_byte() {
    let joined = [part(0, 2, "a", 2), part(1, 2, "b", 2)].concat();
    let (_folder, path) = folder_of(&[("m.gguf", joined)]);
    assert_refused(&path, &["2 parts of a split model, joined byte for byte"]);
    assert_words(&GgufFile::open(path).unwrap_err().hint().unwrap(), &["llama-gguf-split --merge"]);
}

#[test]
fn names_a_piece_of_a_file() {
    let whole = part(0, 1, "a", 1);
    let (_folder, path) = folder_of(&[("m.gguf.part1of2", whole[..whole.len() - 8].to_vec())]);
    assert_words(&GgufFile::open(path).unwrap_err().hint().unwrap(), &["join the pieces", "cat"]);
}

#[cfg(unix)]
#[test]
fn reads_a_split_model_whose_name_is_not_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let folder = TempDir::new().unwrap();
    let path =
        |end: &str| folder.path().join(std::ffi::OsStr::from_bytes(&[b"caf\xe9", end.as_bytes()].concat()));
    std::fs::write(path("-00001-of-00002.gguf"), part(0, 2, "a", 2)).unwrap();
    std::fs::write(path("-00002-of-00002.gguf"), part(1, 2, "b", 2)).unwrap();
    assert_eq!(GgufFile::open(path("-00001-of-00002.gguf")).unwrap().part_paths().len(), 2);
}

#[test]
fn rejects_parts_in_the_wrong_order() {
    let (_folder, first) = folder_of(&[
        ("m-00001-of-00002.gguf", part(0, 2, "a", 2)),
        ("m-00002-of-00002.gguf", part(0, 2, "b", 2)),
    ]);
    assert_refused(&first, &["m-00002", "\"split.no\": expected 1 from its name, found 0"]);
}

#[test]
fn rejects_a_tensor_in_two_parts() {
    let (_folder, first) = folder_of(&[
        ("m-00001-of-00002.gguf", part(0, 2, "a", 2)),
        ("m-00002-of-00002.gguf", part(1, 2, "a", 2)),
    ]);
    assert_refused(&first, &["m-00002", "tensor \"a\" is already in another part"]);
}

#[test]
fn rejects_a_wrong_number_of_tensors_in_all_parts() {
    let (_folder, first) = folder_of(&[
        ("m-00001-of-00002.gguf", part(0, 2, "a", 5)),
        ("m-00002-of-00002.gguf", part(1, 2, "b", 5)),
    ]);
    assert_refused(&first, &["\"split.tensors.count\": expected 2 tensors", "found 5"]);
}

#[test]
fn rejects_split_keys_of_another_type() {
    assert_rejected(
        &gguf(&[u32_pair("split.count", 2)], &[], 64),
        &["\"split.count\": expected u16, found u32"],
    );
    let no_number = gguf(&[pair("split.count", U16, 2u16.to_le_bytes())], &[], 64);
    assert_rejected(&no_number, &["\"split.no\": expected u16", "found nothing"]);
}

#[test]
fn rejects_too_many_parts() {
    assert_rejected(&part(0, u16::MAX, "a", 1), &["at most 512 parts, found 65535"]);
}
