//! What an outsider needs to check a run: tokens, log-probs, the pairs of each step, the initial adapter, and how much of
//! an adapter each merged tensor kept.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use detox_gguf::gguf::{GgufFile, GgufWriter, TensorSpec, Value as MetadataValue, dequantize};
use detox_gguf::train::output::Adapter;
use serde_json::Value;

use super::{detox, failure, rows, tiny};

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/tiny_{name}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Standard output of a command that succeeds.
fn output(arguments: &[&str]) -> String {
    let run = detox().args(arguments).assert().success();
    String::from_utf8(run.get_output().stdout.clone()).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A `.npy` file's values of 4 bytes, after checking its header.
fn npy<const N: usize>(file: &Path, descr: &str, shape: [usize; N]) -> Vec<[u8; 4]> {
    let bytes = std::fs::read(file).unwrap();
    let n_header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = std::str::from_utf8(&bytes[10..n_header]).unwrap();
    let axes = shape.map(|n| n.to_string()).join(", ");
    let axes = if N == 1 { format!("{axes},") } else { axes };
    let expected = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({axes}), }}");
    assert!(bytes.starts_with(b"\x93NUMPY\x01\x00") && header.starts_with(&expected), "{header}");
    assert_eq!(bytes.len() - n_header, 4 * shape.iter().product::<usize>());
    bytes[n_header..].chunks_exact(4).map(|value| value.try_into().unwrap()).collect()
}

const EXACT: [&str; 8] = ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", "1"];

/// All log-probs of `arguments` (a text or ids, and flags) by `logits -o`, shape `[n_tokens][n_vocab]`, and the ids.
fn logprobs(model: &Path, arguments: &[&str], n_tokens: usize) -> (Vec<Vec<f32>>, Vec<i64>) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.npy");
    output(&[&["logits", "-m", path(model), "-o", path(&file)], &EXACT[..], arguments].concat());
    let n_vocab = GgufFile::open(model).unwrap().n_vocab().unwrap() as usize;
    let values: Vec<f32> =
        npy(&file, "<f4", [n_tokens, n_vocab]).into_iter().map(f32::from_le_bytes).collect();
    let ids = npy(&folder.path().join("x.ids.npy"), "<i4", [n_tokens]);
    let ids = ids.into_iter().map(|id| i64::from(i32::from_le_bytes(id))).collect();
    (values.chunks_exact(n_vocab).map(<[f32]>::to_vec).collect(), ids)
}

fn log_softmax(logits: &Value) -> Vec<f64> {
    let logits: Vec<f64> = logits.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    let sum: f64 = logits.iter().map(|x| x.exp()).sum();
    logits.iter().map(|x| x - sum.ln()).collect()
}

#[track_caller]
fn assert_near(found: &[Vec<f32>], logits: &Value, bound: f64, what: &str) {
    let expected: Vec<Vec<f64>> = logits.as_array().unwrap().iter().map(log_softmax).collect();
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(&expected).flat_map(|(a, b)| a.iter().zip(b));
    let worst = differences.map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max);
    assert!(worst < bound, "{what}: {worst}");
}

#[test]
fn tokenize_and_logits_give_the_tokens_and_log_probs_of_pytorch() {
    for (name, bound) in [("llama", 1e-3), ("qwen2", 1e-3), ("gpt2", 0.03)] {
        let model = tiny(&format!("{name}.gguf"));
        for prompt in golden(name)["prompts"].as_array().unwrap() {
            let text = prompt["text"].as_str().unwrap();
            let ids: Value = serde_json::from_str(&output(&["tokenize", "-m", path(&model), text])).unwrap();
            assert_eq!(ids, prompt["tokens"], "{name}: {text}");
            let n = ids.as_array().unwrap().len();
            let (found, found_ids) = logprobs(&model, &[text], n);
            assert_eq!(serde_json::json!(found_ids), ids);
            assert_near(&found, &prompt["logits"], bound, text);
        }
    }
}

#[test]
fn logits_of_ids_with_an_adapter_are_those_of_pytorch() {
    let (golden, model) = (golden("llama_lora"), tiny("llama.gguf"));
    let ids: Vec<String> =
        golden["prompt"]["tokens"].as_array().unwrap().iter().map(Value::to_string).collect();
    for case in golden["cases"].as_array().unwrap().iter().take(2) {
        let lora = format!("{}:{}", tiny("llama-lora.gguf").display(), case["scale"]);
        let arguments = ["--ids", &ids.join(","), "--lora-scaled", &lora];
        let (found, _) = logprobs(&model, &arguments, ids.len());
        assert_near(&found, &case["logits"], 2e-3, &lora);
    }
}

