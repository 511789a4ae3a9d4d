//! Rounds against frames: the simulation that is fast against the one in which every worker and every frame is played.

use proptest::prelude::*;
use volley_actors::{FirstCome, PolicyScheduler, Scheduler, Timeline};
use volley_planner::simulate::{
    ClusterShape, Routing, StageTimes, Trace, Variation, Wire, frames, serve,
};

/// A time for each piece of work and each row, and a line.
#[derive(Debug, Clone, Copy)]
struct Flat {
    attention_s: f64,
    expert_s: f64,
    row_s: f64,
    wire: Wire,
}

impl Flat {
    fn hop_s(&self, rows: f64, bytes: u64) -> f64 {
        self.wire.latency_s + rows * bytes as f64 / self.wire.bytes_per_s
    }
}

impl StageTimes for Flat {
    fn attention_s(&self, rows: f64, _: f64) -> f64 {
        self.attention_s + self.row_s * rows
    }

    fn step_s(&self, _: f64, _: f64) -> f64 {
        self.attention_s
    }

    fn experts_s(&self, rows: &[f64]) -> f64 {
        self.expert_s + self.row_s * rows.iter().sum::<f64>()
    }

    fn attention_sends_s(&self, rows: f64, _: usize) -> f64 {
        self.hop_s(rows, self.wire.dispatch_row_bytes)
    }

    fn expert_receives_s(&self, rows: f64, _: usize) -> f64 {
        self.hop_s(rows, self.wire.dispatch_row_bytes)
    }

    fn expert_sends_s(&self, rows: f64, _: usize) -> f64 {
        self.hop_s(rows, self.wire.combine_row_bytes)
    }

    fn attention_receives_s(&self, rows: f64, _: usize) -> f64 {
        self.hop_s(rows, self.wire.combine_row_bytes)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Of requests that all decode together, both say the same time between tokens. Steps are planned without delay in one and over control links in the
    /// other, what experts get is drawn in one and follows from tokens in the other, and lines are shared row by row in one and frame by frame in the other:
    /// that is a few percent.
    #[test]
    fn both_say_the_same_time_between_tokens(
        (attention_workers, expert_workers, micro_batches) in (1u16..4, 1usize..5, 1u8..4),
        (attention_us, expert_us, row_us) in (200.0..2000.0, 200.0..2000.0, 0.0..5.0),
        (layers, sequences) in (2usize..8, 1usize..9),
        rate in 1e9..1e10,
        seed in any::<u64>(),
    ) {
        let wire = Wire { latency_s: 5e-6, bytes_per_s: rate, dispatch_row_bytes: 8192, combine_row_bytes: 8192 };
        let times = Flat { attention_s: attention_us * 1e-6, expert_s: expert_us * 1e-6, row_s: row_us * 1e-6, wire };
        let shape = ClusterShape {
            attention_workers,
            micro_batches,
            layers,
            kv_blocks: 1000,
            block_tokens: 16,
            max_rows: 64,
            context: 128,
            max_waiting: 1000,
            replicas: false,
        };
        let routing = Routing::new(&[1.0; 8], expert_workers, 2).unwrap();
        let make = || Box::new(PolicyScheduler::new(FirstCome::new(32, 1))) as Box<dyn Scheduler>;
        let requests = sequences * usize::from(attention_workers) * usize::from(micro_batches);
        let trace = Trace::burst(requests, 1, 60).unwrap();
        let variation = Variation { seed, ..Variation::default() };
        let timeline = Timeline::new(std::iter::empty(), 0);
        let rounds = serve(&shape, routing.clone(), times, make(), &trace, &variation, &timeline).unwrap();
        let (frames, _) = frames(&shape, &routing, times, wire, Box::new(make), &trace, Vec::new(), seed, 0).unwrap();
        prop_assert_eq!(rounds.completed as usize, requests);
        prop_assert_eq!(rounds.output_tokens, frames.outcome.totals.generated_tokens);
        let ratio = rounds.tpot.mean_s / frames.tpot.mean_s;
        prop_assert!((0.9..1.1).contains(&ratio), "rounds {:?}, frames {:?}", rounds.tpot, frames.tpot);
    }
}
