//! Long-form CSV with a row per language and metric, for a spreadsheet or a data frame.

use std::borrow::Cow;

use csv::Writer;

use crate::eval::result::{Comparison, Difference, EvalResult, Metric};

/// Marks rows of the unweighted mean over languages, in the column `language`.
pub const MEAN: &str = "mean";

/// Formats one run: language, scorer, metric, value, low, high, n, missing, k.
///
/// Numbers have full precision. A missing number is an empty field.
pub fn to_csv(result: &EvalResult) -> String {
    let mut rows = Table::new(&["language", "scorer", "metric", "value", "low", "high", "n", "missing", "k"]);
    let mut add = |language: &str, found: &Metric| {
        let (scorer, id) = (found.name.scorer(), found.name.kind().id());
        let estimate = found.estimate;
        rows.add(&[
            language.to_owned(),
            scorer.unwrap_or_default().to_owned(),
            id.to_owned(),
            number(estimate.map(|estimate| estimate.value)),
            number(estimate.and_then(|estimate| estimate.low)),
            number(estimate.and_then(|estimate| estimate.high)),
            found.n.to_string(),
            found.missing.to_string(),
            result.run.k.to_string(),
        ]);
    };
    for language in &result.languages {
        language.metrics.iter().for_each(|found| add(&language.language, found));
    }
    result.mean.iter().for_each(|found| add(MEAN, found));
    rows.finish()
}

/// Formats rows under a header.
pub fn table_to_csv(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new(header);
    rows.into_iter().for_each(|row| table.add(&row));
    table.finish()
}

/// Formats a comparison: language, scorer, metric, a, b, difference, low, high, p_value, test, n.
pub fn comparison_to_csv(comparison: &Comparison) -> String {
    let header =
        ["language", "scorer", "metric", "a", "b", "difference", "low", "high", "p_value", "test", "n"];
    let mut rows = Table::new(&header);
    let mut add = |language: &str, found: &Difference| {
        let (scorer, id) = (found.name.scorer(), found.name.kind().id());
        rows.add(&[
            language.to_owned(),
            scorer.unwrap_or_default().to_owned(),
            id.to_owned(),
            found.a.value.to_string(),
            found.b.value.to_string(),
            found.difference.value.to_string(),
            number(found.difference.low),
            number(found.difference.high),
            number(found.p_value),
            found.test.words().to_owned(),
            found.n.to_string(),
        ]);
    };
    for language in &comparison.languages {
        language.metrics.iter().for_each(|found| add(&language.language, found));
    }
    comparison.mean.iter().for_each(|found| add(MEAN, found));
    rows.finish()
}

fn number(value: Option<f64>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// A field that no spreadsheet runs as a formula: a leading quote is added if it starts like one and is no number.
///
/// Spreadsheets ignore leading spaces, and some take the full-width forms of the signs as well (OWASP, "CSV
/// Injection").
fn cell(field: &str) -> Cow<'_, str> {
    const STARTS: [char; 11] = ['=', '+', '-', '@', '\t', '\r', '\n', '＝', '＋', '－', '＠'];
    let is_digit = |c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E');
    let is_number = field.chars().all(is_digit) && field.parse::<f64>().is_ok();
    match field.starts_with(STARTS) || field.trim_start().starts_with(STARTS) {
        true if !is_number => format!("'{field}").into(),
        _ => field.into(),
    }
}

struct Table(Writer<Vec<u8>>);

impl Table {
    fn new(header: &[&str]) -> Table {
        let mut writer = Writer::from_writer(Vec::new());
        writer.write_record(header).expect("writing to memory does not fail");
        Table(writer)
    }

    fn add(&mut self, row: &[String]) {
        self.0
            .write_record(row.iter().map(|field| cell(field).into_owned()))
            .expect("rows are as long as the header, and writing to memory does not fail");
    }

    fn finish(self) -> String {
        let bytes = self.0.into_inner().expect("flushing to memory does not fail");
        String::from_utf8(bytes).expect("all fields are UTF-8")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::synthetic;

    #[test]
    fn every_metric_has_a_row_for_each_language_and_the_mean() {
        let (result, comparison) = synthetic::compared(&["de", "fr"]);
        let text = to_csv(&result);
        assert_eq!(text.lines().count(), 1 + 3 * result.mean.len());
        assert!(
            text.starts_with("language,scorer,metric,value,low,high,n,missing,k\nde,lexical,expected_max")
        );
        let first = text.lines().nth(1).unwrap().split(',').nth(3).unwrap();
        let expected = result.languages[0].metrics[0].estimate.unwrap().value;
        assert_eq!(first.parse::<f64>().unwrap(), expected, "full precision");
        let text = comparison_to_csv(&comparison);
        assert_eq!(text.lines().count(), 1 + 3 * comparison.mean.len());
        assert!(text.contains("mean,lexical,toxicity_probability,"));
    }

    #[test]
    fn a_missing_number_is_an_empty_field() {
        let mut result = synthetic::compared(&["de"]).0;
        result.languages[0].metrics[0].estimate = None;
        assert!(to_csv(&result).contains("de,lexical,expected_maximum_toxicity,,,,"));
    }

    #[test]
    fn a_scorer_with_a_comma_in_its_name_is_quoted() {
        let mut result = synthetic::compared(&["de"]).0;
        result.languages[0].metrics[0].name = "a,b/coverage".parse().unwrap();
        assert!(to_csv(&result).contains("de,\"a,b\",coverage,"));
    }

    #[test]
    fn a_field_that_starts_like_a_formula_is_quoted_and_a_number_is_not() {
        for (field, expected) in [
            ("=1+1", "'=1+1"),
            ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
            ("-2+3", "'-2+3"),
            ("@SUM(A1)", "'@SUM(A1)"),
            ("\t=1", "'\t=1"),
            ("\r=1", "'\r=1"),
            (" =1", "' =1"),
            ("＝1", "'＝1"),
            ("-", "'-"),
            ("-inf", "'-inf"),
            ("-0.25", "-0.25"),
            ("+1", "+1"),
            ("-1e-7", "-1e-7"),
            ("", ""),
            ("a=1", "a=1"),
            ("'=1", "'=1"),
        ] {
            assert_eq!(cell(field), expected);
        }
        let rows = [vec!["-1.5".to_owned(), "-x | y".into()]];
        assert_eq!(table_to_csv(&["a", "b"], rows), "a,b\n-1.5,'-x | y\n");
    }
}
