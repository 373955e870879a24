//! The program `detox-gguf`: see `detox-gguf --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    detox_gguf::cli::main()
}
