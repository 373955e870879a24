//! One error type for the library: each variant names the thing, what was expected and what was found.

use std::io;
use std::path::{Path, PathBuf};

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, in words a person can act on.
///
/// [`Error::hint`] holds the cure where there is one; the command line prints it on its own line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused: a missing file, no permission, a full disk.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// A verb for the attempt: "read", "write", "create".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's own words.
        source: io::Error,
    },

    /// A text file that a user gave is not of the form that was expected.
    #[error("{}{}: {reason}", path.display(), line.map(|n| format!(":{n}")).unwrap_or_default())]
    Input {
        /// The file, or `<stdin>`.
        path: PathBuf,
        /// Line number, from 1, where one line is at fault.
        line: Option<usize>,
        /// What was expected and what was found.
        reason: String,
        /// The cure, where there is one.
        hint: Option<String>,
    },

    /// A file is not a GGUF that can be trusted: foreign, truncated, or inconsistent.
    #[error("{}: not a usable GGUF file: {reason}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found, with the key or tensor at fault.
        reason: String,
    },

    /// A GGUF that is well formed, but not a model that this program can run.
    #[error("{}: cannot run this model: {reason}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
        /// The cure, where there is one.
        hint: Option<String>,
    },

    /// A setting is outside its range, or two settings contradict each other.
    #[error("{setting}: {reason}")]
    Setting {
        /// The flag as typed, such as `--top-p`.
        setting: String,
        /// The range, and the value found.
        reason: String,
        /// The cure, where there is one.
        hint: Option<String>,
    },

    /// llama.cpp refused a batch.
    #[error("llama.cpp could not decode a batch of {n_tokens} tokens: {reason}")]
    Decode {
        /// Tokens in the batch.
        n_tokens: usize,
        /// Its return code, in words.
        reason: String,
    },

    /// A prompt does not fit into the context together with its continuation.
    #[error(
        "prompt {prompt:?} has {n_prompt} tokens and {n_predict} are to be generated, but a sequence holds {n_ctx_seq}"
    )]
    PromptTooLong {
        /// The prompt's id.
        prompt: String,
        /// Tokens in the prompt.
        n_prompt: usize,
        /// Tokens asked for.
        n_predict: usize,
        /// Tokens that one sequence of the session holds.
        n_ctx_seq: usize,
    },

    /// A scorer cannot be used, or gave no usable score.
    #[error("scorer {scorer}: {reason}")]
    Scorer {
        /// The scorer's name.
        scorer: String,
        /// Why.
        reason: String,
        /// The cure, where there is one.
        hint: Option<String>,
    },

    /// A run folder cannot be used for what was asked.
    #[error("{}: {reason}", path.display())]
    RunFolder {
        /// The folder.
        path: PathBuf,
        /// Why.
        reason: String,
        /// The cure, where there is one.
        hint: Option<String>,
    },

    /// A GPU cannot be used, or failed.
    #[error("{device}: {reason}")]
    Device {
        /// Which, as on the command line: `cuda:0`.
        device: String,
        /// What was wanted, and what came of it.
        reason: String,
        /// The cure, where there is one.
        hint: Option<String>,
    },

    /// The memory of a GPU, or of the CPU, does not suffice.
    #[error("{device}: {reason}")]
    DeviceMemory {
        /// Which, as on the command line: `cuda:0`.
        device: String,
        /// How much was wanted, and how much there is.
        reason: String,
        /// The cure, where there is one.
        hint: Option<String>,
    },

    /// Training cannot go on: its numbers are no numbers any more.
    #[error("training cannot go on: {reason}")]
    Training {
        /// What is not finite.
        reason: String,
    },

    /// What another program decoded was not steered as it should have been.
    #[error("this decode was not steered as it should be: {reason}")]
    NotSteered {
        /// What the graph lacked, or what was not said of the batch.
        reason: String,
    },

    /// Steering that is not possible as things are set up.
    #[error("{what}: {reason}")]
    Refused {
        /// What was asked for.
        what: String,
        /// Why it is not possible.
        reason: String,
        /// What to set up otherwise.
        hint: Option<String>,
    },

    /// The work was done, and nothing came of it that could be written.
    #[error("{reason}")]
    NoResult {
        /// What was wanted, and what came of it.
        reason: String,
        /// The cure, where there is one.
        hint: Option<String>,
    },

    /// The user pressed Ctrl-C; a run's finished units are on disk.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// An [`Error::Io`] for `map_err`: `File::open(p).map_err(Error::io("open", p))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// An [`Error::Setting`] without a hint.
    pub fn setting(setting: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Setting { setting: setting.into(), reason: reason.into(), hint: None }
    }

    /// An [`Error::Input`] for one line of a file, or for the whole file.
    pub fn input(path: impl AsRef<Path>, line: Option<usize>, reason: impl Into<String>) -> Error {
        Error::Input { path: path.as_ref().to_path_buf(), line, reason: reason.into(), hint: None }
    }

    /// An [`Error::Gguf`]; its hint is fixed.
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

    /// An [`Error::NoResult`] without a hint.
    pub fn no_result(reason: impl Into<String>) -> Error {
        Error::NoResult { reason: reason.into(), hint: None }
    }

    /// This error with a hint: what the user can do about it.
    ///
    /// Variants whose hint is fixed, such as [`Error::Gguf`], keep theirs.
    pub fn with_hint(mut self, text: impl Into<String>) -> Error {
        match &mut self {
            Error::Input { hint, .. }
            | Error::Model { hint, .. }
            | Error::Setting { hint, .. }
            | Error::Scorer { hint, .. }
            | Error::Device { hint, .. }
            | Error::DeviceMemory { hint, .. }
            | Error::RunFolder { hint, .. }
            | Error::Refused { hint, .. }
            | Error::NoResult { hint, .. } => *hint = Some(text.into()),
            _ => {}
        }
        self
    }

    /// [`Error::with_hint`] if there is a hint.
    pub fn with_optional_hint(self, hint: Option<impl Into<String>>) -> Error {
        match hint {
            Some(hint) => self.with_hint(hint),
            None => self,
        }
    }

    /// What the user can do about it, where there is a cure.
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
            | Error::NoResult { hint, .. } => hint.clone(),
            Error::Gguf { .. } => Some(
                "download or convert the file again, and compare its size and sha256 with the source".into(),
            ),
            Error::PromptTooLong { .. } => Some(
                "raise -c/--ctx-size, lower -np/--parallel or -n/--n-predict, or shorten the prompt".into(),
            ),
            Error::Training { .. } => Some("lower --learning-rate, and choose a new folder with -o".into()),
            Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("free some space and run the same command again".into())
            }
            _ => None,
        }
    }

    /// Whether the command line itself was at fault (exit code 2) rather than the work (exit code 1).
    pub fn is_usage(&self) -> bool {
        matches!(self, Error::Setting { .. })
    }
}
