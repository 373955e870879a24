//! Memory: how much there is, and how much was taken.

/// Bytes of memory in the machine.
pub fn total_bytes() -> u64 {
    crate::engine::total_memory()
}

/// The most resident memory that this process had so far, in bytes; `None` where the system does not tell.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
