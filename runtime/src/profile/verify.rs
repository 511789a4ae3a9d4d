//! Prediction meets reality: step times that the profile foretells beside those of real clusters on this machine.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use volley_planner::{Local, ModelShape, Profile};

use super::runtime;
use crate::failure::Failure;
use crate::launch::Launch;
use crate::load::Load;
use crate::progress::LoadDisplay;
use crate::stats::Summary;

/// Attention and expert workers.
const SHAPES: [(u16, u16); 4] = [(1, 1), (1, 2), (2, 1), (2, 2)];
/// Micro-batches.
const MICRO_BATCHES: [u8; 3] = [1, 2, 3];
/// Sequences at once.
const BATCHES: [u32; 3] = [1, 8, 32];
/// Tokens of each prompt.
const INPUT: u32 = 16;
/// Steps in which all sequences of a case decode, about: they begin one after the other, a step apart.
const STEPS: u32 = 12;
/// Runs of each case; the median counts.
const RUNS: u64 = 2;

/// One case.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Case {
    local: Local,
    foretold_s: f64,
    measured_s: f64,
}

impl Case {
    fn error(&self) -> f64 {
        self.foretold_s / self.measured_s - 1.0
    }
}

/// Runs every case.
pub(super) fn run(
    launch: &Launch,
    model: &ModelShape,
    profile: &Profile,
) -> Result<Vec<Case>, Failure> {
    let mut cases = Vec::new();
    for (attention, experts) in SHAPES {
        if usize::from(experts) > model.experts {
            continue;
        }
        for micro_batches in MICRO_BATCHES {
            let mut launch = Launch {
                model: launch.model.clone(),
                settings: launch.settings.clone(),
                memory: launch.memory.clone(),
            };
            let cluster = &mut launch.settings.cluster;
            cluster.attention_workers = attention;
            cluster.expert_workers = experts;
            cluster.micro_batches = micro_batches;
            let started = launch.start_cluster(&Arc::new(LoadDisplay::new()))?;
            let (cluster, _children) = (started.cluster, started.children);
            let runtime = runtime()?;
            for batch in BATCHES {
                let mut steps = Vec::new();
                for seed in 1..=RUNS {
                    let load = Load {
                        batch,
                        input: INPUT,
                        output: batch + STEPS,
                        seed,
                    };
                    let observed = runtime.block_on(load.run(&cluster.client(), model.vocab))?;
                    steps.extend(observed.full_gaps());
                }
                let local = Local {
                    attention_workers: attention.into(),
                    expert_workers: experts.into(),
                    micro_batches: micro_batches.into(),
                    batch: batch as usize,
                    context: f64::from(INPUT) + f64::from(batch + STEPS) / 2.0,
                };
                let case = Case {
                    local,
                    foretold_s: local.step_s(profile, model),
                    measured_s: Summary::of(steps).median,
                };
                cases.push(case);
            }
            cluster.shutdown(Duration::ZERO);
        }
    }
    Ok(cases)
}

/// As Markdown.
pub(super) fn table(cases: &[Case]) -> String {
    if cases.is_empty() {
        return String::new();
    }
    let mut text =
        "\n| M x N | m | batch | foretold ms | measured ms | off by |\n|---|---|---|---|---|---|\n"
            .to_owned();
    for case in cases {
        let local = &case.local;
        text += &format!(
            "| {} x {} | {} | {} | {:.3} | {:.3} | {:+.0} % |\n",
            local.attention_workers,
            local.expert_workers,
            local.micro_batches,
            local.batch,
            case.foretold_s * 1e3,
            case.measured_s * 1e3,
            100.0 * case.error()
        );
    }
    let near = cases
        .iter()
        .filter(|case| case.error().abs() <= 0.15)
        .count();
    text + &format!("\n{near} of {} within 15 %\n", cases.len())
}
