//! Table rows by token, position and output.

use crate::gguf::TensorType;
use crate::gguf::blocks::{dequantize, quantize};
use crate::train::data::pack::Packed;
use crate::train::device::tests::{HELD, Random, SUMS, Tested, assert_close, packed};
use crate::train::device::{HostMatrix, Index};

const LENGTHS: [[usize; 3]; 3] = [[4, 3, 2], [1, 1, 5], [2, 2, 2]];

/// Each kind of index, with the table row of each entry and the number of rows in the table.
fn indices(packed: &Packed) -> Vec<(Index, Vec<usize>, usize)> {
    let of_outputs = |range: std::ops::Range<usize>| packed.outputs[range].iter().map(|o| o.row).collect();
    let n_outputs = packed.outputs.len();
    vec![
        (Index::Token, packed.tokens.iter().map(|&t| t as usize).collect(), 5),
        (Index::Position, packed.positions.clone(), 9),
        (Index::Output(0..n_outputs), of_outputs(0..n_outputs), packed.n_rows()),
        (Index::Output(3..8), of_outputs(3..8), packed.n_rows()),
        (Index::Output(2..3), of_outputs(2..3), packed.n_rows()),
    ]
}

pub fn table_rows_are_gathered_by_token_position_and_output<D: Tested>(device: &D) {
    let (packed, mut random) = (packed(&LENGTHS), Random::new(9));
    let rows = device.rows(&packed).unwrap();
    for (index, at, n) in indices(&packed) {
        for n_cols in [1, 7, 32] {
            let table = random.numbers(n * n_cols);
            let mut y = vec![f32::NAN; at.len() * n_cols];
            device.gather(&table, n_cols, &index, &rows, 0.5, &mut y).unwrap();
            let expected: Vec<f32> = at
                .iter()
                .flat_map(|&i| (0..n_cols).map(move |c| (i, c)))
                .map(|(i, c)| 0.5 * table[i * n_cols + c])
                .collect();
            assert_eq!(y, expected, "{index:?}, {n_cols} columns");
        }
    }
}

pub fn gradients_are_scattered_once_for_each_time_a_row_was_gathered<D: Tested>(device: &D) {
    let (packed, mut random) = (packed(&LENGTHS), Random::new(10));
    let rows = device.rows(&packed).unwrap();
    for (index, at, n) in indices(&packed) {
        let mut distinct = at.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let repeats = at.len() > 1 && index != Index::Output(3..8);
        assert!(!repeats || distinct.len() < at.len(), "{index:?}: no row is repeated");
        for n_cols in [1, 7, 32] {
            let dy = random.numbers(at.len() * n_cols);
            let mut dtable = vec![HELD; n * n_cols];
            device.scatter_add(&dy, n_cols, &index, &rows, -2.0, &mut dtable).unwrap();
            let mut expected = vec![f64::from(HELD); n * n_cols];
            for (row, &i) in at.iter().enumerate() {
                for c in 0..n_cols {
                    expected[i * n_cols + c] += -2.0 * f64::from(dy[row * n_cols + c]);
                }
            }
            assert_close(&dtable, &expected, SUMS, &format!("{index:?}, {n_cols} columns"));
        }
    }
}

pub fn embeddings_match_the_dequantised_rows<D: Tested>(device: &D) {
    let (packed, mut random) = (packed(&LENGTHS), Random::new(11));
    let rows = device.rows(&packed).unwrap();
    for (tensor_type, n_in) in [(TensorType::F32, 7), (TensorType::Q8_0, 96), (TensorType::Q4_K, 512)] {
        let bytes = quantize(tensor_type, &random.numbers(5 * n_in), n_in).unwrap();
        let mut table = vec![0.0; 5 * n_in];
        dequantize(tensor_type, &bytes, &mut table).unwrap();
        let name = "token_embd.weight".to_owned();
        let matrix =
            device.matrix(HostMatrix { name, tensor_type, n_in, n_out: 5, bytes, is_table: true }).unwrap();
        let mut y = vec![f32::NAN; packed.n_rows() * n_in];
        device.embed(&matrix, &rows, 3.0, &mut y).unwrap();
        for (y, &token) in y.chunks_exact(n_in).zip(&packed.tokens) {
            let row = &table[token as usize * n_in..(token as usize + 1) * n_in];
            let expected: Vec<f64> = row.iter().map(|&x| f64::from(3.0 * x)).collect();
            assert_close(y, &expected, D::TABLES, &tensor_type.to_string());
        }
    }
}
