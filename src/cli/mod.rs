//! The command line: parses arguments, calls the library, prints. One file per command.

mod activations;
mod arguments;
mod bench;
mod compare;
mod crash;
mod eval;
mod export;
mod generate;
mod interrupt;
mod locate;
mod logits;
mod pairs;
mod print;
mod probe;
mod progress;
mod retrieval;
mod score;
mod steer;
mod steering;
mod sweep;
mod tokenize;
mod train;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};
use crate::file::output::Paths;
use crate::text::printable;

use print::{Log, may_colour, print};

use interrupt::{GRACE, interrupt_flag};

/// The parsed command line.
#[derive(Debug, Parser)]
#[command(
    name = "detox-gguf",
    version = crate::version(),
    about = "Measure and reduce the toxicity of GGUF models in 17 languages",
    after_help = "Flags shared with llama.cpp keep their names and meanings, including the short ones (-ngl -np -ub \
                  -tb -fa …)."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Print more: -v for llama.cpp's log, -vv for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure toxicity: generate continuations, score them, write a report
    Eval(Box<eval::EvalCommand>),
    /// Compare two runs, prompt by prompt
    Compare(compare::CompareCommand),
    /// Sample k continuations of each prompt and print them as JSON lines
    Generate(Box<generate::GenerateCommand>),
    /// Score texts and print the scores as JSON lines
    Score(score::ScoreCommand),
    /// Train a linear probe of toxicity on the residual stream
    Probe(Box<probe::ProbeCommand>),
    /// Find the FFN neurons that write toxicity
    Locate(Box<locate::LocateCommand>),
    /// Create, combine and bake interventions
    Steer(Box<steer::SteerCommand>),
    /// Evaluate several offsets or coefficients of an intervention, against random controls
    Sweep(Box<sweep::SweepCommand>),
    /// Merge LoRA adapters into a copy of the model
    Export(Box<export::ExportCommand>),
    /// Measure neuron activations per language, before and after a change
    Activations(Box<activations::ActivationsCommand>),
    /// Measure how similarly a model represents translations
    Retrieval(Box<retrieval::RetrievalCommand>),
    /// Create preference pairs from the model's own continuations
    Pairs(Box<pairs::PairsCommand>),
    /// Train a model to be less toxic, on preference pairs (DPO)
    Train(Box<train::TrainCommand>),
    /// Print the token ids of a text
    Tokenize(tokenize::TokenizeCommand),
    /// Print or write a model's log-probs of every next token of a text
    Logits(Box<logits::LogitsCommand>),
    /// Measure the speed of this build
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

