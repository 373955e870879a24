use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::*;
use crate::file::TEMPORARY_PREFIX;

/// A folder with the files `a`, `b` and a subfolder `inner`.
fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    fs::write(path.join("a"), "A").unwrap();
    fs::write(path.join("b"), "B").unwrap();
    fs::create_dir(path.join("inner")).unwrap();
    (folder, path)
}

fn refusal(paths: &Paths) -> String {
    let error = paths.check().unwrap_err();
    assert!(error.hint().is_some(), "{error}");
    error.to_string()
}

fn assert_is_input(input: &Path, output: &Path) {
    let text = refusal(&Paths::new().reads([input]).writes(output, Form::Text));
    assert!(text.contains("is an input of this command"), "{text}");
}

#[test]
fn rejects_an_input_under_another_path() {
    let (_guard, path) = folder();
    assert_is_input(&path.join("a"), &path.join("a"));
    assert_is_input(&path.join("a"), &path.join("./inner/../a"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(path.join("a"), path.join("link")).unwrap();
        fs::hard_link(path.join("a"), path.join("inner/hard")).unwrap();
        std::os::unix::fs::symlink(&path, path.join("inner/here")).unwrap();
        for other in ["link", "inner/hard", "inner/here/a"] {
            assert_is_input(&path.join("a"), &path.join(other));
            assert_is_input(&path.join(other), &path.join("a"));
        }
    }
    Paths::new().reads([path.join("a")]).writes(path.join("b"), Form::Text).check().unwrap();
    assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "A");
    assert_eq!(fs::read_dir(&path).unwrap().count(), if cfg!(unix) { 4 } else { 3 });
}

#[test]
fn rejects_a_part_of_a_split_model_and_a_file_of_an_input_folder() {
    let (_guard, path) = folder();
    let part = |i: usize| path.join(format!("m-{i:05}-of-00003.gguf"));
    (1..=3).for_each(|i| fs::write(part(i), "GGUF").unwrap());
    let text = refusal(&Paths::new().reads([part(1)]).writes(part(3), Form::Gguf));
    assert!(text.contains("is an input of this command"), "{text}");
    fs::create_dir(path.join("inner/de")).unwrap();
    fs::write(path.join("inner/en.jsonl"), "{}").unwrap();
    fs::write(path.join("inner/de/more.txt"), "x").unwrap();
    fs::write(path.join("inner/de/fr.jsonl.gz"), "x").unwrap();
    assert_is_input(&path.join("inner"), &path.join("inner/en.jsonl"));
    assert_is_input(&path.join("inner"), &path.join("inner/de/fr.jsonl.gz"));
    assert_is_input(&path.join("inner"), &path.join("inner/de/more.txt"));
    Paths::new().reads([path.join("inner")]).writes(path.join("inner/new.txt"), Form::Text).check().unwrap();
}

#[test]
fn rejects_two_outputs_that_are_the_same_file() {
    let (_guard, path) = folder();
    let both = |a: &str, b: &str| {
        let (a, b) = (path.join(a), path.join(b));
        Paths::new().writes(a, Form::Text).writes(b, Form::Text).check()
    };
    for (a, b) in [("a", "./a"), ("new", "inner/../new"), ("New.csv", "new.csv")] {
        let error = both(a, b).unwrap_err();
        assert!(error.to_string().contains("are the same file"), "{error}");
    }
    both("new", "inner/new").unwrap();
}

#[test]
fn rejects_text_over_a_model_and_a_file_that_another_program_wrote_next_to_the_output() {
    let (_guard, path) = folder();
    fs::write(path.join("m.gguf"), "GGUF...").unwrap();
    let text = refusal(&Paths::new().writes(path.join("m.gguf"), Form::Text));
    assert!(text.contains("is a GGUF file"), "{text}");
    Paths::new().writes(path.join("m.gguf"), Form::Gguf).check().unwrap();
    let text = refusal(&Paths::new().writes_beside(path.join("a"), b"rank,"));
    assert!(text.contains("did not write it"), "{text}");
    fs::write(path.join("a"), "rank,layer").unwrap();
    Paths::new().writes_beside(path.join("a"), b"rank,").check().unwrap();
}

/// Writes the marks of one kind of folder.
fn mark(folder: &Path, kind: FolderKind) {
    fs::create_dir_all(folder).unwrap();
    let (name, keys) = kind.mark();
    let object: serde_json::Map<String, Value> =
        keys.iter().map(|k| ((*k).to_owned(), Value::Null)).collect();
    fs::write(folder.join(name), serde_json::to_string(&object).unwrap()).unwrap();
}

#[test]
fn a_folder_is_accepted_if_it_is_new_or_empty_or_holds_the_same_kind_of_work() {
    let (_guard, path) = folder();
    for kind in FolderKind::ALL {
        check_folder(&path.join("new"), kind).unwrap();
        check_folder(&path.join("inner"), kind).unwrap();
        let own = path.join(kind.command());
        mark(&own, kind);
        // The user's notes, and what a killed process left.
        fs::write(own.join("notes.txt"), "mine").unwrap();
        check_folder(&own, kind).unwrap();
        let left = path.join(format!("left-{}", kind.command()));
        fs::create_dir(&left).unwrap();
        fs::write(left.join(format!("{TEMPORARY_PREFIX}x.tmp")), "").unwrap();
        check_folder(&left, kind).unwrap();
    }
    let interrupted = path.join("interrupted");
    mark(&interrupted.join("baseline"), FolderKind::Eval);
    fs::create_dir(interrupted.join("chosen_1")).unwrap();
    check_folder(&interrupted, FolderKind::Sweep).unwrap();
}

