//! Times of a model on GPUs of the catalogue: a roofline of each stage.

use super::StageTimes;
use super::deployed::Layout;
use crate::{Dtype, Efficiency, Gpu, Hardware, ModelShape, PlanError, Precision, Transport};

/// Kernels of a layer's attention, and of one expert worker's layer; each has a launch.
const ATTENTION_KERNELS: f64 = 8.0;
const EXPERT_KERNELS: f64 = 2.0;

/// One side's GPUs, of one worker.
#[derive(Debug, Clone, PartialEq)]
struct SideGpus {
    gpu: Gpu,
    used: Efficiency,
    tp: f64,
}

/// A model on the GPUs of a [`Layout`].
#[derive(Debug, Clone, PartialEq)]
pub struct Roofline {
    model: ModelShape,
    precision: Precision,
    attention: SideGpus,
    experts: SideGpus,
    transport: Transport,
}

impl Roofline {
    /// From the catalogue.
    ///
    /// # Errors
    /// A GPU or the transport is not in it.
    pub fn new(
        hardware: &Hardware,
        model: &ModelShape,
        precision: &Precision,
        transport: &str,
        layout: &Layout,
    ) -> Result<Self, PlanError> {
        let side = |name: &str, tp: usize| -> Result<SideGpus, PlanError> {
            let (_, gpu) = hardware.gpu(name)?;
            Ok(SideGpus {
                gpu: gpu.clone(),
                used: hardware.efficiency,
                tp: tp as f64,
            })
        };
        Ok(Roofline {
            model: model.clone(),
            precision: *precision,
            attention: side(&layout.attention.gpu, layout.attention.tp)?,
            experts: side(&layout.experts.gpu, layout.experts.tp)?,
            transport: hardware.transport(transport)?,
        })
    }

    /// Tokens of KV cache that an attention worker has room for beside its weights.
    pub fn kv_tokens(&self) -> f64 {
        let SideGpus { gpu, used, tp } = &self.attention;
        let weights = self.model.attention_side_weights() * self.precision.attention.bytes() / tp;
        let elements =
            self.model.attention.cached_elements(*tp as usize) * self.model.layers() as f64;
        let room = gpu.memory_bytes() * used.memory_usable - weights;
        room.max(0.0) / (elements * self.precision.kv.bytes())
    }

    /// Bytes of an expert worker's weights on each of its GPUs, and what a GPU has for them.
    pub fn expert_memory(&self, experts: usize) -> (f64, f64) {
        let SideGpus { gpu, used, tp } = &self.experts;
        let weights = self.model.expert_weights() * (experts * self.model.moe_layers) as f64;
        (
            weights * self.precision.experts.bytes() / tp,
            gpu.memory_bytes() * used.memory_usable,
        )
    }

    /// Bytes of a row on its way to the experts, and of an output on its way back.
    pub fn row_bytes(&self) -> (f64, f64) {
        let hidden = self.model.hidden as f64;
        (
            hidden * self.precision.dispatch.bytes(),
            hidden * self.precision.combine.bytes(),
        )
    }

    /// The slower side's line, as far as it is reached, in bytes per second.
    pub fn bytes_per_s(&self) -> f64 {
        self.attention.line().min(self.experts.line()) * self.transport.share
    }

    /// Time of a hop without bytes.
    pub fn latency_s(&self) -> f64 {
        self.transport.overhead_us * 1e-6
    }

    fn hop_s(&self, side: &SideGpus, bytes: f64) -> f64 {
        self.transport.hop_s(bytes, side.line())
    }

    /// Projections, attention over the cache, gate and shared experts of a layer; `ffn` is the width of an FFN that stays here.
    fn layer_s(&self, rows: f64, cached: f64, ffn: usize, router: usize) -> f64 {
        let (model, side) = (&self.model, &self.attention);
        let hidden = model.hidden as f64;
        let weights = model.attention.weights(model.hidden) + hidden * (3 * ffn + router) as f64;
        let elements = model.attention.cached_elements(side.tp as usize);
        let cache = side.longer_s(
            cached * model.attention.flops_per_cached_token() / side.tp,
            (cached + rows) * elements * self.precision.kv.bytes(),
            self.precision.kv,
        );
        side.product_s(rows, weights, self.precision.attention)
            + cache
            + side.sync_s(2.0 * rows * hidden)
            + side.launches_s(ATTENTION_KERNELS)
    }
}

