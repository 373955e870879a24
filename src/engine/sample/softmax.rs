//! Sums of exponentials over a row of logits, fast and the same on every machine.

/// Lanes of each sum. Wide enough for the widest vector registers, and fixed, so that a sum has the same bits on
/// every machine.
pub(super) const LANES: usize = 32;

/// Logits that share one peak.
///
/// Small enough that one high logit hides few others; large enough that finding the peak costs no more than
/// reading the logits.
pub(super) const GROUP: usize = 8 * LANES;

/// The largest logit overall, and of each [`GROUP`].
#[derive(Debug)]
pub(super) struct Peaks {
    pub(super) top: f32,
    pub(super) of_groups: Vec<f32>,
}

impl Peaks {
    /// `None` if any logit is NaN, or if none is finite.
    pub(super) fn of(logits: &[f32]) -> Option<Peaks> {
        let mut of_groups = Vec::with_capacity(logits.len().div_ceil(GROUP));
        let mut is_nan = [false; LANES];
        let mut has_nan = false;
        for group in logits.chunks(GROUP) {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            let (chunks, rest) = group.as_chunks::<LANES>();
            for chunk in chunks {
                for i in 0..LANES {
                    is_nan[i] |= chunk[i].is_nan();
                    lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
                }
            }
            has_nan |= rest.iter().any(|logit| logit.is_nan());
            of_groups.push(lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max));
        }
        let has_nan = has_nan || is_nan.contains(&true);
        let top = of_groups.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        (!has_nan && top.is_finite()).then_some(Peaks { top, of_groups })
    }
}

/// The natural logarithm of the sum of e^logit; `top` is the largest logit.
pub(super) fn log_sum_exp(logits: &[f32], top: f32) -> f64 {
    f64::from(top) + sum_exp(logits, top, 1.0).ln()
}

/// The sum of e^((logit - top) * scale); `top` is the largest logit.
pub(super) fn sum_exp(logits: &[f32], top: f32, scale: f32) -> f64 {
    // Each f32 lane sums only one block, so its rounding error stays near 1e-7 for any vocabulary.
    const BLOCK: usize = 64 * LANES;
    let mut sum = 0.0f64;
    for block in logits.chunks(BLOCK) {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = block.as_chunks::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                lanes[i] += exp_of_nonpositive((chunk[i] - top) * scale);
            }
        }
        sum += lanes.iter().map(|&l| f64::from(l)).sum::<f64>();
        sum += rest.iter().map(|&l| f64::from(exp_of_nonpositive((l - top) * scale))).sum::<f64>();
    }
    sum
}

/// e^x for x <= 0, with a relative error under 5e-6.
///
/// Uses only operations that compilers vectorise; the standard `exp` would be one call per element.
/// e^x is written as 2^(n + f) with an integer n and f in [-1/2, 1/2]: n goes into the exponent bits, and 2^f is a
/// polynomial.
#[inline]
pub(super) fn exp_of_nonpositive(x: f32) -> f32 {
    let y = (x * std::f32::consts::LOG2_E).max(-126.0);
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = y + ROUND;
    let f = (y - (shifted - ROUND)) * std::f32::consts::LN_2;
    // Taylor series of e^f for |f| <= 0.347: the first omitted term is below 1.2e-7.
    let p = 1.0 + f * (1.0 + f * (0.5 + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f * (1.0 / 120.0 + f / 720.0)))));
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::super::tests::logits;
    use super::*;

    #[test]
    fn log_sums_match_double_precision() {
        for n in [1, 31, 32, 33, 2048, 49_152, 262_144] {
            let row = logits(n, n as u64);
            let top = Peaks::of(&row).unwrap().top;
            let exact: f64 = row.iter().map(|&l| (f64::from(l) - f64::from(top)).exp()).sum::<f64>().ln();
            assert!((log_sum_exp(&row, top) - f64::from(top) - exact).abs() < 1e-6, "{n}");
        }
    }

    #[test]
    fn the_fast_exponential_is_accurate_to_five_in_a_million() {
        let mut worst = 0.0f64;
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_of_nonpositive(x)) - exact).abs() / exact);
        }
        // x * log2(e) is rounded before it is split: at x = -87, half a unit in the last place is 4e-6.
        assert!(worst < 5e-6, "{worst}");
        assert_eq!(exp_of_nonpositive(0.0), 1.0);
        assert_eq!(exp_of_nonpositive(f32::NEG_INFINITY), 0.0);
    }
}
