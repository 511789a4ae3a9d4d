//! What a plan has to beat: attention and experts on the same GPUs.
//!
//! Two forms. *Tensor parallel*: every product of a layer is divided over the GPUs of a stage, as vLLM and TensorRT-LLM serve one or two servers; more than one
//! stage is a pipeline of layers. *Expert parallel*: attention is replicated in groups, experts are spread over all GPUs, and rows go there and back over the
//! links of a server and the network, in one or two micro-batches.

use serde::Serialize;

use crate::cost::{AttentionCost, ExpertCost, LinkCost, workers_visited};
use crate::deployment::Setting;
use crate::search::{Rates, Request};
use crate::{Efficiency, Gpu, PlanError};

/// GPUs of a tensor-parallel replica.
const TENSOR_PARALLEL: [usize; 5] = [1, 2, 4, 8, 16];
/// GPUs of an expert-parallel replica.
const EXPERT_PARALLEL: [usize; 6] = [8, 16, 32, 64, 128, 256];
/// Sequences at once at most.
const BATCH_MAX: usize = 1 << 20;

/// How a replica divides the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Division {
    /// Every product over all GPUs of a stage.
    Tensors {
        /// Stages that the layers are divided into, each with a micro-batch at any time; 1 is no pipeline.
        stages: usize,
    },
    /// Experts over all GPUs, attention in groups of `tp`, so many micro-batches.
    Experts {
        /// GPUs of an attention group.
        tp: usize,
        /// Micro-batches: two overlap network and computing.
        micro_batches: usize,
    },
}

/// A colocated deployment and what it will deliver.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Colocated {
    /// The GPU type.
    pub gpu: String,
    /// GPUs of a replica.
    pub gpus: usize,
    /// How the model is divided.
    pub division: Division,
    /// Sequences at once.
    pub batch: usize,
    /// Time between tokens, in seconds.
    pub step_s: f64,
    /// What it makes and costs.
    pub rates: Rates,
}

/// The best colocated deployment on any GPU type that a request allows on either side. `None` if nothing fits.
///
/// # Errors
/// A GPU or transport is not in the catalogue.
pub fn best(setting: Setting<'_>, request: &Request) -> Result<Option<Colocated>, PlanError> {
    let asked = || request.attention_gpus.iter().chain(&request.expert_gpus);
    let mut all = Vec::new();
    for (name, gpu) in &setting.hardware.gpus {
        if asked().next().is_some() && !asked().any(|asked| asked.eq_ignore_ascii_case(name)) {
            continue;
        }
        let most = request
            .gpus
            .unwrap_or(usize::MAX)
            .min(gpu.available.unwrap_or(usize::MAX));
        let used = setting.hardware.efficiency_of(gpu);
        for gpus in TENSOR_PARALLEL.into_iter().filter(|&gpus| gpus <= most) {
            for stages in [1, 2, 4] {
                all.extend(tensor_parallel(
                    setting,
                    name,
                    &used,
                    (gpus, stages),
                    request.slo_s,
                )?);
            }
        }
        for gpus in EXPERT_PARALLEL.into_iter().filter(|&gpus| gpus <= most) {
            for tp in [1, 2, 4, 8].into_iter().filter(|&tp| tp <= gpu.node_gpus) {
                for micro_batches in [1, 2] {
                    all.extend(expert_parallel(
                        setting,
                        name,
                        &used,
                        (gpus, tp, micro_batches),
                        request.slo_s,
                    )?);
                }
            }
        }
    }
    let score = |c: &Colocated| c.rates.score(request.objective);
    Ok(all.into_iter().max_by(|a, b| score(a).total_cmp(&score(b))))
}

/// `gpus` in `stages` of a pipeline of layers, every product divided over the GPUs of its stage. `None` if it does not divide, does not fit or is too
/// slow. `used` is what its kernels reach.
///
/// # Errors
/// The GPU or the transport is not in the catalogue.
pub fn tensor_parallel(
    setting: Setting<'_>,
    name: &str,
    used: &Efficiency,
    (gpus, stages): (usize, usize),
    slo_s: f64,
) -> Result<Option<Colocated>, PlanError> {
    let Setting {
        hardware,
        model,
        precision,
        workload,
        ..
    } = setting;
    let (name, gpu) = hardware.gpu(name)?;
    if stages == 0 || !gpus.is_multiple_of(stages) {
        return Ok(None);
    }
    let tp = gpus / stages;
    let attention = AttentionCost::roofline(gpu, used, model, precision, tp);
    let experts = ExpertCost::colocated(gpu, used, model, precision, tp);
    let link = LinkCost::new(hardware.transport(setting.transport)?, gpu, tp);
    let context = model.cached_tokens(workload.mean_context());
    // A micro-batch for each stage goes round: every stage computes all the time, and a token takes as long as all stages and the hops between them.
    let step = |batch: usize| {
        let rows = batch as f64 / stages as f64;
        let (cached, visits) = (
            rows * context,
            rows * model.top_k as f64 / model.experts as f64,
        );
        let layer = attention.layer_s(rows, cached) + experts.even_layer_s(model.experts, visits);
        let dense = if model.dense_layers == 0 {
            0.0
        } else {
            attention.dense_layer_s(rows, cached)
        };
        let hops = if stages == 1 {
            0.0
        } else {
            stages as f64 * link.hop_s(rows * model.hidden as f64 * precision.combine.bytes(), 1)
        };
        model.moe_layers as f64 * layer
            + model.dense_layers as f64 * dense
            + attention.step_s(rows)
            + hops
    };
    let weights = model.attention_side_weights() * precision.attention.bytes()
        + model.all_expert_weights() * precision.experts.bytes();
    let cached = model.attention.cached_elements(tp) * model.layers() as f64 * precision.kv.bytes()
        / stages as f64;
    let memory = |batch: usize| {
        let rows = batch as f64;
        weights / gpus as f64 + rows * (context * cached + scratch(setting, tp) / stages as f64)
    };
    let usable = gpu.memory_bytes() * used.memory_usable;
    let found = largest_batch(stages, slo_s, &step, &|batch| memory(batch) <= usable);
    let division = Division::Tensors { stages };
    Ok(found.map(|batch| of(name, gpu, gpus, division, batch, step(batch))))
}

