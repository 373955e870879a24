//! The C interface, frozen: every declaration of the header.
//!
//! header.rs already compares the header with the linker's map and with the library's versioned symbols, and layout.c
//! checks the sizes and offsets of structs. Neither notices a function that is removed everywhere, a changed
//! signature, or a changed macro. This test does.
//!
//! To accept an intended change, run it with `DETOX_GGUF_BLESS=1`, and see docs/plugin.md for what may change within
//! one version. With `CI=true` it refuses to write.

use super::golden::assert_golden;
use super::root;

/// A C text without its comments.
fn without_comments(text: &str) -> String {
    let mut parts = text.split("/*");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |code, part| code + " " + part.split_once("*/").expect("a comment that ends").1)
}

/// Declarations, members and macros, one a line, with single spaces between words.
fn declarations(header: &str) -> String {
    let code = without_comments(header).replace("\\\n", " ");
    let (mut lines, mut open) = (Vec::new(), String::new());
    let spaced = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    for line in code.lines() {
        if line.trim_start().starts_with('#') {
            lines.push(spaced(line));
            continue;
        }
        for character in line.chars().chain([' ']) {
            open.push(character);
            if matches!(character, ';' | '{' | '}') {
                lines.push(spaced(&std::mem::take(&mut open)));
            }
        }
    }
    assert_eq!(open.trim(), "", "the header ends within a declaration");
    lines.join("\n") + "\n"
}

#[test]
fn every_declaration_of_the_header_is_unchanged() {
    let header = std::fs::read_to_string(root().join("vendor/include/detox_gguf.h")).unwrap();
    let found = declarations(&header);
    let n_functions = found.lines().filter(|line| line.starts_with("DETOX_API ")).count();
    assert_eq!(n_functions, super::header::declared().len(), "{found}");
    assert_golden("detox_gguf.h.txt", &found);
}

#[test]
fn declarations_do_not_depend_on_comments_and_line_breaks() {
    let a = "#define X 1 /* one */\nint f(int a, /* the first */\n      int b);\nenum e { A = 0, B };\n";
    let b = "#define X   1\n/* a function */ int f(int a,\n int b);\n\nenum e {\n    A = 0,\n    B\n};\n";
    assert_eq!(declarations(a), declarations(b));
    assert_eq!(declarations(a), "#define X 1\nint f(int a, int b);\nenum e {\nA = 0, B }\n;\n");
}
