//! Every strategy on a simulated subsystem over many seeds, against causes that are known.

use std::sync::Mutex;

use rand::SeedableRng;
use rand_pcg::Pcg64;
use serde::Serialize;

use crate::baselines::{bayesian, random_search, random_walk};
use crate::mfs::Mfs;
use crate::monitor::Monitor;
use crate::region::Region;
use crate::search::{Options, Search, Signals};
use crate::session::Session;
use crate::simulated::{Model, Simulated};
use crate::space::Point;
use crate::subsystem::Subsystem;

/// Workloads by which a minimal feature set is compared with the truth, each way.
const COMPARED: usize = 400;

/// A way to look for anomalies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// The search on diagnostic counters.
    Diagnostic,
    /// The search on throughput alone.
    Performance,
    /// Annealing on diagnostic counters that learns nothing from what it met.
    AnnealingOnly,
    /// Bayesian optimisation of diagnostic counters.
    Bayesian,
    /// One random setting changed after another.
    RandomWalk,
    /// Independent random points.
    Random,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Strategy; 6] = [
        Strategy::Diagnostic,
        Strategy::Performance,
        Strategy::AnnealingOnly,
        Strategy::Bayesian,
        Strategy::RandomWalk,
        Strategy::Random,
    ];

    /// What reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Diagnostic => "collie (diagnostic counters)",
            Strategy::Performance => "collie (performance counters)",
            Strategy::AnnealingOnly => "annealing without MFS",
            Strategy::Bayesian => "Bayesian optimisation",
            Strategy::RandomWalk => "random walk",
            Strategy::Random => "independent random",
        }
    }

    /// Runs until the session's time is over.
    pub fn run(self, session: &mut Session<'_>, seed: u64) -> Vec<Mfs> {
        let search = |session: &mut Session<'_>, signals, learns| {
            Search::new(session, Options { signals, learns }, seed).run()
        };
        match self {
            Strategy::Diagnostic => return search(session, Signals::Diagnostic, true),
            Strategy::Performance => return search(session, Signals::Performance, true),
            Strategy::AnnealingOnly => return search(session, Signals::Diagnostic, false),
            Strategy::Bayesian => bayesian(session, seed),
            Strategy::RandomWalk => random_walk(session, seed),
            Strategy::Random => random_search(session, seed),
        }
        Vec::new()
    }
}

/// One search, judged.
#[derive(Debug, Clone)]
struct Run {
    /// For each cause, when a probe first showed it, seconds.
    found_s: Vec<Option<f64>>,
    verdicts: usize,
    false_verdicts: usize,
    /// Precision, recall and probes for each cause of which a feature set was learnt; recall 0 for one that was found and not learnt.
    learnt: Vec<(Option<f64>, f64, usize)>,
}

/// A strategy over all seeds.
#[derive(Debug, Clone, Serialize)]
pub struct StrategyResult {
    /// Its name.
    pub name: String,
    /// Mean number of distinct anomalies found.
    pub found_mean: f64,
    /// The least of any seed.
    pub found_min: usize,
    /// For k = 1, 2, ...: mean minutes to the k-th distinct anomaly over the seeds that found as many.
    pub minutes_to_kth: Vec<Option<f64>>,
    /// For k = 1, 2, ...: the share of seeds that found as many.
    pub share_reaching_kth: Vec<f64>,
    /// For k = 1, 2, ...: the same mean with the whole budget charged to seeds that did not: a lower bound of the true mean.
    pub minutes_to_kth_at_least: Vec<f64>,
    /// For each anomaly: the share of seeds that found it.
    pub found_share: Vec<(String, f64)>,
    /// Share of verdicts that were wrong.
    pub false_verdicts: f64,
    /// Of the workloads that a feature set speaks of, the share that the anomaly's true conditions admit. None for strategies that learn nothing.
    pub mfs_precision: Option<f64>,
    /// Of the workloads that an anomaly's true conditions admit, the share that its feature sets speak of.
    pub mfs_recall: Option<f64>,
    /// Probes spent on a feature set.
    pub probes_per_mfs: Option<f64>,
    /// Mean number of probes.
    pub probes: f64,
}

/// An evaluation.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// The subsystem.
    pub subsystem: String,
    /// Seeds 0 up to this.
    pub seeds: u64,
    /// The budget of each search, simulated hours.
    pub hours: f64,
    /// How many anomalies there are.
    pub anomalies: usize,
    /// One a strategy.
    pub strategies: Vec<StrategyResult>,
}

/// Runs strategies over seeds, on as many threads as the machine has.
pub fn evaluate(model: &Model, strategies: &[Strategy], seeds: u64, hours: f64) -> Evaluation {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let results = strategies.iter().map(|&strategy| {
        let (next, runs) = (Mutex::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let seed = {
                            let mut next = next.lock().expect("no holder panics");
                            *next += 1;
                            *next - 1
                        };
                        if seed >= seeds {
                            return;
                        }
                        let run = run(model, strategy, seed, hours);
                        runs.lock().expect("no holder panics").push((seed, run));
                    }
                });
            }
        });
        let mut runs = runs.into_inner().expect("no holder panics");
        runs.sort_by_key(|(seed, _)| *seed);
        let runs: Vec<Run> = runs.into_iter().map(|(_, run)| run).collect();
        summarise(model, strategy, &runs, hours)
    });
    Evaluation {
        subsystem: model.name.clone(),
        seeds,
        hours,
        anomalies: model.mechanisms.len(),
        strategies: results.collect(),
    }
}

