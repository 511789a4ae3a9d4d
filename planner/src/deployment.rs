//! One deployment, and what it will deliver: stages, step time, throughput, memory and the conditions of the paper with their slack.

use serde::{Deserialize, Serialize};

use crate::cost::{Cost, Side, workers_visited};
use crate::{Hardware, ModelShape, PlanError, Precision, Stages, Workload};

/// What does not change while plans are compared.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// The catalogue.
    pub hardware: &'a Hardware,
    /// The model.
    pub model: &'a ModelShape,
    /// Types of everything.
    pub precision: &'a Precision,
    /// The requests.
    pub workload: &'a Workload,
    /// The transport between the sides, by name.
    pub transport: &'a str,
}

/// One model replica: n_a attention workers and the expert workers that hold all experts once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Deployment {
    /// GPUs of an attention worker.
    pub attention: Side,
    /// Attention workers (n_a).
    pub attention_workers: usize,
    /// GPUs of an expert worker.
    pub experts: Side,
    /// Experts of each layer that an expert worker holds.
    pub experts_per_worker: usize,
    /// Expert workers.
    pub expert_workers: usize,
    /// Micro-batches in flight (m).
    pub micro_batches: usize,
    /// Sequences of an attention worker in one micro-batch (b_a).
    pub rows: usize,
}

impl Deployment {
    /// Sequences that decode at once (B).
    pub fn batch(&self) -> usize {
        self.rows * self.micro_batches * self.attention_workers
    }

    /// GPUs of both sides.
    pub fn gpus(&self) -> usize {
        self.attention_gpus() + self.expert_gpus()
    }

    /// GPUs of the attention side.
    pub fn attention_gpus(&self) -> usize {
        self.attention.tp * self.attention_workers
    }

    /// GPUs of the expert side.
    pub fn expert_gpus(&self) -> usize {
        self.experts.tp * self.expert_workers
    }
}

/// Memory of one GPU of a side, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MemoryUse {
    /// Weights.
    pub weights: f64,
    /// KV cache.
    pub kv: f64,
    /// Slots of all micro-batches, both ways.
    pub slots: f64,
    /// Activations of the micro-batch that is computed.
    pub scratch: f64,
    /// What the GPU has for all of these.
    pub usable: f64,
}

impl MemoryUse {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.weights + self.kv + self.slots + self.scratch
    }
}

/// What binds a deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Binding {
    /// A larger batch would break the time between tokens.
    StepTime,
    /// A larger batch does not fit attention workers.
    AttentionMemory,
    /// A larger batch does not fit expert workers.
    ExpertMemory,
}

/// A condition of the paper, and how far it is met.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Condition {
    /// In words.
    pub name: &'static str,
    /// Its number in the paper.
    pub equation: &'static str,
    /// The side that must not be more.
    pub left: f64,
    /// The side that must not be less.
    pub right: f64,
    /// Unit of both.
    pub unit: &'static str,
    /// A plan that breaks it is refused; others only idle.
    pub required: bool,
}

impl Condition {
    /// Whether it is met.
    pub fn holds(&self) -> bool {
        self.left <= self.right
    }

    /// Share of the limit that is left; negative where it is broken.
    pub fn slack(&self) -> f64 {
        1.0 - self.left / self.right
    }
}

/// What a deployment will deliver.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outlook {
    /// Stages of one layer and micro-batch.
    pub stages: Stages,
    /// T_total of all MoE layers, exactly.
    pub total_s: f64,
    /// T_total as the paper prints it (5).
    pub printed_total_s: f64,
    /// Time between two tokens of a request: T_total, dense layers, embedding and head.
    pub step_s: f64,
    /// Decoded tokens per second.
    pub tokens_per_s: f64,
    /// Memory of an attention GPU.
    pub attention_memory: MemoryUse,
    /// Memory of an expert GPU.
    pub expert_memory: MemoryUse,
    /// Rows that each expert gets in a micro-batch on average (b_e).
    pub rows_per_expert: f64,
    /// The paper's conditions.
    pub conditions: Vec<Condition>,
}

/// The cost of a deployment's parts, ready to be asked for many batches.
#[derive(Debug, Clone)]
pub(crate) struct Evaluator<'a> {
    setting: Setting<'a>,
    cost: Cost,
    /// Expert workers that a row visits, by experts of a worker.
    visits: Vec<f64>,
    attention_tp: usize,
    expert_tp: usize,
    attention_usable: f64,
    expert_usable: f64,
}

