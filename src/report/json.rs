//! `report.json`: the result tree itself.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Result;
use crate::finite;

/// Formats a result as indented JSON with a final newline. Equal results give equal bytes.
///
/// # Errors
/// [`crate::Error::NotFinite`] for a result with NaN or an infinity.
pub fn to_json<T: Serialize>(result: &T) -> Result<String> {
    finite::check_json(result)?;
    let mut text = serde_json::to_string_pretty(result)
        .expect("the result tree has string keys only, and its Serialize is derived");
    text.push('\n');
    Ok(text)
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
        let text = to_json(&result).unwrap();
        assert_eq!(from_json::<EvalResult>(&text).unwrap(), result);
        assert_eq!(to_json(&from_json::<EvalResult>(&text).unwrap()).unwrap(), text);
        assert_eq!(from_json::<Comparison>(&to_json(&comparison).unwrap()).unwrap(), comparison);
    }

    #[test]
    fn rejects_a_result_that_json_would_write_as_null() {
        let (mut result, _) = synthetic::compared(&["de", "fr"]);
        result.languages[1].metrics[0].estimate.as_mut().unwrap().value = f64::NAN;
        let error = to_json(&result).unwrap_err().to_string();
        assert_eq!(error, "languages[1].metrics[0].estimate.value: expected a finite number, found NaN");
    }
}
