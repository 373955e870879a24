//! The tests of every device, and tests of the CPU alone.

mod product;
mod repeat;
mod step;

use crate::train::device::Device;
use crate::train::device::tests::{device_tests, oracle};

use crate::train::device::cpu::{Cpu, Products};

/// Tests that every device passes.
mod common {
    use super::*;

    device_tests!(Some(oracle()));
}

#[test]
fn the_description_names_threads_and_products() {
    assert_eq!(Cpu::new(1, Products::Exact).unwrap().describe(), "cpu, 1 thread, exact products");
    let ggml = Cpu::with(3, Products::Fast, true).unwrap();
    assert_eq!(ggml.describe(), "cpu, 3 threads, fast (ggml) products");
}
