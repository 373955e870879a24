//! Detectable misuse is refused, by the C functions and by the file readers behind them.

use std::path::PathBuf;
use std::process::Command;

use detox_gguf::interp::probe::{Probe, ProbePlace};
use detox_gguf::plugin::{Steer, SteerOptions};
use proptest::prelude::*;

use super::build::{program, run};
use super::{interventions, tiny};

/// The files that `tests/plugin/misuse.c` and `tests/plugin/fuzz.c` take as arguments.
pub fn files(folder: &std::path::Path) -> [PathBuf; 5] {
    let assign = interventions(folder, &[r#""what": {"neurons": [[0, 5]]}, "edit": {"assign": 4}"#]);
    let steer = folder.join("assign.json");
    std::fs::rename(assign, &steer).unwrap();
    let offset = interventions(folder, &[r#""what": {"neurons": [[1, 3], [2, 40]]}, "edit": {"offset": 3}"#]);
    let probe = folder.join("probe.gguf");
    let weight = (0..64).map(|i| (i as f32 - 31.0) / 640.0).collect();
    let place = ProbePlace::Block(1);
    let of_test =
        Probe { weight, place, fingerprint: None, source: "a test".into(), accuracy: None, auc: None };
    of_test.write(&probe).unwrap();
    [tiny("llama"), steer, offset, probe, folder.join("nothing")]
}

#[test]
fn every_function_refuses_detectable_misuse_and_still_works_afterwards() {
    let folder = tempfile::tempdir().unwrap();
    run(Command::new(program("tests/plugin/misuse.c", "misuse", &[])).args(files(folder.path())));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_bytes_as_a_file_are_refused_without_a_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
        is_gguf in any::<bool>(),
        as_model in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let start: &[u8] = if is_gguf { b"GGUF\x03\0\0\0" } else { b"" };
        std::fs::write(&path, [start, &bytes].concat()).unwrap();
        let steer = interventions(folder.path(), &[r#""what": {"neurons": [[0, 5]]}, "edit": {"assign": 4}"#]);
        let (model, file) = if as_model { (&path, &steer) } else { (&tiny("llama"), &path) };
        prop_assert!(Steer::load(model, file, &SteerOptions::default()).is_err());
        prop_assert!(Probe::read(&path).is_err());
    }

    #[test]
    fn a_damaged_control_vector_or_model_is_refused_or_read_without_a_panic(
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let mut bytes = std::fs::read(tiny("llama")).unwrap();
        // The metadata and the list of tensors are at the start of the file.
        bytes[at.index(16 << 10)] = byte;
        let length = cut.index(2 * bytes.len()).min(bytes.len());
        std::fs::write(&path, &bytes[..length]).unwrap();
        let steer = interventions(folder.path(), &[r#""what": {"neurons": [[1, 3]]}, "edit": {"offset": 4}"#]);
        let _ = Steer::load(&path, &steer, &SteerOptions::default());
    }
}
