//! What the search is measured against: independent random points, a random walk, and Bayesian optimisation.

use std::collections::VecDeque;

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::session::{OutOfTime, Purpose, Record, Session};
use crate::space::{Axis, Category, Feature, Point, Setting, Space};

/// Independent random points until the time is over. The seed draws the same points as the search's warm-up does.
pub(crate) fn random_search(session: &mut Session<'_>, seed: u64) {
    let mut rng = Pcg64::seed_from_u64(seed);
    loop {
        let point = session.space().sample(&mut rng);
        if session.probe(&point, Purpose::Search) == Err(OutOfTime) {
            return;
        }
    }
}

/// One random setting changed after another.
pub(crate) fn random_walk(session: &mut Session<'_>, seed: u64) {
    let mut rng = Pcg64::seed_from_u64(seed);
    let features: Vec<Feature> = Feature::all().collect();
    let mut point = session.space().sample(&mut rng);
    while session.probe(&point, Purpose::Search) != Err(OutOfTime) {
        let feature = features[rng.random_range(0..features.len())];
        let other = session.space().sample(&mut rng);
        point = session.space().with(&point, Setting::of(feature, &other));
    }
}

/// Measurements the surrogate is fitted to: the latest ones, since its cost grows with their cube.
const WINDOW: usize = 48;
/// Random points first, and random candidates of each step.
const FIRST: usize = 10;
const CANDIDATES: usize = 64;
/// Length scale of the kernel, in units where an axis is 1 long and two names differ by 1; and the noise of the objective.
const LENGTH: f64 = 1.0;
const NOISE: f64 = 0.05;

/// Bayesian optimisation: a Gaussian process over the points, expected improvement, one counter after another in the order of their spread.
pub(crate) fn bayesian(session: &mut Session<'_>, seed: u64) {
    let _over = bayesian_until_over(session, seed);
}

fn bayesian_until_over(
    session: &mut Session<'_>,
    seed: u64,
) -> Result<std::convert::Infallible, OutOfTime> {
    let mut rng = Pcg64::seed_from_u64(seed);
    let mut window: VecDeque<(Vec<f64>, Vec<f64>)> = VecDeque::new();
    let mut counter = 0;
    let mut spent = 0;
    loop {
        let point = if window.len() < FIRST {
            session.space().sample(&mut rng)
        } else {
            best_candidate(session.space(), &window, counter, &mut rng)
        };
        let index = session.probe(&point, Purpose::Search)?;
        let record: &Record = &session.records()[index];
        if !record.counters.is_empty() {
            window.push_back((
                coordinates(&point, session.space()),
                record.counters.iter().map(|c| c.max(1e-9).ln()).collect(),
            ));
        }
        if window.len() > WINDOW {
            window.pop_front();
        }
        spent += 1;
        // On to the next counter after an anomaly, or when this one had its share.
        if record.verdict.symptom().is_some() || spent >= 2 * FIRST {
            counter = (counter + 1) % record.counters.len().max(1);
            spent = 0;
        }
    }
}

fn coordinates(point: &Point, space: &Space) -> Vec<f64> {
    let axes = Axis::ALL.iter().map(|&axis| {
        let (low, high) = space.range(axis);
        let span = (f64::from(high) / f64::from(low)).ln();
        if span > 0.0 {
            (f64::from(axis.of(point)) / f64::from(low)).ln() / span
        } else {
            0.0
        }
    });
    let names = Category::ALL.iter().flat_map(|&category| {
        let value = category.of(point);
        space.choices(category).into_iter().map(move |choice| {
            if choice == value {
                std::f64::consts::FRAC_1_SQRT_2
            } else {
                0.0
            }
        })
    });
    axes.chain(names).collect()
}

fn kernel(a: &[f64], b: &[f64]) -> f64 {
    let squared: f64 = a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum();
    (-squared / (2.0 * LENGTH * LENGTH)).exp()
}

fn best_candidate(
    space: &Space,
    window: &VecDeque<(Vec<f64>, Vec<f64>)>,
    counter: usize,
    rng: &mut Pcg64,
) -> Point {
    let count = window.len();
    let values: Vec<f64> = window
        .iter()
        .map(|(_, counters)| counters[counter])
        .collect();
    let mean = values.iter().sum::<f64>() / count as f64;
    let spread = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count as f64)
        .sqrt()
        .max(1e-9);
    let values: Vec<f64> = values.iter().map(|v| (v - mean) / spread).collect();
    let best = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    // Cholesky factor of the kernel matrix.
    let mut lower = vec![vec![0.0; count]; count];
    for i in 0..count {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| lower[i][k] * lower[j][k]).sum();
            let entry = kernel(&window[i].0, &window[j].0) + if i == j { NOISE } else { 0.0 };
            lower[i][j] = if i == j {
                (entry - dot).max(1e-9).sqrt()
            } else {
                (entry - dot) / lower[j][j]
            };
        }
    }
    let forward = |right: &[f64]| {
        let mut solved = vec![0.0; count];
        for i in 0..count {
            let dot: f64 = (0..i).map(|k| lower[i][k] * solved[k]).sum();
            solved[i] = (right[i] - dot) / lower[i][i];
        }
        solved
    };
    let weights = forward(&values);
    let mut chosen: Option<(f64, Point)> = None;
    for _ in 0..CANDIDATES {
        let point = space.sample(rng);
        let at = coordinates(&point, space);
        let column: Vec<f64> = window.iter().map(|(x, _)| kernel(x, &at)).collect();
        let solved = forward(&column);
        let expected: f64 = solved.iter().zip(&weights).map(|(a, b)| a * b).sum();
        let deviation = (1.0 + NOISE - solved.iter().map(|v| v * v).sum::<f64>())
            .max(1e-9)
            .sqrt();
        let z = (expected - best) / deviation;
        let gain = (expected - best) * normal_below(z)
            + deviation * (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt();
        if chosen.as_ref().is_none_or(|(most, _)| gain > *most) {
            chosen = Some((gain, point));
        }
    }
    chosen.expect("there are candidates").1
}

/// The standard normal distribution function (Abramowitz and Stegun 26.2.17).
fn normal_below(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z.abs());
    let tail = (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt()
        * t
        * (0.319_381_53
            + t * (-0.356_563_782
                + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    if z > 0.0 { 1.0 - tail } else { tail }
}
