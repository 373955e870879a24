//! Recognises other file formats, so that the error can say what the file is.

/// Describes a file by its first bytes, if it is of a kind that users pass by mistake.
pub(super) fn name_foreign(head: &[u8]) -> Option<String> {
    let starts = |magic: &[u8]| head.starts_with(magic);
    if head.len() >= 64 && head.iter().all(|&b| b == 0) {
        return Some("it begins with zeros: a download reserved the space but did not fill it".into());
    }
    if starts(b"PK\x03\x04") {
        return Some(with_cure("it is a ZIP archive, like PyTorch's .bin and .pt files"));
    }
    if starts(&[0x80, 2]) || starts(&[0x80, 3]) || starts(&[0x80, 4]) {
        return Some(with_cure("it is a Python pickle, like old PyTorch files"));
    }
    if starts(b"\x89HDF") {
        return Some("it is an HDF5 file (Keras)".into());
    }
    // Before August 2023, llama.cpp wrote its magics as little-endian numbers, so the letters are reversed on disk.
    for (number, letters) in
        [(b"lmgg", "ggml"), (b"fmgg", "ggmf"), (b"tjgg", "ggjt"), (b"algg", "ggla"), (b"nsgg", "ggsn")]
    {
        if starts(number) || starts(letters.as_bytes()) {
            return Some(format!(
                "it is in the old {letters} format, which llama.cpp stopped reading in 2023: \
                 look for a GGUF of the same model"
            ));
        }
    }
    if let Some(kind) = compressed(head) {
        return Some(format!("it is {kind}: unpack it first"));
    }
    if let Some((length, rest)) = head.split_first_chunk::<8>()
        && u64::from_le_bytes(*length) < 100_000_000
        && rest.first() == Some(&b'{')
    {
        return Some(with_cure("it is a safetensors file"));
    }
    name_text(head)
}

fn with_cure(what: &str) -> String {
    format!("{what}: convert it with llama.cpp's convert_hf_to_gguf.py")
}

fn compressed(head: &[u8]) -> Option<&'static str> {
    [
        (&b"\x1f\x8b"[..], "a gzip archive"),
        (b"\x28\xb5\x2f\xfd", "a zstd archive"),
        (b"\xfd7zXZ", "an xz archive"),
        (b"BZh", "a bzip2 archive"),
        (b"7z\xbc\xaf", "a 7-Zip archive"),
    ]
    .into_iter()
    .find_map(|(magic, name)| head.starts_with(magic).then_some(name))
}

/// Describes text saved under the model's name: web pages, git-lfs pointers, error messages.
fn name_text(head: &[u8]) -> Option<String> {
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let head = &head[..head.len().min(1024)];
    let lower = String::from_utf8_lossy(head).to_ascii_lowercase();
    if lower.starts_with("<!doctype html") || lower.starts_with("<html") {
        return Some("it is an HTML page: the link leads to a web page, not to the file".into());
    }
    if lower.starts_with("version https://git-lfs") {
        let size = lower.lines().find_map(|line| line.strip_prefix("size ")).unwrap_or("unknown").trim();
        return Some(format!(
            "it is a git-lfs pointer to a file of {size} bytes, not the file itself: run `git lfs pull` in its folder"
        ));
    }
    if lower.starts_with("<?xml") {
        return Some("it is an XML document, probably an error message from a download server".into());
    }
    if lower.starts_with(['{', '[']) {
        return Some("it is JSON text".into());
    }
    let line: String = lower.lines().next().unwrap_or_default().chars().take(80).collect();
    let is_text = line.len() >= 8 && line.chars().all(|c| c.is_ascii_graphic() || c == ' ' || c == '\t');
    is_text.then(|| format!("it is text that begins with {line:?}"))
}
