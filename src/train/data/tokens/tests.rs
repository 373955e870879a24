//! Expected tokens are derived by hand from `gguf/tiny/tokenizer.json`. Byte `b` from `!` to `~` is token
//! `b - 0x21 + 4`; a space that merges with nothing is 224; `<s>` is 1, `</s>` is 2. The merges used, by rank: ` t`
//! 261, ` d` 263, `he` 266, `at` 267, ` c` 274, `or` 283, ` the` 286, `om` 311, ` dor` 352, `The` 371, `og` 383.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::*;
use crate::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec};

fn tiny(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("gguf/tiny/{name}.gguf"))
}

/// `llama` adds BOS, `gpt2` does not.
fn vocabulary(name: &str) -> Vocabulary {
    Vocabulary::open(&tiny(name)).unwrap()
}

fn pair(prompt: &str, chosen: &str, rejected: &str) -> PreferencePair {
    PreferencePair { prompt: prompt.into(), chosen: chosen.into(), rejected: rejected.into() }
}

fn tokens(prompt: &[Token], chosen: &[Token], rejected: &[Token]) -> TokenPair {
    TokenPair { index: 0, prompt: prompt.to_vec(), chosen: chosen.to_vec(), rejected: rejected.to_vec() }
}

/// The tokens of a pair that must not be skipped.
fn one(name: &str, text: PreferencePair, limits: &Limits) -> TokenPair {
    let found = tokenize(&vocabulary(name), &[text], limits).unwrap();
    assert_eq!(found.skipped, Skipped::default());
    found.pairs.into_iter().next().expect("the one pair, not skipped").1
}

/// The reason why a pair must be skipped.
fn skip(name: &str, text: PreferencePair, limits: &Limits) -> Skip {
    let found = tokenize(&vocabulary(name), &[text], limits).unwrap();
    assert_eq!((found.pairs.len(), found.skipped.total()), (0, 1));
    let reasons = found.skipped.reasons();
    assert_eq!((reasons.len(), reasons[0].1), (1, 1));
    reasons[0].0
}

const SHORT: Limits = Limits { max_prompt: 3, max_length: 6, append_eos: true };

#[test]
fn bos_is_added_if_the_model_asks_for_it_and_eos_to_each_answer() {
    let text = || pair("the", " cat", " dog");
    let limits = Limits::default();
    assert_eq!(one("llama", text(), &limits), tokens(&[1, 87, 266], &[274, 267, 2], &[263, 383, 2]));
    assert_eq!(one("gpt2", text(), &limits), tokens(&[87, 266], &[274, 267, 2], &[263, 383, 2]));
    let without = Limits { append_eos: false, ..limits };
    assert_eq!(one("llama", text(), &without), tokens(&[1, 87, 266], &[274, 267], &[263, 383]));
}

#[test]
fn a_prompt_ends_before_a_token_that_spans_the_boundary() {
    // "a t" is [a][ t]; with "he cat" it is [a][ the][ c][at], with "om dog" [a][ t][om][ d][og].
    let expected = tokens(&[1, 68], &[286, 274, 267, 2], &[261, 311, 263, 383, 2]);
    assert_eq!(one("llama", pair("a t", "he cat", "om dog"), &Limits::default()), expected);
    let swapped = tokens(&[1, 68], &[261, 311, 263, 383, 2], &[286, 274, 267, 2]);
    assert_eq!(one("llama", pair("a t", "om dog", "he cat"), &Limits::default()), swapped);
    // "a do" is [a][ d][o]; with "r" it is [a][ dor]: two tokens back.
    let expected = tokens(&[68], &[352, 2], &[263, 383, 2]);
    assert_eq!(one("gpt2", pair("a do", "r", "g"), &Limits::default()), expected);
}

#[test]
fn an_empty_prompt_is_only_bos() {
    let expected = tokens(&[1], &[371, 2], &[274, 267, 2]);
    assert_eq!(one("llama", pair("", "The", " cat"), &Limits::default()), expected);
}

#[test]
fn skips_an_empty_prompt_if_the_model_adds_no_bos() {
    assert_eq!(skip("gpt2", pair("", "The", " cat"), &Limits::default()), Skip::NoPrompt);
    // "T" and "he" merge into the one token "The", with nothing before it.
    assert_eq!(skip("gpt2", pair("T", "he", " cat"), &Limits::default()), Skip::NoPrompt);
    assert_eq!(one("llama", pair("T", "he", " cat"), &Limits::default()).prompt, [1]);
}

#[test]
fn skips_an_empty_answer() {
    for text in [pair("the", "", " dog"), pair("the", " cat", ""), pair("", "", "")] {
        assert_eq!(skip("llama", text.clone(), &Limits::default()), Skip::EmptyAnswer, "{text:?}");
    }
}

#[test]
fn skips_answers_that_are_equal_or_become_equal_by_truncation() {
    assert_eq!(skip("llama", pair("the", " cat", " cat"), &Limits::default()), Skip::EqualAnswers);
    // Truncated to 6 - 3 tokens each: VVV.
    assert_eq!(skip("llama", pair("QXZ", "VVVX", "VVVZ"), &SHORT), Skip::EqualAnswers);
    assert_eq!(one("llama", pair("QXZ", "VVXV", "VVZV"), &SHORT).chosen, [57, 57, 59]);
}

