//! A DPO step on a GPU, compared with the same step on the CPU.

use detox_gguf::gguf::GgufFile;
use detox_gguf::train::data::tokens::TokenPair;
use detox_gguf::train::device::Device;
use detox_gguf::train::device::cpu::Cpu;
#[cfg(feature = "cuda-emulation")]
use detox_gguf::train::device::cuda::emulation;
use detox_gguf::train::device::name::Frozen;
use detox_gguf::train::recipe::dpo::AnswerLogps;
use detox_gguf::train::recipe::method::MethodName;
use detox_gguf::train::recipe::products::Products;
use detox_gguf::train::recipe::settings::Settings;
use detox_gguf::train::run::trainer::{Side, Trainer};

use super::{gpu, load, own_pairs, settings, tiny};

/// Tolerance of an answer's log-probability, a sum of up to forty numbers around -7.
///
/// bf16 changes each logit by a few thousandths of the largest.
const LOGPS: f64 = 0.005;

/// Tolerance of a gradient, relative to its length.
///
/// bf16 keeps eight bits, so that each product on the gradient's path, about ten per block, is off by up to 1/256 of
/// its operands. Their errors point in different directions.
const GRADIENTS: f64 = 0.04;

const ALL: [&str; 8] = ["llama", "llama-q8_0", "command-r", "gpt2", "bloom", "gemma3", "qwen2", "qwen3"];

/// Overwrites the initial B and directions, which are zero, and would make most gradients zero.
fn disturb<D: Device>(trainer: &mut Trainer<D>) {
    for id in 0..trainer.parameters.list().len() {
        let name = trainer.parameters.list()[id].name.clone();
        if name.ends_with(".lora_b") || name.starts_with("direction.") {
            let n: usize = trainer.parameters.list()[id].shape.iter().product();
            let values: Vec<f32> =
                (0..n).map(|i| ((i * 7919 + id * 31) % 101) as f32 / 1000.0 - 0.05).collect();
            trainer.write_value(id, &values).unwrap();
        }
    }
}

struct Step {
    logps: Vec<AnswerLogps>,
    loss: f64,
    gradients: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

fn step<D: Device>(mut trainer: Trainer<D>, pairs: &[&TokenPair]) -> Step {
    disturb(&mut trainer);
    let references = trainer.logps(Side::Reference, pairs).unwrap();
    // Away from zero margin, where the loss's slope does not depend on the log-probabilities.
    let references: Vec<AnswerLogps> = references
        .iter()
        .map(|r| AnswerLogps { chosen: r.chosen - 3.0, rejected: r.rejected + 2.0 })
        .collect();
    let losses = trainer.add_gradient(pairs, &references).unwrap();
    let download = |trainer: &Trainer<D>, buffers: &[D::Buffer]| -> Vec<Vec<f32>> {
        buffers.iter().map(|buffer| trainer.device().download(buffer).unwrap()).collect()
    };
    let gradients = download(&trainer, &trainer.parameters.gradients);
    trainer.step(1e-3, 1.0).unwrap();
    Step {
        logps: losses.iter().map(|(logps, _)| *logps).collect(),
        loss: losses.iter().map(|(_, loss)| loss.loss).sum::<f64>() / losses.len() as f64,
        gradients,
        values: download(&trainer, &trainer.parameters.values),
    }
}

fn on_cpu(name: &str, settings: &Settings) -> Trainer<Cpu> {
    let base = GgufFile::open(tiny(name)).unwrap();
    let device = Cpu::new(2, Products::Exact).unwrap();
    Trainer::load(device, &base, &settings.method(), settings.seed, settings.step_options()).unwrap()
}

fn assert_same_step(name: &str, settings: &Settings, frozen: Frozen) {
    let pairs = own_pairs(name, 3);
    let pairs: Vec<&TokenPair> = pairs.iter().collect();
    let what = format!("{name}, {:?}, {}", settings.method, frozen.name());
    let trainer = on_cpu(name, settings);
    let names: Vec<String> = trainer.parameters.list().iter().map(|p| p.name.clone()).collect();
    let (cpu, gpu) = (step(trainer, &pairs), step(load(name, settings, frozen), &pairs));
    for (a, b) in cpu.logps.iter().zip(&gpu.logps) {
        let near = |a: f64, b: f64| (a - b).abs() <= LOGPS * a.abs();
        assert!(near(a.chosen, b.chosen) && near(a.rejected, b.rejected), "{what}: {a:?} and {b:?}");
    }
    assert!((cpu.loss - gpu.loss).abs() <= 0.02 * cpu.loss.max(0.1), "{what}: {} and {}", cpu.loss, gpu.loss);
    let all: f64 = cpu.gradients.iter().flatten().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    for ((of, a), b) in names.iter().zip(&cpu.gradients).zip(&gpu.gradients) {
        let length = a.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let distance = a.iter().zip(b).map(|(&a, &b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        // A gradient that is tiny compared with the others consists of their rounding errors.
        let bound = GRADIENTS * length.max(0.01 * all);
        assert!(distance <= bound, "{what}: the gradient of {of} is {length} long and {distance} off");
    }
    for (of, values) in names.iter().zip(&gpu.values) {
        assert!(values.iter().all(|x| x.is_finite()), "{what}: {of} after the step");
    }
}

#[test]
fn adapter_steps_agree_with_the_cpu() {
    let Some(_turn) = gpu() else { return };
    for name in ALL {
        assert_same_step(name, &settings(), Frozen::Bf16);
    }
    assert_same_step("llama-q8_0", &settings(), Frozen::Quantised);
    // Tied embeddings, which are both read as a table and multiplied by.
    assert_same_step("gemma3", &settings(), Frozen::Quantised);
}

#[test]
fn steps_of_full_vector_and_embedding_training_agree_with_the_cpu() {
    let Some(_turn) = gpu() else { return };
    for name in ["llama", "gpt2", "qwen3"] {
        assert_same_step(name, &Settings { method: MethodName::Full, ..settings() }, Frozen::Bf16);
    }
    assert_same_step("bloom", &Settings { method: MethodName::Vector, ..settings() }, Frozen::Bf16);
    let targets = ["q", "embed", "output"].map(str::to_owned).to_vec();
    assert_same_step("llama", &Settings { targets, ..settings() }, Frozen::Bf16);
}

#[test]
fn a_repeated_step_gives_the_same_bits_even_with_threads_in_reverse() {
    let Some(_turn) = gpu() else { return };
    let pairs = own_pairs("gemma3", 3);
    let pairs: Vec<&TokenPair> = pairs.iter().collect();
    let once = || step(load("gemma3", &settings(), Frozen::Bf16), &pairs);
    let (first, again) = (once(), once());
    let bits = |step: &Step| -> Vec<u32> { step.values.iter().flatten().map(|x| x.to_bits()).collect() };
    assert!(bits(&first) == bits(&again), "the same step again");
    #[cfg(feature = "cuda-emulation")]
    {
        emulation::set_reverse(true);
        let reversed = once();
        emulation::set_reverse(false);
        assert!(bits(&first) == bits(&reversed), "threads in reverse");
    }
    // Blocks give the same bf16 numbers whenever they are rounded, and each of these matrices is one part. With several
    // parts, gradients of inputs would be summed part by part, with other rounding.
    let blocks = step(load("gemma3", &settings(), Frozen::Quantised), &pairs);
    assert!(bits(&first) == bits(&blocks), "from blocks");
}
