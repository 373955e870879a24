//! `examples/llama-server.sh` makes the right files, and a real llama-server with another build of llama.cpp steers
//! with them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use detox_gguf::engine::{CacheType, FlashAttention, Model, ModelOptions, SessionOptions, Token};
use detox_gguf::steer::compile::Route;
use serde_json::{Value, json};

use super::build::run;
use super::support::real_model;
use super::{TOKENS, engine_logits_of, exact, interventions, root, tiny};

/// Path of a llama-server. With `CI=true`, `scripts/test.sh` prepares one.
const SERVER: &str = "DETOX_GGUF_TEST_LLAMA_SERVER";

/// The server. `None` if there is none, which is allowed only outside CI and is logged.
fn llama_server() -> Option<PathBuf> {
    let found = std::env::var_os(SERVER).map(PathBuf::from);
    if found.is_none() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{SERVER} is not set");
        eprintln!("skipped: {SERVER} names no llama-server; scripts/llama_server.sh makes one");
    }
    found
}

/// A token that is an ASCII character in all models of these tests.
const ASCII: Token = 33;

/// The recipe, with any program in place of llama-server.
fn recipe(server: &Path, way: &str, model: &Path, neurons: &Path, offset: &str, folder: &Path) -> Command {
    let mut command = Command::new(root().join("examples/llama-server.sh"));
    command.arg(way).arg(model).arg(neurons).arg(offset).arg(folder);
    command.env("LLAMA_SERVER", server).env("DETOX_GGUF", env!("CARGO_BIN_EXE_detox-gguf"));
    command
}

/// A running server, stopped when dropped.
struct Serving {
    child: Child,
    address: String,
    log: PathBuf,
}

impl Serving {
    /// Waits until the model is loaded.
    fn start(mut command: Command, folder: &Path) -> Serving {
        // The server binds the port itself. If another program takes the port in between, the server exits.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let log = folder.join("server.log");
        let file = File::create(&log).unwrap();
        command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let child = command.spawn().unwrap();
        let mut serving = Serving { child, address: format!("127.0.0.1:{port}"), log };
        let start = Instant::now();
        while !serving.request("GET", "/health", "").is_ok_and(|(status, _)| status == 200) {
            let ended = serving.child.try_wait().unwrap();
            let is_late = start.elapsed() > Duration::from_secs(120);
            assert!(ended.is_none() && !is_late, "{command:?}: {ended:?}\n{}", serving.read_log());
            std::thread::sleep(Duration::from_millis(50));
        }
        serving.assert_runs();
        serving
    }

