//! Orders drawn from a random stream.

use rand_core::Rng;

/// Fisher-Yates: every order of `items` is as likely as any other, to within their number / 2^64.
pub fn shuffle<T>(items: &mut [T], random: &mut impl Rng) {
    for i in (1..items.len()).rev() {
        // The high half of a 64 x 64 bit product is uniform to within i / 2^64.
        let j = (u128::from(random.next_u64()) * (i as u128 + 1)) >> 64;
        items.swap(i, j as usize);
    }
}
