//! Running out of GPU memory before and during a run, estimates of memory, and GPUs that cannot be opened.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use detox_gguf::error::{Error, Result};
use detox_gguf::gguf::{GgufFile, Metadata};
use detox_gguf::progress::Progress;
use detox_gguf::train::data::pack::Packed;
use detox_gguf::train::data::tokens::TokenPair;
use detox_gguf::train::device::Device;
use detox_gguf::train::device::counting::Counting;
use detox_gguf::train::device::cuda::{Cuda, emulation};
use detox_gguf::train::device::name::{DeviceName, Frozen};
use detox_gguf::train::output::artifact;
use detox_gguf::train::recipe::method::MethodName;
use detox_gguf::train::recipe::settings::Settings;
use detox_gguf::train::run::metrics::{PlacementRecord, Record};
use detox_gguf::train::run::placement::{Choice, Needs};
use detox_gguf::train::run::trainer::{Side, Trainer};
use detox_gguf::train::run::{RunFiles, run};

use super::{Silent, gpu, load, own_pairs, settings, tiny};

const PLENTY: usize = 4 << 30;

/// `DETOX_CUDA_WORKSPACE_BYTES` of vendor/cuda/limits.h.
const WORKSPACE_BYTES: u64 = 32 << 20;

#[test]
fn rejects_unusable_gpus_with_cause_and_hint() {
    let _turn = gpu();
    let cases = [
        (emulation::NO_DEVICE, "no CUDA-capable device", "--device cpu"),
        (emulation::INSUFFICIENT_DRIVER, "driver version is insufficient", "newer NVIDIA driver"),
        (emulation::DEVICES_UNAVAILABLE, "busy or unavailable", "nvidia-smi"),
        (emulation::STUB_LIBRARY, "take its folder off LD_LIBRARY_PATH", "NVIDIA driver"),
        (emulation::SYSTEM_NOT_READY, "nvidia-fabricmanager", "NVIDIA driver"),
    ];
    for (number, cause, cure) in cases {
        emulation::set_error(number);
        let error = Cuda::open(0, Frozen::Bf16).unwrap_err();
        assert!(matches!(error, Error::Device { .. }), "{error:?}");
        assert!(error.to_string().starts_with("cuda:0: ") && error.to_string().contains(cause), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains(cure)), "{error:?}");
    }
    emulation::set_launch_error(emulation::NO_KERNEL_IMAGE, false);
    let error = Cuda::open(0, Frozen::Bf16).unwrap_err();
    assert!(error.to_string().contains("trying a kernel: no kernel image"), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("DETOX_CUDA_ARCH")), "{error:?}");
    let error = Cuda::open(3, Frozen::Bf16).unwrap_err().to_string();
    assert_eq!(error, "cuda:3: there is no GPU 3: GPUs are numbered from 0, and this machine has 1");
    assert!(Cuda::open(0, Frozen::Bf16).is_ok(), "an error affects one call");
}

#[test]
fn out_of_memory_names_the_free_bytes_and_leaks_nothing() {
    let _turn = gpu();
    let before = emulation::allocated_bytes();
    {
        let device = Cuda::open(0, Frozen::Bf16).unwrap();
        let buffer = device.upload(&[1.0, 2.0]).unwrap();
        emulation::set_memory(emulation::allocated_bytes() + (3 << 20));
        let error = device.zeros(1 << 20).unwrap_err();
        emulation::set_memory(PLENTY);
        assert!(matches!(error, Error::DeviceMemory { .. }), "{error:?}");
        let expected = "cuda:0: the GPU has no room for 4 MiB more: 3 MiB of its 3 MiB are free";
        assert_eq!(error.to_string(), expected);
        assert!(error.hint().is_some_and(|hint| hint.contains("--frozen quantised")));
        assert_eq!(device.download(&buffer).unwrap(), [1.0, 2.0], "the earlier buffer is intact");
    }
    assert_eq!(emulation::allocated_bytes(), before);
}

