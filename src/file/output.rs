//! The check that every command makes before it starts: an output harms no other file.
//!
//! - An output is never an input of the same command, nor another output. Files are compared by identity, so links,
//!   other spellings and case-insensitive file systems do not matter.
//! - An output is never inside the folder of another run, at any depth, nor one of the files of a report.
//! - An output folder is new, empty, or holds a run or report of the same command.

use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::atomic::follow;
use super::lock::{FolderLock, is_own, lock_folder};
use super::record::is_torn;
use super::{AtomicFile, base_name, is_internal};
use crate::error::{Error, Result};

/// The files that a command reads and writes.
#[derive(Debug, Clone, Default)]
pub struct Paths {
    inputs: Vec<PathBuf>,
    reads_stdin: bool,
    outputs: Vec<Output>,
}

/// A place that a command writes to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Output {
    /// A file that the user named.
    File(PathBuf, Form),
    /// A file next to a named one. An existing one is only replaced if it starts with this mark.
    Beside(PathBuf, &'static [u8]),
    Stdout,
    Folder(PathBuf, FolderKind),
    /// A folder for temporary files only.
    Scratch(PathBuf),
}

/// What an output file contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Text, which may also go to a device or a pipe.
    Text,
    /// GGUF, which needs a plain file.
    Gguf,
}

/// The command that a folder belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FolderKind {
    /// A run of `eval`.
    Eval,
    /// A run of `train`.
    Train,
    /// The runs of a `sweep`.
    Sweep,
    /// The report of `compare`.
    Compare,
    /// The report of `activations`.
    Activations,
    /// The report of `retrieval`.
    Retrieval,
}

impl FolderKind {
    const ALL: [FolderKind; 6] = [
        FolderKind::Eval,
        FolderKind::Train,
        FolderKind::Sweep,
        FolderKind::Compare,
        FolderKind::Activations,
        FolderKind::Retrieval,
    ];

    /// The command's name.
    fn command(self) -> &'static str {
        match self {
            FolderKind::Eval => "eval",
            FolderKind::Train => "train",
            FolderKind::Sweep => "sweep",
            FolderKind::Compare => "compare",
            FolderKind::Activations => "activations",
            FolderKind::Retrieval => "retrieval",
        }
    }

    /// A JSON file that the command writes first, and keys that only this command writes there.
    fn mark(self) -> (&'static str, &'static [&'static str]) {
        match self {
            FolderKind::Eval => ("run.json", &["format", "run"]),
            FolderKind::Train => ("run.json", &["detox_gguf", "settings"]),
            FolderKind::Sweep => ("sweep.json", &["what", "points", "pareto"]),
            FolderKind::Compare => ("comparison.json", &["label_a", "label_b"]),
            FolderKind::Activations => ("activations.json", &["n_neurons", "languages"]),
            FolderKind::Retrieval => ("retrieval.json", &["pivot", "places"]),
        }
    }

    /// Whether the folder can be resumed or measured further. Nothing else may be written there.
    fn is_run(self) -> bool {
        matches!(self, FolderKind::Eval | FolderKind::Train | FolderKind::Sweep)
    }

    /// Whether `folder` holds the work of this command.
    fn is_in(self, folder: &Path) -> bool {
        let (name, keys) = self.mark();
        // A run has a second copy of its record, for a crash that damages the first.
        let copies = [folder.join(name), folder.join(format!("{name}.bak"))];
        let found: Vec<Value> = copies.iter().filter_map(|path| read_object(path)).collect();
        let is_marked = found.iter().any(|object| keys.iter().all(|&key| object.get(key).is_some()));
        // Opening the run says what is damaged, and what to do.
        let has_record = matches!(self, FolderKind::Eval | FolderKind::Train);
        is_marked || has_record && found.is_empty() && is_torn(&copies)
    }

    /// Whether `folder` holds the work of this command, or the start of it.
    fn is_begun_in(self, folder: &Path) -> bool {
        // An interrupted sweep has runs, but no report yet.
        let is_begun = || self == FolderKind::Sweep && FolderKind::Eval.is_in(&folder.join("baseline"));
        self.is_in(folder) || is_begun()
    }
}

