//! What the paper leaves open, assumed once for all rows; and other readings of it, which show what a row hangs on.

use crate::deployment::Setting;
use crate::{Efficiency, Hardware, ModelShape, Precision, Workload};

/// Medians of the paper's trace: tokens of a prompt and of an answer.
const MEDIAN_TOKENS: (f64, f64) = (571.0, 159.0);

/// How a baseline spans two servers. Inside one server it divides every product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// Every product is divided over all GPUs.
    Tensors,
    /// Attention is replicated on each server, experts are spread over all GPUs, and rows go there and back over NCCL.
    Experts,
    /// Layers are divided: a pipeline.
    Layers,
}

/// One reading of everything that the paper leaves open.
#[derive(Debug, Clone, PartialEq)]
pub struct Assumptions {
    /// The catalogue: what kernels and transports reach of data sheets.
    pub hardware: Hardware,
    /// Lengths are log-normal around the medians, with this deviation of the logarithm.
    pub length_sigma: f64,
    /// Rows of the busiest expert worker by the mean.
    pub imbalance: f64,
    /// Of our kernels' rates and latencies, what vLLM's reach.
    pub vllm_share: f64,
    /// How vLLM spans two servers.
    pub vllm: Span,
    /// How TensorRT-LLM does.
    pub tensorrt: Span,
    /// Whether an expert is taken to saturate at the ratio of the rates that kernels reach; if not, at the data sheet's.
    pub saturation_as_reached: bool,
}

impl Default for Assumptions {
    fn default() -> Self {
        let mut hardware = Hardware::embedded();
        // The paper's own kernels; its baselines have none of them. And NCCL's quarter of the line, whatever it carries.
        hardware.efficiency.fused_all_reduce = true;
        hardware.efficiency.network = hardware.transports["nccl"].share;
        Self {
            hardware,
            length_sigma: 1.0,
            imbalance: 1.0,
            vllm_share: 0.5,
            vllm: Span::Tensors,
            tensorrt: Span::Experts,
            saturation_as_reached: true,
        }
    }
}

impl Assumptions {
    /// Mean tokens of a prompt.
    pub(super) fn prompt_tokens(&self) -> f64 {
        MEDIAN_TOKENS.0 * (self.length_sigma.powi(2) / 2.0).exp()
    }

    /// Mean tokens of an answer.
    pub(super) fn answer_tokens(&self) -> f64 {
        MEDIAN_TOKENS.1 * (self.length_sigma.powi(2) / 2.0).exp()
    }

    /// What decoding meets. A request is in a batch for as long as its answer is, so long answers are met more often: half of
    /// E\[o^2\] / E\[o\] of an answer are in the cache on average.
    pub(super) fn workload(&self) -> Workload {
        let met = MEDIAN_TOKENS.1 * (1.5 * self.length_sigma.powi(2)).exp() / 2.0;
        Workload {
            mean_input: self.prompt_tokens() + met - self.answer_tokens() / 2.0,
            mean_output: self.answer_tokens(),
            imbalance: self.imbalance,
        }
    }

