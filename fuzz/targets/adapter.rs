//! Fuzzes the reader of LoRA adapters, against a small model.
#![no_main]

use detox_gguf::graph::steering::LoraScaled;
use detox_gguf::steer::{CompileOptions, compile, lora};
use detox_gguf_fuzz::{model, with_file};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    with_file(data, |path| {
        let adapter = LoraScaled { path: path.to_path_buf(), scale: 0.5 };
        if lora::check(&adapter, model()).is_ok() {
            let _ = compile::compile(model(), &[], &[adapter], &CompileOptions::default());
        }
    });
});
