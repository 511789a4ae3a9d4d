//! The data plane by rounds: one event for each layer of each micro-batch, over all workers at once.
//!
//! A round takes the rows of a micro-batch through one layer: every attention worker computes and sends, every expert worker receives from all, computes and
//! sends back, every attention worker receives from all. Each worker, and each direction of its line, does one thing at a time in the order of
//! the rounds, so what a round costs is a few additions for each worker: O(M + N), where frames are M x N. With one worker on each
//! side and fixed stages it is the pipeline of [`Stages::total_s`](crate::Stages::total_s), exactly.

use rand::RngExt;
use rand_pcg::Pcg64;

use super::{Routing, StageTimes};

/// The workers and when they are free, in seconds.
pub(super) struct Lockstep<T> {
    pub(super) times: T,
    pub(super) routing: Routing,
    /// Each hop takes longer by a share drawn evenly up to this.
    pub(super) jitter: f64,
    /// Draw what each expert gets, instead of its mean.
    pub(super) draws: bool,
    pub(super) random: Pcg64,
    attention: Vec<WorkerTimes>,
    experts: Vec<WorkerTimes>,
    /// Rows of each expert in the round.
    rows: Vec<f64>,
    /// When each expert worker has sent.
    sent: Vec<f64>,
    pub(super) totals: RoundTotals,
}

/// When a worker and its line are free, and how long it has computed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct WorkerTimes {
    pub(super) free_s: f64,
    sends_s: f64,
    receives_s: f64,
    pub(super) busy_s: f64,
}

/// One attention worker's part of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Part {
    pub(super) worker: usize,
    pub(super) rows: f64,
    /// Cached tokens that they attend to.
    pub(super) cached: f64,
    /// When its rows are back.
    pub(super) ready_s: f64,
}

/// Where the time of rounds went, on the way of the slowest; sums in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct RoundTotals {
    pub(super) rounds: u64,
    /// From the first worker's readiness to the last one's.
    pub(super) total_s: f64,
    pub(super) attention_s: f64,
    pub(super) network_s: f64,
    pub(super) experts_s: f64,
    /// Rows that lay ready while attention workers computed another micro-batch.
    pub(super) attention_queue_s: f64,
    /// Rows that waited at expert workers.
    pub(super) expert_queue_s: f64,
    /// The part of the above by which the slowest worker of a side was slower than the mean.
    pub(super) straggler_s: f64,
}

/// What was computed in a round, for a timeline.
pub(super) trait Watch {
    fn attention(&mut self, worker: usize, rows: f64, start_s: f64, end_s: f64);
    fn experts(&mut self, worker: usize, rows: f64, start_s: f64, end_s: f64);
}

impl Watch for () {
    fn attention(&mut self, _: usize, _: f64, _: f64, _: f64) {}
    fn experts(&mut self, _: usize, _: f64, _: f64, _: f64) {}
}

impl<T: StageTimes> Lockstep<T> {
    pub(super) fn new(times: T, routing: Routing, attention: usize, random: Pcg64) -> Self {
        let experts = routing.workers();
        Lockstep {
            times,
            jitter: 0.0,
            draws: true,
            random,
            attention: vec![WorkerTimes::default(); attention],
            experts: vec![WorkerTimes::default(); experts],
            rows: Vec::with_capacity(experts),
            sent: vec![0.0; experts],
            routing,
            totals: RoundTotals::default(),
        }
    }

    pub(super) fn attention(&self) -> &[WorkerTimes] {
        &self.attention
    }

    pub(super) fn experts(&self) -> &[WorkerTimes] {
        &self.experts
    }

