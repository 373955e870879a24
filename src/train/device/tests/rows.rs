//! Buffers, and sums and copies of rows.

use crate::train::device::tests::{HELD, Random, SUMS, Tested, assert_close};

/// Rows and columns; the last are more than one task takes.
const SIZES: [[usize; 2]; 5] = [[1, 1], [1, 17], [5, 3], [4, 32], [700, 33]];

pub fn buffers_hold_what_is_written_to_them<D: Tested>(device: &D) {
    let mut buffer = device.zeros(3).unwrap();
    assert_eq!(device.download(&buffer).unwrap(), [0.0; 3]);
    device.write(&[1.0, 2.0, 3.0], &mut buffer).unwrap();
    assert_eq!(device.download(&buffer).unwrap(), [1.0, 2.0, 3.0]);
    device.clear(&mut buffer).unwrap();
    assert_eq!(device.download(&buffer).unwrap(), [0.0; 3]);
    assert_eq!(device.download(&device.upload(&[4.0, 5.0]).unwrap()).unwrap(), [4.0, 5.0]);
    assert_eq!(device.download(&device.copy(&vec![6.0, 7.0], 2).unwrap()).unwrap(), [6.0, 7.0]);
    // Large enough to reuse the memory of a dropped buffer.
    drop(device.upload(&[8.0; 50_000]).unwrap());
    assert_eq!(device.download(&device.zeros(49_999).unwrap()).unwrap(), [0.0; 49_999]);
    assert_eq!(device.scope(|| 7), 7);
}

pub fn sums_over_and_into_rows_match_two_loops<D: Tested>(device: &D) {
    let mut random = Random::new(17);
    for [n_rows, n_cols] in SIZES {
        let what = format!("{n_rows} rows of {n_cols}");
        let (x, y, bias) =
            (random.numbers(n_rows * n_cols), random.numbers(n_rows * n_cols), random.numbers(n_cols));
        // Twice as many factors as rows; the second half is used.
        let factors = random.numbers(2 * n_rows);

        let mut found = y.clone();
        device.add(-0.5, &x, &mut found).unwrap();
        let expected: Vec<f64> = y.iter().zip(&x).map(|(&y, &x)| f64::from(y) - 0.5 * f64::from(x)).collect();
        assert_close(&found, &expected, SUMS, &format!("{what}, added"));

        let mut found = y.clone();
        device.add_to_rows(&bias, n_cols, &mut found).unwrap();
        let of_col = |i: usize| f64::from(bias[i % n_cols]);
        let expected: Vec<f64> = y.iter().enumerate().map(|(i, &y)| f64::from(y) + of_col(i)).collect();
        assert_close(&found, &expected, SUMS, &format!("{what}, with a bias"));

        let mut found = vec![HELD; n_cols];
        device.sum_rows(&x, n_cols, &mut found).unwrap();
        let of_col = |c: usize| (0..n_rows).map(|r| f64::from(x[r * n_cols + c])).sum::<f64>();
        let expected: Vec<f64> = (0..n_cols).map(|c| f64::from(HELD) + of_col(c)).collect();
        assert_close(&found, &expected, SUMS, &format!("{what}, summed"));

        let mut found = x.clone();
        device.scale_rows(&factors, n_rows, n_cols, &mut found).unwrap();
        let expected: Vec<f32> =
            x.iter().enumerate().map(|(i, &x)| factors[n_rows + i / n_cols] * x).collect();
        assert_eq!(found, expected, "{what}, multiplied");

        let found = device.square_sum(&x).unwrap();
        let expected: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        assert!((found - expected).abs() <= 1e-12 * expected, "{what}: expected {expected}, found {found}");
    }
}

pub fn columns_are_added_at_other_columns<D: Tested>(device: &D) {
    let mut random = Random::new(18);
    for n_rows in [1, 3, 2000] {
        for (src_cols, from, dst_cols, to, n) in
            [(1, 0, 1, 0, 1), (9, 4, 9, 4, 5), (5, 0, 17, 12, 5), (12, 7, 3, 0, 2), (6, 1, 8, 3, 4)]
        {
            let (src, dst) = (random.numbers(n_rows * src_cols), random.numbers(n_rows * dst_cols));
            let mut found = dst.clone();
            device.add_columns(&src, src_cols, from, &mut found, dst_cols, to, n).unwrap();
            let mut expected = dst;
            for row in 0..n_rows {
                for c in 0..n {
                    expected[row * dst_cols + to + c] += src[row * src_cols + from + c];
                }
            }
            assert_eq!(found, expected, "{n} of {src_cols} columns from {from}, to {to} of {dst_cols}");
        }
    }
}
