//! The measurements: the attention and expert modules alone over a sweep of rows, and the hop inside a running cluster.

use std::sync::Arc;
use std::time::{Duration, Instant};

use volley_models::{
    AttentionModule, AttentionOptions, Crew, ExpertModule, ExpertOptions, Isa, SequenceSlice,
};
use volley_models::{ComputeType, kernels::Rows};
use volley_planner::cost::Curve;
use volley_planner::{Fits, Line, ModelShape, Profile, Transport};

use super::{CONTEXT, element_bytes, precision};
use crate::config::TRACE_SPANS_AUTO;
use crate::failure::Failure;
use crate::launch::Launch;
use crate::load::Load;
use crate::progress::LoadDisplay;
use crate::rally;
use crate::stats::Summary;

/// Repetitions of each measurement at least; the median counts.
const REPETITIONS: usize = 5;
/// And as many as fit this time.
const TIME: Duration = Duration::from_millis(60);
/// Tokens of a KV block.
const BLOCK: usize = 16;

/// Median seconds of `work`, after a first time that does not count.
fn median_s(mut work: impl FnMut()) -> f64 {
    work();
    let began = Instant::now();
    let mut times = Vec::new();
    while times.len() < REPETITIONS || began.elapsed() < TIME {
        let start = Instant::now();
        work();
        times.push(start.elapsed().as_secs_f64());
    }
    Summary::of(times).median
}

/// Powers of two up to `most`, and `most`.
fn sweep(most: usize) -> Vec<usize> {
    let powers = (0..).map(|power| 1 << power);
    let mut all: Vec<usize> = powers.take_while(|&rows| rows < most).collect();
    all.push(most);
    all
}

fn curve(points: &[(f64, f64)]) -> Result<Curve, Failure> {
    Curve::through(points.to_vec())
        .ok_or_else(|| Failure::new("the clock gave no times that make a curve; try again"))
}

/// Everything.
pub(super) fn profile(
    launch: &Launch,
    model: &ModelShape,
    most: usize,
) -> Result<Profile, Failure> {
    let attention = attention(launch, model, most)?;
    let expert = experts(launch, model, most)?;
    let link = link(launch, model, most)?;
    let cluster = &launch.settings.cluster;
    let slope = link.line.slope.max(1e-12);
    Ok(Profile {
        gpu: "this-machine".to_owned(),
        model: model.name.clone(),
        dtype: precision(cluster.dtype, cluster.quantize),
        threads: cluster.threads,
        row_bytes: model.hidden as f64 * element_bytes(cluster.dtype),
        per_cached_s: attention.per_cached_s,
        popularity: link.popularity,
        fits: Fits {
            attention: Line::through(&attention.rows),
            expert: Line::through(&expert),
            link: link.line,
        },
        attention: curve(&attention.rows)?,
        step: curve(&attention.step)?,
        expert: curve(&expert)?,
        link: Transport {
            overhead_us: link.line.intercept * 1e6,
            share: 1.0,
            tail: link.tail,
            per_peer_us: 0.0,
        },
        link_bytes_per_s: 1.0 / slope,
    })
}

struct AttentionTimes {
    rows: Vec<(f64, f64)>,
    per_cached_s: f64,
    step: Vec<(f64, f64)>,
}

fn module<T, E: std::fmt::Display>(result: Result<T, E>) -> Result<T, Failure> {
    result.map_err(|error| Failure::new(error.to_string()))
}

/// All layers after one another, as a step goes through them: so weights come from where they come from in service.
fn attention(launch: &Launch, model: &ModelShape, most: usize) -> Result<AttentionTimes, Failure> {
    let cluster = &launch.settings.cluster;
    let context = CONTEXT.min(cluster.context.saturating_sub(1)) as usize;
    let blocks = (context + 1).div_ceil(BLOCK);
    let crew = module(Crew::new(cluster.threads, 1))?;
    let options = AttentionOptions {
        dtype: cluster.dtype,
        quantize: cluster.quantize,
        isa: Isa::detect(),
        kv_blocks: blocks * most,
        block_tokens: BLOCK,
        max_rows: most,
        micro_batches: 1,
        seats: Crew::seats(cluster.threads, 1),
    };
    let weights = launch.model.weights();
    let mut attention = module(AttentionModule::load(
        &*weights,
        options,
        module(crew.join())?,
        &mut |_| (),
    ))?;
    let layers = model.layers();
    let mut acts = attention.activations();
    let tables: Vec<Vec<u32>> = (0..most)
        .map(|row| {
            (row * blocks..(row + 1) * blocks)
                .map(|block| block as u32)
                .collect()
        })
        .collect();
    let outputs = vec![0.0; most * model.hidden];
    let mut logits = vec![0.0; most * model.vocab];
    let mut times = AttentionTimes {
        rows: Vec::new(),
        per_cached_s: 0.0,
        step: Vec::new(),
    };
    let mut layers_s = |rows: usize, start: usize| -> Result<(f64, f64), Failure> {
        let batch: Vec<SequenceSlice<'_>> = tables[..rows]
            .iter()
            .map(|blocks| SequenceSlice {
                tokens: &[1],
                start: start as u32,
                blocks,
            })
            .collect();
        module(attention.begin(&mut acts, batch.iter().copied()))?;
        let through = median_s(|| {
            for layer in 0..layers {
                attention.attention(layer, &mut acts);
                attention.add_ffn(&mut acts, &outputs[..rows * model.hidden]);
            }
        });
        let all: Vec<u32> = (0..rows as u32).collect();
        let step = median_s(|| {
            attention.embed(&mut acts);
            // The rows exist: they were just begun.
            let _ = attention.logits(&acts, &all, &mut logits[..rows * model.vocab]);
        });
        Ok((through / layers as f64, step))
    };
    for rows in sweep(most) {
        let (layer_s, step_s) = layers_s(rows, 0)?;
        times.rows.push((rows as f64, layer_s));
        times.step.push((rows as f64, step_s));
    }
    // What a long context adds, by cached token.
    let (long, _) = layers_s(most, context)?;
    let short = times.rows.last().map_or(0.0, |last| last.1);
    times.per_cached_s = ((long - short) / (most * context) as f64).max(0.0);
    Ok(times)
}

