//! T_a: what an attention worker computes in a layer, and once a step.

use crate::cost::{Affine, Kernel, Stage, all_reduce_s};
use crate::{Dtype, Efficiency, Gpu, ModelShape, Precision};

/// Time of an attention worker, of all its GPUs together.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionCost {
    /// A layer with experts: norms, projections, attention, shared experts, gate, scatter, and the sum of what comes back.
    pub layer: Stage,
    /// A dense layer, its FFN included.
    pub dense_layer: Stage,
    /// Embedding, head and sampling: once a step.
    pub step: Stage,
}

impl AttentionCost {
    /// T_a of one micro-batch: `rows` tokens of it that attend to `cached` tokens together.
    pub fn layer_s(&self, rows: f64, cached: f64) -> f64 {
        self.layer.time_s(rows, cached)
    }

    /// The same of a layer without experts.
    pub fn dense_layer_s(&self, rows: f64, cached: f64) -> f64 {
        self.dense_layer.time_s(rows, cached)
    }

    /// Embedding and head of `rows` tokens.
    pub fn step_s(&self, rows: f64) -> f64 {
        self.step.time_s(rows, 0.0)
    }

    /// A roofline of every kernel on `tp` GPUs of one server.
    pub(crate) fn roofline(
        gpu: &Gpu,
        used: &Efficiency,
        model: &ModelShape,
        precision: &Precision,
        tp: usize,
    ) -> Self {
        let build = Builder { gpu, used, tp };
        let hidden = model.hidden as f64;
        let weights = precision.attention;
        let activation = 2.0;
        let mut common = Vec::new();
        let mut projections = model.attention.projections(model.hidden);
        let output = projections.pop();
        for (name, elements) in projections {
            common.push(build.product(name, elements, weights));
        }
        let flops = model.attention.flops_per_cached_token() / tp as f64;
        let bytes = model.attention.cached_elements(tp) * precision.kv.bytes();
        common.push(Kernel {
            name: "attention",
            overhead_s: used.kernel_us * 1e-6,
            compute: Affine {
                per_cached_s: flops / build.flops_per_s(precision.kv),
                ..Affine::default()
            },
            memory: Affine {
                per_cached_s: bytes / build.bytes_per_s(),
                // The row's own key and value are written.
                per_row_s: bytes / build.bytes_per_s(),
                fixed_s: 0.0,
            },
            link: Affine::default(),
        });
        if let Some((name, elements)) = output {
            let product = build.product(name, elements, weights);
            common.extend(build.synced(product, hidden * activation));
        }
        let ffn = |name, width: usize, into: &mut Vec<Kernel>| {
            if width > 0 {
                into.push(build.product(name, 2.0 * hidden * width as f64, weights));
                let down = build.product(name, hidden * width as f64, weights);
                into.extend(build.synced(down, hidden * activation));
            }
        };
        let mut layer = common.clone();
        ffn("shared experts", model.shared_hidden, &mut layer);
        // One kernel: gate, top-k, counts, weights and scatter; it reads rows and writes K copies. The router is not divided.
        let router = hidden * model.experts as f64;
        let copies = hidden * (1.0 + model.top_k as f64);
        layer.push(Kernel {
            name: "gate and scatter",
            overhead_s: used.kernel_us * 1e-6,
            compute: Affine {
                per_row_s: 2.0 * router / build.flops_per_s(weights),
                ..Affine::default()
            },
            memory: build.traffic(
                router * weights.bytes(),
                copies * precision.dispatch.bytes() / tp as f64,
            ),
            link: Affine::default(),
        });
        layer.push(Kernel {
            name: "weighted sum",
            overhead_s: used.kernel_us * 1e-6,
            compute: Affine::default(),
            memory: build.traffic(0.0, copies * precision.combine.bytes() / tp as f64),
            link: Affine::default(),
        });
        let mut dense_layer = common;
        ffn("dense FFN", model.dense_hidden, &mut dense_layer);
        let mut step = vec![Kernel {
            name: "embedding",
            overhead_s: used.kernel_us * 1e-6,
            compute: Affine::default(),
            memory: build.traffic(0.0, 2.0 * hidden * activation),
            link: Affine::default(),
        }];
        step.push(build.product("head", hidden * model.vocab as f64, weights));
        Self {
            layer: Stage::Kernels(layer),
            dense_layer: Stage::Kernels(dense_layer),
            step: Stage::Kernels(step),
        }
    }
}

/// What all kernels of one worker have in common.
pub(super) struct Builder<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) used: &'a Efficiency,
    pub(super) tp: usize,
}

impl Builder<'_> {
    pub(super) fn flops_per_s(&self, dtype: Dtype) -> f64 {
        self.gpu.flops(dtype) * self.used.compute
    }

    pub(super) fn bytes_per_s(&self) -> f64 {
        self.gpu.memory_bytes_per_s() * self.used.memory
    }

    fn traffic(&self, fixed_bytes: f64, row_bytes: f64) -> Affine {
        Affine {
            fixed_s: fixed_bytes / self.bytes_per_s(),
            per_row_s: row_bytes / self.bytes_per_s(),
            per_cached_s: 0.0,
        }
    }

    /// A product of every row with a matrix of `elements`, divided by tp. Its weights are read once.
    pub(super) fn product(&self, name: &'static str, elements: f64, dtype: Dtype) -> Kernel {
        let share = elements / self.tp as f64;
        Kernel {
            name,
            overhead_s: self.used.kernel_us * 1e-6,
            compute: Affine {
                per_row_s: 2.0 * share / self.flops_per_s(dtype),
                ..Affine::default()
            },
            memory: self.traffic(share * dtype.bytes(), 0.0),
            link: Affine::default(),
        }
    }

    /// A divided product and the all-reduce of its rows: one kernel if they are fused, two if not, and no all-reduce if nothing is divided.
    pub(super) fn synced(&self, product: Kernel, row_bytes: f64) -> Vec<Kernel> {
        if self.tp <= 1 {
            return vec![product];
        }
        let latency = all_reduce_s(self.gpu, self.used, self.tp, 0.0);
        let link = Affine {
            per_row_s: all_reduce_s(self.gpu, self.used, self.tp, row_bytes) - latency,
            ..Affine::default()
        };
        if self.used.fused_all_reduce {
            return vec![Kernel { link, ..product }];
        }
        let all_reduce = Kernel {
            name: "all-reduce",
            overhead_s: latency,
            compute: Affine::default(),
            memory: Affine::default(),
            link,
        };
        vec![product, all_reduce]
    }
}