#[test]
fn skips_a_pair_whose_prompt_leaves_no_room_for_an_answer() {
    let limits = Limits { max_prompt: 6, max_length: 6, append_eos: true };
    assert_eq!(skip("llama", pair("QXZQXZ", "VV", "XX"), &limits), Skip::AllPrompt);
    // 3 + 3 tokens fit without truncation.
    assert_eq!(one("llama", pair("QX", "VV", "XX"), &limits).chosen, [57, 57, 2]);
}

#[test]
fn truncation_keeps_the_end_of_the_prompt_with_bos_and_the_start_of_the_answers() {
    // BOS, 6 prompt tokens and 5 of the longer answer are 12, more than 6: the prompt keeps 3, answers 6 - 3.
    let text = || pair("QXZQXZ", "VV", "VVVV");
    assert_eq!(one("llama", text(), &SHORT), tokens(&[1, 59, 61], &[57, 57, 2], &[57, 57, 57]));
    assert_eq!(one("gpt2", text(), &SHORT), tokens(&[52, 59, 61], &[57, 57, 2], &[57, 57, 57]));
}

#[test]
fn the_prompt_is_truncated_first_and_the_answers_only_if_that_is_not_enough() {
    let limits = |max_length| Limits { max_length, ..SHORT };
    let text = || pair("QXZQXZ", "V", "VV");
    // 7 + 3 tokens fit into 10. For 9 the prompt is truncated to 3, and then the answers fit.
    let whole = tokens(&[1, 52, 59, 61, 52, 59, 61], &[57, 2], &[57, 57, 2]);
    assert_eq!(one("llama", text(), &limits(10)), whole);
    assert_eq!(one("llama", text(), &limits(9)), tokens(&[1, 59, 61], &[57, 2], &[57, 57, 2]));
    // As in TRL: 2 + 6 is more than 6. The prompt is short enough, but answers are truncated to 6 - 3 anyway.
    let found = one("llama", pair("Q", "VVVVV", "X"), &SHORT);
    assert_eq!(found, tokens(&[1, 52], &[57, 57, 57], &[59, 2]));
}

#[test]
fn pairs_keep_their_index_and_skipped_and_truncated_ones_are_counted() {
    let texts = [
        pair("the", "", " dog"),
        pair("the", " cat", " dog"),
        pair("the", " cat", " cat"),
        pair("", "The", " cat"),
        pair("QXZQXZ", "VV", "VVVV"),
        pair("the", " dog", ""),
    ];
    let found = tokenize(&vocabulary("gpt2"), &texts, &SHORT).unwrap();
    assert_eq!(found.pairs.iter().map(|(i, _)| *i).collect::<Vec<_>>(), [1, 4]);
    let expected = Skipped { empty_answer: 2, equal_answers: 1, all_prompt: 0, no_prompt: 1 };
    assert_eq!((found.skipped, found.n_cut), (expected, 1));
    assert_eq!(found.skipped.total() + found.pairs.len(), texts.len());
    let text = found.skipped.to_string();
    assert_eq!(text, "2 x an empty answer, 1 x an empty prompt, and no BOS, 1 x chosen equal to rejected");
}

