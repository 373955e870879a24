//! Memory: how much the machine has, and how much this process took.

/// Bytes of memory in the machine, and not of what is free, so that the same command chooses the same.
pub fn total_bytes() -> u64 {
    match sysinfo::System::new() {
        Ok(mut system) => {
            system.refresh_memory();
            system.total_memory()
        }
        Err(error) => {
            const ASSUMED: u64 = 4 << 30;
            tracing::warn!(
                "cannot tell the machine's memory ({error}): assuming 4 GiB; set -np to choose for yourself"
            );
            ASSUMED
        }
    }
}

/// The most resident memory that this process had so far, in bytes; `None` where the system does not tell.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
