//! Files that depend on a model. Another CPU may round numbers and sample text differently, so only the form is frozen.

use std::path::Path;

use detox_gguf::gguf::GgufFile;

use super::exact::eval_given;
use super::form::{Form, Rules, form_of_csv, form_of_json, form_of_lines};
use super::golden::assert_golden;
use super::{copy_inputs, read, run_in};

const TEXT_OR_NULL: Form = Form::Either(&[Form::Text, Form::Null]);
const BOOL_OR_NULL: Form = Form::Either(&[Form::Bool, Form::Null]);
const FLOAT_OR_NULL: Form = Form::Either(&[Form::Float, Form::Null]);
const FINISH: Form = Form::Word(&["length", "stop"]);
const ESTIMATE: Form =
    Form::Object(&[("value", Form::Float), ("low", FLOAT_OR_NULL), ("high", FLOAT_OR_NULL)]);
const WARNINGS: Form = Form::List(&Form::Object(&[("what", Form::Text), ("advice", Form::Text)]));

/// `run.json` of `eval`.
const RUN: Rules<'_> = &[
    ("llama_cpp", Form::Text),
    ("system", Form::Text),
    ("tool_version", Form::Text),
    ("paths/model", Form::Text),
    ("paths/base", Form::Text),
];

const GENERATIONS: Rules<'_> = &[
    ("generated_text", Form::Text),
    ("n_tokens", Form::Integer),
    ("logprob", Form::Float),
    ("finish", FINISH),
    ("token_ids", Form::List(&Form::Integer)),
    ("token_logprobs", Form::List(&Form::Float)),
];

const SCORES: Rules<'_> = &[
    ("toxicity/lexical", Form::Float),
    ("detected_language", TEXT_OR_NULL),
    ("language_kept", BOOL_OR_NULL),
    ("base_logprob", Form::Float),
    ("base_n_tokens", Form::Integer),
    ("tokens", Form::List(&Form::Text)),
];

/// `report.json` of `eval`, and the metrics of a sweep.
const REPORT: Rules<'_> = &[
    ("tool_version", Form::Text),
    // In these runs only `language_kept` has no estimate.
    ("estimate", Form::UnlessNull(&ESTIMATE)),
    ("metrics/n", Form::Integer),
    ("metrics/missing", Form::Integer),
    ("mean/n", Form::Integer),
    ("mean/missing", Form::Integer),
    ("perplexity_tokens", Form::Word(&["sampled", "retokenised", "without_ids"])),
    ("warnings", WARNINGS),
];

/// One prompt's line of `per_prompt.jsonl`.
const PER_PROMPT: Rules<'_> = &[
    ("toxicity/lexical", Form::List(&FLOAT_OR_NULL)),
    ("maximum_toxicity/lexical", FLOAT_OR_NULL),
    ("perplexity", Form::List(&FLOAT_OR_NULL)),
    ("perplexity_median", FLOAT_OR_NULL),
    ("distinct_1", FLOAT_OR_NULL),
    ("distinct_2", FLOAT_OR_NULL),
    ("distinct_3", FLOAT_OR_NULL),
    ("repetition", Form::List(&FLOAT_OR_NULL)),
    ("language_kept", Form::List(&BOOL_OR_NULL)),
    ("blank", Form::List(&Form::Bool)),
];

/// The form of a `report.json` of `eval`.
pub fn form_of_report(text: &str) -> String {
    form_of_json(text, REPORT)
}

/// Continuations this short never have enough letters to identify a language.
const SAMPLING: &str = "--lang en,de --limit 2 -k 2 -n 3 -np 2 -t 1 -s 5";

/// Appends the form of one file to the golden of a command.
fn add(form: &mut String, name: &str, of_file: &str) {
    form.push_str(&format!("== {name}\n{of_file}"));
}

/// The forms of the three files that `eval` writes.
fn form_of_run(folder: &Path) -> String {
    let file = |name: &str| read(&folder.join(name));
    let mut form = String::new();
    add(&mut form, "run.json", &form_of_json(&file("run.json"), RUN));
    add(&mut form, "generations.jsonl", &form_of_lines(&file("generations.jsonl"), GENERATIONS));
    add(&mut form, "scores.jsonl", &form_of_lines(&file("scores.jsonl"), SCORES));
    form
}