/// `gpt2.gguf` without its `tokenizer.ggml.eos_token_id`.
fn without_eos(path: &std::path::Path) {
    let file = GgufFile::open(tiny("gpt2")).unwrap();
    let mut metadata = Metadata::new();
    for (key, value) in file.metadata().iter().filter(|(key, _)| *key != "tokenizer.ggml.eos_token_id") {
        metadata.set(key, value.clone());
    }
    let spec = |t: &crate::gguf::TensorInfo| TensorSpec {
        name: t.name().into(),
        shape: t.shape().to_vec(),
        tensor_type: t.tensor_type(),
    };
    let mut writer = GgufWriter::create(path, &metadata, file.tensors().iter().map(spec).collect()).unwrap();
    for tensor in file.tensors() {
        writer.write(&file.read_tensor(tensor).unwrap()).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn rejects_appending_eos_if_the_model_has_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    without_eos(&path);
    let vocabulary = Vocabulary::open(&path).unwrap();
    // llama.cpp would fall back to 11, an apostrophe in this vocabulary.
    assert_eq!(vocabulary.eos(), None);
    let texts = [pair("the", " cat", " dog")];
    let error = tokenize(&vocabulary, &texts, &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("eos_token_id") && error.hint().is_some(), "{error}");
    let found = tokenize(&vocabulary, &texts, &Limits { append_eos: false, ..Limits::default() }).unwrap();
    assert_eq!(found.pairs[0].1.chosen, [274, 267]);
}

#[test]
fn rejects_limits_of_zero() {
    for (limits, flag) in [
        (Limits { max_prompt: 0, ..SHORT }, "--max-prompt: "),
        (Limits { max_length: 0, ..SHORT }, "--max-length: "),
    ] {
        let error = tokenize(&vocabulary("llama"), &[], &limits).unwrap_err();
        assert!(error.is_usage() && error.to_string().starts_with(flag), "{error}");
    }
}

#[test]
fn a_vocabulary_opened_alone_equals_that_of_the_model() {
    let model = crate::engine::Model::open(&tiny("llama"), &Default::default()).unwrap();
    let alone = vocabulary("llama");
    assert_eq!((model.vocabulary().bos(), alone.bos()), (Some(1), Some(1)));
    assert_eq!((model.vocabulary().eos(), alone.eos()), (Some(2), Some(2)));
    assert_eq!((vocabulary("gpt2").bos(), vocabulary("gpt2").eos()), (None, Some(2)));
    assert_eq!((model.n_vocab(), alone.n_vocab()), (384, 384));
    assert_eq!(alone.tokenize_prompt("the").unwrap(), model.tokenize_prompt("the").unwrap());
    assert_eq!(alone.tokenize_text("the").unwrap(), [87, 266]);
}

/// Pairs with the given prompts, one token each.
fn pairs_of_prompts(prompts: impl IntoIterator<Item = usize>) -> Vec<TokenPair> {
    let pair =
        |prompt| TokenPair { index: 0, prompt: vec![prompt as Token], chosen: vec![1], rejected: vec![2] };
    prompts.into_iter().map(pair).collect()
}

#[test]
fn a_split_keeps_the_pairs_of_a_prompt_together() {
    // Three pairs per prompt: a fifth of the 30 is two prompts; a quarter is 8 pairs, which starts a third prompt.
    let pairs = pairs_of_prompts((0..30).map(|i| i / 3));
    for (fraction, expected) in [(0.2, 6), (0.25, 9)] {
        for seed in 0..20 {
            let (train, held_out) = split(&pairs, fraction, seed);
            assert_eq!((train.len(), held_out.len()), (30 - expected, expected));
            let prompts =
                |of: &[usize]| -> BTreeSet<Token> { of.iter().map(|&i| pairs[i].prompt[0]).collect() };
            assert!(prompts(&train).is_disjoint(&prompts(&held_out)), "seed {seed}");
        }
    }
    // A prompt with most of the pairs is trained on. If even the smallest prompt exceeds the share, one is held out.
    for seed in 0..20 {
        let (train, held_out) = split(&pairs_of_prompts((0..100).map(|i| usize::from(i == 7))), 0.05, seed);
        assert_eq!((train.len(), held_out), (99, vec![7]), "seed {seed}");
        let (train, held_out) = split(&pairs_of_prompts((0..20).map(|i| i / 4)), 0.05, seed);
        assert_eq!((train.len(), held_out.len()), (16, 4), "seed {seed}");
    }
    // A single prompt is trained on.
    let (train, held_out) = split(&pairs_of_prompts([5; 8]), 0.5, 0);
    assert_eq!((train.len(), held_out.len()), (8, 0));
}

#[test]
fn a_split_holds_out_the_fraction_rounded_up_and_every_pair_is_in_one_set() {
    for (n, fraction, expected) in
        [(0, 0.05, 0), (1, 0.05, 0), (2, 0.05, 1), (20, 0.05, 1), (21, 0.05, 2), (10, 0.0, 0), (5, 1.0, 4)]
    {
        let (train, held_out) = split(&pairs_of_prompts(0..n), fraction, 3);
        assert_eq!(held_out.len(), expected, "{n} {fraction}");
        assert!(train.is_sorted() && held_out.is_sorted());
        let mut all = [train, held_out].concat();
        all.sort_unstable();
        assert_eq!(all, (0..n).collect::<Vec<_>>());
    }
}

#[test]
fn splits_and_orders_depend_on_the_seed_alone_and_never_change() {
    let pairs = pairs_of_prompts(0..1000);
    assert_eq!(split(&pairs, 0.05, 7), split(&pairs, 0.05, 7));
    assert_ne!(split(&pairs, 0.05, 7), split(&pairs, 0.05, 8));
    assert_eq!(epoch_order(1000, 7, 2), epoch_order(1000, 7, 2));
    for (seed, epoch) in [(8, 2), (7, 3)] {
        assert_ne!(epoch_order(1000, 7, 2), epoch_order(1000, seed, epoch));
    }
    let mut order = epoch_order(1000, 7, 2);
    order.sort_unstable();
    assert_eq!(order, (0..1000).collect::<Vec<_>>());
    // If the stream changed, every seed would mean something else and a resumed run would read other pairs.
    // Expected values: an independent ChaCha8 after RFC 8439 with 8 rounds, in another language.
    assert_eq!(epoch_order(8, 0, 0), [0, 3, 1, 6, 2, 5, 4, 7]);
    assert_eq!(split(&pairs[..8], 0.25, 0).1, [0, 2]);
}

#[test]
fn every_built_in_pair_is_tokenised() {
    let own = crate::train::data::preference_pair::own();
    let found =
        tokenize(&vocabulary("llama"), &own, &Limits { max_prompt: 512, max_length: 1024, append_eos: true });
    let found = found.unwrap();
    assert_eq!((found.pairs.len(), found.skipped.total(), found.n_cut), (own.len(), 0, 0));
}
