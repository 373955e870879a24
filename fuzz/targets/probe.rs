//! Fuzzes the reader of probes: an accepted probe has a usable direction.
#![no_main]

use detox_gguf::interp::probe::Probe;
use detox_gguf_fuzz::{model, with_file};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    with_file(data, |path| {
        let Ok(probe) = Probe::read(path) else { return };
        let _ = probe.check(model(), path, true);
        let length = probe.unit_direction().iter().map(|x| x * x).sum::<f32>();
        assert!((length - 1.0).abs() < 1e-3, "the direction's length is {length}");
    });
});
