//! `report.json`: the result tree itself.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Formats a result as indented JSON with a final newline. Equal results give equal bytes.
pub fn to_json<T: Serialize>(result: &T) -> String {
    let mut text = serde_json::to_string_pretty(result)
        .expect("the result tree has string keys only, and its Serialize is derived");
    text.push('\n');
    text
}

/// Parses the text of a `report.json`.
///
/// # Errors
/// The parser's error, with line and column but without the path.
pub fn from_json<T: DeserializeOwned>(text: &str) -> serde_json::Result<T> {
    serde_json::from_str(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::result::{Comparison, EvalResult};
    use crate::report::synthetic;

    #[test]
    fn results_survive_a_round_trip() {
        let (result, comparison) = synthetic::compared(&["de", "fr"]);
        let text = to_json(&result);
        assert_eq!(from_json::<EvalResult>(&text).unwrap(), result);
        assert_eq!(to_json(&from_json::<EvalResult>(&text).unwrap()), text);
        assert_eq!(from_json::<Comparison>(&to_json(&comparison)).unwrap(), comparison);
    }
}
