//! Locks, signals, leftovers and damaged run folders: nothing that was finished is lost.

use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Output, Stdio};
use std::time::{Duration, Instant};

use super::{contents, detox, differing, failure, small_eval, tiny};

/// Names in a folder that are not for the user.
fn leftovers(folder: &Path) -> Vec<String> {
    let names = contents(folder).into_keys();
    names.filter(|name| name.starts_with('.') || name.ends_with(".tmp") || name.ends_with(".part")).collect()
}

/// A run of the program with these arguments in `folder`.
fn started(folder: &Path, arguments: &str) -> Child {
    process(folder, arguments).spawn().unwrap()
}

fn process(folder: &Path, arguments: &str) -> Process {
    let mut process = Process::new(assert_cmd::cargo::cargo_bin("detox-gguf"));
    process.current_dir(folder).args(arguments.split_whitespace()).arg("-m").arg(tiny("llama.gguf"));
    process.env("NO_COLOR", "1").env_remove("RUST_LOG").stdout(Stdio::piped()).stderr(Stdio::piped());
    process
}

fn run(folder: &Path, arguments: &str) -> (Option<i32>, String) {
    code_and_text(process(folder, arguments).output().unwrap())
}

fn code_and_text(output: Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// Waits until a file has at least `n_bytes`.
fn wait_for(path: PathBuf, n_bytes: u64, child: &mut Child) {
    let started = Instant::now();
    while std::fs::metadata(&path).map_or(0, |metadata| metadata.len()) < n_bytes {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it wrote {}", path.display());
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn send(signal: &str, child: &Child) {
    assert!(Process::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

const LONG_TRAIN: &str = "train -o t --max-steps 5000 --rank 2 --eval-every 1000 -t 1";
const LONG_EVAL: &str = "eval --lang en,de,fr,es,it -k 25 -n 30 -np 2 -t 1 -o e";
const LONG_GENERATE: &str = "generate --lang en,de,fr,es,it -k 25 -n 30 -np 2 -t 1 -o g.jsonl";

#[test]
fn a_second_process_in_a_run_folder_is_refused_with_the_holder() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = started(folder.path(), LONG_TRAIN);
    wait_for(folder.path().join("t/metrics.jsonl"), 1, &mut first);
    let holder = format!(": `detox-gguf train` (process {}, since 2", first.id());
    let (code, text) = run(folder.path(), LONG_TRAIN);
    assert_eq!(code, Some(1), "{text}");
    assert!(
        text.contains(&holder) && text.contains("hint: wait until that process ends, or choose"),
        "{text}"
    );
    // Of any command, not only of the same one.
    let (code, text) = run(folder.path(), "eval --lang en --limit 1 -k 1 -n 1 -o t");
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("found one of `train`"), "{text}");
    // Both ways out that the hint names.
    let (code, text) = run(folder.path(), "train -o other --max-steps 1 --rank 2 -t 1");
    assert_eq!(code, Some(0), "{text}");
    send("-9", &first);
    first.wait().unwrap();
    let mut child = started(folder.path(), LONG_TRAIN);
    wait_for(folder.path().join("t/metrics.jsonl"), 1, &mut child);
    std::thread::sleep(Duration::from_millis(50));
    send("-INT", &child);
    let (code, text) = code_and_text(child.wait_with_output().unwrap());
    assert_eq!(code, Some(130), "{text}");
    assert_eq!(leftovers(&folder.path().join("t")), [""; 0]);
}

#[test]
fn term_and_hup_save_like_ctrl_c() {
    for (signal, expected) in [("-TERM", 143), ("-HUP", 129), ("-INT", 130)] {
        let folder = tempfile::tempdir().unwrap();
        let mut child = started(folder.path(), LONG_TRAIN);
        wait_for(folder.path().join("t/metrics.jsonl"), 1, &mut child);
        send(signal, &child);
        let (code, text) = code_and_text(child.wait_with_output().unwrap());
        assert_eq!(code, Some(expected), "{signal}: {text}");
        assert!(text.contains("saved after step") && text.contains("the same command"), "{signal}: {text}");
        assert!(folder.path().join("t/checkpoint.gguf").exists());
        assert_eq!(leftovers(&folder.path().join("t")), [""; 0]);

        let mut child = started(folder.path(), LONG_EVAL);
        wait_for(folder.path().join("e/generations.jsonl"), 1, &mut child);
        send(signal, &child);
        let (code, text) = code_and_text(child.wait_with_output().unwrap());
        assert_eq!(code, Some(expected), "{signal}: {text}");
        assert_eq!(leftovers(&folder.path().join("e")), [""; 0]);

        let child = started(folder.path(), LONG_GENERATE);
        std::thread::sleep(Duration::from_millis(700));
        send(signal, &child);
        let (code, text) = code_and_text(child.wait_with_output().unwrap());
        assert_eq!(code, Some(expected), "{signal}: {text}");
        let entries = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(entries, 2, "only the two run folders are left");
    }
}

#[test]
fn nohup_stays_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let train = process(folder.path(), "train -o t --max-steps 40 --rank 2 --eval-every 10 -t 1");
    let mut child = Process::new("bash")
        .current_dir(folder.path())
        .args(["-c", "trap '' HUP; exec \"$0\" \"$@\""])
        .arg(train.get_program())
        .args(train.get_args())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for(folder.path().join("t/metrics.jsonl"), 1, &mut child);
    send("-HUP", &child);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(folder.path().join("t/adapter.gguf").exists());
}

#[test]
fn a_killed_export_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let lora = tiny("llama-lora.gguf");
    let arguments = format!("export --lora {} -o e.gguf -t 1", lora.display());
    for milliseconds in [20, 60, 100, 150, 250] {
        let mut child = started(folder.path(), &arguments);
        std::thread::sleep(Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    // An earlier version left a folder with a file in it, which blocked every later run there.
    std::fs::create_dir(folder.path().join(".detox-gguf-abc.tmp")).unwrap();
    let (code, text) = run(folder.path(), &arguments);
    assert_eq!(code, Some(0), "{text}");
    std::fs::remove_dir(folder.path().join(".detox-gguf-abc.tmp")).unwrap();
    assert_eq!(contents(folder.path()).into_keys().collect::<Vec<_>>(), ["e.export.json", "e.gguf"]);
}

#[test]
fn a_run_in_the_folder_of_another_output_keeps_its_temporary_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = started(folder.path(), "generate --lang en,de -k 8 -n 12 -np 2 -t 1 -o g.jsonl");
    std::thread::sleep(Duration::from_millis(300));
    let _ = run(folder.path(), "eval --lang en --limit 1 -k 1 -n 1 -t 1 -o .");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(folder.path().join("g.jsonl").exists());
}

/// Changes a file.
type Damage<'a> = &'a dyn Fn(&Path);

/// Zeroes some bytes of a file.
fn zero(path: &Path, from_end: usize, n: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let start = bytes.len() - from_end;
    bytes[start..start + n].fill(0);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_run_with_damaged_rows_resumes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, broken] = ["whole", "broken"].map(|name| folder.path().join(name));
    small_eval(&whole).assert().success();
    small_eval(&broken).assert().success();
    let damages: [(&str, Damage<'_>); 6] = [
        ("generations.jsonl", &|path| zero(path, 300, 200)),
        ("generations.jsonl", &|path| {
            let text = std::fs::read_to_string(path).unwrap();
            std::fs::write(path, text + "\u{0}\u{0}\ngarbage").unwrap();
        }),
        ("generations.jsonl", &|path| {
            let text = std::fs::read_to_string(path).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            std::fs::write(path, text.replacen(lines[1], "x", 1)).unwrap();
        }),
        ("generations.jsonl", &|path| {
            // A row of another prompt.
            let text = std::fs::read_to_string(path).unwrap();
            std::fs::write(path, text.replacen("\"prompt_id\":\"", "\"prompt_id\":\"other-", 1)).unwrap();
        }),
        ("scores.jsonl", &|path| zero(path, 300, 200)),
        ("run.json", &|path| std::fs::write(path, vec![0; 512]).unwrap()),
    ];
    for (i, (name, damage)) in damages.iter().enumerate() {
        damage(&broken.join(name));
        let output = small_eval(&broken).assert().success().get_output().clone();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("WARN") && text.contains(name), "{i}: {text}");
        let mut different = differing(&whole, &broken);
        different.retain(|name| !name.contains(".damaged"));
        assert_eq!(different, [""; 0], "{i}");
    }
    // Whole rows after a damaged one are never deleted.
    let aside = std::fs::read_to_string(broken.join("generations.jsonl.damaged")).unwrap();
    assert_eq!(aside.lines().count(), 24, "all rows from the damaged unit on");
}

#[test]
fn the_hints_for_a_run_folder_can_be_followed() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    small_eval(&a).assert().success();
    small_eval(&b).assert().success();
    let before = contents(&a);

    // "choose a new folder with -o, or repeat the command that started this run to resume it"
    let (code, text) = failure(small_eval(&a).args(["--top-p", "0.5"]));
    assert_eq!(code, 1);
    assert!(
        text.contains("holds another run") && text.contains("hint: choose a new folder with -o, or"),
        "{text}"
    );
    small_eval(&folder.path().join("new")).args(["--top-p", "0.5"]).assert().success();
    small_eval(&a).assert().success();
    assert_eq!(contents(&a), before);

    // "choose a new folder with -o", for a folder with other files.
    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("mine"), "mine").unwrap();
    assert_eq!(failure(&mut small_eval(&other)).0, 1);
    assert_eq!(contents(&other).into_keys().collect::<Vec<_>>(), ["mine"]);

    // "repeat the `detox-gguf eval` that wrote this folder", for a comparison with a damaged or unfinished run.
    for name in ["generations.jsonl", "scores.jsonl"] {
        for damage in [true, false] {
            match damage {
                true => zero(&a.join(name), 300, 200),
                false => std::fs::remove_file(a.join(name)).unwrap(),
            }
            let (code, text) = failure(detox().arg("compare").args([&a, &b]));
            assert_eq!(code, 1);
            assert!(text.contains("hint: repeat the `detox-gguf eval` that wrote this folder"), "{text}");
            small_eval(&a).assert().success();
            assert_eq!(contents(&a), before);
            detox().arg("compare").args([&a, &b]).assert().success();
        }
    }
    // A damaged run.json alone does no harm.
    std::fs::write(a.join("run.json"), "").unwrap();
    detox().arg("compare").args([&a, &b]).assert().success();
    std::fs::remove_file(a.join("run.json.bak")).unwrap();
    let (_, text) = failure(&mut small_eval(&a));
    assert!(
        text.contains("run.json is damaged (it is empty)") && text.contains("hint: choose a new folder"),
        "{text}"
    );
}

