//! The schedule generates every sample exactly once, from a stream that depends only on seed, prompt and number.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;

use detox_gguf::Error;
use detox_gguf::engine::logprob;
use detox_gguf::engine::schedule::{self, Continuation, Finish, GenerateOptions, Request, Written};
use detox_gguf::engine::{Model, Sampling, Session};

use super::{open, options, session, uninterrupted};

const OPTIONS: GenerateOptions =
    GenerateOptions { k: 5, n_predict: 12, sampling: Sampling::PAPER, seed: 7, ignore_eos: false };

fn requests(model: &Model) -> Vec<Request> {
    ["The weather today", "Ein kleiner Hund", "x", "Once upon a time there was a house by the sea"]
        .iter()
        .map(|text| Request { id: format!("en/{text}"), tokens: model.tokenize_prompt(text).unwrap() })
        .collect()
}

fn generate(session: &mut Session, requests: &[Request], options: &GenerateOptions) -> Vec<Continuation> {
    let mut found = Vec::new();
    schedule::generate(session, requests, options, &uninterrupted(), |c| {
        found.push(c);
        Ok(())
    })
    .unwrap();
    found.sort_by_key(|c| (c.request, c.sample));
    found
}

#[test]
fn every_sample_of_every_prompt_is_generated_once_with_any_number_of_slots() {
    let model = open("llama");
    let requests = requests(&model);
    for n_parallel in [1, 2, 3, 7, 20, 33] {
        let found = generate(&mut session(&model, n_parallel), &requests, &OPTIONS);
        let all: BTreeSet<(usize, u32)> = found.iter().map(|c| (c.request, c.sample)).collect();
        assert_eq!((found.len(), all.len()), (20, 20), "{n_parallel} slots");
        for c in &found {
            match c.finish {
                Finish::Length => assert_eq!(c.tokens.len(), 12),
                Finish::Stop => assert!(c.tokens.len() < 12),
            }
            assert!(c.tokens.iter().all(|&t| !model.is_end_of_generation(t)));
        }
    }
}

#[test]
fn the_same_call_gives_the_same_tokens_and_bits() {
    let model = open("gemma3");
    let requests = requests(&model);
    let mut one = session(&model, 7);
    let first = generate(&mut one, &requests, &OPTIONS);
    assert_eq!(first, generate(&mut one, &requests, &OPTIONS), "a session keeps nothing of an earlier call");
    assert_eq!(first, generate(&mut session(&model, 7), &requests, &OPTIONS));
}

#[test]
fn a_samples_stream_depends_only_on_seed_prompt_and_number() {
    // With one slot the batch always has the same shape.
    let model = open("llama");
    let requests = requests(&model);
    let all = generate(&mut session(&model, 1), &requests, &OPTIONS);
    let mut reversed: Vec<Request> = requests.clone();
    reversed.reverse();
    let other_order = generate(&mut session(&model, 1), &reversed, &OPTIONS);
    let more = generate(&mut session(&model, 1), &requests[1..2], &GenerateOptions { k: 9, ..OPTIONS });
    for sample in 0..5 {
        let of_second = &all[5 + sample];
        assert_eq!(of_second.tokens, other_order[2 * 5 + sample].tokens);
        assert_eq!(of_second.tokens, more[sample].tokens);
    }
    let other_seed = generate(&mut session(&model, 1), &requests, &GenerateOptions { seed: 8, ..OPTIONS });
    assert!(all.iter().zip(&other_seed).any(|(a, b)| a.tokens != b.tokens));
}

#[test]
fn samples_of_one_prompt_differ() {
    let model = open("llama");
    let found = generate(&mut session(&model, 5), &requests(&model)[..1], &OPTIONS);
    let distinct: BTreeSet<_> = found.iter().map(|c| c.tokens.clone()).collect();
    assert!(distinct.len() > 1);
}

#[test]
fn the_log_probability_of_a_sample_equals_that_of_its_tokens_given_the_prompt() {
    for name in ["llama", "gpt2"] {
        let model = open(name);
        let requests = requests(&model);
        let options = GenerateOptions { ignore_eos: true, ..OPTIONS };
        let found = generate(&mut session(&model, 6), &requests, &options);
        let asked: Vec<logprob::Request> = requests
            .iter()
            .enumerate()
            .map(|(i, r)| logprob::Request {
                id: r.id.clone(),
                prompt: r.tokens.clone(),
                continuations: found.iter().filter(|c| c.request == i).map(|c| c.tokens.clone()).collect(),
            })
            .collect();
        let scored = logprob::score(&mut session(&model, 4), &asked, &uninterrupted()).unwrap();
        assert_eq!((found.len(), scored.iter().flatten().count()), (20, 20));
        for (c, logps) in found.iter().zip(scored.iter().flatten()) {
            let sum: f64 = logps.iter().sum();
            // Twelve tokens, each within 0.005 of the other computation, because of the F16 cache.
            assert!((c.logprob - sum).abs() < 0.06, "{name}: {} {sum}", c.logprob);
        }
    }
}

#[test]
fn written_continuations_have_the_same_bits_when_they_are_decoded_again() {
    for name in ["llama", "gpt2", "gemma3", "qwen3"] {
        let model = open(name);
        let requests = requests(&model);
        let hot = Sampling { temperature: 1.5, top_p: 1.0, ..Sampling::PAPER };
        let options = GenerateOptions { k: 20, n_predict: 32, sampling: hot, ..OPTIONS };
        // Fewer slots than continuations: slots are reused, and moved together at the end.
        let found = generate(&mut session(&model, 7), &requests, &options);
        assert!(found.iter().any(|c| c.finish == Finish::Stop), "{name}: some continuations stop early");
        let written: Vec<Vec<Written<'_>>> = (0..requests.len())
            .map(|i| {
                let of_request = found.iter().filter(|c| c.request == i);
                of_request.map(|c| Written { tokens: &c.tokens, finish: c.finish }).collect()
            })
            .collect();
        let mut again = Vec::new();
        schedule::replay(&mut session(&model, 7), &requests, &written, &uninterrupted(), |c| {
            again.push(c);
            Ok(())
        })
        .unwrap();
        again.sort_by_key(|c| (c.request, c.sample));
        assert_eq!(again, found, "{name}");
    }
}

#[test]
fn prompts_longer_than_a_batch_are_decoded_in_parts() {
    let model = open("llama");
    let prompt = &requests(&model)[3].tokens;
    assert!(prompt.len() > 5);
    let whole = session(&model, 2).logits(prompt).unwrap();
    let small = detox_gguf::engine::SessionOptions { n_batch: 4, n_ubatch: 2, ..options(2) };
    let parts = Session::open(&model, &small, 64).unwrap().logits(prompt).unwrap();
    assert_eq!((whole.len(), parts.len()), (prompt.len(), prompt.len()));
    for (a, b) in whole.iter().flatten().zip(parts.iter().flatten()) {
        // With the F16 cache both are within 0.013 of the reference (see `golden`).
        assert!((a - b).abs() < 0.03, "{a} {b}");
    }
}

#[test]
fn an_interrupt_stops_generation_and_the_session_remains_usable() {
    let model = open("llama");
    let requests = requests(&model);
    let mut session = session(&model, 3);
    let expected = generate(&mut session, &requests, &OPTIONS);
    let interrupt = AtomicBool::new(false);
    let stopped = schedule::generate(&mut session, &requests, &OPTIONS, &interrupt, |_| {
        interrupt.store(true, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    });
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert_eq!(generate(&mut session, &requests, &OPTIONS), expected);
}
