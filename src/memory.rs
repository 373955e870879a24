//! Memory of the machine and of this process.

/// Total memory of the machine in bytes.
///
/// Not the free memory: defaults derived from it must not vary between runs.
pub fn total_bytes() -> u64 {
    match sysinfo::System::new() {
        Ok(mut system) => {
            system.refresh_memory();
            system.total_memory()
        }
        Err(error) => {
            const ASSUMED: u64 = 4 << 30;
            tracing::warn!(
                "cannot read the machine's memory size ({error}): assuming 4 GiB; set -np to override"
            );
            ASSUMED
        }
    }
}

/// Peak resident memory of this process so far, in bytes. `None` if the system does not report it.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
