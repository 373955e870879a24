//! Runs: the same command produces the same bytes, however often it was interrupted.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use detox_gguf::error::Error;
use detox_gguf::gguf::GgufFile;
use detox_gguf::progress::Progress;
use detox_gguf::train::data::tokens::TokenPair;
use detox_gguf::train::device::Device;
use detox_gguf::train::recipe::method::MethodName;
use detox_gguf::train::recipe::settings::Settings;
use detox_gguf::train::run::metrics::{EvaluationRecord, Record, StepRecord};
use detox_gguf::train::run::trainer::Side;
use detox_gguf::train::run::{Ending, RunFiles};
use serde_json::Value;

use super::{Silent, load, own_pairs, small_settings, tiny, train, train_whole};

/// A progress that calls `at_step` after each step, and `at_part` before each part of an evaluation.
struct Watching<'a> {
    is_training: bool,
    n_steps: u64,
    n_parts: u64,
    at_step: &'a mut dyn FnMut(u64),
    at_part: &'a mut dyn FnMut(u64),
}

impl<'a> Watching<'a> {
    fn new(at_step: &'a mut dyn FnMut(u64), at_part: &'a mut dyn FnMut(u64)) -> Watching<'a> {
        Watching { is_training: false, n_steps: 0, n_parts: 0, at_step, at_part }
    }
}

impl Progress for Watching<'_> {
    fn start(&mut self, phase: &str, _total: u64, done: u64) {
        self.is_training = phase == "training";
        self.n_steps = done;
    }

    fn advance(&mut self, n: u64) {
        if self.is_training {
            self.n_steps += n;
            (self.at_step)(self.n_steps);
        }
    }

    fn note(&mut self, text: &str) {
        if text.starts_with("held out") {
            self.n_parts += 1;
            (self.at_part)(self.n_parts);
        }
    }

    fn finish(&mut self) {}

    fn say(&mut self, _text: &str) {}
}

/// The lines of `metrics.jsonl`, without times.
fn metrics(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        value.as_object_mut().unwrap().remove("step_seconds");
        value
    };
    text.lines().map(line).collect()
}

#[track_caller]
fn assert_same(whole: &Path, other: &Path, what: &str) {
    assert_eq!(metrics(whole), metrics(other), "{what}");
    let bytes = |folder: &Path| std::fs::read(folder.join("adapter.gguf")).unwrap();
    assert!(bytes(whole) == bytes(other), "{what}: adapters differ");
}

fn steps(records: &[Record]) -> Vec<StepRecord> {
    records
        .iter()
        .filter_map(|r| if let Record::Step(step) = r { Some(step.clone()) } else { None })
        .collect()
}

fn evaluations(records: &[Record]) -> Vec<EvaluationRecord> {
    records
        .iter()
        .filter_map(|r| if let Record::Evaluation(evaluation) = r { Some(*evaluation) } else { None })
        .collect()
}

/// Copies the folder of a killed run.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// Enough pairs for an evaluation in two parts: 18 held out, and 14 steps per epoch.
fn enough_pairs(name: &str) -> Vec<TokenPair> {
    own_pairs(name, 60)
}

fn settings() -> Settings {
    Settings { held_out: 0.3, epochs: 1, ..small_settings() }
}

#[test]
fn the_same_command_twice_gives_the_same_bytes() {
    for name in ["llama", "gemma3"] {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        let pairs = enough_pairs(name);
        let trained = train_whole(name, &settings(), &pairs, &first);
        assert_eq!((trained.outcome.n_steps, trained.outcome.n_held_out), (14, 18));
        assert_eq!(
            evaluations(&trained.records).iter().map(|evaluation| evaluation.step).collect::<Vec<_>>(),
            [4, 8, 12, 14]
        );
        train_whole(name, &settings(), &pairs, &second);
        assert_same(&first, &second, name);
        // Another seed gives another result, so the comparison above can fail.
        let third = folder.path().join("third");
        train_whole(name, &Settings { seed: 8, ..settings() }, &pairs, &third);
        assert_ne!(metrics(&first), metrics(&third));
    }
}