    /// Takes a micro-batch through one layer, and sets when each part is back.
    pub(super) fn round(&mut self, parts: &mut [Part], watch: &mut impl Watch) {
        let (m, n) = (self.attention.len(), self.experts.len());
        let copies = self.routing.workers_visited();
        let outputs = self.routing.top_k() as f64;
        let began_s = parts
            .iter()
            .map(|part| part.ready_s)
            .fold(f64::INFINITY, f64::min);
        let (mut first_s, mut last_s, mut computed_s) = (f64::INFINITY, 0.0_f64, 0.0_f64);
        let (mut total, mut slowest, mut mean, mut queued) = (0.0, 0.0_f64, 0.0, 0.0_f64);
        for part in parts.iter() {
            let jitter = self.jittered();
            let worker = &mut self.attention[part.worker];
            let start = part.ready_s.max(worker.free_s);
            let took = self.times.attention_s(part.rows, part.cached);
            let end = start + took;
            (worker.free_s, worker.busy_s) = (end, worker.busy_s + took);
            watch.attention(part.worker, part.rows, start, end);
            let sends = end.max(worker.sends_s);
            worker.sends_s = sends + self.times.attention_sends_s(part.rows * copies, n) * jitter;
            (first_s, last_s) = (first_s.min(sends), last_s.max(worker.sends_s));
            (computed_s, slowest) = (computed_s.max(end), slowest.max(took));
            total += part.rows;
            mean += took / parts.len() as f64;
            queued = queued.max(start - part.ready_s);
        }
        if self.draws {
            self.routing.draw(total, &mut self.random, &mut self.rows);
        } else {
            self.routing.mean(total, &mut self.rows);
        }
        let (mut in_s, mut out_first_s, mut out_last_s) = (0.0_f64, f64::INFINITY, 0.0_f64);
        let (mut expert_slowest, mut expert_mean, mut expert_queue) = (0.0_f64, 0.0, 0.0_f64);
        let mut done_s = 0.0_f64;
        for index in 0..n {
            let rows = &self.rows[self.routing.experts_of(index)];
            let visits: f64 = rows.iter().sum();
            // Rows that visit two of its experts travel once, but their outputs twice.
            let arrive =
                visits.min(total * self.routing.rows_of(index).max(visits / total / outputs));
            let took = self.times.experts_s(rows);
            let (there, back) = (self.jittered(), self.jittered());
            let worker = &mut self.experts[index];
            let receives = first_s.max(worker.receives_s);
            worker.receives_s = receives + self.times.expert_receives_s(arrive, m) * there;
            let all_in = worker.receives_s.max(last_s);
            let start = all_in.max(worker.free_s);
            let end = start + took;
            (worker.free_s, worker.busy_s) = (end, worker.busy_s + took);
            watch.experts(index, visits, start, end);
            let sends = end.max(worker.sends_s);
            worker.sends_s = sends + self.times.expert_sends_s(visits, m) * back;
            self.sent[index] = worker.sends_s;
            (in_s, done_s) = (in_s.max(all_in), done_s.max(end));
            (out_first_s, out_last_s) = (out_first_s.min(sends), out_last_s.max(worker.sends_s));
            expert_slowest = expert_slowest.max(took);
            expert_mean += took / n as f64;
            expert_queue = expert_queue.max(start - all_in);
        }
        let mut back_s = 0.0_f64;
        for part in parts.iter_mut() {
            let jitter = self.jittered();
            let worker = &mut self.attention[part.worker];
            let receives = out_first_s.max(worker.receives_s);
            worker.receives_s =
                receives + self.times.attention_receives_s(part.rows * outputs, n) * jitter;
            part.ready_s = worker.receives_s.max(out_last_s);
            back_s = back_s.max(part.ready_s);
        }
        let totals = &mut self.totals;
        totals.rounds += 1;
        totals.total_s += back_s - began_s;
        totals.attention_s += slowest;
        totals.experts_s += expert_slowest;
        totals.attention_queue_s += queued;
        totals.expert_queue_s += expert_queue;
        totals.network_s += (in_s - computed_s).max(0.0) + (back_s - done_s).max(0.0);
        totals.straggler_s += slowest - mean + expert_slowest - expert_mean;
    }

    /// Computes the head of a micro-batch, and sets when each part has its tokens.
    pub(super) fn head(&mut self, parts: &mut [Part], watch: &mut impl Watch) {
        for part in parts.iter_mut() {
            let worker = &mut self.attention[part.worker];
            let start = part.ready_s.max(worker.free_s);
            let took = self.times.step_s(part.rows, part.cached);
            part.ready_s = start + took;
            (worker.free_s, worker.busy_s) = (part.ready_s, worker.busy_s + took);
            watch.attention(part.worker, part.rows, start, part.ready_s);
        }
    }

    /// A worker that was gone is free from now on.
    pub(super) fn free_from(&mut self, now_s: f64) {
        for worker in self.attention.iter_mut().chain(&mut self.experts) {
            worker.free_s = worker.free_s.min(now_s);
            worker.sends_s = worker.sends_s.min(now_s);
            worker.receives_s = worker.receives_s.min(now_s);
        }
    }

    fn jittered(&mut self) -> f64 {
        if self.jitter > 0.0 {
            1.0 + self.jitter * self.random.random::<f64>()
        } else {
            1.0
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;

    use super::*;
    use crate::Stages;

    /// The end of the last combine of one step of `m` micro-batches.
    fn play(stages: Stages, m: usize, layers: usize, workers: usize) -> f64 {
        let routing = Routing::new(&vec![1.0; workers], workers, 1).unwrap();
        let mut lockstep = Lockstep::new(stages, routing, workers, Pcg64::seed_from_u64(0));
        lockstep.draws = false;
        let part = |worker| Part {
            worker,
            rows: 1.0,
            cached: 0.0,
            ready_s: 0.0,
        };
        let mut flights = vec![(0, (0..workers).map(part).collect::<Vec<_>>()); m];
        let mut end_s = 0.0_f64;
        // The round whose rows are ready first is next; of several, that of the lowest micro-batch.
        while let Some((layer, parts)) = flights
            .iter_mut()
            .filter(|(layer, _)| *layer < layers)
            .min_by(|a, b| {
                a.1[0]
                    .ready_s
                    .total_cmp(&b.1[0].ready_s)
                    .then(a.0.cmp(&b.0))
            })
        {
            lockstep.round(parts, &mut ());
            *layer += 1;
            end_s = parts.iter().map(|part| part.ready_s).fold(end_s, f64::max);
        }
        end_s
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Also where the conditions (1) to (3) of the paper are broken: hops longer than compute, one side idle, too few micro-batches.
        #[test]
        fn the_rounds_take_what_the_exact_formula_says(
            attention_s in 0.0..1.0, expert_s in 0.0..1.0, dispatch_s in 0.0..2.0, combine_s in 0.0..2.0,
            m in 1usize..9, layers in 1usize..40, workers in 1usize..4,
        ) {
            let stages = Stages { attention_s, dispatch_s, expert_s, combine_s };
            let (formula, played) = (stages.total_s(m, layers), play(stages, m, layers, workers));
            prop_assert!((formula - played).abs() <= 1e-9 * formula.max(1e-300), "{formula} {played}");
        }
    }
}
