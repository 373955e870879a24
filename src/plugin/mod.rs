//! Steers models inside a program that runs its own build of llama.cpp.
//!
//! ```text
//! model file + steer file ─► Steer ─► control_vector(), for the program's llama_set_adapter_cvec
//!                              └────► Callback, for the program's cb_eval ◄── Gate (probe file)
//! ```
//!
//! [`Steer`] reads an intervention file or a control vector, checks it against the model's file, and finds the
//! cheapest exact way to apply it. A control vector costs almost nothing. What it cannot do (layer 0, assigning,
//! clamping, architectures with a norm after the FFN) is done by a [`Callback`]. The program calls it from llama.cpp's
//! eval callback with every node of the graph, as a [`Node`]. A callback can leave out some sequences. It can also
//! steer a sequence only while a probe on the residual stream says that its text is turning toxic ([`GateOptions`]).
//!
//! Nothing here calls llama.cpp. Any version, build and backend works if its graphs have the nodes that
//! [`crate::graph::architecture`] names. This is verified while decoding, and [`Callback::check`] reports faults.
//!
//! C programs do the same through `vendor/include/detox_gguf.h`; `docs/plugin.md` has the recipes. `c` holds the C
//! functions, in a file for each file here: `c/callback.rs` is the C interface of `callback.rs`.
//!
//! # Example
//! A program that uses `llama-cpp-sys-2` implements [`Node`] for the tensors that its callback receives:
//!
//! ```
//! # #[cfg(feature = "engine")] {
//! use std::ffi::{CStr, CString, c_void};
//! use std::path::Path;
//!
//! use detox_gguf::graph::{Node, Shape};
//! use detox_gguf::plugin::{Callback, ContextOptions, Steer, SteerOptions};
//! use llama_cpp_sys_2 as sys;
//!
//! struct Tensor(*mut sys::ggml_tensor);
//!
//! impl Node for Tensor {
//!     fn name(&self) -> &[u8] {
//!         // SAFETY: llama.cpp's own tensor, alive during the callback; its name is NUL-terminated.
//!         unsafe { CStr::from_ptr(sys::ggml_get_name(self.0)) }.to_bytes()
//!     }
//!     fn shape(&self) -> Shape {
//!         // SAFETY: as above, and nothing writes to the struct during the callback.
//!         let tensor = unsafe { &*self.0 };
//!         Shape { is_f32: tensor.type_ == sys::GGML_TYPE_F32, ne: tensor.ne, nb: tensor.nb }
//!     }
//!     fn get(&self, values: &mut [f32]) -> Result<(), String> {
//!         let n_bytes = size_of_val(values);
//!         // SAFETY: a live tensor that was computed; detox_gguf sized `values` by its shape.
//!         unsafe { sys::ggml_backend_tensor_get(self.0, values.as_mut_ptr().cast(), 0, n_bytes) };
//!         Ok(())
//!     }
//!     fn set(&mut self, values: &[f32]) -> Result<(), String> {
//!         let n_bytes = size_of_val(values);
//!         // SAFETY: as in `get`.
//!         unsafe { sys::ggml_backend_tensor_set(self.0, values.as_ptr().cast(), 0, n_bytes) };
//!         Ok(())
//!     }
//! }
//!
//! extern "C" fn cb_eval(tensor: *mut sys::ggml_tensor, ask: bool, callback: *mut c_void) -> bool {
//!     // SAFETY: the callback that is passed to the context below, and dropped after it.
//!     let callback = unsafe { &*callback.cast::<Callback>() };
//!     callback.eval(&mut Tensor(tensor), ask)
//! }
//!
//! # fn steer() -> Result<(), Box<dyn std::error::Error>> {
//! # std::env::set_current_dir(env!("CARGO_MANIFEST_DIR"))?;
//! # let folder = tempfile::tempdir()?;
//! # let file = folder.path().join("steer.json");
//! # std::fs::write(&file, r#"{"detox_gguf": "interventions", "format": 1, "interventions":
//! #     [{"what": {"neurons": [[0, 5]]}, "edit": {"offset": 3}}]}"#)?;
//! // Layer 0 has no control vector: this needs the callback.
//! let model_path = Path::new("gguf/tiny/llama.gguf");
//! let steer = Steer::load(model_path, &file, &SteerOptions::default())?;
//! let callback = Box::new(steer.callback(&ContextOptions { n_seq_max: 1, kv_unified: false })?);
//!
//! let mut logits = Vec::new();
//! // SAFETY: model and context are used only while they exist, and only on this thread; the batch has three tokens, as
//! // it says; after a decode there is a row of logits; the callback outlives the context.
//! unsafe {
//! #   sys::llama_log_set(Some(quiet), std::ptr::null_mut());
//! #   extern "C" fn quiet(_: sys::ggml_log_level, _: *const std::ffi::c_char, _: *mut c_void) {}
//!     let path = CString::new(model_path.to_str().unwrap())?;
//!     let model = sys::llama_model_load_from_file(path.as_ptr(), sys::llama_model_default_params());
//!     let mut params = sys::llama_context_default_params();
//!     params.n_ctx = 64;
//!     params.cb_eval = Some(cb_eval);
//!     params.cb_eval_user_data = (&raw const *callback).cast_mut().cast();
//!     let context = sys::llama_init_from_model(model, params);
//!     for coefficient in [0.0, 1.0] {
//!         steer.set_coefficient(coefficient)?;
//!         sys::llama_memory_clear(sys::llama_get_memory(context), true);
//!         let mut tokens = [1, 60, 70];
//!         assert_eq!(sys::llama_decode(context, sys::llama_batch_get_one(tokens.as_mut_ptr(), 3)), 0);
//!         callback.check()?;
//!         logits.push(*sys::llama_get_logits_ith(context, -1));
//!     }
//!     sys::llama_free(context);
//!     sys::llama_model_free(model);
//! }
//! assert_ne!(logits[0], logits[1]);
//! # Ok(())
//! # }
//! # steer().unwrap();
//! # }
//! ```
//!
//! A program that uses `llama-cpp-2` does the same if that crate accepts an eval callback. Version 0.1.160 does not,
//! it cannot set a control vector, and it hides its pointers. In that case create the contexts with
//! `llama-cpp-sys-2`, as here.

#[cfg(feature = "capi")]
mod c;
mod callback;
mod gate;
mod loaded;
mod steer;

pub use crate::graph::{Node, Shape};
pub use callback::{Callback, ContextOptions, Token};
pub use gate::{GateOptions, GateState};
pub use steer::{Steer, SteerOptions};