#[test]
fn a_run_interrupted_at_any_step_resumes_to_the_same_bytes() {
    for (name, stops) in [("llama", &[0, 1, 3, 4, 5, 8, 13, 14][..]), ("gemma3", &[3, 8][..])] {
        let folder = tempfile::tempdir().unwrap();
        let whole = folder.path().join("whole");
        let pairs = enough_pairs(name);
        train_whole(name, &settings(), &pairs, &whole);
        // Each stop alone, then all of them in one run.
        let each = stops.iter().map(|stop| vec![*stop]);
        for stops in each.chain([stops.to_vec()]) {
            let broken = folder.path().join(format!("{stops:?}"));
            for stop in &stops {
                let interrupt = AtomicBool::new(*stop == 0);
                let mut at_step = |n| interrupt.store(n == *stop, Ordering::Relaxed);
                let mut at_part = |_| {};
                let mut progress = Watching::new(&mut at_step, &mut at_part);
                let error = train(name, &settings(), &pairs, &broken, &interrupt, &mut progress).err();
                assert!(matches!(error, Some(Error::Interrupted)), "{name} at {stop}: {error:?}");
                assert!(broken.join("checkpoint.gguf").exists());
            }
            train_whole(name, &settings(), &pairs, &broken);
            assert_same(&whole, &broken, &format!("{name}, interrupted at {stops:?}"));
        }
    }
}

#[test]
fn a_run_interrupted_during_an_evaluation_repeats_it() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    let pairs = enough_pairs("llama");
    train_whole("llama", &settings(), &pairs, &whole);
    // The second part of the first evaluation, and of a later one after resuming.
    for (n_interrupted, stop) in [1, 3].into_iter().enumerate() {
        let interrupt = AtomicBool::new(false);
        let (mut at_step, mut at_part) = (|_| {}, |n| interrupt.store(n == stop, Ordering::Relaxed));
        let mut progress = Watching::new(&mut at_step, &mut at_part);
        let ended = train("llama", &settings(), &pairs, &broken, &interrupt, &mut progress);
        assert!(matches!(ended.err(), Some(Error::Interrupted)));
        let n_evaluations = metrics(&broken).iter().filter(|line| line.get("eval_loss").is_some()).count();
        assert_eq!(
            n_evaluations, n_interrupted,
            "a partial evaluation must not be recorded, and the one before must be repeated"
        );
    }
    train_whole("llama", &settings(), &pairs, &broken);
    assert_same(&whole, &broken, "interrupted during evaluations");
}

/// Truncates a file by `n` bytes.
fn cut(path: &Path, n: usize) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() - n]).unwrap();
}

#[test]
fn a_killed_run_resumes_from_its_checkpoint_whatever_was_written_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let pairs = enough_pairs("llama");
    let killed = |step: u64| folder.path().join(format!("killed at {step}"));
    let mut at_step = |step| {
        if [2, 4, 7, 12].contains(&step) {
            copy(&whole, &killed(step));
        }
    };
    let (interrupt, mut at_part) = (AtomicBool::new(false), |_| {});
    let mut progress = Watching::new(&mut at_step, &mut at_part);
    train("llama", &settings(), &pairs, &whole, &interrupt, &mut progress).unwrap();
    for (step, n_checkpoint) in [(2, None), (4, None), (7, Some(4)), (12, Some(8))] {
        let killed = killed(step);
        let n_steps = metrics(&killed).iter().filter(|line| line.get("loss").is_some()).count() as u64;
        assert_eq!(n_steps, step, "there must be lines after the checkpoint");
        assert_eq!(killed.join("checkpoint.gguf").exists(), n_checkpoint.is_some());
        // The last line of each file is incomplete.
        let torn = folder.path().join(format!("torn at {step}"));
        copy(&killed, &torn);
        cut(&torn.join("metrics.jsonl"), 40);
        cut(&torn.join("reference.jsonl"), 40);
        std::fs::write(torn.join(".detox-gguf-x.tmp"), "half").unwrap();
        for broken in [killed, torn] {
            let mut first = None;
            let (mut at_step, mut at_part) = (|n| first = first.or(Some(n)), |_| {});
            let mut progress = Watching::new(&mut at_step, &mut at_part);
            train("llama", &settings(), &pairs, &broken, &interrupt, &mut progress).unwrap();
            assert_eq!(first, Some(n_checkpoint.unwrap_or(0) + 1), "it must resume after its checkpoint");
            assert_same(&whole, &broken, &broken.display().to_string());
        }
    }
}

