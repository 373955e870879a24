//! The program `detox-gguf`: see `detox-gguf --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    detox_gguf::cli::main()
}

/// Looks at standard output before Rust replaces a closed one by `/dev/null`.
#[cfg(target_os = "linux")]
#[used]
// SAFETY: the section lists functions without arguments that run before `main`. This one makes one system call and
// stores a flag, and needs nothing of Rust's runtime.
#[unsafe(link_section = ".init_array")]
static LOOK_AT_STDOUT: extern "C" fn() = {
    extern "C" fn look() {
        // SAFETY: only queries the descriptor.
        if unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) } == -1 {
            detox_gguf::cli::STDOUT_WAS_CLOSED.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }
    look
};
