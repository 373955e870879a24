//! Computes directions that separate toxic from benign residual streams.
//!
//! These are functions of numbers and need no model. The mean difference is the plain contrast (Rimsky et
//! al. 2023, "Steering Llama 2 via Contrastive Activation Addition", arXiv 2312.06681, section 3). The
//! principal component is the one used in representation engineering (Zou et al. 2023, arXiv 2310.01405,
//! section 3.1).

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

/// Why vectors give no direction. The caller adds the layer and the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DirectionError {
    /// One side has no vectors.
    #[error("expected toxic and benign vectors, found {n_toxic} and {n_benign}")]
    NoVectors {
        /// Number of toxic vectors.
        n_toxic: usize,
        /// Number of benign vectors.
        n_benign: usize,
    },
    /// Two vectors have different lengths, or all are empty.
    #[error("expected vectors of one length above 0, found lengths {expected} and {found}")]
    Lengths {
        /// Length of the first vector.
        expected: usize,
        /// Length of the first vector that differs.
        found: usize,
    },
    /// A number is NaN or infinite.
    #[error("expected finite numbers, found NaN or an infinity in a {side} vector")]
    NotFinite {
        /// "toxic" or "benign".
        side: &'static str,
    },
    /// The two sides are equal, so there is no direction between them.
    #[error("expected toxic and benign vectors to differ, found no difference")]
    NoDifference,
    /// The first principal component does not separate the two sides, so its sign is undefined.
    #[error(
        "expected the first principal component to separate toxic from benign vectors, found equal means along it"
    )]
    NoSign,
}

/// A first principal component.
#[derive(Debug, Clone, PartialEq)]
pub struct PrincipalComponent {
    /// Unit vector, shape `[n_embd]`. On average, toxic vectors project higher on it than benign ones.
    pub direction: Vec<f32>,
    /// Fraction of the sum of squares that it explains, in (0, 1].
    pub explained: f64,
    /// Whether it was computed from paired differences rather than deviations from the common mean.
    pub paired: bool,
}

/// Mean of the toxic vectors minus mean of the benign ones, shape `[n_embd]`, not normalised.
///
/// `toxic` and `benign` have shapes `[n_toxic][n_embd]` and `[n_benign][n_embd]`.
///
/// # Errors
/// Any [`DirectionError`] except [`DirectionError::NoSign`].
pub fn mean_difference(toxic: &[Vec<f32>], benign: &[Vec<f32>]) -> Result<Vec<f32>, DirectionError> {
    let n_embd = check(toxic, benign)?;
    let difference: Vec<f32> =
        mean(toxic, n_embd).iter().zip(mean(benign, n_embd)).map(|(t, b)| (t - b) as f32).collect();
    if difference.iter().all(|&value| value == 0.0) {
        return Err(DirectionError::NoDifference);
    }
    Ok(difference)
}

