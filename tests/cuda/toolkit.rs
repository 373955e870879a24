//! `build.rs` finds the parts of a CUDA toolkit in every known layout.

use std::path::{Path, PathBuf};

#[path = "../../vendor/cuda/toolkit.rs"]
mod folders;

/// Creates empty files, and returns the path of the first, which is nvcc.
fn made(root: &Path, files: &[&str]) -> PathBuf {
    for file in files {
        let path = root.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }
    root.join(files[0])
}

/// The files of a toolkit, nvcc first, and the expected folders.
struct Layout {
    target: &'static str,
    files: &'static [&'static str],
    includes: &'static [&'static str],
    libraries: &'static [&'static str],
    cublas: Option<&'static str>,
}

#[test]
fn headers_and_libraries_are_found_in_every_layout() {
    let layouts = [
        Layout {
            target: "x86_64",
            files: &[
                "bin/nvcc",
                "include/cuda_runtime.h",
                "targets/x86_64-linux/include/cuda_runtime.h",
                "lib64/libcublasLt.so",
                "lib64/libcudart_static.a",
                "targets/x86_64-linux/lib/libcublasLt.so",
            ],
            includes: &["include", "targets/x86_64-linux/include"],
            libraries: &["lib64", "targets/x86_64-linux/lib"],
            cublas: Some("libcublasLt.so"),
        },
        // PyPI's packages.
        Layout {
            target: "x86_64",
            files: &["bin/nvcc", "include/cuda_runtime.h", "lib/libcudart_static.a", "lib/libcublasLt.so.13"],
            includes: &["include"],
            libraries: &["lib"],
            cublas: Some("libcublasLt.so.13"),
        },
        // Debian's script in /usr/bin; /usr/lib itself has unrelated libraries.
        Layout {
            target: "x86_64",
            files: &[
                "bin/nvcc",
                "include/cuda_runtime.h",
                "lib/libc.so",
                "lib/x86_64-linux-gnu/libcudart_static.a",
                "lib/x86_64-linux-gnu/libcublasLt.so.12",
                "lib/aarch64-linux-gnu/libcublasLt.so.12",
            ],
            includes: &["include"],
            libraries: &["lib/x86_64-linux-gnu"],
            cublas: Some("libcublasLt.so.12"),
        },
        // The nvcc that Debian's script runs.
        Layout {
            target: "x86_64",
            files: &[
                "lib/nvidia-cuda-toolkit/bin/nvcc",
                "include/cuda_runtime.h",
                "lib/x86_64-linux-gnu/libcudart_static.a",
                "lib/x86_64-linux-gnu/libcublasLt.so.12",
            ],
            includes: &["include"],
            libraries: &["lib/x86_64-linux-gnu"],
            cublas: Some("libcublasLt.so.12"),
        },
        // An aarch64 server.
        Layout {
            target: "aarch64",
            files: &[
                "bin/nvcc",
                "targets/sbsa-linux/include/cuda_runtime.h",
                "targets/sbsa-linux/lib/libcublasLt.so",
                "targets/x86_64-linux/lib/libcublasLt.so",
            ],
            includes: &["targets/sbsa-linux/include"],
            libraries: &["targets/sbsa-linux/lib"],
            cublas: Some("libcublasLt.so"),
        },
        Layout {
            target: "aarch64",
            files: &["bin/nvcc", "include/cuda_runtime.h", "lib/libcudart_static.a"],
            includes: &["include"],
            libraries: &["lib"],
            cublas: None,
        },
    ];
    for Layout { target, files, includes, libraries, cublas } in layouts {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("usr");
        let nvcc = made(&root, files);
        let of = |names: &[&str]| names.iter().map(|name| root.join(name)).collect::<Vec<_>>();
        assert_eq!(folders::include_folders(&nvcc, target), of(includes), "{files:?}");
        let expected = (of(libraries), cublas.map(str::to_owned));
        assert_eq!(folders::libraries(&nvcc, target), expected, "{files:?}");
    }
}