#[test]
fn printed_log_probs_are_the_most_probable_ones_and_those_of_the_text() {
    let model = tiny("llama.gguf");
    let (all, ids) = logprobs(&model, &["The cat sleeps"], 9);
    let arguments = ["logits", "-m", path(&model), "The cat sleeps", "--top", "3", "--json"];
    let printed: Value = serde_json::from_str(&output(&[&arguments[..], &EXACT[..]].concat())).unwrap();
    let positions = printed["positions"].as_array().unwrap();
    assert_eq!(positions.len(), 9);
    for (at, position) in positions.iter().enumerate() {
        assert_eq!(position["id"], ids[at]);
        let next = ids.get(at + 1).map(|&id| all[at][id as usize]);
        assert_eq!(position["next_logprob"].as_f64().map(|x| x as f32), next);
        let mut sorted = all[at].clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let top = position["top"].as_array().unwrap();
        let found: Vec<f32> = top.iter().map(|t| t["logprob"].as_f64().unwrap() as f32).collect();
        assert_eq!(found, sorted[..3]);
        assert!(top.iter().all(|t| {
            all[at][t["id"].as_u64().unwrap() as usize] == t["logprob"].as_f64().unwrap() as f32
        }));
    }
    let table = output(&[&["logits", "-m", path(&model), "The cat sleeps"], &EXACT[..]].concat());
    assert_eq!(table.lines().count(), 10);
    assert!(table.contains("\"The\""), "{table}");
}

#[test]
fn bos_and_special_tokens_are_added_and_parsed_only_as_asked() {
    let model = tiny("llama.gguf");
    let ids = |arguments: &[&str]| -> Vec<i64> {
        let arguments = [&["tokenize", "-m", path(&model)], arguments].concat();
        serde_json::from_str(&output(&arguments)).unwrap()
    };
    let (text, folder) = ("<s>hi</s>", tempfile::tempdir().unwrap());
    let plain = ids(&[text]);
    assert_eq!(plain[0], 1);
    assert_eq!(ids(&["--no-bos", text]), plain[1..]);
    let parsed = ids(&["--no-bos", "--parse-special", text]);
    assert!(parsed.first() == Some(&1) && parsed.last() == Some(&2) && parsed.len() < plain.len());
    let file = folder.path().join("text.txt");
    std::fs::write(&file, text).unwrap();
    assert_eq!(ids(&["--file", path(&file)]), plain);
    let mut piped = detox();
    piped.args(["tokenize", "-m", path(&model), "--pieces", "-f", "-"]).write_stdin(text);
    let pieces = String::from_utf8(piped.assert().success().get_output().stdout.clone()).unwrap();
    assert!(pieces.starts_with("       1  \"<s>\"\n") && pieces.lines().count() == plain.len(), "{pieces}");
    let json: Value =
        serde_json::from_str(&output(&["tokenize", "-m", path(&model), text, "--json"])).unwrap();
    assert_eq!(json["ids"], serde_json::json!(plain));
    assert_eq!(json["pieces"].as_array().unwrap().len(), plain.len());
}

#[test]
fn logits_refuses_ids_and_texts_that_it_cannot_run() {
    let model = tiny("llama.gguf");
    let refused =
        |arguments: &[&str]| failure(detox().args(["logits", "-t", "1", "-m", path(&model)]).args(arguments));
    let (code, message) = refused(&["--ids", "1,999"]);
    assert!(code == 2 && message.contains("expected ids from 0 to 383, found 999"), "{message}");
    let (code, message) = refused(&["--no-bos", ""]);
    assert!(code == 2 && message.contains("at least one token"), "{message}");
    let (code, message) = refused(&["text", "-o", path(&model)]);
    assert!(code == 2 && message.contains("expected a file name ending in .npy"), "{message}");
}

