//! Reports for a terminal of 80 columns.

use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table, presets};

use crate::eval::metric::MetricKind;
use crate::eval::result::{Comparison, EvalResult, Warning};
use crate::report::grid::{self, Grid, Row, Width};
use crate::report::{format, headline};
use crate::text::printable;

/// Maximum width of a line.
const N_COLUMNS: usize = 80;

/// Formats one run: headline, a table of toxicity for each scorer, a table of text quality, warnings.
pub fn to_terminal(result: &EvalResult, colour: bool) -> String {
    let mut text = wrapped(&headline::of_result(result), "");
    let level = format::level(result.run.bootstrap.level);
    for grid in grid::of_result(result, Width::Narrow) {
        push_table(&mut text, &grid, colour);
    }
    for pair in &result.agreement {
        let spearman = pair.spearman.map_or(format::NONE.into(), |rho| format!("{rho:.2}"));
        text.push('\n');
        text.push_str(&wrapped(
            &format!(
                "{} and {}: rank correlation {spearman}, equal verdicts {:.1}% of {} continuations.",
                pair.scorer_a,
                pair.scorer_b,
                100.0 * pair.equal_verdicts,
                format::count(pair.n),
            ),
            "",
        ));
    }
    text.push('\n');
    text.push_str(&wrapped(&format!("[low, high]: {level} interval, bootstrap over prompts."), ""));
    text.extend(headline::perplexity(&result.run).map(|note| wrapped(&note, "")));
    push_warnings(&mut text, &result.warnings, colour);
    text
}

/// Formats a comparison of two runs.
///
/// Headline, all metrics in the mean over languages, expected maximum toxicity by language, warnings.
pub fn comparison_to_terminal(comparison: &Comparison, colour: bool) -> String {
    let mut text = wrapped(&headline::of_comparison(comparison), "");
    text.push('\n');
    text.push_str(&wrapped(&format!("A: {}", comparison.label_a), "   "));
    text.push_str(&wrapped(&format!("B: {}", comparison.label_b), "   "));
    for grid in grid::of_comparison(comparison) {
        push_table(&mut text, &grid, colour);
    }
    for scorer in grid::shared_scorers(comparison) {
        if let Some(grid) = grid::of_metric(comparison, &MetricKind::ExpectedMaximumToxicity.by(Some(scorer)))
        {
            push_table(&mut text, &grid, colour);
        }
    }
    text.push('\n');
    let level = format::level(comparison.a.bootstrap.level);
    let note = format!(
        "[low, high]: {level} interval of the paired difference. p is not corrected for multiple comparisons."
    );
    text.push_str(&wrapped(&note, ""));
    text.extend(headline::perplexity_of_both(comparison).map(|note| wrapped(&note, "")));
    push_warnings(&mut text, &comparison.warnings, colour);
    text
}