#[test]
fn released_memory_is_free_whatever_the_size_of_its_pieces() {
    let _turn = gpu();
    let device = Cuda::open(0, Frozen::Bf16).unwrap();
    emulation::set_memory(emulation::allocated_bytes() + (8 << 20));
    let (free, total) = device.memory_bytes().unwrap();
    // Four pieces of 2 MiB, which the pool keeps, and then one of 8 MiB.
    let pieces: Vec<_> = (0..4).map(|_| device.zeros(1 << 19).unwrap()).collect();
    assert_eq!(device.memory_bytes().unwrap(), (0, total));
    drop(pieces);
    let again = device.memory_bytes().unwrap();
    let whole = device.zeros(1 << 21);
    emulation::set_memory(PLENTY);
    assert_eq!((free, again), (8 << 20, (8 << 20, total)));
    whole.unwrap();
}

/// A fault of the GPU during a run.
#[derive(Clone, Copy)]
enum Fault {
    /// No memory is left.
    Memory,
    /// A kernel launch fails.
    Launch,
    /// A kernel fails, and so does every later call.
    Death,
}

/// Causes `fault` after `after` steps, and keeps the messages.
struct Limiting {
    after: u64,
    fault: Fault,
    n_steps: u64,
    is_training: bool,
    messages: Vec<String>,
}

impl Progress for Limiting {
    fn start(&mut self, phase: &str, _total: u64, done: u64) {
        (self.is_training, self.n_steps) = (phase == "training", done);
    }
    fn advance(&mut self, n: u64) {
        self.n_steps += n;
        if self.is_training && self.n_steps == self.after {
            match self.fault {
                // Enough to start a step.
                Fault::Memory => emulation::set_memory(emulation::allocated_bytes() + (100 << 10)),
                Fault::Launch => emulation::set_launch_error(emulation::INVALID_CONFIGURATION, false),
                Fault::Death => emulation::set_launch_error(emulation::LAUNCH_FAILURE, true),
            }
        }
    }
    fn finish(&mut self) {}
    fn say(&mut self, text: &str) {
        self.messages.push(text.to_owned());
    }
}

fn train(folder: &Path, pairs: &[TokenPair], after: u64, fault: Fault) -> (Result<()>, Vec<String>) {
    std::fs::create_dir_all(folder).unwrap();
    // One pair per pass, and activations computed twice: the run cannot take less memory.
    let settings = Settings { max_rows: 1, ..settings() };
    let mut trainer = load("llama", &settings, Frozen::Bf16);
    trainer.set_checkpointing(true);
    let mut progress = Limiting { after, fault, n_steps: 0, is_training: false, messages: Vec::new() };
    let files = RunFiles::of(folder);
    let ran = run(&mut trainer, pairs, &settings, &files, &AtomicBool::new(false), &mut progress);
    emulation::set_memory(PLENTY);
    emulation::set_launch_error(0, false);
    let base = GgufFile::open(tiny("llama")).unwrap();
    let written = ran.and_then(|_| {
        artifact::write(&trainer, &base, &settings, &folder.join("adapter.gguf"), &Metadata::new())
    });
    (written, progress.messages)
}

#[test]
fn a_run_whose_gpu_fails_is_saved_if_possible_and_resumes_to_the_same_bytes() {
    let _turn = gpu();
    let folder = tempfile::tempdir().unwrap();
    let (whole, interrupted) = (folder.path().join("whole"), folder.path().join("interrupted"));
    let pairs = own_pairs("llama", 8);
    train(&whole, &pairs, u64::MAX, Fault::Memory).0.unwrap();
    for (after, fault) in [(1, Fault::Memory), (3, Fault::Launch)] {
        let (result, messages) = train(&interrupted, &pairs, after, fault);
        match fault {
            Fault::Memory => assert!(matches!(result, Err(Error::DeviceMemory { .. })), "{result:?}"),
            _ => assert!(matches!(result, Err(Error::Device { .. })), "{result:?}"),
        }
        let expected = format!("saved after step {after}; run the same command again to resume");
        assert_eq!(messages.last(), Some(&expected));
        assert!(interrupted.join("checkpoint.gguf").exists());
    }
    // A dead GPU cannot be read: the previous checkpoint stays, and the error is the original one.
    let (result, messages) = train(&interrupted, &pairs, 4, Fault::Death);
    let error = result.unwrap_err();
    assert!(error.to_string().contains("unspecified launch failure"), "{error}");
    assert!(
        messages.last().is_some_and(|message| message.starts_with("could not save after step 4")),
        "{messages:?}"
    );
    train(&interrupted, &pairs, u64::MAX, Fault::Memory).0.unwrap();
    let bytes = |folder: &Path| std::fs::read(folder.join("adapter.gguf")).unwrap();
    assert!(bytes(&whole) == bytes(&interrupted), "the adapter of a run that was interrupted twice");
}

