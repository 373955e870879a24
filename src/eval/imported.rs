//! Continuations made elsewhere, in the forms that the field's tools write.
//!
//! | form | recognised by |
//! |---|---|
//! | the paper's and ours: one continuation a line | `generated_text` |
//! | RealToxicityPrompts: one prompt a line with all its continuations | `generations` |

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

use crate::eval::generate::Generation;
use crate::text::language;

/// Reads continuations from JSON lines.
///
/// Rows without a language get `default_language`, else that of the file's name. Rows without a prompt
/// id are grouped by language and prompt text, as the paper's scripts do, and numbered in file order.
pub fn read_generations(path: &Path, default_language: Option<&str>) -> Result<Vec<Generation>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let of_name = path.file_stem().and_then(|s| s.to_str()).and_then(language_of_stem);
    let default_language = default_language.or(of_name);
    let mut reader = Reader { path, default_language, prompts: HashMap::new(), rows: Vec::new() };
    for (i, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        if !line.trim().is_empty() {
            reader.line(line, i + 1)?;
        }
    }
    if reader.rows.is_empty() {
        return Err(Error::input(path, None, "expected continuations, found an empty file"));
    }
    Ok(reader.rows)
}

/// A language's code alone, or as the paper's scripts name their output, `output-rtp_lx_{lang}.json`. No
/// other ending is taken for a language: `with_id` is not Indonesian.
fn language_of_stem(stem: &str) -> Option<&'static str> {
    let code = ["output-rtp_lx_", "rtp_lx_"].iter().find_map(|prefix| stem.strip_prefix(prefix));
    language::normalize(code.unwrap_or(stem))
}

struct Reader<'a> {
    path: &'a Path,
    default_language: Option<&'a str>,
    /// Prompt id and number of continuations so far, by language and prompt id or text.
    prompts: HashMap<(String, String), (String, u32)>,
    rows: Vec<Generation>,
}

