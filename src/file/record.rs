//! `run.json`: the settings of the run in a folder.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::atomic::write_atomic;
use super::temporary::is_internal;
use crate::error::{Error, Result};
use crate::finite;

/// JSON pointers to the program's version in `run.json`: in a training run, and in any other run.
const VERSION_POINTERS: [&str; 2] = ["/detox_gguf", "/run/tool_version"];

/// Name of the copy of `run.json`. A crash can zero the last file written, but hardly both.
const COPY: &str = "run.json.bak";

/// Reads the settings of the run in `folder`: `run.json`, or its copy if that is damaged. `None` without `run.json`.
///
/// # Errors
/// [`Error::RunFolder`] if both are damaged; [`Error::Io`].
pub fn read_record(folder: &Path) -> Result<Option<String>> {
    let (text, damage) = read_either(folder)?.unzip();
    if let Some(reason) = damage.flatten() {
        tracing::warn!("{}: run.json is damaged ({reason}); using its copy {COPY}", folder.display());
    }
    Ok(text)
}

/// As [`read_record`] without a warning, for a value that [`start_record`] will read again. `None` if both are damaged.
pub fn peek_record(folder: &Path) -> Option<String> {
    read_either(folder).ok().flatten().map(|(text, _)| text)
}

/// The settings of the run in `folder`, and why they come from the copy, if they do.
fn read_either(folder: &Path) -> Result<Option<(String, Option<String>)>> {
    match read_json(&folder.join("run.json"))? {
        Found::Nothing => Ok(None),
        Found::Json(text) => Ok(Some((text, None))),
        Found::Damaged(reason) => match read_json(&folder.join(COPY))? {
            Found::Json(text) => Ok(Some((text, Some(reason)))),
            Found::Nothing | Found::Damaged(_) => {
                let reason =
                    format!("run.json is damaged ({reason}), so the settings of this run are unknown");
                Err(Error::run_folder(folder, reason).with_hint("choose a new folder with -o"))
            }
        },
    }
}

/// Whether those of `copies` that exist are JSON objects that a crash cut off or zeroed.
pub(super) fn is_torn(copies: &[PathBuf; 2]) -> bool {
    let mut found = copies.iter().filter_map(|path| fs::read(path).ok()).peekable();
    let is_torn = |bytes: Vec<u8>| bytes.first().is_none_or(|byte| matches!(byte, b'{' | 0));
    found.peek().is_some() && found.all(is_torn)
}

enum Found {
    Nothing,
    Json(String),
    /// With the reason.
    Damaged(String),
}

fn read_json(path: &Path) -> Result<Found> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
        bytes => bytes.map_err(Error::io("read", path))?,
    };
    if bytes.is_empty() {
        return Ok(Found::Damaged("it is empty".into()));
    }
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(Found::Damaged("it has only zero bytes".into()));
    }
    Ok(match serde_json::from_slice::<Value>(&bytes) {
        Ok(_) => Found::Json(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) => Found::Damaged(error.to_string()),
    })
}

fn copies(folder: &Path) -> [PathBuf; 2] {
    [folder.join("run.json"), folder.join(COPY)]
}

/// Whether a folder has no files of a run but its record.
fn has_only_a_record(folder: &Path) -> Result<bool> {
    let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let mut names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    Ok(names.all(|name| name == "run.json" || name == COPY || is_internal(&name)))
}

/// Starts or resumes a run: writes its settings to `run.json`, or checks that they match those already there.
///
/// Everything in `record` must match for a run to resume, except the version of this program. If only that differs,
/// a warning names both versions, and `run.json` keeps the version that started the run.
///
/// # Errors
/// [`Error::RunFolder`] with the first setting that differs; [`Error::Io`].
pub fn start_record<T: Serialize>(folder: &Path, record: &T) -> Result<()> {
    let path = folder.join("run.json");
    finite::check_json(record)?;
    let text = serde_json::to_string_pretty(record).expect("settings are plain data") + "\n";
    let found = match read_record(folder) {
        Ok(Some(found)) => found,
        Ok(None) => return write_both(folder, &text),
        Err(Error::RunFolder { .. }) if is_torn(&copies(folder)) && has_only_a_record(folder)? => {
            tracing::warn!(
                "{}: it is damaged, and nothing else was written; starting the run again",
                path.display()
            );
            return write_both(folder, &text);
        }
        Err(error) => return Err(error),
    };
    if found == text {
        return restore(folder, &text);
    }
    let (difference, version) = compare_records(&found, &text);
    if let Some(difference) = difference {
        return Err(Error::run_folder(folder, format!("holds another run: {difference}")).with_hint(
            "choose a new folder with -o, or repeat the command that started this run to resume it",
        ));
    }
    if let Some((started, now)) = version {
        tracing::warn!(
            "{}: the run was started by detox-gguf {started} and continues with {now}: its results come from both",
            folder.display()
        );
    }
    restore(folder, &found)
}

/// Writes `run.json` and its copy.
fn write_both(folder: &Path, text: &str) -> Result<()> {
    write_atomic(&folder.join("run.json"), text.as_bytes())?;
    write_atomic(&folder.join(COPY), text.as_bytes())
}

/// Writes those of `run.json` and its copy that are not `text`.
fn restore(folder: &Path, text: &str) -> Result<()> {
    for path in copies(folder) {
        if fs::read(&path).ok().as_deref() != Some(text.as_bytes()) {
            write_atomic(&path, text.as_bytes())?;
        }
    }
    Ok(())
}

