//! The 17 languages and their codes, and language identification.

#[cfg(feature = "engine")]
mod assign;
#[cfg(feature = "engine")]
pub mod identify;

use crate::error::{Error, Result};

#[cfg(feature = "engine")]
pub use assign::assign;
#[cfg(feature = "engine")]
pub use identify::LanguageIdentifier;

/// One of the 17 languages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Language {
    /// ISO 639-1 code, lower case.
    pub code: &'static str,
    /// Its name in English.
    pub name: &'static str,
    /// Its name in the language itself.
    pub native_name: &'static str,
}

const fn language(code: &'static str, name: &'static str, native_name: &'static str) -> Language {
    Language { code, name, native_name }
}

/// The languages of the paper (arXiv 2406.16235, figure 1), by code. `zh` means simplified characters.
pub const LANGUAGES: [Language; 17] = [
    language("ar", "Arabic", "العربية"),
    language("cs", "Czech", "čeština"),
    language("de", "German", "Deutsch"),
    language("en", "English", "English"),
    language("es", "Spanish", "español"),
    language("fr", "French", "français"),
    language("hi", "Hindi", "हिन्दी"),
    language("id", "Indonesian", "Bahasa Indonesia"),
    language("it", "Italian", "italiano"),
    language("ja", "Japanese", "日本語"),
    language("ko", "Korean", "한국어"),
    language("nl", "Dutch", "Nederlands"),
    language("pl", "Polish", "polski"),
    language("pt", "Portuguese", "português"),
    language("ru", "Russian", "русский"),
    language("sv", "Swedish", "svenska"),
    language("zh", "Chinese", "中文"),
];

/// Further languages of RTP-LX. Their prompts can be read and continued, but the language of their
/// continuations is not identified.
const OTHER_CODES: [&str; 11] = ["bcms", "da", "fi", "he", "hu", "nb", "sw", "th", "tr", "uk", "zh-hant"];

/// Script subtags after a language code, as in `zh-Hans` and FLORES' `arb_Arab`.
const SCRIPTS: [&str; 12] =
    ["arab", "cyrl", "deva", "hang", "hani", "hans", "hant", "hebr", "jpan", "kore", "latn", "thai"];

/// Names in English of languages besides the 17, and further names of those.
const NAMES: [(&str, &str); 22] = [
    ("bosnian", "bcms"),
    ("croatian", "bcms"),
    ("montenegrin", "bcms"),
    ("serbian", "bcms"),
    ("danish", "da"),
    ("finnish", "fi"),
    ("hebrew", "he"),
    ("hungarian", "hu"),
    ("norwegian", "nb"),
    ("norwegian bokmål", "nb"),
    ("norwegian bokmal", "nb"),
    ("bokmål", "nb"),
    ("swahili", "sw"),
    ("kiswahili", "sw"),
    ("thai", "th"),
    ("turkish", "tr"),
    ("ukrainian", "uk"),
    ("mandarin", "zh"),
    ("mandarin chinese", "zh"),
    ("simplified chinese", "zh"),
    ("chinese simplified", "zh"),
    ("traditional chinese", "zh-hant"),
];

/// The language with this code, if it is one of the 17.
pub fn find(code: &str) -> Option<&'static Language> {
    LANGUAGES.iter().find(|language| language.code == code)
}

/// Every code that [`normalize`] can return: the 17, then the further ones of RTP-LX.
pub fn known_codes() -> Vec<&'static str> {
    LANGUAGES.iter().map(|language| language.code).chain(OTHER_CODES).collect()
}