impl<'a> Evaluator<'a> {
    pub(crate) fn new(
        setting: Setting<'a>,
        attention: &Side,
        experts: &Side,
    ) -> Result<Self, PlanError> {
        let Setting {
            hardware,
            model,
            precision,
            transport,
            ..
        } = setting;
        let cost = Cost::from_hardware(hardware, model, precision, attention, experts, transport)?;
        let usable = |name: &str| {
            let (_, gpu) = hardware.gpu(name)?;
            Ok::<f64, PlanError>(gpu.memory_bytes() * hardware.efficiency_of(gpu).memory_usable)
        };
        Ok(Self {
            cost,
            visits: std::iter::once(0.0)
                .chain(
                    (1..=model.experts)
                        .map(|held| workers_visited(model.experts, model.top_k, held)),
                )
                .collect(),
            attention_tp: attention.tp,
            expert_tp: experts.tp,
            attention_usable: usable(&attention.gpu)?,
            expert_usable: usable(&experts.gpu)?,
            setting,
        })
    }

    fn visits(&self, held: usize) -> f64 {
        self.visits[held]
    }

    pub(crate) fn stages(&self, n_a: usize, held: usize, rows: f64) -> Stages {
        let Setting {
            model, workload, ..
        } = self.setting;
        let cached = rows * model.cached_tokens(workload.mean_context());
        let workers = model.experts.div_ceil(held);
        let all = rows * n_a as f64;
        let top_k = model.top_k as f64;
        // The busiest expert worker is waited for.
        let share = workload.imbalance / workers as f64;
        let (sent, outputs) = (self.visits(held), top_k);
        let per_expert = all * top_k / model.experts as f64 * workload.imbalance;
        let cost = &self.cost;
        let hop = |copies: f64, bytes: f64| {
            cost.hop_s(
                rows * copies * bytes,
                workers,
                all * copies * share * bytes,
                n_a,
            )
        };
        Stages {
            attention_s: cost.attention.layer_s(rows, cached),
            dispatch_s: hop(sent, cost.dispatch_row_bytes),
            expert_s: cost.experts.even_layer_s(held, per_expert),
            combine_s: hop(outputs, cost.combine_row_bytes),
        }
    }

    /// The time between two tokens. Dense layers, embedding and head of the micro-batches follow one another on attention workers and
    /// are taken as not hidden.
    pub(crate) fn step_s(&self, stages: &Stages, m: usize, rows: f64) -> f64 {
        let Setting {
            model, workload, ..
        } = self.setting;
        let cached = rows * model.cached_tokens(workload.mean_context());
        let attention = &self.cost.attention;
        let dense = if model.dense_layers == 0 {
            0.0
        } else {
            model.dense_layers as f64 * attention.dense_layer_s(rows, cached)
        };
        stages.total_s(m, model.moe_layers) + m as f64 * (dense + attention.step_s(rows))
    }

    /// Memory of an attention GPU (8), with slots and scratch.
    pub(crate) fn attention_memory(&self, held: usize, m: usize, rows: f64) -> MemoryUse {
        let Setting {
            model,
            precision,
            workload,
            ..
        } = self.setting;
        let tp = self.attention_tp as f64;
        let context = model.cached_tokens(workload.mean_context());
        let cached = model.attention.cached_elements(self.attention_tp) * model.layers() as f64;
        let hidden = model.hidden as f64;
        MemoryUse {
            weights: model.attention_side_weights() * precision.attention.bytes() / tp,
            kv: m as f64 * rows * context * cached * precision.kv.bytes(),
            slots: m as f64
                * rows
                * (self.visits(held) * self.cost.dispatch_row_bytes
                    + model.top_k as f64 * self.cost.combine_row_bytes)
                / tp,
            // Residual and normed rows in f32, and the logits of the head.
            scratch: rows
                * (m as f64 * hidden * 4.0 + 4.0 * hidden * 4.0 + model.vocab as f64 * 4.0 / tp),
            usable: self.attention_usable,
        }
    }

    /// Tokens of KV cache that an attention worker has room for beside everything else, with so many rows in each micro-batch.
    pub(crate) fn kv_tokens(&self, held: usize, m: usize, rows: f64) -> f64 {
        let Setting {
            model, precision, ..
        } = self.setting;
        let memory = self.attention_memory(held, m, rows);
        let room = memory.usable - (memory.total() - memory.kv);
        let elements = model.attention.cached_elements(self.attention_tp) * model.layers() as f64;
        room.max(0.0) / (elements * precision.kv.bytes())
    }

