//! The installed library: it contains no llama.cpp, and programs can be built with it through pkg-config.

use std::process::Command;

use super::build::{PLUGIN, compiler, run};
use super::root;

#[test]
fn the_library_neither_defines_nor_needs_symbols_of_llama_cpp() {
    let library = PLUGIN.join("lib/libdetox_gguf.so");
    let dynamic = run(Command::new("nm").arg("-D").arg(&library));
    let all = run(Command::new("nm").arg(&library));
    assert!(all.contains("detox_steer_load"), "the library is not stripped");
    for line in dynamic.lines().chain(all.lines()) {
        let name = line.split_whitespace().last().unwrap_or_default();
        let is_of_llama_cpp = ["llama_", "ggml_", "gguf_"].iter().any(|prefix| name.starts_with(prefix));
        assert!(!is_of_llama_cpp, "{line}");
    }
    let needed = run(Command::new("readelf").arg("-d").arg(&library));
    let needed: Vec<&str> = needed.lines().filter(|line| line.contains("(NEEDED)")).collect();
    assert!(!needed.is_empty());
    for line in needed {
        let is_of_the_system =
            ["libc.so", "libm.so", "libgcc_s.so", "ld-linux"].iter().any(|name| line.contains(name));
        assert!(is_of_the_system, "{line}");
    }
}

#[test]
fn the_soname_has_the_version_of_the_interface() {
    let dynamic = run(Command::new("readelf").arg("-d").arg(PLUGIN.join("lib/libdetox_gguf.so")));
    let soname = dynamic.lines().find(|line| line.contains("(SONAME)")).unwrap();
    assert!(soname.contains("[libdetox_gguf.so.1]"), "{soname}");
    assert!(PLUGIN.join("lib/libdetox_gguf.so.1").exists());
    // `cargo cinstall` (cargo-c) uses these settings.
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let capi = manifest.split("[package.metadata.capi.library]").nth(1).expect("settings for cargo-c");
    assert!(capi.contains("version = \"1.0.0\""), "cargo-c has the same version");
    assert!(manifest.contains("from = \"vendor/include/detox_gguf.h\""));
}

#[test]
fn a_program_can_be_built_with_the_flags_of_the_pkg_config_file() {
    let text = std::fs::read_to_string(PLUGIN.join("lib/pkgconfig/detox_gguf.pc")).unwrap();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_else(|| panic!("{key} in {text}")).trim().to_owned()
    };
    assert_eq!(value("Version:"), env!("CARGO_PKG_VERSION"));
    // Resolve the variables here, because not every system has pkg-config.
    let prefix = value("prefix=");
    let resolve = |text: String| {
        let libdir = value("libdir=").replace("${prefix}", &prefix);
        let includedir = value("includedir=").replace("${prefix}", &prefix);
        text.replace("${libdir}", &libdir).replace("${includedir}", &includedir)
    };
    let folder = tempfile::tempdir().unwrap();
    let (source, program) = (folder.path().join("x.c"), folder.path().join("x"));
    let content =
        "#include <detox_gguf.h>\nint main(void) { return detox_abi_version() != DETOX_ABI_VERSION; }\n";
    std::fs::write(&source, content).unwrap();
    let mut command = Command::new(compiler(false));
    command.args(resolve(value("Cflags:")).split_whitespace()).arg(&source);
    run(command.args(resolve(value("Libs:")).split_whitespace()).arg("-o").arg(&program));
    run(Command::new(&program).env("LD_LIBRARY_PATH", PLUGIN.join("lib")));
    // Then with pkg-config itself, if it is installed.
    let mut pkg_config = Command::new("pkg-config");
    pkg_config.env("PKG_CONFIG_PATH", PLUGIN.join("lib/pkgconfig"));
    pkg_config.args(["--cflags", "--libs", "detox_gguf"]);
    if !Command::new("pkg-config").arg("--version").output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: pkg-config is not installed");
        return;
    }
    let flags = run(&mut pkg_config);
    let mut command = Command::new(compiler(false));
    command.arg(&source).args(flags.split_whitespace()).arg("-o").arg(&program);
    run(&mut command);
    run(Command::new(&program).env("LD_LIBRARY_PATH", PLUGIN.join("lib")));
}
