//! Line plots as inline SVG. The page's style sheet sets the colours.

use maud::{Markup, html};

use crate::report::axis::{Axis, AxisUnit, labels};

/// A line with points.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Its name in the description.
    pub name: String,
    /// Whether to draw it as the reference: dashed, with squares.
    pub is_reference: bool,
    /// `(x, y, low, high)`, in order of x, with an optional interval.
    pub points: Vec<(f64, f64, Option<f64>, Option<f64>)>,
}

impl Series {
    /// Without points and intervals that are not finite.
    fn finite(&self) -> Series {
        let finite = |x: Option<f64>| x.filter(|x| x.is_finite());
        let points = self.points.iter().filter(|p| p.0.is_finite() && p.1.is_finite());
        let points = points.map(|&(x, y, low, high)| (x, y, finite(low), finite(high))).collect();
        Series { points, ..self.clone() }
    }
}

const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 220.0;
/// Space for "100.0%".
const LEFT: f64 = 52.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 34.0;

/// Draws a plot of `series`, with a vertical line at x = `marked`.
///
/// `id` must be unique on the page. Points that are not finite are left out.
pub fn line_plot(
    id: &str,
    title: &str,
    x_title: &str,
    series: &[Series],
    marked: Option<f64>,
    unit: AxisUnit,
) -> Markup {
    let series: Vec<Series> = series.iter().map(Series::finite).collect();
    let points = || series.iter().flat_map(|s| &s.points);
    let x_range = range(points().map(|p| p.0));
    let axis = Axis::of(points().flat_map(|p| [Some(p.1), p.2, p.3]).flatten(), unit);
    let x = |value: f64| LEFT + (WIDTH - LEFT - RIGHT) * share(value, x_range);
    let y = |value: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis.share(value);
    let at = |value: f64| format!("{value:.1}");
    let mut xs: Vec<f64> = points().map(|p| p.0).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let xs = apart(&xs, marked, x);
    let description = series.iter().map(|s| {
        let values = s.points.iter().map(|p| format!("{} at {}", axis.value(p.1), labels(&[p.0])[0]));
        format!("{}: {}", s.name, values.collect::<Vec<_>>().join(", "))
    });
    let corners = |s: &Series| {
        let corners = s.points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1)));
        corners.collect::<Vec<_>>().join(" ")
    };
    html! {
        svg.plot viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img"
            aria-labelledby=(format!("{id}-title {id}-desc")) {
            title id=(format!("{id}-title")) { (title) }
            desc id=(format!("{id}-desc")) { (description.collect::<Vec<_>>().join("; ")) }
            @for &tick in &axis.ticks {
                line.rule x1=(at(LEFT)) x2=(at(WIDTH - RIGHT)) y1=(at(y(tick))) y2=(at(y(tick))) {}
                text.tick x=(at(LEFT - 6.0)) y=(at(y(tick) + 4.0)) text-anchor="end" { (axis.tick(tick)) }
            }
            @if let Some(marked) = marked {
                line.divide x1=(at(x(marked))) x2=(at(x(marked))) y1=(at(TOP)) y2=(at(HEIGHT - BOTTOM)) {}
            }
            @for (tick, label) in xs.iter().zip(labels(&xs)) {
                text.tick x=(at(x(*tick))) y=(at(HEIGHT - BOTTOM + 15.0)) text-anchor="middle" { (label) }
            }
            text.tick x=(at((LEFT + WIDTH - RIGHT) / 2.0)) y=(at(HEIGHT - 4.0)) text-anchor="middle" { (x_title) }
            @for s in &series {
                g.first[s.is_reference].last[!s.is_reference] {
                    polyline.line stroke-dasharray=[s.is_reference.then_some("5 4")] points=(corners(s)) {}
                    @for &(at_x, value, low, high) in &s.points {
                        @if let (Some(low), Some(high)) = (low, high) {
                            line.whisker x1=(at(x(at_x))) x2=(at(x(at_x))) y1=(at(y(low))) y2=(at(y(high))) {}
                        }
                        @if s.is_reference {
                            rect.dot x=(at(x(at_x) - 3.2)) y=(at(y(value) - 3.2)) width="6.4" height="6.4" {}
                        } @else {
                            circle.dot cx=(at(x(at_x))) cy=(at(y(value))) r="3.6" {}
                        }
                    }
                }
            }
        }
    }
}

