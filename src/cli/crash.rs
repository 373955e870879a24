//! Says why the program dies, when llama.cpp aborts it or the system sends a signal.
//!
//! Only the program installs this; a library must not take over the signals of its host. Everything here runs while
//! memory may be corrupt, so it allocates nothing, takes no lock, and calls only functions that POSIX allows in
//! signal handlers. The exit status is 1, as after any other failure.

use std::ffi::{CStr, c_char};

use crate::engine::{self, files_in_use};

/// Installs the messages. Called once, at the start of the program.
pub(super) fn install() {
    engine::set_abort_callback(on_assertion);
    #[cfg(unix)]
    signals::install();
}

/// Receives the text of a failed assertion of llama.cpp, which would abort the process next.
extern "C" fn on_assertion(text: *const c_char) {
    if text.is_null() {
        return;
    }
    // SAFETY: not null; ggml passes a NUL-terminated string that lives during the call.
    let text = unsafe { CStr::from_ptr(text) }.to_bytes();
    die(&|| {
        put_subject();
        put(b"llama.cpp stopped: ");
        put(without_build_path(text));
        if is_about_memory(text) {
            put(b"\nhint: memory ran out: lower -np/--parallel, -c/--ctx-size or -b/--batch-size, or raise the memory limit (ulimit -v)\n");
            return;
        }
        put(b"\nhint: llama.cpp does not support this model with these flags. Try -np 1 and fewer flags, or another file of the model; -v shows llama.cpp's log\n");
    })
}

/// `text` from the folder of llama.cpp's sources on, without the path of the machine that built it.
fn without_build_path(text: &[u8]) -> &[u8] {
    const FOLDER: &[u8] = b"/llama.cpp/";
    let found = text.windows(FOLDER.len()).position(|window| window == FOLDER);
    found.map_or(text, |at| &text[at + FOLDER.len()..])
}

/// Whether an assertion failed because an allocation did.
fn is_about_memory(text: &[u8]) -> bool {
    const WORDS: [&[u8]; 4] =
        [b"mem_buffer", b"failed to allocate", b"out of memory", b"insufficient memory"];
    WORDS.iter().any(|word| text.windows(word.len()).any(|window| window == *word))
}

/// Writes to standard error, bypassing all buffers and locks.
fn put(bytes: &[u8]) {
    #[cfg(unix)]
    signals::write_all(bytes);
    #[cfg(not(unix))]
    {
        use std::io::Write;
        let _ = std::io::stderr().write_all(bytes);
    }
}

/// Begins the message: `error: `, and the files in use.
fn put_subject() {
    put(b"error: ");
    let mut is_first = true;
    for file in files_in_use() {
        if !is_first {
            put(b", ");
        }
        put(file.text.as_bytes());
        is_first = false;
    }
    if !is_first {
        put(b": ");
    }
}

/// Prints the message and ends the process. If two threads die at once, only the first is heard.
fn die(message: &dyn Fn()) -> ! {
    #[cfg(unix)]
    signals::die(message);
    #[cfg(not(unix))]
    {
        message();
        std::process::exit(1)
    }
}

#[cfg(unix)]
mod signals;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_assertion_is_shown_without_the_build_path() {
        let text = b"/home/me/.cargo/llama.cpp/src/models/a.cpp:12: GGML_ASSERT(n == 1) failed";
        assert_eq!(without_build_path(text), b"src/models/a.cpp:12: GGML_ASSERT(n == 1) failed");
        assert_eq!(without_build_path(b"ggml.c:1: x"), b"ggml.c:1: x");
    }
}
