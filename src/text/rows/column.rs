//! Columns by their usual names.

use serde_json::{Map, Value};

use super::cell::is_missing;

/// What a column holds, with the names it has in public data sets.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// The word for errors: "a prompt".
    pub noun: &'static str,
    /// The flag that names the column.
    pub flag: &'static str,
    /// Names by preference. Upper and lower case, `-`, `_` and spaces count as equal if no name fits exactly.
    pub names: &'static [&'static str],
}

/// Prompts.
pub const PROMPT: Column = Column {
    noun: "a prompt",
    flag: "--prompt-column",
    names: &[
        "Prompt",
        "prompt",
        "prompt_text",
        "text",
        "question",
        "instruction",
        "query",
        "input",
        "content",
        "sentence",
        "comment_text",
        "user_prompt",
    ],
};
/// Texts to score. Continuations come first, because they are scored without their prompt.
pub const TEXT: Column = Column {
    noun: "a text",
    flag: "--field",
    names: &[
        "generated_text",
        "text",
        "comment_text",
        "continuation",
        "completion",
        "generation",
        "response",
        "output",
        "answer",
        "comment",
        "content",
        "body",
        "sentence",
        "message",
        "tweet",
        "post",
        "review",
        "prompt",
        "question",
        "instruction",
        "query",
        "input",
    ],
};
/// Labelled texts.
pub const LABELLED_TEXT: Column = Column {
    noun: "a text",
    flag: "--text-column",
    names: &[
        "text",
        "comment_text",
        "comment",
        "content",
        "body",
        "sentence",
        "message",
        "tweet",
        "post",
        "prompt",
        "input",
        "generated_text",
        "completion",
        "response",
    ],
};
/// Labels.
pub const LABEL: Column = Column {
    noun: "a label",
    flag: "--label-column",
    names: &["label", "toxic", "is_toxic", "toxicity", "target", "class", "labels", "y"],
};
/// A row's own id.
pub const ID: Column = Column { noun: "an id", flag: "--id-column", names: &["Index", "index", "id", "ID"] };
/// The id of a continuation's prompt.
pub const PROMPT_ID: Column = Column { noun: "an id", flag: "--id-column", names: &["prompt_id"] };
/// Languages.
pub const LANGUAGE: Column = Column {
    noun: "a language",
    flag: "--language-column",
    names: &["Locale", "locale", "language", "lang"],
};
/// Continuations, each with its prompt.
pub const CONTINUATION: Column = Column {
    noun: "a continuation",
    flag: "--text-column",
    names: &[
        "generated_text",
        "continuation",
        "completion",
        "generation",
        "response",
        "output",
        "answer",
        "generated",
        "model_output",
    ],
};
/// Prompts of preference pairs.
pub const PAIR_PROMPT: Column = Column {
    noun: "a prompt",
    flag: "--prompt-column",
    names: &["prompt", "question", "instruction", "query", "input", "user_prompt"],
};
/// Preferred answers.
pub const CHOSEN: Column = Column {
    noun: "a chosen answer",
    flag: "--chosen-column",
    names: &[
        "chosen",
        "preferred",
        "accepted",
        "chosen_response",
        "response_chosen",
        "preferred_response",
        "unpert_gen_text",
    ],
};
/// Answers to avoid.
pub const REJECTED: Column = Column {
    noun: "a rejected answer",
    flag: "--rejected-column",
    names: &[
        "rejected",
        "dispreferred",
        "rejected_response",
        "response_rejected",
        "dispreferred_response",
        "pert_gen_text",
    ],
};

/// Toxic texts, each beside a benign one.
pub const TOXIC: Column = Column {
    noun: "a toxic text",
    flag: "--toxic-column",
    names: &["toxic", "toxic_text", "toxic_sentence"],
};
/// Benign texts, each beside a toxic one.
pub const BENIGN: Column = Column {
    noun: "a benign text",
    flag: "--benign-column",
    names: &["benign", "benign_text", "non_toxic", "nontoxic", "neutral", "neutral_sentence", "detoxified"],
};

/// Columns that belong to the prompt. A prompt without one of them is another prompt.
const MEANINGFUL: [&str; 10] = [
    "system",
    "system_prompt",
    "system_message",
    "instruction",
    "instructions",
    "question",
    "query",
    "context",
    "input",
    "history",
];

/// Columns that are often beside the rows and never belong to a prompt.
const HARMLESS: [&str; 51] = [
    "id",
    "index",
    "uid",
    "prompt_id",
    "meta",
    "metadata",
    "source",
    "dataset",
    "subset",
    "split",
    "category",
    "categories",
    "tags",
    "score",
    "scores",
    "score_chosen",
    "score_rejected",
    "rating",
    "url",
    "date",
    "timestamp",
    "author",
    "model",
    "filename",
    "begin",
    "end",
    "challenging",
    "toxicity",
    "label",
    "labels",
    "language",
    "lang",
    "locale",
    "annotations",
    "annotations_raw",
    "annotationsraw",
    "promptannotations",
    "completion",
    "continuation",
    "generations",
    "benigncompletion",
    "gold_text",
    "pert_gen_toks",
    "margin",
    "chosen",
    "rejected",
    "unpert_gen_text",
    "pert_gen_text",
    "severe_toxicity",
    "threat",
    "insult",
];

