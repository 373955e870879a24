//! The formats of all files that the program writes, frozen.
//!
//! Goldens are in tests/golden/formats. A change of a key, of the order of keys, of a type, of the name of a metric, or of
//! a value that no model computes fails a test here. Wordings for people (warnings, reasons) are free.
//!
//! To accept an intended change of a format, run these tests with `DETOX_GGUF_BLESS=1`, read the difference, commit it, and
//! name it in CHANGELOG.md. With `CI=true` they refuse to write.

mod exact;
mod flags;
mod form;
#[path = "../../support/golden.rs"]
mod golden;
mod resume;
mod written;

use std::path::Path;

use assert_cmd::Command;

/// The program, run in `folder`, so that no file holds the path of a temporary folder.
fn detox_in(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = super::detox();
    command.current_dir(folder).args(arguments);
    command
}

/// Runs the program in `folder`; gives its standard output.
fn run_in(folder: &Path, arguments: &[&str]) -> String {
    let output = detox_in(folder, arguments).assert().success().get_output().clone();
    String::from_utf8(output.stdout).unwrap()
}

/// The path of a tiny model.
fn model(name: &str) -> String {
    super::tiny(name).to_str().unwrap().to_owned()
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
