//! Continuations from other tools, as JSON lines or in any other form of [`rows`](crate::text::rows).
//!
//! | form | recognised by |
//! |---|---|
//! | the paper's and this program's: one continuation per line | `generated_text` |
//! | RealToxicityPrompts: one prompt per line with all its continuations | `generations` |
//! | a prompt with one continuation, in columns with the usual names | `continuation`, `completion`, `response`, … |

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::engine::Token;
use crate::engine::schedule::Finish;
use crate::error::{Error, Result};
use crate::eval::generate::Generation;
use crate::eval::metric::fluency;
use crate::eval::prompts;
use crate::text::rows::{self, CONTINUATION, Column, Ignored, LANGUAGE, PROMPT_ID, Rows};
use crate::text::{chat_markers, language};

/// Prompts. Unlike in files of prompts, `text` and the like may be the continuation.
const PROMPT: Column =
    Column { names: &["prompt", "prompt_text", "question", "instruction", "query"], ..rows::PROMPT };

/// Fields that describe the tokens of a continuation.
const TOKEN_FIELDS: [&str; 7] =
    ["sample", "n_tokens", "logprob", "finish", "token_ids", "token_logprobs", "vocabulary"];

/// A sum of rounded log-probs may differ by this much for each token.
const ROUNDING: f64 = 1e-2;

/// Columns of continuations that the user names. `None` means the usual names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GenerationColumns {
    /// The prompt.
    pub prompt: Option<String>,
    /// The continuation.
    pub continuation: Option<String>,
    /// The row's language.
    pub language: Option<String>,
    /// The id of the prompt.
    pub prompt_id: Option<String>,
}

/// Reads continuations from a file.
///
/// Rows without a language get `default_language`, else the language in the file's name, else that of the prompts'
/// texts. Rows without a prompt id are grouped by language and prompt text, as in the paper's scripts, in file order.
///
/// # Errors
/// [`Error::Io`]; [`Error::Input`] with the line for a row of another form, and for an empty file.
pub fn read_generations(
    path: &Path,
    default_language: Option<&str>,
    columns: &GenerationColumns,
) -> Result<Vec<Generation>> {
    let default_language = default_language.or_else(|| prompts::language_of_name(path));
    let named = [&columns.prompt, &columns.continuation, &columns.language, &columns.prompt_id];
    let rows = Rows::open(path, "continuations", &named.map(Option::as_deref))?.limited();
    let mut reader = Reader {
        path,
        default_language,
        columns,
        prompts: HashMap::new(),
        rows: Vec::new(),
        ignored: Ignored::default(),
        marked: chat_markers::Count::default(),
    };
    if default_language.is_some() {
        for row in rows {
            let row = row?;
            reader.row(row.fields, row.line)?;
        }
    } else {
        let rows = rows.collect::<Result<Vec<rows::Row>>>()?;
        let languages = reader.languages(&rows)?;
        for (row, language) in rows.into_iter().zip(languages) {
            reader.default_language = Some(language);
            reader.row(row.fields, row.line)?;
        }
    }
    if reader.rows.is_empty() {
        return Err(Error::input(path, None, "expected continuations, found an empty file"));
    }
    reader.ignored.log(path);
    reader.marked.warn(path, "continuations");
    Ok(reader.rows)
}

/// The fields of a row that describe the sampled tokens.
#[derive(Debug, Default, serde::Deserialize)]
struct SampledTokens {
    token_ids: Option<Vec<Token>>,
    token_logprobs: Option<Vec<f32>>,
    vocabulary: Option<String>,
}

impl SampledTokens {
    fn fill(self, generation: Generation) -> Generation {
        let SampledTokens { token_ids, token_logprobs, vocabulary } = self;
        Generation { token_ids, token_logprobs, vocabulary, ..generation }
    }
}

struct Reader<'a> {
    path: &'a Path,
    default_language: Option<&'a str>,
    columns: &'a GenerationColumns,
    /// Prompt id and number of continuations so far, by language and by prompt id or text.
    prompts: HashMap<(String, String), (String, u32)>,
    rows: Vec<Generation>,
    ignored: Ignored,
    marked: chat_markers::Count,
}

