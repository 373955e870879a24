//! Raw bindings of the extension, used only in this folder.
#![allow(
    missing_docs,
    non_camel_case_types,
    dead_code,
    clippy::all,
    reason = "generated from vendor/cuda/ops.h"
)]

include!(concat!(env!("OUT_DIR"), "/cuda_ops.rs"));
