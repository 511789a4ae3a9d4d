//! The systems that the paper compares with: attention and experts on the same GPUs.

use crate::colocated::{Colocated, expert_parallel, tensor_parallel};
use crate::search::Objective;
use crate::{Efficiency, ModelShape, PlanError};

use super::{Assumptions, SLO_S, Span};

/// GPUs of a replica: the paper says only how many are needed.
const GPUS: [usize; 2] = [8, 16];

/// A baseline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Baseline {
    Vllm,
    TensorRt,
}

impl Baseline {
    /// The best that it does by an objective on GPUs of one type.
    pub(super) fn best(
        self,
        assumptions: &Assumptions,
        model: &ModelShape,
        gpu: &str,
        objective: Objective,
    ) -> Result<Colocated, PlanError> {
        let (share, span) = match self {
            Baseline::Vllm => (assumptions.vllm_share, assumptions.vllm),
            Baseline::TensorRt => (1.0, assumptions.tensorrt),
        };
        let workload = assumptions.workload();
        let setting = assumptions.setting(model, &workload, "nccl");
        let (_, found) = assumptions.hardware.gpu(gpu)?;
        let used = assumptions.hardware.efficiency_of(found);
        let used = Efficiency {
            compute: used.compute * share,
            memory: used.memory * share,
            node_link: used.node_link * share,
            memory_usable: used.memory_usable,
            kernel_us: used.kernel_us / share,
            collective_us: used.collective_us / share,
            network: used.network * share,
            fused_all_reduce: false,
        };
        let mut all = Vec::new();
        for gpus in GPUS {
            let servers = gpus.div_ceil(found.node_gpus);
            all.extend(match span {
                Span::Experts if servers > 1 => {
                    expert_parallel(setting, gpu, &used, (gpus, found.node_gpus, 1), SLO_S)?
                }
                Span::Layers => tensor_parallel(setting, gpu, &used, (gpus, servers), SLO_S)?,
                Span::Experts | Span::Tensors => {
                    tensor_parallel(setting, gpu, &used, (gpus, 1), SLO_S)?
                }
            });
        }
        let score = |c: &Colocated| c.rates.score(objective);
        let best = all.into_iter().max_by(|a, b| score(a).total_cmp(&score(b)));
        best.ok_or_else(|| PlanError::Infeasible(format!("{} on {GPUS:?} x {gpu}", model.name)))
    }
}
