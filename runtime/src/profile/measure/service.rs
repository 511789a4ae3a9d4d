//! What only a running cluster shows: hops between workers, the turn between two steps, and which experts rows visit.

use std::sync::Arc;
use std::time::Duration;

use volley_planner::{Line, ModelShape};

use super::{element_bytes, sweep};
use crate::config::TRACE_SPANS_AUTO;
use crate::failure::Failure;
use crate::launch::Launch;
use crate::load::Load;
use crate::profile::runtime;
use crate::progress::LoadDisplay;
use crate::rally;
use crate::stats::Summary;

/// Steps in which all sequences decode, about.
const STEPS: u32 = 12;

/// What was seen.
pub(super) struct Observed {
    /// Seconds of a hop by bytes.
    pub(super) hop: Line,
    /// P99 of a hop by its median, at worst.
    pub(super) tail: f64,
    /// Seconds between two steps.
    pub(super) turn_s: f64,
    /// Shares of a layer's rows that experts get, the busiest first.
    pub(super) popularity: Vec<f64>,
}

/// A cluster of as many attention and expert workers, with one micro-batch, over a sweep of batches.
pub(super) fn observe(
    launch: &Launch,
    model: &ModelShape,
    most: usize,
    workers: u16,
) -> Result<Observed, Failure> {
    let mut launch = Launch {
        model: launch.model.clone(),
        settings: launch.settings.clone(),
        memory: launch.memory.clone(),
    };
    let cluster = &mut launch.settings.cluster;
    cluster.attention_workers = workers;
    cluster.expert_workers = workers.min(model.experts as u16);
    cluster.micro_batches = 1;
    cluster.timeline_spans = TRACE_SPANS_AUTO;
    let row_bytes = model.hidden as f64 * element_bytes(cluster.dtype);
    let hops = 2.0 * model.moe_layers as f64;
    let (mut points, mut turns) = (Vec::new(), Vec::new());
    let mut tail = 1.0f64;
    let started = launch.start_cluster(&Arc::new(LoadDisplay::new()))?;
    let (cluster, _children) = (started.cluster, started.children);
    let runtime = runtime()?;
    let mut seen = 0;
    for batch in sweep(most) {
        let load = Load {
            batch: batch as u32,
            input: 4,
            // They begin one after the other.
            output: batch as u32 + STEPS,
            seed: 1,
        };
        let ran = runtime.block_on(load.run(&cluster.client(), model.vocab))?;
        let gap_s = Summary::of(ran.full_gaps()).median;
        let steps = rally::steps(&cluster.timeline().spans());
        let decode: Vec<_> = steps
            .iter()
            .filter(|step| step.step > seen && step.rows == batch as u32)
            .collect();
        seen = steps.iter().map(|step| step.step).fold(seen, u64::max);
        if decode.is_empty() {
            continue;
        }
        let seconds = |of: fn(&rally::Rally) -> Duration| {
            Summary::of(decode.iter().map(|step| of(step).as_secs_f64()).collect())
        };
        let network = seconds(|step| step.network);
        let median_s = network.median.max(1e-9);
        // There and back: one row, and K outputs.
        let bytes = batch as f64 * row_bytes * (1.0 + model.top_k as f64) / 2.0;
        points.push((bytes, median_s / hops));
        tail = tail.max(network.p99 / median_s);
        turns.push((gap_s - seconds(|step| step.total).median).max(0.0));
    }
    let popularity = shares(&cluster.expert_load());
    cluster.shutdown(Duration::ZERO);
    if points.is_empty() {
        return Err(Failure::new(
            "no step of the cluster was recorded; give fewer --rows",
        ));
    }
    Ok(Observed {
        hop: Line::through(&points),
        tail,
        turn_s: Summary::of(turns).median,
        popularity,
    })
}

/// The share of rows of the busiest expert, of the second, and so on: mean over layers that have any.
fn shares(load: &[Vec<u64>]) -> Vec<f64> {
    let experts = load.first().map_or(0, Vec::len);
    let mut mean = vec![0.0; experts];
    for layer in load {
        let all: u64 = layer.iter().sum();
        let mut sorted = layer.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        for (share, rows) in mean.iter_mut().zip(sorted) {
            *share += rows as f64 / all.max(1) as f64;
        }
    }
    let sum: f64 = mean.iter().sum();
    mean.iter()
        .map(|share| share / sum.max(f64::MIN_POSITIVE))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_sorted_in_each_layer_and_sum_to_one() {
        let shares = shares(&[vec![1, 3], vec![0, 0], vec![4, 0]]);
        assert_eq!(shares, [0.875, 0.125]);
    }
}
