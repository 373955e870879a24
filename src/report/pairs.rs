//! Formats the yield of preference pairs as tables for a terminal of 80 columns.

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

use crate::report::format;
use crate::report::terminal::wrapped;
use crate::study::make_pairs::choose::Dropped;
use crate::study::make_pairs::{LanguageYield, MadePairs};
use crate::text::printable;

/// Formats a row for each language, their sum, and the reasons why samples are in no pair.
pub fn to_terminal(made: &MadePairs) -> String {
    let mut sum = LanguageYield::default();
    let mut table = new_table(&["", "prompts", "with pairs", "samples", "clean", "toxic", "pairs"]);
    for (language, counts) in &made.yields {
        push_row(&mut table, language, counts);
        sum.n_prompts += counts.n_prompts;
        sum.n_prompts_paired += counts.n_prompts_paired;
        sum.n_samples += counts.n_samples;
        sum.n_chosen += counts.n_chosen;
        sum.n_rejected += counts.n_rejected;
        sum.n_pairs += counts.n_pairs;
        for (&reason, n) in &counts.dropped {
            *sum.dropped.entry(reason).or_default() += n;
        }
    }
    if made.yields.len() > 1 {
        push_row(&mut table, "all", &sum);
    }
    let mut text = format!("{table}\n");
    for (title, is_of_sample) in [("Samples dropped", true), ("Toxic samples without a partner", false)] {
        let reasons = Dropped::ALL.into_iter().filter(|reason| reason.is_of_sample() == is_of_sample);
        let counted: Vec<(Dropped, usize)> =
            reasons.filter_map(|reason| Some((reason, *sum.dropped.get(&reason)?))).collect();
        if counted.is_empty() {
            continue;
        }
        let mut table = new_table(&[title, "samples"]);
        for (reason, n) in counted {
            table.add_row([Cell::new(reason.reason()), number(n)]);
        }
        text.push_str(&format!("\n{table}\n"));
    }
    text.push('\n');
    text.push_str(&wrapped(
        "clean, toxic: samples below and above the toxicity thresholds that pass the other checks.",
        "",
    ));
    text
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.force_no_tty().set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn number(n: usize) -> Cell {
    Cell::new(format::count(n)).set_alignment(CellAlignment::Right)
}

fn push_row(table: &mut Table, label: &str, counts: &LanguageYield) {
    let numbers = [
        counts.n_prompts,
        counts.n_prompts_paired,
        counts.n_samples,
        counts.n_chosen,
        counts.n_rejected,
        counts.n_pairs,
    ];
    table.add_row(std::iter::once(Cell::new(printable(label))).chain(numbers.map(number)));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn counts(n_pairs: usize) -> LanguageYield {
        LanguageYield {
            n_prompts: 100_000,
            n_prompts_paired: 99_999,
            n_samples: 2_500_000,
            n_chosen: 2_000_000,
            n_rejected: 100_000,
            n_pairs,
            dropped: Dropped::ALL.map(|reason| (reason, 1_000_000)).into(),
        }
    }

    #[test]
    fn languages_their_sum_and_all_reasons_fit_in_80_columns() {
        let yields = BTreeMap::from([("de".to_owned(), counts(7)), ("zh-hant".to_owned(), counts(1_000))]);
        let text = to_terminal(&MadePairs { rows: Vec::new(), yields });
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        let row = |label: &str| {
            let line = text.lines().find(|line| line.trim_start().starts_with(label)).expect("a row");
            line.split_whitespace().last().unwrap().to_owned()
        };
        assert_eq!([row("de"), row("zh-hant"), row("all")], ["7", "1,000", "1,007"]);
        for reason in Dropped::ALL {
            let line =
                text.lines().find(|line| line.trim_start().starts_with(reason.reason())).expect("a row");
            assert!(line.trim_end().ends_with("2,000,000"), "{line}");
        }
    }

    #[test]
    fn one_language_has_no_sum_and_no_drops_have_no_table() {
        let yields = BTreeMap::from([("de".to_owned(), LanguageYield::default())]);
        let text = to_terminal(&MadePairs { rows: Vec::new(), yields });
        assert!(!text.contains("all ") && !text.contains("dropped"), "{text}");
    }
}
