//! Fuzzes the readers of steering files: control vectors, interventions, lists of neurons, and what they compile to.
#![no_main]

use detox_gguf::steer::{CompileOptions, NeuronFile, Route, SteerFile, compile};
use detox_gguf_fuzz::{model, with_file};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    with_file(data, |path| {
        let _ = NeuronFile::read_for(path, model(), true);
        let Ok(file) = SteerFile::open(path) else { return };
        for route in [Route::Cheapest, Route::Callback] {
            let options = CompileOptions { route, force: true, ..CompileOptions::default() };
            let _ = compile::compile(model(), &[(file.clone(), 0.5)], &[], &options);
        }
    });
});