#[test]
fn references_lost_in_the_middle_of_a_step_are_recomputed_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let pairs = enough_pairs("llama");
    let mut at_step = |step| {
        if step == 7 {
            copy(&whole, &killed);
        }
    };
    let (interrupt, mut at_part) = (AtomicBool::new(false), |_| {});
    let mut progress = Watching::new(&mut at_step, &mut at_part);
    train("llama", &settings(), &pairs, &whole, &interrupt, &mut progress).unwrap();
    let lines = std::fs::read_to_string(killed.join("reference.jsonl")).unwrap();
    let n_lines = lines.lines().count();
    // A step has three pairs, so one or two of the last step's references are left to compute, alone in their pass.
    for n_lost in [1, 2, 4, 5] {
        let broken = folder.path().join(format!("{n_lost} lost"));
        copy(&killed, &broken);
        let kept: String = lines.lines().take(n_lines - n_lost).map(|line| format!("{line}\n")).collect();
        std::fs::write(broken.join("reference.jsonl"), kept).unwrap();
        train_whole("llama", &settings(), &pairs, &broken);
        assert_same(&whole, &broken, &format!("{n_lost} references lost"));
    }
}

#[test]
fn a_finished_run_writes_the_same_result_again_without_training() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, again) = (folder.path().join("whole"), folder.path().join("again"));
    let pairs = enough_pairs("llama");
    let first = train_whole("llama", &settings(), &pairs, &whole);
    copy(&whole, &again);
    std::fs::remove_file(again.join("adapter.gguf")).unwrap();
    let second = train_whole("llama", &settings(), &pairs, &again);
    assert_eq!(first.outcome, second.outcome);
    assert_same(&whole, &again, "a second time");
}

#[test]
fn every_method_starts_at_loss_ln_2_and_margin_0() {
    for name in ["llama", "command-r", "gpt2", "bloom", "gemma3", "llama-q8_0"] {
        let pairs = own_pairs(name, 12);
        for method in [MethodName::Lora, MethodName::Vector, MethodName::Full] {
            if (name, method) == ("llama-q8_0", MethodName::Full) {
                continue;
            }
            let folder = tempfile::tempdir().unwrap();
            let settings = Settings { method, max_steps: Some(2), ..small_settings() };
            let trained = train_whole(name, &settings, &pairs, folder.path());
            let what = format!("{name}, {method:?}");
            let all = steps(&trained.records);
            let (first, second) = (all[0].means, all[1].means);
            // In full training the reference log-probs were computed with other pairs in the pass.
            let tolerance = if method == MethodName::Full { 1e-5 } else { 0.0 };
            assert!((first.loss - std::f64::consts::LN_2).abs() <= tolerance, "{what}: {}", first.loss);
            assert!(first.rewards_margins.abs() <= tolerance, "{what}: {}", first.rewards_margins);
            assert!(all[0].grad_norm > 0.0, "{what}");
            // The first step of the warm-up has learning rate 0, so the second starts from the same values.
            assert!((second.loss - std::f64::consts::LN_2).abs() <= tolerance, "{what}: {}", second.loss);
        }
    }
}

