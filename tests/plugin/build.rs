//! Builds the library and the test programs, once for all tests.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::SystemTime;

use super::root;

/// The folder of this test's build, such as `target/release`.
fn profile_folder() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).expect("tests are in the folder deps").to_path_buf()
}

/// The folder for the programs.
fn folder() -> PathBuf {
    let folder = profile_folder().join("../plugin-tests");
    std::fs::create_dir_all(&folder).unwrap();
    folder.canonicalize().unwrap()
}

/// Locks out other test processes while something is built.
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

/// The compiler that `scripts/setup.sh` chose, or the system's.
pub fn compiler(is_cpp: bool) -> String {
    let (variable, default) = if is_cpp { ("CXX", "c++") } else { ("CC", "cc") };
    std::env::var(variable).unwrap_or_else(|_| default.into())
}

/// Runs a build script and returns its output.
///
/// Nextest runs each test in its own process, so the output is kept in a file for the other tests of the same run.
fn build(script: &str, arguments: &[&Path]) -> String {
    let _lock = lock();
    let name = Path::new(script).file_stem().expect("a script").to_str().expect("its name");
    let (stamp, run_id) = (folder().join(name), std::env::var("NEXTEST_RUN_ID").unwrap_or_default());
    let of_last = std::fs::read_to_string(&stamp).unwrap_or_default();
    if let Some((of_run, printed)) = of_last.split_once('\n')
        && !run_id.is_empty()
        && of_run == run_id
    {
        return printed.to_owned();
    }
    let target = profile_folder().join("..").canonicalize().unwrap();
    let mut command = Command::new(root().join(script));
    // Cargo sets these variables for tests. A nested cargo must not see them.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CARGO_PKG_"))
    {
        command.env_remove(name);
    }
    let printed = run(command.args(arguments).env("CARGO_TARGET_DIR", target).env("CC", compiler(false)));
    let printed = printed.trim_end().to_owned();
    std::fs::write(stamp, format!("{run_id}\n{printed}")).unwrap();
    printed
}

/// The folder in which `scripts/build_plugin.sh` installs `include` and `lib`.
pub static PLUGIN: LazyLock<PathBuf> =
    LazyLock::new(|| PathBuf::from(build("scripts/build_plugin.sh", &[&folder().join("prefix")])));

/// The static library, compiled with the address sanitizer.
pub static SANITIZED: LazyLock<PathBuf> =
    LazyLock::new(|| PathBuf::from(build("scripts/build_plugin_sanitized.sh", &[])));

/// The `out` folder of this build's llama.cpp, with `include` and `lib`.
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

/// Compiles a C program of this repository, and links it with the library and llama.cpp.
pub fn program(source: &str, name: &str, flags: &[&str]) -> PathBuf {
    let libraries = PLUGIN.join("lib");
    let library = libraries.join("libdetox_gguf.so");
    let linked = [format!("-Wl,-rpath,{}", libraries.display())];
    link(source, name, flags, &library, &linked)
}

/// As [`program`], with [`SANITIZED`]; `flags` must include the address sanitizer.
pub fn sanitized_program(source: &str, name: &str, flags: &[&str]) -> PathBuf {
    // libgcc_s unwinds panics.
    link(source, name, flags, &SANITIZED, &["-lgcc_s".into()])
}

fn link(source: &str, name: &str, flags: &[&str], library: &Path, linked: &[String]) -> PathBuf {
    let llama = LLAMA.as_path();
    let header = root().join("vendor/include");
    let _lock = lock();
    let (source, program) = (root().join(source), folder().join(name));
    let headers = [header.join("detox_gguf.h"), root().join("tests/plugin/fake_host.h")];
    let inputs = [&source, &headers[0], &headers[1], library, &llama.join("lib/libllama.a")];
    if program.exists() && inputs.iter().all(|input| modified(input) < modified(&program)) {
        return program;
    }
    let object = folder().join(format!("{name}.o"));
    let mut compile = Command::new(compiler(false));
    compile.args(["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]).args(flags);
    compile.arg("-I").arg(header).arg("-I").arg(llama.join("include"));
    run(compile.arg("-c").arg(&source).arg("-o").arg(&object));
    // llama.cpp is C++.
    let mut link = Command::new(compiler(true));
    link.args(flags).arg(&object).arg(library).args(linked).arg("-L").arg(llama.join("lib"));
    link.args(["-lllama", "-lggml", "-lggml-cpu", "-lggml-base", "-lpthread", "-lm", "-ldl"]);
    // Link to a temporary name and rename, so that a test killed while linking leaves no partial program.
    let linking = folder().join(format!("{name}.linking"));
    run(link.arg("-o").arg(&linking));
    std::fs::rename(&linking, &program).unwrap();
    program
}
