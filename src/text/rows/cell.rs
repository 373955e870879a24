//! Values of cells as pandas, Excel and others write them.

use serde_json::Value;

/// Spellings of a missing value.
const MISSING: [&str; 9] = ["", "na", "n/a", "<na>", "#n/a", "nan", "null", "none", "nat"];

/// Whether a value is missing: null, empty, `NaN`, `NA`, `None` and the like.
///
/// For ids, languages and labels only: a text may be "NA".
pub fn is_missing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => {
            let text = text.trim();
            text.len() <= 4 && MISSING.contains(&text.to_ascii_lowercase().as_str())
        }
        _ => false,
    }
}

/// The type of a JSON value in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The text of a cell: a string, or the `text` of an object as in RealToxicityPrompts.
///
/// # Errors
/// The reason in words, with the field's name, and a hint for a conversation.
pub fn text<'v>(name: &str, value: &'v Value) -> Result<&'v str, (String, Option<&'static str>)> {
    let refuse = |reason: String| Err((reason, None));
    match value {
        Value::String(text) => Ok(text),
        Value::Object(object) => match object.get("text") {
            Some(Value::String(text)) => Ok(text),
            Some(other) => refuse(format!("field \"{name}.text\": expected a string, found {}", kind(other))),
            None if is_message(value) => Err((messages(name), Some(MESSAGES_HINT))),
            None => refuse(format!("field {name:?}: expected \"text\" in it, found none")),
        },
        Value::Array(list) if !list.is_empty() && list.iter().all(is_message) => {
            Err((messages(name), Some(MESSAGES_HINT)))
        }
        other => refuse(format!("field {name:?}: expected a string, found {}", kind(other))),
    }
}

fn messages(name: &str) -> String {
    format!("field {name:?}: expected a string, found the messages of a chat, which are not supported yet")
}

const MESSAGES_HINT: &str = "write the text to continue as one string, without roles";

/// Whether a value is a message of a chat, in OpenAI's or ShareGPT's form.
pub fn is_message(value: &Value) -> bool {
    let has = |role: &str, text: &str| value.get(role).is_some() && value.get(text).is_some();
    has("role", "content") || has("from", "value")
}

/// Whether a row is a chat: a list of messages under a usual name.
pub fn chat(row: &serde_json::Map<String, Value>) -> Option<(String, Option<&'static str>)> {
    let is_chat =
        |value: &&Value| value.as_array().is_some_and(|list| !list.is_empty() && list.iter().all(is_message));
    let names = ["messages", "conversations", "conversation", "chat", "dialog", "dialogue"];
    let found = names.iter().find(|name| row.get(**name).filter(is_chat).is_some())?;
    Some((messages(found), Some(MESSAGES_HINT)))
}

/// A number, also with a decimal comma, as a German Excel writes it. "1,000" is refused: it may be a thousand.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => {
            let text = text.trim();
            let number = text.parse().ok();
            let is_plain =
                |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || b"+-,eE".contains(&byte));
            let with_comma = || {
                let (whole, fraction) = text.split_once(',')?;
                // "1,000" may be one thousand.
                let is_grouped = fraction.len() == 3 && !matches!(whole, "0" | "-0" | "+0");
                (!is_grouped && !fraction.contains(',') && is_plain(text))
                    .then(|| text.replace(',', ".").parse().ok())
                    .flatten()
            };
            number.or_else(with_comma).filter(|number: &f64| number.is_finite())
        }
        _ => None,
    }
}

/// Whether a label means toxic.
///
/// Toxic: true, 1, yes, toxic. Benign: false, 0, no, non-toxic, benign. Numbers may be floats (`1.0`), words in upper
/// or lower case.
///
/// # Errors
/// The reason in words.
pub fn label(value: &Value) -> Result<bool, String> {
    if is_missing(value) {
        return Err("expected a label, found none".into());
    }
    let found = match value {
        Value::Bool(label) => return Ok(*label),
        Value::String(text) => match text.trim().to_lowercase().replace(['-', '_', ' '], "").as_str() {
            "true" | "t" | "yes" | "y" | "toxic" => return Ok(true),
            "false" | "f" | "no" | "n" | "nontoxic" | "nottoxic" | "benign" | "clean" => return Ok(false),
            // Excel in German, French, Spanish, Italian, Portuguese, Dutch and Polish.
            "wahr" | "ja" | "vrai" | "oui" | "verdadero" | "sí" | "si" | "sì" | "vero" | "verdadeiro"
            | "sim" | "waar" | "prawda" | "tak" => return Ok(true),
            "falsch" | "nein" | "faux" | "non" | "falso" | "não" | "onwaar" | "nee" | "fałsz" | "nie" => {
                return Ok(false);
            }
            _ => format!("{text:?}"),
        },
        Value::Number(number) => number.to_string(),
        other => kind(other).to_owned(),
    };
    match number(value) {
        Some(0.0) => Ok(false),
        Some(1.0) => Ok(true),
        Some(-1.0) => {
            Err(format!("expected label 0 or 1, found {found} (-1 marks rows that Jigsaw did not score)"))
        }
        _ => Err(format!(
            "expected label 0 or 1 (also true or false, yes or no, toxic or non-toxic), found {found}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn labels_are_read_as_pandas_and_excel_write_them() {
        for toxic in [
            json!(true),
            json!(1),
            json!(1.0),
            json!("True"),
            json!("TRUE"),
            json!("WAHR"),
            json!("Vrai"),
            json!("VERDADERO"),
            json!("1.0"),
            json!("1,0"),
            json!(" 1 "),
            json!("Yes"),
            json!("toxic"),
        ] {
            assert_eq!(label(&toxic), Ok(true), "{toxic}");
        }
        for benign in [
            json!(false),
            json!(0),
            json!("FALSE"),
            json!("FALSCH"),
            json!("Faux"),
            json!("FALSO"),
            json!("FAŁSZ"),
            json!("0"),
            json!("-0.0"),
            json!("no"),
            json!("non-toxic"),
            json!("Not toxic"),
        ] {
            assert_eq!(label(&benign), Ok(false), "{benign}");
        }
        for (other, reason) in [
            (json!("<NA>"), "found none"),
            (json!(null), "found none"),
            (json!(2), "found 2"),
            (json!("0,85"), "found \"0,85\""),
            (json!(-1), "Jigsaw"),
            (json!("maybe"), "found \"maybe\""),
            (json!([1]), "an array"),
        ] {
            assert!(label(&other).unwrap_err().contains(reason), "{other}");
        }
    }

    #[test]
    fn numbers_may_have_a_decimal_comma_but_no_grouping() {
        assert_eq!(number(&json!("0,85")), Some(0.85));
        assert_eq!(number(&json!("0,125")), Some(0.125));
        assert_eq!(number(&json!("-1.5e3")), Some(-1500.0));
        for other in
            [json!("1,000"), json!("1,000,000"), json!("1.000,5"), json!("inf"), json!("NaN"), json!("a")]
        {
            assert_eq!(number(&other), None, "{other}");
        }
    }
}
