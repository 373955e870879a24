//! The extension's C interface as bindgen reads it; only this folder uses it.
#![allow(
    missing_docs,
    non_camel_case_types,
    dead_code,
    clippy::all,
    reason = "made out of vendor/cuda/ops.h"
)]

include!(concat!(env!("OUT_DIR"), "/cuda_ops.rs"));