/// First principal component of the difference between toxic and benign vectors.
///
/// With equally many toxic and benign vectors, toxic vector i is paired with benign vector i. The component
/// is then that of the differences, toxic - benign. They are not centred, as in llama.cpp's
/// cvector-generator, because centring would remove the direction that all pairs share. Otherwise it is the
/// component of all vectors about their common mean.
///
/// `toxic` and `benign` have shapes `[n_toxic][n_embd]` and `[n_benign][n_embd]`.
///
/// # Errors
/// [`DirectionError`].
pub fn principal_component(
    toxic: &[Vec<f32>],
    benign: &[Vec<f32>],
) -> Result<PrincipalComponent, DirectionError> {
    let n_embd = check(toxic, benign)?;
    let (mean_toxic, mean_benign) = (mean(toxic, n_embd), mean(benign, n_embd));
    let paired = toxic.len() == benign.len();
    let rows: Vec<Vec<f64>> = if paired {
        let difference = |(t, b): (&Vec<f32>, &Vec<f32>)| {
            t.iter().zip(b).map(|(&t, &b)| f64::from(t) - f64::from(b)).collect()
        };
        toxic.iter().zip(benign).map(difference).collect()
    } else {
        let (n_toxic, n_benign) = (toxic.len() as f64, benign.len() as f64);
        let common: Vec<f64> = mean_toxic
            .iter()
            .zip(&mean_benign)
            .map(|(t, b)| (n_toxic * t + n_benign * b) / (n_toxic + n_benign))
            .collect();
        let deviation = |v: &Vec<f32>| v.iter().zip(&common).map(|(&x, m)| f64::from(x) - m).collect();
        toxic.iter().chain(benign).map(deviation).collect()
    };
    let (mut direction, explained) = top_right_singular(&rows).ok_or(DirectionError::NoDifference)?;

    let gap: f64 = (0..n_embd).map(|o| (mean_toxic[o] - mean_benign[o]) * direction[o]).sum();
    // A gap within rounding error has no sign. The length of the rows gives the scale of that error.
    let longest = rows.iter().map(|row| dot(row, row)).fold(0.0, f64::max).sqrt();
    if gap.abs() <= 1e-12 * longest {
        return Err(DirectionError::NoSign);
    }
    direction.iter_mut().for_each(|value| *value *= gap.signum());
    Ok(PrincipalComponent {
        direction: direction.iter().map(|&value| value as f32).collect(),
        explained,
        paired,
    })
}

/// First principal component, scaled to the mean difference along it, shape `[n_embd]`.
///
/// Coefficients then mean the same as with [`mean_difference`]: 1 is the mean distance between the two sides.
///
/// # Errors
/// [`DirectionError`].
pub fn scaled_principal_component(
    toxic: &[Vec<f32>],
    benign: &[Vec<f32>],
) -> Result<Vec<f32>, DirectionError> {
    let mean = mean_difference(toxic, benign)?;
    let first = principal_component(toxic, benign)?;
    let along = mean.iter().zip(&first.direction).map(|(&m, &d)| f64::from(m) * f64::from(d));
    let along = along.sum::<f64>() as f32;
    Ok(first.direction.iter().map(|d| d * along).collect())
}

/// Checks that all vectors are finite and of one length, and returns the length.
fn check(toxic: &[Vec<f32>], benign: &[Vec<f32>]) -> Result<usize, DirectionError> {
    let (Some(first), false) = (toxic.first(), benign.is_empty()) else {
        return Err(DirectionError::NoVectors { n_toxic: toxic.len(), n_benign: benign.len() });
    };
    let n_embd = first.len();
    let other_length = toxic.iter().chain(benign).map(Vec::len).find(|&n| n != n_embd || n == 0);
    if let Some(found) = other_length {
        return Err(DirectionError::Lengths { expected: n_embd, found });
    }
    for (side, vectors) in [("toxic", toxic), ("benign", benign)] {
        if vectors.iter().flatten().any(|value| !value.is_finite()) {
            return Err(DirectionError::NotFinite { side });
        }
    }
    Ok(n_embd)
}

fn mean(vectors: &[Vec<f32>], n_embd: usize) -> Vec<f64> {
    let mut sum = vec![0.0; n_embd];
    for vector in vectors {
        sum.iter_mut().zip(vector).for_each(|(sum, &value)| *sum += f64::from(value));
    }
    sum.iter_mut().for_each(|sum| *sum /= vectors.len() as f64);
    sum
}

/// Dot product in eight partial sums: the same order on every machine, without a serial chain of additions.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

