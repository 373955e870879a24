//! Everything that the program prints: results and data to standard output, messages to standard error.
//!
//! Text of people's files reaches the terminal only through here, with control and bidi characters escaped. Results
//! are printed last: a reader that has closed the pipe (`| head`) does not lose a file, and hides no error.

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::Ordering;

use crate::error::{Error, Result};
use crate::file::AtomicFile;
use crate::file::output::{Form, Paths};
use crate::text::printable::{printable, printable_coloured, printable_json, printable_lines};

/// Whether to use colour: on terminals, unless `NO_COLOR` is set (<https://no-color.org>).
pub fn may_colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Prints a result for people to standard output, such as a table.
///
/// A closed pipe is no error: the files are written, and nobody reads the table.
///
/// # Errors
/// [`Error::Io`], for instance if the disk of a redirected output is full.
pub fn print(text: &str) -> Result<()> {
    let text = if may_colour(&io::stdout()) { printable_coloured(text) } else { printable_lines(text) };
    match write_stdout(text.as_bytes()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(Error::io("write", STDOUT)),
    }
}

/// Prints JSON to standard output. Fails if the pipe is closed, as the output is then incomplete.
///
/// # Errors
/// [`Error::Io`].
pub fn print_json(json: &str) -> Result<()> {
    let json = if io::stdout().is_terminal() { printable_json(json) } else { json.into() };
    write_stdout(json.as_bytes()).map_err(Error::io("write", STDOUT))
}

/// Prints a message of one line to standard error.
pub fn note(line: &str) {
    write_stderr(&printable(line));
}

/// Prints a message of several lines to standard error, such as a table.
pub fn note_lines(text: &str) {
    write_stderr(printable_lines(text).trim_end_matches('\n'));
}

/// Prints an error with its hint to standard error.
pub fn error(error: &Error) {
    // `head` and others close the pipe on purpose. As with Unix tools, the exit code says it, without a message.
    if let Error::Io { path, source, .. } = error
        && source.kind() == ErrorKind::BrokenPipe
        && path == Path::new(STDOUT)
    {
        return;
    }
    note(&format!("error: {error}"));
    if let Some(hint) = error.hint() {
        // A hint may list commands. Its other lines are indented, so that no name of a file can pass for a message.
        let mut lines = hint.lines();
        note(&format!("hint: {}", lines.next().unwrap_or_default()));
        lines.for_each(|line| note(&format!("  {line}")));
    }
}

const STDOUT: &str = "<stdout>";

fn write_stdout(bytes: &[u8]) -> io::Result<()> {
    if super::STDOUT_WAS_CLOSED.load(Ordering::Relaxed) {
        return Err(io::Error::other("it is closed"));
    }
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush())
}

/// `eprintln!` would panic if standard error is closed.
fn write_stderr(text: &str) {
    let _ = io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}

/// Rows of JSON to standard output, or to a file that appears when it is complete.
#[derive(Debug)]
pub enum Rows {
    /// Written at once.
    Stdout,
    /// Complete after [`Rows::finish`].
    File(AtomicFile),
}

impl Rows {
    /// Opens the output now, so that a folder that cannot be written to is found before the work.
    pub fn open(output: Option<&Path>) -> Result<Rows> {
        output.map_or(Ok(Rows::Stdout), |path| AtomicFile::create(path).map(Rows::File))
    }

    /// Writes JSON lines.
    pub fn write(&mut self, lines: &[u8]) -> Result<()> {
        match self {
            Rows::Stdout => print_json(&String::from_utf8_lossy(lines)),
            Rows::File(file) => file.write_all(lines),
        }
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<()> {
        match self {
            Rows::Stdout => Ok(()),
            Rows::File(file) => file.commit(),
        }
    }
}

/// Adds the output of [`Rows`] to the files of a command.
pub fn writes_rows(paths: Paths, output: Option<&Path>) -> Paths {
    match named(output) {
        Some(file) => paths.writes(file, Form::Text),
        None => paths.writes_stdout(),
    }
}

/// The output, or `None` for standard output: without `-o`, and for `-o -` and `-o /dev/stdout`.
///
/// `/dev/stdout` may be a redirected file, which must be appended to, and not replaced.
pub fn named(output: Option<&Path>) -> Option<&Path> {
    output.filter(|path| {
        !["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|s| *path == Path::new(s))
    })
}

/// Writes the log to standard error, with the text of people's files escaped.
#[derive(Debug, Clone, Copy)]
pub struct Log {
    /// Whether the log has colours.
    pub has_colour: bool,
}

impl Write for Log {
    /// Receives one event with its final line feed.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let line = text.trim_end_matches('\n');
        write_stderr(&match self.has_colour {
            true => printable_coloured(&line.replace('\n', "\\n")).into_owned(),
            false => printable(line).into_owned(),
        });
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