    /// Asserts that this server is running, so that an answer is not that of another server on the same port.
    fn assert_runs(&mut self) {
        let ended = self.child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}\n{}", self.read_log());
    }

    fn read_log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap()).into_owned()
    }

    /// The status and body of the answer.
    fn request(&self, method: &str, path: &str, body: &str) -> io::Result<(u16, String)> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(&[head.as_bytes(), body.as_bytes()].concat())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::InvalidData)?;
        assert!(!head.to_lowercase().contains("transfer-encoding"), "the body is in one piece: {head}");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok((status.ok_or(io::ErrorKind::InvalidData)?, body.to_owned()))
    }

    /// The log-probs of the next token after `tokens`, `[n_vocab]`.
    fn logps(&mut self, tokens: &[Token], n_vocab: usize) -> Vec<f64> {
        // The server holds back a token that ends within a character, and its log-probs. The bias makes it choose an
        // ASCII token; the log-probs are the model's own, without the bias.
        let request = json!({
            "prompt": tokens, "n_predict": 1, "n_probs": n_vocab, "temperature": 0, "cache_prompt": false,
            "logit_bias": [[ASCII, 1e6]],
        });
        let (status, body) = self.request("POST", "/completion", &request.to_string()).unwrap();
        assert_eq!(status, 200, "{body}\n{}", self.read_log());
        self.assert_runs();
        let answer: Value = serde_json::from_str(&body).unwrap();
        let found = &answer["completion_probabilities"][0]["top_logprobs"];
        let mut logps = vec![f64::NAN; n_vocab];
        for found in found.as_array().unwrap_or_else(|| panic!("{body}")) {
            logps[found["id"].as_u64().unwrap() as usize] = found["logprob"].as_f64().unwrap();
        }
        assert!(logps.iter().all(|logp| !logp.is_nan()), "every token has a log-prob: {body}");
        logps
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // The recipe replaces itself with the server (`exec`), so this is the server's process.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn logps_of(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit - largest) - sum.ln()).collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// The KL divergence Σ p ln(p/q), from log-probs.
fn divergence(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn the_recipe_for_llama_server_makes_one_file_for_each_offset_and_keeps_it() {
    let folder = tempfile::tempdir().unwrap();
    let (neurons, files) = (folder.path().join("neurons.json"), folder.path().join("files"));
    std::fs::write(&neurons, "[[0, 9], [1, 3], [1, 40]]").unwrap();
    let model = tiny("llama");
    // `echo`, in place of the server, prints its arguments.
    let line = |way: &str, offset: &str| {
        let mut command = recipe(Path::new("echo"), way, &model, &neurons, offset, &files);
        run(command.args(["--port", "1"])).trim_end().to_owned()
    };
    let vector = line("vector", "-3.5");
    let start = format!("-m {} --control-vector-scaled {}/steer-", model.display(), files.display());
    assert!(vector.starts_with(&start) && vector.ends_with(".gguf:1.0 --port 1"), "{vector}");
    let baked = line("baked", "-3.5");
    let start = format!("-m {}/steered-", files.display());
    assert!(baked.starts_with(&start) && baked.ends_with(".gguf --port 1"), "{baked}");
    // A file made for one offset is not used for another.
    assert_ne!(line("vector", "2"), vector);
    assert_eq!(names(&files).len(), 3);
    // The file is reused: `false`, in place of detox-gguf, could not make it again.
    let mut again = recipe(Path::new("echo"), "vector", &model, &neurons, "-3.5", &files);
    assert_eq!(run(again.args(["--port", "1"]).env("DETOX_GGUF", "false")).trim_end(), vector);
    let mut anew = recipe(Path::new("echo"), "vector", &model, &neurons, "-1", &files);
    assert!(!anew.env("DETOX_GGUF", "false").output().unwrap().status.success());
}

/// Both ways, with the neurons that each one edits.
const WAYS: [(&str, &str); 2] = [("vector", "[[1, 3], [1, 40]]"), ("baked", "[[0, 9], [1, 3], [1, 40]]")];

#[test]
fn llama_server_steers_like_the_engine_both_ways() {
    let Some(server) = llama_server() else { return };
    let folder = tempfile::tempdir().unwrap();
    let neurons = folder.path().join("neurons.json");
    std::fs::write(&neurons, "[[0, 9], [1, 3], [1, 40]]").unwrap();
    for name in ["llama", "gpt2", "bloom"] {
        let model = tiny(name);
        let plain = logps_of(&engine_logits_of(&model, &TOKENS, None, Route::Cheapest, &exact()));
        for (way, edited) in WAYS {
            let edit = format!("\"what\": {{\"neurons\": {edited}}}, \"edit\": {{\"offset\": -3.5}}");
            let file = interventions(folder.path(), &[&edit]);
            let steer = Some((file.as_path(), 1.0));
            let expected = logps_of(&engine_logits_of(&model, &TOKENS, steer, Route::Cheapest, &exact()));
            let mut command = recipe(&server, way, &model, &neurons, "-3.5", &folder.path().join(name));
            // As `exact`.
            command.args(["-c", "256", "-np", "1", "-t", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]);
            let found = Serving::start(command, folder.path()).logps(&TOKENS, plain.len());
            assert!(largest_difference(&plain, &expected) > 0.1, "{name} {way}: it has an effect");
            let difference = largest_difference(&found, &expected);
            assert!(difference < 1e-3, "{name} {way}: {difference}");
        }
    }
}

#[test]
fn llama_server_steers_a_quantised_model_like_the_engine_up_to_quantisation_noise() {
    let (Some(server), Some(model)) = (llama_server(), real_model()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let neurons = folder.path().join("neurons.json");
    std::fs::write(&neurons, "[[11, 200], [12, 5]]").unwrap();
    let file = interventions(
        folder.path(),
        &[r#""what": {"neurons": [[11, 200], [12, 5]]}, "edit": {"offset": -16}"#],
    );
    let text = "The people who live next door are";
    let tokens = Model::open(&model, &ModelOptions::default()).unwrap().tokenize_prompt(text).unwrap();
    let options = SessionOptions {
        flash_attention: FlashAttention::Auto,
        cache_type_k: CacheType::F16,
        cache_type_v: CacheType::F16,
        ..exact()
    };
    let of_engine = |steer| logps_of(&engine_logits_of(&model, &tokens, steer, Route::Cheapest, &options));
    let (plain, steered) = (of_engine(None), of_engine(Some((file.as_path(), 1.0))));
    let effect = divergence(&steered, &plain);
    for way in ["vector", "baked"] {
        let mut command = recipe(&server, way, &model, &neurons, "-16", folder.path());
        command.args(["-c", "256", "-np", "1", "-t", "1"]);
        let found = Serving::start(command, folder.path()).logps(&tokens, plain.len());
        let (to_steered, to_plain) = (divergence(&steered, &found), divergence(&plain, &found));
        assert!(effect > 0.5, "{way}: it has an effect: {effect}");
        assert!(to_steered < 0.1 * effect, "{way}: {to_steered} of {effect}");
        assert!(to_plain > 0.5 * effect, "{way}: {to_plain} of {effect}");
    }
}