/// Rows of all pairs, and of the longest pair.
fn rows_of(pairs: &[TokenPair]) -> (usize, usize) {
    let rows = pairs.iter().map(|pair| Packed::n_rows_of(&pair.prompt, &pair.chosen, &pair.rejected));
    (rows.clone().sum(), rows.max().unwrap_or(0))
}

fn placements(records: &[Record]) -> Vec<PlacementRecord> {
    let of = |record: &Record| if let Record::Placement(found) = record { Some(*found) } else { None };
    records.iter().filter_map(of).collect()
}

/// Checks that two runs made the same steps, except for the rounding of sums.
///
/// A gradient that was added twice, or not at all, would change the norm by far more than the tolerance.
#[track_caller]
fn assert_same_steps(found: &[Record], expected: &[Record]) {
    let of = |record: &Record| if let Record::Step(step) = record { Some(step.clone()) } else { None };
    let [found, expected] =
        [found, expected].map(|records| records.iter().filter_map(of).collect::<Vec<_>>());
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(&expected) {
        assert_eq!((a.step, a.tokens, a.pairs), (b.step, b.tokens, b.pairs));
        let near = |a: f64, b: f64| (a - b).abs() <= 0.05 * b.abs();
        assert!(near(a.means.loss, b.means.loss) && near(a.grad_norm, b.grad_norm), "{a:?} and {b:?}");
    }
}

#[test]
fn a_run_that_runs_out_of_memory_continues_in_smaller_passes_to_the_same_result() {
    let _turn = gpu();
    let pairs = own_pairs("llama", 8);
    let (_, longest) = rows_of(&pairs);
    let settings = Settings {
        batch_size: 4,
        max_steps: Some(3),
        max_rows: 4096,
        held_out: 0.0,
        frozen: Some(Frozen::Bf16),
        ..settings()
    };
    let folder = tempfile::tempdir().unwrap();
    let train = |name: &str, limit: Option<usize>, smallest: Option<usize>| {
        let files = RunFiles::of(&folder.path().join(name));
        std::fs::create_dir_all(folder.path().join(name)).unwrap();
        let settings = Settings { max_rows: smallest.unwrap_or(settings.max_rows), ..settings.clone() };
        let before = emulation::allocated_bytes();
        let mut trainer = load("llama", &settings, Frozen::Bf16);
        trainer.set_checkpointing(smallest.is_some());
        emulation::set_memory(limit.map_or(PLENTY, |limit| before + limit));
        emulation::peak_bytes();
        let mut progress = Limiting {
            after: u64::MAX,
            fault: Fault::Memory,
            n_steps: 0,
            is_training: false,
            messages: Vec::new(),
        };
        let ran = run(&mut trainer, &pairs, &settings, &files, &AtomicBool::new(false), &mut progress);
        emulation::set_memory(PLENTY);
        (ran.map(|(_, records)| records), emulation::peak_bytes() - before, progress.messages)
    };
    let (records, most, messages) = train("uninterrupted", None, None);
    let uninterrupted = records.unwrap();
    let first = PlacementRecord {
        step: 0,
        device: DeviceName::Cuda(0),
        max_rows: 4096,
        checkpointing: false,
        frozen: Some(Frozen::Bf16),
        out_of_memory: false,
    };
    assert_eq!((placements(&uninterrupted), messages), (vec![first], vec![]));
    let (records, least, _) = train("smallest", None, Some(longest));
    assert_same_steps(&records.unwrap(), &uninterrupted);
    assert!(2 * least < most, "{least} and {most} bytes");

    // Smaller passes are enough.
    let (records, taken, messages) = train("smaller", Some(most - 1), None);
    let records = records.unwrap();
    let chosen = placements(&records);
    assert!(taken < most && chosen.len() == 2, "{chosen:?}");
    assert!(chosen[1].out_of_memory && !chosen[1].checkpointing && chosen[1].max_rows < 400, "{chosen:?}");
    let expected = format!("continuing with {} tokens per pass, weights in bf16", chosen[1].max_rows);
    assert!(
        messages[0].contains("the GPU has no room for") && messages[0].ends_with(&expected),
        "{messages:?}"
    );
    assert_same_steps(&records, &uninterrupted);

    // Only the smallest passes with activations computed twice fit.
    let (records, ..) = train("least", Some(least), None);
    let records = records.unwrap();
    let chosen = placements(&records);
    let last = chosen.last().unwrap();
    assert!(last.checkpointing && last.max_rows == longest && chosen.len() > 2, "{chosen:?}");
    assert_same_steps(&records, &uninterrupted);

    // Nothing fits: the run is saved and ends, and resumes with other choices once there is memory.
    let (records, _, messages) = train("none", Some(least - 1), None);
    assert!(matches!(records, Err(Error::DeviceMemory { .. })), "{records:?}");
    let hint = records.unwrap_err().hint().unwrap();
    let expected = "free GPU memory (nvidia-smi lists the processes that use it), or resume with --frozen quantised; \
                    or start over in a new folder (-o) with a smaller --max-length or --rank";
    assert_eq!(hint, expected, "the hint only names options that are left");
    assert_eq!(messages.last().unwrap(), "saved after step 0; run the same command again to resume");
    let (records, _, messages) = train("none", None, Some(longest));
    let records = records.unwrap();
    let chosen = placements(&records);
    assert!(
        chosen.iter().filter(|c| c.out_of_memory).count() > 1 && messages.is_empty(),
        "{chosen:?}, {messages:?}"
    );
    assert_same_steps(&records, &uninterrupted);
}

