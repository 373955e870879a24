//! Golden files in tests/golden/formats: output that must not change.

use std::path::{Path, PathBuf};

/// The folder of these files.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/formats")
}

/// Compares `found` with `tests/golden/formats/{name}`.
///
/// With `DETOX_GGUF_BLESS=1` it writes the file instead, except in CI (`CI=true`).
///
/// # Panics
/// If they differ. The message quotes the first line that differs.
pub fn assert_golden(name: &str, found: &str) {
    let path = folder().join(name);
    if std::env::var("DETOX_GGUF_BLESS").is_ok_and(|bless| bless == "1") {
        assert!(
            std::env::var("CI").ok().as_deref() != Some("true"),
            "DETOX_GGUF_BLESS=1: CI must not write goldens"
        );
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, found).unwrap();
        return;
    }
    let expected =
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    if found == expected {
        return;
    }
    let n_same = expected.lines().zip(found.lines()).take_while(|(a, b)| a == b).count();
    let line = |text: &str| text.lines().nth(n_same).unwrap_or("<end of file>").to_owned();
    panic!(
        "{}, line {}: expected\n  {}\nfound\n  {}\nIf this change of a format is intended, run the test again with \
         DETOX_GGUF_BLESS=1 and commit the file.",
        path.display(),
        n_same + 1,
        line(&expected),
        line(found)
    );
}
