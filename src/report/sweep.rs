//! Formats a sweep as terminal tables, CSV, Markdown and an HTML page.

use maud::{Markup, html};

use crate::eval::metric::{MetricId, MetricKind};
use crate::eval::result::{Metric, find};
use crate::report::grid::{Grid, Row};
use crate::report::line_plot::{Series, line_plot};
use crate::report::{csv, format, headline, html as page, markdown, terminal};
use crate::study::sweep::{Kind, Point, Sweep};
use crate::text::printable;

/// Columns: metrics; those of the scorer first.
const COLUMNS: [MetricKind; 8] = [
    MetricKind::ExpectedMaximumToxicity,
    MetricKind::ToxicityProbability,
    MetricKind::AverageToxicity,
    MetricKind::PerplexityMedian,
    MetricKind::Distinct2,
    MetricKind::Repetition,
    MetricKind::LanguageKept,
    MetricKind::Coverage,
];

/// Explains the row labels.
const LEGEND: &str = "r1, r2, …: controls, the same on random neurons of the same layers, or along random \
                      directions of the same lengths. *: recommended.";

/// The row label of a point, usually within the nine characters that the terminal shows.
fn label(point: &Point) -> String {
    match point.kind {
        Kind::Baseline => "baseline".into(),
        Kind::Chosen => point.value.to_string(),
        Kind::Control { draw } => format!("{} r{}", point.value, draw + 1),
    }
}

fn cell(metrics: &[Metric], id: &MetricId) -> String {
    let found = find(metrics, id).and_then(|m| m.estimate);
    found.map_or(format::NONE.into(), |estimate| format::value(id.descriptor(), estimate.value))
}

/// Makes a table with a row per setting.
fn settings_grid(sweep: &Sweep, n_columns: usize) -> Grid {
    let columns: Vec<MetricId> =
        COLUMNS[..n_columns].iter().map(|kind| kind.by(Some(&sweep.scorer))).collect();
    let mut header = vec!["Setting".to_owned()];
    header.extend(columns.iter().map(|id| id.descriptor().title.to_owned()));
    let rows = sweep.points.iter().enumerate().map(|(i, point)| Row {
        label: format!("{}{}", label(point), if sweep.recommended == Some(i) { " *" } else { "" }),
        cells: columns.iter().map(|id| cell(&point.mean, id)).collect(),
        is_mean: sweep.recommended == Some(i),
        better: None,
    });
    let over = match sweep.points.first().map_or(0, |p| p.languages.len()) {
        1 => "one language".to_owned(),
        n => format!("mean over {n} languages"),
    };
    let title = format!("{}, toxicity by {}, k = {}, {over}", sweep.what, sweep.scorer, sweep.run.k);
    Grid { title, header, rows: rows.collect() }
}

/// Makes a table of expected maximum toxicity with a row per language and a column per setting.
fn languages_grid(sweep: &Sweep) -> Grid {
    let name = sweep.decisive();
    let mut header = vec!["Lang".to_owned()];
    header.extend(sweep.points.iter().map(label));
    let languages = sweep.points.first().map(|p| p.languages.as_slice()).unwrap_or_default();
    let of_point = |point: &Point, language: &str| {
        let found = point.languages.iter().find(|l| l.language == language);
        found.map_or(format::NONE.into(), |l| cell(&l.metrics, &name))
    };
    let row = |language: &str| Row {
        label: language.to_owned(),
        cells: sweep.points.iter().map(|p| of_point(p, language)).collect(),
        is_mean: false,
        better: None,
    };
    let rows = languages.iter().map(|l| row(&l.language)).collect();
    Grid { title: "Expected maximum toxicity by language".into(), header, rows }
}

/// Formats the settings, the recommendation and warnings in at most 80 columns.
pub fn to_terminal(sweep: &Sweep, colour: bool) -> String {
    let mut text = String::new();
    terminal::push_table(&mut text, &settings_grid(sweep, 7), colour);
    text.push('\n');
    text.push_str(&terminal::wrapped(LEGEND, ""));
    text.extend(headline::perplexity(&sweep.run).map(|note| terminal::wrapped(&note, "")));
    text.push('\n');
    text.push_str(&terminal::wrapped(&format!("{}.", sweep.reason), ""));
    terminal::push_warnings(&mut text, &sweep.warnings, colour);
    text
}

/// Formats the recommendation, warnings, the settings, and toxicity by language.
pub fn to_markdown(sweep: &Sweep) -> String {
    let mut text = String::from("# Sweep\n\n");
    markdown::paragraph(&mut text, &format!("{}.", sweep.reason));
    markdown::push_warnings(&mut text, &sweep.warnings);
    for grid in [settings_grid(sweep, COLUMNS.len()), languages_grid(sweep)] {
        markdown::push_table(&mut text, &grid);
    }
    markdown::paragraph(&mut text, LEGEND);
    headline::perplexity(&sweep.run).iter().for_each(|note| markdown::paragraph(&mut text, note));
    text
}

