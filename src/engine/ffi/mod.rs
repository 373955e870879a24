//! Safe owned handles over llama.cpp. All `unsafe` code of the engine is here.
//!
//! [`ModelHandle`] owns a `llama_model`, [`LoraHandle`] an adapter of it, and [`ContextHandle`] a `llama_context`.
//! Adapters and contexts hold their model, so it is freed last. llama.cpp aborts the process on a failed assertion,
//! so arguments are checked here before each call, above all in `Batch::check`.
//!
//! `eval_callback` is the function that llama.cpp calls for every node of a graph.

mod adapter;
mod context;
mod eval_callback;
mod model;

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::ptr;
use std::sync::{Mutex, Once, OnceLock, PoisonError};

use llama_cpp_sys_2 as sys;

pub(super) use adapter::LoraHandle;
pub(super) use context::{Batch, ContextHandle, ContextParams, SequenceState};
pub(super) use model::{LoadParams, ModelHandle};

/// Starts llama.cpp once per process, and sends its log to `tracing`.
pub(super) fn start_backend() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        // SAFETY: the callback is a function, so it lives as long as the program, and it takes no user data.
        // Starting the backend has no precondition, and a second start changes nothing.
        unsafe {
            sys::llama_log_set(Some(log), ptr::null_mut());
            sys::llama_backend_init();
        }
    });
}

/// The incomplete last line of llama.cpp's log, with its level.
static UNFINISHED: Mutex<(tracing::Level, String)> = Mutex::new((tracing::Level::INFO, String::new()));

/// Receives llama.cpp's log, which arrives in parts of lines.
extern "C" fn log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    // A panic, for example of a subscriber, must not cross into C. Losing a line of the log is the lesser harm.
    let _ = std::panic::catch_unwind(|| {
        // SAFETY: llama.cpp passes a NUL-terminated string that lives during the call.
        let text = unsafe { text_of(text) };
        let mut unfinished = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
        match level {
            sys::GGML_LOG_LEVEL_CONT => {}
            sys::GGML_LOG_LEVEL_ERROR => unfinished.0 = tracing::Level::ERROR,
            sys::GGML_LOG_LEVEL_WARN => unfinished.0 = tracing::Level::WARN,
            sys::GGML_LOG_LEVEL_INFO => unfinished.0 = tracing::Level::INFO,
            _ => unfinished.0 = tracing::Level::DEBUG,
        }
        unfinished.1.push_str(&text);
        if !unfinished.1.ends_with('\n') {
            return;
        }
        let (level, line) = (unfinished.0, std::mem::take(&mut unfinished.1));
        drop(unfinished);
        let line = line.trim_end();
        if level == tracing::Level::ERROR {
            keep_error(line);
        }
        match level {
            tracing::Level::ERROR => tracing::error!(target: "llama.cpp", "{line}"),
            tracing::Level::WARN => tracing::warn!(target: "llama.cpp", "{line}"),
            tracing::Level::INFO => tracing::info!(target: "llama.cpp", "{line}"),
            _ => tracing::debug!(target: "llama.cpp", "{line}"),
        }
    });
}

thread_local! {
    /// The first error that llama.cpp logged on this thread since [`with_reason`] began; `None` outside of it.
    static FIRST_ERROR: RefCell<Option<String>> = const { RefCell::new(None) };
}

fn keep_error(line: &str) {
    FIRST_ERROR.with_borrow_mut(|first| {
        if let Some(first) = first.as_mut().filter(|first| first.is_empty()) {
            // "llama_model_load: error loading model: missing tensor 'x'": the function and the refusal say nothing.
            let reason = line.rsplit_once("error loading model: ").map_or(line, |(_, reason)| reason);
            first.push_str(reason.trim_start_matches("error loading model hyperparameters: "));
        }
    });
}

/// Calls llama.cpp. If that gives nothing, the error is the first that it logged meanwhile, or empty.
fn with_reason<T>(call: impl FnOnce() -> Option<T>) -> Result<T, String> {
    FIRST_ERROR.set(Some(String::new()));
    let result = call();
    let reason = FIRST_ERROR.take().unwrap_or_default();
    result.ok_or(reason)
}

/// llama.cpp's own words at the end of a message, if there are any.
pub(super) fn after_colon(reason: &str) -> String {
    // The dots show llama.cpp's progress.
    let reason = reason.trim_start_matches('.');
    match reason.split_once("unknown pre-tokenizer type: ") {
        _ if reason.is_empty() => String::new(),
        None => format!(": {reason}"),
        // llama.cpp does not name the key.
        Some((_, found)) => format!(": key \"tokenizer.ggml.pre\": unknown kind {found}"),
    }
}

/// The path as llama.cpp takes it. On Unix any bytes are a path; elsewhere llama.cpp expects UTF-8.
fn path_bytes(path: &Path) -> Option<CString> {
    #[cfg(unix)]
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
    #[cfg(not(unix))]
    let bytes = path.to_str()?.as_bytes();
    CString::new(bytes).ok()
}

/// The version of llama.cpp in this build.
pub(super) fn llama_version() -> String {
    // SAFETY: returns a pointer to a static, NUL-terminated string.
    unsafe { text_of(sys::llama_version()) }
}

/// The CPU features that this build of ggml uses, such as `CPU : AVX512 = 1 | AMX_INT8 = 1`.
pub(super) fn system_info() -> String {
    static INFO: OnceLock<String> = OnceLock::new();
    let info = INFO.get_or_init(|| {
        start_backend();
        // SAFETY: llama.cpp writes the text into one static buffer at each call. This is the only call, it is made
        // once, and the text is copied at once.
        unsafe { text_of(sys::llama_print_system_info()) }
    });
    info.clone()
}

/// Most sequences that one context can have.
pub(super) fn most_sequences() -> usize {
    // SAFETY: returns a constant.
    unsafe { sys::llama_max_parallel_sequences() }
}

/// Has llama.cpp pass the text of a failed assertion to `callback` before it aborts the process.
///
/// For programs only: the callback is one for the whole process.
pub(crate) fn set_abort_callback(callback: extern "C" fn(*const c_char)) {
    // SAFETY: a function lives as long as the program.
    unsafe { sys::ggml_set_abort_callback(Some(callback)) };
}

/// Whether this build can run layers on a GPU.
pub(super) fn supports_offload() -> bool {
    start_backend();
    // SAFETY: only queries the backends, which `start_backend` registered.
    unsafe { sys::llama_supports_gpu_offload() }
}

/// # Safety
/// `pointer` is null, or points to a NUL-terminated string that lives during the call.
unsafe fn text_of(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: not null, and NUL-terminated by the contract above.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}
