//! An owned LoRA adapter of a model.

use std::ffi::CString;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError};

use llama_cpp_sys_2 as sys;

use super::model::ModelHandle;

/// A LoRA adapter in memory.
#[derive(Debug)]
pub(in crate::engine) struct LoraHandle {
    pub(super) adapter: NonNull<sys::llama_adapter_lora>,
    /// Last field: dropped after the adapter.
    pub(super) model: Arc<ModelHandle>,
}

// SAFETY: a loaded adapter is only read. Loading and freeing write to the model's list of adapters, and hold the
// model's lock while they do.
unsafe impl Send for LoraHandle {}
// SAFETY: as for `Send`.
unsafe impl Sync for LoraHandle {}

impl LoraHandle {
    /// Loads an adapter that `steer::lora::check` has validated; `None` if llama.cpp refuses it.
    pub(in crate::engine) fn load(model: &Arc<ModelHandle>, path: &Path) -> Option<LoraHandle> {
        let path = CString::new(path.to_str()?).ok()?;
        let _lock = model.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the model is alive, the lock gives exclusive access to its list of adapters, and `path` is
        // NUL-terminated and lives during the call.
        let adapter = unsafe { sys::llama_adapter_lora_init(model.model.as_ptr(), path.as_ptr()) };
        NonNull::new(adapter).map(|adapter| LoraHandle { adapter, model: model.clone() })
    }
}

impl Drop for LoraHandle {
    fn drop(&mut self) {
        let _lock = self.model.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the adapter came from llama_adapter_lora_init and is freed once, before its model. No context
        // still uses it, because each holds an `Arc` of its adapters.
        unsafe { sys::llama_adapter_lora_free(self.adapter.as_ptr()) }
    }
}