impl Reader<'_> {
    /// An error in a line of the file.
    fn fault(&self, line: usize, reason: impl Into<String>) -> Error {
        Error::input(self.path, Some(line), reason)
    }

    /// The language of each row, by its texts if it states none.
    fn languages(&self, rows: &[rows::Row]) -> Result<Vec<&'static str>> {
        let mut texts = Vec::with_capacity(rows.len());
        for row in rows {
            let stated = match self.language(&row.fields, row.line)?.map(|(_, value)| value) {
                // A language outside the known ones is kept as it is; identification is not needed.
                Some(Value::String(code)) => Some(language::recognise(code).unwrap_or("other")),
                _ => None,
            };
            texts.push((row.line, self.prompt(&row.fields, row.line)?.1, stated));
        }
        language::assign(self.path, &texts, "give one language with --lang, or give each row a \"language\"")
    }

    /// An optional column with its name. One that the user named must be there.
    fn stated<'r>(
        &self,
        column: Column,
        row: &'r Map<String, Value>,
        chosen: Option<&str>,
        line: usize,
    ) -> Result<Option<(&'r str, &'r Value)>> {
        column.stated(row, chosen).map_err(|(reason, hint)| self.fault(line, reason).with_hint(hint))
    }

    fn language<'r>(&self, row: &'r Map<String, Value>, line: usize) -> Result<Option<(&'r str, &'r Value)>> {
        self.stated(LANGUAGE, row, self.columns.language.as_deref(), line)
    }

    /// The prompt with its column's name.
    fn prompt<'r>(&self, row: &'r Map<String, Value>, line: usize) -> Result<(&'r str, &'r str)> {
        let chosen = self.columns.prompt.as_deref();
        let Some((name, value)) = PROMPT.find(row, chosen) else {
            if let Some((reason, hint)) = rows::chat(row) {
                return Err(self.fault(line, reason).with_optional_hint(hint));
            }
            let (reason, hint) = PROMPT.absent(row, chosen);
            return Err(self.fault(line, reason).with_hint(hint));
        };
        let text = rows::text(name, value);
        Ok((name, text.map_err(|(reason, hint)| self.fault(line, reason).with_optional_hint(hint))?))
    }

    fn row(&mut self, mut row: Map<String, Value>, line: usize) -> Result<()> {
        let (prompt_name, prompt) = self.prompt(&row, line)?;
        let prompt = prompt.to_owned();
        let stated = self.language(&row, line)?;
        let language = match stated.map(|(_, value)| value) {
            Some(Value::String(code)) => language::recognise(code).unwrap_or(code).to_owned(),
            Some(_) => return Err(self.fault(line, "expected \"language\" to be a string")),
            None => self.default_language.unwrap_or_default().to_owned(),
        };
        let stated_id = self.stated(PROMPT_ID, &row, self.columns.prompt_id.as_deref(), line)?;
        let id = stated_id.map(|(_, value)| prompts::id(value)).transpose().map_err(|found| {
            self.fault(
                line,
                format!("expected \"prompt_id\" to be a string or a whole number, found {found}"),
            )
        })?;
        let found = CONTINUATION.find(&row, self.columns.continuation.as_deref());
        let names = [stated, stated_id, found].map(|column| column.map(|(name, _)| name));
        let mut used = vec![prompt_name, "generations"];
        used.extend(names.into_iter().flatten());
        if self.columns.prompt.is_none() {
            let whole = PROMPT.check_whole(&row, prompt_name, &used);
            whole.map_err(|(reason, hint)| self.fault(line, reason).with_hint(hint))?;
        }
        used.extend(TOKEN_FIELDS);
        self.ignored.add(&row, &used);
        let continuation = found.map(|(name, value)| (name.to_owned(), value.clone()));
        unpack(&mut row);
        let row = Value::Object(row);
        let generation = |text: &str| Generation {
            prompt: prompt.clone(),
            generated_text: text.to_owned(),
            prompt_id: String::new(),
            language: language.clone(),
            sample: 0,
            n_tokens: None,
            logprob: None,
            finish: None,
            token_ids: None,
            token_logprobs: None,
            vocabulary: None,
        };
        let has_list = self.columns.continuation.is_none() && row["generations"].is_array();
        let text = match &continuation {
            Some((name, value)) if !has_list || !row["generated_text"].is_null() => {
                let text = rows::text(name, value);
                Value::from(text.map_err(|(reason, hint)| self.fault(line, reason).with_optional_hint(hint))?)
            }
            _ => Value::Null,
        };
        match (&text, &row["generations"]) {
            (Value::String(text), list) if list.is_null() || self.columns.continuation.is_some() => {
                let n_tokens = self.count(&row["n_tokens"], line)?;
                // A log-probability without its number of tokens gives no perplexity.
                let logprob = self.logprob(&row["logprob"], n_tokens, line)?.filter(|_| n_tokens.is_some());
                let sampled = self.sampled_tokens(&row, n_tokens, logprob, line)?;
                let finish = row.get("finish").map(|value| self.finish(value, line)).transpose()?;
                self.push(
                    line,
                    id,
                    Generation {
                        n_tokens,
                        logprob,
                        finish: finish.flatten(),
                        ..sampled.fill(generation(text))
                    },
                );
                Ok(())
            }
            (Value::Null, Value::Array(generations)) => {
                // One row is one prompt: two rows with the same text stay two prompts.
                let id = id.unwrap_or_else(|| format!("{language}/{line}"));
                for value in generations {
                    let Value::String(text) = &value["text"] else {
                        let reason = "expected each of \"generations\" to have a string \"text\"";
                        return Err(self.fault(line, reason));
                    };
                    self.push(line, Some(id.clone()), generation(text));
                }
                Ok(())
            }
            _ => Err(self
                .fault(line, "expected a string \"generated_text\" or a list \"generations\"")
                .with_hint(
                    "a file of prompts is read with --prompts; name another column with --text-column",
                )),
        }
    }

    /// The ids and log-probs of the sampled tokens, as this program writes them.
    fn sampled_tokens(
        &self,
        row: &Value,
        n_tokens: Option<u32>,
        logprob: Option<f64>,
        line: usize,
    ) -> Result<SampledTokens> {
        let expected = |what: &str| self.fault(line, format!("expected {what}"));
        let found: SampledTokens = serde_json::from_value(row.clone()).map_err(|_| {
            expected("\"token_ids\" as a list of integers, \"token_logprobs\" as a list of numbers and \"vocabulary\" as a string")
        })?;
        let Some(ids) = &found.token_ids else { return Ok(SampledTokens::default()) };
        if ids.iter().any(|&id| id < 0) {
            return Err(expected("\"token_ids\" of 0 or more"));
        }
        let n_tokens = n_tokens.map_or(ids.len() as u64, u64::from);
        let n_logprobs = found.token_logprobs.as_ref().map_or(ids.len(), Vec::len);
        if n_tokens != ids.len() as u64 || n_logprobs != ids.len() {
            let reason = format!(
                "expected as many \"token_ids\" as tokens and \"token_logprobs\", found {} ids, {n_tokens} tokens and {n_logprobs} log-probs",
                ids.len()
            );
            return Err(self.fault(line, reason));
        }
        let logprobs = found.token_logprobs.iter().flatten().map(|&logprob| f64::from(logprob));
        let is_possible = |x: &f64| x.is_finite() && fluency::logprob_fault(*x).is_none();
        if let Some(x) = logprobs.clone().find(|x| !is_possible(x)) {
            return Err(expected(&format!("\"token_logprobs\" of at most 0, found {x}")));
        }
        if let (Some(sum), Some(_)) = (logprob, &found.token_logprobs) {
            let of_tokens: f64 = logprobs.sum();
            if (sum - of_tokens).abs() > ROUNDING * ids.len() as f64 {
                return Err(expected(&format!(
                    "\"logprob\" to be the sum of \"token_logprobs\", {of_tokens:.4}, found {sum}"
                )));
            }
        }
        Ok(found)
    }

    /// The number of tokens, if the row has one.
    fn count(&self, value: &Value, line: usize) -> Result<Option<u32>> {
        if rows::is_missing(value) {
            return Ok(None);
        }
        // A comma would be ambiguous: "1,000" is a thousand or one.
        let has_comma = value.as_str().is_some_and(|text| text.contains(','));
        match rows::number(value).filter(|_| !has_comma) {
            // pandas writes whole numbers as 3.0 if a row of the column has none.
            Some(n) if n.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&n) => Ok(Some(n as u32)),
            _ => {
                let reason = format!("expected \"n_tokens\" to be a whole number from 0, found {value}");
                Err(self.fault(line, reason))
            }
        }
    }

    /// The sum of the tokens' natural log-probs, if the row has one.
    fn logprob(&self, value: &Value, n_tokens: Option<u32>, line: usize) -> Result<Option<f64>> {
        if rows::is_missing(value) {
            return Ok(None);
        }
        let Some(logprob) = rows::number(value).filter(|l| fluency::logprob_fault(*l).is_none()) else {
            let reason = format!("expected \"logprob\" to be a number of at most 0, found {value}");
            return Err(self.fault(line, reason).with_hint(
                "it is the sum of the natural logarithms of the tokens' probabilities; leave it out if unknown",
            ));
        };
        if n_tokens == Some(0) && logprob < 0.0 {
            let reason = format!("expected \"logprob\" 0 for \"n_tokens\" 0, found {logprob}");
            return Err(self.fault(line, reason));
        }
        let perplexity = n_tokens.and_then(|n| fluency::perplexity(logprob, n));
        if let (Some(n), true) = (n_tokens, perplexity.is_some_and(f64::is_infinite)) {
            let reason = format!("expected a \"logprob\" that {n} tokens can have, found {logprob}");
            return Err(self.fault(line, reason));
        }
        Ok(Some(logprob))
    }

    fn finish(&self, value: &Value, line: usize) -> Result<Option<Finish>> {
        serde_json::from_value(value.clone())
            .map_err(|_| self.fault(line, "expected \"finish\" to be \"length\" or \"stop\""))
    }

    /// Adds a continuation with its prompt's id and its number among the prompt's continuations.
    fn push(&mut self, line: usize, id: Option<String>, generation: Generation) {
        self.marked.add(&[&generation.prompt, &generation.generated_text]);
        let language = generation.language.clone();
        let key = (language.clone(), id.clone().unwrap_or_else(|| generation.prompt.clone()));
        let first = || (id.unwrap_or_else(|| format!("{language}/{line}")), 0);
        let (prompt_id, n) = self.prompts.entry(key).or_insert_with(first);
        self.rows.push(Generation { prompt_id: prompt_id.clone(), sample: *n, ..generation });
        *n += 1;
    }
}