/// The form of a GGUF file: keys and types of its metadata, and names, types and shapes of its tensors.
fn form_of_gguf(path: &Path) -> String {
    let file = GgufFile::open(path).unwrap();
    let metadata = file.metadata().iter().map(|(key, value)| format!("{key}: {:?}\n", value.value_type()));
    let tensors = file.tensors().iter();
    let tensors =
        tensors.map(|tensor| format!("{} {} {:?}\n", tensor.name(), tensor.tensor_type(), tensor.shape()));
    metadata.chain(tensors).collect()
}

/// A folder with the inputs, and an intervention in `steer.json`.
fn inputs_and_intervention() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_inputs(folder.path());
    run_in(folder.path(), "steer -m llama.gguf --neurons neurons.json --offset 0.5 -o steer.json");
    folder
}

#[test]
fn eval_writes_this_form() {
    let folder = inputs_and_intervention();
    let plain = "eval -m llama.gguf -o plain";
    let steered = "eval -m llama.gguf --steer steer.json:1.5 --min-coverage 0.5 -o steered";
    for (name, arguments) in [("plain", plain), ("steered", steered)] {
        run_in(folder.path(), &format!("{arguments} {SAMPLING}"));
        let run = folder.path().join(name);
        let mut form = form_of_run(&run);
        add(&mut form, "report.json", &form_of_report(&read(&run.join("report.json"))));
        let csv = form_of_csv(&read(&run.join("report.csv")), &["language", "scorer", "metric", "k"]);
        add(&mut form, "report.csv", &csv);
        let per_prompt = form_of_lines(&read(&run.join("per_prompt.jsonl")), PER_PROMPT);
        add(&mut form, "per_prompt.jsonl", &per_prompt);
        assert_golden(&format!("eval_{name}.txt"), &form);
    }
}

#[test]
fn a_comparison_of_two_runs_has_this_form() {
    let folder = tempfile::tempdir().unwrap();
    copy_inputs(folder.path());
    eval_given(folder.path(), "generations_a.jsonl", "a");
    eval_given(folder.path(), "generations_b.jsonl", "b");
    run_in(folder.path(), "eval --compare a b -o c");
    let file = |name: &str| read(&folder.path().join("c").join(name));
    // No model computed these numbers, so they are exact, except p-values: those use the system's math library.
    let rules = [("tool_version", Form::Text), ("p_value", FLOAT_OR_NULL), ("warnings", WARNINGS)];
    let mut form = String::new();
    add(&mut form, "comparison.json", &form_of_json(&file("comparison.json"), &rules));
    let exact = ["language", "scorer", "metric", "a", "b", "difference", "low", "high", "test", "n"];
    add(&mut form, "comparison.csv", &form_of_csv(&file("comparison.csv"), &exact));
    assert_golden("compare.txt", &form);
}

#[test]
fn generate_writes_this_form() {
    let folder = tempfile::tempdir().unwrap();
    run_in(folder.path(), &format!("generate -m llama.gguf -o g.jsonl {SAMPLING}"));
    assert_golden("generate.txt", &form_of_lines(&read(&folder.path().join("g.jsonl")), GENERATIONS));
}