#[test]
fn the_reference_equals_the_base_bit_for_bit_after_training() {
    for name in ["llama", "gemma3", "llama-q8_0"] {
        let pairs = own_pairs(name, 12);
        let some: Vec<&TokenPair> = pairs.iter().take(5).collect();
        let base = GgufFile::open(tiny(name)).unwrap();
        // A model without adapters; the reference side skips its directions.
        let untouched = load(&base, &Settings { method: MethodName::Vector, ..small_settings() }).unwrap();
        let expected = untouched.logps(Side::Reference, &some).unwrap();
        for method in [MethodName::Lora, MethodName::Vector] {
            let folder = tempfile::tempdir().unwrap();
            let settings = Settings { method, learning_rate: 0.05, ..small_settings() };
            let trained = train_whole(name, &settings, &pairs, folder.path()).trainer;
            assert_eq!(trained.logps(Side::Reference, &some).unwrap(), expected, "{name}, {method:?}");
            let policy = trained.logps(Side::Policy, &some).unwrap();
            let moved = policy.iter().zip(&expected).map(|(a, b)| (a.chosen - b.chosen).abs());
            assert!(moved.fold(0.0, f64::max) > 0.1, "{name}, {method:?}: nothing was trained");
        }
    }
}

#[test]
fn training_raises_the_margin_of_the_training_pairs() {
    for method in [MethodName::Lora, MethodName::Vector, MethodName::Full] {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            method,
            epochs: 6,
            held_out: 0.0,
            eval_every: 100,
            learning_rate: 3e-3,
            ..small_settings()
        };
        let trained = train_whole("llama", &settings, &own_pairs("llama", 12), folder.path());
        let all = steps(&trained.records);
        let (first, last) = (all[0].means, all[all.len() - 1].means);
        assert!(last.loss < first.loss && last.rewards_margins > 0.01, "{method:?}: {first:?}, {last:?}");
        assert_eq!((trained.outcome.best, trained.outcome.n_held_out), (None, 0));
        assert_eq!(trained.outcome.n_steps, 24);
    }
}

#[test]
fn a_run_stops_early_after_patience_evaluations_without_improvement() {
    let folder = tempfile::tempdir().unwrap();
    // The steps are too small to change the loss: the first evaluation is the best, and the others are no better.
    let settings =
        Settings { learning_rate: 1e-30, eval_every: 2, patience: 3, epochs: 20, ..small_settings() };
    let pairs = own_pairs("llama", 16);
    let trained = train_whole("llama", &settings, &pairs, folder.path());
    assert_eq!(trained.outcome.ending, Ending::EarlyStopping);
    assert_eq!(
        evaluations(&trained.records).iter().map(|evaluation| evaluation.step).collect::<Vec<_>>(),
        [2, 4, 6, 8]
    );
    assert_eq!((trained.outcome.n_steps, trained.outcome.best), (8, Some((2, std::f64::consts::LN_2))));
    // After an interrupt, earlier evaluations still count.
    let broken = folder.path().join("broken");
    let interrupt = AtomicBool::new(false);
    let (mut at_step, mut at_part) = (|n| interrupt.store(n == 5, Ordering::Relaxed), |_| {});
    let mut progress = Watching::new(&mut at_step, &mut at_part);
    train("llama", &settings, &pairs, &broken, &interrupt, &mut progress).err().unwrap();
    let resumed = train_whole("llama", &settings, &pairs, &broken);
    assert_eq!((resumed.outcome.ending, resumed.outcome.n_steps), (Ending::EarlyStopping, 8));
    // Once it has ended, it does not start again.
    let again = train_whole("llama", &settings, &pairs, &broken);
    assert_eq!((again.outcome.ending, again.outcome.n_steps), (Ending::EarlyStopping, 8));
}

/// The learning rate is far too high, so the held-out loss soon rises.
fn overfitting() -> Settings {
    Settings { learning_rate: 0.02, warmup_steps: 0, eval_every: 2, epochs: 6, ..small_settings() }
}

