//! The crate's error type. Every message names the thing, what was expected and what was found.

use std::io;
use std::path::{Path, PathBuf};

/// The result of every fallible function in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, with a message for the user.
///
/// Most variants can carry a hint: what the user can do about it. [`Error::hint`] returns it, and the command line
/// prints it on its own `hint:` line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operating system error: a missing file, no permission, a full disk.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The verb for the message: "read", "write", "create".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },

    /// A text file from the user has the wrong form.
    #[error("{}{}: {reason}", path.display(), line.map(|n| format!(":{n}")).unwrap_or_default())]
    Input {
        /// The file, or `<stdin>`.
        path: PathBuf,
        /// The number of the wrong line, from 1, if it is a single line.
        line: Option<usize>,
        /// What was expected and what was found.
        reason: String,
        /// What to do about it, if known.
        hint: Option<String>,
    },

    /// A file is not a valid GGUF file: another format, truncated, or inconsistent.
    #[error("{}: not a usable GGUF file: {reason}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// The key or tensor, what was expected and what was found.
        reason: String,
    },

    /// A valid GGUF file that this program cannot run.
    #[error("{}: cannot run this model: {reason}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// Why it cannot run.
        reason: String,
        /// What to do about it, if known.
        hint: Option<String>,
    },

    /// A setting is outside its range, or two settings contradict each other.
    #[error("{setting}: {reason}")]
    Setting {
        /// The flag as the user types it, such as `--top-p`.
        setting: String,
        /// The expected range and the value found.
        reason: String,
        /// What to do about it, if known.
        hint: Option<String>,
    },

    /// llama.cpp refused a batch.
    #[error("llama.cpp could not decode a batch of {n_tokens} tokens: {reason}")]
    Decode {
        /// Tokens in the batch.
        n_tokens: usize,
        /// llama.cpp's return code in words.
        reason: String,
    },

    /// A prompt and its continuation do not fit in the context.
    #[error(
        "{}{n_prompt} tokens{}, but {} {n_ctx_seq}",
        match (prompt.as_str(), n_predict) {
            ("", _) => "a text has ".to_owned(),
            (_, 0) => format!("{prompt:?} has "),
            _ => format!("prompt {prompt:?} has "),
        },
        if *n_predict > 0 { format!(" and {n_predict} more would be generated") } else { String::new() },
        if *is_learned { "the model has learned positions only for" } else { "a sequence holds only" }
    )]
    PromptTooLong {
        /// The prompt's id.
        prompt: String,
        /// Tokens in the prompt, or in the whole text if it is only read.
        n_prompt: usize,
        /// Tokens to generate; 0 if the text is only read.
        n_predict: usize,
        /// Context of one sequence in the session, in tokens.
        n_ctx_seq: usize,
        /// Whether the model's table of learned positions ends there, so that `-c` cannot help.
        is_learned: bool,
    },

    /// A scorer cannot run, or returned an unusable score.
    #[error("scorer {scorer}: {reason}")]
    Scorer {
        /// The scorer's name.
        scorer: String,
        /// What failed.
        reason: String,
        /// What to do about it, if known.
        hint: Option<String>,
    },

    /// A run folder cannot be used: it holds another run, or is incomplete.
    #[error("{}: {reason}", path.display())]
    RunFolder {
        /// The folder.
        path: PathBuf,
        /// Why it cannot be used.
        reason: String,
        /// What to do about it, if known.
        hint: Option<String>,
    },

    /// A GPU is unavailable, or failed.
    #[error("{device}: {reason}")]
    Device {
        /// The device as on the command line: `cuda:0`.
        device: String,
        /// What was attempted and how it failed.
        reason: String,
        /// What to do about it, if known.
        hint: Option<String>,
    },

    /// A GPU, or the CPU, is out of memory.
    #[error("{device}: {reason}")]
    DeviceMemory {
        /// The device as on the command line: `cuda:0`.
        device: String,
        /// How much was needed and how much there is.
        reason: String,
        /// What to do about it, if known.
        hint: Option<String>,
    },

    /// A computed number is NaN or infinite.
    #[error("{what}: expected a finite number, found {found}")]
    NotFinite {
        /// The number.
        what: String,
        /// NaN or an infinity.
        found: f64,
        /// What to do about it, if known.
        hint: Option<String>,
    },

    /// Training diverged: a loss, gradient or parameter is NaN or infinite.
    #[error("training diverged: {reason}")]
    Training {
        /// The value that is not finite.
        reason: String,
    },

    /// A host program's decode was not steered as intended.
    #[error("this decode was not steered as intended: {reason}")]
    NotSteered {
        /// What was missing from the graph, or from the description of the batch.
        reason: String,
    },

    /// Steering that the current setup does not support.
    #[error("{what}: {reason}")]
    Refused {
        /// The requested steering.
        what: String,
        /// Why the setup does not support it.
        reason: String,
        /// What to change in the setup, if known.
        hint: Option<String>,
    },

    /// The work finished without a result to write.
    #[error("{reason}")]
    NoResult {
        /// The expected result, and what was found instead.
        reason: String,
        /// What to do about it, if known.
        hint: Option<String>,
    },

    /// The user pressed Ctrl-C, or a signal asked the program to stop. The finished units of a run are on disk.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// Makes an [`Error::Io`], for `map_err`: `File::open(p).map_err(Error::io("open", p))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// An [`Error::Setting`] without a hint.
    pub fn setting(setting: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Setting { setting: setting.into(), reason: reason.into(), hint: None }
    }

    /// An [`Error::Input`] without a hint, for one line or for the whole file.
    pub fn input(path: impl AsRef<Path>, line: Option<usize>, reason: impl Into<String>) -> Error {
        Error::Input { path: path.as_ref().to_path_buf(), line, reason: reason.into(), hint: None }
    }

    /// An [`Error::Gguf`]. Its hint is always the same.
    pub fn gguf(path: impl AsRef<Path>, reason: impl Into<String>) -> Error {
        Error::Gguf { path: path.as_ref().to_path_buf(), reason: reason.into() }
    }

    /// An [`Error::Model`] without a hint.
    pub fn model(path: impl AsRef<Path>, reason: impl Into<String>) -> Error {
        Error::Model { path: path.as_ref().to_path_buf(), reason: reason.into(), hint: None }
    }

    /// An [`Error::Scorer`] without a hint.
    pub fn scorer(scorer: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Scorer { scorer: scorer.into(), reason: reason.into(), hint: None }
    }

    /// An [`Error::RunFolder`] without a hint.
    pub fn run_folder(path: impl AsRef<Path>, reason: impl Into<String>) -> Error {
        Error::RunFolder { path: path.as_ref().to_path_buf(), reason: reason.into(), hint: None }
    }

    /// An [`Error::Device`] without a hint.
    pub fn device(device: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Device { device: device.into(), reason: reason.into(), hint: None }
    }

    /// An [`Error::DeviceMemory`] without a hint.
    pub fn device_memory(device: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::DeviceMemory { device: device.into(), reason: reason.into(), hint: None }
    }

    /// An [`Error::Refused`] without a hint.
    pub fn refused(what: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Refused { what: what.into(), reason: reason.into(), hint: None }
    }

    /// An [`Error::NotFinite`] without a hint.
    pub fn not_finite(what: impl Into<String>, found: impl Into<f64>) -> Error {
        Error::NotFinite { what: what.into(), found: found.into(), hint: None }
    }

    /// A number of a training run that is not finite, as [`Error::Training`]. Other errors stay as they are.
    #[must_use]
    pub fn as_divergence(self) -> Error {
        match self {
            Error::NotFinite { what, found, .. } => Error::Training { reason: format!("{what} is {found}") },
            other => other,
        }
    }

    /// An [`Error::NoResult`] without a hint.
    pub fn no_result(reason: impl Into<String>) -> Error {
        Error::NoResult { reason: reason.into(), hint: None }
    }

    /// Adds a hint: what the user can do about it.
    ///
    /// No effect on variants without a hint of their own, such as [`Error::Gguf`].
    pub fn with_hint(mut self, text: impl Into<String>) -> Error {
        if let Some(hint) = self.hint_mut() {
            *hint = Some(text.into());
        }
        self
    }

    /// Names `to` instead of `from`, for a file that was read under another name than the user's.
    pub fn with_path(mut self, from: &Path, to: &Path) -> Error {
        match &mut self {
            Error::Io { path, .. }
            | Error::Input { path, .. }
            | Error::Gguf { path, .. }
            | Error::Model { path, .. }
            | Error::RunFolder { path, .. }
                if path == from =>
            {
                *path = to.to_path_buf();
            }
            _ => {}
        }
        self
    }

    /// Adds a hint if there is one.
    pub fn with_optional_hint(self, hint: Option<impl Into<String>>) -> Error {
        match hint {
            Some(hint) => self.with_hint(hint),
            None => self,
        }
    }

    /// Where this variant stores its hint, if it does.
    fn hint_mut(&mut self) -> Option<&mut Option<String>> {
        match self {
            Error::Input { hint, .. }
            | Error::Model { hint, .. }
            | Error::Setting { hint, .. }
            | Error::Scorer { hint, .. }
            | Error::Device { hint, .. }
            | Error::DeviceMemory { hint, .. }
            | Error::RunFolder { hint, .. }
            | Error::Refused { hint, .. }
            | Error::NotFinite { hint, .. }
            | Error::NoResult { hint, .. } => Some(hint),
            Error::Io { .. }
            | Error::Gguf { .. }
            | Error::Decode { .. }
            | Error::PromptTooLong { .. }
            | Error::Training { .. }
            | Error::NotSteered { .. }
            | Error::Interrupted => None,
        }
    }

    /// What the user can do about it, if known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Input { hint, .. }
            | Error::Model { hint, .. }
            | Error::Setting { hint, .. }
            | Error::Scorer { hint, .. }
            | Error::Device { hint, .. }
            | Error::DeviceMemory { hint, .. }
            | Error::RunFolder { hint, .. }
            | Error::Refused { hint, .. }
            | Error::NotFinite { hint, .. }
            | Error::NoResult { hint, .. } => hint.clone(),
            Error::Gguf { .. } => Some(
                "download or convert the file again, and compare its size and sha256 with the source".into(),
            ),
            Error::PromptTooLong { is_learned: true, n_predict: 1.., .. } => {
                Some("shorten the text, or lower -n/--n-predict: -c/--ctx-size cannot add positions".into())
            }
            Error::PromptTooLong { is_learned: true, n_ctx_seq, .. } => Some(format!(
                "shorten the text (or use --max-tokens {n_ctx_seq}, where a command has it): -c/--ctx-size cannot add positions"
            )),
            Error::PromptTooLong { n_predict: 0, .. } => {
                Some("raise -c/--ctx-size, lower -np/--parallel, or shorten the text".into())
            }
            Error::PromptTooLong { .. } => Some(
                "raise -c/--ctx-size, lower -np/--parallel or -n/--n-predict, or shorten the prompt".into(),
            ),
            Error::Training { .. } => Some("lower --learning-rate, and choose a new folder with -o".into()),
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    Some("free some space and run the same command again".into())
                }
                io::ErrorKind::FileTooLarge => Some(
                    "raise the limit on the size of files (`ulimit -f`) and run the same command again"
                        .into(),
                ),
                io::ErrorKind::ReadOnlyFilesystem => Some("choose a folder that can be written to".into()),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether this is a usage error (exit code 2) rather than a failure (exit code 1).
    pub fn is_usage(&self) -> bool {
        matches!(self, Error::Setting { .. })
    }
}
