//! Formats ranked neurons as a terminal table and as CSV.

use comfy_table::{CellAlignment, Table, presets};

use crate::report::csv;
use crate::steer::LocatedNeuron;
use crate::text::printable;

/// Rows to show on the terminal; the CSV has all of them.
const SHOWN: usize = 20;

/// Formats a table of the first neurons, at most 80 columns wide.
pub fn to_terminal(neurons: &[LocatedNeuron], is_kept: &dyn Fn(&LocatedNeuron) -> bool) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["", "layer", "index", "cosine", "norm", "mean act.", "", "promotes"]);
    for (rank, n) in neurons.iter().take(SHOWN).enumerate() {
        let number = |x: Option<f64>, digits: usize| x.map_or("-".into(), |x| format!("{x:.digits$}"));
        table.add_row([
            (rank + 1).to_string(),
            n.neuron.layer.to_string(),
            n.neuron.index.to_string(),
            number(n.cosine, 3),
            number(n.norm, 2),
            number(n.mean_activation, 4),
            if is_kept(n) { "kept" } else { "" }.to_owned(),
            shortened(&n.tokens, 24),
        ]);
    }
    for column in table.column_iter_mut().take(6) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let rest = neurons.len().saturating_sub(SHOWN);
    let rest = if rest > 0 { format!("and {rest} more in the file\n") } else { String::new() };
    format!("{table}\n{rest}")
}

/// Joins tokens to one line of at most `width` characters, without control characters.
fn shortened(tokens: &[String], width: usize) -> String {
    let clean = |token: &String| token.trim().chars().filter(|c| !c.is_control()).collect::<String>();
    let line = tokens.iter().map(clean).collect::<Vec<_>>().join(" ");
    let line = printable(&line).into_owned();
    if line.chars().count() <= width {
        return line;
    }
    line.chars().take(width - 1).chain(['…']).collect()
}

const HEADER: [&str; 8] = ["rank", "layer", "index", "cosine", "norm", "mean_activation", "kept", "tokens"];

/// The start of the CSV, by which it is recognised.
pub const CSV_START: &str = "rank,layer,index,";

/// Formats all neurons as CSV: rank, layer, index, cosine, norm, mean_activation, kept, tokens.
pub fn to_csv(neurons: &[LocatedNeuron], is_kept: &dyn Fn(&LocatedNeuron) -> bool) -> String {
    let rows = neurons.iter().enumerate().map(|(rank, n)| {
        let number = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
        vec![
            (rank + 1).to_string(),
            n.neuron.layer.to_string(),
            n.neuron.index.to_string(),
            number(n.cosine),
            number(n.norm),
            number(n.mean_activation),
            is_kept(n).to_string(),
            n.tokens.join(" | "),
        ]
    });
    csv::table_to_csv(&HEADER, rows)
}
