//! The measurements: the attention and expert modules alone over a sweep of rows, and hops and turns inside running clusters.

mod modules;
mod service;

use std::time::{Duration, Instant};

use volley_planner::cost::Curve;
use volley_planner::{Apart, Fits, Line, ModelShape, Profile, Transport};

use self::modules::{AttentionPasses, ExpertPasses, Part, curve_s};
use super::{CONTEXT, element_bytes, precision};
use crate::failure::Failure;
use crate::launch::Launch;
use crate::stats::Summary;

/// Repetitions of each measurement at least; the median counts.
const REPETITIONS: usize = 5;
/// And as many as fit this time.
const TIME: Duration = Duration::from_millis(60);

/// Median seconds of `work`, after a first time that does not count.
fn median_s(mut work: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    work()?;
    let began = Instant::now();
    let mut times = Vec::new();
    while times.len() < REPETITIONS || began.elapsed() < TIME {
        let start = Instant::now();
        work()?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(Summary::of(times).median)
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
    let cluster = &launch.settings.cluster;
    let threads = cluster.threads;
    let context = CONTEXT.min(cluster.context.saturating_sub(1));
    let attention = |part: Part, rows: &[usize], threads, company| {
        let make = || AttentionPasses::new(launch, model, most, threads, part);
        curve_s(make, rows, company)
    };
    let rows = sweep(most);
    let together = attention(Part::Layers { start: 0 }, &rows, threads, 0)?;
    let long = attention(Part::Layers { start: context }, &[most], threads, 0)?;
    let head = attention(Part::Head, &rows, threads, 0)?;
    let experts = |threads, company| {
        curve_s(
            || ExpertPasses::new(launch, model, most, threads),
            &rows,
            company,
        )
    };
    let expert = experts(threads, 0)?;
    let others = threads - 1;
    let apart = Apart {
        attention: curve(&attention(Part::Layers { start: 0 }, &rows, 1, others)?)?,
        step: curve(&attention(Part::Head, &rows, 1, others)?)?,
        expert: curve(&experts(1, others)?)?,
    };
    let alone = service::observe(launch, model, most, 1)?;
    let crowded = service::observe(launch, model, most, threads as u16)?;
    // What a long context adds, by cached token.
    let short = together.last().map_or(0.0, |last| last.1);
    let cached = f64::from(context) * most as f64;
    Ok(Profile {
        gpu: "this-machine".to_owned(),
        model: model.clone(),
        dtype: precision(cluster.dtype, cluster.quantize),
        threads,
        row_bytes: model.hidden as f64 * element_bytes(cluster.dtype),
        per_cached_s: ((long[0].1 - short) / cached).max(0.0),
        popularity: alone.popularity,
        fits: Fits {
            attention: Line::through(&together),
            expert: Line::through(&expert),
            link: alone.hop,
        },
        attention: curve(&together)?,
        step: curve(&head)?,
        expert: curve(&expert)?,
        apart,
        turn_s: alone.turn_s,
        crowded_link: crowded.hop,
        link: Transport {
            overhead_us: alone.hop.intercept * 1e6,
            share: 1.0,
            tail: alone.tail,
            per_peer_us: 0.0,
        },
        link_bytes_per_s: 1.0 / alone.hop.slope.max(1e-12),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_ends_at_the_most_rows() {
        assert_eq!(sweep(10), [1, 2, 4, 8, 10]);
        assert_eq!(sweep(8), [1, 2, 4, 8]);
    }
}