fn run(model: &Model, strategy: Strategy, seed: u64, hours: f64) -> Run {
    let mut subsystem = Simulated::new(model, seed ^ 0x0123_4567);
    let space = subsystem.space().clone();
    let mut session = Session::new(&mut subsystem, space, Monitor::default(), hours * 3600.0);
    let learnt = strategy.run(&mut session, seed);
    let mut found_s = vec![None; model.mechanisms.len()];
    let (mut verdicts, mut false_verdicts) = (0, 0);
    for record in session.records() {
        if record.verdict.confidence() == 0.0 {
            continue;
        }
        let (seen, cause) = (
            record.verdict.symptom().is_some(),
            model.cause(&record.point),
        );
        verdicts += 1;
        false_verdicts += usize::from(seen != cause.is_some());
        if let (true, Some(cause)) = (seen, cause) {
            found_s[cause].get_or_insert(record.at_s);
        }
    }
    let mut rng = Pcg64::seed_from_u64(seed);
    let mut scores = Vec::new();
    for (cause, mechanism) in model.mechanisms.iter().enumerate() {
        if found_s[cause].is_none() || learnt.is_empty() {
            continue;
        }
        let of_cause: Vec<&Mfs> = learnt
            .iter()
            .filter(|mfs| model.cause(&mfs.anchor) == Some(cause))
            .collect();
        let regions: Vec<Region> = of_cause
            .iter()
            .map(|mfs| mfs.region(&model.space))
            .collect();
        let draw = |region: &Region, count: usize, rng: &mut Pcg64| -> Vec<Point> {
            (0..count)
                .filter_map(|_| region.sample(&model.space, rng))
                .collect()
        };
        let spoken: Vec<Point> = regions
            .iter()
            .flat_map(|region| draw(region, COMPARED / regions.len(), &mut rng))
            .collect();
        let truth = draw(&mechanism.region, COMPARED, &mut rng);
        let share = |points: &[Point], within: &dyn Fn(&Point) -> bool| {
            points.iter().filter(|point| within(point)).count() as f64 / points.len().max(1) as f64
        };
        let precision =
            (!spoken.is_empty()).then(|| share(&spoken, &|point| mechanism.fires(point)));
        let recall = share(&truth, &|point| {
            regions.iter().any(|region| region.contains(point))
        });
        scores.push((
            precision,
            recall,
            of_cause.iter().map(|mfs| mfs.probes).sum(),
        ));
    }
    Run {
        found_s,
        verdicts,
        false_verdicts,
        learnt: scores,
    }
}

fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values
        .into_iter()
        .fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

fn summarise(model: &Model, strategy: Strategy, runs: &[Run], hours: f64) -> StrategyResult {
    let anomalies = model.mechanisms.len();
    let times: Vec<Vec<f64>> = runs
        .iter()
        .map(|run| {
            let mut times: Vec<f64> = run
                .found_s
                .iter()
                .flatten()
                .map(|seconds| seconds / 60.0)
                .collect();
            times.sort_by(f64::total_cmp);
            times
        })
        .collect();
    let share = |count: usize| count as f64 / runs.len().max(1) as f64;
    let kth = |k: usize| times.iter().filter_map(move |times| times.get(k).copied());
    let learnt = || runs.iter().flat_map(|run| &run.learnt);
    StrategyResult {
        name: strategy.name().to_owned(),
        found_mean: mean(times.iter().map(|times| times.len() as f64)).unwrap_or(0.0),
        found_min: times.iter().map(Vec::len).min().unwrap_or(0),
        minutes_to_kth: (0..anomalies).map(|k| mean(kth(k))).collect(),
        share_reaching_kth: (0..anomalies).map(|k| share(kth(k).count())).collect(),
        minutes_to_kth_at_least: (0..anomalies)
            .map(|k| {
                mean(
                    times
                        .iter()
                        .map(|times| times.get(k).copied().unwrap_or(hours * 60.0)),
                )
                .unwrap_or(0.0)
            })
            .collect(),
        found_share: (0..anomalies)
            .map(|i| {
                (
                    model.mechanisms[i].name.clone(),
                    share(runs.iter().filter(|run| run.found_s[i].is_some()).count()),
                )
            })
            .collect(),
        false_verdicts: runs.iter().map(|run| run.false_verdicts).sum::<usize>() as f64
            / runs.iter().map(|run| run.verdicts).sum::<usize>().max(1) as f64,
        mfs_precision: mean(learnt().filter_map(|(precision, ..)| *precision)),
        mfs_recall: mean(learnt().map(|(_, recall, _)| *recall)),
        probes_per_mfs: mean(learnt().map(|(.., probes)| *probes as f64)),
        probes: mean(runs.iter().map(|run| run.verdicts as f64)).unwrap_or(0.0),
    }
}