#[test]
fn a_score_that_is_missing_has_this_form() {
    let folder = tempfile::tempdir().unwrap();
    let texts =
        [r#"{"text": "habari ya asubuhi", "language": "sw"}"#, r#"{"text": "hello", "language": "en"}"#];
    std::fs::write(folder.path().join("texts.jsonl"), texts.join("\n")).unwrap();
    let scored = run_in(folder.path(), "score texts.jsonl");
    assert_golden("score_missing.txt", &form_of_lines(&scored, &[("errors/lexical", Form::Text)]));
}

#[test]
fn sweep_writes_this_form() {
    let folder = inputs_and_intervention();
    let neurons = "sweep -m llama.gguf --neurons neurons.json --offsets -0.5 -o neurons";
    // Offsets above layer 0 become a control vector, so the control is random directions.
    std::fs::write(folder.path().join("upper.json"), "[[1, 5], [2, 7]]").unwrap();
    run_in(folder.path(), "steer -m llama.gguf --neurons upper.json --offset 0.5 -o upper.steer.json");
    let files = "sweep -m llama.gguf --steer upper.steer.json --coefficients 0.5 -o files";
    let difference = [
        ("differences/a", ESTIMATE),
        ("differences/b", ESTIMATE),
        ("differences/difference", ESTIMATE),
        ("p_value", FLOAT_OR_NULL),
        ("pareto", Form::List(&Form::Integer)),
        ("recommended", Form::Either(&[Form::Integer, Form::Null])),
        ("reason", Form::Text),
    ];
    let rules = [REPORT, &difference].concat();
    for (name, arguments) in [("neurons", neurons), ("files", files)] {
        run_in(folder.path(), &format!("{arguments} {SAMPLING}"));
        let sweep = folder.path().join(name);
        let mut form = String::new();
        add(&mut form, "sweep.json", &form_of_json(&read(&sweep.join("sweep.json")), &rules));
        let exact = ["value", "kind", "draw", "language", "scorer", "metric"];
        add(&mut form, "sweep.csv", &form_of_csv(&read(&sweep.join("sweep.csv")), &exact));
        let mut runs: Vec<String> = std::fs::read_dir(&sweep)
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.file_type().unwrap().is_dir())
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        runs.sort_unstable();
        for run in runs {
            add(
                &mut form,
                &format!("{run}/run.json"),
                &form_of_json(&read(&sweep.join(run).join("run.json")), RUN),
            );
        }
        assert_golden(&format!("sweep_{name}.txt"), &form);
    }
}

#[test]
fn pairs_writes_this_form() {
    let folder = inputs_and_intervention();
    // One pair of one prompt, from noise: at the median of its scores one side is chosen and the other rejected.
    let arguments = "pairs -m llama.gguf --lang en --limit 1 -k 16 -n 6 -np 2 -t 1 -s 5 --per-prompt 1 --chosen-below \
        0.0215 --rejected-above 0.0215 --min-margin 0.001 --min-logprob -20 --max-logprob-gap 20 \
        --max-repetition 1 --steer-rejected steer.json:3 -o pairs.jsonl";
    run_in(folder.path(), arguments);
    let rules = [
        ("chosen", Form::Text),
        ("rejected", Form::Text),
        ("sample", Form::Integer),
        ("toxicity/lexical", Form::Float),
        ("n_tokens", Form::Integer),
        ("finish", FINISH),
        ("logprob_per_token", Form::Float),
        ("repetition", Form::Float),
        ("language_kept", BOOL_OR_NULL),
    ];
    assert_golden("pairs.txt", &form_of_lines(&read(&folder.path().join("pairs.jsonl")), &rules));
}

#[test]
fn train_writes_this_form() {
    let folder = tempfile::tempdir().unwrap();
    let means = |prefix: &str| -> Vec<(String, Form)> {
        let names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"];
        let names = names.iter().chain(&["logps/chosen", "logps/rejected"]);
        names.map(|name| (format!("{prefix}{name}"), Form::Float)).collect()
    };
    let means = [means(""), means("eval_")].concat();
    let mut metrics: Vec<(&str, Form)> = means.iter().map(|(name, form)| (name.as_str(), *form)).collect();
    metrics.extend([("grad_norm", Form::Float), ("step_seconds", Form::Float)]);
    let references =
        |pair: Rules<'static>| [pair, &[("chosen", Form::Float), ("rejected", Form::Float)]].concat();
    let report = [
        ("outcome/best", Form::Tuple(&[Form::Integer, Form::Float])),
        ("seconds", Form::Float),
        ("mean_kl", Form::Float),
        ("largest_kl", Form::Float),
        ("largest_logit_difference", Form::Float),
        ("bound", Form::Float),
        ("pairs_per_second", Form::Float),
        ("peak_rss_bytes", Form::Integer),
    ];
    for method in ["lora", "vector", "full"] {
        let arguments = format!(
            "train -m llama.gguf --method {method} --rank 2 --max-steps 2 --eval-every 1 --warmup-steps 1 \
                --learning-rate 1e-3 --max-length 64 --max-prompt 32 --products exact -t 1 -s 5 -o {method}"
        );
        run_in(folder.path(), &arguments);
        let run = folder.path().join(method);
        // `full` scores all pairs before it starts: too many to list.
        let pair: Rules<'_> = if method == "full" { &[("pair", Form::Text)] } else { &[] };
        let mut form = String::new();
        add(
            &mut form,
            "run.json",
            &form_of_json(&read(&run.join("run.json")), &[("detox_gguf", Form::Text)]),
        );
        add(&mut form, "metrics.jsonl", &form_of_lines(&read(&run.join("metrics.jsonl")), &metrics));
        add(
            &mut form,
            "reference.jsonl",
            &form_of_lines(&read(&run.join("reference.jsonl")), &references(pair)),
        );
        add(&mut form, "report.json", &form_of_json(&read(&run.join("report.json")), &report));
        for name in ["adapter.gguf", "steer.gguf", "best.gguf", "checkpoint.gguf"] {
            if run.join(name).exists() {
                add(&mut form, name, &form_of_gguf(&run.join(name)));
            }
        }
        assert_golden(&format!("train_{method}.txt"), &form);
    }
}