/// Whether two names are equal but for upper and lower case, and `-`, `_` and spaces.
fn is_same(name: &str, known: &str) -> bool {
    let fold = |byte: u8| match byte {
        b' ' | b'-' => b'_',
        byte => byte.to_ascii_lowercase(),
    };
    let name = name.trim();
    name.len() == known.len() && name.bytes().map(fold).eq(known.bytes().map(fold))
}

impl Column {
    /// The column in a row: its name and its value. `chosen` is the name that the user gave.
    pub fn find<'r>(
        &self,
        row: &'r Map<String, Value>,
        chosen: Option<&str>,
    ) -> Option<(&'r str, &'r Value)> {
        if let Some(name) = chosen {
            return lookup(row, name);
        }
        let exact = || self.names.iter().find_map(|name| row.get_key_value(*name));
        let folded = || self.names.iter().find_map(|name| row.iter().find(|(key, _)| is_same(key, name)));
        exact().or_else(folded).map(|(name, value)| (name.as_str(), value))
    }

    /// The value of an optional column, such as a language. `None` if it is missing, empty, null, NaN or `NA`.
    pub fn optional<'r>(
        &self,
        row: &'r Map<String, Value>,
        chosen: Option<&str>,
    ) -> Option<(&'r str, &'r Value)> {
        if chosen.is_some() {
            return self.find(row, chosen).filter(|(_, value)| !is_missing(value));
        }
        let exact = self.names.iter().filter_map(|name| row.get_key_value(*name));
        let mut exact = exact.filter(|(_, value)| !is_missing(value));
        let found = exact.next().map(|(name, value)| (name.as_str(), value));
        found.or_else(|| self.find(row, None).filter(|(_, value)| !is_missing(value)))
    }

    /// [`Column::optional`], but the column must be there if the user named it.
    ///
    /// # Errors
    /// The reason and a hint, in words.
    pub fn stated<'r>(
        &self,
        row: &'r Map<String, Value>,
        chosen: Option<&str>,
    ) -> Result<Option<(&'r str, &'r Value)>, (String, String)> {
        match chosen {
            Some(_) if self.find(row, chosen).is_none() => Err(self.absent(row, chosen)),
            _ => Ok(self.optional(row, chosen)),
        }
    }

    /// Refuses a row with a part of the prompt in a column besides `used`; `name` is the column of the prompt.
    ///
    /// # Errors
    /// The reason and a hint, in words.
    pub fn check_whole(
        &self,
        row: &Map<String, Value>,
        name: &str,
        used: &[&str],
    ) -> Result<(), (String, String)> {
        let Some(dropped) = dropped(row, used) else { return Ok(()) };
        Err((
            format!(
                "expected the whole prompt in the column {name:?}, found another part of it in {dropped:?}"
            ),
            format!("put both into one column, or read {name:?} alone with {} {}", self.flag, argument(name)),
        ))
    }

    /// Why no column of a row fits, and what to do.
    pub fn absent(&self, row: &Map<String, Value>, chosen: Option<&str>) -> (String, String) {
        let found = listed(row.keys().map(String::as_str));
        let found = if row.is_empty() { "no columns".to_owned() } else { format!("only {found}") };
        match chosen {
            Some(name) => (
                format!("expected {} in the column {name:?}, found {found}", self.noun),
                format!("give the name of a column to {}", self.flag),
            ),
            None => (
                format!("expected {} in a column such as {:?}, found {found}", self.noun, self.usual()),
                format!("name the column with {} (a table starts with the names of its columns)", self.flag),
            ),
        }
    }

    /// The name to show in messages.
    fn usual(&self) -> &'static str {
        self.names
            .iter()
            .find(|name| name.chars().all(|c| c.is_lowercase() || c == '_'))
            .copied()
            .unwrap_or_default()
    }
}

fn lookup<'r>(row: &'r Map<String, Value>, name: &str) -> Option<(&'r str, &'r Value)> {
    let exact = row.get_key_value(name);
    let found = exact.or_else(|| row.iter().find(|(key, _)| is_same(key, name.trim())));
    found.map(|(name, value)| (name.as_str(), value))
}

/// Up to eight names, quoted.
pub fn listed<'n>(names: impl Iterator<Item = &'n str>) -> String {
    let names: Vec<String> = names.take(9).map(|name| format!("{name:?}")).collect();
    match names.len() {
        9 => format!("{}, …", names[..8].join(", ")),
        _ => names.join(", "),
    }
}

/// A name as an argument for a shell.
pub fn argument(name: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "_-./".contains(c);
    match !name.is_empty() && !name.starts_with('-') && name.chars().all(is_plain) {
        true => name.to_owned(),
        false => format!("'{}'", name.replace('\'', "'\\''")),
    }
}

