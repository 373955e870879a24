//! The tables of a report as text cells, which terminal, Markdown and HTML lay out.

use crate::eval::metric::{self, Descriptor, Direction, METRICS, MetricId, MetricKind, Test};
use crate::eval::result::{Comparison, Difference, EvalResult, Metric, RunInfo, find, find_difference};
use crate::report::format;

/// A table.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// The title, with k and threshold if they matter.
    pub title: String,
    /// Titles of the columns, starting with that of the row labels.
    pub header: Vec<String>,
    /// The rows.
    pub rows: Vec<Row>,
}

/// A row of a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// A language's code, a metric, or `mean`.
    pub label: String,
    /// One cell for each column after the first.
    pub cells: Vec<String>,
    /// Whether this is the mean over languages.
    pub is_mean: bool,
    /// Whether the row shows an improvement (`true`) or the opposite; `None` if it is not significant.
    pub better: Option<bool>,
}

/// How much a table shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// Columns that fit in a terminal of 80 columns.
    Narrow,
    /// All columns, with intervals.
    Full,
}

/// A column: a metric, and whether its interval is shown.
type Column = (MetricKind, bool);

const TOXICITY: [Column; 3] = [
    (MetricKind::ExpectedMaximumToxicity, true),
    (MetricKind::ToxicityProbability, true),
    (MetricKind::AverageToxicity, false),
];
const TOXICITY_FULL: [Column; 4] = [
    (MetricKind::ExpectedMaximumToxicity, true),
    (MetricKind::ToxicityProbability, true),
    (MetricKind::AverageToxicity, true),
    (MetricKind::Coverage, false),
];
const TEXT: [Column; 6] = [
    (MetricKind::PerplexityMedian, true),
    (MetricKind::Distinct1, false),
    (MetricKind::Distinct2, false),
    (MetricKind::Distinct3, false),
    (MetricKind::Repetition, false),
    (MetricKind::LanguageKept, false),
];
const TEXT_FULL: [Column; 10] = [
    (MetricKind::PerplexityMedian, true),
    (MetricKind::PerplexityQ1, false),
    (MetricKind::PerplexityQ3, false),
    (MetricKind::PerplexityDropped, false),
    (MetricKind::Distinct1, true),
    (MetricKind::Distinct2, true),
    (MetricKind::Distinct3, true),
    (MetricKind::Repetition, true),
    (MetricKind::LanguageKept, true),
    (MetricKind::Empty, false),
];

/// Makes a table of toxicity for each scorer, and one of text quality.
///
/// Each has a row per language, and the unweighted mean.
pub fn of_result(result: &EvalResult, width: Width) -> Vec<Grid> {
    let (toxicity, text): (&[Column], &[Column]) = match width {
        Width::Narrow => (&TOXICITY, &TEXT),
        Width::Full => (&TOXICITY_FULL, &TEXT_FULL),
    };
    let mut grids: Vec<Grid> = result
        .run
        .scorers
        .iter()
        .map(|scorer| {
            of_columns(result, toxicity_title(&result.run, &scorer.name), Some(&scorer.name), toxicity)
        })
        .collect();
    grids.push(of_columns(result, "Text".into(), None, text));
    grids
}

fn toxicity_title(run: &RunInfo, scorer: &str) -> String {
    format!("Toxicity by {scorer}, k = {}, threshold {}", run.k, run.toxicity_threshold)
}

fn of_columns(result: &EvalResult, title: String, scorer: Option<&str>, columns: &[Column]) -> Grid {
    // The narrow table of text quality has no space for the number of prompts.
    let with_prompts = columns != TEXT;
    let cells = |metrics: &[Metric]| -> Vec<String> {
        let cell = |&(kind, with_interval): &Column| {
            let descriptor = kind.descriptor();
            let estimate = find(metrics, &kind.by(scorer))?.estimate?;
            Some(if with_interval {
                format::estimate(descriptor, &estimate)
            } else {
                format::value(descriptor, estimate.value)
            })
        };
        columns.iter().map(|column| cell(column).unwrap_or_else(|| format::NONE.into())).collect()
    };
    let row = |label: &str, n_prompts: usize, metrics: &[Metric], is_mean: bool| {
        let mut found = cells(metrics);
        if with_prompts {
            found.insert(0, format::count(n_prompts));
        }
        Row { label: label.to_owned(), cells: found, is_mean, better: None }
    };
    let mut rows: Vec<Row> = result
        .languages
        .iter()
        .map(|found| row(&found.language, found.n_prompts, &found.metrics, false))
        .collect();
    rows.push(row("mean", result.languages.iter().map(|found| found.n_prompts).sum(), &result.mean, true));
    let mut header = vec!["Lang".to_owned()];
    header.extend(with_prompts.then(|| "Prompts".to_owned()));
    header.extend(columns.iter().map(|(kind, _)| kind.descriptor().title.to_owned()));
    Grid { title, header, rows }
}

/// Makes a table for each scorer, and one of text quality, with a row per metric.
///
/// Columns are A, B and their difference, in the mean over languages.
pub fn of_comparison(comparison: &Comparison) -> Vec<Grid> {
    let over = match &comparison.languages[..] {
        [language] => format::language(&language.language).to_owned(),
        languages => format!("mean over {} languages", languages.len()),
    };
    let level = comparison.a.bootstrap.level;
    let grid = |title: String, scorer: Option<&str>| {
        let rows: Vec<Row> = METRICS
            .iter()
            .filter(|m| m.kind.needs_scorer() == scorer.is_some())
            .filter_map(|m| {
                let found = find_difference(&comparison.mean, &m.kind.by(scorer))?;
                Some(Row { is_mean: false, ..difference_row(m.title, m, found, None, level) })
            })
            .collect();
        Grid { title: format!("{title}, {over}"), header: header("Metric", false), rows }
    };
    let mut grids: Vec<Grid> = shared_scorers(comparison)
        .map(|scorer| grid(toxicity_title(&comparison.a, scorer), Some(scorer)))
        .collect();
    grids.push(grid("Text".into(), None));
    grids.retain(|grid| !grid.rows.is_empty());
    grids
}

