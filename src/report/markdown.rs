//! `report.md`: tables and settings, without the texts of continuations.

use std::fmt::Write;

use crate::eval::metric::METRICS;
use crate::eval::result::{Comparison, EvalResult, RunInfo, Warning};
use crate::report::grid::{self, Grid, Width};
use crate::report::{format, headline};
use crate::text::printable;

/// Formats one run.
pub fn to_markdown(result: &EvalResult) -> String {
    let mut text = String::from("# Toxicity of continuations\n\n");
    let n_prompts = result.languages.iter().map(|language| language.n_prompts).sum();
    let n_samples = result.languages.iter().map(|language| language.n_samples).sum();
    paragraph(&mut text, &headline::of_result(result));
    paragraph(
        &mut text,
        &headline::what_was_measured(&result.run, n_prompts, n_samples, result.languages.len()),
    );
    headline::perplexity(&result.run).iter().for_each(|note| paragraph(&mut text, note));
    push_warnings(&mut text, &result.warnings);
    for grid in grid::of_result(result, Width::Full) {
        push_table(&mut text, &grid);
    }
    if !result.agreement.is_empty() {
        text.push_str("## Agreement of scorers\n\n");
        text.push_str("| Scorers | Continuations | Spearman | Equal verdicts |\n|---|---:|---:|---:|\n");
        for pair in &result.agreement {
            let spearman = pair.spearman.map_or(format::NONE.into(), |rho| format!("{rho:.3}"));
            line(
                &mut text,
                format_args!(
                    "| {} | {} | {spearman} | {:.1}% |",
                    cell(&format!("{}, {}", pair.scorer_a, pair.scorer_b)),
                    format::count(pair.n),
                    100.0 * pair.equal_verdicts
                ),
            );
        }
        text.push('\n');
    }
    push_definitions(&mut text, &result.run);
    push_settings(&mut text, "Settings", &result.run);
    text
}

/// Formats a comparison of two runs.
pub fn comparison_to_markdown(comparison: &Comparison) -> String {
    let mut text = String::from("# Comparison of two runs\n\n");
    paragraph(&mut text, &headline::of_comparison(comparison));
    line(&mut text, format_args!("- A: {}", cell(&comparison.label_a)));
    line(&mut text, format_args!("- B: {}\n", cell(&comparison.label_b)));
    headline::perplexity_of_both(comparison).iter().for_each(|note| paragraph(&mut text, note));
    push_warnings(&mut text, &comparison.warnings);
    for grid in grid::of_comparison(comparison) {
        push_table(&mut text, &grid);
    }
    for name in grid::tested_metrics(comparison) {
        if let Some(grid) = grid::of_metric(comparison, &name) {
            push_table(&mut text, &grid);
        }
    }
    text.push_str("p-values are two-sided and not corrected for multiple comparisons. The tests:\n\n");
    for metric in METRICS {
        line(&mut text, format_args!("- {}: {}", metric.term, metric.test.words()));
    }
    text.push('\n');
    push_definitions(&mut text, &comparison.a);
    push_settings(&mut text, "Settings of A", &comparison.a);
    push_settings(&mut text, "Settings of B", &comparison.b);
    text
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    writeln!(text, "{arguments}").expect("writing to a string does not fail");
}

pub(super) fn paragraph(text: &mut String, words: &str) {
    line(text, format_args!("{}\n", cell(words)));
}

/// Escapes external text, so that it cannot add table cells, HTML or line breaks, or reorder its neighbours.
fn cell(text: &str) -> String {
    let one_line = text.replace(['\n', '\r'], " ");
    let text = printable(&one_line);
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '<' => safe.push_str("&lt;"),
            '&' => safe.push_str("&amp;"),
            '|' | '*' | '`' | '[' | ']' | '\\' => safe.extend(['\\', letter]),
            _ => safe.push(letter),
        }
    }
    safe
}

pub(super) fn push_table(text: &mut String, grid: &Grid) {
    line(text, format_args!("## {}\n", cell(&grid.title)));
    line(text, format_args!("| {} |", grid.header.join(" | ")));
    line(text, format_args!("|---|{}", "---:|".repeat(grid.header.len() - 1)));
    for row in &grid.rows {
        let emphasis = if row.is_mean { "**" } else { "" };
        let cells: Vec<String> = row.cells.iter().map(|text| cell(text)).collect();
        line(text, format_args!("| {emphasis}{}{emphasis} | {} |", cell(&row.label), cells.join(" | ")));
    }
    text.push('\n');
}

pub(super) fn push_warnings(text: &mut String, warnings: &[Warning]) {
    if warnings.is_empty() {
        return;
    }
    text.push_str("## Warnings\n\n");
    for warning in warnings {
        let [what, advice] = [&warning.what, &warning.advice].map(|words| cell(&format::capitalized(words)));
        line(text, format_args!("- {what}. {advice}."));
    }
    text.push('\n');
}

fn push_definitions(text: &mut String, run: &RunInfo) {
    text.push_str("## Definitions\n\n");
    for metric in METRICS {
        line(
            text,
            format_args!(
                "- {} ({}): {} Source: {}.",
                metric.term, metric.title, metric.definition, metric.source
            ),
        );
    }
    line(
        text,
        format_args!(
            "- \\[low, high\\]: {} interval, percentile bootstrap over prompts, {} resamples, seed {}.",
            format::level(run.bootstrap.level),
            run.bootstrap.resamples,
            run.bootstrap.seed
        ),
    );
    text.push_str("- mean: over languages, each with the same weight.\n\n");
}

fn push_settings(text: &mut String, title: &str, run: &RunInfo) {
    line(text, format_args!("## {title}\n\n| Setting | Value |\n|---|---|"));
    for (name, value) in format::settings(run) {
        line(text, format_args!("| {} | {} |", cell(&name), cell(&value)));
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::synthetic;

    #[test]
    fn table_rows_have_as_many_cells_as_the_header() {
        let (result, comparison) = synthetic::compared(&["de", "fr"]);
        for text in [to_markdown(&result), comparison_to_markdown(&comparison)] {
            let mut n_cells = None;
            for line in text.lines() {
                if !line.starts_with('|') {
                    n_cells = None;
                    continue;
                }
                let n = line.replace("\\|", "").matches('|').count();
                assert_eq!(*n_cells.get_or_insert(n), n, "{line}");
            }
            assert!(text.contains("43.") || text.contains('%'));
        }
    }

    #[test]
    fn external_text_cannot_break_the_page() {
        let mut result = synthetic::compared(&["de"]).0;
        result.run.steering = Some("a|b\n<script>alert(1)</script>".into());
        let text = to_markdown(&result);
        assert!(!text.contains("<script>"));
        assert!(text.contains("a\\|b &lt;script>"));
    }

    #[test]
    fn the_page_has_hashes_settings_and_definitions() {
        let result = synthetic::compared(&["de"]).0;
        let text = to_markdown(&result);
        assert!(text.contains(&"fedcba9876543210".repeat(4)));
        assert!(text.contains("n-gpu-layers"));
        for metric in METRICS {
            assert!(text.contains(metric.definition));
        }
    }
}
