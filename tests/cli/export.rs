//! The `export` command.

use std::path::{Path, PathBuf};

use detox_gguf::gguf::{GgufFile, Metadata};
use detox_gguf::steer::{Fingerprint, control_vector};
use detox_gguf::train::output::{Adapter, Factors};

use super::support::real_model;
use super::{detox, failure, tiny};

fn export(model: &Path, lora: &Path, output: &Path) -> assert_cmd::Command {
    let mut command = detox();
    command.args(["export", "-t", "1", "-m"]).arg(model).arg("--lora").arg(lora).arg("-o").arg(output);
    command
}

fn n_files(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

/// Writes the tiny llama's adapter, B times `scale`, to `folder`, with the fingerprint of the model at `base`.
fn scaled_adapter(folder: &Path, base: &Path, scale: f32) -> PathBuf {
    let base = GgufFile::open(base).unwrap();
    let mut adapter = Adapter::read(&tiny("llama-lora.gguf"), &base).unwrap();
    adapter.factors.iter_mut().for_each(|factors| factors.b.iter_mut().for_each(|b| *b *= scale));
    let path = folder.join("scaled-lora.gguf");
    adapter.write(&path, &base, &Metadata::new()).unwrap();
    path
}

#[test]
fn a_merged_model_is_compared_with_base_and_adapter_and_runs() {
    let folder = tempfile::tempdir().unwrap();
    for model in ["llama.gguf", "llama-q8_0.gguf"] {
        let output = folder.path().join("merged.gguf");
        let run = export(&tiny(model), &tiny("llama-lora.gguf"), &output).assert().success();
        let table = String::from_utf8(run.get_output().stdout.clone()).unwrap();
        for part in ["survived", "the adapter's effect", "lost in the merge", "noise floor"] {
            assert!(table.contains(part), "{part}: {table}");
        }
        assert!(
            table.lines().filter(|l| !l.contains("survived:")).all(|l| l.chars().count() <= 80),
            "{table}"
        );
        // The model and the record next to it.
        assert_eq!(n_files(folder.path()), 2);
        let merged = GgufFile::open(&output).unwrap();
        let made_of = merged.str("detox_gguf.merged").unwrap();
        assert!(made_of.starts_with("llama-lora.gguf (sha256 ") && made_of.ends_with(" x 1"), "{made_of}");
        assert_eq!(merged.str("detox_gguf.merged.base").unwrap(), model);
        let before = std::fs::read(&output).unwrap();
        export(&tiny(model), &tiny("llama-lora.gguf"), &output).assert().success();
        assert!(std::fs::read(&output).unwrap() == before, "the same merge must give the same bytes");
        let mut command = detox();
        command.args(["generate", "-k", "1", "-n", "2", "--lang", "en", "--limit", "1", "-t", "1", "-m"]);
        command.arg(&output).assert().success();
        std::fs::remove_file(&output).unwrap();
    }
}

#[test]
fn a_merge_that_loses_the_change_is_refused_with_a_hint_and_leaves_no_file() {
    let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let base = tiny("llama-q8_0.gguf");
    let lora = scaled_adapter(work.path(), &base, 1e-6);
    let output = folder.path().join("merged.gguf");
    let (code, stderr) = failure(&mut export(&base, &lora, &output));
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("merged.gguf: not written: the merged model is no nearer"), "{stderr}");
    assert!(stderr.contains("hint: 0% of the change survived") && stderr.contains("--type f16"), "{stderr}");
    assert_eq!(n_files(folder.path()), 0);
    // An existing file stays.
    std::fs::write(&output, "before").unwrap();
    failure(&mut export(&base, &lora, &output));
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "before");
}

#[test]
fn an_adapter_of_zeros_leaves_all_tensors_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let lora = scaled_adapter(folder.path(), &tiny("llama-q8_0.gguf"), 0.0);
    let output = folder.path().join("merged.gguf");
    export(&tiny("llama-q8_0.gguf"), &lora, &output).assert().success();
    let (base, merged) = (GgufFile::open(tiny("llama-q8_0.gguf")).unwrap(), GgufFile::open(&output).unwrap());
    for (a, b) in base.tensors().iter().zip(merged.tensors()) {
        assert!(base.read_tensor(a).unwrap() == merged.read_tensor(b).unwrap(), "{}", a.name());
    }
}

#[test]
fn a_merge_whose_numbers_overflow_is_refused_and_leaves_no_file() {
    let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let output = folder.path().join("merged.gguf");
    // Keys that fit into F32, but not into llama.cpp's default cache in F16.
    let base = GgufFile::open(tiny("llama.gguf")).unwrap();
    let name = "blk.0.attn_k.weight";
    let &[n_in, n_out] = base.tensor(name).unwrap().shape() else { panic!("{name} is not a matrix") };
    let (n_in, n_out) = (n_in as usize, n_out as usize);
    let factors =
        Factors { name: name.into(), n_in, n_out, rank: 1, a: vec![1.5; n_in], b: vec![1.5; n_out] };
    let lora = work.path().join("lora.gguf");
    Adapter { alpha: 0.0, factors: vec![factors] }.write(&lora, &base, &Metadata::new()).unwrap();
    for (scale, part) in [("1e25", "NaN or infinite values"), ("3e38", "--lora-scaled")] {
        let mut command = detox();
        command.args(["export", "-t", "1", "-m"]).arg(tiny("llama.gguf"));
        command.args(["--lora-scaled", &format!("{}:{scale}", lora.display()), "-o"]).arg(&output);
        let (code, stderr) = failure(&mut command);
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.contains(part) && stderr.contains("hint: ") && stderr.contains("lower"), "{stderr}");
        assert_eq!(n_files(folder.path()), 0);
    }
}

