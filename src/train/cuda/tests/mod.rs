//! What every device must pass, in both ways of keeping frozen matrices, and what is the GPU's own.

use std::sync::LazyLock;

use super::{Cuda, Frozen};
use crate::train::device_tests::on_host::OnHost;
use crate::train::device_tests::repeat::{assert_same, everything};
use crate::train::device_tests::{Tested, device_tests};

impl Tested for OnHost<Cuda> {
    /// bf16 keeps eight bits, the first of which is not stored: half of the last one.
    const PRODUCTS: f64 = 1.0 / 256.0;
    /// TF32 keeps eleven; cuBLASLt does not say whether it rounds or cuts off.
    const DENSE: f64 = 1.0 / 1024.0;
    /// A sum of a product may be rounded once or twice.
    const TABLES: f64 = 2e-7;
}

fn open(frozen: Frozen) -> OnHost<Cuda> {
    OnHost(Cuda::open(0, frozen).unwrap())
}

fn rounded() -> &'static OnHost<Cuda> {
    static DEVICE: LazyLock<OnHost<Cuda>> = LazyLock::new(|| open(Frozen::Bf16));
    &DEVICE
}

fn quantised() -> &'static OnHost<Cuda> {
    static DEVICE: LazyLock<OnHost<Cuda>> = LazyLock::new(|| open(Frozen::Quantised));
    &DEVICE
}

/// Tests that every device passes.
mod common {
    use super::*;

    device_tests!(rounded());
}

#[test]
fn products_and_embeddings_are_the_same_where_the_blocks_are_kept() {
    use crate::train::device_tests::{lookup, product};
    product::products_are_those_with_the_numbers_that_blocks_stand_for(quantised());
    product::rows_that_hold_no_number_stay_none_and_leave_others_alone(quantised());
    lookup::embeddings_are_the_numbers_that_a_tokens_blocks_stand_for(quantised());
}

#[test]
fn products_of_several_parts_of_a_matrix_are_those_of_the_whole() {
    use crate::train::device_tests::product;
    let device = open(Frozen::Quantised);
    // Of 256 rows, the fewest that there are.
    device.0.set_part_bytes(0);
    product::products_are_those_with_the_numbers_that_blocks_stand_for(&device);
    product::rows_that_hold_no_number_stay_none_and_leave_others_alone(&device);
}

#[test]
fn the_same_operations_give_the_same_numbers_to_the_bit() {
    let device = open(Frozen::Quantised);
    let first = everything(&device);
    assert_same(&first, &everything(&device), "the same device again");
    assert_same(&first, &everything(&open(Frozen::Quantised)), "another handle");
    #[cfg(feature = "cuda-emulation")]
    {
        // Threads and blocks from last to first: what depends on their order is a race.
        super::emulation::set_reverse(true);
        let reversed = everything(&device);
        super::emulation::set_reverse(false);
        assert_same(&first, &reversed, "threads in reverse");
    }
}
