//! Dot plots by language with whiskers for intervals, as inline SVG.
//!
//! The page's style sheet sets the colours, for light and dark mode.

use maud::{Markup, html};

use crate::eval::metric::Descriptor;
use crate::eval::result::Estimate;
use crate::report::axis::Axis;
use crate::report::format;

/// A row of the plot: a language, or the mean, with one estimate per run.
#[derive(Debug, Clone, PartialEq)]
pub struct PlotRow {
    /// The language's code, or `mean`.
    pub label: String,
    /// Shape `[n_runs]`; `None` if a run has no value.
    pub estimates: Vec<Option<Estimate>>,
    /// Whether this is the mean over languages.
    pub is_mean: bool,
}

// Lengths in units of the view box: about one pixel each on a phone 360 pixels wide.
const WIDTH: f64 = 340.0;
const LEFT: f64 = 44.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 8.0;
const ROW: f64 = 20.0;
const BOTTOM: f64 = 24.0;

/// Draws a dot plot of one metric.
///
/// `runs` are the names of the one or two runs to show. `id` must be unique on the page.
pub fn dot_plot(metric: &Descriptor, id: &str, title: &str, runs: &[&str], rows: &[PlotRow]) -> Markup {
    let ends = |e: &Estimate| [Some(e.value), e.low, e.high].into_iter().flatten();
    let values = rows.iter().flat_map(|row| row.estimates.iter().flatten()).flat_map(ends);
    let axis = Axis::of(values, metric.unit.into());
    let height = TOP + ROW * rows.len() as f64 + BOTTOM;
    let bottom = height - BOTTOM;
    let x = |value: f64| LEFT + (WIDTH - LEFT - RIGHT) * axis.share(value);
    let at = |value: f64| format!("{value:.1}");
    let offset = |run: usize| if runs.len() > 1 { 8.0 * run as f64 - 4.0 } else { 0.0 };
    html! {
        svg.plot viewBox=(format!("0 0 {WIDTH} {height}")) role="img"
            aria-labelledby=(format!("{id}-title {id}-desc")) {
            title id=(format!("{id}-title")) { (title) }
            desc id=(format!("{id}-desc")) { (description(metric, runs, rows)) }
            @for tick in &axis.ticks {
                line.rule x1=(at(x(*tick))) x2=(at(x(*tick))) y1=(at(TOP)) y2=(at(bottom)) {}
                text.tick x=(at(x(*tick))) y=(at(bottom + 15.0)) text-anchor="middle" {
                    (axis.tick(*tick))
                }
            }
            @for (index, row) in rows.iter().enumerate() {
                @let y = TOP + ROW * (index as f64 + 0.5);
                @if row.is_mean {
                    line.divide x1="0" x2=(at(WIDTH)) y1=(at(y - ROW / 2.0)) y2=(at(y - ROW / 2.0)) {}
                }
                text.label.mean[row.is_mean] x=(at(LEFT - 8.0)) y=(at(y + 4.0)) text-anchor="end" { (row.label) }
                @for (run, estimate) in row.estimates.iter().enumerate() {
                    @if let Some(estimate) = estimate {
                        g.first[runs.len() > 1 && run == 0].last[runs.len() == 1 || run == 1] {
                            @if let (Some(low), Some(high)) = (estimate.low, estimate.high) {
                                line.whisker x1=(at(x(low))) x2=(at(x(high))) y1=(at(y + offset(run)))
                                    y2=(at(y + offset(run))) {}
                            }
                            // The two runs differ in shape as well as in colour.
                            @if runs.len() > 1 && run == 0 {
                                rect.dot x=(at(x(estimate.value) - 3.2)) y=(at(y + offset(run) - 3.2))
                                    width="6.4" height="6.4" {}
                            } @else {
                                circle.dot cx=(at(x(estimate.value))) cy=(at(y + offset(run))) r="3.6" {}
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The numbers as text, for screen readers.
fn description(metric: &Descriptor, runs: &[&str], rows: &[PlotRow]) -> String {
    let row = |row: &PlotRow| {
        let of_run = |(run, estimate): (usize, &Option<Estimate>)| {
            let name = if runs.len() > 1 { format!("{} ", runs[run]) } else { String::new() };
            let number =
                estimate.as_ref().map_or(format::NONE.into(), |found| format::estimate(metric, found));
            format!("{name}{number}")
        };
        format!(
            "{}: {}",
            row.label,
            row.estimates.iter().enumerate().map(of_run).collect::<Vec<_>>().join(", ")
        )
    };
    rows.iter().map(row).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::metric::MetricKind;

    #[test]
    fn a_plot_has_a_title_a_description_and_a_whisker_for_each_interval() {
        let metric = MetricKind::ToxicityProbability.descriptor();
        let estimate = Estimate { value: 0.4, low: Some(0.3), high: Some(0.5) };
        let without = Estimate { value: 0.2, low: None, high: None };
        let row = |label: &str, estimates: Vec<Option<Estimate>>| PlotRow {
            label: label.into(),
            estimates,
            is_mean: false,
        };
        let rows = [row("de", vec![Some(estimate), Some(without)]), row("fr", vec![None, Some(estimate)])];
        let svg = dot_plot(metric, "p", "Title & <more>", &["A", "B"], &rows).into_string();
        assert!(svg.contains("Title &amp; &lt;more&gt;"));
        assert!(svg.contains("de: A 40.0% [30.0, 50.0], B 20.0%; fr: A -, B 40.0% [30.0, 50.0]"));
        assert_eq!(svg.matches("whisker").count(), 2);
        assert_eq!(svg.matches("class=\"dot\"").count(), 3);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn a_plot_without_values_has_no_dots_and_no_nan() {
        let metric = MetricKind::PerplexityMedian.descriptor();
        let rows = [PlotRow { label: "de".into(), estimates: vec![None], is_mean: false }];
        let svg = dot_plot(metric, "p", "t", &["run"], &rows).into_string();
        assert!(!svg.contains("NaN") && !svg.contains("class=\"dot\""));
    }

    #[test]
    fn the_ticks_of_a_rare_metric_differ() {
        let metric = MetricKind::ToxicityProbability.descriptor();
        let estimate = Estimate { value: 0.0001, low: Some(0.0), high: Some(0.0002) };
        let rows = [PlotRow { label: "de".into(), estimates: vec![Some(estimate)], is_mean: false }];
        let svg = dot_plot(metric, "p", "t", &["run"], &rows).into_string();
        assert!(svg.contains(">0.005%<") && svg.contains(">0.020%<"), "{svg}");
    }
}
