//! Builds the library and the programs over it, once for all tests.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::SystemTime;

use super::root;

/// The folder of the build that this test is from: `target/release`.
fn profile_folder() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).expect("tests lie in deps").to_path_buf()
}

/// Where the programs go.
fn folder() -> PathBuf {
    let folder = profile_folder().join("../plugin-tests");
    std::fs::create_dir_all(&folder).unwrap();
    folder.canonicalize().unwrap()
}

/// Holds other test processes back while something is built.
fn lock() -> File {
    let file = File::create(folder().join("lock")).unwrap();
    file.lock().unwrap();
    file
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// The compiler that `scripts/setup.sh` chose, else the system's.
pub fn compiler(is_cpp: bool) -> String {
    let (variable, default) = if is_cpp { ("CXX", "c++") } else { ("CC", "cc") };
    std::env::var(variable).unwrap_or_else(|_| default.into())
}

/// What `scripts/build_plugin.sh` installs: `include` and `lib`.
pub static PLUGIN: LazyLock<PathBuf> = LazyLock::new(|| {
    let _lock = lock();
    let prefix = folder().join("prefix");
    // nextest runs each test in a process of its own: once a run is enough.
    let (stamp, run_id) = (folder().join("run"), std::env::var("NEXTEST_RUN_ID").unwrap_or_default());
    if !run_id.is_empty() && std::fs::read_to_string(&stamp).is_ok_and(|of_last| of_last == run_id) {
        return prefix;
    }
    let target = profile_folder().join("..").canonicalize().unwrap();
    let mut script = Command::new(root().join("scripts/build_plugin.sh"));
    // Cargo sets these for tests; a cargo inside must not take them for its own.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CARGO_PKG_"))
    {
        script.env_remove(name);
    }
    run(script.arg(&prefix).env("CARGO_TARGET_DIR", target).env("CC", compiler(false)));
    std::fs::write(stamp, run_id).unwrap();
    prefix
});

/// The `out` folder of the llama.cpp that this build has: `include` and `lib`.
pub static LLAMA: LazyLock<PathBuf> = LazyLock::new(|| {
    let builds = std::fs::read_dir(profile_folder().join("build")).unwrap();
    let folders = builds.map(|entry| entry.unwrap().path()).filter(|path| {
        path.file_name().unwrap().to_string_lossy().starts_with("llama-cpp-sys-2-")
            && path.join("out/lib/libllama.a").exists()
    });
    let newest = folders.max_by_key(|path| modified(&path.join("out/lib/libllama.a")));
    newest.expect("the engine was built with llama.cpp").join("out")
});

fn modified(path: &Path) -> SystemTime {
    std::fs::metadata(path).unwrap().modified().unwrap()
}

/// A C program of this repository, compiled and linked with the library and with llama.cpp.
pub fn program(source: &str, name: &str, flags: &[&str]) -> PathBuf {
    let (plugin, llama) = (PLUGIN.as_path(), LLAMA.as_path());
    let _lock = lock();
    let (source, program) = (root().join(source), folder().join(name));
    let inputs = [&source, &plugin.join("lib/libdetox_gguf.so"), &llama.join("lib/libllama.a")];
    if program.exists() && inputs.iter().all(|input| modified(input) < modified(&program)) {
        return program;
    }
    let object = folder().join(format!("{name}.o"));
    let include = |folder: &Path| format!("-I{}", folder.join("include").display());
    let mut compile = Command::new(compiler(false));
    compile.args(["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]).args(flags);
    compile.arg(include(plugin)).arg(include(llama)).arg("-c").arg(&source).arg("-o").arg(&object);
    run(&mut compile);
    // llama.cpp is C++.
    let mut link = Command::new(compiler(true));
    let libraries = plugin.join("lib");
    link.args(flags).arg(&object).arg(format!("-L{}", llama.join("lib").display()));
    link.arg(format!("-L{}", libraries.display())).arg(format!("-Wl,-rpath,{}", libraries.display()));
    link.args(["-ldetox_gguf", "-lllama", "-lggml", "-lggml-cpu", "-lggml-base", "-lpthread", "-lm", "-ldl"]);
    run(link.arg("-o").arg(&program));
    program
}
