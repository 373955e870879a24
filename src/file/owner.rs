//! The process that owns a temporary file, recorded in the file's name.
//!
//! A process id alone is not enough: ids are reused, containers have their own, and a folder can be shared between
//! machines. So the name also has a hash of the host's name, a hash of the boot, the process-id namespace and the
//! time at which the process started.

use std::sync::OnceLock;

use sha2::{Digest, Sha256};

/// A process, identified across reboots, containers and machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owner {
    /// Hash of the host's name.
    host: String,
    /// Hash of the boot's id; of nothing where the system has none.
    boot: String,
    /// The process-id namespace; 0 where the system has none.
    namespace: u64,
    pid: u32,
    /// When the process started, in ticks since boot; 0 where the system does not tell.
    start: u64,
}

/// What is known of an owner without looking at locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// A process of this machine that runs.
    Running,
    /// A process of this machine that has ended.
    Ended,
    /// Perhaps a process of this machine: of another container, or of an earlier boot.
    Near,
    /// A process of another machine.
    Far,
}

impl Owner {
    /// This process.
    pub(super) fn this() -> &'static Owner {
        static THIS: OnceLock<Owner> = OnceLock::new();
        THIS.get_or_init(|| {
            let pid = std::process::id();
            Owner {
                host: short_hash(host_name().as_bytes()),
                boot: short_hash(&std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default()),
                namespace: pid_namespace(),
                pid,
                start: start_of(pid).unwrap_or(0),
            }
        })
    }

    /// As part of a file's name.
    pub(super) fn to_name(&self) -> String {
        let Owner { host, boot, namespace, pid, start } = self;
        format!("{host}-{boot}-{namespace}-{pid}-{start}")
    }

    /// Reads [`Owner::to_name`]; `None` for the name of something else.
    pub(super) fn from_name(name: &str) -> Option<Owner> {
        let parts: Vec<&str> = name.split('-').collect();
        let [host, boot, namespace, pid, start] = parts.as_slice() else { return None };
        Some(Owner {
            host: (*host).to_owned(),
            boot: (*boot).to_owned(),
            namespace: namespace.parse().ok()?,
            pid: pid.parse().ok()?,
            start: start.parse().ok()?,
        })
    }

    /// Whether the process runs, as far as this machine can tell.
    pub(super) fn life(&self) -> Life {
        let this = Owner::this();
        let same_boot = self.boot == this.boot && self.boot != short_hash(b"");
        match (self.host == this.host, same_boot, self.namespace == this.namespace) {
            (_, true, true) if !cfg!(unix) => Life::Near,
            (_, true, true) if self.runs() => Life::Running,
            (_, true, true) => Life::Ended,
            (_, true, false) | (true, false, _) => Life::Near,
            (false, false, _) => Life::Far,
        }
    }

    /// Whether a process of this machine and namespace runs and is this one, not a later one with the same id.
    fn runs(&self) -> bool {
        exists(self.pid) && start_of(self.pid).is_none_or(|start| start == self.start)
    }
}

/// The first 8 hex digits of a SHA-256.
fn short_hash(bytes: &[u8]) -> String {
    super::hex(&Sha256::digest(bytes)[..4])
}

/// The name of this machine.
pub(super) fn host_name() -> String {
    #[cfg(unix)]
    return rustix::system::uname().nodename().to_string_lossy().into_owned();
    #[cfg(not(unix))]
    return std::env::var("COMPUTERNAME").unwrap_or_default();
}

/// The namespace of process ids, from a link such as `pid:[4026531836]`.
fn pid_namespace() -> u64 {
    let link = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let digits: String = link.to_string_lossy().chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

/// When a process started, in ticks since boot: field 22 of `/proc/PID/stat`.
fn start_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may contain spaces and parentheses.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Whether a process has this id.
#[cfg(unix)]
fn exists(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

#[cfg(not(unix))]
fn exists(_: u32) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_owner() {
        let this = Owner::this();
        assert_eq!(Owner::from_name(&this.to_name()).as_ref(), Some(this));
        for name in ["", "x", "a-b-1-2", "a-b-1-2-x", "a-b-1-2-3-4"] {
            assert_eq!(Owner::from_name(name), None, "{name}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn knows_running_ended_and_unknown_processes() {
        let this = Owner::this().clone();
        assert_eq!(this.life(), Life::Running);
        let ended = Owner { pid: i32::MAX as u32, ..this.clone() };
        assert_eq!(ended.life(), Life::Ended);
        let reused = Owner { start: this.start + 1, ..this.clone() };
        assert_eq!(reused.life(), Life::Ended, "another process has its id now");
        let container = Owner { host: "container".into(), namespace: 1, ..this.clone() };
        assert_eq!(container.life(), Life::Near);
        let rebooted = Owner { boot: "before".into(), ..this.clone() };
        assert_eq!(rebooted.life(), Life::Near);
        let elsewhere = Owner { host: "elsewhere".into(), boot: "other".into(), ..this };
        assert_eq!(elsewhere.life(), Life::Far);
    }
}
