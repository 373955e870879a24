//! The axis of a plot: round ticks, with as many digits as tell them apart.

use crate::eval::metric::Unit;

/// Round ticks over a range of values.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    /// Three to seven, in steps of 1, 2 or 5 times a power of ten.
    pub ticks: Vec<f64>,
    /// The power of ten of the step.
    exponent: i32,
    unit: AxisUnit,
}

/// How the numbers of an axis are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AxisUnit {
    /// As they are.
    Plain,
    /// Fractions in percent.
    Percent,
}

impl From<Unit> for AxisUnit {
    fn from(unit: Unit) -> AxisUnit {
        match unit {
            Unit::Fraction => AxisUnit::Percent,
            Unit::Plain { .. } => AxisUnit::Plain,
        }
    }
}

/// The smallest range that is drawn. A smaller one is rounding of numbers that f64 can hardly hold.
const MIN_RANGE: f64 = 1e-290;

impl Axis {
    /// An axis from 0 that covers every finite value. Without values, or if all are 0, it ends at 1.
    pub fn of(values: impl Iterator<Item = f64>, unit: AxisUnit) -> Axis {
        let finite = values.filter(|value| value.is_finite());
        let (low, high) = finite.fold((0f64, 0f64), |(low, high), v| (low.min(v), high.max(v)));
        // Divided first: the difference of two huge numbers may overflow.
        let fifth = high / 5.0 - low / 5.0;
        if fifth < MIN_RANGE {
            return Axis { ticks: vec![0.0, 0.5, 1.0], exponent: -1, unit };
        }
        let exponent = fifth.log10().floor() as i32;
        // The tolerance keeps the ticks for a highest value of 1.0 from extending to 1.2.
        let covered = 0.999_999;
        let steps = [(1.0, exponent), (2.0, exponent), (5.0, exponent), (1.0, exponent + 1)];
        let step_of = |(factor, exponent): (f64, i32)| factor * 10f64.powi(exponent);
        let found = steps.into_iter().find(|&step| step_of(step) >= fifth * covered).unwrap_or(steps[3]);
        let (step, exponent) = (step_of(found), found.1);
        let first = (low * covered / step).floor() as i32;
        let last = ((high * covered / step).ceil() as i32).max(first + 2);
        Axis {
            ticks: (first..=last).map(|i| (f64::from(i) * step).clamp(f64::MIN, f64::MAX)).collect(),
            exponent,
            unit,
        }
    }

    /// The position of a value on the axis, from 0 to 1.
    pub fn share(&self, value: f64) -> f64 {
        let (low, high) = (self.ticks[0], self.ticks[self.ticks.len() - 1]);
        // Divided first: the difference of two huge numbers may overflow.
        ((value / 2.0 - low / 2.0) / (high / 2.0 - low / 2.0)).clamp(0.0, 1.0)
    }

    /// The text of a tick.
    pub fn tick(&self, value: f64) -> String {
        self.text(value, 0)
    }

    /// The text of a value between ticks, with two digits more.
    pub fn value(&self, value: f64) -> String {
        self.text(value, 2)
    }

    fn text(&self, value: f64, more_digits: i32) -> String {
        let (factor, shift, sign) = match self.unit {
            AxisUnit::Plain => (1.0, 0, ""),
            AxisUnit::Percent => (100.0, 2, "%"),
        };
        let last_digit = self.exponent + shift - more_digits;
        let largest = self.ticks.iter().fold(0f64, |largest, tick| largest.max(tick.abs())) * factor;
        let value = value * factor;
        let decimals = (-last_digit).max(0) as usize;
        let text = if (-last_digit) <= 4 + more_digits && largest < 1e6 {
            format!("{value:.decimals$}")
        } else if value == 0.0 {
            "0".into()
        } else {
            // The tolerance keeps the exponent of 1000 at 3.
            let exponent = (value.abs().log10() + 1e-9).floor() as i32;
            let digits = (exponent - last_digit).max(0) as usize;
            format!("{value:.digits$e}")
        };
        format!("{}{sign}", without_sign_of_zero(text))
    }
}

/// "-0.0" as "0.0".
fn without_sign_of_zero(text: String) -> String {
    match text.strip_prefix('-') {
        Some(rest) if !rest.bytes().any(|byte| (b'1'..=b'9').contains(&byte)) => rest.to_owned(),
        _ => text,
    }
}

/// Labels of values that are not round, such as offsets: the fewest digits that tell them apart.
///
/// `0.1` as f32 becomes 0.10000000149011612 as f64, which would overlap its neighbours.
pub fn labels(values: &[f64]) -> Vec<String> {
    let gaps = values.windows(2).map(|pair| (pair[1] - pair[0]).abs());
    let gap = gaps.filter(|&gap| gap > 0.0).fold(f64::INFINITY, f64::min);
    let is_close = |value: f64, label: &str| {
        let error = label.parse().map_or(f64::INFINITY, |shown: f64| (shown - value).abs());
        error <= (0.05 * gap).min(1e-4 * value.abs())
    };
    let label = |&value: &f64| {
        let labels = (3..17).map(|digits| significant(value, digits));
        labels.into_iter().find(|label| is_close(value, label)).unwrap_or_else(|| significant(value, 17))
    };
    values.iter().map(label).collect()
}

