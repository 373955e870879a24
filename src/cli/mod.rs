//! The program's door: what was typed, checked and turned into calls. One file of arguments a command.

mod activations;
mod arguments;
mod bench;
mod compare;
mod eval;
mod export;
mod generate;
mod locate;
mod pairs;
mod probe;
mod progress;
mod retrieval;
mod score;
mod steer;
mod steering;
mod sweep;
mod train;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};

/// What to do, as typed.
#[derive(Debug, Parser)]
#[command(
    name = "detox-gguf",
    version = crate::version(),
    about = "Measure how toxic a GGUF model's continuations are, in 17 languages, and steer it",
    after_help = "llama.cpp's flags keep their names and meanings, the short ones (-ngl -np -ub -tb -fa …) included."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Say more: llama.cpp's log; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate, score and report: how toxic are this model's continuations?
    Eval(Box<eval::EvalCommand>),
    /// Compare two runs, prompt by prompt
    Compare(compare::CompareCommand),
    /// Sample k continuations of each prompt, as JSON lines
    Generate(Box<generate::GenerateCommand>),
    /// Score texts, as JSON lines
    Score(score::ScoreCommand),
    /// Train a linear probe of toxicity on the residual stream
    Probe(Box<probe::ProbeCommand>),
    /// Find the FFN neurons that write toxicity
    Locate(Box<locate::LocateCommand>),
    /// Make, combine and bake interventions
    Steer(Box<steer::SteerCommand>),
    /// Evaluate an intervention at several settings, against random neurons or directions
    Sweep(Box<sweep::SweepCommand>),
    /// Write a copy of the model with LoRA adapters inside
    Export(Box<export::ExportCommand>),
    /// Measure how active neurons are, language by language, before and after a change
    Activations(Box<activations::ActivationsCommand>),
    /// Measure how alike a model represents translations
    Retrieval(Box<retrieval::RetrievalCommand>),
    /// Make preference pairs from the model's own continuations
    Pairs(Box<pairs::PairsCommand>),
    /// Train a model away from toxicity on preference pairs (DPO)
    Train(Box<train::TrainCommand>),
    /// Measure the speed of this build
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

/// Runs the program: parses, logs, calls, prints. Exit code 2 for usage, 1 for failure, 130 when interrupted.
pub fn main() -> ExitCode {
    let cli = Cli::parse_from(with_long_flags(std::env::args_os()));
    start_log(cli.verbose);
    let grace = match cli.command {
        // They end a step and save, or remove what is unfinished, however long that takes; a second Ctrl-C ends
        // them at once.
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
        Command::Bench(command) => command.run(&interrupt),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of a pipe has what it wanted, as in `| head`.
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            match error {
                Error::Interrupted => ExitCode::from(130),
                _ if error.is_usage() => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// llama.cpp's flags of several letters behind one dash, which no parser of ours knows.
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

/// Talk goes to standard error; llama.cpp is quiet but for its errors, unless asked.
fn start_log(verbose: u8) {
    let default = match verbose {
        0 => "warn,llama.cpp=error",
        1 => "info",
        _ => "trace",
    };
    // -v is typed now, RUST_LOG was set some time ago.
    let filter = match EnvFilter::try_from_default_env() {
        Ok(filter) if verbose == 0 => filter,
        _ => EnvFilter::new(default),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A host program may have set one up already; then that one stays.
    let _ = log.with_ansi(may_colour(&std::io::stderr())).without_time().try_init();
}

/// Colour where a person looks, unless they said no (<https://no-color.org>).
fn may_colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Time for the work in hand to end cleanly after Ctrl-C.
const GRACE: Duration = Duration::from_secs(2);

/// Set by Ctrl-C. What looks at it ends cleanly; the rest is ended after `grace`, or by another Ctrl-C.
fn interrupt_flag(grace: Option<Duration>) -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    let handler = ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        let Some(grace) = grace else {
            eprintln!("interrupted: ending the step in hand (again: at once)");
            return;
        };
        std::thread::spawn(move || {
            std::thread::sleep(grace);
            eprintln!("error: {}", Error::Interrupted);
            std::process::exit(130);
        });
    });
    if let Err(error) = handler {
        tracing::warn!("Ctrl-C will end the program at once: {error}");
    }
    flag
}

/// Writes to standard output, as an error and not a panic where it cannot.
fn print(text: &str) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::io("write", "<stdout>"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn short_flags_of_llama_cpp_are_understood_where_they_are_flags() {
        let typed = ["x", "-np", "4", "-n", "p", "--", "-np"].map(OsString::from);
        let long: Vec<OsString> = with_long_flags(typed.into_iter());
        assert_eq!(long, ["x", "--parallel", "4", "-n", "p", "--", "-np"].map(OsString::from));
    }
}
