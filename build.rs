//! Records the git revision for `--version` and `run.json`, and builds `vendor/cuda`.
//!
//! The feature `cuda` compiles `vendor/cuda` with nvcc and generates its bindings. The feature `cuda-emulation` does the
//! same for a CPU.

use std::path::Path;
use std::process::Command;

#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
#[path = "vendor/cuda/toolkit.rs"]
mod toolkit;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Every commit and checkout appends to this file. A source archive does not have it.
    let log = Path::new(".git/logs/HEAD");
    if log.exists() {
        println!("cargo:rerun-if-changed={}", log.display());
    }
    let version = env!("CARGO_PKG_VERSION");
    let version = match git(&["rev-parse", "--short=12", "HEAD"]) {
        Some(revision) => format!("{version} ({revision})"),
        None => version.to_owned(),
    };
    println!("cargo:rustc-env=DETOX_GGUF_VERSION={version}");
    cuda_limits();
    #[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
    cuda::build();
}

/// Writes the integers of `vendor/cuda/limits.h` as Rust constants; the types with kernels become one list.
fn cuda_limits() {
    const HEADER: &str = "vendor/cuda/limits.h";
    println!("cargo:rerun-if-changed={HEADER}");
    let text =
        std::fs::read_to_string(HEADER).unwrap_or_else(|error| panic!("cannot read {HEADER}: {error}"));
    let (mut constants, mut types) = (String::new(), Vec::new());
    for definition in text.lines().filter_map(|line| line.strip_prefix("#define DETOX_CUDA_")) {
        let number =
            definition.split_once(' ').and_then(|(name, value)| Some((name, value.parse::<u64>().ok()?)));
        let (name, value) =
            number.unwrap_or_else(|| panic!("{HEADER}: expected NAME INTEGER, found {definition:?}"));
        match name.strip_prefix("TYPE_") {
            Some(_) => types.push(value),
            None => constants += &format!("pub const {name}: usize = {value};\n"),
        }
    }
    constants += &format!("pub const KERNEL_TYPES: [u32; {}] = {types:?};\n", types.len());
    let folder = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    std::fs::write(Path::new(&folder).join("cuda_limits.rs"), constants).expect("OUT_DIR can be written");
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}

/// Builds the extension for training on NVIDIA GPUs.
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
mod cuda {
    use std::path::{Path, PathBuf};

    use super::toolkit;

    const FOLDER: &str = "vendor/cuda";

    /// The products with cuBLASLt. The emulation uses its own implementation instead.
    const CUBLAS_SOURCE: &str = "multiply.cu";

    pub fn build() {
        println!("cargo:rerun-if-changed={FOLDER}");
        let emulates = cfg!(feature = "cuda-emulation");
        assert!(
            !(emulates && cfg!(feature = "cuda")),
            "the features cuda and cuda-emulation exclude each other: cuda-emulation is for tests without a GPU"
        );
        bindings(emulates);
        if emulates { emulation() } else { nvidia() }
    }

    fn out_dir() -> PathBuf {
        PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"))
    }

