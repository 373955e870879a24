//! An owned LoRA adapter of a model.

use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError};

use llama_cpp_sys_2 as sys;

use super::model::ModelHandle;
use super::{path_bytes, with_reason};
use crate::engine::in_use::InUse;

/// A LoRA adapter in memory.
#[derive(Debug)]
pub(in crate::engine) struct LoraHandle {
    pub(super) adapter: NonNull<sys::llama_adapter_lora>,
    _in_use: InUse,
    /// Last field: dropped after the adapter.
    pub(super) model: Arc<ModelHandle>,
}

// SAFETY: a loaded adapter is only read. Loading and freeing write to the model's list of adapters, and hold the
// model's lock while they do.
unsafe impl Send for LoraHandle {}
// SAFETY: as for `Send`.
unsafe impl Sync for LoraHandle {}

impl LoraHandle {
    /// Loads an adapter that `steer::lora::check` has validated. The error is what llama.cpp says, or empty.
    pub(in crate::engine) fn load(model: &Arc<ModelHandle>, path: &Path) -> Result<LoraHandle, String> {
        with_reason(|| LoraHandle::load_logged(model, path))
    }

    fn load_logged(model: &Arc<ModelHandle>, path: &Path) -> Option<LoraHandle> {
        let in_use = InUse::enter("adapter", path);
        let path = path_bytes(path)?;
        let _lock = model.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the model is alive, the lock gives exclusive access to its list of adapters, and `path` is
        // NUL-terminated and lives during the call.
        let adapter = unsafe { sys::llama_adapter_lora_init(model.model.as_ptr(), path.as_ptr()) };
        NonNull::new(adapter).map(|adapter| LoraHandle { adapter, _in_use: in_use, model: model.clone() })
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
