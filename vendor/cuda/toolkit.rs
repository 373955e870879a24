//! Finds a CUDA toolkit's headers and libraries, for `build.rs`. `tests/cuda/toolkit.rs` tests it on made-up folders.
//!
//! ```text
//! NVIDIA's own                 /usr/local/cuda      include  lib64  targets/<machine>/{include,lib}
//! PyPI                         nvidia/cu13          include  lib
//! Debian, Ubuntu (multiarch)   /usr                 include         lib/<machine>-linux-gnu
//!                              /usr/lib/nvidia-cuda-toolkit  bin    (the rest is in /usr)
//! ```

use std::path::{Path, PathBuf};

/// NVIDIA's machine names for `target`, a Rust architecture. "sbsa" means aarch64 servers.
fn machines(target: &str) -> &'static [&'static str] {
    match target {
        "x86_64" => &["x86_64-linux"],
        "aarch64" => &["sbsa-linux", "aarch64-linux"],
        _ => &[],
    }
}

/// Possible root folders of the toolkit with this `nvcc`, which is in a folder `bin`.
fn roots(nvcc: &Path) -> Vec<PathBuf> {
    let Some(root) = nvcc.parent().and_then(Path::parent) else { return Vec::new() };
    let mut roots = vec![root.to_path_buf()];
    // Debian's nvcc is a script in /usr/bin, or a link to a script in the library folder.
    if root.file_name().is_some_and(|name| name == "nvidia-cuda-toolkit") {
        roots.extend(root.parent().and_then(Path::parent).map(Path::to_path_buf));
    }
    roots
}

/// The toolkit's header folders.
pub fn include_folders(nvcc: &Path, target: &str) -> Vec<PathBuf> {
    let candidates = |root: PathBuf| {
        let by_machine = machines(target).iter().map(|machine| format!("targets/{machine}/include"));
        let names: Vec<String> = ["include".to_owned()].into_iter().chain(by_machine).collect();
        names.into_iter().map(move |name| root.join(name))
    };
    roots(nvcc)
        .into_iter()
        .flat_map(candidates)
        .filter(|folder| folder.join("cuda_runtime.h").is_file())
        .collect()
}

/// The toolkit's library folders, and the file name of cuBLASLt if found.
///
/// The name can have a version: PyPI's packages lack the unversioned link `libcublasLt.so`.
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
            // Skip folders such as /usr/lib, which linker and loader search by default.
            continue;
        }
        found.sort();
        cublas = cublas.or(found.into_iter().find(|name| name.starts_with("libcublasLt.so")));
        folders.push(folder);
    }
    (folders, cublas)
}
