//! Parses `--steer FILE[:COEF]`, and llama.cpp's flags that take files with scales.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::control_vector::ControlVectorFile;
use super::intervention::{self, Interventions};
use super::{json, misspelt, neuron};
use crate::error::{Error, Result};

/// A parsed `--steer FILE[:COEF]`.
#[derive(Debug, Clone, PartialEq)]
pub struct SteerArgument {
    /// An intervention file or a control vector.
    pub path: PathBuf,
    /// Multiplies the coefficients in the file; 1 by default.
    pub coefficient: f32,
}

/// The content of a `--steer` file.
#[derive(Debug, Clone, PartialEq)]
pub enum SteerFile {
    /// JSON written for this program.
    Interventions(Interventions),
    /// GGUF from this program, llama.cpp or repeng.
    ControlVector(ControlVectorFile),
}

impl SteerArgument {
    /// Splits `text` into path and coefficient.
    ///
    /// Paths may contain colons. The text after the last colon is the coefficient if it is a number, unless
    /// a file with the whole text as its name exists and one with the shorter name does not.
    ///
    /// # Errors
    /// [`Error::Setting`] if the path is empty, or the coefficient is not finite or misspelt (`f:-0,5`).
    pub fn parse(text: &str) -> Result<SteerArgument> {
        let refuse = |reason: String| Err(Error::setting("--steer", reason));
        let whole = || match misspelt::refuse(text) {
            Some(error) => Err(error),
            None => Ok(SteerArgument { path: text.into(), coefficient: 1.0 }),
        };
        if text.is_empty() {
            return refuse("expected FILE or FILE:COEFFICIENT, found nothing".into());
        }
        let Some((path, number)) = text.rsplit_once(':') else { return whole() };
        let Ok(coefficient) = number.parse::<f32>() else { return whole() };
        if !Path::new(path).exists() && Path::new(text).exists() {
            return whole();
        }
        if path.is_empty() {
            return refuse(format!("expected FILE:COEFFICIENT, found no file name in {text:?}"));
        }
        if !coefficient.is_finite() {
            return refuse(format!("expected a finite coefficient after the last ':', found {number:?}"));
        }
        if !Path::new(path).exists()
            && let Some(error) = misspelt::refuse(text)
        {
            return Err(error);
        }
        Ok(SteerArgument { path: path.into(), coefficient })
    }

    /// Reads the file.
    ///
    /// # Errors
    /// As [`SteerFile::open`].
    pub fn open(&self) -> Result<(SteerFile, f32)> {
        Ok((SteerFile::open(&self.path)?, self.coefficient))
    }
}

impl SteerFile {
    /// Reads an intervention file or a control vector.
    ///
    /// The content decides which one it is, not the file name.
    ///
    /// # Errors
    /// As [`Interventions::read`] and [`ControlVectorFile::read`]. [`Error::Input`] for a list of neurons,
    /// which does not say how to change them; the hint shows how to make an intervention from it.
    pub fn open(path: &Path) -> Result<SteerFile> {
        let mut magic = Vec::new();
        crate::gguf::check_regular(path)?;
        let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
        file.take(4).read_to_end(&mut magic).map_err(Error::io("read", path))?;
        if magic == b"GGUF" {
            return Ok(SteerFile::ControlVector(ControlVectorFile::read(path)?));
        }
        let text = json::read_text(path)?;
        let is_neurons = match text.trim_start().chars().next() {
            Some('[') => true,
            Some('{') => json::kind(path, &text)?.as_deref() == Some(neuron::KIND),
            _ => {
                let reason = format!(
                    "expected a control vector (GGUF) or {} (JSON), found neither",
                    intervention::KIND
                );
                return Err(Error::input(path, None, reason));
            }
        };
        if is_neurons {
            let reason =
                "expected interventions, found a list of neurons, which does not say how to change them";
            let hint = format!(
                "make an intervention from it: `detox-gguf steer -m MODEL --neurons {} --offset X -o steer.gguf`",
                path.display()
            );
            return Err(Error::input(path, None, reason).with_hint(hint));
        }
        Ok(SteerFile::Interventions(Interventions::read(path)?))
    }

    /// The path it was read from.
    pub fn path(&self) -> &Path {
        match self {
            SteerFile::Interventions(interventions) => &interventions.path,
            SteerFile::ControlVector(file) => &file.path,
        }
    }
}

/// Parses `FILE:SCALE,FILE:SCALE,…`, the value of `--lora-scaled` and `--control-vector-scaled`.
///
/// As in llama.cpp, an entry whose file name contains a comma is put in double quotes together with its
/// scale. Unlike in llama.cpp, the file name may contain colons: the scale follows the last one.
///
/// # Errors
/// [`Error::Setting`] for an entry without a file name or without a finite scale.
pub fn parse_scaled(flag: &str, text: &str) -> Result<Vec<(PathBuf, f32)>> {
    let parse = |entry: &String| {
        let (path, scale) = entry.rsplit_once(':')?;
        let scale = scale.parse::<f32>().ok().filter(|scale| scale.is_finite())?;
        (!path.is_empty()).then(|| (PathBuf::from(path), scale))
    };
    let entries = split_row(text);
    entries
        .iter()
        .map(|entry| {
            parse(entry).ok_or_else(|| {
                Error::setting(flag, format!("expected FILE:SCALE,…, found {entry:?}"))
                    .with_hint(format!("write each scale as a number with a point: {flag} FILE:0.5"))
            })
        })
        .collect()
}