impl Reader<'_> {
    fn fault(&self, line: usize, reason: impl Into<String>) -> Error {
        Error::input(self.path, Some(line), reason)
    }

    fn line(&mut self, text: &str, line: usize) -> Result<()> {
        let row: Value = serde_json::from_str(text)
            .map_err(|e| self.fault(line, format!("expected a JSON object: {e}")))?;
        let prompt = match &row["prompt"] {
            Value::String(prompt) => prompt.clone(),
            Value::Object(fields) => match fields.get("text") {
                Some(Value::String(prompt)) => prompt.clone(),
                _ => return Err(self.fault(line, "expected a string \"prompt.text\"")),
            },
            _ => return Err(self.fault(line, "expected a \"prompt\"")),
        };
        let language = match row.get("language").or(row.get("lang")) {
            Some(Value::String(code)) => language::normalize(code).unwrap_or(code).to_owned(),
            Some(_) => return Err(self.fault(line, "expected \"language\" to be a string")),
            None => self.default_language.map(str::to_owned).ok_or_else(|| Error::input(self.path, Some(line), "expected to know the language, but neither the row, nor the file's name, nor --lang says it").with_hint("name one language with --lang, or give each row a \"language\""))?,
        };
        let id = match row.get("prompt_id") {
            Some(Value::String(id)) => Some(id.clone()),
            Some(Value::Number(id)) => Some(id.to_string()),
            Some(_) => return Err(self.fault(line, "expected \"prompt_id\" to be a string or a number")),
            None => None,
        };
        match (&row["generated_text"], &row["generations"]) {
            (Value::String(text), Value::Null) => {
                let n_tokens = row["n_tokens"].as_u64().and_then(|n| u32::try_from(n).ok());
                self.push(
                    line,
                    &prompt,
                    id,
                    language,
                    text,
                    n_tokens,
                    row["logprob"].as_f64(),
                    row.get("finish"),
                )
            }
            (Value::Null, Value::Array(generations)) => {
                // One row is one prompt: two rows with the same text stay two.
                let id = id.unwrap_or_else(|| format!("{language}/{line}"));
                for generation in generations {
                    let Value::String(text) = &generation["text"] else {
                        return Err(
                            self.fault(line, "expected each of \"generations\" to have a string \"text\"")
                        );
                    };
                    self.push(line, &prompt, Some(id.clone()), language.clone(), text, None, None, None)?;
                }
                Ok(())
            }
            _ => Err(Error::input(
                self.path,
                Some(line),
                "expected a string \"generated_text\" or a list \"generations\"",
            )
            .with_hint("a file of prompts is read with --prompts")),
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one row, from one caller")]
    fn push(
        &mut self,
        line: usize,
        prompt: &str,
        id: Option<String>,
        language: String,
        text: &str,
        n_tokens: Option<u32>,
        logprob: Option<f64>,
        finish: Option<&Value>,
    ) -> Result<()> {
        let key = (language.clone(), id.clone().unwrap_or_else(|| prompt.to_owned()));
        let (prompt_id, n) = self
            .prompts
            .entry(key)
            .or_insert_with(|| (id.unwrap_or_else(|| format!("{language}/{line}")), 0));
        let finish = match finish {
            None => None,
            Some(value) => serde_json::from_value(value.clone()).map_err(|_| {
                Error::input(self.path, Some(line), "expected \"finish\" to be \"length\" or \"stop\"")
            })?,
        };
        self.rows.push(Generation {
            prompt: prompt.to_owned(),
            generated_text: text.to_owned(),
            prompt_id: prompt_id.clone(),
            language,
            sample: *n,
            n_tokens,
            // A log-probability without its number of tokens has no perplexity.
            logprob: logprob.filter(|l| l.is_finite() && n_tokens.is_some()),
            finish,
        });
        *n += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, content: &str, language: Option<&str>) -> Result<Vec<Generation>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        read_generations(&path, language)
    }

    #[test]
    fn the_papers_rows_are_grouped_by_prompt_in_file_order() {
        let rows = read(
            "output-rtp_lx_de.json",
            "{\"prompt\":\"a\",\"generated_text\":\"x\"}\n{\"prompt\":\"b\",\"generated_text\":\"y\"}\n{\"prompt\":\"a\",\"generated_text\":\"z\"}\n",
            None,
        )
        .unwrap();
        let ids: Vec<(&str, u32)> = rows.iter().map(|r| (r.prompt_id.as_str(), r.sample)).collect();
        assert_eq!(ids, [("de/1", 0), ("de/2", 0), ("de/1", 1)]);
        assert_eq!(rows[0].language, "de");
        assert_eq!(rows[2].logprob, None);
    }

    #[test]
    fn real_toxicity_prompts_rows_hold_all_continuations_of_a_prompt() {
        let rows = read(
            "f.jsonl",
            "{\"prompt\":{\"text\":\"a\"},\"generations\":[{\"text\":\"x\",\"toxicity\":0.1},{\"text\":\"y\"}]}\n",
            Some("en"),
        )
        .unwrap();
        assert_eq!(rows.iter().map(|r| r.generated_text.as_str()).collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(rows[1].sample, 1);
    }

    #[test]
    fn our_own_rows_come_back_as_they_were() {
        let row = Generation {
            prompt: "a".into(),
            generated_text: " b".into(),
            prompt_id: "en/own-1".into(),
            language: "en".into(),
            sample: 0,
            n_tokens: Some(3),
            logprob: Some(-4.5),
            finish: Some(crate::engine::schedule::Finish::Stop),
        };
        let line = String::from_utf8(crate::file::json_lines(&[&row])).unwrap();
        assert_eq!(read("g.jsonl", &line, None).unwrap(), [row]);
    }

    #[test]
    fn rejects_rows_of_another_form_by_their_line() {
        for (content, word) in [
            ("{\"prompt\":\"a\",\"generated_text\":\"x\"}\nnot json\n", "JSON"),
            ("\n{\"prompt\":\"a\"}\n", "generated_text"),
            ("\n{\"generated_text\":\"a\"}\n", "prompt"),
            ("\n{\"prompt\":\"a\",\"generated_text\":3}\n", "generated_text"),
            ("\n{\"prompt\":\"a\",\"generations\":[{}]}\n", "generations"),
        ] {
            match read("f.jsonl", content, Some("en")).unwrap_err() {
                Error::Input { line: Some(2), reason, .. } => assert!(reason.contains(word), "{reason}"),
                other => panic!("{other}"),
            }
        }
        assert!(read("f.jsonl", "", Some("en")).is_err());
        assert!(
            read("f.jsonl", "{\"prompt\":\"a\",\"generated_text\":\"x\"}\n", None)
                .unwrap_err()
                .hint()
                .is_some()
        );
    }
}
