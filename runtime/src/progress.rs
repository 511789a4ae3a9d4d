//! How far loading is: one line per worker that updates itself on a terminal, log lines elsewhere.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use volley_actors::LoadProgress;
use volley_transports::WorkerId;

use crate::config::ByteSize;

/// A terminal is not redrawn more often.
const REDRAW: Duration = Duration::from_millis(100);
/// Elsewhere, a worker is heard of at each of these many parts of its way.
const PARTS: u64 = 4;

/// Shows the progress of all workers. Told from their threads.
#[derive(Debug)]
pub struct LoadDisplay {
    mode: Mode,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Terminal,
    Log,
}

#[derive(Debug, Default)]
struct State {
    /// Done and total bytes by worker. Ordered by role and index.
    workers: BTreeMap<WorkerId, (u64, u64)>,
    lines_drawn: usize,
    drawn: Option<Instant>,
}

impl LoadDisplay {
    /// Lines on standard error if it is a terminal, else log lines.
    pub fn new() -> Self {
        let mode = if std::io::stderr().is_terminal() {
            Mode::Terminal
        } else {
            Mode::Log
        };
        LoadDisplay {
            mode,
            started: Instant::now(),
            state: Mutex::default(),
        }
    }

    /// Takes a worker's news in.
    pub fn update(&self, progress: &LoadProgress) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (progress.done_bytes, progress.total_bytes);
        let (before, _) = state.workers.insert(progress.worker, now).unwrap_or((0, 0));
        match self.mode {
            Mode::Terminal => state.draw(),
            Mode::Log => {
                if let Some(part) = part_reached(before, now) {
                    let (worker, total) = (progress.worker, ByteSize(progress.total_bytes));
                    tracing::info!("{worker} has loaded {}% of {total}", part * 100 / PARTS);
                }
            }
        }
    }

    /// Takes the lines away again and logs the sum of them; call when all have loaded.
    pub fn finish(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.mode == Mode::Terminal && state.lines_drawn > 0 {
            let erase = format!("\x1b[{}A\x1b[J", state.lines_drawn);
            state.lines_drawn = 0;
            let _ = std::io::stderr().write_all(erase.as_bytes());
        }
        let bytes = ByteSize(state.workers.values().map(|(_, total)| total).sum());
        tracing::info!(
            "{} workers have loaded {bytes} in {:.1?}",
            state.workers.len(),
            self.started.elapsed()
        );
    }
}

impl Default for LoadDisplay {
    fn default() -> Self {
        LoadDisplay::new()
    }
}

impl State {
    fn draw(&mut self) {
        if self.drawn.is_some_and(|drawn| drawn.elapsed() < REDRAW) {
            return;
        }
        let mut text = String::new();
        if self.lines_drawn > 0 {
            text.push_str(&format!("\x1b[{}A", self.lines_drawn));
        }
        for (worker, (done, total)) in &self.workers {
            let percent = (done * 100).checked_div(*total).unwrap_or(100);
            text.push_str(&format!(
                "\x1b[2K{worker:<14} {percent:>3}% of {}\n",
                ByteSize(*total)
            ));
        }
        self.lines_drawn = self.workers.len();
        self.drawn = Some(Instant::now());
        // A terminal that is gone is no reason to stop loading.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

/// The part of the way, from 1 to [`PARTS`], that was reached since `before`.
fn part_reached(before: u64, (done, total): (u64, u64)) -> Option<u64> {
    let part = |bytes: u64| (bytes * PARTS).checked_div(total).unwrap_or(PARTS);
    let part_now = part(done);
    (part_now > 0 && (part_now > part(before) || total == 0)).then_some(part_now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_quarter_is_told_once() {
        let mut before = 0;
        let mut told = Vec::new();
        for done in (0..=100).step_by(5) {
            told.extend(part_reached(before, (done, 100)));
            before = done;
        }
        assert_eq!(told, [1, 2, 3, 4]);
        assert_eq!(part_reached(0, (100, 100)), Some(4));
    }
}