#[test]
fn the_step_with_the_lowest_held_out_loss_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let pairs = own_pairs("llama", 24);
    let settings = overfitting();
    let trained = train_whole("llama", &settings, &pairs, &folder.path().join("long"));
    let evaluations = evaluations(&trained.records);
    let least = evaluations.iter().min_by(|a, b| a.eval_loss.total_cmp(&b.eval_loss)).unwrap();
    assert_eq!(trained.outcome.best, Some((least.step, least.eval_loss)));
    assert!(
        least.step < trained.outcome.n_steps,
        "the last step was the best, so this test shows nothing: {evaluations:?}"
    );
    let short = Settings { max_steps: Some(least.step), ..settings };
    let ended = train_whole("llama", &short, &pairs, &folder.path().join("short"));
    let values = |trained: &super::Trained| -> Vec<Vec<f32>> {
        trained.trainer.parameters.values.iter().map(|values| values.to_vec()).collect()
    };
    assert!(values(&trained) == values(&ended));
}

#[test]
fn a_diverging_run_fails_and_keeps_its_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    // The first step of the warm-up has learning rate 0, and the second 5e29.
    let settings = Settings { learning_rate: 1e30, eval_every: 1, ..small_settings() };
    let pairs = own_pairs("llama", 16);
    let checkpoint = RunFiles::of(folder.path()).checkpoint;
    let error = train("llama", &settings, &pairs, folder.path(), &AtomicBool::new(false), &mut Silent).err();
    assert!(matches!(error, Some(Error::Training { .. })), "{error:?}");
    let before = std::fs::read(&checkpoint).unwrap();
    let base = GgufFile::open(tiny("llama")).unwrap();
    let mut trainer = load(&base, &settings).unwrap();
    let state = detox_gguf::train::run::checkpoint::load(&checkpoint, &mut trainer, true).unwrap();
    assert_eq!((state.step, state.evaluated_at), (1, 1));
    // Resuming fails in the same way.
    let error = train("llama", &settings, &pairs, folder.path(), &AtomicBool::new(false), &mut Silent).err();
    assert!(matches!(error, Some(Error::Training { .. })), "{error:?}");
    assert!(std::fs::read(&checkpoint).unwrap() == before);
    assert!(!folder.path().join("adapter.gguf").exists());
}

#[test]
fn a_run_that_failed_to_write_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let pairs = enough_pairs("llama");
    train_whole("llama", &settings(), &pairs, &whole);
    // Not the metrics: they are appended to an open file instead of being replaced.
    for full in ["checkpoint.gguf", "best.gguf"] {
        let stopped = folder.path().join(full);
        let place = stopped.join(full);
        let mut kept = None;
        let mut at_step = |step| {
            if step == 6 {
                kept = Some(std::fs::read(&place).unwrap());
                std::fs::remove_file(&place).unwrap();
                std::fs::create_dir(&place).unwrap();
            }
        };
        let (interrupt, mut at_part) = (AtomicBool::new(false), |_| {});
        let mut progress = Watching::new(&mut at_step, &mut at_part);
        let error = train("llama", &settings(), &pairs, &stopped, &interrupt, &mut progress).err().unwrap();
        assert!(matches!(&error, Error::Io { action: "write", .. }), "{error}");
        // A file that cannot be written completely never replaces the old one.
        std::fs::remove_dir(&place).unwrap();
        std::fs::write(&place, kept.unwrap()).unwrap();
        train_whole("llama", &settings(), &pairs, &stopped);
        assert_same(&whole, &stopped, full);
    }
}