#[test]
fn metrics_of_training_can_be_damaged_and_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let train = "train -o r --max-steps 6 --rank 2 --eval-every 2 -t 1";
    assert_eq!(run(folder.path(), train).0, Some(0));
    let metrics = folder.path().join("r/metrics.jsonl");
    let before = std::fs::read_to_string(&metrics).unwrap();
    let second = before.lines().nth(1).unwrap();
    std::fs::write(&metrics, before.replace(second, "x")).unwrap();
    let (code, text) = run(folder.path(), train);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("metrics.jsonl:2: the row is damaged"), "{text}");
    std::fs::remove_file(&metrics).unwrap();
    let (code, text) = run(folder.path(), train);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("the run continues"), "{text}");
}

#[test]
fn a_file_beyond_the_size_limit_is_a_sentence_with_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    let lora = tiny("llama-lora.gguf");
    for (i, arguments) in [
        "generate --lang en -k 25 -n 20 -t 1 -o out".to_owned(),
        "eval --lang en -k 25 -n 20 -t 1 -o run".to_owned(),
        format!("export --lora {} -t 1 -o out.gguf", lora.display()),
    ]
    .iter()
    .enumerate()
    {
        let limited = process(folder.path(), arguments);
        let output = Process::new("bash")
            .current_dir(folder.path())
            .args(["-c", "ulimit -f 8; exec \"$0\" \"$@\""])
            .arg(limited.get_program())
            .args(limited.get_args())
            .output()
            .unwrap();
        let (code, text) = code_and_text(output);
        assert_eq!(code, Some(1), "{i}: {text}");
        assert!(text.contains("cannot write") && text.contains("hint: raise the limit"), "{i}: {text}");
        assert!(!folder.path().join("out").exists() && !folder.path().join("out.gguf").exists());
    }
    assert_eq!(leftovers(&folder.path().join("run")), [""; 0]);
    std::fs::remove_dir_all(folder.path().join("run")).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
