//! Fuzzes the reader of tokenizer.json: no panic of the tokenizers crate leaves it.
#![no_main]

use std::path::Path;
use std::sync::Once;

use detox_gguf::text::tokenizer::JsonTokenizer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // libFuzzer's hook ends the process at any panic, even at one that is caught. A panic that escapes still ends it.
    static QUIET: Once = Once::new();
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    if let Ok(tokenizer) = JsonTokenizer::from_bytes(Path::new("tokenizer.json"), data) {
        for text in ["", "a", "the weather is fine", "\u{1F600} e\u{301} \u{0}\n"] {
            let _ = tokenizer.tokens(text);
        }
    }
});
