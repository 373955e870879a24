//! Memory of the machine and of this process.

/// Memory that this process may use, in bytes: that of the machine, or a lower limit of its control group or `ulimit -v`.
///
/// Not the free memory: defaults derived from it must not vary between runs.
pub fn total_bytes() -> u64 {
    let of_machine = match sysinfo::System::new() {
        Ok(mut system) => {
            system.refresh_memory();
            let of_group = system.cgroup_limits().map_or(u64::MAX, |limits| limits.total_memory);
            system.total_memory().min(of_group)
        }
        Err(error) => {
            const ASSUMED: u64 = 4 << 30;
            tracing::warn!(
                "cannot read the machine's memory size ({error}): assuming 4 GiB; set -np to override"
            );
            ASSUMED
        }
    };
    of_machine.min(address_space_bytes())
}

/// The limit of `ulimit -v`.
#[cfg(unix)]
fn address_space_bytes() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the struct lives during the call, which only writes to it.
    match unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) } {
        0 => limit.rlim_cur,
        _ => u64::MAX,
    }
}

#[cfg(not(unix))]
fn address_space_bytes() -> u64 {
    u64::MAX
}

/// Peak resident memory of this process so far, in bytes. `None` if the system does not report it.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