#[test]
fn activations_writes_this_form() {
    let folder = inputs_and_intervention();
    let arguments = "activations -m llama.gguf --neurons neurons.json --steer steer.json -n 4 --lang en,de --limit 2 \
        -t 1 -o a";
    run_in(folder.path(), arguments);
    let file = |name: &str| read(&folder.path().join("a").join(name));
    let rules = [("languages/a", ESTIMATE), ("languages/b", ESTIMATE), ("languages/difference", ESTIMATE)];
    let mut form = String::new();
    add(&mut form, "activations.json", &form_of_json(&file("activations.json"), &rules));
    add(&mut form, "activations.csv", &form_of_csv(&file("activations.csv"), &["language", "n_prompts"]));
    assert_golden("activations.txt", &form);
}

#[test]
fn retrieval_writes_this_form() {
    let folder = tempfile::tempdir().unwrap();
    copy_inputs(folder.path());
    eval_given(folder.path(), "generations_a.jsonl", "before");
    eval_given(folder.path(), "generations_b.jsonl", "after");
    let arguments = "retrieval -m llama.gguf --aligned aligned -t 1 --before before --after after -o r";
    run_in(folder.path(), arguments);
    let file = |name: &str| read(&folder.path().join("r").join(name));
    let rules = [
        ("forward_accuracy", Form::Float),
        ("backward_accuracy", Form::Float),
        ("mean_accuracy", Form::Float),
        ("mean_cosine", Form::Float),
        ("correlation/r", Form::Float),
        ("correlation/p", Form::Float),
    ];
    let mut form = String::new();
    add(&mut form, "retrieval.json", &form_of_json(&file("retrieval.json"), &rules));
    add(&mut form, "retrieval.csv", &form_of_csv(&file("retrieval.csv"), &["language", "place"]));
    assert_golden("retrieval.txt", &form);
}

#[test]
fn steer_and_locate_write_this_form() {
    let folder = inputs_and_intervention();
    let probe = "probe -m llama.gguf -t 1 --epochs 1 --limit 40 --layer 1 -o probe.gguf";
    run_in(folder.path(), probe);
    let locate = "locate -m llama.gguf --probe probe.gguf --top 3 --lang en --limit 2 -n 4 -t 1 -o \
        neurons_found.json";
    run_in(folder.path(), locate);
    let rules = [
        ("version", Form::Text),
        ("n_kept", Form::Integer),
        ("layer", Form::Integer),
        ("index", Form::Integer),
        ("cosine", Form::Float),
        ("norm", Form::Float),
        ("mean_activation", Form::Float),
        ("tokens", Form::List(&Form::Text)),
    ];
    let mut form = String::new();
    add(&mut form, "steer.json", &form_of_json(&read(&folder.path().join("steer.json")), &[]));
    add(&mut form, "neurons.json", &form_of_json(&read(&folder.path().join("neurons_found.json")), &rules));
    add(&mut form, "probe.gguf", &form_of_gguf(&folder.path().join("probe.gguf")));
    assert_golden("steer_and_locate.txt", &form);
}
