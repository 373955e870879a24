//! How often passes repeat a shape, and how many launches a step takes.
//!
//! Both decide whether capturing steps as CUDA graphs would pay off (vendor/cuda/README.md).

use std::collections::HashSet;
use std::hash::Hash;

use detox_gguf::engine::Vocabulary;
use detox_gguf::train::data::pack::Packed;
use detox_gguf::train::data::preference_pair;
use detox_gguf::train::data::tokens::{TokenPair, epoch_order, tokenize};
use detox_gguf::train::recipe::limits::Limits;

use super::tiny;

/// The share of items that occurred before.
fn repeated<T: Eq + Hash>(items: impl Iterator<Item = T>) -> f64 {
    let (mut seen, mut n) = (HashSet::new(), 0);
    items.for_each(|item| {
        seen.insert(item);
        n += 1;
    });
    1.0 - seen.len() as f64 / f64::from(n)
}

/// The steps of five epochs, each step one pass of four pairs.
fn passes(pairs: &[TokenPair]) -> Vec<Packed> {
    let packed = |step: &[usize]| {
        let mut packed = Packed::default();
        step.iter().map(|&i| &pairs[i]).for_each(|p| packed.push(&p.prompt, &p.chosen, &p.rejected));
        packed
    };
    let of_epoch = |epoch| epoch_order(pairs.len(), 0, epoch).chunks(4).map(packed).collect::<Vec<_>>();
    (0..5).flat_map(of_epoch).collect()
}

#[test]
fn passes_rarely_repeat_a_shape_unless_their_rows_are_rounded_up() {
    let vocabulary = Vocabulary::open(&tiny("llama")).unwrap();
    let tokenized = tokenize(&vocabulary, &preference_pair::own(), &Limits::default()).unwrap();
    let pairs: Vec<TokenPair> = tokenized.pairs.into_iter().map(|(_, pair)| pair).collect();
    let passes = passes(&pairs);
    let lengths = |p: &Packed| p.segments.iter().map(|segment| segment.rows.len()).collect::<Vec<_>>();
    let by_lengths = repeated(passes.iter().map(lengths));
    let by_rows = repeated(passes.iter().map(|p| (p.n_rows(), p.outputs.len())));
    let rounded = |n: usize| n.div_ceil(64);
    let by_rounded = repeated(passes.iter().map(|p| (rounded(p.n_rows()), rounded(p.outputs.len()))));
    println!(
        "{} passes; share with an earlier shape: all lengths {by_lengths:.3}, rows and outputs {by_rows:.3}, both in \
         steps of 64 {by_rounded:.3}",
        passes.len()
    );
    assert!(
        by_lengths < 0.01 && by_rows < 0.1 && by_rounded > 0.9,
        "{by_lengths}, {by_rows} and {by_rounded}"
    );
}

#[cfg(feature = "cuda-emulation")]
#[test]
fn a_step_of_a_llama_takes_under_105_launches_per_block() {
    use detox_gguf::train::device::cuda::emulation;
    use detox_gguf::train::device::name::Frozen;
    use detox_gguf::train::recipe::dpo::AnswerLogps;
    use detox_gguf::train::recipe::settings::Settings;

    let Some(_turn) = super::gpu() else { return };
    let pairs = super::own_pairs("llama", 2);
    let pairs: Vec<&TokenPair> = pairs.iter().collect();
    let references = [AnswerLogps { chosen: -30.0, rejected: -30.0 }; 2];
    let settings = Settings { max_rows: 4096, ..super::settings() };
    let mut trainer = super::load("llama", &settings, Frozen::Bf16);
    let n_layer = trainer.transformer.config.n_layer;
    emulation::launched();
    trainer.add_gradient(&pairs, &references).unwrap();
    let n = emulation::launched();
    println!("{n} launches for {n_layer} blocks and the head");
    assert!(n < 105 * n_layer, "{n} launches for {n_layer} blocks");
}
