//! The guides name files and link to each other: these must exist. Modules import only modules to their left.

use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README.md and every guide.
fn documents() -> Vec<PathBuf> {
    let mut documents = vec![root().join("README.md"), root().join("vendor/cuda/README.md")];
    let guides = std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    documents.extend(guides.filter(|path| path.extension().is_some_and(|e| e == "md")));
    documents.sort();
    documents
}

/// Texts between single backticks, outside of code blocks.
fn quoted(text: &str) -> Vec<&str> {
    let prose = text.split("```").step_by(2);
    prose.flat_map(|part| part.split('`').skip(1).step_by(2)).collect()
}

/// Targets of `[text](target)`.
fn links(text: &str) -> Vec<&str> {
    text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target).collect()
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase().replace('`', "");
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_path_that_a_guide_names_exists() {
    let folders = ["src/", "tests/", "scripts/", "vendor/", "examples/", "gguf/", "docs/"];
    let mut n_paths = 0;
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for path in quoted(&text) {
            let is_path = folders.iter().any(|folder| path.starts_with(folder));
            if !is_path || path.contains(['*', '{', '<', ' ', '$']) {
                continue;
            }
            // A path may name an item: `src/eval/run.rs::evaluate`.
            let (file, item) = path.split_once("::").map_or((path, None), |(file, item)| (file, Some(item)));
            let file = root().join(file);
            assert!(file.exists(), "{} names {path}, which does not exist", document.display());
            if let Some(item) = item {
                let name = item.rsplit("::").next().unwrap();
                let source = std::fs::read_to_string(&file).unwrap();
                let is_defined = ["fn ", "struct ", "enum ", "trait ", "const "]
                    .iter()
                    .any(|kind| source.contains(&format!("{kind}{name}")));
                assert!(is_defined, "{} names {path}, but the file has no {name}", document.display());
            }
            n_paths += 1;
        }
    }
    assert!(n_paths > 50, "found only {n_paths} paths: are they still in backticks?");
}

#[test]
fn every_relative_link_of_a_guide_leads_somewhere() {
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for link in links(&text) {
            if link.starts_with("http") || link.contains(' ') {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target =
                if path.is_empty() { document.clone() } else { document.parent().unwrap().join(path) };
            assert!(target.exists(), "{} links to {link}, which does not exist", document.display());
            if !heading.is_empty() {
                let target = std::fs::read_to_string(&target).unwrap();
                let mut headings = target.lines().filter_map(|line| line.strip_prefix('#'));
                assert!(
                    headings.any(|line| anchor(line.trim_start_matches('#')) == heading),
                    "{} links to {link}, which has no such heading",
                    document.display()
                );
            }
        }
    }
}

/// The modules of the crate from left to right, as docs/architecture.md draws them. Modules in one row never use one
/// another.
const LAYERS: [&[&str]; 14] = [
    &["error"],
    &["finite"],
    &["file", "memory"],
    &["text", "gguf"],
    &["progress"],
    &["graph"],
    &["engine"],
    &["steer"],
    &["score"],
    &["eval", "interp", "train"],
    &["check"],
    &["report"],
    &["study"],
    &["cli", "plugin"],
];

/// Every Rust file below `folder`.
fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = paths.flat_map(|path| match path.is_dir() {
        true => rust_files(&path),
        false => vec![path],
    });
    files.filter(|path| path.extension().is_some_and(|e| e == "rs")).collect()
}

/// Modules of the crate that a file imports, outside of comments.
fn imports(source: &str) -> Vec<&str> {
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let paths = code.flat_map(|line| line.split("crate::").skip(1));
    paths.map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("")).collect()
}

#[test]
fn modules_use_only_modules_to_their_left() {
    let layer = |module: &str| LAYERS.iter().position(|layer| layer.contains(&module));
    let src = root().join("src");
    let mut n_imports = 0;
    for file in rust_files(&src) {
        let relative = file.strip_prefix(&src).unwrap();
        let module = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        // main.rs and lib.rs see everything; tests may use whatever helps them.
        let Some(own) = layer(module) else { continue };
        if relative.file_name().unwrap() == "tests.rs" {
            continue;
        }
        let source = std::fs::read_to_string(&file).unwrap();
        for import in imports(&source) {
            // `study` returns results that `report` formats, and its `train` writes a report.
            let is_exception = (module, import) == ("report", "study");
            if let Some(other) = layer(import).filter(|_| import != module && !is_exception) {
                assert!(
                    other < own,
                    "{} uses crate::{import}, which stands to its right",
                    relative.display()
                );
                n_imports += 1;
            }
        }
    }
    assert!(n_imports > 300, "found only {n_imports} imports: is the parsing still right?");
}

#[test]
fn the_program_prints_only_through_one_module() {
    let folder = root().join("src/cli");
    for file in rust_files(&folder).into_iter().filter(|file| !file.ends_with("cli/print.rs")) {
        let source = std::fs::read_to_string(&file).unwrap();
        for (i, line) in source.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            let is_printed = ["println!", "print!"].iter().any(|printing| line.contains(printing));
            assert!(!is_printed, "{}:{}: use src/cli/print.rs", file.display(), i + 1);
        }
    }
}
