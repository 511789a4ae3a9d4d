//! Why there is no plan: which constraint to relax, and by how much.

use super::fleet::Stock;
use super::pairs::{TENSOR_PARALLEL, best_of_pairs, divisors};
use super::{Candidate, Request};
use crate::deployment::{Evaluator, Setting};
use crate::{Deployment, PlanError};

/// Which constraint to relax, and by how much: the step time first, then the number of GPUs, then memory.
pub(super) fn why_not(setting: Setting<'_>, request: &Request) -> Result<PlanError, PlanError> {
    let try_with = |request: &Request, stock: &Stock| best_of_pairs(setting, request, stock);
    let stock = Stock::of(setting.hardware, request);
    let model = &setting.model.name;
    let patient = Request {
        slo_s: f64::MAX,
        ..request.clone()
    };
    if let Some(least_s) = fastest_step_s(setting, request, &stock)? {
        return Ok(PlanError::Infeasible(format!(
            "{:.3} ms between tokens is less than any GPU allowed reaches for {model}, even with one row in one micro-batch: {:.3} ms, {:.1} us a layer; \
             raise --slo-tpot to {:.2}ms or more, or allow GPUs with more memory bandwidth",
            request.slo_s * 1e3,
            least_s * 1e3,
            least_s * 1e6 / setting.model.layers() as f64,
            (least_s * 1e5).ceil() / 100.0,
        )));
    }
    let unbounded = Stock {
        all: usize::MAX,
        of: Default::default(),
    };
    let roomy = Request {
        gpus: None,
        ..patient
    };
    if let Some(least) = try_with(&roomy, &unbounded)?
        .iter()
        .flat_map(|candidate| smallest(setting, candidate))
        .map(|deployment| deployment.gpus())
        .min()
    {
        return Ok(PlanError::Infeasible(format!(
            "the GPUs there are do not hold one replica of {model}; allow {least} or more (--gpus, or `available` in the hardware file), or GPUs with more memory"
        )));
    }
    let weights = setting.model.all_expert_weights() * setting.precision.experts.bytes()
        / 1e9
        / setting.model.experts as f64;
    let attention =
        setting.model.attention_side_weights() * setting.precision.attention.bytes() / 1e9;
    Ok(PlanError::Infeasible(format!(
        "no GPU allowed has the memory for {model}: one expert of all layers takes {weights:.1} GB and an attention worker {attention:.1} GB, divided by at most {} GPUs of a server; \
         allow GPUs with more memory, or a smaller --dtype",
        TENSOR_PARALLEL[TENSOR_PARALLEL.len() - 1]
    )))
}

/// The shortest step of any deployment that fits and is there. One attention worker with one row is the fastest of all.
fn fastest_step_s(
    setting: Setting<'_>,
    request: &Request,
    stock: &Stock,
) -> Result<Option<f64>, PlanError> {
    let patient = Request {
        slo_s: f64::MAX,
        attention_workers_max: 1,
        ..request.clone()
    };
    let mut least = None;
    for candidate in best_of_pairs(setting, &patient, stock)? {
        for deployment in smallest(setting, &candidate) {
            if stock.replicas(&deployment) > 0 {
                let step_s = deployment.outlook(setting, request.slo_s)?.step_s;
                least = Some(least.map_or(step_s, |least: f64| least.min(step_s)));
            }
        }
    }
    Ok(least)
}

/// Every replica of one attention worker with one row on a candidate's GPU types.
fn smallest(setting: Setting<'_>, candidate: &Candidate) -> Vec<Deployment> {
    let mut all = Vec::new();
    for tp_a in TENSOR_PARALLEL {
        for tp_e in TENSOR_PARALLEL {
            let (mut attention, mut experts) = (
                candidate.deployment.attention.clone(),
                candidate.deployment.experts.clone(),
            );
            (attention.tp, experts.tp) = (tp_a, tp_e);
            let Ok(evaluator) = Evaluator::new(setting, &attention, &experts) else {
                continue;
            };
            let fitting = divisors(setting.model.experts)
                .into_iter()
                .filter(|&held| evaluator.fits(1, held, 1, 1.0).is_ok());
            all.extend(fitting.map(|held| Deployment {
                attention: attention.clone(),
                attention_workers: 1,
                experts: experts.clone(),
                experts_per_worker: held,
                expert_workers: setting.model.experts / held,
                micro_batches: 1,
                rows: 1,
            }));
        }
    }
    all
}