#[test]
fn a_run_that_ran_out_of_memory_resumes_with_other_choices_and_logs_them() {
    let _turn = gpu();
    let pairs = own_pairs("llama-q8_0", 8);
    let folder = tempfile::tempdir().unwrap();
    let files = RunFiles::of(folder.path());
    let smallest = Settings { max_rows: 1, frozen: Some(Frozen::Bf16), ..settings() };
    let mut trainer = load("llama-q8_0", &smallest, Frozen::Bf16);
    trainer.set_checkpointing(true);
    let mut progress =
        Limiting { after: 3, fault: Fault::Memory, n_steps: 0, is_training: false, messages: Vec::new() };
    let ran = run(&mut trainer, &pairs, &smallest, &files, &AtomicBool::new(false), &mut progress);
    emulation::set_memory(PLENTY);
    assert!(matches!(ran, Err(Error::DeviceMemory { .. })), "{ran:?}");
    drop(trainer);

    let other = Settings { max_rows: 64, frozen: Some(Frozen::Quantised), ..settings() };
    let mut trainer = load("llama-q8_0", &other, Frozen::Quantised);
    progress = Limiting {
        after: u64::MAX,
        fault: Fault::Memory,
        n_steps: 0,
        is_training: false,
        messages: Vec::new(),
    };
    let (outcome, records) =
        run(&mut trainer, &pairs, &other, &files, &AtomicBool::new(false), &mut progress).unwrap();
    assert_eq!(outcome.n_steps, 5);
    let expected = "resuming with 64 tokens per pass, weights in the file's blocks instead of 1 token per pass, \
                    weights in bf16, activations recomputed: results differ only by rounding";
    assert_eq!(progress.messages[0], expected);
    assert_eq!(placements(&records).last().map(|p| (p.step, p.max_rows)), Some((3, 64)));

    let whole = tempfile::tempdir().unwrap();
    let (files, mut uninterrupted) =
        (RunFiles::of(whole.path()), load("llama-q8_0", &smallest, Frozen::Bf16));
    let (_, expected) =
        run(&mut uninterrupted, &pairs, &smallest, &files, &AtomicBool::new(false), &mut Silent).unwrap();
    assert_same_steps(&records, &expected);
}