/// A number rounded to significant digits, in its shortest spelling.
fn significant(value: f64, digits: usize) -> String {
    let rounded: f64 = format!("{value:.*e}", digits - 1).parse().unwrap_or(value);
    match rounded.abs() {
        0.0 => "0".into(),
        size if (1e-4..1e6).contains(&size) => rounded.to_string(),
        _ => format!("{rounded:e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(values: &[f64]) -> Axis {
        Axis::of(values.iter().copied(), AxisUnit::Plain)
    }

    fn texts(values: &[f64], unit: AxisUnit) -> Vec<String> {
        let axis = Axis::of(values.iter().copied(), unit);
        axis.ticks.iter().map(|&tick| axis.tick(tick)).collect()
    }

    #[test]
    fn ticks_are_round_and_reach_the_highest_value() {
        let close = |found: Vec<f64>, expected: &[f64]| {
            assert_eq!(found.len(), expected.len(), "{found:?}");
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9), "{found:?}");
        };
        close(axis(&[1.0]).ticks, &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        close(axis(&[0.43]).ticks, &[0.0, 0.1, 0.2, 0.3, 0.4, 0.5]);
        close(axis(&[37.0]).ticks, &[0.0, 10.0, 20.0, 30.0, 40.0]);
        close(axis(&[-3.0]).ticks, &[-3.0, -2.0, -1.0, 0.0]);
        close(axis(&[-0.3, 0.7]).ticks, &[-0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8]);
        for nothing in [&[][..], &[0.0], &[f64::NAN, f64::INFINITY]] {
            close(axis(nothing).ticks, &[0.0, 0.5, 1.0]);
        }
    }

    #[test]
    fn ticks_differ_in_every_range() {
        let sizes =
            [5e-324, 1e-300, 3e-9, 0.00012, 0.0034, 0.03, 0.11, 1.7, 99.0, 9999.9, 4.2e7, 1e300, f64::MAX];
        for size in sizes {
            for values in [[size, 0.0], [-size, 0.0], [-size, size], [size, size], [-size, size / 3.0]] {
                for unit in [AxisUnit::Plain, AxisUnit::Percent] {
                    if unit == AxisUnit::Percent && size > 1e10 {
                        continue;
                    }
                    let texts = texts(&values, unit);
                    assert!((3..=7).contains(&texts.len()), "{texts:?}");
                    let unique: std::collections::BTreeSet<&String> = texts.iter().collect();
                    assert_eq!(unique.len(), texts.len(), "{values:?}: {texts:?}");
                    assert!(texts.iter().all(|text| text.chars().count() <= 8), "{texts:?}");
                    let axis = Axis::of(values.into_iter(), unit);
                    let shares = values.map(|value| axis.share(value));
                    assert!(shares.iter().all(|share| (0.0..=1.0).contains(share)), "{values:?}: {shares:?}");
                }
            }
        }
    }

    #[test]
    fn texts_have_as_many_digits_as_the_step() {
        assert_eq!(texts(&[0.0034], AxisUnit::Plain), ["0.000", "0.001", "0.002", "0.003", "0.004"]);
        assert_eq!(texts(&[2.2e-6], AxisUnit::Plain), ["0", "5e-7", "1.0e-6", "1.5e-6", "2.0e-6", "2.5e-6"]);
        assert_eq!(texts(&[0.4], AxisUnit::Percent), ["0%", "10%", "20%", "30%", "40%"]);
        assert_eq!(texts(&[0.0042], AxisUnit::Percent), ["0.0%", "0.1%", "0.2%", "0.3%", "0.4%", "0.5%"]);
        assert_eq!(texts(&[4.2e7], AxisUnit::Plain)[4], "4e7");
        assert_eq!(axis(&[0.6]).value(0.25), "0.250");
    }

    #[test]
    fn labels_have_the_fewest_digits_that_tell_them_apart() {
        assert_eq!(labels(&[-0.2f32, -0.1, 0.0].map(f64::from)), ["-0.2", "-0.1", "0"]);
        assert_eq!(labels(&[0.8331, 0.8334]), ["0.8331", "0.8334"]);
        assert_eq!(labels(&[1.0, 500.0, 12500.0]), ["1", "500", "12500"]);
        assert_eq!(labels(&[1e-7, 2e9]), ["1e-7", "2e9"]);
        assert_eq!(labels(&[12345.0, 12346.0]), ["12345", "12346"]);
    }
}