#[test]
fn a_run_continues_without_its_metrics() {
    let folder = tempfile::tempdir().unwrap();
    let pairs = own_pairs("llama", 16);
    train_whole("llama", &small_settings(), &pairs, folder.path());
    let metrics = folder.path().join("metrics.jsonl");
    let before = std::fs::read_to_string(&metrics).unwrap();
    let lines: Vec<&str> = before.lines().collect();
    let zeroed = lines[1].len() + 1;
    let damaged = [
        // The last line is cut off, one in the middle is garbage, and one is zeroed with its end.
        (before[..before.len() - 1].to_owned(), lines[..lines.len() - 1].join("\n")),
        (before.replace(lines[1], "x"), before.replace(&format!("{}\n", lines[1]), "")),
        (
            before.replace(&format!("{}\n", lines[1]), &"\0".repeat(zeroed)),
            [&lines[..1], &lines[3..]].concat().join("\n"),
        ),
        (String::new(), String::new()),
    ];
    for (damaged, kept) in damaged {
        std::fs::write(&metrics, &damaged).unwrap();
        train_whole("llama", &small_settings(), &pairs, folder.path());
        assert_eq!(std::fs::read_to_string(&metrics).unwrap().trim_end(), kept.trim_end());
    }
    std::fs::remove_file(&metrics).unwrap();
    train_whole("llama", &small_settings(), &pairs, folder.path());
}

/// Damages a file in each of several ways: zeroed in the middle, cut off, empty.
fn damages(path: &Path) -> Vec<Vec<u8>> {
    let whole = std::fs::read(path).unwrap();
    let mut zeroed = whole.clone();
    let n = whole.len();
    zeroed[n - 1400..n - 900].fill(0);
    assert!(zeroed != whole);
    vec![zeroed, vec![0; n], whole[..n / 2].to_vec(), Vec::new()]
}

#[test]
fn a_damaged_checkpoint_falls_back_to_the_one_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, kept] = ["whole", "kept"].map(|name| folder.path().join(name));
    let pairs = enough_pairs("llama");
    train_whole("llama", &settings(), &pairs, &whole);
    assert!(!whole.join("checkpoint-previous.gguf").exists(), "a finished run needs one only");
    let interrupt = AtomicBool::new(false);
    let mut at_step = |step| {
        if step == 9 {
            interrupt.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    };
    let mut at_part = |_| {};
    let mut progress = Watching::new(&mut at_step, &mut at_part);
    let ended = train("llama", &settings(), &pairs, &kept, &interrupt, &mut progress);
    assert!(matches!(ended.err(), Some(Error::Interrupted)));
    let mut damages: Vec<Option<Vec<u8>>> =
        damages(&kept.join("checkpoint.gguf")).into_iter().map(Some).collect();
    // Killed between the two renames of a save.
    damages.push(None);
    for (i, damaged) in damages.into_iter().enumerate() {
        let stopped = folder.path().join(i.to_string());
        copy(&kept, &stopped);
        match damaged {
            Some(damaged) => std::fs::write(stopped.join("checkpoint.gguf"), damaged).unwrap(),
            None => std::fs::remove_file(stopped.join("checkpoint.gguf")).unwrap(),
        }
        train_whole("llama", &settings(), &pairs, &stopped);
        assert_same(&whole, &stopped, "damaged");
    }
}

#[test]
fn rejects_a_damaged_checkpoint_with_hints_that_work() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, damaged) = (folder.path().join("whole"), folder.path().join("damaged"));
    let pairs = own_pairs("llama", 24);
    train_whole("llama", &overfitting(), &pairs, &whole);
    train_whole("llama", &overfitting(), &pairs, &damaged);
    let refusal = || {
        train("llama", &overfitting(), &pairs, &damaged, &AtomicBool::new(false), &mut Silent).err().unwrap()
    };
    for name in ["checkpoint.gguf", "best.gguf"] {
        for bytes in damages(&damaged.join(name)) {
            std::fs::write(damaged.join(name), bytes).unwrap();
            let error = refusal();
            assert!(matches!(error, Error::RunFolder { .. }), "{error}");
            assert!(error.to_string().contains(&format!("{name}: the checkpoint is damaged")), "{error}");
            assert!(error.hint().unwrap().starts_with(&format!("delete {name} and repeat the command")));
            assert_eq!(metrics(&whole), metrics(&damaged), "nothing is lost");
        }
        std::fs::remove_file(damaged.join(name)).unwrap();
        let ended = train_whole("llama", &overfitting(), &pairs, &damaged);
        match name {
            "checkpoint.gguf" => assert_same(&whole, &damaged, name),
            _ => assert_eq!(ended.outcome.best, None, "the values are those of the last step"),
        }
    }
}

