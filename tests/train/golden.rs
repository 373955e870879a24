//! Hidden states, log-probs, losses and gradients match PyTorch in float64.

use std::collections::BTreeMap;
use std::path::PathBuf;

use detox_gguf::engine::Token;
use detox_gguf::gguf::{GgufFile, TensorInfo};
use detox_gguf::train::data::pack::Packed;
use detox_gguf::train::data::tokens::TokenPair;
use detox_gguf::train::device::Device;
use detox_gguf::train::device::cpu::Cpu;
use detox_gguf::train::model::forward::Batch;
use detox_gguf::train::model::transformer::read_numbers;
use detox_gguf::train::recipe::dpo::{AnswerLogps, LossKind, PairLogps, Preference, preference_loss};
use detox_gguf::train::recipe::lora::LoraOptions;
use detox_gguf::train::recipe::method::Method;
use detox_gguf::train::recipe::optimizer::OptimizerKind;
use detox_gguf::train::recipe::products::Products;
use detox_gguf::train::recipe::schedule::{Schedule, ScheduleKind};
use detox_gguf::train::recipe::step::StepOptions;
use detox_gguf::train::run::trainer::{Side, Trainer};
use serde::Deserialize;

const F32: [&str; 7] = ["llama", "command-r", "gpt2", "bloom", "gemma3", "qwen2", "qwen3"];

/// Tolerance of log-probs, which are sums of up to forty terms around 6. PyTorch's f32 is within 3e-5 of its f64.
const LOGPS: f64 = 1e-4;
/// Tolerance of gradients, relative to the largest value. PyTorch's f32 is within 3e-6 of its f64.
const GRADIENTS: f64 = 2e-5;

#[derive(Deserialize)]
struct Golden {
    rank: usize,
    alpha: f32,
    beta: f64,
    pairs: Vec<GoldenPair>,
    lora: Section,
    lora_embeddings: Option<Section>,
    full: Option<Section>,
    vector: Option<Section>,
    trl: Option<Trl>,
}

#[derive(Deserialize)]
struct GoldenPair {
    prompt: Vec<Token>,
    chosen: Vec<Token>,
    rejected: Vec<Token>,
}

#[derive(Deserialize)]
struct Section {
    policy_chosen_logps: Vec<f64>,
    policy_rejected_logps: Vec<f64>,
    reference_chosen_logps: Vec<f64>,
    reference_rejected_logps: Vec<f64>,
    losses: BTreeMap<String, Vec<f64>>,
    loss: BTreeMap<String, f64>,
    slopes: BTreeMap<String, Vec<f64>>,
}

#[derive(Deserialize)]
struct Trl {
    steps: Vec<TrlStep>,
    learning_rate: f64,
    warmup_steps: u64,
    max_grad_norm: f64,
}

#[derive(Deserialize)]
struct TrlStep {
    pairs: Vec<GoldenPair>,
    policy_chosen_logps: Vec<f64>,
    loss: f64,
    #[serde(rename = "rewards/margins")]
    margins: f64,
    grad_norm: f64,
    learning_rate: f64,
}

