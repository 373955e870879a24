//! Finite numbers: NaN and infinities are refused where numbers are read, computed and written.
//!
//! JSON has no NaN. serde writes it as `null`, which looks like a missing value: [`check_json`] refuses it first.

use serde::Serialize;

use crate::error::{Error, Result};

mod json;

/// Values that are checked together before one of them is looked for.
const GROUP: usize = 64;

/// The first number that is NaN or infinite, and its index.
pub fn not_finite(values: &[f32]) -> Option<(usize, f32)> {
    let groups = values.chunks(GROUP).enumerate();
    // Without an early exit the compiler checks a group in a few vector instructions.
    let mut bad = groups.filter(|(_, group)| !group.iter().fold(true, |all, x| all & x.is_finite()));
    let (group, values) = bad.next()?;
    let at = values.iter().position(|x| !x.is_finite())?;
    Some((group * GROUP + at, values[at]))
}

/// Describes the first number that is NaN or infinite, for an error message.
pub fn fault(values: &[f32]) -> Option<String> {
    not_finite(values).map(|(at, found)| format!("expected finite numbers, found {found} at element {at}"))
}

/// Refuses a value with a number that JSON cannot hold: NaN or an infinity.
///
/// # Errors
/// [`Error::NotFinite`] with the path to the first such number, such as `metrics[3].estimate.value`.
pub fn check_json<T: Serialize + ?Sized>(value: &T) -> Result<()> {
    json::find(value).map_or(Ok(()), |(path, found)| Err(Error::not_finite(path, found)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_that_is_not_finite_is_found_in_any_group() {
        for at in [0, 1, 63, 64, 200] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![f32::MAX; 201];
                values[at] = bad;
                let (found, value) = not_finite(&values).unwrap();
                assert!(found == at && value.to_bits() == bad.to_bits());
            }
        }
        assert_eq!(not_finite(&[f32::MIN, 0.0, f32::MIN_POSITIVE]), None);
        assert_eq!(not_finite(&[]), None);
        assert_eq!(fault(&[0.0, f32::NAN]).unwrap(), "expected finite numbers, found NaN at element 1");
    }

    #[test]
    fn a_value_that_json_cannot_hold_is_refused_by_its_path() {
        check_json(&[0.5, 1e300]).unwrap();
        let error = check_json(&[0.5, f64::NAN]).unwrap_err();
        assert_eq!(error.to_string(), "[1]: expected a finite number, found NaN");
    }
}
