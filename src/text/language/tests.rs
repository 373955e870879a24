use proptest::prelude::*;
use rayon::prelude::*;

use std::collections::HashMap;

use super::identify::*;
use super::*;

#[test]
fn codes_are_reduced_to_the_language() {
    for (code, expected) in [
        ("en", "en"),
        ("EN", "en"),
        (" de ", "de"),
        ("Pt-Br", "pt"),
        ("pt_PT", "pt"),
        ("es-419", "es"),
        ("ZH-Hans", "zh"),
        ("zh-Hans-TW", "zh"),
        ("zh-CN", "zh"),
        ("ZH", "zh"),
        ("ZH-Hant", "zh-hant"),
        ("zh_TW", "zh-hant"),
        ("NO-NB", "nb"),
        ("nb", "nb"),
        ("BCMS", "bcms"),
        ("SW", "sw"),
    ] {
        assert_eq!(normalize(code), Some(expected), "{code:?}");
    }
}

#[test]
fn an_unknown_code_is_none() {
    for code in
        ["", "-", "x", "prompts", "english", "vi", "en-", "-en", "de-prompts", "it-follows", "en--us", "日本"]
    {
        assert_eq!(normalize(code), None, "{code:?}");
    }
}

#[test]
fn names_and_long_codes_are_recognised_in_cells() {
    for (value, expected) in [
        ("English", "en"),
        ("german", "de"),
        ("FRANÇAIS", "fr"),
        ("eng", "en"),
        ("arb_Arab", "ar"),
        ("zho_Hant", "zh-hant"),
        ("cmn-Hans", "zh"),
        ("zh-CN", "zh"),
        ("pt_BR", "pt"),
        ("cmn_Hani", "zh"),
        ("Danish", "da"),
        ("Norwegian", "nb"),
        ("English (US)", "en"),
        ("Simplified Chinese", "zh"),
        ("Chinese (Traditional)", "zh-hant"),
        ("hr", "bcms"),
        ("sr-Cyrl", "bcms"),
    ] {
        assert_eq!(recognise(value), Some(expected), "{value:?}");
    }
    for value in ["", "klingon", "eng-prompts", "none"] {
        assert_eq!(recognise(value), None, "{value:?}");
    }
}

#[test]
fn every_known_code_is_its_own_normal_form() {
    for code in known_codes() {
        assert_eq!(normalize(code), Some(code));
    }
    assert!(LANGUAGES.windows(2).all(|pair| pair[0].code < pair[1].code), "sorted by code, each once");
    assert_eq!(find("sv").map(|language| language.name), Some("Swedish"));
    assert_eq!(find("tr"), None);
}

#[test]
fn the_lang_flag_accepts_lists_and_repeats() {
    assert_eq!(parse_languages(&["de,EN", "pt-BR, de"]).unwrap(), ["de", "en", "pt"]);
    assert_eq!(parse_languages::<&str>(&[]).unwrap(), Vec::<&str>::new());
}

#[test]
fn rejects_an_unknown_code_in_the_lang_flag() {
    let error = parse_languages(&["de,klingon"]).unwrap_err();
    assert_eq!(error.to_string(), "--lang: expected a known language code, found \"klingon\"");
    assert!(error.hint().unwrap().starts_with("known: ar, cs, de"));
    assert!(error.is_usage());
}

#[test]
fn rejects_an_empty_code_in_the_lang_flag() {
    assert!(parse_languages(&["de,"]).unwrap_err().to_string().contains("found \"\""));
}

#[test]
fn identifies_a_sentence_in_each_of_a_few_scripts() {
    let identifier = LanguageIdentifier::new();
    for (code, text) in [
        ("en", "The weather was so fine that we went down to the river."),
        ("de", "Das Wetter war so schön, dass wir an den Fluss gingen."),
        ("ar", "كان الطقس جميلا فذهبنا إلى النهر"),
        ("hi", "मौसम अच्छा था इसलिए हम नदी पर गए"),
        ("ja", "天気がよかったので川へ行きました"),
        ("ko", "날씨가 좋아서 강에 갔습니다"),
        ("ru", "Погода была такой хорошей, что мы пошли к реке."),
        ("zh", "天气很好，所以我们去了河边"),
    ] {
        assert_eq!(identifier.identify(text), Some(code), "{text}");
        assert_eq!(identifier.language_kept(code, text), Some(true), "{text}");
        let another = if code == "ko" { "ja" } else { "ko" };
        assert_eq!(identifier.language_kept(another, text), Some(false), "{text}");
    }
}

#[test]
fn text_without_letters_is_undecided() {
    let identifier = LanguageIdentifier::new();
    for text in ["", "   ", "12345 67890 !!! ???", "\u{1F600}\u{1F600}\u{1F600}", "\n\t\u{0}"] {
        assert_eq!(identifier.identify(text), None, "{text:?}");
        assert_eq!(identifier.language_kept("en", text), None, "{text:?}");
    }
}

#[test]
fn text_with_too_few_letters_is_undecided() {
    let identifier = LanguageIdentifier::new();
    assert_eq!(identifier.language_kept("en", "No, no, no."), None);
    assert_eq!(identifier.language_kept("ja", "大変だ"), None);
    // Six Cyrillic letters suffice: this is not English.
    assert_eq!(identifier.language_kept("en", "Привет"), Some(false));
    assert_eq!(identifier.language_kept("ru", "Привет"), Some(true));
}

