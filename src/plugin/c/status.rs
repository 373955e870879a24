//! The result of a C function: a status, and a message for the calling thread. Panics stop here.

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
            Error::Input { .. } | Error::Gguf { .. } | Error::NotFinite { .. } => Status::InvalidFile,
            Error::Model { .. } | Error::Scorer { .. } => Status::Unsupported,
            Error::Setting { .. } => Status::InvalidArgument,
            Error::Refused { .. } => Status::Refused,
            Error::NotSteered { .. } => Status::NotSteered,
            // Nothing that the plugin calls returns one of these.
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

/// The message of the last failure in this thread; empty if there was none.
pub(super) fn last_error() -> *const c_char {
    // A thread that is ending may have dropped its message already.
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

fn set_last_error(message: String) {
    // A NUL, for example from a file name, would end the message.
    let message = CString::new(message.replace('\0', "\u{fffd}")).unwrap_or_default();
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = message);
}

/// Runs the body of a C function, and turns errors and panics into a status and a message.
pub(super) fn guard(body: impl FnOnce() -> Result<(), Failure>) -> Status {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Failure {
            status: Status::InternalError,
            message: format!("internal error of the library: {text}"),
        })
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
        // SAFETY: the pointer is to this thread's message, and nothing changes it meanwhile.
        unsafe { CStr::from_ptr(last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_a_status_and_a_message_of_its_thread() {
        assert_eq!(guard(|| panic!("{} wrong", "quite")), Status::InternalError);
        assert!(message().ends_with("quite wrong"));
        std::thread::spawn(|| assert_eq!(message(), "")).join().unwrap();
        assert_eq!(guard(|| Ok(())), Status::Ok);
        assert!(message().ends_with("quite wrong"), "success leaves the message");
    }

    #[test]
    fn a_hint_gets_its_own_line() {
        let error = Error::setting("a\0b", "c").with_hint("d");
        assert_eq!(guard(|| Err(error.into())), Status::InvalidArgument);
        assert_eq!(message(), "a\u{fffd}b: c\nhint: d");
    }
}
