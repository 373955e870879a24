use super::*;
use crate::eval::result::ScorerInfo;

/// A scorer that returns a tenth of the first digit in a text; texts without a digit have no score.
struct Digit;

impl Scorer for Digit {
    fn info(&self) -> ScorerInfo {
        ScorerInfo { name: "digit".into(), languages: vec!["en".into()], ..ScorerInfo::default() }
    }

    fn toxicity(&self, Text { text, .. }: Text<'_>) -> Result<f64> {
        let digit =
            text.chars().find_map(|c| c.to_digit(10)).ok_or_else(|| Error::scorer("digit", "no digit"))?;
        Ok(f64::from(digit) / 10.0)
    }
}

const RULES: Rules = Rules { min_tokens: 2, ..Rules::DEFAULT };

fn tokenizer() -> TextTokenizer {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("gguf/tiny/tokenizer.json");
    TextTokenizer::from_file(&path).unwrap()
}

fn generation(text: &str, sample: u32) -> Generation {
    Generation {
        prompt: "She said".into(),
        generated_text: text.into(),
        prompt_id: "en/1".into(),
        language: "en".into(),
        sample,
        n_tokens: Some(if text.is_empty() { 0 } else { 10 }),
        logprob: Some(-20.0),
        finish: Some(Finish::Length),
        token_ids: None,
        token_logprobs: None,
        vocabulary: None,
    }
}

fn screened(texts: &[&str], side: Option<Side>, steered: Option<&SteeredSide>) -> PromptSamples {
    let scorers: Vec<Box<dyn Scorer>> = vec![Box::new(Digit)];
    let screen = Screen {
        rules: &RULES,
        scorers: &scorers,
        identifier: LanguageIdentifier::new(),
        tokenizer: tokenizer(),
    };
    let samples: Vec<Generation> =
        texts.iter().enumerate().map(|(i, text)| generation(text, i as u32)).collect();
    let mut screened = PromptSamples::default();
    screen.sort_into(&mut screened, &samples, &Pool { side, steered, name: "samples" });
    screened
}

fn prompt() -> Prompt {
    Prompt { id: "en/1".into(), language: "en".into(), text: "She said".into() }
}

const CLEAN: &str = " that the weather was 1 of the nicest things today";
const TOXIC: &str = " that the weather was 9 of the dullest things today";

#[test]
fn samples_are_dropped_for_each_reason_of_their_own() {
    for (texts, reason) in [
        (&[""][..], Dropped::Short),
        (&["  \n"], Dropped::Short),
        (&[CLEAN, CLEAN], Dropped::Duplicate),
        (&[" that the weather was nice"], Dropped::Unscored),
        (&[" dass das Wetter heute 1 schöne Sache in der Stadt war"], Dropped::OtherLanguage),
        (&[" that 1 that 1 that 1 that 1 that 1 that 1"], Dropped::Repetitive),
        (&[" that the weather was 3 of the nicest things today"], Dropped::Between),
    ] {
        assert_eq!(screened(texts, None, None).dropped, [reason], "{texts:?}");
    }
}

#[test]
fn a_plain_pool_supplies_both_sides_and_a_steered_pool_only_its_own() {
    let both = screened(&[CLEAN, TOXIC], None, None);
    assert_eq!((both.chosen.len(), both.rejected.len(), both.dropped.len()), (1, 1, 0));
    let steered = SteeredSide { steering: Steering::default(), by: "x.gguf x 2".into() };
    let one = screened(&[CLEAN, TOXIC], Some(Side::Rejected), Some(&steered));
    assert_eq!((one.chosen.len(), one.rejected.len()), (0, 1));
    assert_eq!(one.dropped, [Dropped::Between], "a clean text is dropped from the rejected pool");
    assert_eq!(one.rejected[0].logprob, BaseLogprob::default(), "the steered model's log-prob is not used");
    assert_eq!(one.rejected[0].steered_by.as_deref(), Some("x.gguf x 2"));
    assert_eq!(both.rejected[0].logprob_per_token(), -2.0);
}

#[test]
fn every_sample_is_counted_once() {
    let texts = [CLEAN, TOXIC, "", " that the weather was 8 of the dullest things today"];
    let made = pair_up(&[prompt()], vec![screened(&texts, None, None)], &RULES);
    let counts = &made.yields["en"];
    assert_eq!((counts.n_prompts, counts.n_prompts_paired, counts.n_pairs), (1, 1, 1));
    assert_eq!((counts.n_samples, counts.n_chosen, counts.n_rejected), (4, 1, 2));
    assert_eq!(counts.dropped, BTreeMap::from([(Dropped::Short, 1), (Dropped::Taken, 1)]));
    let row = &made.rows[0];
    assert_eq!((row.pair.chosen.as_str(), row.pair.rejected.as_str()), (CLEAN, TOXIC));
    assert_eq!((row.chosen_measured.sample, row.rejected_measured.sample), (0, 1));
    assert_eq!(row.rejected_measured.toxicity, BTreeMap::from([("digit".to_owned(), 0.9)]));
}

#[test]
fn samples_that_are_improbable_under_the_unsteered_model_are_dropped() {
    let mut improbable = screened(&[CLEAN, TOXIC], None, None);
    improbable.rejected[0].logprob.base_logprob = Some(-51.0);
    let made = pair_up(&[prompt()], vec![improbable], &RULES);
    assert!(made.rows.is_empty());
    assert_eq!(made.yields["en"].dropped, BTreeMap::from([(Dropped::Improbable, 1)]));
    assert_eq!(made.yields["en"].n_rejected, 0);
    let mut impossible = screened(&[CLEAN, TOXIC], None, None);
    impossible.chosen[0].logprob = BaseLogprob::default();
    let made = pair_up(&[prompt()], vec![impossible], &RULES);
    let expected = BTreeMap::from([(Dropped::Improbable, 1), (Dropped::NoCounterpart, 1)]);
    assert_eq!(made.yields["en"].dropped, expected);
}

#[test]
fn rows_are_read_back_as_the_same_pairs() {
    let made = pair_up(&[prompt()], vec![screened(&[CLEAN, TOXIC], None, None)], &RULES);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    std::fs::write(&path, crate::file::json_lines(&made.rows).unwrap()).unwrap();
    let read = crate::train::data::preference_pair::read(&path, &Default::default()).unwrap();
    assert_eq!(read, made.rows.into_iter().map(|row| row.pair).collect::<Vec<_>>());
}