/// The file as a JSON object; `None` if it is anything else.
fn read_object(path: &Path) -> Option<Value> {
    let value: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    value.is_object().then_some(value)
}

/// The command whose run or report `folder` holds.
fn owner(folder: &Path) -> Option<FolderKind> {
    FolderKind::ALL.into_iter().find(|kind| kind.is_in(folder))
}

impl Paths {
    /// No files.
    pub fn new() -> Paths {
        Paths::default()
    }

    /// Adds files or folders that the command reads.
    ///
    /// A part of a split model stands for all its parts, and a folder for the files in it.
    pub fn reads<P: AsRef<Path>>(mut self, inputs: impl IntoIterator<Item = P>) -> Paths {
        self.inputs.extend(inputs.into_iter().map(|path| path.as_ref().to_path_buf()));
        self
    }

    /// Adds standard input.
    pub fn reads_stdin(mut self) -> Paths {
        self.reads_stdin = true;
        self
    }

    /// Adds a file that the command writes, as the user named it.
    pub fn writes(mut self, file: impl Into<PathBuf>, form: Form) -> Paths {
        self.outputs.push(Output::File(file.into(), form));
        self
    }

    /// Adds a file that the command writes next to a named one. An existing one is only replaced if it starts with
    /// `mark`.
    pub fn writes_beside(mut self, file: impl Into<PathBuf>, mark: &'static [u8]) -> Paths {
        self.outputs.push(Output::Beside(file.into(), mark));
        self
    }

    /// Adds standard output, for data rather than for messages.
    pub fn writes_stdout(mut self) -> Paths {
        self.outputs.push(Output::Stdout);
        self
    }

    /// Adds a folder that the command writes its files to.
    pub fn writes_folder(mut self, folder: impl Into<PathBuf>, kind: FolderKind) -> Paths {
        self.outputs.push(Output::Folder(folder.into(), kind));
        self
    }

    /// Adds a folder that the command writes only temporary files to.
    pub fn writes_scratch(mut self, folder: impl Into<PathBuf>) -> Paths {
        self.outputs.push(Output::Scratch(folder.into()));
        self
    }

    /// Whether `path` was declared as an input.
    pub fn has_input(&self, path: &Path) -> bool {
        self.inputs.iter().any(|input| input == path)
    }

    /// Whether `path` was declared as an output.
    pub fn has_output(&self, path: &Path) -> bool {
        self.outputs.iter().any(|output| output.path().is_some_and(|output| output == path))
    }

    /// Checks that the outputs can be written and harm no other file.
    ///
    /// # Errors
    /// [`Error::Setting`] for an output that is an input or another output, of the wrong kind, or in the folder of a
    /// run; [`Error::RunFolder`] for a folder of another command or with other files; [`Error::Io`].
    pub fn check(&self) -> Result<()> {
        let inputs = self.input_identities();
        for output in self.outputs.iter().filter(|output| !matches!(output, Output::Scratch(_))) {
            if let Some((_, input)) = output.identity().and_then(|o| inputs.iter().find(|(i, _)| *i == o)) {
                return Err(is_input(&output.name(), input));
            }
            match output {
                Output::File(file, form) => check_file(file, *form)?,
                Output::Beside(file, mark) => check_beside(file, mark)?,
                Output::Folder(folder, _) => {
                    check_name(folder)?;
                    self.check_inputs_outside(folder)?;
                    check_above(folder, false)?;
                }
                Output::Stdout | Output::Scratch(_) => {}
            }
        }
        self.check_outputs_differ()?;
        for output in &self.outputs {
            match output {
                Output::Folder(folder, kind) => check_folder(folder, *kind)?,
                Output::File(file, _) | Output::Beside(file, _) => check_writable(file)?,
                Output::Stdout | Output::Scratch(_) => {}
            }
        }
        Ok(())
    }