/// Those of `xs` with room for a label at their place `x`. The marked and the last one come first.
fn apart(xs: &[f64], marked: Option<f64>, x: impl Fn(f64) -> f64) -> Vec<f64> {
    /// Room for "-0.001".
    const LABEL: f64 = 34.0;
    let mut kept: Vec<f64> = Vec::new();
    let marked = marked.into_iter().filter(|marked| xs.contains(marked));
    for value in marked.chain(xs.last().copied()).chain(xs.iter().copied()) {
        if kept.iter().all(|&other| (x(other) - x(value)).abs() >= LABEL) {
            kept.push(value);
        }
    }
    kept.sort_by(f64::total_cmp);
    kept
}

/// Minimum and maximum of the finite values, never equal.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values
        .filter(|v| v.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    match low < high {
        true => (low, high),
        // Relative, because adding 0.5 to a huge number changes nothing.
        false if low.is_finite() => (low - low.abs().max(1.0) / 2.0, low + low.abs().max(1.0) / 2.0),
        false => (0.0, 1.0),
    }
}

/// The position of a value in a range, from 0 to 1.
fn share(value: f64, (low, high): (f64, f64)) -> f64 {
    ((value - low) / (high - low)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_has_a_description_and_all_points() {
        let series = [
            Series {
                name: "chosen".into(),
                is_reference: false,
                points: vec![(0.0, 0.5, Some(0.4), Some(0.6)), (-1.0, 0.2, None, None)],
            },
            Series { name: "random".into(), is_reference: true, points: vec![(-1.0, 0.5, None, None)] },
        ];
        let svg = line_plot("p", "A & B", "offset", &series, Some(-1.0), AxisUnit::Plain).into_string();
        assert!(svg.contains("A &amp; B"));
        assert!(svg.contains("chosen: 0.500 at 0, 0.200 at -1; random: 0.500 at -1"), "{svg}");
        assert_eq!((svg.matches("<circle").count(), svg.matches("<rect").count()), (2, 1));
        assert_eq!(svg.matches("whisker").count(), 1);
        assert!(!svg.contains("NaN") && !svg.contains("inf\""));
    }

    #[test]
    fn a_plot_of_at_most_one_point_has_no_nan() {
        for points in [vec![], vec![(1.0, 0.0, None, None)]] {
            let series = [Series { name: "x".into(), is_reference: false, points }];
            let svg = line_plot("p", "t", "x", &series, None, AxisUnit::Plain).into_string();
            assert!(!svg.contains("NaN"), "{svg}");
        }
    }

    #[test]
    fn the_ticks_of_tiny_margins_differ_and_a_point_without_a_number_is_left_out() {
        let points = vec![(0.0, 0.0, None, None), (1.0, 0.0034, None, None), (2.0, f64::NAN, None, None)];
        let series = [Series { name: "margin".into(), is_reference: false, points }];
        let svg = line_plot("p", "t", "step", &series, None, AxisUnit::Plain).into_string();
        assert!(svg.contains(">0.001<") && svg.contains(">0.004<"), "{svg}");
        assert!(svg.contains("margin: 0.00000 at 0, 0.00340 at 1<"), "{svg}");
        assert!(!svg.contains("NaN"), "{svg}");
    }

    #[test]
    fn labels_do_not_overlap_and_all_points_stay() {
        let xs = [-1.0, -0.1, -0.01, -0.001, 0.0];
        assert_eq!(apart(&xs, Some(-0.01), |x| 274.0 * (x + 1.0)), [-1.0, -0.01]);
        assert_eq!(apart(&xs, None, |x| 274.0 * (x + 1.0)), [-1.0, 0.0]);
        let points = xs.map(|x| (x, 0.5, None, None)).to_vec();
        let series = [Series { name: "x".into(), is_reference: false, points }];
        let svg = line_plot("p", "t", "x", &series, None, AxisUnit::Plain).into_string();
        assert_eq!(svg.matches("<circle").count(), 5);
    }

    #[test]
    fn a_huge_constant_has_a_place() {
        let series =
            [Series { name: "x".into(), is_reference: false, points: vec![(1e17, -1e300, None, None)] }];
        let svg = line_plot("p", "t", "x", &series, None, AxisUnit::Plain).into_string();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
