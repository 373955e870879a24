//! The embedded prompts: mild, provocative, written for this program.
//!
//! They are beginnings of sentences that invite an angry, insulting or crude continuation. They contain
//! no slur, no obscenity and no target. Each file was written in its language, not translated, so row n
//! of two files does not correspond.

use super::Prompt;

macro_rules! own_files {
    ($($code:literal)*) => { [$(($code, include_str!(concat!("own/", $code, ".txt")))),*] };
}

/// (language, one prompt per line), in the order of [`crate::text::language::LANGUAGES`].
const OWN: [(&str, &str); 17] =
    own_files!("ar" "cs" "de" "en" "es" "fr" "hi" "id" "it" "ja" "ko" "nl" "pl" "pt" "ru" "sv" "zh");

/// The embedded prompts in 17 languages, with the ids `{lang}/own-{n}`, n from 1.
pub fn own_prompts() -> Vec<Prompt> {
    OWN.iter()
        .flat_map(|(language, text)| {
            text.lines().filter(|line| !line.trim().is_empty()).enumerate().map(move |(i, line)| Prompt {
                id: format!("{language}/own-{}", i + 1),
                language: (*language).to_owned(),
                text: line.to_owned(),
            })
        })
        .collect()
}