    fn bindings(emulates: bool) {
        let mut builder = bindgen::Builder::default()
            .header(format!("{FOLDER}/ops.h"))
            .allowlist_item("detox_cuda_.*|DETOX_CUDA_.*")
            .prepend_enum_name(false)
            .layout_tests(false)
            .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()));
        if emulates {
            builder = builder.header(format!("{FOLDER}/emulation/control.h"));
        }
        let bindings = builder.generate().expect("bindgen reads vendor/cuda/ops.h");
        bindings.write_to_file(out_dir().join("cuda_ops.rs")).expect("OUT_DIR can be written");
    }

    /// The files in `folder` with this extension, sorted by name.
    fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
        let entries =
            std::fs::read_dir(folder).unwrap_or_else(|error| panic!("cannot read {folder}: {error}"));
        let paths = entries.map(|entry| entry.expect("the folder is readable").path());
        let mut files: Vec<PathBuf> =
            paths.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
        files.sort();
        files
    }

    /// Compiles the same sources as C++ for the emulated GPU. FMA contraction is off, so that sums round as written.
    fn emulation() {
        let kernels = files(FOLDER, "cu").into_iter().filter(|path| !path.ends_with(CUBLAS_SOURCE));
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).define("DETOX_CUDA_EMULATION", None);
        build.flag("-x").flag("c++").flag("-ffp-contract=off").flag_if_supported("-Wno-unused-parameter");
        println!("cargo:rerun-if-env-changed=DETOX_CUDA_SANITIZE");
        if std::env::var_os("DETOX_CUDA_SANITIZE").is_some_and(|value| value == "address") {
            build.flag("-fsanitize=address").flag("-g");
        }
        build.files(kernels).files(files(&format!("{FOLDER}/emulation"), "cpp"));
        build.compile("detox_cuda_emulation");
    }

    fn nvidia() {
        for name in ["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "DETOX_CUDA_ARCH", "PATH"] {
            println!("cargo:rerun-if-env-changed={name}");
        }
        let Some(nvcc) = find_nvcc() else {
            println!("cargo:warning=the feature cuda needs NVIDIA's compiler nvcc, which was not found");
            eprintln!(
                "error: the feature cuda needs NVIDIA's compiler nvcc; it was not found in $CUDA_HOME, $CUDA_PATH, PATH, \
                 /usr/local/cuda or Python's site-packages\n\
                 hint: install the CUDA toolkit, or without root: pip install nvidia-cuda-nvcc nvidia-cuda-crt \
                 nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cublas\n\
                 hint: or build without --features cuda; training then runs on the CPU"
            );
            std::process::exit(1);
        };
        let target = std::env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
        // SAFETY: this build script has only one thread so far. cc offers no way but this variable to choose nvcc.
        unsafe { std::env::set_var("NVCC", &nvcc) };
        let mut build = cc::Build::new();
        build.cuda(true).cudart("static").std("c++17").opt_level(3).warnings(false);
        for flag in architectures() {
            build.flag(flag);
        }
        build.includes(toolkit::include_folders(&nvcc, &target));
        build.files(files(FOLDER, "cu")).compile("detox_cuda");
        let cublas = link_folders(&nvcc, &target);
        println!("cargo:rustc-link-lib=dylib:+verbatim={cublas}");
        for library in ["dl", "rt", "pthread"] {
            println!("cargo:rustc-link-lib=dylib={library}");
        }
    }

    /// Passes the library folders to the linker, as search paths and as rpath. Returns the name of the cuBLASLt library.
    fn link_folders(nvcc: &Path, target: &str) -> String {
        let (folders, cublas) = toolkit::libraries(nvcc, target);
        for folder in &folders {
            println!("cargo:rustc-link-search=native={}", folder.display());
            println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
        }
        cublas.unwrap_or_else(|| {
            eprintln!(
                "error: the toolkit of {} has no libcublasLt.so\nhint: install cuBLAS (PyPI: nvidia-cublas, Debian: \
                 libcublaslt12)",
                nvcc.display()
            );
            std::process::exit(1);
        })
    }

    /// nvcc's flags for `DETOX_CUDA_ARCH`, such as `89` or `80,90`: machine code for each architecture, and PTX for the
    /// last, which newer GPUs compile at run time.
    fn architectures() -> Vec<String> {
        let setting = std::env::var("DETOX_CUDA_ARCH").unwrap_or_default();
        let setting = if setting.is_empty() { "80,86,89,90".to_owned() } else { setting };
        let all: Vec<&str> = setting.split(',').map(str::trim).collect();
        let is_number = |arch: &&str| !arch.is_empty() && arch.bytes().all(|b| b.is_ascii_digit());
        if !all.iter().all(|arch| is_number(arch) && arch.parse::<u32>().is_ok_and(|n| n >= 80)) {
            eprintln!(
                "error: DETOX_CUDA_ARCH: expected compute capabilities without the dot, from 80 up, such as 89 or 80,90; \
                 found {setting:?}"
            );
            std::process::exit(1);
        }
        let mut flags: Vec<String> =
            all.iter().map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}")).collect();
        let last = all.last().expect("split returns at least one item");
        flags.push(format!("-gencode=arch=compute_{last},code=compute_{last}"));
        flags
    }

    fn find_nvcc() -> Option<PathBuf> {
        let mut folders: Vec<PathBuf> = Vec::new();
        for name in ["CUDA_HOME", "CUDA_PATH"] {
            folders.extend(std::env::var_os(name).map(|root| PathBuf::from(root).join("bin")));
        }
        folders.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
        folders.push("/usr/local/cuda/bin".into());
        let found = folders.into_iter().map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file());
        found.map(|nvcc| nvcc.canonicalize().unwrap_or(nvcc)).or_else(python_nvcc)
    }

    /// Finds the nvcc of NVIDIA's PyPI packages, in the site-packages of the default Python.
    fn python_nvcc() -> Option<PathBuf> {
        const LIST: &str = "import sys, site\nprint('\\n'.join(sys.path + site.getsitepackages() + [site.getusersitepackages()]))";
        let output = std::process::Command::new("python3").args(["-c", LIST]).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        text.lines().filter(|line| !line.is_empty()).find_map(|folder| {
            let nvcc = Path::new(folder).join("nvidia/cu13/bin/nvcc");
            nvcc.is_file().then_some(nvcc)
        })
    }
}