/// The normal form of a language code; `None` for an unknown code.
///
/// Accepts RTP-LX's locales (`EN`, `Pt-Br`, `NO-NB`, `ZH-Hans`), upper case, `_` for `-`, and regions
/// (`es-MX`, `pt_PT`). Traditional Chinese (`zh-Hant`, `zh-TW`) is a language of its own, `zh-hant`,
/// outside the 17: RTP-LX has a file for each, and merging them would mix two sets of prompts.
pub fn normalize(code: &str) -> Option<&'static str> {
    let code = code.trim().to_ascii_lowercase().replace('_', "-");
    let (primary, rest) = code.split_once('-').map_or((code.as_str(), None), |(p, r)| (p, Some(r)));
    let subtags: Vec<&str> = rest.map(|rest| rest.split('-').collect()).unwrap_or_default();
    let is_region = |tag: &str| {
        (tag.len() == 2 && tag.bytes().all(|byte| byte.is_ascii_alphabetic()))
            || (tag.len() == 3 && tag.bytes().all(|byte| byte.is_ascii_digit()))
    };
    if !subtags.iter().all(|tag| is_region(tag) || SCRIPTS.contains(tag)) {
        return None;
    }
    let is_traditional = subtags.contains(&"hant")
        || (!subtags.contains(&"hans") && subtags.iter().any(|tag| ["tw", "hk", "mo"].contains(tag)));
    match primary {
        "zh" if is_traditional => Some("zh-hant"),
        "no" => Some("nb"),
        "bs" | "hr" | "sr" => Some("bcms"),
        primary => known_codes().into_iter().find(|known| *known == primary),
    }
}

/// ISO 639-2 and 639-3 codes.
const LONG_CODES: [(&str, &str); 38] = [
    ("ara", "ar"),
    ("arb", "ar"),
    ("ces", "cs"),
    ("cze", "cs"),
    ("deu", "de"),
    ("ger", "de"),
    ("eng", "en"),
    ("spa", "es"),
    ("fra", "fr"),
    ("fre", "fr"),
    ("hin", "hi"),
    ("ind", "id"),
    ("ita", "it"),
    ("jpn", "ja"),
    ("kor", "ko"),
    ("nld", "nl"),
    ("dut", "nl"),
    ("pol", "pl"),
    ("por", "pt"),
    ("rus", "ru"),
    ("swe", "sv"),
    ("zho", "zh"),
    ("chi", "zh"),
    ("cmn", "zh"),
    ("dan", "da"),
    ("fin", "fi"),
    ("heb", "he"),
    ("hun", "hu"),
    ("nob", "nb"),
    ("nor", "nb"),
    ("swa", "sw"),
    ("swh", "sw"),
    ("tha", "th"),
    ("tur", "tr"),
    ("ukr", "uk"),
    ("bos", "bcms"),
    ("hrv", "bcms"),
    ("srp", "bcms"),
];

/// The language that a cell or a flag means: a code as in [`normalize`], a code of three letters (`eng`,
/// `arb_Arab`), or a name in English or, for the 17, in the language itself. A country or script in brackets
/// (`English (US)`) may follow the name.
pub fn recognise(value: &str) -> Option<&'static str> {
    let name = value.trim().to_lowercase();
    let by_name = || {
        let (name, note) =
            name.split_once('(').map_or((name.as_str(), ""), |(name, note)| (name.trim(), note));
        let mut languages = LANGUAGES.iter();
        let found = languages.find(|l| l.name.to_lowercase() == name || l.native_name.to_lowercase() == name);
        let of_names = || NAMES.iter().find(|(known, _)| *known == name).map(|(_, code)| *code);
        let is_traditional = ["traditional", "taiwan", "hong kong", "hant"].iter().any(|w| note.contains(w));
        match found.map(|language| language.code).or_else(of_names) {
            Some("zh") if is_traditional => Some("zh-hant"),
            found => found,
        }
    };
    let long = || {
        let end = name.find(['-', '_']).unwrap_or(name.len());
        let (_, code) = LONG_CODES.iter().find(|(long, _)| *long == &name[..end])?;
        normalize(&format!("{code}{}", &name[end..]))
    };
    normalize(value).or_else(by_name).or_else(long)
}

/// Parses the values of `--lang`: comma separated, each language once, in the given order.
pub fn parse_languages<S: AsRef<str>>(values: &[S]) -> Result<Vec<&'static str>> {
    let mut languages = Vec::new();
    for code in values.iter().flat_map(|value| value.as_ref().split(',')) {
        let Some(language) = recognise(code) else {
            return Err(Error::setting("--lang", format!("expected a known language code, found {code:?}"))
                .with_hint(format!("known: {}", known_codes().join(", "))));
        };
        if !languages.contains(&language) {
            languages.push(language);
        }
    }
    Ok(languages)
}

#[cfg(all(test, feature = "engine"))]
mod tests;
