//! Exponentials and sums that the compiler turns into vector code.

/// e^x, within 2 units in the last place.
///
/// Below -87.3, where the result would be subnormal, it is 0. Above 88.3 it stays finite, at about e^88.3.
/// NaN gives NaN.
///
/// Writes x = n ln 2 + r with |r| <= ln 2 / 2, and approximates e^r by a polynomial with the coefficients of Cephes'
/// `expf` (<https://www.netlib.org/cephes/>). It has no branches or calls, unlike the C library's, so that loops over
/// it become vector code.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.336_54;
    const HIGHEST: f32 = 88.376_26;
    // ln 2 in two parts, so that n ln 2 is subtracted exactly.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to an integer.
    const ROUNDER: f32 = 12_582_912.0;
    let clamped = x.clamp(LOWEST, HIGHEST);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, clamped));
    let mut p = 1.987_569_2e-4f32;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, coefficient);
    }
    let e_r = p.mul_add(r * r, r) + 1.0;
    // 2^n, made from the exponent's bits: the low bits of `shifted` are n.
    let power = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    // NaN compares false and `clamp` keeps it, so that NaN gives NaN.
    if x < LOWEST { 0.0 } else { e_r * power }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The hyperbolic tangent.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // (1 - e^-2|x|) / (1 + e^-2|x|): the exponential is at most 1.
    let e = exp(-2.0 * x.abs());
    ((1.0 - e) / (1.0 + e)).copysign(x)
}

/// Sums taken at once, so that the compiler can use the widest registers.
const LANES: usize = 16;

/// The sum of f(x, y) over two slices of one length, in a fixed order.
#[inline(always)]
pub fn sum_of_pairs(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (x_lanes, x_rest) = x.as_chunks::<LANES>();
    let (y_lanes, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in x_lanes.iter().zip(y_lanes) {
        for i in 0..LANES {
            sums[i] += f(x[i], y[i]);
        }
    }
    sums.iter().sum::<f32>() + x_rest.iter().zip(y_rest).map(|(&x, &y)| f(x, y)).sum::<f32>()
}

/// The sum of f(x), in a fixed order.
#[inline(always)]
pub fn sum_of(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    sum_of_pairs(x, x, |x, _| f(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_match_f64_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst <= 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!((exp(0.0), exp(-100.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sigmoid_and_tanh_match_f64() {
        for i in -2000..=2000 {
            let x = i as f32 * 0.02;
            let exact = f64::from(x);
            let near = |found: f32, expected: f64| {
                (f64::from(found) - expected).abs() <= 3e-7 * expected.abs().max(1e-3)
            };
            assert!(near(sigmoid(x), 1.0 / (1.0 + (-exact).exp())), "sigmoid of {x}");
            assert!((f64::from(tanh(x)) - exact.tanh()).abs() <= 3e-7, "tanh of {x}");
        }
        assert_eq!(tanh(0.0), 0.0);
    }
}
