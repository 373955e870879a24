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
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};

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
    let cli = Cli::parse_from(with_long_flags(std::env::args_os()));
    start_log(cli.verbose);
    let grace = match cli.command {
        // These may take longer: they finish the current step and save, or remove temporary files.
        // A second signal exits at once.
        Command::Train(_) | Command::Export(_) => None,
        _ => Some(GRACE),
    };
    let interrupt = interrupt_flag(grace);
    let result = match cli.command {
        Command::Eval(command) => command.run(&interrupt),
        Command::Compare(command) => command.run(),
        Command::Generate(arguments) => arguments.run(&interrupt),
        Command::Score(arguments) => arguments.run(),
        Command::Probe(command) => command.run(&interrupt),
        Command::Locate(command) => command.run(&interrupt),
        Command::Steer(command) => command.run(&interrupt),
        Command::Sweep(command) => command.run(&interrupt),
        Command::Export(command) => command.run(&interrupt),
        Command::Activations(command) => command.run(&interrupt),
        Command::Retrieval(command) => command.run(&interrupt),
        Command::Pairs(command) => command.run(&interrupt),
        Command::Train(command) => command.run(&interrupt),
        Command::Tokenize(command) => command.run(),
        Command::Logits(command) => command.run(&interrupt),
        Command::Bench(command) => command.run(&interrupt),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader closed the pipe, for instance `| head`.
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            match error {
                Error::Interrupted => ExitCode::from(interrupt::exit_code()),
                _ if error.is_usage() => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
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
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Fails if a logger is already set up. Keep that one.
    let _ = log.with_ansi(may_colour(&std::io::stderr())).without_time().try_init();
}

/// Whether to use colour: on terminals, unless `NO_COLOR` is set (<https://no-color.org>).
fn may_colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Whether standard output was closed when the program started.
///
/// Rust then opens `/dev/null` in its place, so writing would succeed and lose the output.
pub static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

/// Prints to standard output. Returns an error if that fails, where `print!` would panic.
fn print(text: &str) -> Result<()> {
    use std::io::Write;
    if STDOUT_WAS_CLOSED.load(Ordering::Relaxed) {
        let closed = std::io::Error::other("it is closed");
        return Err(Error::io("write", "<stdout>")(closed));
    }
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::io("write", "<stdout>"))
}

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
}
