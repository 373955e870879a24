//! Shows progress on standard error: a bar on a terminal, single lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::progress::Progress;
use crate::text::printable::{printable, printable_lines};

use super::print;

/// Shows the progress of a run on standard error.
pub struct Shown {
    is_terminal: bool,
    bar: Option<ProgressBar>,
    phase: String,
    total: u64,
    done: u64,
    /// Items already done when the phase started, in a resumed run.
    found: u64,
    started: Instant,
    last_line: Instant,
    /// The last note; empty if there is none.
    note: String,
}

/// The template of the bar.
const BAR: &str = "{msg:<14} {bar:24} {pos}/{len} {elapsed} of about {duration}";

/// Time between two lines if standard error is not a terminal.
const LINE_EVERY: Duration = Duration::from_secs(30);

impl Shown {
    /// Shows nothing until a phase starts.
    pub fn new() -> Shown {
        let now = Instant::now();
        Shown {
            is_terminal: std::io::stderr().is_terminal(),
            bar: None,
            phase: String::new(),
            total: 0,
            done: 0,
            found: 0,
            started: now,
            last_line: now,
            note: String::new(),
        }
    }

    /// The estimated time left, as text; empty if there is no estimate yet.
    fn time_left(&self) -> String {
        let done = self.done.saturating_sub(self.found);
        if done == 0 || self.total <= self.done {
            return String::new();
        }
        let seconds = self.started.elapsed().as_secs_f64() / done as f64 * (self.total - self.done) as f64;
        format!(", about {} left", HumanDuration(Duration::from_secs_f64(seconds)))
    }

    fn rate(&self) -> String {
        let per_second = (self.done - self.found) as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
        if per_second >= 10.0 { format!("{per_second:.0}/s") } else { format!("{per_second:.2}/s") }
    }
}

impl Progress for Shown {
    fn start(&mut self, phase: &str, total: u64, done: u64) {
        self.phase = phase.to_owned();
        (self.total, self.done, self.found) = (total, done, done);
        self.started = Instant::now();
        self.last_line = self.started;
        if self.is_terminal {
            let bar = ProgressBar::new(total).with_position(done).with_message(printable(phase).into_owned());
            // Falls back to the default look if the template is invalid.
            bar.set_style(ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.reset_eta();
            self.bar = Some(bar);
        } else if total > done {
            print::note(&format!("{phase}: {done} of {total}"));
        }
    }

    fn advance(&mut self, n: u64) {
        self.done += n;
        match &self.bar {
            Some(bar) => bar.inc(n),
            None if self.last_line.elapsed() >= LINE_EVERY => {
                self.last_line = Instant::now();
                print::note(&format!(
                    "{}: {} of {}, {}{}",
                    self.phase,
                    self.done,
                    self.total,
                    self.rate(),
                    self.time_left()
                ));
                self.note.lines().for_each(|line| print::note(&format!("  {line}")));
            }
            None => {}
        }
    }

    fn note(&mut self, text: &str) {
        if let Some(bar) = &self.bar {
            if self.note.is_empty() {
                let template = format!("{BAR}\n{{prefix}}");
                bar.set_style(
                    ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()),
                );
            }
            bar.set_prefix(printable_lines(text).into_owned());
        }
        text.clone_into(&mut self.note);
    }

    fn finish(&mut self) {
        self.note.clear();
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if self.done > self.found {
            let seconds = self.started.elapsed().as_secs_f64();
            print::note(&format!(
                "{}: {} in {seconds:.1} s, {}",
                self.phase,
                self.done - self.found,
                self.rate()
            ));
        }
    }

    fn say(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(printable(text)),
            None => print::note(text),
        }
    }
}
