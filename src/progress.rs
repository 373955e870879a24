//! How long work tells of itself, without knowing who listens.

/// Told how a run goes on.
pub trait Progress {
    /// A phase begins: `done` of `total` are there already.
    fn start(&mut self, phase: &str, total: u64, done: u64);
    /// Some more are done.
    fn advance(&mut self, n: u64);
    /// The phase has ended.
    fn finish(&mut self);
    /// Something worth a line.
    fn say(&mut self, text: &str);
}
