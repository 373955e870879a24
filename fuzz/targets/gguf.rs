//! Fuzzes the GGUF reader: whatever the bytes are, it refuses them or its accessors work.
#![no_main]

use detox_gguf::gguf::{GgufFile, check_decoder, dequantize};
use detox_gguf::steer::{Fingerprint, value_vector::ValueVectors};
use detox_gguf_fuzz::with_file;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    with_file(data, |path| {
        let Ok(file) = GgufFile::open(path) else { return };
        let _ = check_decoder(&file);
        let _ = Fingerprint::of(&file);
        for (key, value) in file.metadata().iter() {
            // A key that is not UTF-8 is listed with U+FFFD, and then not found by it.
            assert!(key.contains('\u{fffd}') || file.metadata().get(&key).is_some());
            let _ = value.describe();
        }
        for tensor in file.tensors() {
            let bytes = file.read_tensor(tensor).expect("an accepted file holds its tensors");
            // Blocks expand by at most 32 / (1/4) times; the input is small, so this stays small too.
            let mut values = vec![0.0; tensor.n_elements() as usize];
            let _ = dequantize(tensor.tensor_type(), &bytes, &mut values);
        }
        if let Ok(vectors) = ValueVectors::open(&file) {
            for il in 0..vectors.n_layer() {
                if vectors.n_ff(il) > 0 {
                    let _ = vectors.weighted_sum(il, &[(0, 1.0)]);
                }
            }
        }
    });
});