#[test]
fn missing_references_of_a_full_run_are_computed_again() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, damaged) = (folder.path().join("whole"), folder.path().join("damaged"));
    let settings = Settings { method: MethodName::Full, ..small_settings() };
    let pairs = own_pairs("llama", 16);
    for run in [&whole, &damaged] {
        train_whole("llama", &settings, &pairs, run);
    }
    let path = damaged.join("reference.jsonl");
    let before = std::fs::read_to_string(&path).unwrap();
    let second = before.lines().nth(1).unwrap();
    std::fs::write(&path, before.replace(second, "x")).unwrap();
    train_whole("llama", &settings, &pairs, &damaged);
    let sorted = |text: &str| -> Vec<String> {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&std::fs::read_to_string(&path).unwrap()), sorted(&before));
}

#[test]
fn rejects_checkpoints_of_other_runs() {
    let folder = tempfile::tempdir().unwrap();
    let pairs = own_pairs("llama", 16);
    train_whole("llama", &small_settings(), &pairs, folder.path());
    let other = Settings { rank: 8, ..small_settings() };
    let error = train("llama", &other, &pairs, folder.path(), &AtomicBool::new(false), &mut Silent);
    let error = error.err().unwrap().to_string();
    assert!(error.contains("lora_a\": expected [64, 8], found [64, 4]"), "{error}");
    std::fs::copy(tiny("llama"), folder.path().join("checkpoint.gguf")).unwrap();
    let error =
        train("llama", &small_settings(), &pairs, folder.path(), &AtomicBool::new(false), &mut Silent);
    let error = error.err().unwrap().to_string();
    assert!(error.contains("expected a checkpoint, found architecture \"llama\""), "{error}");
}

#[test]
fn logits_in_several_chunks_give_the_same_gradients_as_in_one() {
    let pairs = own_pairs("llama", 40);
    // About 20,000 outputs; a chunk of 32 MiB of logits holds at most 16,384.
    let many: Vec<&TokenPair> = pairs.iter().cycle().take(700).collect();
    let base = GgufFile::open(tiny("llama")).unwrap();
    for targets in [&["q", "down"][..], &["v", "output"][..]] {
        let targets = targets.iter().map(|&target| target.to_owned()).collect();
        let settings = Settings { targets, ..small_settings() };
        let gradients = |max_rows: usize| {
            let settings = Settings { max_rows, ..settings.clone() };
            let mut trainer = load(&base, &settings).unwrap();
            let references = trainer.logps(Side::Reference, &many).unwrap();
            trainer.add_gradient(&many, &references).unwrap();
            let all = trainer.parameters.gradients.iter();
            all.map(|gradient| trainer.device().download(gradient).unwrap()).collect::<Vec<_>>()
        };
        let n_outputs: usize = many.iter().map(|pair| pair.chosen.len() + pair.rejected.len()).sum();
        let n_vocab = load(&base, &settings).unwrap().transformer.config.n_vocab;
        assert!(
            n_outputs * n_vocab * 4 > 32 << 20,
            "one chunk holds everything: {n_outputs} outputs of {n_vocab}"
        );
        let (together, apart) = (gradients(1 << 20), gradients(300));
        for (together, apart) in together.iter().zip(&apart) {
            let largest = apart.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let distance = together.iter().zip(apart).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Sums of 20,000 terms in a different order.
            assert!(distance <= 1e-4 * largest, "{distance} apart; the largest value is {largest}");
        }
    }
}
