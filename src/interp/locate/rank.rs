//! Ranks every FFN value vector of a model by its cosine with a probe vector (the paper, section 4.2).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::gguf::GgufFile;
use crate::steer::value_vector::ValueVectors;

/// A neuron, and the cosine of its value vector with the probe vector.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RankedNeuron {
    /// Block, from 0.
    pub layer: u32,
    /// Index in the block, from 0.
    pub index: u32,
    /// Cosine of its value vector with the probe vector.
    pub cosine: f64,
    /// Length of its value vector.
    pub norm: f64,
}

/// Values to dequantise at a time in each thread: 4 MiB.
const CHUNK_VALUES: usize = 1 << 20;

/// Running sums over the rows of one layer, shape `[n_ff]` each.
#[derive(Clone)]
struct Sums {
    dot: Vec<f64>,
    square: Vec<f64>,
}

/// Finds the `top` value vectors with the highest cosine, in descending order.
///
/// Ties are ordered by layer and index. A value vector of zeros has no cosine and is skipped. The weights
/// are streamed, which takes a few MiB per thread in addition to the result. `done` is called with the
/// number of layers finished so far.
///
/// # Errors
/// [`Error::Setting`] for a probe vector whose length is not `n_embd`, or `top` 0; those of
/// [`ValueVectors`]; [`Error::Gguf`] for weights that are not finite; [`Error::Interrupted`].
pub fn rank_value_vectors(
    model: &GgufFile,
    probe: &[f32],
    top: usize,
    interrupt: &AtomicBool,
    mut done: impl FnMut(usize),
) -> Result<Vec<RankedNeuron>> {
    let vectors = ValueVectors::open(model)?;
    if probe.len() != vectors.n_embd() {
        let reason = format!("expected a probe of {} numbers, found {}", vectors.n_embd(), probe.len());
        return Err(Error::setting("--probe", reason));
    }
    let probe_norm = probe.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
    if !(probe_norm > 0.0 && probe_norm.is_finite()) {
        return Err(Error::setting(
            "--probe",
            "expected a finite vector that is not zero, found one that is zero or not finite",
        ));
    }
    if top == 0 {
        return Err(Error::setting("--top", "expected at least 1, found 0"));
    }
    // Layers run in parallel. Each is summed in the order of its rows, whatever the number of threads.
    let mut best: Vec<RankedNeuron> = Vec::new();
    let layers: Vec<usize> = (0..vectors.n_layer()).collect();
    let mut n_done = 0;
    for group in layers.chunks(rayon::current_num_threads().max(1)) {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let ranked: Vec<Vec<RankedNeuron>> = group
            .par_iter()
            .map(|&layer| rank_layer(model, &vectors, layer, probe, probe_norm, interrupt))
            .collect::<Result<_>>()?;
        best.extend(ranked.into_iter().flatten());
        keep_best(&mut best, top);
        n_done += group.len();
        done(n_done);
    }
    Ok(best)
}

fn rank_layer(
    model: &GgufFile,
    vectors: &ValueVectors<'_>,
    layer: usize,
    probe: &[f32],
    probe_norm: f64,
    interrupt: &AtomicBool,
) -> Result<Vec<RankedNeuron>> {
    let n_ff = vectors.n_ff(layer);
    let mut sums = Sums { dot: vec![0.0; n_ff], square: vec![0.0; n_ff] };
    // Each chunk of rows is summed in f32 for speed; the chunks are added up in f64 for accuracy.
    let (mut dot, mut square) = (vec![0f32; n_ff], vec![0f32; n_ff]);
    vectors.for_each_rows(layer, CHUNK_VALUES, |first, values| {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        dot.fill(0.0);
        square.fill(0.0);
        for (row, w) in values.chunks_exact(n_ff).zip(&probe[first..]) {
            for ((&x, dot), square) in row.iter().zip(&mut dot).zip(&mut square) {
                *dot += w * x;
                *square += x * x;
            }
        }
        sums.dot.iter_mut().zip(&dot).for_each(|(sum, &x)| *sum += f64::from(x));
        sums.square.iter_mut().zip(&square).for_each(|(sum, &x)| *sum += f64::from(x));
        Ok(())
    })?;
    // A NaN would be ranked first or last by its sign, or be skipped, so it is an error.
    let is_finite = |index: &usize| sums.dot[*index].is_finite() && sums.square[*index].is_finite();
    if let Some(index) = (0..n_ff).find(|index| !is_finite(index)) {
        return Err(Error::gguf(
            model.path(),
            format!(
                "tensor \"blk.{layer}.ffn_down.weight\": expected finite value vectors, found one that is not \
                 finite or overflows f32 at neuron {index}"
            ),
        ));
    }
    let ranked = sums.dot.iter().zip(&sums.square).enumerate().filter(|(_, (_, square))| **square > 0.0);
    let ranked = ranked.map(|(index, (dot, square))| RankedNeuron {
        layer: layer as u32,
        index: index as u32,
        cosine: dot / (square.sqrt() * probe_norm),
        norm: square.sqrt(),
    });
    Ok(ranked.collect())
}