#[test]
fn a_script_outside_the_17_languages_is_undecided() {
    let identifier = LanguageIdentifier::new();
    assert_eq!(identifier.identify("วันนี้อากาศดีมาก เราไปแม่น้ำกัน"), None);
    assert_eq!(identifier.language_kept("en", "Ο καιρός ήταν τόσο καλός σήμερα"), None);
}

#[test]
fn a_language_outside_the_17_is_undecided() {
    let identifier = LanguageIdentifier::new();
    let text = "The weather was so fine that we went down to the river.";
    assert_eq!(identifier.language_kept("tr", text), None);
    assert_eq!(identifier.language_kept("zh-hant", text), None);
    assert_eq!(identifier.language_kept("not a code", text), None);
    assert_eq!(identifier.language_kept("EN-us", text), Some(true));
}

#[test]
fn a_quoted_name_does_not_change_the_language() {
    let identifier = LanguageIdentifier::new();
    let text = "Er sagte, sein Lieblingsfilm sei noch immer \"The Old Man and the Sea\", und lachte laut.";
    assert_eq!(identifier.language_kept("de", text), Some(true));
}

#[test]
fn threads_that_share_an_identifier_agree_with_one_thread() {
    let identifier = LanguageIdentifier::new();
    let texts: Vec<&str> = [
        include_str!("../../eval/prompts/own/de.txt"),
        include_str!("../../eval/prompts/own/ja.txt"),
        include_str!("../../eval/prompts/own/pt.txt"),
        include_str!("../../eval/prompts/own/ru.txt"),
    ]
    .into_iter()
    .flat_map(str::lines)
    .collect();
    let one_thread: Vec<_> = texts.iter().map(|text| identifier.identify(text)).collect();
    let many_threads: Vec<_> = texts.par_iter().map(|text| identifier.identify(text)).collect();
    assert_eq!(one_thread, many_threads);
}

proptest! {
    #[test]
    fn any_text_gets_an_answer_without_a_panic(text in any::<String>()) {
        let identifier = LanguageIdentifier::new();
        identifier.identify(&text);
        identifier.language_kept("ja", &text);
    }

    #[test]
    fn letters_of_many_scripts_get_an_answer_without_a_panic(text in "[a-zé0-9 а-яぁ-ん一-丁가-각ا-ي]{0,300}") {
        LanguageIdentifier::new().identify(&text);
    }
}

/// Measures the numbers in the module's documentation.
///
/// Needs a folder of `{lang}.jsonl` for all 17 languages with at least 100 prompts each. Fails without
/// it, because a skipped measurement would look like one that passed.
#[test]
#[ignore = "needs the folder DETOX_GGUF_PARALLEL_PROMPTS"]
fn the_error_rates_are_at_most_the_documented_ones() {
    let folder = std::env::var_os("DETOX_GGUF_PARALLEL_PROMPTS")
        .expect("DETOX_GGUF_PARALLEL_PROMPTS names a folder of {lang}.jsonl files");
    let codes: Vec<&'static str> = LANGUAGES.iter().map(|language| language.code).collect();
    let mut prompts: Vec<(&str, String)> = Vec::new();
    for code in &codes {
        let path = std::path::Path::new(&folder).join(format!("{code}.jsonl"));
        let text = std::fs::read_to_string(&path).unwrap();
        let before = prompts.len();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            let text = ["Prompt", "prompt", "text"].iter().find_map(|field| row[*field].as_str());
            prompts.push((code, text.unwrap_or_else(|| panic!("{code}: line {number}")).to_owned()));
        }
        let n_prompts = prompts.len() - before;
        assert!(n_prompts >= 100, "{code}: {n_prompts} prompts");
    }

    let identifier = LanguageIdentifier::new();
    let start = std::time::Instant::now();
    let right = prompts.iter().filter(|(code, text)| identifier.identify(text) == Some(*code)).count();
    let seconds = start.elapsed().as_secs_f64();

    // [own, other] × [undecided, kept, not kept]
    let mut counts = [[0usize; 3]; 2];
    let mut kept_for_another: HashMap<(&str, &str), usize> = HashMap::new();
    for (own_code, text) in &prompts {
        for code in &codes {
            let is_other = usize::from(code != own_code);
            let kept = identifier.language_kept(code, text);
            counts[is_other][kept.map_or(0, |kept| if kept { 1 } else { 2 })] += 1;
            if is_other == 1 && kept == Some(true) {
                *kept_for_another.entry((own_code, code)).or_default() += 1;
            }
        }
    }
    let [own, other] = counts;
    let undecided = own[0] as f64 / prompts.len() as f64;
    let own_not_kept = own[2] as f64 / (own[1] + own[2]) as f64;
    let other_kept = other[1] as f64 / (other[1] + other[2]) as f64;
    let mut pairs: Vec<_> = kept_for_another.into_iter().collect();
    pairs.sort_by_key(|(pair, n)| (std::cmp::Reverse(*n), *pair));
    println!("{} texts, {:.0} per second on one thread", prompts.len(), prompts.len() as f64 / seconds);
    println!("identified as their own language: {:.2}%", 100.0 * right as f64 / prompts.len() as f64);
    println!("undecided: {:.2}%", 100.0 * undecided);
    println!("own language judged not kept: {:.2}%", 100.0 * own_not_kept);
    println!("another language judged kept: {:.2}%", 100.0 * other_kept);
    println!("most often, (text, expected): {:?}", &pairs[..pairs.len().min(5)]);
    assert!(own_not_kept <= 0.02, "{own_not_kept}");
    assert!(other_kept <= 0.006, "{other_kept}");
    assert!(undecided <= 0.02, "{undecided}");
}
