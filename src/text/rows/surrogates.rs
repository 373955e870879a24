//! Replaces surrogates that were encoded like characters, as Python's `surrogatepass` writes them.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

/// Reads bytes with U+FFFD, which has as many bytes, in the place of each encoded surrogate.
pub(super) struct Surrogates<R> {
    inner: R,
    /// The start of a surrogate at the end of the last read.
    held: Vec<u8>,
    n_replaced: Rc<Cell<usize>>,
}

impl<R: Read> Surrogates<R> {
    /// Adds the number of replaced surrogates to `n_replaced`.
    pub fn new(inner: R, n_replaced: Rc<Cell<usize>>) -> Surrogates<R> {
        Surrogates { inner, held: Vec::new(), n_replaced }
    }
}

/// Whether the bytes begin the encoding of U+D800 to U+DFFF.
fn begins_surrogate(bytes: &[u8]) -> bool {
    matches!(bytes, [0xED] | [0xED, 0xA0..=0xBF] | [0xED, 0xA0..=0xBF, 0x80..=0xBF])
}

/// Replaces the surrogates in `bytes`. Returns their number.
pub(super) fn replace(bytes: &mut [u8]) -> usize {
    let mut n = 0;
    for at in 0..bytes.len().saturating_sub(2) {
        if begins_surrogate(&bytes[at..at + 3]) {
            bytes[at..at + 3].copy_from_slice("\u{fffd}".as_bytes());
            n += 1;
        }
    }
    n
}

impl<R: Read> Read for Surrogates<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        // Room for what was held, and for the end of a surrogate.
        if out.len() < 4 {
            let n = self.held.len().min(out.len());
            out[..n].copy_from_slice(&self.held[..n]);
            self.held.drain(..n);
            return if n > 0 { Ok(n) } else { self.inner.read(out) };
        }
        loop {
            let n_held = self.held.len();
            let n_read = self.inner.read(&mut out[n_held..])?;
            out[..n_held].copy_from_slice(&self.held);
            self.held.clear();
            let n = n_held + n_read;
            self.n_replaced.set(self.n_replaced.get() + replace(&mut out[..n]));
            let n_kept = (1..=2.min(n)).find(|&last| begins_surrogate(&out[n - last..n])).unwrap_or(0);
            if n_read == 0 || n_kept < n {
                let n_kept = if n_read == 0 { 0 } else { n_kept };
                self.held.extend(&out[n - n_kept..n]);
                return Ok(n - n_kept);
            }
            self.held.extend(&out[..n]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surrogates_are_replaced_wherever_a_read_ends() {
        /// Gives a few bytes at a time.
        struct Slow<'a>(&'a [u8], usize);
        impl Read for Slow<'_> {
            fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                let n = self.1.min(self.0.len()).min(out.len());
                out[..n].copy_from_slice(&self.0[..n]);
                self.0 = &self.0[n..];
                Ok(n)
            }
        }
        let bytes = b"a\xED\xA0\xBDb\xED\x9F\xBF\xED\xB8\x80\xED";
        for step in 1..12 {
            let n_replaced = Rc::new(Cell::new(0));
            let mut found = Vec::new();
            Surrogates::new(Slow(bytes, step), n_replaced.clone()).read_to_end(&mut found).unwrap();
            // U+D7FF is a character; a lone 0xED is left for the check of UTF-8.
            assert_eq!(found, b"a\xEF\xBF\xBDb\xED\x9F\xBF\xEF\xBF\xBD\xED", "{step} bytes at a time");
            assert_eq!(n_replaced.get(), 2);
        }
    }
}
