//! The plan search (MegaScale-Infer, algorithm 1): over pairs of GPU types, tensor parallelism of both sides, experts of a worker,
//! micro-batches and attention workers, the largest batch that memory and the time between tokens allow.
//!
//! Two departures from the paper, both towards exactness. Its conditions 2 and 3 are no filter: the exact T_total prices what
//! idles where they are broken. And n_a is not read off the balance of the two sides, but climbed to: balance is where the climb ends unless memory,
//! the network or whole workers forbid it.

mod fleet;
mod infeasible;
mod pairs;
mod rows;

use serde::Serialize;

use self::fleet::{Stock, fleet};
use self::infeasible::why_not;
use self::pairs::best_of_pairs;

use crate::colocated::{self, Colocated};
use crate::deployment::{Binding, Deployment, Evaluator, Outlook, Setting};
use crate::{Hardware, PlanError};

/// Plans that are named beside the best.
const RUNNERS_UP: usize = 4;

/// What is made as large as possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Tokens per second by price.
    ThroughputPerCost,
    /// Tokens per second by GPU.
    PerGpu,
    /// Tokens per second by watt.
    PerWatt,
}

/// What a plan is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Longest time between two tokens, in seconds.
    pub slo_s: f64,
    /// What counts.
    pub objective: Objective,
    /// GPUs there are, of all types together.
    pub gpus: Option<usize>,
    /// GPU types of the attention side; all that are known if empty.
    pub attention_gpus: Vec<String>,
    /// GPU types of the expert side; all that are known if empty.
    pub expert_gpus: Vec<String>,
    /// Attention workers at most.
    pub attention_workers_max: usize,
}

/// What one replica costs, and what it makes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    /// Decoded tokens per second.
    pub tokens_per_s: f64,
    /// GPUs.
    pub gpus: usize,
    /// Price of all of them.
    pub price: f64,
    /// Power of all of them at most.
    pub watts: f64,
}

impl Rates {
    /// The figure that an objective compares.
    pub fn score(&self, objective: Objective) -> f64 {
        match objective {
            Objective::ThroughputPerCost => self.tokens_per_s / self.price,
            Objective::PerGpu => self.tokens_per_s / self.gpus as f64,
            Objective::PerWatt => self.tokens_per_s / self.watts,
        }
    }
}

/// One deployment with its outlook.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Candidate {
    /// The deployment.
    pub deployment: Deployment,
    /// What it will deliver.
    pub outlook: Outlook,
    /// What it costs.
    pub rates: Rates,
    /// What keeps its batch from growing.
    pub binding: Binding,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The best disaggregated deployment.
    pub best: Candidate,
    /// The next best ones, one for each other pair of GPU types.
    pub runners_up: Vec<Candidate>,
    /// The best deployment without disaggregation on the same GPU types.
    pub colocated: Option<Colocated>,
    /// Whether the best is better than colocation.
    pub disaggregate: bool,
    /// How the fleet is used, where it is bounded.
    pub fleet: Vec<Share>,
}

/// Replicas of one deployment in a bounded fleet.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Share {
    /// How many replicas.
    pub replicas: usize,
    /// Of this deployment.
    pub candidate: Candidate,
}

/// The best deployment for a request.
///
/// # Errors
/// [`PlanError::Infeasible`] says which constraint to relax, and by how much.
pub fn plan(setting: Setting<'_>, request: &Request) -> Result<Plan, PlanError> {
    setting.workload.check()?;
    if !(request.slo_s.is_finite() && request.slo_s > 0.0) {
        return Err(PlanError::invalid(
            "the time between tokens",
            format!("{} s is not a positive time", request.slo_s),
            "write, say, 150ms",
        ));
    }
    let best = best_of_pairs(setting, request, &Stock::of(setting.hardware, request))?;
    let Some(first) = best.first() else {
        return Err(why_not(setting, request)?);
    };
    let colocated = colocated::best(setting, request)?;
    let score = |rates: &Rates| rates.score(request.objective);
    let disaggregate = colocated
        .as_ref()
        .is_none_or(|colocated| score(&first.rates) > score(&colocated.rates));
    Ok(Plan {
        fleet: fleet(setting, request, first)?,
        runners_up: best.iter().skip(1).take(RUNNERS_UP).cloned().collect(),
        best: first.clone(),
        colocated,
        disaggregate,
    })
}

