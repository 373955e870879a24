//! The header compiles as C and C++, and declares the interface that the library exports.

use std::collections::BTreeSet;
use std::process::Command;

use super::build::{LLAMA, PLUGIN, compiler, run};
use super::root;

fn header() -> String {
    std::fs::read_to_string(root().join("vendor/include/detox_gguf.h")).unwrap()
}

/// The functions that the header declares; each declaration starts a line.
pub fn declared() -> BTreeSet<String> {
    let header = header();
    let after_api = header.lines().filter_map(|line| line.strip_prefix("DETOX_API "));
    after_api.map(|line| name_before_parenthesis(line).to_owned()).collect()
}

fn name_before_parenthesis(line: &str) -> &str {
    let before = line.split_once('(').expect("a function").0;
    before.rsplit([' ', '*']).next().expect("a name")
}

#[test]
fn the_header_compiles_as_c11_and_cpp17_without_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let include = format!("-I{}", root().join("vendor/include").display());
    let llama = format!("-I{}", LLAMA.join("include").display());
    let plain =
        "#include \"detox_gguf.h\"\nint main(void) { return detox_abi_version() != DETOX_ABI_VERSION; }\n";
    let whole = "#define DETOX_WITH_GGML\n#include \"detox_gguf.h\"\n#include \"llama.h\"\n\
        int main(void) {\n\
        detox_steer_options steer = DETOX_STEER_OPTIONS_INIT;\n\
        detox_callback_options callback = DETOX_CALLBACK_OPTIONS_INIT;\n\
        detox_gate_options gate = DETOX_GATE_OPTIONS_INIT;\n\
        detox_control_vector vector = DETOX_CONTROL_VECTOR_INIT;\n\
        detox_host_table table = detox_ggml_host_table();\n\
        struct llama_context_params params = llama_context_default_params();\n\
        params.cb_eval = detox_eval_callback;\n\
        return (int) (steer.size + callback.size + gate.size + vector.size + table.size) * (params.cb_eval != NULL);\n\
        }\n";
    for (is_cpp, name, standard) in [(false, "x.c", "-std=c11"), (true, "x.cpp", "-std=c++17")] {
        for content in [plain, whole] {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            let mut command = Command::new(compiler(is_cpp));
            command
                .args([standard, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", &include, &llama])
                .arg(path);
            // Our header compiles with -pedantic; llama.cpp's headers do not.
            if content == plain {
                command.arg("-pedantic");
            }
            run(&mut command);
        }
    }
}

#[test]
fn the_code_in_the_documentation_compiles_as_c11_and_cpp17() {
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(root().join("docs/plugin.md")).unwrap();
    let mut blocks = text.split("```c\n").skip(1).filter_map(|rest| rest.split("```").next());
    let code = blocks.find(|block| block.contains("#include <detox_gguf.h>")).expect("a program in C");
    // The directives, then the statements inside a function that declares the variables they use.
    let (directives, statements) = code.split_once("\n\n").unwrap();
    assert!(directives.lines().all(|line| line.starts_with('#')), "{directives}");
    let program = format!(
        "{directives}\nint main(void) {{\nstruct llama_context_params params = llama_context_default_params();\n\
         struct llama_model *model = NULL;\n{statements}\nreturn 0;\n}}\n"
    );
    for (is_cpp, name, standard) in [(false, "x.c", "-std=c11"), (true, "x.cpp", "-std=c++17")] {
        let path = folder.path().join(name);
        std::fs::write(&path, &program).unwrap();
        let mut command = Command::new(compiler(is_cpp));
        command.args([standard, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]).arg(&path);
        run(command.arg("-I").arg(root().join("vendor/include")).arg("-I").arg(LLAMA.join("include")));
    }
}

#[test]
fn header_version_script_and_library_have_the_same_functions() {
    let declared = declared();
    assert!(declared.len() > 15, "{declared:?}");
    let map = std::fs::read_to_string(root().join("vendor/detox_gguf.map")).unwrap();
    let of_map = map.lines().filter_map(|line| line.trim().strip_prefix("detox_"));
    let of_map: BTreeSet<String> =
        of_map.map(|rest| format!("detox_{}", rest.trim_end_matches(';'))).collect();
    assert_eq!(of_map, declared);
    let symbols =
        run(Command::new("nm").args(["-D", "--defined-only"]).arg(PLUGIN.join("lib/libdetox_gguf.so")));
    let defined: Vec<&str> = symbols.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    // The version node is a symbol too.
    let functions: BTreeSet<String> = defined
        .iter()
        .filter(|name| !name.starts_with("DETOX_GGUF_"))
        .map(|name| {
            let (function, version) = name.split_once("@@").expect("a versioned symbol");
            assert_eq!(version, "DETOX_GGUF_1", "{name}");
            function.to_owned()
        })
        .collect();
    assert_eq!(functions, declared);
}

#[test]
fn every_function_of_the_header_is_tested_by_the_misuse_program() {
    let program = std::fs::read_to_string(root().join("tests/plugin/misuse.c")).unwrap();
    for function in declared() {
        assert!(program.contains(&function), "tests/plugin/misuse.c does not call {function}");
    }
}

#[test]
fn structs_and_constants_of_the_header_match_the_library() {
    // The tests of src/plugin/c/mod.rs have the same numbers.
    let path = root().join("tests/plugin/layout.c");
    let include = format!("-I{}", root().join("vendor/include").display());
    let mut command = Command::new(compiler(false));
    run(command.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", &include]).arg(path));
}
