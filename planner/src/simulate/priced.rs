//! Times of a deployment's parts from the cost model of plans: a roofline of each kernel, or what was measured.

use super::StageTimes;
use crate::cost::Cost;

/// What everything costs in one deployment of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Priced {
    /// Of each layer with experts, and of the head.
    pub cost: Cost,
    /// Layers without experts: they are computed once a step on attention workers.
    pub dense_layers: usize,
}

impl StageTimes for Priced {
    fn attention_s(&self, rows: f64, cached: f64) -> f64 {
        self.cost.attention.layer_s(rows, cached)
    }

    fn step_s(&self, rows: f64, cached: f64) -> f64 {
        let attention = &self.cost.attention;
        let dense = match self.dense_layers {
            0 => 0.0,
            layers => layers as f64 * attention.dense_layer_s(rows, cached),
        };
        dense + attention.step_s(rows)
    }

    fn experts_s(&self, rows: &[f64]) -> f64 {
        self.cost.experts.layer_s(rows)
    }

    fn attention_sends_s(&self, rows: f64, peers: usize) -> f64 {
        let bytes = rows * self.cost.dispatch_row_bytes;
        self.cost.attention_link.hop_s(bytes, peers)
    }

    fn expert_receives_s(&self, rows: f64, peers: usize) -> f64 {
        let bytes = rows * self.cost.dispatch_row_bytes;
        self.cost.expert_link.hop_s(bytes, peers)
    }

    fn expert_sends_s(&self, rows: f64, peers: usize) -> f64 {
        let bytes = rows * self.cost.combine_row_bytes;
        self.cost.expert_link.hop_s(bytes, peers)
    }

    fn attention_receives_s(&self, rows: f64, peers: usize) -> f64 {
        let bytes = rows * self.cost.combine_row_bytes;
        self.cost.attention_link.hop_s(bytes, peers)
    }
}