fn keep_best(neurons: &mut Vec<RankedNeuron>, top: usize) {
    let order = |a: &RankedNeuron, b: &RankedNeuron| {
        b.cosine.total_cmp(&a.cosine).then((a.layer, a.index).cmp(&(b.layer, b.index)))
    };
    if neurons.len() > top {
        neurons.select_nth_unstable_by(top, order);
        neurons.truncate(top);
    }
    neurons.sort_unstable_by(order);
}

/// Time to rank all value vectors, compared with reading the weights alone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LocateTimes {
    /// Median time to read and dequantise every down projection once, as the ranking does.
    pub read: Duration,
    /// Median time of the ranking.
    pub rank: Duration,
    /// Median over runs of the ratio `rank / read`.
    pub ratio: f64,
}

/// Measures both in alternation, `n_runs` times after one warm-up run.
///
/// # Errors
/// As [`rank_value_vectors`].
pub fn bench(model: &GgufFile, n_runs: usize, interrupt: &AtomicBool) -> Result<LocateTimes> {
    let vectors = ValueVectors::open(model)?;
    let probe: Vec<f32> = (0..vectors.n_embd()).map(|i| if i % 2 == 0 { 1.0 } else { -0.5 }).collect();
    let mut times: Vec<(f64, f64)> = Vec::new();
    for run in 0..=n_runs {
        let started = Instant::now();
        let layers: Vec<usize> = (0..vectors.n_layer()).collect();
        let read_layer = |&layer: &usize| -> Result<f32> {
            let mut last = 0.0;
            vectors.for_each_rows(layer, CHUNK_VALUES, |_, values| {
                last += values[values.len() - 1];
                Ok(())
            })?;
            Ok(last)
        };
        let sums: Vec<f32> = layers.par_iter().map(read_layer).collect::<Result<_>>()?;
        std::hint::black_box(sums);
        let read = started.elapsed();
        let started = Instant::now();
        rank_value_vectors(model, &probe, 100, interrupt, |_| {})?;
        if run > 0 {
            times.push((read.as_secs_f64(), started.elapsed().as_secs_f64()));
        }
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Ok(LocateTimes {
        read: Duration::from_secs_f64(median(times.iter().map(|t| t.0).collect())),
        rank: Duration::from_secs_f64(median(times.iter().map(|t| t.1).collect())),
        ratio: median(times.iter().map(|t| t.1 / t.0).collect()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny(name: &str) -> GgufFile {
        GgufFile::open(format!("{}/gguf/tiny/{name}.gguf", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    fn rank(model: &GgufFile, probe: &[f32], top: usize) -> Result<Vec<RankedNeuron>> {
        rank_value_vectors(model, probe, top, &AtomicBool::new(false), |_| {})
    }

    #[test]
    fn the_value_vector_equal_to_the_probe_ranks_first_and_all_are_ranked() {
        for name in ["llama", "gpt2", "gemma3", "llama-q8_0"] {
            let model = tiny(name);
            let vectors = ValueVectors::open(&model).unwrap();
            let probe = vectors.weighted_sum(1, &[(17, 3.0)]).unwrap();
            let all: usize = (0..vectors.n_layer()).map(|il| vectors.n_ff(il)).sum();
            let ranked = rank(&model, &probe, all + 5).unwrap();
            assert_eq!(ranked.len(), all, "{name}");
            assert_eq!((ranked[0].layer, ranked[0].index), (1, 17));
            assert!((ranked[0].cosine - 1.0).abs() < 1e-6);
            assert!(ranked.windows(2).all(|pair| pair[0].cosine >= pair[1].cosine));
            assert_eq!(rank(&model, &probe, 7).unwrap(), ranked[..7]);
            // Check one of them against a direct computation.
            let other = ranked[all / 2];
            let vector = vectors.weighted_sum(other.layer as usize, &[(other.index as usize, 1.0)]).unwrap();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a * b)).sum::<f64>();
            let norm = dot(&vector, &vector).sqrt();
            assert!((other.norm - norm).abs() < 1e-5);
            assert!((other.cosine - dot(&vector, &probe) / norm / dot(&probe, &probe).sqrt()).abs() < 1e-5);
        }
    }

    #[test]
    fn rejects_a_probe_of_another_length_or_without_a_direction() {
        let model = tiny("llama");
        assert!(rank(&model, &[1.0; 63], 1).unwrap_err().to_string().contains("expected a probe of 64"));
        assert!(rank(&model, &[0.0; 64], 1).unwrap_err().to_string().contains("zero"));
        assert!(rank(&model, &[f32::NAN; 64], 1).unwrap_err().to_string().contains("not finite"));
        assert!(rank(&model, &[1.0; 64], 0).unwrap_err().to_string().contains("--top"));
    }
}
