//! The search over pairs of GPU types, and within each over tensor parallelism, experts of a worker, micro-batches and attention workers.

use super::fleet::Stock;
use super::rows::largest_rows;
use super::{Binding, Candidate, Request, rates};
use crate::cost::Side;
use crate::deployment::{Evaluator, Setting};
use crate::search::Rates;
use crate::{Deployment, PlanError};

/// Tensor parallelism that is tried.
pub(super) const TENSOR_PARALLEL: [usize; 4] = [1, 2, 4, 8];
/// Micro-batches that are tried.
pub(super) const MICRO_BATCHES: [usize; 4] = [1, 2, 3, 4];

/// The best candidate of each pair of GPU types, best first.
pub(super) fn best_of_pairs(
    setting: Setting<'_>,
    request: &Request,
    stock: &Stock,
) -> Result<Vec<Candidate>, PlanError> {
    let side = |names: &[String]| -> Result<Vec<String>, PlanError> {
        if names.is_empty() {
            return Ok(setting.hardware.gpus.keys().cloned().collect());
        }
        let known = names.iter().map(|name| setting.hardware.gpu(name));
        known.map(|found| Ok(found?.0.to_owned())).collect()
    };
    let (attention, experts) = (side(&request.attention_gpus)?, side(&request.expert_gpus)?);
    let pairs: Vec<(&str, &str)> = attention
        .iter()
        .flat_map(|a| experts.iter().map(move |e| (a.as_str(), e.as_str())))
        .collect();
    // Pairs are independent; each core takes every so-manieth.
    let cores = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(pairs.len().max(1));
    let found: Vec<Result<Vec<Candidate>, PlanError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores)
            .map(|core| {
                let mine = pairs.iter().skip(core).step_by(cores);
                scope.spawn(move || {
                    let best = mine.map(|&pair| best_of_pair(setting, request, stock, pair));
                    best.filter_map(Result::transpose).collect()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a search does not panic"))
            .collect()
    });
    let mut best = found.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
    best.sort_by(|a, b| {
        let score = |c: &Candidate| c.rates.score(request.objective);
        score(b).total_cmp(&score(a))
    });
    Ok(best)
}

fn best_of_pair(
    setting: Setting<'_>,
    request: &Request,
    stock: &Stock,
    (attention, experts): (&str, &str),
) -> Result<Option<Candidate>, PlanError> {
    let (_, attention_gpu) = setting.hardware.gpu(attention)?;
    let (_, expert_gpu) = setting.hardware.gpu(experts)?;
    let side = |gpu: &str, tp| Side {
        gpu: gpu.to_owned(),
        tp,
    };
    let mut best: Option<(f64, Deployment, Binding)> = None;
    for tp_a in TENSOR_PARALLEL
        .into_iter()
        .filter(|&tp| tp <= attention_gpu.node_gpus)
    {
        for tp_e in TENSOR_PARALLEL
            .into_iter()
            .filter(|&tp| tp <= expert_gpu.node_gpus)
        {
            let (a, e) = (side(attention, tp_a), side(experts, tp_e));
            let evaluator = Evaluator::new(setting, &a, &e)?;
            for held in divisors(setting.model.experts) {
                let expert_workers = setting.model.experts / held;
                if evaluator.fits(1, held, 1, 1.0).is_err() {
                    continue;
                }
                for m in MICRO_BATCHES {
                    let deployment = |n_a: usize, rows: usize| Deployment {
                        attention: a.clone(),
                        attention_workers: n_a,
                        experts: e.clone(),
                        experts_per_worker: held,
                        expert_workers,
                        micro_batches: m,
                        rows,
                    };
                    let price = |n_a: usize| {
                        let (n_a, n_e) = ((n_a * tp_a) as f64, (expert_workers * tp_e) as f64);
                        Rates {
                            tokens_per_s: 1.0,
                            gpus: (n_a + n_e) as usize,
                            price: n_a * attention_gpu.price + n_e * expert_gpu.price,
                            watts: n_a * attention_gpu.power_w + n_e * expert_gpu.power_w,
                        }
                        .score(request.objective)
                    };
                    // What n_a attention workers earn, and with which rows.
                    let mut climb = |n_a: usize| -> f64 {
                        if n_a > request.attention_workers_max
                            || stock.replicas(&deployment(n_a, 1)) == 0
                        {
                            return 0.0;
                        }
                        let Some((rows, binding, step_s)) =
                            largest_rows(&evaluator, n_a, held, m, request.slo_s)
                        else {
                            return 0.0;
                        };
                        let score = (n_a * m * rows) as f64 / step_s * price(n_a);
                        if best.as_ref().is_none_or(|(top, ..)| score > *top) {
                            best = Some((score, deployment(n_a, rows), binding));
                        }
                        score
                    };
                    climb_workers(&mut climb);
                }
            }
        }
    }
    let Some((_, deployment, binding)) = best else {
        return Ok(None);
    };
    let outlook = deployment.outlook(setting, request.slo_s)?;
    Ok(Some(Candidate {
        rates: rates(setting.hardware, &deployment, outlook.tokens_per_s)?,
        deployment,
        outlook,
        binding,
    }))
}

/// Doubles n_a while that helps, then halves the strides around the best.
fn climb_workers(score: &mut dyn FnMut(usize) -> f64) {
    let (mut at, mut top) = (1, score(1));
    let mut next = 2;
    // One worker may be too few for anything (the sum of experts' prices is high), so two doublings in vain are allowed.
    let mut vain = 0;
    while vain < 2 && next <= 1 << 12 {
        let found = score(next);
        if found > top {
            (at, top, vain) = (next, found, 0);
        } else {
            vain += 1;
        }
        next *= 2;
    }
    let mut stride = at / 2;
    while stride >= 1 {
        for candidate in [at.saturating_sub(stride).max(1), at + stride] {
            let found = score(candidate);
            if found > top {
                (at, top) = (candidate, found);
            }
        }
        stride /= 2;
    }
}

/// Numbers that divide it: as many experts may be on each worker.
pub(super) fn divisors(number: usize) -> Vec<usize> {
    (1..=number).filter(|d| number.is_multiple_of(*d)).collect()
}