#[test]
fn an_effect_too_small_to_measure_is_said_to_be_that() {
    let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let base = tiny("llama.gguf");
    let lora = scaled_adapter(work.path(), &base, 1e-20);
    let output = folder.path().join("merged.gguf");
    let (code, stderr) = failure(&mut export(&base, &lora, &output));
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("too small to tell from the model's own rounding"), "{stderr}");
    assert!(stderr.contains("--allow-loss keeps the merged model anyway"), "{stderr}");
    assert!(!output.exists());
    export(&base, &lora, &output).arg("--allow-loss").assert().success();
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("merged.gguf");
    // A file size limit of 100 KiB: a write fails in the middle of the tensors, as on a full disk.
    let run = std::process::Command::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\""])
        .arg(assert_cmd::cargo::cargo_bin("detox-gguf"))
        .args(["export", "-t", "1", "-m"])
        .arg(tiny("llama.gguf"))
        .arg("--lora")
        .arg(tiny("llama-lora.gguf"))
        .arg("-o")
        .arg(&output)
        .output()
        .unwrap();
    let stderr = String::from_utf8(run.stderr).unwrap();
    assert_eq!(run.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(&format!("cannot write {}", output.display())), "{stderr}");
    assert_eq!(n_files(folder.path()), 0);
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_an_export_and_leaves_no_file() {
    let Some(model) = real_model() else { return };
    let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let base = GgufFile::open(&model).unwrap();
    let name = "blk.0.ffn_down.weight";
    let &[n_in, n_out] = base.tensor(name).unwrap().shape() else { panic!("{name} is not a matrix") };
    let (n_in, n_out) = (n_in as usize, n_out as usize);
    let factors =
        Factors { name: name.into(), n_in, n_out, rank: 1, a: vec![1e-3; n_in], b: vec![1e-3; n_out] };
    let lora = work.path().join("lora.gguf");
    Adapter { alpha: 0.0, factors: vec![factors] }.write(&lora, &base, &Metadata::new()).unwrap();
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("detox-gguf"))
        .args(["export", "-t", "1", "-m"])
        .arg(&model)
        .arg("--lora")
        .arg(&lora)
        .arg("-o")
        .arg(folder.path().join("merged.gguf"))
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // The merge and the comparison take seconds. Until then no file has a name.
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert!(child.try_wait().unwrap().is_none(), "it ended before it could be interrupted");
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
    let run = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(run.stderr).unwrap();
    assert_eq!(run.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("error: interrupted"), "{stderr}");
    assert_eq!(n_files(folder.path()), 0);
}

#[test]
fn rejects_bad_arguments_with_a_hint() {
    let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (llama, lora) = (tiny("llama.gguf"), tiny("llama-lora.gguf"));
    let vector = work.path().join("steer.gguf");
    let fingerprint = Fingerprint::of(&GgufFile::open(&llama).unwrap()).unwrap();
    control_vector::write(&vector, &fingerprint, &[(1, vec![0.5; 64])].into(), &Metadata::new()).unwrap();
    let of_llama = scaled_adapter(work.path(), &llama, 1.0);
    let output = folder.path().join("merged.gguf");
    let mut none = detox();
    none.arg("export").arg("-m").arg(&llama).arg("-o").arg(&output);
    let with = |arguments: &[&str]| {
        let mut command = export(&llama, &lora, &output);
        command.args(arguments);
        command
    };
    let cases = [
        (2, "steer --bake", none),
        (1, "--bake -o", export(&llama, &vector, &output)),
        (1, "expected a LoRA adapter", export(&llama, &llama, &output)),
        (
            1,
            "architecture \"llama\", and this model has \"gpt2\"",
            export(&tiny("gpt2.gguf"), &lora, &output),
        ),
        (1, "--force", export(&tiny("llama-q8_0.gguf"), &of_llama, &output)),
        (1, "No such file", export(&llama, &work.path().join("none"), &output)),
        (1, "No such file", export(&work.path().join("none"), &lora, &output)),
        (2, "found no folder", export(&llama, &lora, &folder.path().join("none/merged.gguf"))),
        (2, "importance matrix", with(&["--type", "iq1_s"])),
        (2, "hint: choose one of f32, f16, q4_0", with(&["--type", "q4_k_m"])),
        (1, "multiple of 256", with(&["--type", "q4_k"])),
        (2, "--lora-scaled", with(&["--lora-scaled", &format!("{}:inf", lora.display())])),
        (2, "the folder", export(&llama, &lora, folder.path())),
    ];
    for (code, part, mut command) in cases {
        let (found, stderr) = failure(&mut command);
        assert!(found == code && stderr.contains(part), "{part}: {found} {stderr}");
        assert_eq!(n_files(folder.path()), 0, "{part}");
    }
    // The output must not be one of the inputs.
    let copy = work.path().join("copy.gguf");
    std::fs::copy(&llama, &copy).unwrap();
    assert!(failure(&mut export(&copy, &lora, &copy)).1.contains("is an input of this command"));
    assert!(failure(&mut export(&llama, &of_llama, &of_llama)).1.contains("is an input of this command"));
    export(&tiny("llama-q8_0.gguf"), &of_llama, &output).arg("--force").assert().success();
}
