//! Refuses to compare perplexities of different tokens, and names the commands that make them comparable.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::eval::perplexity::PerplexityTokens;
use crate::eval::result::RunInfo;
use crate::eval::side::Side;

/// Checks that both runs measured perplexity on the same kind of tokens, if both have one.
///
/// # Errors
/// [`Error::RunFolder`], with the commands to follow as its hint.
pub(super) fn check(a: Side<'_>, b: Side<'_>) -> Result<()> {
    let (Some(of_a), Some(of_b)) = (a.run.perplexity_tokens, b.run.perplexity_tokens) else {
        return Ok(());
    };
    if of_a == of_b {
        return Ok(());
    }
    let reason = format!(
        "cannot compare its perplexity, of {} ({of_b}), with that of {}, of {} ({of_a})",
        of_b.in_words(),
        a.label,
        of_a.in_words()
    );
    Err(Error::run_folder(b.label, reason).with_hint(commands(a, b)))
}

/// The model behind a run's perplexity.
struct Judge {
    file: String,
    sha256: String,
}

impl Judge {
    fn of(run: &RunInfo) -> Option<Judge> {
        let text = |key: &str| Some(run.settings.get(key)?.as_str()?.to_owned());
        if let (Some(file), Some(sha256)) = (text("base"), text("base_sha256")) {
            return Some(Judge { file, sha256 });
        }
        let model = run.model.as_ref()?;
        Some(Judge { file: model.file.clone(), sha256: model.sha256.clone()? })
    }

    /// Its file, if one of the runs was given it and it still exists.
    fn path(&self, sides: [Side<'_>; 2]) -> Option<String> {
        let in_side = |side: Side<'_>| -> Option<String> {
            let paths = side.paths?;
            let of_model = side.run.model.as_ref().and_then(|model| model.sha256.as_deref());
            let of_base = side.run.settings.get("base_sha256").and_then(|hash| hash.as_str());
            [(of_base, &paths.base), (of_model, &paths.model)]
                .into_iter()
                .filter(|(hash, _)| *hash == Some(self.sha256.as_str()))
                .find_map(|(_, path)| path.clone().filter(|path| Path::new(path).exists()))
        };
        sides.into_iter().find_map(in_side)
    }
}

/// The commands that measure both runs on the retokenised text, and compare them.
fn commands(a: Side<'_>, b: Side<'_>) -> String {
    let is_retokenised = |side: &Side<'_>| side.run.perplexity_tokens == Some(PerplexityTokens::Retokenised);
    // The base of a run that is retokenised already, so that only the other one is measured again.
    let judge = match is_retokenised(&b) {
        true => Judge::of(b.run).or_else(|| Judge::of(a.run)),
        false => Judge::of(a.run).or_else(|| Judge::of(b.run)),
    };
    let path = judge.as_ref().and_then(|judge| judge.path([a, b]));
    let base = path.clone().or_else(|| judge.as_ref().map(|judge| judge.file.clone()));
    let base = base.unwrap_or_else(|| "MODEL.gguf".into());
    let mut text = String::from("measure both on the text tokenised again, then compare:");
    let folders = [a, b].map(|side| {
        if is_retokenised(&side) {
            return side.label.to_owned();
        }
        let output = beside(side.label);
        text.push_str(&format!(
            "\n  detox-gguf eval --rescore {} --base {} --perplexity retokenised -o {}",
            quoted(side.label),
            quoted(&base),
            quoted(&output)
        ));
        output
    });
    text.push_str(&format!("\n  detox-gguf compare {} {}", quoted(&folders[0]), quoted(&folders[1])));
    match (path, judge) {
        (Some(_), _) => {}
        (None, Some(judge)) => text.push_str(&format!(
            "\n{} is the model that measured perplexity (sha256 {}): give the path of that file",
            judge.file, judge.sha256
        )),
        (None, None) => text.push_str("\nMODEL.gguf is any model that can measure the perplexity of both"),
    }
    text.push_str("\nor leave perplexity out: compare --no-perplexity");
    text
}

/// A new folder beside the run's own.
fn beside(folder: &str) -> String {
    let path = Path::new(folder);
    let beside: PathBuf = match path.file_name() {
        Some(name) => path.with_file_name(format!("{}-retokenised", name.to_string_lossy())),
        None => path.join("..").join("retokenised"),
    };
    beside.to_string_lossy().into_owned()
}

/// A word of a command, in quotes if a shell would split or expand it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "_-./\\:+=,@%".contains(c);
    match word.chars().all(is_plain) && !word.is_empty() {
        // A backslash is a plain letter in Windows only.
        true if cfg!(windows) || !word.contains('\\') => word.to_owned(),
        _ if cfg!(windows) => format!("\"{word}\""),
        _ => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::eval::result::{ModelInfo, ModelPaths};

    fn run(tokens: PerplexityTokens, sha256: &str) -> RunInfo {
        let model = ModelInfo { file: "m.gguf".into(), sha256: Some(sha256.into()), ..ModelInfo::default() };
        RunInfo { model: Some(model), perplexity_tokens: Some(tokens), ..RunInfo::default() }
    }

    fn side<'a>(label: &'a str, run: &'a RunInfo, paths: Option<&'a ModelPaths>) -> Side<'a> {
        Side { label, run, samples: &[], paths }
    }

    #[test]
    fn every_pair_of_different_kinds_is_refused() {
        use PerplexityTokens::{Retokenised, Sampled, WithoutIds};
        for of_a in [Sampled, Retokenised, WithoutIds] {
            for of_b in [Sampled, Retokenised, WithoutIds] {
                let (a, b) = (run(of_a, "1"), run(of_b, "1"));
                let checked = check(side("a", &a, None), side("b", &b, None));
                assert_eq!(checked.is_ok(), of_a == of_b, "{of_a} {of_b}");
            }
        }
        let none = RunInfo::default();
        assert!(check(side("a", &run(Sampled, "1"), None), side("b", &none, None)).is_ok());
    }

    #[test]
    fn only_the_run_that_is_not_retokenised_is_measured_again_with_the_base_of_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base model.gguf");
        std::fs::write(&base, "").unwrap();
        let base = base.to_string_lossy().into_owned();
        let a = run(PerplexityTokens::Sampled, "1");
        let mut b = run(PerplexityTokens::Retokenised, "1");
        b.settings.insert("base".into(), json!("base model.gguf"));
        b.settings.insert("base_sha256".into(), json!("2"));
        let paths = ModelPaths { model: None, base: Some(base.clone()) };
        let hint = check(side("runs/a/", &a, None), side("b", &b, Some(&paths))).unwrap_err().hint().unwrap();
        let lines: Vec<&str> = hint.lines().map(str::trim).collect();
        assert_eq!(
            lines[1],
            format!(
                "detox-gguf eval --rescore runs/a/ --base {} --perplexity retokenised -o runs/a-retokenised",
                quoted(&base)
            )
        );
        assert_eq!(lines[2], "detox-gguf compare runs/a-retokenised b");
        // Without a path the hash says which file is meant.
        let hint = check(side("a", &a, None), side("b", &b, None)).unwrap_err().hint().unwrap();
        assert!(hint.contains("(sha256 2)"), "{hint}");
    }

    #[cfg(unix)]
    #[test]
    fn a_path_is_one_word_of_the_command() {
        assert_eq!(quoted("runs/a-1.gguf"), "runs/a-1.gguf");
        assert_eq!(quoted("my runs/it's"), "'my runs/it'\\''s'");
        assert_eq!(beside("."), "./../retokenised");
    }
}