/// Runs the program. Exits with 2 on a usage error, 1 on failure, and 128 plus the signal if interrupted.
pub fn main() -> ExitCode {
    crash::install();
    crate::gguf::hold_models();
    let arguments = with_long_flags(std::env::args_os());
    let cli = Cli::try_parse_from(&arguments).unwrap_or_else(|error| usage(error, &arguments).exit());
    start_log(cli.verbose);
    let grace = match cli.command {
        // These may take longer: they finish the current step and save, or remove temporary files.
        // A second signal exits at once.
        Command::Train(_) | Command::Export(_) => None,
        _ => Some(GRACE),
    };
    let interrupt = interrupt_flag(grace);
    match cli.command.paths().and_then(|paths| paths.check()).and_then(|()| cli.command.run(&interrupt)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print::error(&error);
            match error {
                Error::Interrupted => ExitCode::from(interrupt::exit_code()),
                _ if error.is_usage() => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

impl Command {
    /// The files that the command reads and writes, which are checked before it runs.
    fn paths(&self) -> Result<Paths> {
        match self {
            Command::Eval(command) => command.paths(),
            Command::Compare(command) => Ok(command.paths()),
            Command::Generate(command) => command.paths(),
            Command::Score(command) => Ok(command.paths()),
            Command::Probe(command) => command.paths(),
            Command::Locate(command) => command.paths(),
            Command::Steer(command) => command.paths(),
            Command::Sweep(command) => command.paths(),
            Command::Export(command) => command.paths(),
            Command::Activations(command) => command.paths(),
            Command::Retrieval(command) => command.paths(),
            Command::Pairs(command) => command.paths(),
            Command::Train(command) => Ok(command.paths()),
            Command::Tokenize(command) => Ok(command.paths()),
            Command::Logits(command) => command.paths(),
            Command::Bench(command) => command.paths(),
        }
    }

    fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        match self {
            Command::Eval(command) => command.run(interrupt),
            Command::Compare(command) => command.run(),
            Command::Generate(command) => command.run(interrupt),
            Command::Score(command) => command.run(interrupt),
            Command::Probe(command) => command.run(interrupt),
            Command::Locate(command) => command.run(interrupt),
            Command::Steer(command) => command.run(interrupt),
            Command::Sweep(command) => command.run(interrupt),
            Command::Export(command) => command.run(interrupt),
            Command::Activations(command) => command.run(interrupt),
            Command::Retrieval(command) => command.run(interrupt),
            Command::Pairs(command) => command.run(interrupt),
            Command::Train(command) => command.run(interrupt),
            Command::Tokenize(command) => command.run(),
            Command::Logits(command) => command.run(interrupt),
            Command::Bench(command) => command.run(interrupt),
        }
    }
}

/// The error with the arguments as a terminal may be shown them: a script may pass names of any file.
fn usage(error: clap::Error, arguments: &[OsString]) -> clap::Error {
    let shown = arguments.iter().map(|argument| printable(&argument.to_string_lossy()).into_owned());
    Cli::try_parse_from(shown).err().unwrap_or(error)
}

/// llama.cpp's flags with several letters after one dash. clap cannot parse these, so they are replaced first.
const SHORT_FLAGS: [(&str, &str); 7] = [
    ("-ngl", "--n-gpu-layers"),
    ("-np", "--parallel"),
    ("-ub", "--ubatch-size"),
    ("-tb", "--threads-batch"),
    ("-fa", "--flash-attn"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
];

fn with_long_flags(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut only_values = false;
    arguments
        .map(|argument| {
            only_values |= argument == "--";
            let long = SHORT_FLAGS.iter().find(|(short, _)| !only_values && argument == *short);
            long.map_or(argument, |(_, long)| OsString::from(long))
        })
        .collect()
}

/// Starts logging to standard error. By default only warnings and llama.cpp's errors are logged.
fn start_log(verbose: u8) {
    let default = match verbose {
        0 => "warn,llama.cpp=error",
        1 => "info",
        _ => "trace",
    };
    // -v on the command line overrides RUST_LOG.
    let filter = match EnvFilter::try_from_default_env() {
        Ok(filter) if verbose == 0 => filter,
        _ => EnvFilter::new(default),
    };
    let has_colour = may_colour(&std::io::stderr());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(move || Log { has_colour });
    // Fails if a logger is already set up. Keep that one.
    let _ = log.with_ansi(has_colour).without_time().try_init();
}

/// Whether standard output was closed when the program started.
///
/// Rust then opens `/dev/null` in its place, so writing would succeed and lose the output.
pub static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_of_the_command_line_is_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn short_flags_of_llama_cpp_are_replaced_before_a_double_dash() {
        let typed = ["x", "-np", "4", "-n", "p", "--", "-np"].map(OsString::from);
        let long: Vec<OsString> = with_long_flags(typed.into_iter());
        assert_eq!(long, ["x", "--parallel", "4", "-n", "p", "--", "-np"].map(OsString::from));
    }

    /// Whether an argument names files or folders.
    fn is_path(argument: &clap::Arg) -> bool {
        let names = argument.get_value_names().unwrap_or_default();
        argument.get_value_parser().type_id() == std::any::TypeId::of::<std::path::PathBuf>()
            || names.iter().any(|name| ["FILE", "DIR", "PATH"].iter().any(|word| name.contains(word)))
    }

    /// The words of an argument with the path `name`.
    fn typed(argument: &clap::Arg, name: &str) -> Vec<String> {
        let is_scaled =
            argument.get_value_names().unwrap_or_default().iter().any(|name| name.contains(":SCALE"));
        let value = if is_scaled { format!("{name}:1") } else { name.to_owned() };
        let n_values = argument.get_num_args().map_or(1, |range| range.min_values().max(1));
        let flag = argument.get_long().map(|long| format!("--{long}"));
        flag.into_iter().chain(vec![value; n_values]).collect()
    }

    /// A file name with the ending that the argument's placeholder names, as in `FILE.npy`.
    fn chosen_name(argument: &clap::Arg) -> String {
        let names = argument.get_value_names().unwrap_or_default();
        let ending = names.first().and_then(|name| name.split_once('.')).map_or("gguf", |(_, ending)| ending);
        format!("chosen.{ending}")
    }

    /// The files of the command line with `argument`, and as few other path arguments as it needs to be valid.
    fn paths_with(words: &[&str], argument: &clap::Arg, others: &[clap::Arg]) -> Option<Paths> {
        let others = others.iter().filter(|other| other.get_id() != argument.get_id());
        let (required, optional): (Vec<_>, Vec<_>) = others.partition(|other| other.is_required_set());
        let mut choices: Vec<u32> =
            (0..1 << optional.len()).filter(|bits: &u32| bits.count_ones() <= 2).collect();
        choices.sort_by_key(|bits| bits.count_ones());
        choices.into_iter().find_map(|bits| {
            let mut line: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            line.extend(typed(argument, &chosen_name(argument)));
            let chosen =
                optional.iter().enumerate().filter(|(i, _)| bits >> i & 1 == 1).map(|(_, other)| other);
            let others = required.iter().chain(chosen).enumerate();
            others.for_each(|(i, other)| line.extend(typed(other, &format!("other-{i}.gguf"))));
            Cli::try_parse_from(line).ok()?.command.paths().ok()
        })
    }

    /// Every command without subcommands, with its words.
    fn leaves<'a>(command: &'a clap::Command, words: Vec<&'a str>) -> Vec<(Vec<&'a str>, &'a clap::Command)> {
        let below = command.get_subcommands().filter(|below| below.get_name() != "help");
        let below = below.flat_map(|below| {
            let words = words.iter().copied().chain([below.get_name()]).collect();
            leaves(below, words)
        });
        let below: Vec<_> = below.collect();
        if below.is_empty() { vec![(words, command)] } else { below }
    }

    #[test]
    fn every_path_argument_of_every_command_is_checked() {
        let cli = Cli::command();
        let mut n_checked = 0;
        for (words, command) in leaves(&cli, vec!["detox-gguf"]) {
            let arguments: Vec<clap::Arg> = command.get_arguments().filter(|a| is_path(a)).cloned().collect();
            for argument in &arguments {
                let place = format!("{} {}", words.join(" "), argument.get_id());
                let paths = paths_with(&words, argument, &arguments);
                let paths = paths.unwrap_or_else(|| panic!("{place}: no valid command line found"));
                let chosen = chosen_name(argument);
                let chosen = std::path::Path::new(&chosen);
                match argument.get_id().as_str() {
                    "output" => assert!(paths.has_output(chosen), "{place} is not declared as an output"),
                    _ => assert!(paths.has_input(chosen), "{place} is not declared as an input"),
                }
                n_checked += 1;
            }
        }
        assert!(n_checked > 80, "found only {n_checked} path arguments");
    }
}