/// Scores `pairs` by the reference, and makes one training step on them.
fn step_once<D: Device>(trainer: &mut Trainer<D>, pairs: &[&TokenPair]) {
    let references = trainer.logps(Side::Reference, pairs).unwrap();
    trainer.add_gradient(pairs, &references).unwrap();
    trainer.step(1e-3, 1.0).unwrap();
}

#[test]
fn counted_bytes_equal_the_bytes_the_gpu_allocates() {
    let _turn = gpu();
    let names = ["llama", "llama-q8_0", "gpt2", "bloom", "command-r", "gemma3", "qwen2", "qwen3"];
    let ways =
        [(Frozen::Bf16, false), (Frozen::Bf16, true), (Frozen::Quantised, false), (Frozen::Quantised, true)];
    let lora = names.iter().flat_map(|name| ways.map(|way| (*name, MethodName::Lora, way)));
    let others = ["llama", "gpt2"].map(|name| (name, MethodName::Full, (Frozen::Bf16, false)));
    let vector = [("llama", MethodName::Vector, (Frozen::Quantised, true))];
    for (name, method, (frozen, checkpointing)) in lora.chain(others).chain(vector) {
        let settings = Settings { method, max_rows: 4096, ..settings() };
        let pairs = own_pairs(name, 2);
        let pairs: Vec<&TokenPair> = pairs.iter().collect();

        let before = emulation::allocated_bytes();
        emulation::peak_bytes();
        let mut trainer = load(name, &settings, frozen);
        trainer.set_checkpointing(checkpointing);
        step_once(&mut trainer, &pairs);
        let allocated = (emulation::peak_bytes() - before) as u64;

        let base = GgufFile::open(tiny(name)).unwrap();
        let device = Counting::emulated(frozen);
        let (method, options) = (settings.method(), settings.step_options());
        let mut trainer = Trainer::load(device, &base, &method, settings.seed, options).unwrap();
        trainer.set_checkpointing(checkpointing);
        step_once(&mut trainer, &pairs);
        let counted = trainer.device().peak_bytes();
        assert_eq!(counted, allocated, "{name}, {method:?}, {frozen:?}, {checkpointing}");
    }
}

#[test]
fn runs_take_no_more_memory_than_was_estimated() {
    let _turn = gpu();
    for (name, frozen, checkpointing) in [
        ("llama", Frozen::Bf16, false),
        ("llama", Frozen::Bf16, true),
        ("llama-q8_0", Frozen::Quantised, false),
        ("gemma3", Frozen::Bf16, false),
        ("gpt2", Frozen::Quantised, true),
    ] {
        let what = format!("{name}, {}, {checkpointing}", frozen.name());
        let pairs = own_pairs(name, 5);
        let (rows, longest) = rows_of(&pairs);
        let settings = Settings { max_rows: rows, batch_size: pairs.len(), ..settings() };
        let base = GgufFile::open(tiny(name)).unwrap();
        let needs = Needs::new(&base, &settings, longest);
        // The emulation allocates neither the reserve nor cuBLASLt's workspace.
        let constants = Needs::RESERVE_BYTES + WORKSPACE_BYTES;
        let choice = Choice { frozen, checkpointing, max_rows: rows };
        let estimated = needs.bytes(choice).unwrap() - constants;

        let before = emulation::allocated_bytes();
        emulation::peak_bytes();
        let mut trainer = load(name, &settings, frozen);
        trainer.set_checkpointing(checkpointing);
        step_once(&mut trainer, &pairs.iter().collect::<Vec<_>>());
        let allocated = (emulation::peak_bytes() - before) as u64;
        assert!(
            estimated + WORKSPACE_BYTES >= allocated,
            "{what}: {allocated} bytes allocated, {estimated} estimated"
        );
        assert!(
            10 * estimated <= 11 * allocated,
            "{what}: {estimated} bytes estimated, only {allocated} allocated"
        );
    }
}
