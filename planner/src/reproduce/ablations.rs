//! Throughput over micro-batches and over attention replicas.

use crate::cost::Side;
use crate::deployment::Setting;
use crate::search::{Objective, judge};
use crate::{Deployment, Dtype, ModelShape, PlanError};

use super::{Assumptions, Figure, MODELS, Rows, SLO_S, figures};

/// GPUs of each side: half of the testbed's 64.
const HALF: usize = 32;

/// The ablations' deployment: half of the testbed on each side, one expert a worker, as many rows as saturate an expert (b_e = F/B, its rate by its
/// bandwidth), in `workers` attention workers or, if that is open, as many as balance the sides best (1).
fn halves(
    assumptions: &Assumptions,
    setting: Setting<'_>,
    workers: Option<usize>,
) -> Result<Deployment, PlanError> {
    let model = setting.model;
    let (_, gpu) = setting.hardware.gpu("A800")?;
    let side = |tp| Side {
        gpu: "A800".to_owned(),
        tp,
    };
    let reached = if assumptions.saturation_as_reached {
        let used = setting.hardware.efficiency_of(gpu);
        used.compute / used.memory
    } else {
        1.0
    };
    let saturating = reached * gpu.flops(Dtype::Bf16) / gpu.memory_bytes_per_s();
    let all = saturating * model.experts as f64 / model.top_k as f64;
    let mut best: Option<(f64, Deployment)> = None;
    for tp in [1, 2, 4, 8] {
        let attention_workers = HALF / tp;
        if workers.is_some_and(|workers| workers != attention_workers) {
            continue;
        }
        let deployment = Deployment {
            attention: side(tp),
            attention_workers,
            experts: side(HALF / model.experts),
            experts_per_worker: 1,
            expert_workers: model.experts,
            micro_batches: 3,
            rows: (all / attention_workers as f64).round() as usize,
        };
        let stages = deployment.outlook(setting, SLO_S)?.stages;
        let unbalance = (stages.attention_s / stages.expert_s).ln().abs();
        if best.as_ref().is_none_or(|(least, _)| unbalance < *least) {
            best = Some((unbalance, deployment));
        }
    }
    let (_, deployment) =
        best.ok_or_else(|| PlanError::Infeasible("the ablations' deployment".to_owned()))?;
    Ok(deployment)
}

/// Throughput over m, the micro-batch held constant.
pub(super) fn micro_batches(
    assumptions: &Assumptions,
    rows: &mut Rows,
) -> Result<Figure, PlanError> {
    let workload = assumptions.workload();
    let mut curves = Vec::new();
    for (name, third) in MODELS.into_iter().zip([1.10, 1.28, 1.38]) {
        let model = ModelShape::preset(name)?;
        let setting = assumptions.setting(&model, &workload, "m2n");
        let deployment = halves(assumptions, setting, None)?;
        let of = |m: usize| {
            let outlook = Deployment {
                micro_batches: m,
                ..deployment.clone()
            }
            .outlook(setting, SLO_S)?;
            Ok::<f64, PlanError>(outlook.tokens_per_s)
        };
        let speed = [of(1)?, of(2)?, of(3)?, of(4)?];
        for (more, paper) in [(1, 1.9), (2, third), (3, 1.0)] {
            rows.add(
                format!("{name}: m = {more} to {}", more + 1),
                paper,
                speed[more] / speed[more - 1],
            );
        }
        curves.push((
            name,
            (1..)
                .map(|m| m as f64)
                .zip(speed.map(|s| s / speed[0]))
                .collect(),
            vec![
                (1.0, 1.0),
                (2.0, 1.9),
                (3.0, 1.9 * third),
                (4.0, 1.9 * third),
            ],
        ));
    }
    Ok(figures::lines(
        "micro-batches",
        "Throughput over micro-batches in flight, by m = 1",
        "micro-batches",
        "throughput",
        curves,
    ))
}

/// DBRX: throughput, latency and throughput per GPU over attention replicas.
pub(super) fn attention_replicas(
    assumptions: &Assumptions,
    rows: &mut Rows,
) -> Result<Figure, PlanError> {
    let model = ModelShape::preset("dbrx")?;
    let workload = assumptions.workload();
    let setting = assumptions.setting(&model, &workload, "m2n");
    // Eight replicas are the other half of the testbed.
    let full = halves(assumptions, setting, Some(8))?;
    let counts: Vec<usize> = (1..=16).collect();
    let all = counts.iter().map(|&attention_workers| {
        let deployment = Deployment {
            attention_workers,
            ..full.clone()
        };
        judge(setting, deployment, SLO_S)
    });
    let all = all.collect::<Result<Vec<_>, _>>()?;
    let per_gpu = |count: usize| all[count - 1].rates.score(Objective::PerGpu);
    let speed = |count: usize| all[count - 1].rates.tokens_per_s;
    let step = |count: usize| all[count - 1].outlook.step_s;
    rows.add(
        "dbrx: throughput of 4 attention replicas by 1",
        4.0,
        speed(4) / speed(1),
    );
    rows.add(
        "dbrx: latency of 4 attention replicas by 1",
        1.0,
        step(4) / step(1),
    );
    let best = counts
        .iter()
        .copied()
        .max_by(|&a, &b| per_gpu(a).total_cmp(&per_gpu(b)))
        .unwrap_or(1);
    rows.add(
        "dbrx: attention replicas with most throughput per GPU",
        8.0,
        best as f64,
    );
    let curve =
        |value: &dyn Fn(usize) -> f64| counts.iter().map(|&n| (n as f64, value(n))).collect();
    Ok(figures::lines(
        "attention-replicas",
        "DBRX over attention replicas: throughput per GPU (by its peak) and latency (by one replica's)",
        "attention replicas",
        "relative",
        vec![
            (
                "per GPU",
                curve(&|n| per_gpu(n) / per_gpu(best)),
                vec![(8.0, 1.0)],
            ),
            (
                "latency",
                curve(&|n| step(n) / step(1)),
                vec![(1.0, 1.0), (2.0, 1.0), (4.0, 1.0)],
            ),
        ],
    ))
}