    /// The identity of each input, with the name to show.
    fn input_identities(&self) -> Vec<(Identity, String)> {
        let mut found = Vec::new();
        let mut add = |path: &Path| found.extend(identity(path).map(|id| (id, path.display().to_string())));
        for input in &self.inputs {
            add(input);
            other_parts(input).iter().for_each(|part| add(part));
            // Prompts may be one folder deeper, in a folder for each language.
            for entry in list(input) {
                if entry.is_dir() { list(&entry).iter().for_each(|path| add(path)) } else { add(&entry) }
            }
        }
        if self.reads_stdin {
            found.extend(standard_stream(&std::io::stdin()).map(|id| (id, "<stdin>".to_owned())));
        }
        found
    }

    /// Checks that no input is the folder itself or a file in it.
    fn check_inputs_outside(&self, folder: &Path) -> Result<()> {
        let Some(of_folder) = identity(folder) else { return Ok(()) };
        for input in &self.inputs {
            let parent = fs::canonicalize(input).ok().and_then(|path| path.parent().and_then(identity));
            if !input.is_dir() && parent.is_some_and(|parent| parent == of_folder) {
                let reason = format!("the input {} is in the folder {}", input.display(), folder.display());
                return Err(Error::setting(FLAG, reason).with_hint(NEW_FOLDER));
            }
        }
        Ok(())
    }

    fn check_outputs_differ(&self) -> Result<()> {
        for (i, output) in self.outputs.iter().enumerate() {
            if let Some(other) = self.outputs[..i].iter().find(|other| output.is_same(other)) {
                let reason = format!("{} and {} are the same file", other.name(), output.name());
                return Err(Error::setting(FLAG, reason).with_hint("choose another name with -o"));
            }
        }
        Ok(())
    }
}

const FLAG: &str = "-o/--output";
const NEW_FOLDER: &str = "choose a new folder with -o";

fn is_input(output: &str, input: &str) -> Error {
    let link = if output == input { String::new() } else { format!(" (it is the same file as {input})") };
    let reason = format!("{output} is an input of this command and would be overwritten{link}");
    let is_stream = output == "<stdout>";
    Error::setting(FLAG, reason).with_hint(match is_stream {
        true => "redirect standard output to another file, or use -o",
        false => "choose another name with -o",
    })
}

impl Output {
    fn path(&self) -> Option<&Path> {
        match self {
            Output::File(path, _)
            | Output::Beside(path, _)
            | Output::Folder(path, _)
            | Output::Scratch(path) => Some(path),
            Output::Stdout => None,
        }
    }

    fn name(&self) -> String {
        self.path().map_or("<stdout>".into(), |path| path.display().to_string())
    }

    fn identity(&self) -> Option<Identity> {
        self.path().map_or_else(|| standard_stream(&std::io::stdout()), identity)
    }