    pub(super) fn setting<'a>(
        &'a self,
        model: &'a ModelShape,
        workload: &'a Workload,
        transport: &'a str,
    ) -> Setting<'a> {
        Setting {
            hardware: &self.hardware,
            model,
            precision: &Precision::BF16,
            workload,
            transport,
        }
    }

    /// The assumptions in words: what of, and what.
    pub fn table() -> [(&'static str, &'static str); 10] {
        [
            (
                "kernels",
                "70 % of the tensor cores' rate, 80 % of memory, 60 % of the links in a server, 3 us a kernel, 8 us a collective: the catalogue's `[efficiency]`, for ours and for TensorRT-LLM, on every GPU. \
                 Ours fuse all-reduces with the product before them, as the paper says of its own",
            ),
            (
                "vLLM",
                "half of these rates, and twice the latencies, on every model and GPU: the one figure that is taken from the evaluation (its ratio of vLLM to TensorRT-LLM is 2.0 on Mixtral and DBRX)",
            ),
            (
                "baselines",
                "attention and experts on the same GPUs, 8 or 16, whichever gives more; every product divided over the GPUs of a server. Over two servers vLLM divides every product on; TensorRT-LLM, \
                 which also has expert parallelism, replicates attention and spreads experts, without overlap. The largest batch that memory and the limit allow",
            ),
            (
                "Ampere GPU",
                "the table's A800: 80 GB, 312 TFLOP/s, 400 GB/s NVLink, 200 Gb/s network a GPU",
            ),
            (
                "hops",
                "the catalogue's transports, fitted to the paper's figure of one sender and N receivers: M2N 7 us and the whole line, NCCL 3 us and a quarter of it, also in baselines' all-reduces over servers",
            ),
            (
                "deployments",
                "the planner's own best with at most 64 GPUs, over NCCL also; of H20 + L40S the model that gains most, for the paper gives one figure",
            ),
            (
                "ablations",
                "over m and over replicas: half of the 64 GPUs hold the experts, one expert a worker (tp_e = 32 / E), half attend, divided so that T_a is nearest T_e (1); an expert gets as many rows \
                 of a micro-batch as saturate it by the rates that kernels reach, 134",
            ),
            (
                "lengths",
                "log-normal around the trace's medians (571 and 159 tokens, all that the paper says) with a deviation of 1: means of 941 and 262, and 1,298 in the cache when a token is decoded; \
                 experts are visited evenly",
            ),
            (
                "Scaled-MoE",
                "8 query heads for each of 8 key/value heads, h' = 8192: what makes its 317 B parameters",
            ),
            (
                "end to end",
                "prompts are computed 8,192 tokens at a time, divided over a server's GPUs: the baselines' on their GPU type, ours on the cheaper of the deployment's two",
            ),
        ]
    }

    /// Other readings of what is open, each in words that follow "if".
    pub fn readings() -> Vec<(&'static str, Self)> {
        let with = |change: &dyn Fn(&mut Self)| {
            let mut changed = Self::default();
            change(&mut changed);
            changed
        };
        let unlike = |all: &mut Self, l40s| {
            all.reach("H20", 0.9);
            all.reach("L40S", l40s);
        };
        vec![
            (
                "every request is as long as the medians",
                with(&|all| all.length_sigma = 0.0),
            ),
            (
                "the busiest expert has 20 % more than the mean",
                with(&|all| all.imbalance = 1.2),
            ),
            (
                "kernels reach 60 % of the tensor cores",
                with(&|all| all.hardware.efficiency.compute = 0.6),
            ),
            (
                "kernels reach 80 % of the tensor cores",
                with(&|all| all.hardware.efficiency.compute = 0.8),
            ),
            (
                "kernels reach 90 % of the H20's few tensor cores and 60 % of the L40S's many",
                with(&|all| unlike(all, 0.6)),
            ),
            (
                "TensorRT-LLM divides layers over two servers",
                with(&|all| all.tensorrt = Span::Layers),
            ),
            (
                "TensorRT-LLM divides layers, and H20 and L40S reach 90 % and 60 %",
                with(&|all| {
                    all.tensorrt = Span::Layers;
                    unlike(all, 0.6);
                }),
            ),
            (
                "both divide layers, and H20 and L40S reach 90 % and 50 %",
                with(&|all| {
                    (all.vllm, all.tensorrt) = (Span::Layers, Span::Layers);
                    unlike(all, 0.5);
                }),
            ),
            (
                "vLLM reaches 45 % of our rates",
                with(&|all| all.vllm_share = 0.45),
            ),
            (
                "an expert saturates at the data sheet's ratio, 153 rows",
                with(&|all| all.saturation_as_reached = false),
            ),
            (
                "our all-reduces are not fused with products",
                with(&|all| all.hardware.efficiency.fused_all_reduce = false),
            ),
            (
                "all-reduces reach 80 % of the links in a server",
                with(&|all| all.hardware.efficiency.node_link = 0.8),
            ),
            (
                "all-reduces reach 80 % of the links in a server, and kernels 60 % of the tensor cores",
                with(&|all| {
                    all.hardware.efficiency.node_link = 0.8;
                    all.hardware.efficiency.compute = 0.6;
                }),
            ),
            (
                "all-reduces reach 80 % of the network",
                with(&|all| all.hardware.efficiency.network = 0.8),
            ),
        ]
    }

    /// Sets what kernels reach of one GPU's tensor cores.
    fn reach(&mut self, gpu: &str, compute: f64) {
        let efficiency = Efficiency {
            compute,
            ..self.hardware.efficiency
        };
        if let Some(gpu) = self.hardware.gpus.get_mut(gpu) {
            gpu.efficiency = Some(efficiency);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_that_the_table_says() {
        let all = Assumptions::default();
        assert_eq!(all.prompt_tokens().round(), 941.0);
        assert_eq!(all.answer_tokens().round(), 262.0);
        assert_eq!(all.workload().mean_context().round(), 1298.0);
        let medians = Assumptions {
            length_sigma: 0.0,
            ..all
        };
        assert_eq!(medians.workload(), Workload::PAPER);
    }
}
