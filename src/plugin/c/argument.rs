//! What a C program passes, checked as far as it can be.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;
use std::path::PathBuf;

use super::status::Failure;

/// A struct of C that begins with its size, and of which every member may be all zeros.
///
/// # Safety
/// The type is `repr(C)`, begins with a `usize` that holds its size, and all bytes zero are a value of it; so are any
/// bytes that C code writes for the same struct, with zeros from `LEAST` or one of `ENDS` on.
pub(super) unsafe trait SizedStruct: Copy {
    /// The least size: with the members that the first version had.
    const LEAST: usize;
    /// Where the members after those end, in their order: a size between two of these has no part of a member.
    const ENDS: &'static [usize] = &[];
}

/// The bytes of whole members in a struct of `size` bytes, which are `T::LEAST` or more.
fn whole_members<T: SizedStruct>(size: usize) -> usize {
    T::ENDS.iter().rev().copied().find(|&end| end <= size).unwrap_or(T::LEAST)
}

fn check_pointer<T>(name: &str, pointer: *const T) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::argument(format!("{name}: expected a pointer, found NULL")));
    }
    if !pointer.is_aligned() {
        return Err(Failure::argument(format!(
            "{name}: expected a pointer to a multiple of {} bytes",
            align_of::<T>()
        )));
    }
    Ok(())
}

/// The size that a struct says it has.
///
/// # Safety
/// Null, or a struct whose first member is its size.
unsafe fn size_of_struct<T: SizedStruct>(name: &str, pointer: *const T) -> Result<usize, Failure> {
    check_pointer(name, pointer)?;
    // SAFETY: not null and aligned, seen above; it begins with a `usize` by the contract.
    let size = unsafe { pointer.cast::<usize>().read() };
    match size >= T::LEAST {
        true => Ok(size),
        false => Err(Failure::argument(format!(
            "{name}: expected its size to be at least {}, found {size}: set it with sizeof",
            T::LEAST
        ))),
    }
}

/// Copies a struct; members that the program's header had not, or had not whole, are zero.
///
/// # Safety
/// Null, or a struct that is as long as its first member says.
pub(super) unsafe fn read_struct<T: SizedStruct>(name: &str, pointer: *const T) -> Result<T, Failure> {
    // SAFETY: as this function's own contract.
    let size = unsafe { size_of_struct(name, pointer)? };
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: the source has `size` bytes by the contract, the target `size_of::<T>()`; `n` is at most either, since
    // `size` is at least `LEAST`, and all ends lie in the type.
    unsafe {
        let n = whole_members::<T>(size);
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), n);
    }
    // SAFETY: whole members as C wrote them and zeros for the rest are a value of `T` by the contract of its trait.
    Ok(unsafe { value.assume_init() })
}

/// As [`read_struct`], where NULL stands for a default.
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

/// Checks a struct that is to be filled in; returns the size that it says it has.
///
/// # Safety
/// As [`read_struct`].
pub(super) unsafe fn check_out_struct<T: SizedStruct>(name: &str, pointer: *mut T) -> Result<usize, Failure> {
    // SAFETY: as this function's own contract.
    unsafe { size_of_struct(name, pointer) }
}

/// Fills in a struct, of which `size` was read by [`check_out_struct`], but for its size.
///
/// # Safety
/// The pointer passed [`check_out_struct`], and can be written to.
pub(super) unsafe fn write_struct<T: SizedStruct>(pointer: *mut T, size: usize, value: &T) {
    let n = whole_members::<T>(size).saturating_sub(size_of::<usize>());
    // SAFETY: the target has `size` bytes by the contract, of which the first are its size; the source has
    // `size_of::<T>()`.
    unsafe {
        let from = std::ptr::from_ref(value).cast::<u8>().add(size_of::<usize>());
        std::ptr::copy_nonoverlapping(from, pointer.cast::<u8>().add(size_of::<usize>()), n);
    }
}

/// Checks a place for a result.
pub(super) fn check_out<T>(name: &str, pointer: *mut T) -> Result<(), Failure> {
    check_pointer(name, pointer)
}

/// A string.
///
/// # Safety
/// Null, or a terminated string that nobody changes meanwhile.
pub(super) unsafe fn text<'a>(name: &str, pointer: *const c_char) -> Result<&'a str, Failure> {
    check_pointer(name, pointer)?;
    // SAFETY: not null, and a string by the contract.
    unsafe { CStr::from_ptr(pointer) }
        .to_str()
        .map_err(|e| Failure::argument(format!("{name}: expected UTF-8, found other bytes: {e}")))
}

/// A path: on Unix any bytes, elsewhere UTF-8.
///
/// # Safety
/// As [`text`].
pub(super) unsafe fn path(name: &str, pointer: *const c_char) -> Result<PathBuf, Failure> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        check_pointer(name, pointer)?;
        // SAFETY: not null, and a string by the contract.
        let bytes = unsafe { CStr::from_ptr(pointer) }.to_bytes();
        Ok(PathBuf::from(std::ffi::OsStr::from_bytes(bytes)))
    }
    #[cfg(not(unix))]
    {
        // SAFETY: as this function's own contract.
        Ok(PathBuf::from(unsafe { text(name, pointer)? }))
    }
}

/// An array, or nothing for NULL.
///
/// # Safety
/// Null, or `n` values that nobody changes meanwhile.
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
    // SAFETY: not null and aligned, with `n` values by the contract, and no more bytes than there can be.
    Ok(Some(unsafe { std::slice::from_raw_parts(pointer, n) }))
}

/// A sequence of a context.
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

    // SAFETY: plain numbers, the first of them the size.
    unsafe impl SizedStruct for Pair {
        const LEAST: usize = 12;
        const ENDS: &'static [usize] = &[16];
    }

    fn read(pointer: *const Pair) -> Result<Pair, Failure> {
        // SAFETY: the tests pass null, something misaligned, or structs as long as they say.
        unsafe { read_struct("pair", pointer) }
    }

    #[test]
    fn a_struct_of_an_older_header_has_zeros_for_what_it_lacks() {
        let older = Pair { size: 12, first: 7, second: 8 };
        assert_eq!(read(&older).unwrap(), Pair { size: 12, first: 7, second: 0 });
        for size in 13..16 {
            let cut = Pair { size, ..older };
            assert_eq!(read(&cut).unwrap(), Pair { size, first: 7, second: 0 }, "half a member is none");
        }
        let newer = Pair { size: 99, first: 7, second: 8 };
        let longer = [newer; 8];
        assert_eq!(read(longer.as_ptr()).unwrap(), newer);
    }

    #[test]
    fn a_result_is_written_no_further_than_the_struct_reaches() {
        let mut older = Pair { size: 12, first: 0, second: 0 };
        let value = Pair { size: 0, first: 7, second: 8 };
        // SAFETY: the struct is as long as it says, and can be written.
        unsafe {
            let size = check_out_struct("pair", &raw mut older).unwrap();
            write_struct(&raw mut older, size, &value);
        }
        assert_eq!(older, Pair { size: 12, first: 7, second: 0 });
    }

    #[test]
    fn rejects_pointers_that_lead_nowhere_and_structs_that_are_too_small() {
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