impl StageTimes for Roofline {
    fn attention_s(&self, rows: f64, cached: f64) -> f64 {
        if rows <= 0.0 {
            return 0.0;
        }
        self.layer_s(rows, cached, self.model.shared_hidden, self.model.experts)
    }

    fn step_s(&self, rows: f64, cached: f64) -> f64 {
        if rows <= 0.0 {
            return 0.0;
        }
        let head = (self.model.hidden * self.model.vocab) as f64;
        let dense = match self.model.dense_layers {
            0 => 0.0,
            layers => layers as f64 * self.layer_s(rows, cached, self.model.dense_hidden, 0),
        };
        let side = &self.attention;
        dense + side.product_s(rows, head, self.precision.attention) + side.launches_s(2.0)
    }

    fn experts_s(&self, rows: &[f64]) -> f64 {
        let side = &self.experts;
        let (mut products_s, mut total) = (0.0, 0.0);
        for rows in rows.iter().filter(|rows| **rows > 0.0) {
            products_s +=
                side.product_s(*rows, self.model.expert_weights(), self.precision.experts);
            total += rows;
        }
        if total == 0.0 {
            return 0.0;
        }
        products_s + side.sync_s(total * self.model.hidden as f64) + side.launches_s(EXPERT_KERNELS)
    }

    fn attention_sends_s(&self, rows: f64, _: usize) -> f64 {
        self.hop_s(&self.attention, rows * self.row_bytes().0)
    }

    fn expert_receives_s(&self, rows: f64, _: usize) -> f64 {
        self.hop_s(&self.experts, rows * self.row_bytes().0)
    }

    fn expert_sends_s(&self, rows: f64, _: usize) -> f64 {
        self.hop_s(&self.experts, rows * self.row_bytes().1)
    }

    fn attention_receives_s(&self, rows: f64, _: usize) -> f64 {
        self.hop_s(&self.attention, rows * self.row_bytes().1)
    }
}

impl SideGpus {
    /// Arithmetic or memory, whichever takes longer on each GPU.
    fn longer_s(&self, flops: f64, bytes: f64, dtype: Dtype) -> f64 {
        let compute_s = flops / (self.gpu.flops(dtype) * self.used.compute);
        compute_s.max(bytes / (self.gpu.memory_bytes_per_s() * self.used.memory))
    }

    /// A product of rows with weights that are divided over the GPUs and read once.
    fn product_s(&self, rows: f64, weights: f64, dtype: Dtype) -> f64 {
        let share = weights / self.tp;
        self.longer_s(2.0 * share * rows, share * dtype.bytes(), dtype)
    }

    /// An all-reduce of bf16 elements, if there is more than one GPU.
    fn sync_s(&self, elements: f64) -> f64 {
        if self.tp <= 1.0 {
            return 0.0;
        }
        let bytes = 2.0 * (self.tp - 1.0) / self.tp * elements * 2.0;
        self.used.collective_us * 1e-6
            + bytes / (self.gpu.node_link_bytes_per_s() * self.used.node_link)
    }

    fn launches_s(&self, kernels: f64) -> f64 {
        kernels * self.used.kernel_us * 1e-6
    }

    fn line(&self) -> f64 {
        self.gpu.nic_bytes_per_s() * self.tp
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::deployed::GpuSide;

    #[test]
    fn experts_are_bound_by_memory_until_the_batch_is_large() {
        let hardware = Hardware::embedded();
        let model = ModelShape::preset("mixtral-8x22b").unwrap();
        let side = |tp| GpuSide {
            gpu: "A800".to_owned(),
            tp,
        };
        let layout = Layout {
            attention: side(8),
            attention_workers: 1,
            experts: side(1),
            experts_per_worker: 1,
            expert_workers: 8,
            micro_batches: 3,
            rows: 64,
        };
        let times = Roofline::new(&hardware, &model, &Precision::BF16, "m2n", &layout).unwrap();
        let weights = model.expert_weights() * 2.0 / (2039e9 * hardware.efficiency.memory);
        let few = times.experts_s(&[1.0]);
        assert!(few > weights && few < 1.1 * weights, "{few} {weights}");
        assert!(times.experts_s(&[64.0]) < 1.1 * few);
        assert!(times.experts_s(&[4096.0]) > 5.0 * few);
        assert_eq!(times.experts_s(&[0.0]), 0.0);
        assert!(times.attention_s(64.0, 1e6) > 1.5 * times.attention_s(64.0, 0.0));
        assert!(times.kv_tokens() > 100_000.0);
        let (need, have) = times.expert_memory(1);
        assert!(need < have && times.expert_memory(8).0 > have);
    }
}
