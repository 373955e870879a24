//! Checks the arguments of C functions, as far as they can be checked.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;
use std::path::PathBuf;

use super::status::Failure;

/// A C struct whose first member is its size.
///
/// # Safety
/// - The type is `repr(C)`, and its first member is a `usize` that holds the struct's size.
/// - All zero bytes are a valid value of it. So are any bytes that C code writes for the same struct, with zeros from
///   `LEAST` or from one of `ENDS` on.
pub(super) unsafe trait SizedStruct: Copy {
    /// The smallest allowed size, with the members of the first version.
    const LEAST: usize;
    /// The ends of the members added later, in order. A size between two ends leaves out the member that it cuts.
    const ENDS: &'static [usize] = &[];
}

/// The number of bytes of whole members in a struct of `size` bytes; `size` is at least `T::LEAST`.
fn whole_members<T: SizedStruct>(size: usize) -> usize {
    T::ENDS.iter().rev().copied().find(|&end| end <= size).unwrap_or(T::LEAST)
}

fn check_pointer<T>(name: &str, pointer: *const T) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::argument(format!("{name}: expected a pointer, found NULL")));
    }
    if !pointer.is_aligned() {
        return Err(Failure::argument(format!(
            "{name}: expected a pointer aligned to {} bytes, found a misaligned one",
            align_of::<T>()
        )));
    }
    Ok(())
}

/// Reads the size of a struct from its first member.
///
/// # Safety
/// `pointer` is null, or points to a struct whose first member is its size.
unsafe fn size_of_struct<T: SizedStruct>(name: &str, pointer: *const T) -> Result<usize, Failure> {
    check_pointer(name, pointer)?;
    // SAFETY: not null and aligned, as checked above; begins with a `usize` by the contract.
    let size = unsafe { pointer.cast::<usize>().read() };
    match size >= T::LEAST {
        true => Ok(size),
        false => Err(Failure::argument(format!(
            "{name}: expected a size of at least {}, found {size}: set it with sizeof",
            T::LEAST
        ))),
    }
}

/// Copies a struct. Members that are missing or incomplete in the program's version of it become zero.
///
/// # Safety
/// `pointer` is null, or points to a struct that is as long as its first member says.
pub(super) unsafe fn read_struct<T: SizedStruct>(name: &str, pointer: *const T) -> Result<T, Failure> {
    // SAFETY: as this function's own contract.
    let size = unsafe { size_of_struct(name, pointer)? };
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: the source has `size` bytes by the contract, and the target `size_of::<T>()`. `n` is at most both,
    // because `size` is at least `LEAST` and all ends are within the type.
    unsafe {
        let n = whole_members::<T>(size);
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), n);
    }
    // SAFETY: whole members as C wrote them, and zeros for the rest: a valid `T` by the contract of its trait.
    Ok(unsafe { value.assume_init() })
}

/// Copies a struct like [`read_struct`], or returns the default for NULL.
///
/// # Safety
/// As [`read_struct`].
pub(super) unsafe fn read_options<T: SizedStruct>(
    name: &str,
    pointer: *const T,
    default: T,
) -> Result<T, Failure> {
    if pointer.is_null() {
        return Ok(default);
    }
    // SAFETY: as this function's own contract.
    unsafe { read_struct(name, pointer) }
}

/// Checks a struct that is to be filled in; returns its size.
///
/// # Safety
/// As [`read_struct`].
pub(super) unsafe fn check_out_struct<T: SizedStruct>(name: &str, pointer: *mut T) -> Result<usize, Failure> {
    // SAFETY: as this function's own contract.
    unsafe { size_of_struct(name, pointer) }
}

/// Fills in a struct except for its size, which [`check_out_struct`] returned.
///
/// # Safety
/// - `pointer` passed [`check_out_struct`], which returned `size`.
/// - The struct can be written to.
pub(super) unsafe fn write_struct<T: SizedStruct>(pointer: *mut T, size: usize, value: &T) {
    let n = whole_members::<T>(size).saturating_sub(size_of::<usize>());
    // SAFETY: the target has `size` bytes by the contract, and the source `size_of::<T>()`. Both begin with a `usize`,
    // which is skipped; `n` is at most what follows it in either.
    unsafe {
        let from = std::ptr::from_ref(value).cast::<u8>().add(size_of::<usize>());
        std::ptr::copy_nonoverlapping(from, pointer.cast::<u8>().add(size_of::<usize>()), n);
    }
}

/// Checks a pointer to which a result is to be written.
pub(super) fn check_out<T>(name: &str, pointer: *mut T) -> Result<(), Failure> {
    check_pointer(name, pointer)
}