/// Prepares the fields of a row's tokens: removes missing ones, and reads the lists that a table has in its cells.
fn unpack(row: &mut Map<String, Value>) {
    for name in ["finish", "token_ids", "token_logprobs", "vocabulary"] {
        let Some(value) = row.get(name) else { continue };
        if rows::is_missing(value) {
            row.remove(name);
        } else if let Some(Ok(list)) =
            value.as_str().filter(|text| text.starts_with('[')).map(serde_json::from_str)
        {
            row.insert(name.to_owned(), list);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, content: &str, language: Option<&str>) -> Result<Vec<Generation>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        read_generations(&path, language, &GenerationColumns::default())
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
    fn the_programs_own_rows_are_read_unchanged() {
        let row = Generation {
            prompt: "a".into(),
            generated_text: " b".into(),
            prompt_id: "en/own-1".into(),
            language: "en".into(),
            sample: 0,
            n_tokens: Some(3),
            logprob: Some(-4.5),
            finish: Some(Finish::Stop),
            token_ids: Some(vec![5, 0, 7]),
            token_logprobs: Some(vec![-1.5, -1.0, -2.0]),
            vocabulary: Some("0123456789abcdef".into()),
        };
        let line = String::from_utf8(crate::file::json_lines(&[&row]).unwrap()).unwrap();
        assert_eq!(read("g.jsonl", &line, None).unwrap(), [row]);
    }

    #[test]
    fn rejects_numbers_that_no_continuation_can_have() {
        for (field, word) in [
            (r#""logprob":5,"n_tokens":3"#, "at most 0, found 5"),
            (r#""logprob":0.5,"n_tokens":3"#, "at most 0, found 0.5"),
            (r#""logprob":"high","n_tokens":3"#, "at most 0, found \"high\""),
            (r#""logprob":"3","n_tokens":3"#, "at most 0, found \"3\""),
            (r#""logprob":true,"n_tokens":3"#, "at most 0, found true"),
            (r#""logprob":1e999,"n_tokens":3"#, "number out of range"),
            (r#""logprob":-1e999,"n_tokens":3"#, "number out of range"),
            (r#""logprob":-5,"n_tokens":0"#, "\"n_tokens\" 0"),
            (r#""logprob":-5,"n_tokens":-3"#, "whole number from 0, found -3"),
            (r#""n_tokens":2.5"#, "whole number from 0, found 2.5"),
            (r#""n_tokens":4294967296"#, "whole number from 0, found 4294967296"),
            (r#""n_tokens":"1,000""#, "whole number from 0, found \"1,000\""),
            (r#""n_tokens":"three""#, "whole number from 0, found \"three\""),
            (r#""n_tokens":false"#, "whole number from 0, found false"),
            (r#""prompt_id":1.5"#, "whole number, found 1.5"),
            (r#""prompt_id":true"#, "whole number, found true"),
            (r#""prompt_id":[1]"#, "whole number, found an array"),
        ] {
            let content = format!("\n{{\"prompt\":\"a\",\"generated_text\":\"x\",{field}}}\n");
            match read("f.jsonl", &content, Some("en")).unwrap_err() {
                Error::Input { line: Some(2), reason, .. } => assert!(reason.contains(word), "{reason}"),
                other => panic!("{field}: {other}"),
            }
        }
    }

    #[test]
    fn rejects_tokens_whose_log_probs_are_impossible_or_do_not_match() {
        let ids = r#""token_ids":[1,2],"token_logprobs""#;
        for (fields, word) in [
            (format!(r#"{ids}:[5.0,-1]"#), "at most 0, found 5"),
            (format!(r#"{ids}:[-1e39,-1]"#), "found -inf"),
            (format!(r#"{ids}:[-1,-2],"n_tokens":2,"logprob":-1"#), "the sum of \"token_logprobs\", -3.0000"),
            (format!(r#"{ids}:[-1,-2],"n_tokens":3.0"#), "2 ids, 3 tokens"),
            (r#""logprob":-9000,"n_tokens":3"#.to_owned(), "that 3 tokens can have"),
            (r#""input":"c""#.to_owned(), "another part of it in \"input\""),
            (r#""system":"c""#.to_owned(), "another part of it in \"system\""),
            (r#""prompt_id":123456789012345678901"#.to_owned(), "too large to be exact"),
        ] {
            let content = format!("\n{{\"prompt\":\"a\",\"generated_text\":\"x\",{fields}}}\n");
            match read("f.jsonl", &content, Some("en")).unwrap_err() {
                Error::Input { line: Some(2), reason, .. } => assert!(reason.contains(word), "{reason}"),
                other => panic!("{fields}: {other}"),
            }
        }
    }

    #[test]
    fn the_programs_own_rows_are_read_from_a_table() {
        let table = "prompt,generated_text,prompt_id,language,n_tokens,logprob,finish,token_ids,token_logprobs,vocabulary\n\
                     a,b,7.0,de,2,-3,stop,\"[5, 7]\",\"[-1.5, -1.5]\",abc\na,c,7,de,,,,,,\n";
        let rows = read("g.csv", table, None).unwrap();
        assert_eq!((rows[0].token_ids.as_deref(), rows[0].finish), (Some(&[5, 7][..]), Some(Finish::Stop)));
        assert_eq!((rows[1].token_ids.as_deref(), rows[1].finish), (None, None));
        assert_eq!((rows[1].prompt_id.as_str(), rows[1].sample), ("7", 1), "7.0 and 7 are one id");
    }

    #[test]
    fn a_files_name_states_the_language_and_a_column_that_the_user_names_must_be_there() {
        let row = "{\"prompt\":\"a\",\"generated_text\":\"x\"}";
        for name in ["de.jsonl", "German.jsonl", "output-rtp_lx_DE.json"] {
            assert_eq!(read(name, row, None).unwrap()[0].language, "de", "{name}");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("de.jsonl");
        std::fs::write(&path, row).unwrap();
        let nope = || Some("nope".to_owned());
        for columns in [
            GenerationColumns { language: nope(), ..GenerationColumns::default() },
            GenerationColumns { prompt_id: nope(), ..GenerationColumns::default() },
        ] {
            let error = read_generations(&path, None, &columns).unwrap_err();
            assert!(
                error.to_string().contains("in the column \"nope\"") && error.hint().is_some(),
                "{error}"
            );
        }
    }

    #[test]
    fn missing_numbers_and_whole_numbers_of_pandas_are_read() {
        let row = |field: &str| {
            let content = format!("{{\"prompt\":\"a\",\"generated_text\":\"x\",{field}}}");
            read("f.jsonl", &content, Some("en")).unwrap().remove(0)
        };
        let found = row(r#""logprob":-6.0,"n_tokens":3.0,"prompt_id":7.0"#);
        assert_eq!((found.logprob, found.n_tokens, found.prompt_id.as_str()), (Some(-6.0), Some(3), "7"));
        let found = row(r#""logprob":null,"n_tokens":null,"prompt_id":null"#);
        assert_eq!((found.logprob, found.n_tokens, found.prompt_id.as_str()), (None, None, "en/1"));
        assert_eq!(row(r#""logprob":-6"#).logprob, None, "without a number of tokens");
        assert_eq!(row(r#""logprob":0,"n_tokens":0"#).logprob, Some(0.0));
    }

    #[test]
    fn rejects_rows_of_another_form_by_line() {
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
