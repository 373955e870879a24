//! The formats of all files that the program writes, frozen.
//!
//! The goldens are in tests/golden/formats. These tests fail if a key, the order of keys, a type, the name of a metric,
//! or a value that no model computes changes. The wording of warnings and reasons may change.
//!
//! To accept an intended change of a format, run these tests with `DETOX_GGUF_BLESS=1`, read the difference, commit
//! it, and name it in CHANGELOG.md. With `CI=true` they refuse to write.

mod exact;
mod flags;
mod form;
#[path = "../../support/golden.rs"]
mod golden;
mod resume;
mod written;

use std::path::Path;

use assert_cmd::Command;

/// The program with the words of `line` as arguments, started in `folder`.
///
/// So arguments can be relative, and no output holds the path of a temporary folder. A word that names a file in
/// gguf/tiny becomes the path of that file.
fn detox_in(folder: &Path, line: &str) -> Command {
    let mut command = super::detox();
    command.current_dir(folder);
    for word in line.split_whitespace() {
        match super::tiny(word) {
            path if path.is_file() => command.arg(path),
            _ => command.arg(word),
        };
    }
    command
}

/// Runs the program in `folder`; returns its standard output.
fn run_in(folder: &Path, line: &str) -> String {
    let output = detox_in(folder, line).assert().success().get_output().clone();
    String::from_utf8(output.stdout).unwrap()
}

/// Copies the input files of tests/golden/formats to `folder`.
fn copy_inputs(folder: &Path) {
    copy_folder(&golden::folder().join("input"), folder);
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => copy_folder(&entry.path(), &to.join(entry.file_name())),
            false => drop(std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