/// Price and power of a deployment.
fn rates(
    hardware: &Hardware,
    deployment: &Deployment,
    tokens_per_s: f64,
) -> Result<Rates, PlanError> {
    let (_, attention) = hardware.gpu(&deployment.attention.gpu)?;
    let (_, experts) = hardware.gpu(&deployment.experts.gpu)?;
    let sum = |a: f64, e: f64| {
        deployment.attention_gpus() as f64 * a + deployment.expert_gpus() as f64 * e
    };
    Ok(Rates {
        tokens_per_s,
        gpus: deployment.gpus(),
        price: sum(attention.price, experts.price),
        watts: sum(attention.power_w, experts.power_w),
    })
}

/// What one deployment delivers and costs, as the search would say it.
///
/// # Errors
/// A GPU or transport is not in the catalogue.
pub fn judge(
    setting: Setting<'_>,
    deployment: Deployment,
    slo_s: f64,
) -> Result<Candidate, PlanError> {
    let evaluator = Evaluator::new(setting, &deployment.attention, &deployment.experts)?;
    let outlook = evaluator.outlook(&deployment, slo_s);
    let more = evaluator.fits(
        deployment.attention_workers,
        deployment.experts_per_worker,
        deployment.micro_batches,
        (deployment.rows + 1) as f64,
    );
    Ok(Candidate {
        rates: rates(setting.hardware, &deployment, outlook.tokens_per_s)?,
        binding: more.err().unwrap_or(Binding::StepTime),
        deployment,
        outlook,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::pairs::{MICRO_BATCHES, TENSOR_PARALLEL, divisors};
    use super::rows::largest_rows;
    use super::*;
    use crate::cost::Side;
    use crate::deployment::Condition;
    use crate::{ModelShape, Precision, Workload};

    fn request(attention: &str, experts: &str) -> Request {
        let names = |name: &str| {
            name.split(',')
                .filter(|n| !n.is_empty())
                .map(str::to_owned)
                .collect()
        };
        Request {
            slo_s: 0.15,
            objective: Objective::ThroughputPerCost,
            gpus: None,
            attention_gpus: names(attention),
            expert_gpus: names(experts),
            attention_workers_max: 1024,
        }
    }

    fn with<T>(model: &str, then: impl FnOnce(Setting<'_>) -> T) -> T {
        then(Setting {
            hardware: &Hardware::embedded(),
            model: &ModelShape::preset(model).unwrap(),
            precision: &Precision::BF16,
            workload: &Workload::PAPER,
            transport: "m2n",
        })
    }

    #[test]
    fn a_plan_keeps_every_required_condition_and_one_more_row_breaks_one() {
        for model in ["mixtral-8x22b", "dbrx", "scaled-moe", "qwen3-30b-a3b"] {
            with(model, |setting| {
                let best = plan(setting, &request("H20", "L40S")).unwrap().best;
                let required = best.outlook.conditions.iter().filter(|c| c.required);
                assert!(required.clone().count() == 3 && required.clone().all(Condition::holds));
                let mut larger = best.deployment.clone();
                larger.rows += 1;
                let more = larger.outlook(setting, 0.15).unwrap();
                assert!(
                    more.conditions.iter().any(|c| c.required && !c.holds()),
                    "{model}"
                );
            });
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        /// The climb over n_a against trying every one.
        #[test]
        fn no_number_of_attention_workers_is_better(
            slo_ms in 30.0..300.0, mean_input in 10.0..4000.0,
            model in prop::sample::select(vec!["mixtral-8x22b", "dbrx"]),
            pair in prop::sample::select(vec![("H20", "L40S"), ("A800", "A800"), ("L20", "H800")]),
        ) {
            let hardware = Hardware::embedded();
            let model = ModelShape::preset(model).unwrap();
            let workload = Workload { mean_input, ..Workload::PAPER };
            let setting = Setting { hardware: &hardware, model: &model, precision: &Precision::BF16, workload: &workload, transport: "m2n" };
            let mut request = request(pair.0, pair.1);
            request.slo_s = slo_ms / 1e3;
            let Ok(plan) = plan(setting, &request) else { return Ok(()) };
            let best = plan.best.rates.score(request.objective);
            let side = |gpu: &str, tp| Side { gpu: gpu.to_owned(), tp };
            for tp_a in TENSOR_PARALLEL {
                for tp_e in TENSOR_PARALLEL {
                    for held in divisors(model.experts) {
                        for micro_batches in MICRO_BATCHES {
                            let (attention, experts) = (side(pair.0, tp_a), side(pair.1, tp_e));
                            let evaluator = Evaluator::new(setting, &attention, &experts).unwrap();
                            for n_a in 1..=40 {
                                let Some((rows, ..)) = largest_rows(&evaluator, n_a, held, micro_batches, request.slo_s) else { continue };
                                let deployment = Deployment {
                                    attention: attention.clone(), attention_workers: n_a, experts: experts.clone(),
                                    experts_per_worker: held, expert_workers: model.experts / held, micro_batches, rows,
                                };
                                let other = judge(setting, deployment, request.slo_s).unwrap();
                                let score = other.rates.score(request.objective);
                                // A climb by halved strides may end a step beside the top of a flat hill.
                                prop_assert!(score <= best * 1.01, "{score} {best} {:?}", other.deployment);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_met_is_said_with_the_amount() {
        with("mixtral-8x22b", |setting| {
            let said = |request: &Request| plan(setting, request).unwrap_err().to_string();
            let fast = said(&Request {
                slo_s: 1e-3,
                ..request("H20", "L40S")
            });
            assert!(fast.contains("raise --slo-tpot to "), "{fast}");
            let least: f64 = fast
                .split("raise --slo-tpot to ")
                .nth(1)
                .unwrap()
                .split("ms")
                .next()
                .unwrap()
                .parse()
                .unwrap();
            plan(
                setting,
                &Request {
                    slo_s: least / 1e3,
                    ..request("H20", "L40S")
                },
            )
            .unwrap();
            plan(
                setting,
                &Request {
                    slo_s: (least - 0.02) / 1e3,
                    ..request("H20", "L40S")
                },
            )
            .unwrap_err();
            let few = said(&Request {
                gpus: Some(3),
                ..request("A800", "A800")
            });
            assert!(few.contains("allow 5 or more"), "{few}");
        });
        let mut hardware = Hardware::embedded();
        hardware.gpus.get_mut("L4").unwrap().memory_gb = 2.0;
        let model = ModelShape::preset("mixtral-8x22b").unwrap();
        let setting = Setting {
            hardware: &hardware,
            model: &model,
            precision: &Precision::BF16,
            workload: &Workload::PAPER,
            transport: "m2n",
        };
        let small = plan(setting, &request("L4", "L4")).unwrap_err().to_string();
        assert!(
            small.contains("one expert of all layers takes 33.8 GB"),
            "{small}"
        );
    }

    #[test]
    fn a_fleet_is_filled_and_never_overdrawn() {
        let mut hardware = Hardware::embedded();
        for (gpu, available) in [("H20", 100), ("L40S", 300), ("A800", 64)] {
            hardware.gpus.get_mut(gpu).unwrap().available = Some(available);
        }
        let model = ModelShape::preset("dbrx").unwrap();
        let setting = Setting {
            hardware: &hardware,
            model: &model,
            precision: &Precision::BF16,
            workload: &Workload::PAPER,
            transport: "m2n",
        };
        let found = plan(setting, &request("H20,A800", "L40S,A800")).unwrap();
        assert!(found.fleet.len() > 1);
        for (gpu, available) in [("H20", 100), ("L40S", 300), ("A800", 64)] {
            let used: usize = found
                .fleet
                .iter()
                .map(|share| {
                    let d = &share.candidate.deployment;
                    let of = |name: &str, count: usize| {
                        if name == gpu {
                            share.replicas * count
                        } else {
                            0
                        }
                    };
                    of(&d.attention.gpu, d.attention_gpus()) + of(&d.experts.gpu, d.expert_gpus())
                })
                .sum();
            assert!(used <= available, "{gpu}: {used}");
        }
    }

    #[test]
    fn small_experts_on_one_large_gpu_are_better_together() {
        with("qwen3-30b-a3b", |setting| {
            let found = plan(setting, &request("H200", "H200")).unwrap();
            assert!(!found.disaggregate && found.colocated.is_some());
        });
        with("mixtral-8x22b", |setting| {
            assert!(plan(setting, &request("H20", "L40S")).unwrap().disaggregate);
        });
    }
}
