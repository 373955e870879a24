//! What every device must pass, in both ways of keeping frozen matrices, and what is the GPU's own.

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
    /// bf16 keeps eight bits, the first of which is not stored: half of the last one.
    const PRODUCTS: f64 = 1.0 / 256.0;
    /// TF32 keeps eleven; cuBLASLt does not say whether it rounds or cuts off.
    const DENSE: f64 = 1.0 / 1024.0;
    /// A sum of a product may be rounded once or twice.
    const TABLES: f64 = 2e-7;
}

/// None on a machine without a GPU, as one that builds for others.
fn open(frozen: Frozen) -> Option<OnHost<Cuda>> {
    if cfg!(feature = "cuda") && !is_present().unwrap() {
        eprintln!("skipped: this machine has no NVIDIA GPU that its driver gives to programs");
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
fn products_and_embeddings_are_the_same_where_the_blocks_are_kept() {
    use crate::train::device::tests::{lookup, product};
    let Some(device) = open(Frozen::Quantised) else { return };
    product::products_are_those_with_the_numbers_that_blocks_stand_for(&device);
    product::rows_that_hold_no_number_stay_none_and_leave_others_alone(&device);
    lookup::embeddings_are_the_numbers_that_a_tokens_blocks_stand_for(&device);
}

#[test]
fn products_of_several_parts_of_a_matrix_are_those_of_the_whole() {
    use crate::train::device::tests::product;
    let Some(device) = open(Frozen::Quantised) else { return };
    // Of 256 rows, the fewest that there are.
    device.0.set_part_bytes(0);
    product::products_are_those_with_the_numbers_that_blocks_stand_for(&device);
    product::rows_that_hold_no_number_stay_none_and_leave_others_alone(&device);
}

#[test]
fn the_same_operations_give_the_same_numbers_to_the_bit() {
    let Some(device) = open(Frozen::Quantised) else { return };
    let first = everything(&device);
    assert_same(&first, &everything(&device), "the same device again");
    assert_same(&first, &everything(&open(Frozen::Quantised).unwrap()), "another handle");
    #[cfg(feature = "cuda-emulation")]
    {
        // Threads and blocks from last to first: what depends on their order is a race.
        crate::train::device::cuda::emulation::set_reverse(true);
        let reversed = everything(&device);
        crate::train::device::cuda::emulation::set_reverse(false);
        assert_same(&first, &reversed, "threads in reverse");
    }
}

#[test]
fn refuses_what_another_handle_holds() {
    let (Some(a), Some(b)) = (open(Frozen::Bf16), open(Frozen::Bf16)) else { return };
    let ((a, b), mut y) = ((a.0, b.0), Vec::new());
    y.extend([a.zeros(4).unwrap(), b.zeros(4).unwrap()]);
    let (x, packed) = (b.zeros(4).unwrap(), crate::train::device::tests::packed(&[[1, 1, 1]]));
    let rows = b.rows(&packed).unwrap();
    let refused = |work: &mut dyn FnMut()| {
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_err();
        let expected = "an operation on cuda:0 was given what another handle, on cuda:0, holds";
        assert_eq!(panic.downcast_ref::<String>().map(String::as_str), Some(expected));
    };
    refused(&mut || a.add(1.0, &x, &mut y[0]).unwrap());
    refused(&mut || a.add(1.0, &x, &mut y[1]).unwrap());
    let mut gathered = a.zeros(4).unwrap();
    let table = a.zeros(20).unwrap();
    let index = crate::train::device::Index::Token;
    refused(&mut || a.gather(&table, 4, &index, &rows, 1.0, &mut gathered).unwrap());
    b.add(1.0, &x, &mut y[1]).unwrap();

    // A table is rounded by its first product: not by that of another handle, whose memory would be kept with it.
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
fn refuses_outputs_that_belong_to_no_answer() {
    let Some(device) = open(Frozen::Bf16) else { return };
    let mut packed = crate::train::device::tests::packed(&[[2, 2, 2], [2, 3, 2]]);
    device.0.rows(&packed).unwrap();
    packed.answers.truncate(2);
    let error = device.0.rows(&packed).unwrap_err().to_string();
    assert!(error.contains("answers that have all outputs"), "{error}");
    // As a text that is scored alone has them.
    packed.answers.clear();
    device.0.rows(&packed).unwrap();
}
