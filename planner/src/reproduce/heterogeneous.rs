//! H20 for attention and L40S for experts, by price and by watt, against baselines on H20.

use crate::search::{Objective, Rates, plan};
use crate::{Efficiency, Gpu, ModelShape, PlanError};

use super::baseline::Baseline;
use super::{Assumptions, Figure, MODELS, Rows, figures, prefill_gpu_s, request};

/// The gains of one model.
struct Gains {
    by_vllm: f64,
    by_tensorrt: f64,
    by_watt: f64,
    end_to_end: f64,
    end_to_end_by_watt: f64,
}

/// The paper gives the largest gain of its models; so do the rows.
pub(super) fn gains(assumptions: &Assumptions, rows: &mut Rows) -> Result<Figure, PlanError> {
    let mut bars = Vec::new();
    let mut all = Vec::new();
    for name in MODELS {
        let model = ModelShape::preset(name)?;
        let (gains, per_cost) = of_model(assumptions, &model)?;
        all.push(gains);
        bars.push((name, per_cost));
    }
    let most = |of: fn(&Gains) -> f64| all.iter().map(of).fold(0.0, f64::max);
    for (what, paper, ours) in [
        ("decode per cost, by vLLM on H20", 3.24, most(|g| g.by_vllm)),
        (
            "decode per cost, by TensorRT-LLM on H20",
            1.86,
            most(|g| g.by_tensorrt),
        ),
        (
            "decode per watt, by TensorRT-LLM on H20",
            1.80,
            most(|g| g.by_watt),
        ),
        ("end to end per cost", 1.66, most(|g| g.end_to_end)),
        ("end to end per watt", 1.72, most(|g| g.end_to_end_by_watt)),
    ] {
        rows.add(format!("H20 + L40S: {what} (most)"), paper, ours);
    }
    Ok(figures::bars(
        "per-cost",
        "Decode throughput per cost, tokens/s by price (L20 = 1)",
        &["H20 + L40S", "TensorRT-LLM on H20", "vLLM on H20"],
        bars,
    ))
}

/// Its gains, and throughput per cost of ours, TensorRT-LLM and vLLM.
fn of_model(assumptions: &Assumptions, model: &ModelShape) -> Result<(Gains, Vec<f64>), PlanError> {
    use Objective::{PerWatt, ThroughputPerCost};
    let workload = assumptions.workload();
    let setting = assumptions.setting(model, &workload, "m2n");
    let ours = |objective| {
        let plan = plan(setting, &request("H20", "L40S", objective))?;
        Ok::<Rates, PlanError>(plan.best.rates)
    };
    let of = |baseline: Baseline, objective| {
        let best = baseline.best(assumptions, model, "H20", objective)?;
        Ok::<Rates, PlanError>(best.rates)
    };
    let gain =
        |ours: &Rates, base: &Rates, objective| ours.score(objective) / base.score(objective);
    // What a request takes, of price or of watts, by seconds: its prompt and its tokens.
    let end_to_end = |ours: &Rates, base: &Rates, objective, each: fn(&Gpu) -> f64| {
        let prefill = |name: &str, may_fuse: bool| {
            let (_, gpu) = assumptions.hardware.gpu(name)?;
            let used = assumptions.hardware.efficiency_of(gpu);
            let used = Efficiency {
                fused_all_reduce: used.fused_all_reduce && may_fuse,
                ..used
            };
            Ok::<f64, PlanError>(prefill_gpu_s(assumptions, model, gpu, &used) * each(gpu))
        };
        let least = prefill("H20", true)?.min(prefill("L40S", true)?);
        let decode = |rates: &Rates| assumptions.answer_tokens() / rates.score(objective);
        Ok::<f64, PlanError>((prefill("H20", false)? + decode(base)) / (least + decode(ours)))
    };
    let (cost, watts) = (ours(ThroughputPerCost)?, ours(PerWatt)?);
    let vllm = of(Baseline::Vllm, ThroughputPerCost)?;
    let tensorrt = of(Baseline::TensorRt, ThroughputPerCost)?;
    let tensorrt_by_watt = of(Baseline::TensorRt, PerWatt)?;
    let gains = Gains {
        by_vllm: gain(&cost, &vllm, ThroughputPerCost),
        by_tensorrt: gain(&cost, &tensorrt, ThroughputPerCost),
        by_watt: gain(&watts, &tensorrt_by_watt, PerWatt),
        end_to_end: end_to_end(&cost, &tensorrt, ThroughputPerCost, |gpu| gpu.price)?,
        end_to_end_by_watt: end_to_end(&watts, &tensorrt_by_watt, PerWatt, |gpu| gpu.power_w)?,
    };
    let per_cost = [cost, tensorrt, vllm].map(|rates| rates.score(ThroughputPerCost));
    Ok((gains, per_cost.to_vec()))
}
