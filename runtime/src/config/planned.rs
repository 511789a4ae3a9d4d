//! What a simulation asks of a configuration: the cluster's shape, which needs no model to be opened.

use super::raw::{Auto, Dtype, Isolate, Quantize, Raw};

/// A configured cluster, as far as it can be told without its model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterOutline {
    /// Attention workers (M).
    pub attention_workers: u16,
    /// Expert workers (N).
    pub expert_workers: u16,
    /// Whether experts are held more than once.
    pub replicas: bool,
    /// Whether all workers are on one machine and share its cores.
    pub one_machine: bool,
    /// Micro-batches in flight (m).
    pub micro_batches: u8,
    /// Rows that a micro-batch should have before there is another, if it is said.
    pub micro_batch_rows: Option<u32>,
    /// Tokens of a step on one worker at most.
    pub max_batch_tokens: u32,
    /// Prompt tokens of a step on one worker at most.
    pub prefill_tokens: u32,
    /// Bytes of each attention worker's KV cache, if they are said.
    pub kv_cache_bytes: Option<u64>,
    /// Type of the weights, as the planner names it.
    pub dtype: &'static str,
}

impl Raw {
    /// The cluster's shape.
    pub fn outline(&self) -> ClusterOutline {
        let (cluster, limits) = (&self.cluster, &self.limits);
        ClusterOutline {
            attention_workers: cluster.attention_workers,
            expert_workers: cluster.expert_workers,
            replicas: cluster.expert_replicas > 1,
            one_machine: cluster.isolate != Isolate::Host,
            micro_batches: cluster.micro_batches,
            micro_batch_rows: match cluster.micro_batch_rows {
                Auto::Auto => None,
                Auto::Value(rows) => Some(rows),
            },
            max_batch_tokens: limits.max_batch_tokens,
            prefill_tokens: match limits.prefill_tokens {
                Auto::Auto => (limits.max_batch_tokens / 2).max(1),
                Auto::Value(tokens) => tokens,
            },
            kv_cache_bytes: match limits.kv_cache_memory {
                Auto::Auto => None,
                Auto::Value(size) => Some(size.0),
            },
            dtype: match (self.model.quantize, self.model.dtype) {
                (Quantize::Q8, _) => "q8",
                (Quantize::Q4, _) => "q4",
                (Quantize::None, Dtype::F32) => "f32",
                (Quantize::None, Dtype::Auto | Dtype::Bf16) => "bf16",
            },
        }
    }
}