/// Experts spread over `gpus`, attention in groups of `tp`, in so many micro-batches. `None` if it does not divide, does not fit or is too slow. `used` is what
/// its kernels reach.
///
/// # Errors
/// The GPU or the transport is not in the catalogue.
pub fn expert_parallel(
    setting: Setting<'_>,
    name: &str,
    used: &Efficiency,
    (gpus, tp, micro_batches): (usize, usize, usize),
    slo_s: f64,
) -> Result<Option<Colocated>, PlanError> {
    let Setting {
        hardware,
        model,
        precision,
        workload,
        ..
    } = setting;
    let (name, gpu) = hardware.gpu(name)?;
    if !model.experts.is_multiple_of(gpus) || !gpus.is_multiple_of(tp) {
        return Ok(None);
    }
    let held = model.experts / gpus;
    let groups = gpus / tp;
    let attention = AttentionCost::roofline(gpu, used, model, precision, tp);
    let experts = ExpertCost::roofline(gpu, used, model, precision, 1);
    let link = LinkCost::new(hardware.transport(setting.transport)?, gpu, 1);
    let context = model.cached_tokens(workload.mean_context());
    let copies = workers_visited(model.experts, model.top_k, held);
    // Of what a GPU sends, as much as goes to its own server takes the links there, beside the network.
    let near = gpus.min(gpu.node_gpus);
    let far_share = 1.0 - near as f64 / gpus as f64;
    let near_share = (near - 1) as f64 / gpus as f64;
    let near_bytes_per_s = gpu.node_link_bytes_per_s() * used.node_link;
    let hop_s = |bytes: f64| {
        let inside = used.collective_us * 1e-6 + bytes * near_share / near_bytes_per_s;
        if far_share > 0.0 {
            inside.max(link.hop_s(bytes * far_share, gpus - near))
        } else {
            inside
        }
    };
    let m = micro_batches as f64;
    let step = |batch: usize| {
        // Rows of a micro-batch in each group, and on each GPU.
        let rows = batch as f64 / m / groups as f64;
        let cached = rows * context;
        let own = batch as f64 / m / gpus as f64;
        let hidden = model.hidden as f64;
        let (dispatch, combine) = (
            hop_s(own * copies * hidden * precision.dispatch.bytes()),
            hop_s(own * model.top_k as f64 * hidden * precision.combine.bytes()),
        );
        let visits =
            batch as f64 / m * model.top_k as f64 / model.experts as f64 * workload.imbalance;
        let compute = attention.layer_s(rows, cached) + experts.even_layer_s(held, visits);
        // A GPU computes one micro-batch while the other's rows travel.
        let layer = (m * compute).max(compute + dispatch + combine);
        let dense = if model.dense_layers == 0 {
            0.0
        } else {
            attention.dense_layer_s(rows, cached)
        };
        model.moe_layers as f64 * layer
            + m * (model.dense_layers as f64 * dense + attention.step_s(rows))
    };
    let weights = model.attention_side_weights() * precision.attention.bytes() / tp as f64
        + model.all_expert_weights() * precision.experts.bytes() / gpus as f64;
    let cached = model.attention.cached_elements(tp) * model.layers() as f64 * precision.kv.bytes();
    let memory = |batch: usize| {
        let rows = batch as f64 / groups as f64;
        weights + rows * (context * cached + scratch(setting, tp))
    };
    let usable = gpu.memory_bytes() * used.memory_usable;
    let whole = micro_batches * groups;
    let found = largest_batch(whole, slo_s, &step, &|batch| memory(batch) <= usable);
    let division = Division::Experts { tp, micro_batches };
    Ok(found.map(|batch| of(name, gpu, gpus, division, batch, step(batch))))
}

/// Bytes of activations for each sequence on each of `tp` GPUs.
fn scratch(setting: Setting<'_>, tp: usize) -> f64 {
    let model = setting.model;
    5.0 * model.hidden as f64 * 4.0 + model.vocab as f64 * 4.0 / tp as f64
}

/// The largest multiple of `whole` that fits and is in time.
fn largest_batch(
    whole: usize,
    slo_s: f64,
    step: &dyn Fn(usize) -> f64,
    fits: &dyn Fn(usize) -> bool,
) -> Option<usize> {
    let good = |count: usize| fits(count * whole) && step(count * whole) <= slo_s;
    if !good(1) {
        return None;
    }
    let (mut low, mut high) = (1, BATCH_MAX / whole + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if good(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    Some(low * whole)
}

fn of(
    name: &str,
    gpu: &Gpu,
    gpus: usize,
    division: Division,
    batch: usize,
    step_s: f64,
) -> Colocated {
    Colocated {
        gpu: name.to_owned(),
        gpus,
        division,
        batch,
        step_s,
        rates: Rates {
            tokens_per_s: batch as f64 / step_s,
            gpus,
            price: gpus as f64 * gpu.price,
            watts: gpus as f64 * gpu.power_w,
        },
    }
}
