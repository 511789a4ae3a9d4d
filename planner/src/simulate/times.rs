//! How long the parts of a step take, as far as the simulation asks.

use crate::Stages;

/// Times of one layer's parts, in seconds. Implemented by the cost model, by a profile, and by fixed stages.
pub trait StageTimes {
    /// T_a: one attention worker's layer for `rows` tokens that attend to `cached` tokens together.
    fn attention_s(&self, rows: f64, cached: f64) -> f64;

    /// What an attention worker computes once a step: embedding, head, sampling, and layers without experts.
    fn step_s(&self, rows: f64, cached: f64) -> f64;

    /// T_e: one expert worker's layer by the rows of each of its experts.
    fn experts_s(&self, rows: &[f64]) -> f64;

    /// Time in which `rows` rows leave an attention worker for `peers` expert workers.
    fn attention_sends_s(&self, rows: f64, peers: usize) -> f64;

    /// Time in which `rows` rows reach an expert worker from `peers` attention workers.
    fn expert_receives_s(&self, rows: f64, peers: usize) -> f64;

    /// Time in which `rows` outputs leave an expert worker.
    fn expert_sends_s(&self, rows: f64, peers: usize) -> f64;

    /// Time in which `rows` outputs reach an attention worker.
    fn attention_receives_s(&self, rows: f64, peers: usize) -> f64;
}

/// Fixed stages, whatever the load: what the formula for T_total is about.
impl StageTimes for Stages {
    fn attention_s(&self, _: f64, _: f64) -> f64 {
        self.attention_s
    }

    fn step_s(&self, _: f64, _: f64) -> f64 {
        0.0
    }

    fn experts_s(&self, _: &[f64]) -> f64 {
        self.expert_s
    }

    fn attention_sends_s(&self, _: f64, _: usize) -> f64 {
        self.dispatch_s
    }

    fn expert_receives_s(&self, _: f64, _: usize) -> f64 {
        self.dispatch_s
    }

    fn expert_sends_s(&self, _: f64, _: usize) -> f64 {
        self.combine_s
    }

    fn attention_receives_s(&self, _: f64, _: usize) -> f64 {
        self.combine_s
    }
}

impl<T: StageTimes + ?Sized> StageTimes for Box<T> {
    fn attention_s(&self, rows: f64, cached: f64) -> f64 {
        (**self).attention_s(rows, cached)
    }

    fn step_s(&self, rows: f64, cached: f64) -> f64 {
        (**self).step_s(rows, cached)
    }

    fn experts_s(&self, rows: &[f64]) -> f64 {
        (**self).experts_s(rows)
    }

    fn attention_sends_s(&self, rows: f64, peers: usize) -> f64 {
        (**self).attention_sends_s(rows, peers)
    }

    fn expert_receives_s(&self, rows: f64, peers: usize) -> f64 {
        (**self).expert_receives_s(rows, peers)
    }

    fn expert_sends_s(&self, rows: f64, peers: usize) -> f64 {
        (**self).expert_sends_s(rows, peers)
    }

    fn attention_receives_s(&self, rows: f64, peers: usize) -> f64 {
        (**self).attention_receives_s(rows, peers)
    }
}
