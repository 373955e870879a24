//! Ctrl-C, SIGTERM and SIGHUP: the work stops cleanly, and the program exits with 128 plus the signal's number.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use crate::error::Error;
use crate::file;

use super::print::{self, note};

/// How long work may take to stop cleanly after a signal.
pub const GRACE: Duration = Duration::from_secs(2);

const SIGINT: i32 = 2;

/// The first signal that came; 0 before.
static FIRST: AtomicI32 = AtomicI32::new(0);

/// Exit code after an interruption: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
pub fn exit_code() -> u8 {
    match FIRST.load(Ordering::SeqCst) {
        0 => 128 + SIGINT as u8,
        signal => 128 + signal as u8,
    }
}

/// Returns a flag that a signal sets, so that running work can stop cleanly.
///
/// The process exits after `grace` if that is set, or on a second signal.
pub fn interrupt_flag(grace: Option<Duration>) -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    let mut signals = Signals::default();
    let listening = platform::listen(move |signal| match signals.next(signal) {
        Action::Ignore => {}
        Action::Exit => exit(),
        Action::Stop => {
            FIRST.store(signal, Ordering::SeqCst);
            seen.store(true, Ordering::SeqCst);
            let Some(grace) = grace else {
                let again = if signal == SIGINT { "press Ctrl-C again" } else { "send SIGTERM again" };
                note(&format!("interrupted: finishing the current step ({again} to exit now)"));
                return;
            };
            std::thread::spawn(move || {
                std::thread::sleep(grace);
                print::error(&Error::Interrupted);
                exit();
            });
        }
    });
    if let Err(error) = listening {
        tracing::warn!("cannot handle Ctrl-C, which will exit without cleaning up: {error}");
    }
    flag
}

/// Exits at once. Temporary files and locks are removed, since nothing unwinds.
fn exit() -> ! {
    file::clean_up_before_exit();
    std::process::exit(exit_code().into())
}

/// The reaction to a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Stop,
    Exit,
    Ignore,
}

/// The signals so far.
#[derive(Debug, Default)]
struct Signals {
    first_at: Option<std::time::Instant>,
}

impl Signals {
    /// One event can send a signal twice: `timeout` signals its child and then the group that the child is in. Only a
    /// later signal asks to exit at once.
    const SAME_EVENT: Duration = Duration::from_millis(200);

    fn next(&mut self, signal: i32) -> Action {
        match self.first_at {
            None => {
                self.first_at = Some(std::time::Instant::now());
                Action::Stop
            }
            // A terminal that closes sends several SIGHUPs, and systemd sends one after SIGTERM.
            Some(_) if signal == platform::SIGHUP => Action::Ignore,
            Some(at) if at.elapsed() < Signals::SAME_EVENT => Action::Ignore,
            Some(_) => Action::Exit,
        }
    }
}

#[cfg(unix)]
mod platform {
    use std::io;

    use signal_hook::consts::{SIGINT, SIGTERM};

    pub use signal_hook::consts::SIGHUP;

    /// Calls `on_signal` in a thread for every SIGINT, SIGTERM and SIGHUP.
    ///
    /// SIGTERM and SIGHUP stay ignored if they were when the program started, as `nohup` makes them.
    pub fn listen(mut on_signal: impl FnMut(i32) + Send + 'static) -> io::Result<()> {
        // A write beyond the limit of `ulimit -f` then fails with an error, and not by this signal.
        // SAFETY: ignoring a signal runs no code of ours, and no other thread changes signals here.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let mut signals = vec![SIGINT];
        signals.extend([SIGTERM, SIGHUP].into_iter().filter(|&signal| !is_ignored(signal)));
        let mut signals = signal_hook::iterator::Signals::new(signals)?;
        let terminals = terminals();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                if signal == SIGHUP {
                    leave_closed(&terminals);
                }
                on_signal(signal);
            }
        })?;
        Ok(())
    }

    /// Whether a signal is ignored now.
    fn is_ignored(signal: i32) -> bool {
        // SAFETY: with a null action, `sigaction` only writes the current action, into a struct of its own type that
        // lives until it returns; all-zero bytes are a valid value of that struct.
        let action = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            match libc::sigaction(signal, std::ptr::null(), &mut action) {
                0 => action,
                _ => return false,
            }
        };
        action.sa_sigaction == libc::SIG_IGN
    }

    /// Whether standard output and standard error are terminals.
    fn terminals() -> [bool; 2] {
        use std::io::IsTerminal;
        [io::stdout().is_terminal(), io::stderr().is_terminal()]
    }

    /// Sends output for a terminal that has closed to /dev/null. Printing would otherwise fail or panic, and the work
    /// could not be saved.
    fn leave_closed(before: &[bool; 2]) {
        let now = terminals();
        let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") else { return };
        if before[0] && !now[0] {
            let _ = rustix::stdio::dup2_stdout(&null);
        }
        if before[1] && !now[1] {
            let _ = rustix::stdio::dup2_stderr(&null);
        }
    }
}

#[cfg(not(unix))]
mod platform {
    /// Never sent here.
    pub const SIGHUP: i32 = 1;

    /// Calls `on_signal` for every Ctrl-C.
    pub fn listen(mut on_signal: impl FnMut(i32) + Send + 'static) -> Result<(), ctrlc::Error> {
        ctrlc::set_handler(move || on_signal(super::SIGINT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_signal_exits_but_not_a_repeated_one() {
        let mut signals = Signals::default();
        assert_eq!(signals.next(15), Action::Stop);
        assert_eq!(signals.next(15), Action::Ignore, "the same event");
        std::thread::sleep(Signals::SAME_EVENT);
        assert_eq!(signals.next(platform::SIGHUP), Action::Ignore);
        assert_eq!(signals.next(SIGINT), Action::Exit);
    }
}
