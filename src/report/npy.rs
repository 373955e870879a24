//! NumPy's file format `.npy`, version 1.0 (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).

/// How every `.npy` file starts.
pub const MAGIC: &[u8] = b"\x93NUMPY";

/// The start of a `.npy` file of little-endian values in C order. The values follow it.
///
/// `descr` is NumPy's name of the type, such as `<f4`; the slowest axis of `shape` comes first.
pub fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    /// Bytes of magic, version and length.
    const START: usize = 10;
    /// NumPy aligns the values to this.
    const ALIGNMENT: usize = 64;
    let mut axes = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    if shape.len() == 1 {
        axes.push(','); // as Python writes a tuple of one
    }
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({axes}), }}");
    let n_bytes = (START + text.len() + 1).next_multiple_of(ALIGNMENT);
    text.extend(std::iter::repeat_n(' ', n_bytes - START - text.len() - 1));
    text.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    let length = u16::try_from(text.len()).expect("a few axes need far less than 64 KiB");
    header.extend(length.to_le_bytes());
    header.extend(text.as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_numpys_own() {
        // As numpy.save writes it, version 2.4.
        let expected =
            b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9, 384), }";
        let found = header("<f4", &[9, 384]);
        assert!(found.starts_with(expected));
        assert_eq!((found.len(), found.last()), (128, Some(&b'\n')));
        assert!(found[expected.len()..found.len() - 1].iter().all(|&b| b == b' '));
        assert!(header("<i4", &[9]).windows(14).any(|w| w == b"'shape': (9,),"));
    }
}
