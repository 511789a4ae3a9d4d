//! A decode step of a cluster whose workers share one machine's cores, foretold from the machine's profile.
//!
//! Two ways in which cores share work were measured. *Together*: one operation, cut into pieces that all cores take. *Apart*: each core computes an operation of
//! its own, beside the others. Where one worker is busy alone its operations go together; where as many are busy as there are cores, apart; in between,
//! in proportion. Either way all cores are at work, so what all workers compute adds up.

use serde::Serialize;

use crate::cost::{Curve, workers_visited};
use crate::{ModelShape, Profile, Stages};

/// A cluster on the profiled machine.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Local {
    /// Attention workers (M).
    pub attention_workers: usize,
    /// Expert workers (N).
    pub expert_workers: usize,
    /// Micro-batches (m).
    pub micro_batches: usize,
    /// Sequences that decode at once.
    pub batch: usize,
    /// Mean tokens in the cache of each.
    pub context: f64,
}

impl Local {
    /// The time of its decode step on the machine of `profile`, in seconds.
    pub fn step_s(&self, profile: &Profile, model: &ModelShape) -> f64 {
        // A micro-batch or a worker without sequences computes nothing.
        let workers = self.attention_workers.min(self.batch).max(1);
        let m = self.micro_batches.min(self.batch / workers).max(1);
        let rows = self.batch as f64 / (m * workers) as f64;
        let machine = Machine { profile };
        // With one micro-batch a side computes while the other waits; with more, both compute at once.
        let beside = if m == 1 { 0 } else { 1 };
        let attention_s = machine.cached_s(rows * self.context)
            + machine.share_s(
                &profile.attention,
                &profile.apart.attention,
                rows,
                workers + beside,
            );
        let experts = self.expert_workers + beside;
        let expert = |rows| machine.share_s(&profile.expert, &profile.apart.expert, rows, experts);
        let visits = profile
            .popularity
            .iter()
            .map(|share| share * (rows * workers as f64) * model.top_k as f64);
        // How many rows an expert gets varies; it is visited at all with this chance, if visits are independent.
        let expert_s = visits.map(|rows| {
            let chance = 1.0 - (-rows).exp();
            if chance > 0.0 {
                chance * expert(rows / chance)
            } else {
                0.0
            }
        });
        let held = model.experts.div_ceil(self.expert_workers);
        let crowded = workers + self.expert_workers > profile.threads;
        let hop_s = |copies: f64| machine.hop_s(rows * copies * profile.row_bytes, crowded);
        let stages = Stages {
            attention_s: workers as f64 * attention_s,
            dispatch_s: hop_s(workers_visited(model.experts, model.top_k, held)),
            expert_s: expert_s.sum(),
            combine_s: hop_s(model.top_k as f64),
        };
        let head_s = machine.share_s(&profile.step, &profile.apart.step, rows, workers + beside);
        stages.shared_total_s(m, model.moe_layers) + (m * workers) as f64 * head_s + profile.turn_s
    }
}

/// What a profile says of its machine's cores.
struct Machine<'a> {
    profile: &'a Profile,
}

impl Machine<'_> {
    /// An operation's share of the machine's time where `busy` workers compute.
    fn share_s(&self, together: &Curve, apart: &Curve, rows: f64, busy: usize) -> f64 {
        let threads = self.profile.threads;
        let together_s = together.at(rows);
        if threads <= 1 {
            return together_s;
        }
        let alone = (busy.clamp(1, threads) - 1) as f64 / (threads - 1) as f64;
        (1.0 - alone) * together_s + alone * apart.at(rows) / threads as f64
    }

    fn cached_s(&self, cached: f64) -> f64 {
        self.profile.per_cached_s * cached
    }

    fn hop_s(&self, bytes: f64, crowded: bool) -> f64 {
        let line = if crowded {
            self.profile.crowded_link
        } else {
            self.profile.fits.link
        };
        line.intercept + line.slope * bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::tests::profile;

    fn step_s(
        attention_workers: usize,
        expert_workers: usize,
        micro_batches: usize,
        batch: usize,
    ) -> f64 {
        let local = Local {
            attention_workers,
            expert_workers,
            micro_batches,
            batch,
            context: 0.0,
        };
        local.step_s(&profile(), &ModelShape::preset("mixtral-8x7b").unwrap())
    }

    #[test]
    fn workers_that_share_cores_add_their_work() {
        // Experts read their weights for each micro-batch again.
        assert!(step_s(1, 1, 2, 32) > step_s(1, 1, 1, 32));
        // More micro-batches or workers than sequences are as good as not there.
        assert_eq!(step_s(1, 1, 4, 1), step_s(1, 1, 1, 1));
        // Two workers of two cores compute apart: here that costs more than together.
        assert!(step_s(1, 2, 1, 32) < step_s(1, 1, 1, 32) + 32.0 * 2.0 * 5e-5);
    }

    #[test]
    fn one_worker_computes_together_and_as_many_as_cores_apart() {
        let profile = profile();
        let machine = Machine { profile: &profile };
        let share = |busy| machine.share_s(&profile.attention, &profile.apart.attention, 1.0, busy);
        assert_eq!([share(1), share(2), share(3)], [1e-3, 0.75e-3, 0.75e-3]);
        assert!(machine.hop_s(0.0, true) > machine.hop_s(0.0, false));
    }
}
