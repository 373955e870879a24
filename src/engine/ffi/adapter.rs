//! An owned LoRA adapter over a model.

use std::ffi::CString;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError};

use llama_cpp_sys_2 as sys;

use super::model::ModelHandle;

/// A LoRA adapter's weights, in memory beside those of its model.
#[derive(Debug)]
pub(in crate::engine) struct LoraHandle {
    pub(super) adapter: NonNull<sys::llama_adapter_lora>,
    /// Last field: dropped after the adapter.
    pub(super) model: Arc<ModelHandle>,
}

// SAFETY: an adapter is only read after it was loaded; loading and freeing, which write to the model's list
// of adapters, hold the model's lock.
unsafe impl Send for LoraHandle {}
// SAFETY: as above.
unsafe impl Sync for LoraHandle {}

impl LoraHandle {
    /// Loads an adapter that `steer::lora::check` has validated; `None` when llama.cpp refuses it.
    pub(in crate::engine) fn load(model: &Arc<ModelHandle>, path: &Path) -> Option<LoraHandle> {
        let path = CString::new(path.to_str()?).ok()?;
        let _lock = model.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the model is alive and its list of adapters is ours alone under the lock; `path` is
        // terminated and lives during the call.
        let adapter = unsafe { sys::llama_adapter_lora_init(model.model.as_ptr(), path.as_ptr()) };
        NonNull::new(adapter).map(|adapter| LoraHandle { adapter, model: model.clone() })
    }
}

impl Drop for LoraHandle {
    fn drop(&mut self) {
        let _lock = self.model.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the adapter came from llama_adapter_lora_init, is freed once, before its model, and no
        // context uses it any more: each holds an `Arc` of the adapters that it was given.
        unsafe { sys::llama_adapter_lora_free(self.adapter.as_ptr()) }
    }
}
