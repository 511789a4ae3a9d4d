//! The homogeneous testbed: decode per GPU, end to end, and what M2N adds.

use crate::search::{Objective, Rates, plan};
use crate::{Efficiency, ModelShape, PlanError};

use super::baseline::Baseline;
use super::{Assumptions, MODELS, Rows, prefill_gpu_s, request};

/// What we decode per GPU over a transport, with the plan that suits it.
fn ours(assumptions: &Assumptions, model: &ModelShape, transport: &str) -> Result<f64, PlanError> {
    let workload = assumptions.workload();
    let setting = assumptions.setting(model, &workload, transport);
    let best = plan(setting, &request("A800", "A800", Objective::PerGpu))?.best;
    Ok(per_gpu(&best.rates))
}

fn per_gpu(rates: &Rates) -> f64 {
    rates.score(Objective::PerGpu)
}

/// Decode per GPU against both baselines, and end to end.
pub(super) fn decode(assumptions: &Assumptions, rows: &mut Rows) -> Result<(), PlanError> {
    for name in MODELS {
        let model = ModelShape::preset(name)?;
        let of = |baseline: Baseline| {
            let best = baseline.best(assumptions, &model, "A800", Objective::PerGpu)?;
            Ok::<f64, PlanError>(per_gpu(&best.rates))
        };
        let ours = ours(assumptions, &model, "m2n")?;
        let (vllm, tensorrt) = (of(Baseline::Vllm)?, of(Baseline::TensorRt)?);
        let (paper_vllm, paper_tensorrt) = match name {
            "scaled-moe" => (7.11, 1.90),
            _ => (2.56, 1.28),
        };
        rows.add(
            format!("{name}: decode per GPU, by vLLM"),
            paper_vllm,
            ours / vllm,
        );
        rows.add(
            format!("{name}: decode per GPU, by TensorRT-LLM"),
            paper_tensorrt,
            ours / tensorrt,
        );
        if name == "mixtral-8x22b" {
            let (_, gpu) = assumptions.hardware.gpu("A800")?;
            let request_s = |used: Efficiency, per_gpu: f64| {
                prefill_gpu_s(assumptions, &model, gpu, &used)
                    + assumptions.answer_tokens() / per_gpu
            };
            let fused = assumptions.hardware.efficiency_of(gpu);
            let apart = Efficiency {
                fused_all_reduce: false,
                ..fused
            };
            rows.add(
                format!("{name}: end to end per GPU, by TensorRT-LLM"),
                1.18,
                request_s(apart, tensorrt) / request_s(fused, ours),
            );
        }
    }
    Ok(())
}

/// What disaggregation makes of vLLM's throughput over NCCL, and what M2N adds. The paper's two factors multiply to its gain of Scaled-MoE per GPU
/// (4.66 x 1.53 = 7.13), so these are that row's deployments.
pub(super) fn transport(assumptions: &Assumptions, rows: &mut Rows) -> Result<(), PlanError> {
    let model = ModelShape::preset("scaled-moe")?;
    let (m2n, nccl) = (
        ours(assumptions, &model, "m2n")?,
        ours(assumptions, &model, "nccl")?,
    );
    let vllm = Baseline::Vllm.best(assumptions, &model, "A800", Objective::PerGpu)?;
    rows.add(
        "scaled-moe: disaggregation over NCCL per GPU, by vLLM",
        4.66,
        nccl / per_gpu(&vllm.rates),
    );
    rows.add("scaled-moe: M2N by NCCL", 1.53, m2n / nccl);
    Ok(())
}