/// Formats CSV: value, kind, draw, language, scorer, metric, estimate, low, high.
pub fn to_csv(sweep: &Sweep) -> String {
    let header = ["value", "kind", "draw", "language", "scorer", "metric", "estimate", "low", "high"];
    let number = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
    let rows = sweep.points.iter().flat_map(|point| {
        let (kind, draw) = match point.kind {
            Kind::Baseline => ("baseline", String::new()),
            Kind::Chosen => ("chosen", String::new()),
            Kind::Control { draw } => ("control", draw.to_string()),
        };
        let languages = point.languages.iter().map(|l| (l.language.as_str(), &l.metrics));
        let all = languages.chain([(csv::MEAN, &point.mean)]);
        all.flat_map(move |(language, metrics)| {
            let draw = draw.clone();
            metrics.iter().map(move |m| {
                let (scorer, id) = (m.name.scorer(), m.name.kind().id());
                vec![
                    point.value.to_string(),
                    kind.to_owned(),
                    draw.clone(),
                    language.to_owned(),
                    scorer.unwrap_or_default().to_owned(),
                    id.to_owned(),
                    number(m.estimate.map(|e| e.value)),
                    number(m.estimate.and_then(|e| e.low)),
                    number(m.estimate.and_then(|e| e.high)),
                ]
            })
        })
    });
    csv::table_to_csv(&header, rows)
}

/// Formats a page: the recommendation, warnings, plots against the setting, tables.
pub fn to_html(sweep: &Sweep) -> String {
    let body = html! {
        h1 { "Sweep: " (printable(&sweep.what)) }
        p.answer { (printable(&sweep.reason)) "." }
        (page::warnings(&sweep.warnings))
        h2 { "Against the setting" }
        p.soft {
            "Dots and solid lines are the intervention. Squares and dashed lines are the controls: the same on random"
            " neurons of the same layers, or along random directions of the same lengths. Vertical lines are"
            " intervals. Toxicity should fall, and further than in the controls. Perplexity, distinct-2 and language"
            " kept should not change."
        }
        div.plots {
            @for (index, kind) in COLUMNS[..7].iter().enumerate() { (figure(sweep, *kind, index)) }
        }
        h2 { "Numbers" }
        (page::table(&settings_grid(sweep, COLUMNS.len())))
        p.soft { (LEGEND) }
        p.soft { "Pareto front (no other point is better in both toxicity and perplexity): " (pareto(sweep)) "." }
        (page::table(&languages_grid(sweep)))
        (page::settings("Settings of the baseline", &sweep.run))
    };
    page::page("Sweep", &body)
}

fn pareto(sweep: &Sweep) -> String {
    sweep.pareto.iter().map(|&i| label(&sweep.points[i])).collect::<Vec<_>>().join(", ")
}

fn figure(sweep: &Sweep, kind: MetricKind, index: usize) -> Markup {
    let id = kind.by(Some(&sweep.scorer));
    let descriptor = kind.descriptor();
    let of_points = |is_shown: &dyn Fn(Kind) -> bool| {
        let points = sweep.points.iter().filter(|p| is_shown(p.kind));
        let mut points: Vec<_> = points
            .filter_map(|p| {
                let estimate = find(&p.mean, &id)?.estimate?;
                Some((p.value, estimate.value, estimate.low, estimate.high))
            })
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    let mut series = vec![Series {
        name: "intervention".into(),
        is_reference: false,
        points: of_points(&|kind| matches!(kind, Kind::Baseline | Kind::Chosen)),
    }];
    let draws = sweep.points.iter().filter_map(|p| match p.kind {
        Kind::Control { draw } => Some(draw),
        _ => None,
    });
    if let Some(last) = draws.max() {
        series.extend((0..=last).map(|of_draw| Series {
            name: format!("random {}", of_draw + 1),
            is_reference: true,
            points: of_points(&|kind| kind == Kind::Control { draw: of_draw } || kind == Kind::Baseline),
        }));
    }
    let marked = sweep.recommended.map(|i| sweep.points[i].value);
    html! {
        figure {
            figcaption { (descriptor.title) ": " (descriptor.definition) }
            (line_plot(&format!("sweep-{index}"), descriptor.title, "setting", &series, marked,
                descriptor.unit.into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::synthetic;

    fn sweep() -> Sweep {
        let (result, _) = synthetic::compared(&["de", "fr"]);
        let point = |value: f64, kind: Kind| Point {
            value,
            kind,
            mean: result.mean.clone(),
            languages: result.languages.clone(),
            differences: Vec::new(),
        };
        let points = vec![
            point(0.0, Kind::Baseline),
            point(-1.0, Kind::Chosen),
            point(-1.0, Kind::Control { draw: 0 }),
        ];
        Sweep::analyse("offset on 3 neurons <of> n.json".into(), "lexical".into(), result.run.clone(), points)
    }

    #[test]
    fn every_setting_has_a_row_in_every_format() {
        let sweep = sweep();
        let terminal = to_terminal(&sweep, false);
        assert!(terminal.lines().all(|line| line.chars().count() <= 80), "{terminal}");
        for text in [&terminal, &to_markdown(&sweep)] {
            for label in ["baseline", "-1", "-1 r1", "No setting is recommended"] {
                assert!(text.contains(label), "{label}: {text}");
            }
        }
        let csv = to_csv(&sweep);
        assert_eq!(csv.lines().count(), 1 + 3 * 3 * sweep.points[0].mean.len());
        assert!(csv.contains("-1,control,0,mean,lexical,expected_maximum_toxicity,"));
    }

    #[test]
    fn the_page_escapes_the_title_and_plots_both_lines() {
        let html = to_html(&sweep());
        assert!(html.contains("3 neurons &lt;of&gt; n.json"));
        assert!(html.contains("stroke-dasharray") && !html.contains("<script") && !html.contains("NaN"));
    }
}
