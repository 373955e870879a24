//! Measures a merge: a random adapter for every matrix of a model.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};
use crate::gguf::GgufFile;
use crate::train::output::adapter::{Adapter, Factors};
use crate::train::output::merge::{MergeOptions, merge_unnamed};

/// The time and the size of a merge.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MergeTime {
    /// From the first read until the file is complete on disk.
    pub seconds: f64,
    /// Number of changed tensors.
    pub n_tensors: usize,
    /// Number of weights in them.
    pub n_weights: u64,
    /// Memory of the adapter's f32 factors.
    pub adapter_bytes: u64,
}

/// Random factors for each matrix that can be written in its own type, except the token embeddings.
///
/// Their size is about that after training: a change of about 1e-4 a weight.
pub fn random_adapter(base: &GgufFile, rank: usize) -> Adapter {
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let mut numbers = |n: usize, size: f32| -> Vec<f32> {
        (0..n).map(|_| ((random.next_u32() >> 8) as f32 / (1u32 << 23) as f32 - 1.0) * size).collect()
    };
    let mut factors = Vec::new();
    for tensor in base.tensors() {
        let &[n_in, n_out] = tensor.shape() else { continue };
        if tensor.tensor_type().quantize_fault(n_in).is_some() || tensor.name() == "token_embd.weight" {
            continue;
        }
        let (n_in, n_out) = (n_in as usize, n_out as usize);
        factors.push(Factors {
            name: tensor.name().to_owned(),
            n_in,
            n_out,
            rank,
            a: numbers(rank * n_in, (n_in as f32).sqrt().recip()),
            b: numbers(rank * n_out, 5e-3),
        });
    }
    Adapter { alpha: 16.0, factors }
}

/// Times a merge into a temporary file in `folder`.
///
/// # Errors
/// Those of [`merge`]; [`Error::Interrupted`].
pub fn measure(
    base: &GgufFile,
    adapter: Adapter,
    folder: &Path,
    interrupt: &AtomicBool,
) -> Result<MergeTime> {
    let n_numbers: usize = adapter.factors.iter().map(|factors| factors.a.len() + factors.b.len()).sum();
    let adapters = [(adapter, 1.0)];
    let start = Instant::now();
    // Never gets this name.
    let output = folder.join("merged.gguf");
    let (report, _) = merge_unnamed(base, &adapters, &output, &MergeOptions::default(), |_, _| {
        if interrupt.load(Ordering::SeqCst) { Err(Error::Interrupted) } else { Ok(()) }
    })?;
    Ok(MergeTime {
        seconds: start.elapsed().as_secs_f64(),
        n_tensors: report.tensors.len(),
        n_weights: report.total.n_weights,
        adapter_bytes: 4 * n_numbers as u64,
    })
}