/// One expert by its rows: all experts of all layers with so many rows each, divided by their number.
fn experts(launch: &Launch, model: &ModelShape, most: usize) -> Result<Vec<(f64, f64)>, Failure> {
    let cluster = &launch.settings.cluster;
    let crew = module(Crew::new(cluster.threads, 1))?;
    let options = ExpertOptions {
        dtype: cluster.dtype,
        quantize: cluster.quantize,
        isa: Isa::detect(),
        max_rows: 512,
    };
    let all: Vec<u16> = (0..model.experts as u16).collect();
    let weights = launch.model.weights();
    let loaded = ExpertModule::load(&*weights, &all, options, module(crew.join())?, &mut |_| ());
    let mut experts = module(loaded)?;
    let moe_layers: Vec<usize> = launch.model.spec().moe_layers().collect();
    let mut points = Vec::new();
    for rows in sweep(most) {
        let count = model.experts * rows;
        let offsets: Vec<u32> = (0..=model.experts)
            .map(|expert| (expert * rows) as u32)
            .collect();
        let (x32, x16) = (
            vec![0.1f32; count * model.hidden],
            vec![0x3dcc_u16; count * model.hidden],
        );
        let mut y = vec![0.0; count * model.hidden];
        let mut failed = None;
        let time = median_s(|| {
            for &layer in &moe_layers {
                let x = match cluster.dtype {
                    ComputeType::F32 => Rows::F32(&x32),
                    ComputeType::Bf16 => Rows::Bf16(&x16),
                };
                failed = experts
                    .forward(layer, &all, &offsets, x, &mut y)
                    .err()
                    .or(failed.take());
            }
        });
        if let Some(error) = failed {
            return Err(Failure::new(error.to_string()));
        }
        points.push((
            rows as f64,
            time / (moe_layers.len() * model.experts) as f64,
        ));
    }
    Ok(points)
}

struct LinkTimes {
    line: Line,
    tail: f64,
    popularity: Vec<f64>,
}

/// The hop, from the timeline of a real cluster of one attention and one expert worker: what is left of a step when neither side computes.
fn link(launch: &Launch, model: &ModelShape, most: usize) -> Result<LinkTimes, Failure> {
    let mut launch = Launch {
        model: launch.model.clone(),
        settings: launch.settings.clone(),
        memory: launch.memory.clone(),
    };
    let cluster = &mut launch.settings.cluster;
    (
        cluster.attention_workers,
        cluster.expert_workers,
        cluster.micro_batches,
    ) = (1, 1, 1);
    cluster.timeline_spans = TRACE_SPANS_AUTO;
    let row_bytes = model.hidden as f64 * element_bytes(cluster.dtype);
    let hops = 2.0 * model.moe_layers as f64;
    let (mut points, mut tail, mut popularity) = (Vec::new(), 1.0f64, Vec::new());
    for batch in sweep(most) {
        let started = launch.start_cluster(&Arc::new(LoadDisplay::new()))?;
        let (cluster, _children) = (started.cluster, started.children);
        let load = Load {
            batch: batch as u32,
            input: 4,
            output: 24,
            seed: 1,
        };
        let ran = runtime()?.block_on(load.run(&cluster.client(), model.vocab));
        cluster.shutdown(Duration::ZERO);
        ran?;
        popularity = shares(&cluster.expert_load());
        let steps = rally::steps(&cluster.timeline().spans());
        let decode = steps.iter().filter(|step| step.rows == batch as u32);
        let network: Vec<f64> = decode
            .map(|step| step.network.as_secs_f64() / hops)
            .collect();
        if network.is_empty() {
            continue;
        }
        let summary = Summary::of(network);
        // There and back: one row, and K outputs.
        let bytes = batch as f64 * row_bytes * (1.0 + model.top_k as f64) / 2.0;
        points.push((bytes, summary.median.max(1e-9)));
        tail = tail.max(summary.p99 / summary.median.max(1e-9));
    }
    if points.is_empty() {
        return Err(Failure::new(
            "no step of the cluster was recorded; give more --rows",
        ));
    }
    Ok(LinkTimes {
        line: Line::through(&points),
        tail,
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

/// The small runtime that a load needs.
pub(super) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let built = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    built.map_err(|error| Failure::new(format!("no runtime: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_sorted_in_each_layer_and_sum_to_one() {
        let shares = shares(&[vec![1, 3], vec![0, 0], vec![4, 0]]);
        assert_eq!(shares, [0.875, 0.125]);
        assert_eq!(sweep(10), [1, 2, 4, 8, 10]);
        assert_eq!(sweep(8), [1, 2, 4, 8]);
    }
}
