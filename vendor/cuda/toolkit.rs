//! Where a CUDA toolkit has its headers and libraries, for `build.rs`; `tests/cuda/toolkit.rs` tests it on made-up folders.
//!
//! ```text
//! NVIDIA's own                 /usr/local/cuda      include  lib64  targets/<machine>/{include,lib}
//! PyPI                         nvidia/cu13          include  lib
//! Debian, Ubuntu (multiarch)   /usr                 include         lib/<machine>-linux-gnu
//!                              /usr/lib/nvidia-cuda-toolkit  bin    (the rest is in /usr)
//! ```

use std::path::{Path, PathBuf};

/// NVIDIA's names of the machines that `target`, an architecture as Rust calls it, may be; "sbsa" is a server's aarch64.
fn machines(target: &str) -> &'static [&'static str] {
    match target {
        "x86_64" => &["x86_64-linux"],
        "aarch64" => &["sbsa-linux", "aarch64-linux"],
        _ => &[],
    }
}

/// Folders in which the toolkit of `nvcc`, which lies in a folder `bin`, may have the rest of itself.
fn roots(nvcc: &Path) -> Vec<PathBuf> {
    let Some(root) = nvcc.parent().and_then(Path::parent) else { return Vec::new() };
    let mut roots = vec![root.to_path_buf()];
    // Debian's nvcc is a script in /usr/bin, or a link to one that lies among the libraries.
    if root.file_name().is_some_and(|name| name == "nvidia-cuda-toolkit") {
        roots.extend(root.parent().and_then(Path::parent).map(Path::to_path_buf));
    }
    roots
}

/// Folders with headers.
pub fn include_folders(nvcc: &Path, target: &str) -> Vec<PathBuf> {
    let of = |root: PathBuf| {
        let of_machines = machines(target).iter().map(|machine| format!("targets/{machine}/include"));
        let all: Vec<String> = ["include".to_owned()].into_iter().chain(of_machines).collect();
        all.into_iter().map(move |name| root.join(name))
    };
    roots(nvcc).into_iter().flat_map(of).filter(|folder| folder.join("cuda_runtime.h").is_file()).collect()
}

/// Folders with libraries, and the name of cuBLASLt's, if it is there: packages of PyPI have it without the one for linking.
pub fn libraries(nvcc: &Path, target: &str) -> (Vec<PathBuf>, Option<String>) {
    let mut names = vec!["lib64".to_owned(), "lib".to_owned(), format!("lib/{target}-linux-gnu")];
    names.extend(machines(target).iter().map(|machine| format!("targets/{machine}/lib")));
    let (mut folders, mut cublas) = (Vec::new(), None);
    for folder in roots(nvcc).iter().flat_map(|root| names.iter().map(|name| root.join(name))) {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        let mut found: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        found.retain(|name| name.starts_with("libcublasLt.so") || name == "libcudart_static.a");
        if found.is_empty() {
            // Such as /usr/lib: the linker looks there without being told, and the program too.
            continue;
        }
        found.sort();
        cublas = cublas.or(found.into_iter().find(|name| name.starts_with("libcublasLt.so")));
        folders.push(folder);
    }
    (folders, cublas)
}
