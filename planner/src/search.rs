//! The plan search (MegaScale-Infer, algorithm 1): over pairs of GPU types, tensor parallelism of both sides, experts of a worker,
//! micro-batches and attention workers, the largest batch that memory and the time between tokens allow.
//!
//! Two departures from the paper, both towards exactness. Its conditions 2 and 3 are no filter: the exact T_total prices what
//! idles where they are broken. And n_a is not read off the balance of the two sides, but climbed to: balance is where the climb ends unless memory,
//! the network or whole workers forbid it.

use serde::Serialize;

use crate::colocated::{self, Colocated};
use crate::cost::Side;
use crate::deployment::{Binding, Deployment, Evaluator, MemoryUse, Outlook, Setting};
use crate::{Hardware, PlanError};

/// Tensor parallelism that is tried.
const TENSOR_PARALLEL: [usize; 4] = [1, 2, 4, 8];
/// Micro-batches that are tried.
const MICRO_BATCHES: [usize; 4] = [1, 2, 3, 4];
/// Most rows of an attention worker in a micro-batch.
const ROWS_MAX: usize = 1 << 14;
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

/// GPUs that are left.
#[derive(Debug, Clone)]
struct Stock {
    all: usize,
    of: std::collections::BTreeMap<String, usize>,
}

impl Stock {
    fn of(hardware: &Hardware, request: &Request) -> Self {
        let available = hardware.gpus.iter();
        Self {
            all: request.gpus.unwrap_or(usize::MAX),
            of: available
                .filter_map(|(name, gpu)| Some((name.clone(), gpu.available?)))
                .collect(),
        }
    }

    fn is_bounded(&self) -> bool {
        self.all != usize::MAX || !self.of.is_empty()
    }

    fn left(&self, gpu: &str) -> usize {
        self.of
            .get(gpu)
            .copied()
            .unwrap_or(usize::MAX)
            .min(self.all)
    }

    /// How often a deployment fits.
    fn replicas(&self, deployment: &Deployment) -> usize {
        let (attention, experts) = (&deployment.attention.gpu, &deployment.experts.gpu);
        let all = self.all / deployment.gpus();
        if attention == experts {
            return all.min(self.left(attention) / deployment.gpus());
        }
        all.min(self.left(attention) / deployment.attention_gpus())
            .min(self.left(experts) / deployment.expert_gpus())
    }

    fn take(&mut self, deployment: &Deployment, replicas: usize) {
        if self.all != usize::MAX {
            self.all -= replicas * deployment.gpus();
        }
        for (gpu, count) in [
            (&deployment.attention.gpu, deployment.attention_gpus()),
            (&deployment.experts.gpu, deployment.expert_gpus()),
        ] {
            if let Some(left) = self.of.get_mut(gpu) {
                *left -= replicas * count;
            }
        }
    }
}

/// Fills a bounded fleet with replicas of the best deployment, what is left with the best for what is left, and so on.
fn fleet(
    setting: Setting<'_>,
    request: &Request,
    first: &Candidate,
) -> Result<Vec<Share>, PlanError> {
    let mut stock = Stock::of(setting.hardware, request);
    let mut shares = Vec::new();
    if !stock.is_bounded() {
        return Ok(shares);
    }
    let mut next = Some(first.clone());
    while let Some(candidate) = next {
        let replicas = stock.replicas(&candidate.deployment);
        if replicas == 0 || replicas == usize::MAX {
            break;
        }
        stock.take(&candidate.deployment, replicas);
        shares.push(Share {
            replicas,
            candidate,
        });
        next = best_of_pairs(setting, request, &stock)?.into_iter().next();
    }
    Ok(shares)
}

/// The best candidate of each pair of GPU types, best first.
fn best_of_pairs(
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

/// The largest b_a that memory and the step time allow, what bounds it, and the step time. `None` if one row is too many.
fn largest_rows(
    evaluator: &Evaluator<'_>,
    n_a: usize,
    held: usize,
    m: usize,
    slo_s: f64,
) -> Option<(usize, Binding, f64)> {
    let fits = |rows: usize| evaluator.fits(n_a, held, m, rows as f64);
    fits(1).ok()?;
    // Memory is linear in the rows, and the step time does not fall with them.
    let room = |at: &dyn Fn(f64) -> MemoryUse| {
        let (none, one) = (at(0.0), at(1.0));
        ((none.usable - none.total()) / (one.total() - none.total())).floor()
    };
    let attention = room(&|rows| evaluator.attention_memory(held, m, rows));
    let experts = room(&|rows| evaluator.expert_memory(n_a, held, m, rows));
    let within = (attention.min(experts) as usize).clamp(1, ROWS_MAX);
    let step = |rows: usize| {
        let stages = evaluator.stages(n_a, held, rows as f64);
        evaluator.step_s(&stages, m, rows as f64)
    };
    let at_memory = step(within);
    if at_memory <= slo_s {
        let binding = fits(within + 1).err().unwrap_or(Binding::AttentionMemory);
        return Some((within, binding, at_memory));
    }
    let at_one = step(1);
    if at_one > slo_s {
        return None;
    }
    // Nearly a line, so a guess by proportion is close; every third is the middle, should it bend.
    let (mut low, mut high) = ((1, at_one), (within, at_memory));
    for round in 1.. {
        let width = high.0 - low.0;
        if width <= 1 {
            break;
        }
        let share = if round % 3 == 0 {
            0.5
        } else {
            (slo_s - low.1) / (high.1 - low.1)
        };
        let guess = (low.0 + (width as f64 * share) as usize).clamp(low.0 + 1, high.0 - 1);
        let found = (guess, step(guess));
        if found.1 <= slo_s {
            low = found;
            // Most often the next one is too many already.
            let next = (guess + 1, step(guess + 1));
            if next.1 > slo_s {
                break;
            }
            low = next;
        } else {
            high = found;
        }
    }
    Some((low.0, Binding::StepTime, low.1))
}

fn divisors(number: usize) -> Vec<usize> {
    (1..=number).filter(|d| number.is_multiple_of(*d)).collect()
}

/// Which constraint to relax, and by how much: the step time first, then the number of GPUs, then memory.
fn why_not(setting: Setting<'_>, request: &Request) -> Result<PlanError, PlanError> {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
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