/// Top right singular vector of X, and the fraction of the sum of squares that it explains.
///
/// `rows` are the rows of X, shape `[n][n_embd]`. The result is the unit vector v with the largest `|X v|`;
/// `None` if X is zero. Works on the smaller of `X X^T` and `X^T X`, which have the same nonzero eigenvalues.
fn top_right_singular(rows: &[Vec<f64>]) -> Option<(Vec<f64>, f64)> {
    let largest = rows.iter().flatten().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    if largest == 0.0 {
        return None;
    }
    // Scale to order 1, so that no square overflows or underflows.
    let rows: Vec<Vec<f64>> =
        rows.iter().map(|row| row.iter().map(|value| value / largest).collect()).collect();
    let n_embd = rows[0].len();
    let by_rows = rows.len() <= n_embd;
    let columns: Vec<Vec<f64>> =
        if by_rows { Vec::new() } else { (0..n_embd).map(|o| rows.iter().map(|r| r[o]).collect()).collect() };
    let gram = Symmetric::gram(if by_rows { &rows } else { &columns });
    let trace = gram.trace();
    let top = gram.top_eigenvector();
    let eigenvalue = dot(&top, &gram.times(&top));
    let mut direction = if by_rows {
        let mut sum = vec![0.0; n_embd];
        for (weight, row) in top.iter().zip(&rows) {
            sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += weight * value);
        }
        sum
    } else {
        top
    };
    normalize(&mut direction);
    Some((direction, (eigenvalue / trace).min(1.0)))
}

fn normalize(vector: &mut [f64]) {
    let norm = dot(vector, vector).sqrt();
    vector.iter_mut().for_each(|value| *value /= norm);
}

/// A symmetric positive semidefinite matrix, not zero, shape `[n][n]`.
struct Symmetric {
    n: usize,
    values: Vec<f64>,
}

