//! Running out of memory in the last pass of a step: the step is repeated, and its result does not change.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use detox_gguf::error::{Error, Result};
use detox_gguf::progress::Progress;
use detox_gguf::train::data::pack::Packed;
use detox_gguf::train::data::tokens::{self, TokenPair};
use detox_gguf::train::device::Device;
use detox_gguf::train::device::cuda::{Cuda, emulation};
use detox_gguf::train::device::name::{DeviceName, Frozen};
use detox_gguf::train::recipe::optimizer::OptimizerKind;
use detox_gguf::train::recipe::settings::Settings;
use detox_gguf::train::run::metrics::{PlacementRecord, Record};
use detox_gguf::train::run::trainer::Trainer;
use detox_gguf::train::run::{RunFiles, run};

use super::{gpu, load, own_pairs, settings};

const PLENTY: usize = 4 << 30;

/// Eleven short pairs, and a long one that needs most memory.
fn pairs() -> Vec<TokenPair> {
    let mut pairs = own_pairs("llama", 12);
    let long = &mut pairs[11];
    long.chosen = long.chosen.repeat(6);
    long.rejected = long.rejected.repeat(6);
    pairs
}

/// Steps of four pairs, in passes of one or two.
///
/// The long pair is in the third step and not its first, so that a gradient was added before memory runs out.
fn of_short_passes(pairs: &[TokenPair]) -> Settings {
    let n_rows = |pair: &TokenPair| Packed::n_rows_of(&pair.prompt, &pair.chosen, &pair.rejected);
    let settings = Settings {
        optimizer: OptimizerKind::Adamw,
        weight_decay: 0.01,
        batch_size: 4,
        max_steps: Some(5),
        max_rows: pairs[..11].iter().map(n_rows).max().unwrap(),
        held_out: 0.0,
        frozen: Some(Frozen::Bf16),
        ..settings()
    };
    let is_late = |seed: &u64| {
        let (train, _) = tokens::split(pairs, 0.0, *seed);
        let order = tokens::epoch_order(train.len(), *seed, 0);
        order.iter().position(|&i| train[i] == 11).is_some_and(|at| (9..12).contains(&at))
    };
    Settings { seed: (0..).find(is_late).unwrap(), ..settings }
}

/// Limits memory after two steps.
struct Limiting {
    limit: usize,
    n_steps: u64,
    messages: Vec<String>,
}

impl Progress for Limiting {
    fn start(&mut self, _phase: &str, _total: u64, done: u64) {
        self.n_steps = done;
    }
    fn advance(&mut self, n: u64) {
        self.n_steps += n;
        if self.n_steps == 2 {
            emulation::set_memory(self.limit);
        }
    }
    fn finish(&mut self) {}
    fn say(&mut self, text: &str) {
        self.messages.push(text.to_owned());
    }
}

struct Outcome {
    records: Result<Vec<Record>>,
    values: Vec<Vec<f32>>,
    n_steps: u64,
    /// The most bytes allocated at once.
    taken: usize,
    messages: Vec<String>,
}

fn train(
    folder: &Path,
    pairs: &[TokenPair],
    settings: &Settings,
    limit: usize,
    prepare: impl Fn(&mut Trainer<Cuda>),
) -> Outcome {
    std::fs::create_dir_all(folder).unwrap();
    let before = emulation::allocated_bytes();
    let mut trainer = load("llama", settings, Frozen::Bf16);
    prepare(&mut trainer);
    emulation::peak_bytes();
    let mut progress = Limiting { limit: before + limit, n_steps: 0, messages: Vec::new() };
    let files = RunFiles::of(folder);
    let ran = run(&mut trainer, pairs, settings, &files, &AtomicBool::new(false), &mut progress);
    emulation::set_memory(PLENTY);
    let taken = emulation::peak_bytes() - before;
    let values = trainer.parameters.values.iter().map(|value| trainer.device().download(value).unwrap());
    Outcome {
        values: values.collect(),
        records: ran.map(|(_, records)| records),
        n_steps: trainer.optimizer.n_steps,
        taken,
        messages: progress.messages,
    }
}

fn checkpointing(trainer: &mut Trainer<Cuda>) {
    trainer.set_checkpointing(true);
}

fn placements(records: &[Record]) -> Vec<PlacementRecord> {
    let of = |record: &Record| if let Record::Placement(found) = record { Some(*found) } else { None };
    records.iter().filter_map(of).collect()
}