fn root(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn golden(name: &str) -> (Golden, GgufFile) {
    let path = root(&format!("tests/golden/train_{name}"));
    let text = std::fs::read_to_string(path.with_extension("json")).unwrap();
    (serde_json::from_str(&text).unwrap(), GgufFile::open(path.with_extension("gguf")).unwrap())
}

fn numbers(tensors: &GgufFile, name: &str) -> Vec<f32> {
    let tensor: &TensorInfo = tensors.tensor(name).unwrap_or_else(|| panic!("no tensor {name}"));
    read_numbers(tensors, tensor).unwrap()
}

fn token_pairs(pairs: &[GoldenPair]) -> Vec<TokenPair> {
    let pair = |p: &GoldenPair| TokenPair {
        index: 0,
        prompt: p.prompt.clone(),
        chosen: p.chosen.clone(),
        rejected: p.rejected.clone(),
    };
    pairs.iter().map(pair).collect()
}

fn options(preference: Preference) -> StepOptions {
    StepOptions {
        preference,
        optimizer: OptimizerKind::Rmsprop,
        weight_decay: 0.0,
        max_rows: 4096,
        checkpointing: false,
    }
}

fn sigmoid(beta: f64) -> Preference {
    Preference { kind: LossKind::Sigmoid, beta, label_smoothing: 0.0 }
}

fn lora(golden: &Golden, with_embeddings: bool) -> Method {
    let all: Vec<String> = LoraOptions::known_targets().map(str::to_owned).collect();
    let n = if with_embeddings { all.len() } else { all.len() - 2 };
    Method::Lora(LoraOptions { rank: golden.rank, alpha: golden.alpha, targets: all[..n].to_vec() })
}

fn trainer(name: &str, method: &Method, options: StepOptions) -> Trainer<Cpu> {
    let file = GgufFile::open(root(&format!("gguf/tiny/{name}.gguf"))).unwrap();
    Trainer::load(Cpu::new(2, Products::Exact).unwrap(), &file, method, 1, options).unwrap()
}

/// Overwrites every parameter with the golden tensor named `prefix` plus the parameter's name.
fn set(trainer: &mut Trainer<Cpu>, tensors: &GgufFile, prefix: &str) {
    for i in 0..trainer.parameters.list().len() {
        let name = format!("{prefix}{}", trainer.parameters.list()[i].name);
        trainer.write_value(i, &numbers(tensors, &name)).unwrap();
    }
}

fn assert_near(found: f64, expected: f64, tolerance: f64, what: &str) {
    assert!((found - expected).abs() <= tolerance, "{what}: expected {expected}, found {found}");
}

/// Asserts that every value is within `tolerance` times the largest expected value.
fn assert_close(found: &[f32], expected: &[f32], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f64, |most, &x| most.max(f64::from(x.abs())));
    let worst = found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    assert!(worst <= tolerance * largest, "{what}: {worst} apart; the largest value is {largest}");
}

fn assert_logps(found: &[AnswerLogps], chosen: &[f64], rejected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), chosen.len());
    for (i, logps) in found.iter().enumerate() {
        assert_near(logps.chosen, chosen[i], tolerance, &format!("{what}, chosen {i}"));
        assert_near(logps.rejected, rejected[i], tolerance, &format!("{what}, rejected {i}"));
    }
}

/// Checks log-probs, loss, and each parameter's gradient.
fn check_section(
    trainer: &mut Trainer<Cpu>,
    section: &Section,
    pairs: &[TokenPair],
    (tensors, prefix): (&GgufFile, &str),
    what: &str,
) {
    let pairs: Vec<&TokenPair> = pairs.iter().collect();
    let policy = trainer.logps(Side::Policy, &pairs).unwrap();
    assert_logps(&policy, &section.policy_chosen_logps, &section.policy_rejected_logps, LOGPS, what);
    let references: Vec<AnswerLogps> = section
        .reference_chosen_logps
        .iter()
        .zip(&section.reference_rejected_logps)
        .map(|(&chosen, &rejected)| AnswerLogps { chosen, rejected })
        .collect();
    let losses = trainer.add_gradient(&pairs, &references).unwrap();
    let loss = losses.iter().map(|(_, loss)| loss.loss).sum::<f64>() / losses.len() as f64;
    assert_near(loss, section.loss["sigmoid"], 1e-5, what);
    let parameters = &trainer.parameters;
    assert!(!parameters.list().is_empty());
    for (parameter, gradient) in parameters.list().iter().zip(&parameters.gradients) {
        let expected = numbers(tensors, &format!("{prefix}{}", parameter.name));
        let gradient = trainer.device().download(gradient).unwrap();
        assert_close(&gradient, &expected, GRADIENTS, &format!("{what}, gradient of {}", parameter.name));
    }
}

#[test]
fn hidden_states_and_logits_match_pytorch() {
    for name in F32 {
        let (golden, tensors) = golden(name);
        let trainer = trainer(name, &lora(&golden, false), options(sigmoid(golden.beta)));
        let pair = &golden.pairs[0];
        let (n_embd, n_vocab) = (trainer.transformer.config.n_embd, trainer.transformer.config.n_vocab);
        let mut packed = Packed::default();
        packed.push(&pair.prompt, &pair.chosen, &pair.rejected);
        let batch = Batch::new(trainer.device(), packed).unwrap();
        let pass = trainer.pass(Side::Reference);
        let streams = trainer.transformer.residual_stream(&pass, &batch).unwrap();
        let logits = trainer.transformer.logits(&pass, &batch).unwrap();
        // Rows: the prompt, then each answer without its last token.
        let (n_prompt, n_chosen) = (pair.prompt.len(), pair.chosen.len() - 1);
        for (side, first, n) in
            [("chosen", n_prompt, n_chosen), ("rejected", n_prompt + n_chosen, pair.rejected.len() - 1)]
        {
            for (il, stream) in streams.iter().enumerate() {
                let expected = numbers(&tensors, &format!("hidden/{side}/{il}"));
                let what = format!("{name}, {side}, block {il}");
                let (prompt, answer) = (0..n_prompt * n_embd, first * n_embd..(first + n) * n_embd);
                assert_close(&stream[prompt.clone()], &expected[prompt], 1e-5, &what);
                let there = n_prompt * n_embd..(n_prompt + n) * n_embd;
                assert_close(&stream[answer], &expected[there], 1e-5, &what);
            }
            let range = if side == "chosen" { 0..n_chosen + 1 } else { n_chosen + 1..logits.len() };
            let expected = numbers(&tensors, &format!("logits/{side}"));
            assert_eq!(expected.len(), range.len() * n_vocab);
            for (row, expected) in logits[range].iter().zip(expected.chunks(n_vocab)) {
                assert_close(row, expected, 1e-5, &format!("{name}, logits of {side}"));
            }
        }
    }
}

