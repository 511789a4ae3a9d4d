//! Steps composed to a time (MegaScale-Infer, section 8: attention workers' batches are balanced by time, since equal numbers of sequences of unlike length take unlike times).
//!
//! A step's *effort* on a worker is what attention reads and computes there: each row counts [`ROW_TOKENS`], and each token of context that a row looks at counts one. What a unit of effort takes is
//! learnt from the steps that end, and so is what a step takes in which there is next to nothing to do.
//!
//! A worker takes a new sequence only while the decoding steps that follow stay within the target by that estimate and at the present length of contexts, and a prompt is cut into chunks that fill up the step to the target.
//! Sequences that decode are never left out of a step. A worker that has nothing takes a sequence in any case, so that a target that is too ambitious costs throughput and stops nobody.

use std::time::Duration;

use super::{SequenceView, View};
use crate::protocol::StepDone;

/// Tokens of context that cost about as much as one more row. Only a start: the estimate is corrected by what steps take.
const ROW_TOKENS: u64 = 64;
/// Of each new observation in the estimate.
const LEARN: f64 = 0.05;

/// See the module.
#[derive(Debug, Clone)]
pub struct Pace {
    target: Duration,
    /// Seconds of a step by effort: `base + slope * effort`, from running means of what was seen.
    seen: Option<Means>,
}

#[derive(Debug, Clone, Copy)]
struct Means {
    effort: f64,
    seconds: f64,
    effort_squared: f64,
    product: f64,
}

impl Pace {
    /// Aims at steps of this time.
    pub fn new(target: Duration) -> Self {
        Pace { target, seen: None }
    }

    /// The effort of `tokens` rows behind `computed` tokens of context.
    pub fn effort(computed: u32, tokens: u32) -> u64 {
        let (computed, tokens) = (u64::from(computed), u64::from(tokens));
        tokens * (ROW_TOKENS + computed) + tokens * tokens.saturating_sub(1) / 2
    }

    /// Learns from the end of a step, before the books have entered it.
    pub(super) fn observe(&mut self, done: &StepDone, view: &View) {
        let mut by_worker = vec![0u64; view.workers().len()];
        for (work, start) in view.oldest_step(done.micro_batch) {
            if let Some(effort) = by_worker.get_mut(usize::from(work.worker)) {
                *effort += Self::effort(start, work.tokens);
            }
        }
        let effort = by_worker.into_iter().max().unwrap_or(0) as f64;
        let seconds = done.timing.total.as_secs_f64();
        if effort == 0.0 || seconds <= 0.0 {
            return;
        }
        self.learn(effort, seconds);
    }

    fn learn(&mut self, effort: f64, seconds: f64) {
        let now = Means {
            effort,
            seconds,
            effort_squared: effort * effort,
            product: effort * seconds,
        };
        let seen = self.seen.get_or_insert(now);
        for (mean, value) in [
            (&mut seen.effort, now.effort),
            (&mut seen.seconds, now.seconds),
            (&mut seen.effort_squared, now.effort_squared),
            (&mut seen.product, now.product),
        ] {
            *mean += LEARN * (value - *mean);
        }
    }

    /// The effort that fits the target; `None` while nothing is known.
    fn budget(&self) -> Option<u64> {
        let seen = self.seen?;
        let variance = seen.effort_squared - seen.effort * seen.effort;
        // With efforts that hardly differ only their ratio is known.
        let ratio = seen.seconds / seen.effort;
        let slope = if variance > 0.01 * seen.effort_squared {
            ((seen.product - seen.effort * seen.seconds) / variance).clamp(0.01 * ratio, ratio)
        } else {
            ratio
        };
        let base = (seen.seconds - slope * seen.effort).max(0.0);
        Some(((self.target.as_secs_f64() - base) / slope).max(0.0) as u64)
    }

    /// How many of `tokens` rows behind `computed` tokens of context still fit a step of so much effort; at least one if there is nothing else in it.
    pub(super) fn chunk(&self, effort: u64, computed: u32, tokens: u32) -> u32 {
        let Some(budget) = self.budget() else {
            return tokens;
        };
        let fits = |tokens: u32| effort + Self::effort(computed, tokens) <= budget;
        if fits(tokens) {
            return tokens;
        }
        // The largest that fits: effort grows with the rows.
        let (mut low, mut high) = (0, tokens);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if fits(middle) {
                low = middle
            } else {
                high = middle
            }
        }
        let least = u32::from(effort == 0).min(tokens);
        low.max(least)
    }

    /// Whether a worker's decoding steps stay within the target with this sequence among them.
    pub(super) fn takes(&self, view: &View, worker: usize, sequence: &SequenceView) -> bool {
        let Some(budget) = self.budget() else {
            return true;
        };
        let sequences = &view.workers()[worker].sequences;
        if sequences.is_empty() {
            return true;
        }
        let running = sequences.iter().filter_map(|&id| view.sequence(id));
        let efforts: u64 = running
            .chain([sequence])
            .map(|sequence| Self::effort(sequence.length, 1))
            .sum();
        // They are spread over the micro-batches, and a step is one micro-batch's.
        efforts / u64::from(view.micro_batches().max(1)) <= budget
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learnt(target_ms: u64, base_ms: f64, ms_per_kilo: f64) -> Pace {
        let mut pace = Pace::new(Duration::from_millis(target_ms));
        for round in 0..500u32 {
            let effort = f64::from(1000 * (1 + round % 10));
            let seconds = (base_ms + ms_per_kilo * effort / 1000.0) / 1000.0;
            pace.learn(effort, seconds);
        }
        pace
    }

    #[test]
    fn the_line_through_what_was_seen_gives_the_budget() {
        // 2 ms and 1 ms for each thousand: 8 ms hold 6,000.
        let budget = learnt(8, 2.0, 1.0).budget().unwrap();
        assert!((5_990..=6_010).contains(&budget), "{budget}");
        assert_eq!(learnt(1, 2.0, 1.0).budget(), Some(0));
    }

    #[test]
    fn a_chunk_is_the_largest_that_fits_and_an_empty_step_always_goes_on() {
        let pace = learnt(8, 2.0, 1.0);
        let budget = pace.budget().unwrap();
        for (effort, computed) in [(0, 0), (0, 900), (3000, 10), (5000, 400)] {
            let tokens = pace.chunk(effort, computed, 4096);
            if tokens > 1 {
                assert!(effort + Pace::effort(computed, tokens) <= budget);
            }
            assert!(effort + Pace::effort(computed, tokens + 1) > budget);
            assert!(tokens > 0 || effort > 0);
        }
        assert_eq!(learnt(1, 2.0, 1.0).chunk(0, 0, 100), 1);
        assert_eq!(learnt(1, 2.0, 1.0).chunk(70, 0, 100), 0);
    }
}