/// Reads a UTF-8 string.
///
/// # Safety
/// `pointer` is null, or points to a NUL-terminated string that does not change during `'a`.
pub(super) unsafe fn text<'a>(name: &str, pointer: *const c_char) -> Result<&'a str, Failure> {
    check_pointer(name, pointer)?;
    // SAFETY: not null, and a NUL-terminated string by the contract.
    unsafe { CStr::from_ptr(pointer) }
        .to_str()
        .map_err(|e| Failure::argument(format!("{name}: expected UTF-8, found other bytes: {e}")))
}

/// Reads a path: any bytes on Unix, UTF-8 elsewhere.
///
/// # Safety
/// As [`text`].
pub(super) unsafe fn path(name: &str, pointer: *const c_char) -> Result<PathBuf, Failure> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        check_pointer(name, pointer)?;
        // SAFETY: not null, and a NUL-terminated string by the contract.
        let bytes = unsafe { CStr::from_ptr(pointer) }.to_bytes();
        Ok(PathBuf::from(std::ffi::OsStr::from_bytes(bytes)))
    }
    #[cfg(not(unix))]
    {
        // SAFETY: as this function's own contract.
        Ok(PathBuf::from(unsafe { text(name, pointer)? }))
    }
}

/// Reads an array of `n` values; `None` for NULL.
///
/// # Safety
/// `pointer` is null, or points to `n` values that do not change during `'a`.
pub(super) unsafe fn array<'a, T>(
    name: &str,
    pointer: *const T,
    n: usize,
) -> Result<Option<&'a [T]>, Failure> {
    if pointer.is_null() {
        return Ok(None);
    }
    check_pointer(name, pointer)?;
    if n.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(Failure::argument(format!("{name}: expected fewer entries, found {n}")));
    }
    // SAFETY: not null and aligned, with `n` values by the contract, and at most `isize::MAX` bytes.
    Ok(Some(unsafe { std::slice::from_raw_parts(pointer, n) }))
}

/// Checks that a sequence is not negative.
pub(super) fn sequence_of(sequence: i32) -> Result<usize, Failure> {
    usize::try_from(sequence)
        .map_err(|_| Failure::argument(format!("sequence: expected 0 or more, found {sequence}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq)]
    #[repr(C)]
    struct Pair {
        size: usize,
        first: u32,
        second: u32,
    }

    // SAFETY: `repr(C)`, plain numbers, the size first.
    unsafe impl SizedStruct for Pair {
        const LEAST: usize = 12;
        const ENDS: &'static [usize] = &[16];
    }

    fn read(pointer: *const Pair) -> Result<Pair, Failure> {
        // SAFETY: the tests pass null, a misaligned pointer, or structs as long as their size says.
        unsafe { read_struct("pair", pointer) }
    }

    #[test]
    fn members_missing_from_an_older_header_are_zero() {
        let older = Pair { size: 12, first: 7, second: 8 };
        assert_eq!(read(&older).unwrap(), Pair { size: 12, first: 7, second: 0 });
        for size in 13..16 {
            let cut = Pair { size, ..older };
            assert_eq!(
                read(&cut).unwrap(),
                Pair { size, first: 7, second: 0 },
                "an incomplete member is zero"
            );
        }
        let newer = Pair { size: 99, first: 7, second: 8 };
        let longer = [newer; 8];
        assert_eq!(read(longer.as_ptr()).unwrap(), newer);
    }

    #[test]
    fn a_result_is_never_written_past_the_end_of_the_struct() {
        let mut older = Pair { size: 12, first: 0, second: 0 };
        let value = Pair { size: 0, first: 7, second: 8 };
        // SAFETY: the struct is as long as its size says, and can be written to.
        unsafe {
            let size = check_out_struct("pair", &raw mut older).unwrap();
            write_struct(&raw mut older, size, &value);
        }
        assert_eq!(older, Pair { size: 12, first: 7, second: 0 });
    }

    #[test]
    fn rejects_null_and_misaligned_pointers_and_structs_that_are_too_small() {
        assert!(read(std::ptr::null()).is_err());
        assert!(read(std::ptr::without_provenance(9)).is_err());
        assert!(read(&Pair { size: 11, first: 0, second: 0 }).is_err());
        // SAFETY: null is allowed.
        unsafe {
            assert!(text("text", std::ptr::null()).is_err());
            assert!(text("text", c"\xff".as_ptr()).is_err());
            assert!(array::<i32>("array", std::ptr::null(), 5).unwrap().is_none());
            assert!(array("array", &1i32, usize::MAX).is_err());
        }
    }
}