#[test]
fn lora_gradients_match_autograd() {
    for name in F32.into_iter().chain(["llama-q8_0"]) {
        let (golden, tensors) = golden(name);
        let mut trainer = trainer(name, &lora(&golden, false), options(sigmoid(golden.beta)));
        set(&mut trainer, &tensors, "");
        let pairs = token_pairs(&golden.pairs);
        let all: Vec<&TokenPair> = pairs.iter().collect();
        let reference = trainer.logps(Side::Reference, &all).unwrap();
        let section = &golden.lora;
        let (chosen, rejected) = (&section.reference_chosen_logps, &section.reference_rejected_logps);
        assert_logps(&reference, chosen, rejected, LOGPS, &format!("{name}, reference"));
        check_section(&mut trainer, section, &pairs, (&tensors, "grad/"), name);
    }
}

#[test]
fn lora_gradients_of_embeddings_and_output_match_autograd() {
    let (golden, tensors) = golden("llama");
    let mut trainer = trainer("llama", &lora(&golden, true), options(sigmoid(golden.beta)));
    set(&mut trainer, &tensors, "");
    let section = golden.lora_embeddings.as_ref().unwrap();
    check_section(&mut trainer, section, &token_pairs(&golden.pairs), (&tensors, "grad_embd/"), "llama");
}

#[test]
fn full_gradients_match_autograd() {
    for name in F32 {
        let (golden, tensors) = golden(name);
        let mut trainer = trainer(name, &Method::Full, options(sigmoid(golden.beta)));
        let n_full = tensors.tensors().iter().filter(|t| t.name().starts_with("full/")).count();
        assert_eq!(trainer.parameters.list().len(), n_full, "{name}: a weight is not trained");
        let section = golden.full.as_ref().unwrap();
        check_section(&mut trainer, section, &token_pairs(&golden.pairs), (&tensors, "full/"), name);
    }
}

#[test]
fn direction_gradients_match_autograd() {
    for name in F32 {
        let (golden, tensors) = golden(name);
        let mut trainer = trainer(name, &Method::Vector, options(sigmoid(golden.beta)));
        let section = golden.vector.as_ref().unwrap();
        let pairs = token_pairs(&golden.pairs);
        let pairs: Vec<&TokenPair> = pairs.iter().collect();
        let logps = section.reference_chosen_logps.iter().zip(&section.reference_rejected_logps);
        let references: Vec<AnswerLogps> =
            logps.map(|(&chosen, &rejected)| AnswerLogps { chosen, rejected }).collect();
        trainer.add_gradient(&pairs, &references).unwrap();
        let n_layer = trainer.transformer.config.n_layer;
        assert_eq!(trainer.parameters.list().len(), n_layer - 1, "llama.cpp has none for block 0");
        for (i, gradient) in trainer.parameters.gradients.iter().enumerate() {
            assert_eq!(trainer.parameters.list()[i].name, format!("direction.{}", i + 1));
            let expected = numbers(&tensors, &format!("dir/{}", i + 1));
            assert_close(gradient, &expected, GRADIENTS, &format!("{name}, direction {}", i + 1));
        }
    }
}

#[test]
fn small_passes_and_gradient_checkpointing_give_the_same_gradients() {
    let (golden, tensors) = golden("gemma3");
    let pairs = token_pairs(&golden.pairs);
    for (max_rows, checkpointing) in [(1, false), (80, false), (4096, true), (1, true)] {
        let options = StepOptions { max_rows, checkpointing, ..options(sigmoid(golden.beta)) };
        let mut trainer = trainer("gemma3", &lora(&golden, false), options);
        set(&mut trainer, &tensors, "");
        check_section(&mut trainer, &golden.lora, &pairs, (&tensors, "grad/"), &format!("{max_rows} rows"));
    }
}

