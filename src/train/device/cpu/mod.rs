//! The trainer's operations on the CPU: the reference for every other device.
//!
//! Each file has one operation as plain functions over slices; [`Cpu`] runs them on its own threads. Sums are taken in
//! an order that does not depend on which thread is faster, so that the same command gives the same bits.

mod attention;
mod buffer;
mod dense;
mod elementwise;
mod head;
mod math;
mod matrix;
mod norm;
mod operations;
mod optimizer;
mod parallel;
mod rope;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vnni;

use rayon::ThreadPool;

use crate::error::{Error, Result};
use crate::gguf::blocks::product::Kernels;

use buffer::Memory;

pub use buffer::Buffer;
pub use matrix::Matrix;

pub use crate::train::recipe::products::Products;

impl Products {
    /// The default: fast if this program's kernels run and their copies of `n_weights` numbers fit into half the
    /// memory.
    ///
    /// Their rounding moves losses less than another seed does (docs/training.md).
    pub fn auto(n_weights: u64) -> Products {
        let copies = n_weights.saturating_mul(9) / 4;
        let fits = copies <= crate::memory::total_bytes() / 2;
        if has_vnni() && fits { Products::Fast } else { Products::Exact }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_vnni() -> bool {
    vnni::is_supported()
}

#[cfg(not(target_arch = "x86_64"))]
fn has_vnni() -> bool {
    false
}

/// The CPU, with a pool of threads.
#[derive(Debug)]
pub struct Cpu {
    pool: ThreadPool,
    products: Products,
    memory: Memory,
    /// ggml's kernels, if fast products use them.
    kernels: Option<Kernels>,
}

impl Cpu {
    /// Starts `n_threads` threads.
    ///
    /// # Errors
    /// [`Error::Setting`] if the threads cannot be started.
    pub fn new(n_threads: usize, products: Products) -> Result<Cpu> {
        Cpu::with(n_threads, products, products == Products::Fast && !has_vnni())
    }

    /// [`Cpu::new`]; with `by_ggml`, ggml's kernels do fast products even if the CPU has AVX-512 VNNI.
    fn with(n_threads: usize, products: Products, by_ggml: bool) -> Result<Cpu> {
        let refuse = |reason: String| Error::setting("-t/--threads", reason);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads.max(1))
            .thread_name(|i| format!("train-{i}"))
            .build()
            .map_err(|error| refuse(format!("cannot start {n_threads} threads: {error}")))?;
        let kernels = match by_ggml {
            false => None,
            true => {
                let kernels = Kernels::new(n_threads.max(1));
                Some(kernels.ok_or_else(|| refuse(format!("ggml cannot start {n_threads} threads")))?)
            }
        };
        Ok(Cpu { pool, products, memory: Memory::default(), kernels })
    }
}