/// Splits at commas outside double quotes; inside quotes, `""` is one quote (llama.cpp's `parse_csv_row`).
fn split_row(text: &str) -> Vec<String> {
    let mut entries = vec![String::new()];
    let mut is_quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let entry = entries.last_mut().expect("it starts with one entry, and none is ever removed");
        match c {
            '"' if is_quoted && chars.next_if_eq(&'"').is_none() => is_quoted = false,
            '"' if !is_quoted && entry.is_empty() => is_quoted = true,
            ',' if !is_quoted => entries.push(String::new()),
            c => entry.push(c),
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (String, f32) {
        let argument = SteerArgument::parse(text).unwrap();
        (argument.path.to_str().unwrap().to_owned(), argument.coefficient)
    }

    #[test]
    fn a_number_after_the_last_colon_is_the_coefficient() {
        assert_eq!(parse("steer.json"), ("steer.json".into(), 1.0));
        assert_eq!(parse("steer.json:-1.5"), ("steer.json".into(), -1.5));
        assert_eq!(parse("steer.json:1e-2"), ("steer.json".into(), 0.01));
        assert_eq!(parse("C:\\cv\\a.gguf"), ("C:\\cv\\a.gguf".into(), 1.0));
        assert_eq!(parse("C:\\cv\\a.gguf:2"), ("C:\\cv\\a.gguf".into(), 2.0));
        assert_eq!(parse("a:b"), ("a:b".into(), 1.0));
        assert_eq!(parse("a:1:2"), ("a:1".into(), 2.0));
        assert_eq!(parse("a:"), ("a:".into(), 1.0));
    }

    #[test]
    fn a_file_whose_name_ends_in_a_number_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let whole = folder.path().join("run:2");
        let text = whole.to_str().unwrap();
        std::fs::write(&whole, "").unwrap();
        assert_eq!(parse(text), (text.to_owned(), 1.0));
        assert_eq!(parse(&format!("{text}:3")), (text.to_owned(), 3.0));
        // If both files exist, the number is a coefficient.
        let short = folder.path().join("run");
        std::fs::write(&short, "").unwrap();
        assert_eq!(parse(text), (short.to_str().unwrap().to_owned(), 2.0));
    }

    #[test]
    fn rejects_a_coefficient_that_is_not_finite_and_an_empty_path() {
        for text in ["a.json:nan", "a.json:inf", "a.json:-infinity", "a.json:1e39", "", ":2"] {
            assert!(SteerArgument::parse(text).unwrap_err().is_usage(), "{text}");
        }
    }

    #[test]
    fn scaled_lists_are_split_as_llama_cpp_does() {
        let parse = |text| parse_scaled("--lora-scaled", text).unwrap();
        assert_eq!(parse("a.gguf:0.5"), [("a.gguf".into(), 0.5)]);
        assert_eq!(parse("a:1,b:-2"), [("a".into(), 1.0), ("b".into(), -2.0)]);
        assert_eq!(parse("C:\\a:1"), [("C:\\a".into(), 1.0)]);
        assert_eq!(parse("\"a,b:1\",c\"d:2"), [("a,b".into(), 1.0), ("c\"d".into(), 2.0)]);
        assert_eq!(parse("\"a\"\"b:1\""), [("a\"b".into(), 1.0)]);
    }

    #[test]
    fn rejects_entries_without_a_file_or_a_scale() {
        for text in ["", "a", "a:", "a:x", ":1", "a:1,", "a:1,b", "a:nan", "a:1e39", "a:1.0x"] {
            let error = parse_scaled("--lora-scaled", text).unwrap_err();
            assert!(error.is_usage() && error.to_string().contains("FILE:SCALE"), "{text}");
        }
    }

    fn open(name: &str, content: &[u8]) -> Result<SteerFile> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        SteerFile::open(&path)
    }

    #[test]
    fn the_content_of_a_file_decides_its_kind() {
        let content = b"{\"detox_gguf\": \"interventions\", \"format\": 1, \"interventions\": \
            [{\"what\": {\"neurons\": [[0, 1]]}, \"edit\": {\"offset\": 1}}]}";
        assert!(matches!(open("x.gguf", content), Ok(SteerFile::Interventions(_))));
        let model = SteerFile::open(Path::new("gguf/tiny/llama.gguf")).unwrap_err();
        assert!(model.to_string().contains("found a model"), "{model}");
    }

    #[test]
    fn rejects_a_list_of_neurons_and_shows_how_to_make_an_intervention_from_it() {
        let ours = b"{\"detox_gguf\": \"neurons\", \"format\": 1, \"neurons\": []}";
        for content in [&b" [[0, 1]]"[..], ours] {
            let hint = open("n.json", content).unwrap_err().hint().unwrap();
            assert!(hint.contains("steer -m MODEL --neurons ") && hint.contains("--offset X"), "{hint}");
        }
    }

    #[test]
    fn rejects_a_file_that_is_neither_json_nor_a_control_vector() {
        for content in [&b""[..], b"GGU", b"PK\x03\x04", b"{}", b"offset = 1"] {
            assert!(open("x", content).is_err(), "{content:?}");
        }
        assert!(matches!(SteerFile::open(Path::new("no/such/file")), Err(Error::Io { .. })));
    }
}
