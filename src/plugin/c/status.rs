//! What a C function says: a status, and words for the thread that asked. No panic goes past here.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::Error;

/// `detox_status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) enum Status {
    Ok = 0,
    InvalidArgument = 1,
    InvalidHandle = 2,
    IoError = 3,
    InvalidFile = 4,
    Unsupported = 5,
    Refused = 6,
    NotSteered = 7,
    InternalError = 8,
}

/// Why a function failed.
#[derive(Debug)]
pub(super) struct Failure {
    status: Status,
    message: String,
}

impl Failure {
    pub(super) fn argument(message: impl Into<String>) -> Failure {
        Failure { status: Status::InvalidArgument, message: message.into() }
    }

    pub(super) fn handle(message: impl Into<String>) -> Failure {
        Failure { status: Status::InvalidHandle, message: message.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let status = match &error {
            Error::Io { .. } => Status::IoError,
            Error::Input { .. } | Error::Gguf { .. } => Status::InvalidFile,
            Error::Model { .. } | Error::Scorer { .. } => Status::Unsupported,
            Error::Setting { .. } => Status::InvalidArgument,
            Error::Refused { .. } => Status::Refused,
            Error::NotSteered { .. } => Status::NotSteered,
            // None of these comes out of what the plugin calls.
            Error::Decode { .. }
            | Error::PromptTooLong { .. }
            | Error::RunFolder { .. }
            | Error::Device { .. }
            | Error::DeviceMemory { .. }
            | Error::Training { .. }
            | Error::NoResult { .. }
            | Error::Interrupted => Status::InternalError,
        };
        let message = match error.hint() {
            Some(hint) => format!("{error}\nhint: {hint}"),
            None => error.to_string(),
        };
        Failure { status, message }
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// The message of the last failure in this thread.
pub(super) fn last_error() -> *const c_char {
    // In a thread that is ending there is none any more.
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

fn set_last_error(message: String) {
    // A NUL, of a file's name say, would end the message.
    let message = CString::new(message.replace('\0', "\u{fffd}")).unwrap_or_default();
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = message);
}

/// Runs a function's body.
pub(super) fn guard(body: impl FnOnce() -> Result<(), Failure>) -> Status {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Failure { status: Status::InternalError, message: format!("a fault of the library: {words}") })
    });
    match result {
        Ok(()) => Status::Ok,
        Err(Failure { status, message }) => {
            set_last_error(message);
            status
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn message() -> String {
        // SAFETY: the pointer is that of this thread's message, which nothing changes meanwhile.
        unsafe { CStr::from_ptr(last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_a_status_and_the_message_is_that_of_the_thread() {
        assert_eq!(guard(|| panic!("{} wrong", "quite")), Status::InternalError);
        assert!(message().ends_with("quite wrong"));
        std::thread::spawn(|| assert_eq!(message(), "")).join().unwrap();
        assert_eq!(guard(|| Ok(())), Status::Ok);
        assert!(message().ends_with("quite wrong"), "what succeeds leaves it");
    }

    #[test]
    fn a_hint_stands_on_a_line_of_its_own() {
        let error = Error::setting("a\0b", "c").with_hint("d");
        assert_eq!(guard(|| Err(error.into())), Status::InvalidArgument);
        assert_eq!(message(), "a\u{fffd}b: c\nhint: d");
    }
}