#[test]
fn rejects_a_folder_of_another_command_or_with_other_files() {
    let (_other_guard, unknown) = folder();
    let (_guard, path) = folder();
    for kind in FolderKind::ALL {
        let text = check_folder(&unknown, kind).unwrap_err().to_string();
        assert!(text.contains("expected an empty folder or a r") && text.contains(": a, b, inner"), "{text}");
        for other in FolderKind::ALL.into_iter().filter(|other| *other != kind) {
            let folder = path.join(format!("of-{}", other.command()));
            mark(&folder, other);
            let error = check_folder(&folder, kind).unwrap_err();
            assert!(error.to_string().contains(&format!("found one of `{}`", other.command())), "{error}");
        }
        // A file with the name of a mark that this program did not write.
        let foreign = path.join(format!("foreign-{}", kind.command()));
        fs::create_dir(&foreign).unwrap();
        for content in ["precious", "[1,2]", "x: 1"] {
            fs::write(foreign.join(kind.mark().0), content).unwrap();
            assert!(check_folder(&foreign, kind).is_err(), "{content}");
        }
    }
    assert!(
        check_folder(&path.join("a"), FolderKind::Eval).unwrap_err().to_string().contains("cannot create")
    );
}

#[test]
fn rejects_a_file_in_the_folder_of_a_run_and_a_file_of_a_report() {
    let (_guard, path) = folder();
    for kind in FolderKind::ALL {
        let folder = path.join(kind.command());
        mark(&folder, kind);
        let stem = kind.mark().0.trim_end_matches(".json");
        let text = refusal(&Paths::new().writes(folder.join(format!("{stem}.html")), Form::Text));
        assert!(text.contains(&format!("in the folder of a run of `{}`", kind.command())), "{text}");
        let other = Paths::new().writes(folder.join("new.jsonl"), Form::Text).check();
        assert_eq!(other.is_err(), kind.is_run());
    }
}

#[test]
fn rejects_an_output_deeper_in_the_folder_of_another_run() {
    let (_guard, path) = folder();
    for kind in FolderKind::ALL {
        let run = path.join(kind.command());
        mark(&run, kind);
        fs::create_dir(run.join("sub")).unwrap();
        let folder = |inner: &str| Paths::new().writes_folder(run.join(inner), FolderKind::Eval);
        let file = Paths::new().writes(run.join("sub/x.jsonl"), Form::Text);
        for paths in [folder("inner"), folder("sub"), folder("sub/new/er"), file] {
            match kind.is_run() {
                true => assert!(refusal(&paths).contains("expected a place outside of any run"), "{paths:?}"),
                false => paths.check().unwrap(),
            }
        }
        // A sweep writes its runs into its own folder.
        let _lock = lock_folder(&run).unwrap();
        folder("inner").check().unwrap();
    }
    // Two runs side by side are not a sweep.
    mark(&path.join("both/baseline"), FolderKind::Eval);
    Paths::new().writes_folder(path.join("both/steered"), FolderKind::Eval).check().unwrap();
    Paths::new().writes(path.join("both/x.jsonl"), Form::Text).check().unwrap();
}

#[test]
fn rejects_standard_output_where_a_file_is_needed() {
    for paths in [Paths::new().writes("-", Form::Text), Paths::new().writes_folder("-", FolderKind::Train)] {
        assert!(refusal(&paths).contains("cannot write to standard output"));
    }
}

#[cfg(unix)]
#[test]
fn a_link_to_a_file_that_does_not_exist_yet_stands_for_it() {
    let (_guard, path) = folder();
    std::os::unix::fs::symlink("new", path.join("link")).unwrap();
    std::os::unix::fs::symlink("missing/new", path.join("broken")).unwrap();
    let both = Paths::new().writes(path.join("link"), Form::Text).writes(path.join("new"), Form::Text);
    assert!(refusal(&both).contains("are the same file"));
    assert!(refusal(&Paths::new().writes(path.join("broken"), Form::Text)).contains("found no folder"));
}

#[test]
fn rejects_an_input_in_the_output_folder() {
    let (_guard, path) = folder();
    mark(&path, FolderKind::Train);
    let paths = Paths::new().writes_folder(&path, FolderKind::Train);
    paths.clone().check().unwrap();
    let text = refusal(&paths.clone().reads([path.join("a")]));
    assert!(text.contains("is in the folder"), "{text}");
    let text = refusal(&paths.reads([&path]));
    assert!(text.contains("is an input of this command"), "{text}");
}

#[cfg(unix)]
#[test]
fn devices_and_pipes_are_written_to_by_text_only_and_may_be_read_too() {
    let null = Path::new("/dev/null");
    Paths::new().reads([null]).writes(null, Form::Text).check().unwrap();
    let error = Paths::new().writes(null, Form::Gguf).check().unwrap_err();
    assert!(error.to_string().contains("found a device"), "{error}");
}

#[test]
fn names_of_parts_are_recognised() {
    assert_eq!(split_name("a-b-00002-of-00010.gguf"), Some(("a-b", "00010")));
    for name in ["a.gguf", "a-of-b.gguf", "a-00001-of-00002.bin", "00001-of-00002.gguf"] {
        assert_eq!(split_name(name), None, "{name}");
    }
}