#[test]
fn a_repeated_step_has_the_result_of_an_uninterrupted_one() {
    let _turn = gpu();
    let (folder, pairs) = (tempfile::tempdir().unwrap(), pairs());
    let folder = |name: &str| folder.path().join(name);
    let short = of_short_passes(&pairs);
    // On the CPU, passes keep their rows, here those of a whole step. Only the settings say that this is the CPU.
    let cpu = Settings { device: DeviceName::Cpu, frozen: None, max_rows: 4096, ..short.clone() };
    for (name, settings) in [("gpu", short), ("cpu", cpu)] {
        let whole = train(&folder(&format!("{name}-whole")), &pairs, &settings, PLENTY, |_| {});
        let least = train(&folder(&format!("{name}-least")), &pairs, &settings, PLENTY, checkpointing);
        let limit = (whole.taken + least.taken) / 2;
        let limited = train(&folder(&format!("{name}-limited")), &pairs, &settings, limit, |_| {});
        let records = limited.records.unwrap();
        let chosen = placements(&records).into_iter().filter(|p| p.out_of_memory).collect::<Vec<_>>();
        let expected = PlacementRecord {
            step: 2,
            device: settings.device,
            max_rows: settings.max_rows,
            checkpointing: true,
            frozen: settings.frozen,
            out_of_memory: true,
        };
        assert_eq!(chosen, [expected], "{name}");
        assert!(limited.messages[0].ends_with(&expected.in_words()), "{:?}", limited.messages);
        // Computing activations twice changes no number. A leftover gradient or an extra step would.
        assert_eq!((limited.n_steps, whole.n_steps), (5, 5), "{name}");
        assert!(limited.values == whole.values, "{name}: trained values");
        let norms = |records: &[Record]| -> Vec<f64> {
            let of =
                |record: &Record| if let Record::Step(step) = record { Some(step.grad_norm) } else { None };
            records.iter().filter_map(of).collect()
        };
        assert_eq!(norms(&records), norms(&whole.records.unwrap()), "{name}");
    }
}

#[test]
fn activations_are_kept_if_the_user_asked_for_it() {
    let _turn = gpu();
    let (folder, pairs) = (tempfile::tempdir().unwrap(), pairs());
    let folder = |name: &str| folder.path().join(name);
    let settings = of_short_passes(&pairs);
    let whole = train(&folder("whole"), &pairs, &settings, PLENTY, |_| {});
    let least = train(&folder("least"), &pairs, &settings, PLENTY, checkpointing);
    let limit = (whole.taken + least.taken) / 2;
    let kept = train(&folder("kept"), &pairs, &settings, limit, Trainer::keep_activations);
    let error = kept.records.unwrap_err();
    assert!(matches!(error, Error::DeviceMemory { .. }), "{error:?}");
    let hint = error.hint().unwrap();
    assert!(hint.contains("or resume with --frozen quantised and --checkpointing on;"), "{hint}");
    assert_eq!(kept.messages, ["saved after step 2; run the same command again to resume"]);
    let again = train(&folder("kept"), &pairs, &settings, PLENTY, Trainer::keep_activations);
    assert!(again.values == whole.values, "the resumed run");
}

#[test]
fn running_out_of_memory_while_scoring_only_makes_passes_smaller() {
    let _turn = gpu();
    let (folder, pairs) = (tempfile::tempdir().unwrap(), own_pairs("llama", 12));
    let settings =
        Settings { batch_size: 4, max_rows: 4096, held_out: 0.0, frozen: Some(Frozen::Bf16), ..settings() };
    let enough_for_nothing =
        |_: &mut Trainer<Cuda>| emulation::set_memory(emulation::allocated_bytes() + (100 << 10));
    let ran = train(folder.path(), &pairs, &settings, PLENTY, enough_for_nothing);
    let error = ran.records.unwrap_err();
    assert!(matches!(error, Error::DeviceMemory { .. }), "{error:?}");
    assert!(!error.hint().unwrap().contains("--checkpointing"), "{error:?}");
    let smaller = ran.messages.iter().filter(|message| message.contains("continuing with")).count();
    assert!(
        smaller > 0 && !ran.messages.iter().any(|message| message.contains("recomputed")),
        "{:?}",
        ran.messages
    );
}