/// Whether a column of this name holds text, for recognising a table by its header.
pub(super) fn is_text_name(cell: &str) -> bool {
    let columns = [PROMPT, TEXT, LABELLED_TEXT, CONTINUATION, CHOSEN, REJECTED, TOXIC, BENIGN];
    columns.iter().flat_map(|column| column.names).any(|known| is_same(cell, known))
}

/// Whether a row has a prompt or an answer of its own, so that a list in it belongs to the row.
pub(super) fn has_text_name(row: &Map<String, Value>) -> bool {
    let is_broad = |name: &&str| ["query", "content"].contains(name);
    let names = PROMPT.names.iter().chain(CHOSEN.names).filter(|name| !is_broad(name));
    names.into_iter().any(|known| row.keys().any(|key| is_same(key, known)))
}

/// Whether a name is usual for any column.
pub(super) fn is_usual_name(cell: &str) -> bool {
    let columns = [ID, PROMPT_ID, LABEL, LANGUAGE];
    let mut known = columns.iter().flat_map(|column| column.names).chain(&HARMLESS).chain(&MEANINGFUL);
    is_text_name(cell) || known.any(|known| is_same(cell, known))
}

/// Whether a cell of a header is a name that the user gave.
pub(super) fn is_named(cell: &str, named: &[Option<&str>]) -> bool {
    named.iter().flatten().any(|name| is_same(cell, name.trim()))
}

/// The first column besides `used` that belongs to the prompt and has a value.
pub fn dropped<'r>(row: &'r Map<String, Value>, used: &[&str]) -> Option<&'r str> {
    let is_meant = |name: &str| !used.contains(&name) && MEANINGFUL.iter().any(|known| is_same(name, known));
    let has_value = |value: &Value| match value {
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
        value => !is_missing(value),
    };
    row.iter().find(|(name, value)| is_meant(name) && has_value(value)).map(|(name, _)| name.as_str())
}

/// Names of columns that are ignored, gathered over a file.
#[derive(Debug, Default)]
pub struct Ignored {
    unknown: std::collections::BTreeSet<String>,
    harmless: std::collections::BTreeSet<String>,
}

impl Ignored {
    /// Adds the columns of a row that are not `used`.
    pub fn add(&mut self, row: &Map<String, Value>, used: &[&str]) {
        for (name, value) in row {
            let is_known = self.unknown.contains(name) || self.harmless.contains(name);
            if is_known || used.contains(&name.as_str()) || name.trim().is_empty() || is_missing(value) {
                continue;
            }
            let is_harmless = HARMLESS.iter().any(|known| is_same(name, known))
                || name.to_lowercase().contains("annotation");
            let set = if is_harmless { &mut self.harmless } else { &mut self.unknown };
            if set.len() < 100 {
                set.insert(name.clone());
            }
        }
    }

    /// Logs the names once.
    pub fn log(&self, path: &std::path::Path) {
        if !self.unknown.is_empty() {
            let names = listed(self.unknown.iter().map(String::as_str));
            tracing::warn!("{}: these columns are not used: {names}", path.display());
        }
        if !self.harmless.is_empty() {
            let names = listed(self.harmless.iter().map(String::as_str));
            tracing::info!("{}: these columns are not used: {names}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn an_exact_name_comes_before_one_in_another_spelling() {
        let found = |value| PROMPT.find(&row(value), None).map(|(name, _)| name.to_owned());
        assert_eq!(found(json!({"text": "b", "prompt": "a"})).as_deref(), Some("prompt"));
        assert_eq!(found(json!({"PROMPT": "b", "text": "a"})).as_deref(), Some("text"));
        assert_eq!(found(json!({" Question ": "b"})).as_deref(), Some(" Question "));
        assert_eq!(found(json!({"prompt": null})).as_deref(), Some("prompt"));
        assert_eq!(found(json!({"x": "a"})), None);
        let given = row(json!({"x": "a", "prompt": "b"}));
        assert_eq!(PROMPT.find(&given, Some("X")).unwrap().0, "x");
        assert!(PROMPT.find(&given, Some("y")).is_none());
    }

    #[test]
    fn a_name_with_spaces_is_quoted_in_a_hint() {
        assert_eq!(argument("user_prompt"), "user_prompt");
        assert_eq!(argument("User's prompt"), "'User'\\''s prompt'");
    }

    #[test]
    fn a_column_that_belongs_to_the_prompt_is_found_unless_it_is_empty() {
        let found = |value| dropped(&row(value), &["prompt"]).map(str::to_owned);
        assert_eq!(found(json!({"prompt": "a", "System": "b"})).as_deref(), Some("System"));
        assert_eq!(found(json!({"prompt": "a", "history": [["b", "c"]]})).as_deref(), Some("history"));
        for harmless in [json!(""), json!(null), json!("nan"), json!([])] {
            assert_eq!(found(json!({"prompt": "a", "system": harmless, "id": 3})), None);
        }
    }
}
