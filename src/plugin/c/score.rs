//! The C function of the embedded scorer.

use std::ffi::c_char;

use super::argument::{check_out, text};
use super::status::{Status, guard};
use crate::score::{self, Text};

/// # Safety
/// - `text` and `language` are null, or NUL-terminated strings.
/// - `toxicity` is null, or can be written to.
#[unsafe(no_mangle)]
unsafe extern "C" fn detox_score(text: *const c_char, language: *const c_char, toxicity: *mut f64) -> Status {
    guard(|| {
        check_out("toxicity", toxicity)?;
        // SAFETY: as this function's own contract.
        let (text, language) = unsafe {
            let language = if language.is_null() { None } else { Some(self::text("language", language)?) };
            (self::text("text", text)?, language)
        };
        let found = score::by_name(score::LEXICAL)?.toxicity(Text { text, language })?;
        // SAFETY: `check_out` saw that it is neither null nor misaligned; writable by the contract.
        unsafe { toxicity.write(found) };
        Ok(())
    })
}