/// Appends a table with its title.
pub(super) fn push_table(text: &mut String, grid: &Grid, colour: bool) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if colour {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    let bold = |cell: Cell| if colour { cell.add_attribute(Attribute::Bold) } else { cell };
    table.set_header(grid.header.iter().map(|title| bold(Cell::new(title))));
    for row in &grid.rows {
        let label = short(&printable(&row.label));
        let cells = std::iter::once(label).chain(row.cells.iter().map(|cell| printable(cell).into_owned()));
        table.add_row(cells.enumerate().map(|(index, text)| {
            let cell = Cell::new(text);
            let cell = if row.is_mean { bold(cell) } else { cell };
            tinted(cell, row, index, colour)
        }));
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if index > 0 && grid.rows.iter().all(|row| !row.cells[index - 1].contains('[')) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    text.push('\n');
    text.push_str(&wrapped(&grid.title, ""));
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

/// Colours the cell of a significant difference green or red.
fn tinted(cell: Cell, row: &Row, index: usize, colour: bool) -> Cell {
    let is_difference = index > 0 && row.cells.len().checked_sub(1) == Some(index);
    match row.better {
        Some(better) if colour && is_difference => cell.fg(if better { Color::Green } else { Color::Red }),
        _ => cell,
    }
}

/// Shortens a label to nine characters, so that tables fit the width.
fn short(label: &str) -> String {
    if label.chars().count() <= 9 {
        return label.to_owned();
    }
    label.chars().take(8).chain(['…']).collect()
}

/// Appends warnings with their advice.
pub(super) fn push_warnings(text: &mut String, warnings: &[Warning], colour: bool) {
    for warning in warnings {
        text.push('\n');
        let line = wrapped(&format!("warning: {}", warning.what), "  ");
        let (label, rest) = line.split_at("warning:".len());
        text.push_str(&if colour { format!("\u{1b}[1;33m{label}\u{1b}[0m{rest}") } else { line.clone() });
        text.push_str(&wrapped(&format!("  {}", warning.advice), "  "));
    }
}

/// Wraps text at spaces to 80 columns and ends it with a newline. Longer words are broken.
///
/// Control characters are escaped, line feeds too: the text is one paragraph.
pub(super) fn wrapped(text: &str, indent: &str) -> String {
    let text = printable(text);
    let mut lines = vec![String::new()];
    let mut width = 0;
    for (index, word) in text.split(' ').enumerate() {
        let n_word = word.chars().count();
        if index > 0 && width + 1 + n_word > N_COLUMNS {
            lines.push(indent.to_owned());
            width = indent.len();
        } else if index > 0 {
            lines.last_mut().expect("there is at least one line").push(' ');
            width += 1;
        }
        for letter in word.chars() {
            if width == N_COLUMNS {
                lines.push(indent.to_owned());
                width = indent.len();
            }
            lines.last_mut().expect("there is at least one line").push(letter);
            width += 1;
        }
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::result::{Difference, Estimate, Metric};
    use crate::report::synthetic;

    const ALL: [&str; 17] = [
        "ar", "cs", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "nl", "pl", "pt", "ru", "sv", "zh",
    ];

    fn assert_fits(text: &str) {
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{} columns: {line}", line.chars().count());
        }
    }

    #[test]
    fn no_line_is_wider_than_80_columns() {
        let (result, comparison) = synthetic::compared(&ALL);
        let text = to_terminal(&result, false);
        assert_fits(&text);
        assert_fits(&comparison_to_terminal(&comparison, false));
        assert!(!text.contains('\u{1b}'), "no colours by default");
        // Headline, 2 tables of 17 languages and one of the text.
        assert_eq!(text.lines().filter(|line| line.starts_with("mean ")).count(), 3);
        assert_eq!(text.lines().filter(|line| line.starts_with("ar ")).count(), 3);
    }

    #[test]
    fn wide_numbers_and_long_language_codes_fit_too() {
        let (mut result, mut comparison) = synthetic::compared(&["de", "fr"]);
        let wide = |name: &str| {
            let value = if name.starts_with("perplexity") { 9999.9 } else { 1.0 };
            Estimate { value, low: Some(value), high: Some(value) }
        };
        let widen = |metrics: &mut Vec<Metric>| {
            metrics.iter_mut().for_each(|metric| metric.estimate = Some(wide(&metric.name.to_string())));
        };
        for language in &mut result.languages {
            language.language = "zh-Hans-and-more".into();
            language.n_prompts = 999_999;
            widen(&mut language.metrics);
        }
        widen(&mut result.mean);
        assert_fits(&to_terminal(&result, false));
        let widen = |differences: &mut Vec<Difference>| {
            for found in differences {
                let estimate = wide(&found.name.to_string());
                let value = -estimate.value;
                found.a = estimate;
                found.b = estimate;
                found.difference = Estimate { value, low: Some(value), high: Some(value) };
            }
        };
        for language in &mut comparison.languages {
            language.language = "zh-Hans-and-more".into();
            language.n_prompts = 999_999;
            widen(&mut language.metrics);
        }
        widen(&mut comparison.mean);
        comparison.label_a = "a/very/long/path/without/any/space/".repeat(5);
        assert_fits(&comparison_to_terminal(&comparison, false));
    }

    #[test]
    fn colours_are_optional_and_do_not_change_the_text() {
        let (result, comparison) = synthetic::compared(&["de", "fr"]);
        let plain = |text: &str| {
            let mut out = String::new();
            let mut chars = text.chars();
            while let Some(letter) = chars.next() {
                if letter == '\u{1b}' {
                    chars.by_ref().find(|letter| *letter == 'm');
                } else {
                    out.push(letter);
                }
            }
            out.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
        };
        let coloured = comparison_to_terminal(&comparison, true);
        assert!(coloured.contains('\u{1b}'));
        assert_eq!(plain(&coloured), plain(&comparison_to_terminal(&comparison, false)));
        assert_eq!(plain(&to_terminal(&result, true)), plain(&to_terminal(&result, false)));
    }

    #[test]
    fn text_is_wrapped_at_spaces_to_80_columns() {
        let text = wrapped(&"word ".repeat(40), "  ");
        assert_fits(&text);
        assert_eq!(text.split_whitespace().count(), 40);
        assert_fits(&wrapped(&"x".repeat(200), "  "));
        assert_eq!(wrapped("a b", ""), "a b\n");
    }
}
