//! The names of all flags: none may be lost.

use std::collections::{BTreeMap, BTreeSet};

use super::golden::assert_golden;
use super::{golden, read};
use crate::detox;

/// Flags that are accepted but that the help no longer needs to show.
const MAY_BE_HIDDEN: [(&str, &str); 1] = [("eval", "--compare")];

/// Flags that the help shows under another name or not at all: aliases, and llama.cpp's flags of several letters
/// behind one dash. Each with its commands.
const HIDDEN: [(&str, &[&str]); 9] = [
    ("--gpu-layers", &["eval", "generate", "probe", "sweep", "export", "bench generate"]),
    ("--predict", &["eval", "generate", "sweep", "pairs"]),
    ("-ngl", &["eval", "generate", "probe", "sweep", "export", "bench generate"]),
    ("-np", &["eval", "generate", "sweep", "pairs"]),
    ("-ub", &["eval", "generate", "train"]),
    ("-tb", &["eval", "generate"]),
    ("-fa", &["eval", "generate"]),
    ("-ctk", &["eval", "generate"]),
    ("-ctv", &["eval", "generate"]),
];

fn help(command: &str) -> String {
    let mut program = detox();
    let output =
        program.args(command.split_whitespace()).arg("--help").assert().success().get_output().clone();
    String::from_utf8(output.stdout).unwrap()
}

/// Commands below `command`, by the list in its help.
fn commands_of(help: &str) -> Vec<&str> {
    let after = help.split_once("\nCommands:\n").map_or("", |(_, after)| after);
    let names = after.lines().take_while(|line| !line.is_empty());
    // A description that continues on the next line is indented further.
    let names = names.filter_map(|line| line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')));
    names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").collect()
}

/// Flags that a help lists, short and long.
fn flags_of(help: &str) -> BTreeSet<&str> {
    let mut flags = BTreeSet::new();
    for line in help.lines() {
        let indent = line.len() - line.trim_start().len();
        if (indent == 2 && line.trim_start().starts_with('-'))
            || (indent == 6 && line.trim_start().starts_with("--"))
        {
            let names = line.split_whitespace().take_while(|word| word.starts_with('-'));
            flags.extend(names.map(|name| name.trim_end_matches([',', '.'])));
        }
    }
    flags
}

/// All commands with their flags; the program itself as "".
fn all_flags() -> BTreeMap<String, BTreeSet<String>> {
    let mut found = BTreeMap::new();
    let mut left = vec![String::new()];
    while let Some(command) = left.pop() {
        let help = help(&command);
        left.extend(commands_of(&help).iter().map(|name| format!("{command} {name}").trim().to_owned()));
        found.insert(command, flags_of(&help).into_iter().map(str::to_owned).collect());
    }
    found
}

#[test]
fn no_command_and_no_flag_is_lost() {
    let mut found = all_flags();
    for (command, flag) in MAY_BE_HIDDEN {
        found.get_mut(command).unwrap().remove(flag);
    }
    if std::env::var("DETOX_GGUF_BLESS").is_ok_and(|bless| bless == "1") {
        let line = |(command, flags): (&String, &BTreeSet<String>)| {
            format!("detox-gguf {command}: {}\n", flags.iter().cloned().collect::<Vec<_>>().join(" "))
        };
        assert_golden("flags.txt", &found.iter().map(line).collect::<String>());
    }
    let frozen = read(&golden::folder().join("flags.txt"));
    assert!(frozen.lines().count() >= 18, "{frozen}");
    for line in frozen.lines() {
        let (command, flags) = line.strip_prefix("detox-gguf ").unwrap().split_once(": ").unwrap();
        let now = found.get(command).unwrap_or_else(|| panic!("command {command:?} is gone"));
        let lost: Vec<&str> = flags.split(' ').filter(|flag| !now.contains(*flag)).collect();
        assert!(lost.is_empty(), "{command}: {lost:?} are gone");
    }
}

/// Whether the parser takes `flag`: it reads up to `--help`, and stops at the first flag that it does not know.
fn is_accepted(command: &str, flag: &[&str]) -> bool {
    detox().args(command.split_whitespace()).args(flag).arg("--help").output().unwrap().status.success()
}

#[test]
fn flags_outside_the_help_are_accepted() {
    for (flag, commands) in HIDDEN {
        let value = match flag {
            "-fa" => "auto",
            "-ctk" | "-ctv" => "f16",
            _ => "1",
        };
        for command in commands {
            assert!(is_accepted(command, &[flag, value]), "{command} {flag}");
        }
    }
    assert!(is_accepted("eval", &["--compare", "a", "b"]));
    assert!(!is_accepted("eval", &["--no-such-flag", "1"]));
}