    pub(crate) fn into_cost(self) -> Cost {
        self.cost
    }

    /// Memory of an expert GPU, with slots and scratch.
    pub(crate) fn expert_memory(&self, n_a: usize, held: usize, m: usize, rows: f64) -> MemoryUse {
        let Setting {
            model,
            precision,
            workload,
            ..
        } = self.setting;
        let tp = self.expert_tp as f64;
        let workers = model.experts.div_ceil(held) as f64;
        let all = rows * n_a as f64 * workload.imbalance / workers;
        let visits = all * model.top_k as f64;
        MemoryUse {
            weights: model.expert_weights()
                * (held * model.moe_layers) as f64
                * precision.experts.bytes()
                / tp,
            kv: 0.0,
            slots: m as f64
                * (all * self.visits(held) * self.cost.dispatch_row_bytes
                    + visits * self.cost.combine_row_bytes)
                / tp,
            scratch: visits
                * (2.0 * model.hidden as f64 + 2.0 * model.expert_hidden as f64 / tp)
                * 2.0,
            usable: self.expert_usable,
        }
    }

    /// Whether so many rows fit both sides; else the one they do not fit.
    pub(crate) fn fits(&self, n_a: usize, held: usize, m: usize, rows: f64) -> Result<(), Binding> {
        let attention = self.attention_memory(held, m, rows);
        let experts = self.expert_memory(n_a, held, m, rows);
        if attention.total() > attention.usable {
            Err(Binding::AttentionMemory)
        } else if experts.total() > experts.usable {
            Err(Binding::ExpertMemory)
        } else {
            Ok(())
        }
    }

    pub(crate) fn outlook(&self, deployment: &Deployment, slo_s: f64) -> Outlook {
        let &Deployment {
            attention_workers: n_a,
            experts_per_worker: held,
            micro_batches: m,
            rows,
            ..
        } = deployment;
        let b_a = rows as f64;
        let model = self.setting.model;
        let stages = self.stages(n_a, held, b_a);
        let step_s = self.step_s(&stages, m, b_a);
        let attention_memory = self.attention_memory(held, m, b_a);
        let expert_memory = self.expert_memory(n_a, held, m, b_a);
        let (t_f, t_c) = (stages.compute_s(), stages.hop_s());
        let condition = |name, equation, left, right, unit, required| Condition {
            name,
            equation,
            left,
            right,
            unit,
            required,
        };
        let slower = stages.compute_s();
        let faster = stages.attention_s.min(stages.expert_s);
        let conditions = vec![
            condition(
                "time between tokens",
                "7",
                step_s * 1e3,
                slo_s * 1e3,
                "ms",
                true,
            ),
            condition(
                "attention memory",
                "8",
                attention_memory.total() / 1e9,
                attention_memory.usable / 1e9,
                "GB",
                true,
            ),
            condition(
                "expert memory",
                "-",
                expert_memory.total() / 1e9,
                expert_memory.usable / 1e9,
                "GB",
                true,
            ),
            condition(
                "neither side waits for the other",
                "1",
                slower / faster,
                1.25,
                "x",
                false,
            ),
            condition(
                "a hop (P99) fits a compute step",
                "2",
                self.cost.hop_tail() * t_c * 1e6,
                t_f * 1e6,
                "us",
                false,
            ),
            condition(
                "micro-batches hide the network",
                "3",
                2.0 * (1.0 + t_c / t_f),
                m as f64,
                "",
                false,
            ),
        ];
        Outlook {
            stages,
            total_s: stages.total_s(m, model.moe_layers),
            printed_total_s: stages.printed_total_s(m, model.moe_layers),
            step_s,
            tokens_per_s: deployment.batch() as f64 / step_s,
            attention_memory,
            expert_memory,
            rows_per_expert: b_a * n_a as f64 * model.top_k as f64 / model.experts as f64,
            conditions,
        }
    }
}

impl Deployment {
    /// What this deployment will deliver under a limit of `slo_s` seconds between tokens.
    ///
    /// # Errors
    /// A GPU or transport is not in the catalogue.
    pub fn outlook(&self, setting: Setting<'_>, slo_s: f64) -> Result<Outlook, PlanError> {
        let evaluator = Evaluator::new(setting, &self.attention, &self.experts)?;
        Ok(evaluator.outlook(self, slo_s))
    }
}
