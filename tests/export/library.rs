//! The whole export as a library call.

use std::sync::atomic::AtomicBool;

use detox_gguf::engine::steering::LoraScaled;
use detox_gguf::engine::{ModelOptions, SessionOptions};
use detox_gguf::error::Error;
use detox_gguf::progress::Silent;
use detox_gguf::study::export::{ExportRequest, Step, export};

use super::tiny_path;

#[test]
fn an_export_reports_each_step_and_writes_only_a_model_that_passes() {
    let folder = tempfile::tempdir().unwrap();
    let request = ExportRequest {
        model: tiny_path("llama"),
        loras: vec![LoraScaled { path: tiny_path("llama-lora"), scale: 0.5 }],
        output: folder.path().join("merged.gguf"),
        tensor_type: None,
        force: false,
        allow_loss: false,
        model_options: ModelOptions::default(),
        session_options: SessionOptions { n_threads: Some(1), ..SessionOptions::default() },
    };
    let mut steps = Vec::new();
    let mut record = |step: Step<'_>| {
        assert!(!request.output.exists(), "the output must not appear before the last step");
        steps.push(match step {
            Step::Merged(_) => "merged",
            Step::Compared(_) => "compared",
        });
        Ok(())
    };
    let exported = export(&request, &mut Silent, &mut record, &AtomicBool::new(false)).unwrap();
    assert_eq!(steps, ["merged", "compared"]);
    assert!(exported.loaded_back.is_close() && exported.advice.is_none() && request.output.exists());

    std::fs::remove_file(&request.output).unwrap();
    std::fs::remove_file(&exported.record).unwrap();
    let error = export(&request, &mut Silent, &mut |_| Ok(()), &AtomicBool::new(true)).unwrap_err();
    assert!(matches!(error, Error::Interrupted));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
