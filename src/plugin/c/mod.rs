//! The C functions of `vendor/include/detox_gguf.h`, which documents them.
//!
//! ```text
//! argument (checks pointers) ─► steer · callback · gate · score ─► status (stops panics and errors)
//!                                    │
//!                                 handle ─► host_callback ─► host (the program's table as a Node)
//! ```
//!
//! Mistakes of a C program that can be detected are refused: null and misaligned pointers, structs that are too small,
//! freed handles. Those that cannot be detected are in the `# Safety` lists: dangling pointers, and wrong lengths.

mod argument;
mod callback;
mod gate;
mod handle;
mod host;
mod host_callback;
mod score;
mod status;
mod steer;

use std::ffi::{CStr, c_char};

/// `DETOX_ABI_VERSION`.
const ABI_VERSION: u32 = 1;

#[unsafe(no_mangle)]
extern "C" fn detox_abi_version() -> u32 {
    ABI_VERSION
}

#[unsafe(no_mangle)]
extern "C" fn detox_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("DETOX_GGUF_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => panic!("a version contains no NUL"),
        };
    VERSION.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn detox_last_error() -> *const c_char {
    status::last_error()
}

#[cfg(all(test, target_pointer_width = "64"))]
mod tests {
    use std::mem::offset_of;

    use super::callback::RawCallbackOptions;
    use super::gate::RawGateOptions;
    use super::host::{RawShape, RawTable};
    use super::status::Status;
    use super::steer::{RawControlVector, RawSteerOptions};
    use super::*;

    macro_rules! offsets {
        ($type:ty: $($member:ident),*) => { (size_of::<$type>(), [$(offset_of!($type, $member)),*]) };
    }

    #[test]
    fn structs_have_the_layout_of_the_header() {
        // tests/plugin/layout.c has the same numbers.
        assert_eq!(size_of::<Status>(), 4);
        assert_eq!(offsets!(RawSteerOptions: coefficient, route, force), (24, [8, 12, 16]));
        let vector = offsets!(RawControlVector: len, n_embd, il_start, il_end, is_whole);
        assert_eq!(vector, (32, [8, 16, 20, 24, 28]));
        assert_eq!(offsets!(RawShape: tensor_type, ne, nb), (72, [0, 8, 40]));
        let table = offsets!(RawTable: name, shape, get, set, op, source);
        assert_eq!(table, (56, [8, 16, 24, 32, 40, 48]));
        let callback = offsets!(RawCallbackOptions: n_seq_max, kv_unified, next, next_user_data);
        assert_eq!(callback, (32, [8, 12, 16, 24]));
        assert_eq!(offsets!(RawGateOptions: threshold, window, force), (24, [8, 16, 20]));
        assert_eq!(Status::InternalError as i32, 8);
        assert_eq!(ABI_VERSION, 1);
    }
}