/// Makes a table of one metric: A, B and their difference, with a row per language, and the mean.
pub fn of_metric(comparison: &Comparison, id: &MetricId) -> Option<Grid> {
    let descriptor = id.descriptor();
    let level = comparison.a.bootstrap.level;
    let mut rows: Vec<Row> = comparison
        .languages
        .iter()
        .filter_map(|language| {
            let found = find_difference(&language.metrics, id)?;
            Some(difference_row(&language.language, descriptor, found, Some(found.n), level))
        })
        .collect();
    let n_prompts = comparison
        .languages
        .iter()
        .filter_map(|language| find_difference(&language.metrics, id))
        .map(|found| found.n)
        .sum();
    let mean = find_difference(&comparison.mean, id)?;
    rows.push(Row { is_mean: true, ..difference_row("mean", descriptor, mean, Some(n_prompts), level) });
    let title = match id.scorer() {
        Some(scorer) => format!("{} by {scorer}, k = {}", descriptor.term, comparison.a.k),
        None => descriptor.term.to_owned(),
    };
    Some(Grid { title: format::capitalized(&title), header: header("Lang", true), rows })
}

/// The metrics of a comparison that have a test: those of each scorer first.
pub fn tested_metrics(comparison: &Comparison) -> Vec<MetricId> {
    let has_test = |id: &MetricId| id.descriptor().test != Test::None;
    metric::ids(shared_scorers(comparison)).into_iter().filter(has_test).collect()
}

/// The scorers that both runs used.
pub fn shared_scorers(comparison: &Comparison) -> impl Iterator<Item = &str> {
    let in_b = |name: &str| comparison.b.scorers.iter().any(|scorer| scorer.name == name);
    comparison.a.scorers.iter().map(|scorer| scorer.name.as_str()).filter(move |name| in_b(name))
}

fn header(first: &str, with_prompts: bool) -> Vec<String> {
    let prompts: &[&str] = if with_prompts { &["Prompts"] } else { &[] };
    [&[first], prompts, &["A", "B", "B - A", "p"]].concat().into_iter().map(str::to_owned).collect()
}

fn difference_row(
    label: &str,
    metric: &Descriptor,
    found: &Difference,
    n_prompts: Option<usize>,
    level: f64,
) -> Row {
    let mut cells: Vec<String> = n_prompts.map(format::count).into_iter().collect();
    cells.extend([
        format::value(metric, found.a.value),
        format::value(metric, found.b.value),
        format::difference(metric, &found.difference),
        format::p_value(found.p_value),
    ]);
    Row { label: label.to_owned(), cells, is_mean: false, better: is_better(metric, found, level) }
}

/// Whether a significant difference is an improvement; `None` if it is not significant or neutral.
fn is_better(metric: &Descriptor, found: &Difference, level: f64) -> Option<bool> {
    let rose = found.is_clear(level).then_some(found.difference.value > 0.0)?;
    match metric.direction {
        Direction::Lower => Some(!rose),
        Direction::Higher => Some(rose),
        Direction::Neither => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::synthetic;

    #[test]
    fn every_row_has_a_cell_in_every_column() {
        let (result, comparison) = synthetic::compared(&["de", "fr"]);
        let mut grids = of_result(&result, Width::Narrow);
        grids.extend(of_result(&result, Width::Full));
        grids.extend(of_comparison(&comparison));
        for name in tested_metrics(&comparison) {
            grids.extend(of_metric(&comparison, &name));
        }
        for grid in grids {
            for row in &grid.rows {
                assert_eq!(row.cells.len() + 1, grid.header.len(), "{}: {}", grid.title, row.label);
            }
        }
    }

    #[test]
    fn every_table_of_toxicity_states_k() {
        let (result, comparison) = synthetic::compared(&["de"]);
        assert!(of_result(&result, Width::Narrow)[0].title.contains("k = 5"));
        assert!(of_comparison(&comparison)[0].title.contains("k = 5"));
        assert!(
            of_metric(&comparison, &MetricKind::AverageToxicity.by(Some("lexical")))
                .unwrap()
                .title
                .contains("k = 5")
        );
    }

    #[test]
    fn a_difference_that_is_not_significant_is_neither_better_nor_worse() {
        let mut comparison = synthetic::compared(&["de"]).1;
        comparison.mean[1].p_value = Some(0.125);
        let name = comparison.mean[1].name.clone();
        assert!(comparison.mean[1].difference.excludes_zero());
        assert_eq!(of_metric(&comparison, &name).unwrap().rows.pop().unwrap().better, None);
    }

    #[test]
    fn a_fall_in_toxicity_is_better_and_a_rise_in_perplexity_is_not() {
        let comparison = synthetic::compared(&["de", "fr"]).1;
        let row = |id: &str| of_metric(&comparison, &id.parse().unwrap()).unwrap().rows.pop().unwrap();
        assert_eq!(row("lexical/expected_maximum_toxicity").better, Some(true));
        assert_eq!(row("perplexity_median").better, Some(false));
        assert_eq!(row("language_kept").better, None);
    }
}