/// A copy of a tiny model whose tokenizer is said to be `pre`.
fn with_pre_tokenizer(name: &str, pre: &str, folder: &Path) -> PathBuf {
    let model = GgufFile::open(tiny(name)).unwrap();
    let mut metadata = model.metadata().clone();
    metadata.set("tokenizer.ggml.pre", MetadataValue::Str(pre.into()));
    let specs = model.tensors().iter().map(|t| TensorSpec {
        name: t.name().to_owned(),
        shape: t.shape().to_vec(),
        tensor_type: t.tensor_type(),
    });
    let path = folder.join(name);
    let mut writer = GgufWriter::create(&path, &metadata, specs.collect()).unwrap();
    for tensor in model.tensors() {
        writer.write(&model.read_tensor(tensor).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    path
}

/// "e" with a combining accent, and the same in one character.
const DECOMPOSED: &str = "Un cafe\u{301}";
const COMPOSED: &str = "Un caf\u{e9}";

#[test]
fn text_that_is_not_nfc_gives_a_warning_or_is_normalised() {
    let folder = tempfile::tempdir().unwrap();
    let qwen = with_pre_tokenizer("qwen2.gguf", "qwen2", folder.path());
    let run = |model: &Path, arguments: &[&str]| {
        let run = detox().args(["tokenize", "-m", path(model)]).args(arguments).assert().success();
        let output = run.get_output();
        (output.stdout.clone(), String::from_utf8(output.stderr.clone()).unwrap())
    };
    let (composed, warning) = run(&qwen, &[COMPOSED]);
    assert_eq!(warning, "");
    let (decomposed, warning) = run(&qwen, &[DECOMPOSED]);
    assert!(warning.contains("1 of 1 texts are not in Unicode's NFC form"), "{warning}");
    assert!(warning.contains("--nfc"), "{warning}");
    assert_ne!(decomposed, composed);
    assert_eq!(run(&qwen, &["--nfc", DECOMPOSED]), (composed, String::new()));
    // Hugging Face does not normalise for this tokenizer.
    assert_eq!(run(&tiny("qwen2.gguf"), &[DECOMPOSED]).1, "");
}

#[test]
fn every_command_that_reads_texts_warns_once_and_normalises_with_nfc() {
    let folder = tempfile::tempdir().unwrap();
    let qwen = with_pre_tokenizer("qwen2.gguf", "qwen2", folder.path());
    let at = |name: &str| folder.path().join(name);
    let write = |name: &str, text: String| std::fs::write(at(name), text).unwrap();
    let prompt = |text: &str| format!("{}\n", serde_json::json!({"prompt": text, "language": "en"}));
    write("prompts.jsonl", prompt(DECOMPOSED) + &prompt("A house"));
    let pair = |text: &str, chosen: &str| {
        format!("{}\n", serde_json::json!({"prompt": text, "chosen": chosen, "rejected": " is bad"}))
    };
    write("pairs.jsonl", pair(DECOMPOSED, " is fine") + &pair("A house", " is here"));
    write("neurons.json", "[[1, 5]]".into());
    let prompts = ["--prompts", "prompts.jsonl"];
    let model_b = ["--model-b", "qwen2.gguf"];
    let commands: [(&str, Vec<&str>, &str); 4] = [
        ("eval", [&["-k", "2", "-n", "2"], &prompts[..]].concat(), "1 of 2 texts"),
        ("generate", [&["-k", "1", "-n", "2"], &prompts[..]].concat(), "1 of 2 texts"),
        (
            "activations",
            [&["-n", "2", "--neurons", "neurons.json"], &model_b[..], &prompts[..]].concat(),
            "1 of 2 texts",
        ),
        (
            "train",
            ["--pairs", "pairs.jsonl", "--max-steps", "1", "--rank", "2", "--held-out", "0"].to_vec(),
            "1 of 6 texts",
        ),
    ];
    for (name, arguments, count) in commands {
        for nfc in [false, true] {
            let out = format!("{name}-{nfc}");
            let mut command = detox();
            command.current_dir(folder.path()).arg(name).args(&arguments).args(["-t", "1", "-o", &out]);
            command.arg("-m").arg(&qwen).args(nfc.then_some("--nfc"));
            let run = command.output().unwrap();
            let log = String::from_utf8(run.stderr).unwrap();
            let n_warnings = log.matches("NFC form").count();
            assert_eq!((n_warnings, log.contains(count)), (usize::from(!nfc), !nfc), "{name}: {log}");
            let record = std::fs::read_to_string(at(&out).join("run.json")).unwrap_or_default();
            assert_eq!(record.contains("\"nfc\": true"), nfc && ["eval", "train"].contains(&name), "{name}");
        }
    }
    // The setting decides the tokens, so a run does not resume with another one.
    let mut command = detox();
    command.current_dir(folder.path()).args(["eval", "-o", "eval-true", "-t", "1", "-k", "2", "-n", "2"]);
    command.args(prompts).arg("-m").arg(&qwen).assert().failure();
}

/// Texts whose prompts end where a token ends.
fn pairs(n: usize) -> String {
    let pair = |i: usize| {
        let (chosen, rejected) = (format!(" is good {i}"), format!(" is bad {i}"));
        let prompt = format!("The house {i} here");
        format!("{}\n", serde_json::json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    };
    (0..n).map(pair).collect()
}

#[test]
fn the_first_step_can_be_recomputed_from_its_pairs_and_the_initial_adapter_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (model, run) = (tiny("llama.gguf"), folder.path().join("run"));
    let file = folder.path().join("pairs.jsonl");
    std::fs::write(&file, pairs(11)).unwrap();
    let mut command = detox();
    command.args([
        "train",
        "--rank",
        "2",
        "--batch-size",
        "3",
        "--epochs",
        "2",
        "--held-out",
        "0.2",
        "--no-eos",
    ]);
    command.args(["--warmup-steps", "1", "--learning-rate", "1e-2", "--save-initial", "-t", "1"]);
    command.args(["--products", "exact", "-m"]).arg(&model).arg("--pairs").arg(&file).arg("-o").arg(&run);
    command.assert().success();

    // Every epoch uses each training pair once, and no held-out one.
    let report: Value = serde_json::from_slice(&std::fs::read(run.join("report.json")).unwrap()).unwrap();
    let indices = |value: &Value| -> Vec<u64> {
        value.as_array().unwrap().iter().map(|index| index.as_u64().unwrap()).collect()
    };
    let held_out: BTreeSet<u64> = indices(&report["outcome"]["held_out_indices"]).into_iter().collect();
    assert_eq!(held_out.len(), 3);
    let steps: Vec<Value> =
        rows(&run.join("metrics.jsonl")).into_iter().filter(|row| row.get("loss").is_some()).collect();
    let used: Vec<u64> = steps.iter().flat_map(|step| indices(&step["pair_indices"])).collect();
    assert!(steps.iter().all(|step| indices(&step["pair_indices"]).len() as u64 == step["pairs"]));
    let expected: Vec<u64> = (0..11).filter(|index| !held_out.contains(index)).collect();
    assert_eq!(used.len(), 2 * expected.len());
    for epoch in used.chunks(expected.len()) {
        assert_eq!(epoch.iter().copied().collect::<BTreeSet<_>>(), expected.iter().copied().collect());
    }

    // The log-probs of the first step are those that `logits` prints.
    let pairs = rows(&file);
    let logp = |prompt: &str, answer: &str| -> f64 {
        let tokens = |text: &str| -> Vec<i64> {
            serde_json::from_str(&output(&["tokenize", "-m", path(&model), text])).unwrap()
        };
        let text = format!("{prompt}{answer}");
        let (n_prompt, n) = (tokens(prompt).len(), tokens(&text).len());
        let (all, ids) = logprobs(&model, &[&text], n);
        (n_prompt..n).map(|at| f64::from(all[at - 1][ids[at] as usize])).sum()
    };
    for (side, name) in [("chosen", "logps/chosen"), ("rejected", "logps/rejected")] {
        let of_step = indices(&steps[0]["pair_indices"]);
        let logps = of_step.iter().map(|&i| {
            let pair = &pairs[i as usize];
            logp(pair["prompt"].as_str().unwrap(), pair[side].as_str().unwrap())
        });
        let mean = logps.sum::<f64>() / of_step.len() as f64;
        assert!((mean - steps[0][name].as_f64().unwrap()).abs() < 1e-3, "{mean} {}", steps[0][name]);
    }

    // B is zero at the start.
    let initial = run.join("initial.gguf");
    let base = GgufFile::open(&model).unwrap();
    let adapter = Adapter::read(&initial, &base).unwrap();
    assert!(adapter.is_zero() && adapter.factors.iter().all(|f| f.a.iter().any(|&a| a != 0.0)));
    let plain = logprobs(&model, &["The cat sleeps"], 9);
    assert_eq!(logprobs(&model, &["The cat sleeps", "--lora", path(&initial)], 9), plain);
    let trained = run.join("adapter.gguf");
    assert_ne!(logprobs(&model, &["The cat sleeps", "--lora", path(&trained)], 9), plain);
}

#[test]
fn only_an_adapter_has_an_initial_state_to_save() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = detox();
    command.args(["train", "--method", "vector", "--save-initial", "-t", "1", "-m"]).arg(tiny("llama.gguf"));
    let (code, message) = failure(command.arg("-o").arg(folder.path().join("run")));
    assert!(code == 2 && message.contains("only --method lora has an initial adapter"), "{message}");
    assert!(!folder.path().join("run").exists());
}

#[test]
fn the_record_of_an_export_has_the_survival_of_each_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let (model, lora) = (tiny("llama-q8_0.gguf"), tiny("llama-lora.gguf"));
    let merged = folder.path().join("merged.gguf");
    let arguments = ["export", "-t", "1", "-m", path(&model), "--lora-scaled"];
    let scaled = format!("{}:0.25", lora.display());
    let rest = ["--force", "--per-tensor", "-o", path(&merged)];
    let table = output(&[&arguments[..], &[&scaled], &rest[..]].concat());
    let record = folder.path().join("merged.export.json");
    let record: Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    let sha256 = |file: &Path| detox_gguf::gguf::file_sha256(file, |_, _| {}).unwrap();
    assert_eq!(record["model_sha256"], sha256(&model));
    let expected = serde_json::json!([{ "file": "llama-lora.gguf", "sha256": sha256(&lora), "scale": 0.25 }]);
    assert_eq!(record["loras"], expected);

    let (base, merged) = (GgufFile::open(&model).unwrap(), GgufFile::open(&merged).unwrap());
    let adapter = Adapter::read(&lora, &base).unwrap();
    let values = |file: &GgufFile, name: &str| -> Vec<f32> {
        let tensor = file.tensor(name).unwrap();
        let mut values = vec![0.0; tensor.shape().iter().product::<u64>() as usize];
        dequantize(tensor.tensor_type(), &file.read_tensor(tensor).unwrap(), &mut values).unwrap();
        values
    };
    let tensors = record["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), adapter.factors.len());
    for tensor in tensors {
        let name = tensor["name"].as_str().unwrap();
        assert!(table.contains(name.strip_suffix(".weight").unwrap()), "{name}: {table}");
        let factors = adapter.factors.iter().find(|factors| factors.name == name).unwrap();
        if factors.is_lookup() {
            continue;
        }
        let (before, after) = (values(&base, name), values(&merged, name));
        let scale = f64::from(0.25 * adapter.alpha) / factors.rank as f64;
        let (mut along, mut squares, mut off) = (0.0, 0.0, 0.0);
        for o in 0..factors.n_out {
            for i in 0..factors.n_in {
                let product: f64 = (0..factors.rank)
                    .map(|r| {
                        f64::from(factors.b[o * factors.rank + r])
                            * f64::from(factors.a[r * factors.n_in + i])
                    })
                    .sum();
                let at = o * factors.n_in + i;
                let (wanted, made) = (scale * product, f64::from(after[at]) - f64::from(before[at]));
                along += wanted * made;
                squares += wanted * wanted;
                off += (made - wanted).powi(2);
            }
        }
        let near = |key: &str, expected: f64| {
            let found = tensor[key].as_f64().unwrap();
            assert!(
                (found - expected).abs() < 1e-4 * (1.0 + expected.abs()),
                "{name} {key}: {found} {expected}"
            );
        };
        near("norm", squares.sqrt());
        near("survived", along / squares);
        near("relative_error", (off / squares).sqrt());
    }
    assert_eq!(record["total"]["n_tensors"], tensors.len());
    assert!(record["compared"]["missed"]["mean_kl"].as_f64().unwrap() >= 0.0);
}

#[test]
fn an_export_does_not_replace_a_file_that_is_not_its_record() {
    let folder = tempfile::tempdir().unwrap();
    let (merged, foreign) = (folder.path().join("merged.gguf"), folder.path().join("merged.export.json"));
    std::fs::write(&foreign, "{\"mine\": 1}").unwrap();
    let mut command = detox();
    command
        .args(["export", "-t", "1", "-m"])
        .arg(tiny("llama.gguf"))
        .arg("--lora")
        .arg(tiny("llama-lora.gguf"));
    let (code, message) = failure(command.arg("-o").arg(&merged));
    assert!(code == 2 && message.contains("merged.export.json would be overwritten"), "{message}");
    assert!(!merged.exists() && std::fs::read(&foreign).unwrap() == b"{\"mine\": 1}");
}
