//! The same operations on the same numbers give the same bits.

use crate::train::device::cpu::{Cpu, Products};
use crate::train::device::tests::on_host::OnHost;
use crate::train::device::tests::repeat::{assert_same, everything};

#[test]
fn the_same_number_of_threads_gives_the_same_bits() {
    for products in [Products::Exact, Products::Fast] {
        for n_threads in [1, 3] {
            let first = everything(&OnHost(Cpu::new(n_threads, products).unwrap()));
            for _ in 0..3 {
                let again = everything(&OnHost(Cpu::new(n_threads, products).unwrap()));
                assert_same(&first, &again, &format!("{n_threads} threads, {products:?}"));
            }
        }
    }
}