    /// Whether both are the same file, even if it does not exist yet.
    fn is_same(&self, other: &Output) -> bool {
        if let (Some(a), Some(b)) = (self.identity(), other.identity()) {
            return a == b;
        }
        let place = |output: &Output| {
            let path = follow(output.path()?);
            // Some file systems ignore case. No command needs two names that differ only in it.
            Some((identity(parent_of(&path))?, base_name(&path).to_lowercase()))
        };
        place(self).is_some_and(|place_of_self| place(other) == Some(place_of_self))
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Refuses `-` from a command that cannot write to standard output.
fn check_name(path: &Path) -> Result<()> {
    if path != Path::new("-") {
        return Ok(());
    }
    let reason = "expected a name, found -: this command cannot write to standard output";
    Err(Error::setting(FLAG, reason).with_hint("for a file or folder of that name give ./-"))
}

/// Refuses an output inside the folder of a run, at any depth. A run may write to folders in its own.
///
/// `in_itself` is whether `output` itself is looked at too.
fn check_above(output: &Path, in_itself: bool) -> Result<()> {
    let absolute = std::path::absolute(follow(output)).unwrap_or_else(|_| output.to_path_buf());
    let Some(existing) = absolute.ancestors().find_map(|path| Some((path, fs::canonicalize(path).ok()?)))
    else {
        return Ok(());
    };
    let (there, real) = existing;
    let is_output = there == absolute;
    let above = real.ancestors().skip(usize::from(is_output && !in_itself));
    for folder in above {
        let owner = FolderKind::ALL.into_iter().find(|kind| kind.is_run() && kind.is_in(folder));
        if let Some(owner) = owner.filter(|_| !is_own(folder)) {
            let reason = format!(
                "expected a place outside of any run, found {} in the folder of a run of `{}`",
                output.display(),
                owner.command()
            );
            return Err(Error::setting(FLAG, reason).with_hint("choose a name in another folder with -o"));
        }
    }
    Ok(())
}

/// Checks a file that the user named.
fn check_file(file: &Path, form: Form) -> Result<()> {
    let refuse = |reason: String| Error::setting(FLAG, reason);
    check_name(file)?;
    // The file itself, if `file` is a link.
    let real = follow(file);
    let folder = parent_of(&real);
    if !folder.is_dir() {
        let reason = format!("expected a file in an existing folder, found no folder {}", folder.display());
        return Err(refuse(reason).with_hint("create the folder first, or write elsewhere"));
    }
    if let Ok(found) = fs::metadata(file) {
        if found.is_dir() {
            return Err(refuse(format!("expected a file to write, found the folder {}", file.display())));
        }
        if !found.is_file() && form == Form::Gguf {
            return Err(refuse(format!(
                "expected a plain file to write, found a device at {}",
                file.display()
            )));
        }
        if found.is_file() && form == Form::Text && starts_with(file, b"GGUF") {
            let reason = format!("{} is a GGUF file, and would be replaced by text", file.display());
            return Err(refuse(reason).with_hint("choose another name with -o"));
        }
    }
    for folder in [parent_of(file), folder] {
        check_above(folder, true)?;
        let Some(owner) = owner(folder) else { continue };
        if base_name(file).starts_with(owner.mark().0.trim_end_matches("json")) {
            let reason = format!(
                "expected a file outside of any run, found {} in the folder of a run of `{}`",
                file.display(),
                owner.command()
            );
            return Err(refuse(reason).with_hint("choose a name in another folder with -o"));
        }
    }
    Ok(())
}

/// Checks a file next to a named one.
fn check_beside(file: &Path, mark: &[u8]) -> Result<()> {
    check_file(file, Form::Text)?;
    let is_ours = |found: Metadata| found.len() == 0 || starts_with(file, mark);
    match fs::metadata(file) {
        Ok(found) if !(found.is_file() && is_ours(found.clone())) => {
            let reason =
                format!("{} would be overwritten, and this command did not write it", file.display());
            Err(Error::setting(FLAG, reason).with_hint("choose another name with -o, or move that file"))
        }
        _ => Ok(()),
    }
}

fn starts_with(file: &Path, start: &[u8]) -> bool {
    use std::io::Read;
    let mut found = Vec::new();
    let read = fs::File::open(file).and_then(|f| f.take(start.len() as u64).read_to_end(&mut found));
    read.is_ok() && found == start
}

/// Checks that a plain file can be written. Opening a pipe here would take its reader away.
fn check_writable(file: &Path) -> Result<()> {
    match fs::metadata(file) {
        Ok(found) if !found.is_file() => Ok(()),
        _ => AtomicFile::create(file).map(drop),
    }
}

/// Checks that `folder` is new, empty, or holds a run or report of this kind.
///
/// # Errors
/// [`Error::RunFolder`] if it holds anything else; [`Error::Io`].
pub fn check_folder(folder: &Path, kind: FolderKind) -> Result<()> {
    match fs::metadata(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Ok(found) if !found.is_dir() => {
            return Err(Error::io("create", folder)(std::io::ErrorKind::AlreadyExists.into()));
        }
        _ => {}
    }
    let mut foreign = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let name = entry.map_err(Error::io("read", folder))?.file_name().to_string_lossy().into_owned();
        // A killed sweep may have created the folder of its first run and nothing in it.
        let is_first_run = kind == FolderKind::Sweep && name == "baseline";
        if !is_internal(&name) && !is_first_run {
            foreign.push(name);
        }
    }
    let command = kind.command();
    let found = match owner(folder) {
        _ if foreign.is_empty() || kind.is_begun_in(folder) => return Ok(()),
        Some(owner) => format!("one of `{}`", owner.command()),
        None => {
            foreign.sort();
            let rest = foreign.len().saturating_sub(3);
            let rest = if rest > 0 { format!(" and {rest} more") } else { String::new() };
            foreign.truncate(3);
            format!("other files: {}{rest}", foreign.join(", "))
        }
    };
    let noun = if kind.is_run() { "run" } else { "report" };
    let reason = format!("expected an empty folder or a {noun} of `{command}`, found {found}");
    Err(Error::run_folder(folder, reason).with_hint(NEW_FOLDER))
}

/// Creates and locks `folder`. Refuses one that is in use, or holds anything but a run or report of this kind.
///
/// # Errors
/// Those of [`lock_folder`] and [`check_folder`].
pub fn open_folder(folder: &Path, kind: FolderKind) -> Result<FolderLock> {
    // Before it is locked, to leave no trace in a folder that is refused; and after, because another command may have
    // written to it in between.
    check_folder(folder, kind)?;
    let lock = lock_folder(folder)?;
    check_folder(folder, kind)?;
    Ok(lock)
}

/// Existing files with the names of the other parts of a split model, `<name>-00001-of-0000N.gguf`.
fn other_parts(path: &Path) -> Vec<PathBuf> {
    let name = base_name(path);
    let Some((stem, n_parts)) = split_name(&name) else { return Vec::new() };
    let is_part = |other: &Path| split_name(&base_name(other)) == Some((stem, n_parts));
    list(parent_of(path)).into_iter().filter(|other| is_part(other)).collect()
}

/// The name without its part number, and the number of parts as written.
fn split_name(name: &str) -> Option<(&str, &str)> {
    let (rest, n_parts) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    (is_number(part) && is_number(n_parts)).then_some((stem, n_parts))
}

/// The entries of a folder; none if it is no folder or cannot be read, which the command finds out itself.
fn list(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).map(|entries| entries.flatten().map(|e| e.path()).collect()).unwrap_or_default()
}

/// What tells two files apart, whatever their paths.
#[cfg(unix)]
type Identity = (u64, u64);
#[cfg(not(unix))]
type Identity = PathBuf;

/// The identity of a file or folder; `None` for a missing one, and for devices and pipes, which may be read and
/// written at the same time.
#[cfg(unix)]
fn identity(path: &Path) -> Option<Identity> {
    fs::metadata(path).ok().and_then(|found| identity_of(&found))
}

#[cfg(unix)]
fn identity_of(found: &Metadata) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt;
    (found.is_file() || found.is_dir()).then(|| (found.dev(), found.ino()))
}

#[cfg(not(unix))]
fn identity(path: &Path) -> Option<Identity> {
    fs::canonicalize(path).ok()
}

/// The identity of the file that a standard stream was redirected to or from.
#[cfg(unix)]
fn standard_stream(stream: &impl std::os::fd::AsFd) -> Option<Identity> {
    let file = fs::File::from(stream.as_fd().try_clone_to_owned().ok()?);
    file.metadata().ok().and_then(|found| identity_of(&found))
}

#[cfg(not(unix))]
fn standard_stream<T>(_: &T) -> Option<Identity> {
    None
}

#[cfg(test)]
mod tests;