#[test]
fn losses_match_trl() {
    let (golden, _) = golden("llama");
    let section = &golden.lora;
    let kinds = [
        ("sigmoid", LossKind::Sigmoid, 0.0),
        ("sigmoid_smoothed", LossKind::Sigmoid, 0.1),
        ("hinge", LossKind::Hinge, 0.0),
        ("ipo_mean", LossKind::Ipo, 0.0),
    ];
    for (name, kind, label_smoothing) in kinds {
        let preference = Preference { kind, beta: golden.beta, label_smoothing };
        for (i, pair) in golden.pairs.iter().enumerate() {
            let loss = preference_loss(
                preference,
                PairLogps {
                    policy_chosen: section.policy_chosen_logps[i],
                    policy_rejected: section.policy_rejected_logps[i],
                    reference_chosen: section.reference_chosen_logps[i],
                    reference_rejected: section.reference_rejected_logps[i],
                    n_chosen: pair.chosen.len(),
                    n_rejected: pair.rejected.len(),
                },
            );
            assert_near(loss.loss, section.losses[name][i], 1e-8 * section.losses[name][i].max(1.0), name);
            // Slopes: derivatives of the mean over the pairs with respect to the chosen log-prob.
            let slope = loss.dchosen / golden.pairs.len() as f64;
            assert_near(slope, section.slopes[name][i], 1e-9, &format!("{name}, slope {i}"));
        }
    }
}

#[test]
fn ten_steps_match_trl() {
    let mut n_compared = 0;
    for name in F32 {
        let (golden, tensors) = golden(name);
        let Some(trl) = &golden.trl else { continue };
        n_compared += 1;
        let mut trainer = trainer(name, &lora(&golden, false), options(sigmoid(golden.beta)));
        for i in 0..trainer.parameters.list().len() {
            let of = trainer.parameters.list()[i].name.clone();
            if of.ends_with(".lora_a") {
                trainer.write_value(i, &numbers(&tensors, &format!("trl_init/{of}"))).unwrap();
            }
        }
        let schedule = Schedule {
            kind: ScheduleKind::Constant,
            learning_rate: trl.learning_rate,
            warmup_steps: trl.warmup_steps,
            n_steps: trl.steps.len() as u64,
        };
        for (i, step) in trl.steps.iter().enumerate() {
            let what = format!("{name}, step {i}");
            let pairs = token_pairs(&step.pairs);
            let pairs: Vec<&TokenPair> = pairs.iter().collect();
            let references = trainer.logps(Side::Reference, &pairs).unwrap();
            let losses = trainer.add_gradient(&pairs, &references).unwrap();
            let n = losses.len() as f64;
            let loss = losses.iter().map(|(_, loss)| loss.loss).sum::<f64>() / n;
            let margin = losses.iter().map(|(_, loss)| loss.margin()).sum::<f64>() / n;
            if i == 0 {
                // LoRA B is 0, so the policy equals the reference bit for bit.
                assert_eq!(loss, std::f64::consts::LN_2, "{what}");
                assert_eq!(margin, 0.0, "{what}");
            }
            assert_near(loss, step.loss, 2e-4, &what);
            assert_near(margin, step.margins, 2e-3, &what);
            assert_near(losses[0].0.chosen, step.policy_chosen_logps[0], 1e-2, &what);
            let rate = schedule.at(i as u64);
            assert_near(rate, step.learning_rate, 1e-12, &what);
            let norm = trainer.step(rate, trl.max_grad_norm).unwrap();
            assert_near(norm, step.grad_norm, 2e-3 * step.grad_norm.max(1.0), &what);
        }
        for (parameter, value) in trainer.parameters.list().iter().zip(&trainer.parameters.values) {
            let expected = numbers(&tensors, &format!("trl_final/{}", parameter.name));
            let what = format!("{name}, {} after ten steps", parameter.name);
            assert_eq!(value.len(), expected.len());
            // RMSprop divides by the root of a mean square. If a gradient is almost 0, rounding alone decides the step,
            // so this bounds the mean distance and not the largest.
            let distance = value.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>();
            assert!(distance / expected.len() as f64 <= 1e-5, "{what}: {}", distance / expected.len() as f64);
        }
    }
    assert!(n_compared >= 3);
}