impl Symmetric {
    /// The Gram matrix: dot products of all pairs of vectors.
    fn gram(vectors: &[Vec<f64>]) -> Symmetric {
        let n = vectors.len();
        let mut values = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let product = dot(&vectors[i], &vectors[j]);
                values[i * n + j] = product;
                values[j * n + i] = product;
            }
        }
        Symmetric { n, values }
    }

    fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.n..(i + 1) * self.n]
    }

    fn trace(&self) -> f64 {
        (0..self.n).map(|i| self.row(i)[i]).sum()
    }

    fn times(&self, vector: &[f64]) -> Vec<f64> {
        (0..self.n).map(|i| dot(self.row(i), vector)).collect()
    }

    /// The square of the matrix, divided by the square of its trace.
    ///
    /// It has the same eigenvectors, and the ratios of its eigenvalues are squared.
    fn squared(&self) -> Symmetric {
        // The square of a symmetric matrix is the Gram matrix of its rows.
        let rows: Vec<Vec<f64>> = (0..self.n).map(|i| self.row(i).to_vec()).collect();
        let mut square = Symmetric::gram(&rows);
        let scale = self.trace().powi(-2);
        square.values.iter_mut().for_each(|value| *value *= scale);
        square
    }

    /// Unit eigenvector of the largest eigenvalue, by power iteration.
    ///
    /// Power iteration converges slowly if two eigenvalues are close. It then continues on the square of the
    /// matrix, and squares again if needed.
    fn top_eigenvector(&self) -> Vec<f64> {
        // Iterations before squaring. One squaring costs as much as n iterations.
        const ITERATIONS: usize = 300;
        // This many squarings separate eigenvalues that agree to one part in a million. Closer eigenvalues
        // span a plane, and any vector in it will do.
        const SQUARES: usize = 16;
        const TOLERANCE: f64 = 1e-13;
        // A fixed random start has a component along every eigenvector. A regular start, such as all ones,
        // may be orthogonal to the one wanted.
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let mut vector: Vec<f64> =
            (0..self.n).map(|_| random.next_u64() as f64 / u64::MAX as f64 - 0.5).collect();
        vector = self.times(&vector);
        normalize(&mut vector);
        let mut power = None;
        for _ in 0..SQUARES {
            let matrix: &Symmetric = power.as_ref().unwrap_or(self);
            for _ in 0..ITERATIONS {
                let mut next = matrix.times(&vector);
                normalize(&mut next);
                let step: f64 = next.iter().zip(&vector).map(|(a, b)| (a - b).powi(2)).sum();
                vector = next;
                if step.sqrt() <= TOLERANCE {
                    return vector;
                }
            }
            power = Some(matrix.squared());
        }
        vector
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_near(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-6, "{found:?} {expected:?}");
        }
    }

    #[test]
    fn the_mean_difference_is_the_difference_of_the_means() {
        let toxic = [vec![1.0, 2.0], vec![3.0, 6.0]];
        let benign = [vec![1.0, 1.0]];
        assert_eq!(mean_difference(&toxic, &benign).unwrap(), [1.0, 3.0]);
    }

    #[test]
    fn the_component_of_paired_differences_matches_a_hand_computation() {
        // Differences [3, 0], [3, 0], [0, 1], [0, 1]: X^T X = diag(18, 2), so the component is [1, 0], which
        // explains 18 of 20. Shifting both sides of a pair changes nothing.
        let toxic = [vec![13.0, 10.0], vec![3.0, 0.0], vec![0.0, 1.0], vec![5.0, 6.0]];
        let benign = [vec![10.0, 10.0], vec![0.0, 0.0], vec![0.0, 0.0], vec![5.0, 5.0]];
        let found = principal_component(&toxic, &benign).unwrap();
        assert_near(&found.direction, &[1.0, 0.0]);
        assert!((found.explained - 0.9).abs() < 1e-12 && found.paired);
        // Swapped, it points the other way.
        assert_near(&principal_component(&benign, &toxic).unwrap().direction, &[-1.0, 0.0]);
    }

    #[test]
    fn the_component_is_what_all_differences_share() {
        // Centring these two differences would leave [0, 1], the difference between the pairs.
        let found = principal_component(&[vec![4.0, 1.0], vec![4.0, -1.0]], &[vec![0.0; 2], vec![0.0; 2]]);
        assert_near(&found.unwrap().direction, &[1.0, 0.0]);
    }

    #[test]
    fn unpaired_vectors_use_deviations_from_the_common_mean() {
        // Mean of all three: [2, 1]. Deviations [2, 2], [-1, -1], [-1, -1], all along [1, 1].
        let found = principal_component(&[vec![4.0, 3.0]], &[vec![1.0, 0.0], vec![1.0, 0.0]]).unwrap();
        let half = 0.5f32.sqrt();
        assert_near(&found.direction, &[half, half]);
        assert!((found.explained - 1.0).abs() < 1e-12 && !found.paired);
    }

    #[test]
    fn more_vectors_than_dimensions_and_fewer_give_the_same_component() {
        // Ten pairs in 2 dimensions use X^T X; padded with zeros to 16 dimensions they use X X^T.
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut draw = || random.next_u64() as f64 / u64::MAX as f64;
        let toxic: Vec<Vec<f32>> = (0..10).map(|_| vec![(3.0 * draw()) as f32, draw() as f32]).collect();
        let benign = vec![vec![0.0, 0.0]; 10];
        let pad = |vectors: &[Vec<f32>]| -> Vec<Vec<f32>> {
            vectors.iter().map(|v| v.iter().copied().chain([0.0; 14]).collect()).collect()
        };
        let narrow = principal_component(&toxic, &benign).unwrap();
        let wide = principal_component(&pad(&toxic), &pad(&benign)).unwrap();
        assert_near(&wide.direction[..2], &narrow.direction);
        assert!((wide.explained - narrow.explained).abs() < 1e-12);
        // tan(2 angle) = 2 xy / (xx - yy) for the sums of squares and products.
        let sum = |i: usize, j: usize| toxic.iter().map(|v| f64::from(v[i]) * f64::from(v[j])).sum::<f64>();
        let angle = 0.5 * (2.0 * sum(0, 1)).atan2(sum(0, 0) - sum(1, 1));
        assert_near(&narrow.direction, &[angle.cos() as f32, angle.sin() as f32]);
    }

    #[test]
    fn close_eigenvalues_are_separated() {
        // Sums of squares in the ratio 1 to 0.99998 along [1, 1] and [1, -1].
        let (a, b) = (1.0f32, 0.99999f32);
        let toxic = [vec![a, a, 0.0], vec![b, -b, 0.0]];
        let found = principal_component(&toxic, &[vec![0.0; 3], vec![0.0; 3]]).unwrap();
        let half = 0.5f32.sqrt();
        for (f, e) in found.direction.iter().zip([half, half, 0.0]) {
            assert!((f - e).abs() < 1e-5, "{found:?}");
        }
        assert!((found.explained - 0.500005).abs() < 1e-6, "{found:?}");
    }

    #[test]
    fn equal_eigenvalues_give_the_same_direction_every_time() {
        let toxic = [vec![1.0, 0.0], vec![0.0, 1.0]];
        let benign = [vec![0.0; 2], vec![0.0; 2]];
        let found = principal_component(&toxic, &benign).unwrap();
        assert!((found.explained - 0.5).abs() < 1e-12);
        assert_eq!(found, principal_component(&toxic, &benign).unwrap());
    }

    #[test]
    fn very_small_and_very_large_vectors_do_not_underflow_or_overflow() {
        for scale in [1e-30f32, 1e30] {
            let found = principal_component(&[vec![3.0 * scale, 4.0 * scale]], &[vec![0.0, 0.0]]).unwrap();
            assert_near(&found.direction, &[0.6, 0.8]);
        }
    }

    type Both = fn(&[Vec<f32>], &[Vec<f32>]) -> Result<(), DirectionError>;
    const BOTH: [Both; 2] =
        [|t, b| mean_difference(t, b).map(drop), |t, b| principal_component(t, b).map(drop)];

    #[test]
    fn rejects_no_vectors() {
        for function in BOTH {
            for (toxic, benign) in [(vec![], vec![vec![1.0]]), (vec![vec![1.0]], vec![]), (vec![], vec![])] {
                let error = function(&toxic, &benign).unwrap_err();
                assert!(matches!(error, DirectionError::NoVectors { .. }), "{error}");
            }
        }
    }

    #[test]
    fn rejects_vectors_of_two_lengths_and_empty_vectors() {
        for function in BOTH {
            let error = function(&[vec![1.0, 2.0]], &[vec![1.0, 2.0], vec![1.0]]).unwrap_err();
            assert_eq!(error, DirectionError::Lengths { expected: 2, found: 1 });
            assert!(matches!(function(&[vec![]], &[vec![]]), Err(DirectionError::Lengths { .. })));
        }
    }

    #[test]
    fn rejects_numbers_that_are_not_finite() {
        for function in BOTH {
            for value in [f32::NAN, f32::INFINITY] {
                let error = function(&[vec![1.0]], &[vec![value]]).unwrap_err();
                assert_eq!(error, DirectionError::NotFinite { side: "benign" });
            }
        }
    }

    #[test]
    fn rejects_vectors_that_do_not_differ() {
        for function in BOTH {
            let same = [vec![1.0, 2.0], vec![1.0, 2.0]];
            assert_eq!(function(&same, &same), Err(DirectionError::NoDifference));
            assert_eq!(function(&same, &same[..1]), Err(DirectionError::NoDifference));
        }
    }

    #[test]
    fn rejects_a_component_that_does_not_separate_the_sides() {
        // The differences point in opposite directions along [1, 0], where the means are equal.
        let toxic = [vec![5.0, 0.1], vec![-5.0, 0.1]];
        let error = principal_component(&toxic, &[vec![0.0; 2], vec![0.0; 2]]).unwrap_err();
        assert_eq!(error, DirectionError::NoSign);
    }
}