/// Compares two `run.json`. Gives the first difference in words, and both versions of this program if they differ.
fn compare_records(there: &str, here: &str) -> (Option<String>, Option<(String, String)>) {
    let parse = serde_json::from_str::<Value>;
    let (Ok(mut there), Ok(mut here)) = (parse(there), parse(here)) else {
        return (Some("run.json was changed".into()), None);
    };
    if !there.is_object() {
        return (Some("its run.json was not written by this program".into()), None);
    }
    let mut version = None;
    for pointer in VERSION_POINTERS {
        let (Some(started), Some(now)) = (there.pointer_mut(pointer), here.pointer_mut(pointer)) else {
            continue;
        };
        if let (Some(a), Some(b)) = (started.as_str(), now.as_str())
            && a != b
        {
            version = Some((a.to_owned(), b.to_owned()));
            *started = now.clone();
        }
    }
    (first_difference("", &there, &here), version)
}

/// Describes the first setting that differs between two records.
fn first_difference(name: &str, there: &Value, here: &Value) -> Option<String> {
    match (there, here) {
        (Value::Object(a), Value::Object(b)) => {
            a.keys().chain(b.keys()).find_map(|key| first_difference(key, &there[key], &here[key]))
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).find_map(|(a, b)| first_difference(name, a, b))
        }
        _ => (there != here).then(|| format!("{name} is {there} there, and {here} now")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A run folder whose `run.json` is `record`.
    fn run_folder(record: &Value) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        start_record(folder.path(), record).unwrap();
        folder
    }

    #[test]
    fn a_run_resumes_under_another_version_of_the_program() {
        let training = |version: &str| json!({"detox_gguf": version, "settings": {"rank": 2}});
        let evaluation = |version: &str| json!({"llama_cpp": "1", "run": {"tool_version": version, "k": 4}});
        for (started, now) in
            [(training("0.1.0"), training("0.2.0")), (evaluation("0.1.0"), evaluation("0.2.0"))]
        {
            let folder = run_folder(&started);
            let before = fs::read(folder.path().join("run.json")).unwrap();
            start_record(folder.path(), &now).unwrap();
            let after = fs::read(folder.path().join("run.json")).unwrap();
            assert!(before == after, "run.json keeps the version that started the run");
        }
        let (difference, version) =
            compare_records(&evaluation("a").to_string(), &evaluation("b").to_string());
        assert_eq!((difference, version), (None, Some(("a".into(), "b".into()))));
    }

    #[test]
    fn a_damaged_record_is_restored_from_its_copy() {
        let run = json!({"run": {"k": 4}});
        let before = fs::read(run_folder(&run).path().join("run.json")).unwrap();
        for (damaged, reason) in
            [("", "it is empty"), ("\0\0\0", "only zero bytes"), ("{\"run\"", "EOF"), ("x", "expected")]
        {
            let folder = run_folder(&run);
            let path = folder.path().join("run.json");
            fs::write(folder.path().join("generations.jsonl"), "row\n").unwrap();
            fs::write(&path, damaged).unwrap();
            let other = start_record(folder.path(), &json!({"run": {"k": 5}})).unwrap_err().to_string();
            assert!(other.contains("k is 4 there, and 5 now"), "{other}");
            start_record(folder.path(), &run).unwrap();
            assert_eq!(fs::read(&path).unwrap(), before);
            // Without a copy, as in folders of earlier versions.
            fs::write(&path, damaged).unwrap();
            fs::remove_file(folder.path().join(COPY)).unwrap();
            let error = start_record(folder.path(), &run).unwrap_err().to_string();
            assert!(error.contains("run.json is damaged") && error.contains(reason), "{error}");
            // If the run has written nothing, it starts again, unless the file is somebody else's.
            fs::remove_file(folder.path().join("generations.jsonl")).unwrap();
            if damaged == "x" {
                start_record(folder.path(), &run).unwrap_err();
                assert_eq!(fs::read(&path).unwrap(), b"x");
                continue;
            }
            start_record(folder.path(), &run).unwrap();
            assert_eq!(fs::read(&path).unwrap(), before);
        }
    }

    #[test]
    fn rejects_a_run_with_any_other_difference() {
        let run = |version: &str, llama_cpp: &str, k: u32| {
            let run = json!({"tool_version": version, "settings": {"k": k}});
            json!({"llama_cpp": llama_cpp, "run": run})
        };
        let folder = run_folder(&run("0.1.0", "1", 4));
        let refusal = |record: &Value| start_record(folder.path(), record).unwrap_err().to_string();
        assert!(refusal(&run("0.2.0", "1", 5)).contains("k is 4 there, and 5 now"));
        assert!(refusal(&run("0.1.0", "2", 4)).contains("llama_cpp is \"1\" there, and \"2\" now"));
        // Only the two known places hold the program's version.
        let elsewhere = |version: &str| json!({"run": {"scorer": {"tool_version": version}}});
        let folder = run_folder(&elsewhere("1"));
        assert!(start_record(folder.path(), &elsewhere("2")).is_err());
        // A record without a version is another run.
        let folder = run_folder(&json!({"run": {}}));
        assert!(start_record(folder.path(), &json!({"run": {"tool_version": "1"}})).is_err());
    }
}
