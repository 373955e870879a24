//! The tests of every device, with both ways of storing frozen matrices, and tests of the GPU alone.

use std::sync::LazyLock;

use crate::gguf::TensorType;
use crate::train::device::cuda::{Cuda, Frozen, is_present};
use crate::train::device::limits::has_kernel;
use crate::train::device::tests::on_host::OnHost;
use crate::train::device::tests::repeat::{assert_same, everything};
use crate::train::device::tests::{Tested, device_tests};
use crate::train::device::{Device, HostMatrix};

use crate::train::device::cuda::matrix::kernel_block;

impl Tested for OnHost<Cuda> {
    /// bf16 keeps eight bits, the first of them implicit; rounding is off by at most half of the last one.
    const PRODUCTS: f64 = 1.0 / 256.0;
    /// TF32 keeps eleven bits. cuBLASLt does not document whether it rounds or truncates.
    const DENSE: f64 = 1.0 / 1024.0;
    /// A product and a sum may be rounded once (fused) or twice.
    const TABLES: f64 = 2e-7;
}

/// `None` on a machine without a GPU, such as one that builds for others.
fn open(frozen: Frozen) -> Option<OnHost<Cuda>> {
    if cfg!(feature = "cuda") && !is_present().unwrap() {
        eprintln!("skipped: this machine has no usable NVIDIA GPU");
        return None;
    }
    Some(OnHost(Cuda::open(0, frozen).unwrap()))
}

fn rounded() -> Option<&'static OnHost<Cuda>> {
    static DEVICE: LazyLock<Option<OnHost<Cuda>>> = LazyLock::new(|| open(Frozen::Bf16));
    DEVICE.as_ref()
}

/// Tests that every device passes.
mod common {
    use super::*;

    device_tests!(rounded());
}

#[test]
fn products_and_embeddings_from_blocks_match_the_dequantised_numbers() {
    use crate::train::device::tests::{lookup, product};
    let Some(device) = open(Frozen::Quantised) else { return };
    product::products_match_those_with_the_dequantised_matrix(&device);
    product::non_finite_rows_stay_non_finite_and_leave_others_alone(&device);
    lookup::embeddings_match_the_dequantised_rows(&device);
}

#[test]
fn products_over_several_parts_of_a_matrix_match_the_whole() {
    use crate::train::device::tests::product;
    let Some(device) = open(Frozen::Quantised) else { return };
    // Parts of 256 rows, the minimum.
    device.0.set_part_bytes(0);
    product::products_match_those_with_the_dequantised_matrix(&device);
    product::non_finite_rows_stay_non_finite_and_leave_others_alone(&device);
}

#[test]
fn repeated_operations_give_the_same_bits() {
    let Some(device) = open(Frozen::Quantised) else { return };
    let first = everything(&device);
    assert_same(&first, &everything(&device), "the same device again");
    assert_same(&first, &everything(&open(Frozen::Quantised).unwrap()), "another handle");
    #[cfg(feature = "cuda-emulation")]
    {
        // Threads and blocks from last to first: a result that depends on their order has a race.
        crate::train::device::cuda::emulation::set_reverse(true);
        let reversed = everything(&device);
        crate::train::device::cuda::emulation::set_reverse(false);
        assert_same(&first, &reversed, "threads in reverse");
    }
}

#[test]
fn rejects_operands_of_another_handle() {
    let (Some(a), Some(b)) = (open(Frozen::Bf16), open(Frozen::Bf16)) else { return };
    let ((a, b), mut y) = ((a.0, b.0), Vec::new());
    y.extend([a.zeros(4).unwrap(), b.zeros(4).unwrap()]);
    let (x, packed) = (b.zeros(4).unwrap(), crate::train::device::tests::packed(&[[1, 1, 1]]));
    let rows = b.rows(&packed).unwrap();
    let refused = |work: &mut dyn FnMut()| {
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_err();
        let expected = "an operation on cuda:0 was given an operand of another handle, on cuda:0";
        assert_eq!(panic.downcast_ref::<String>().map(String::as_str), Some(expected));
    };
    refused(&mut || a.add(1.0, &x, &mut y[0]).unwrap());
    refused(&mut || a.add(1.0, &x, &mut y[1]).unwrap());
    let mut gathered = a.zeros(4).unwrap();
    let table = a.zeros(20).unwrap();
    let index = crate::train::device::Index::Token;
    refused(&mut || a.gather(&table, 4, &index, &rows, 1.0, &mut gathered).unwrap());
    b.add(1.0, &x, &mut y[1]).unwrap();

    // A table is rounded by its first product. Another handle must not do it, since the table would keep its memory.
    let of_zeros = HostMatrix {
        name: "token_embd.weight".into(),
        tensor_type: TensorType::F32,
        n_in: 4,
        n_out: 2,
        bytes: vec![0; 4 * 4 * 2],
        is_table: true,
    };
    let matrix = b.matrix(of_zeros).unwrap();
    let (of_a, mut two) = (a.zeros(4).unwrap(), [a.zeros(2).unwrap(), b.zeros(2).unwrap()]);
    refused(&mut || a.product(&matrix, &of_a, 1, &mut two[0]).unwrap());
    b.product(&matrix, &x, 1, &mut two[1]).unwrap();
}

#[test]
fn kernels_read_the_types_in_the_header_with_the_files_block_sizes() {
    for &tensor_type in TensorType::ALL {
        let expected = has_kernel(tensor_type).then(|| (tensor_type.block_len(), tensor_type.block_bytes()));
        assert_eq!(kernel_block(tensor_type), expected, "{tensor_type}");
    }
}

#[test]
fn rejects_outputs_without_an_answer() {
    let Some(device) = open(Frozen::Bf16) else { return };
    let mut packed = crate::train::device::tests::packed(&[[2, 2, 2], [2, 3, 2]]);
    device.0.rows(&packed).unwrap();
    packed.answers.truncate(2);
    let error = device.0.rows(&packed).unwrap_err().to_string();
    assert!(error.contains("answers that have all outputs"), "{error}");
    // A batch without answers, as for scoring a text alone.
    packed.answers.clear();
    device.0.rows(&packed).unwrap();
}
