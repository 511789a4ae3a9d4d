//! The shape of a cluster on one machine, and the memory it takes.

use std::time::Duration;

use volley_models::ComputeType;

/// Shape and limits of a cluster. Everything is sized from this at start-up; nothing grows later.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterConfig {
    /// Attention workers (M): each holds all attention weights and the KV cache of its own sequences.
    pub attention_workers: u16,
    /// Expert workers (N): each holds its share of every layer's experts.
    pub expert_workers: u16,
    /// Micro-batches in flight (m).
    pub micro_batches: u8,
    /// Type of weights, KV cache and frames.
    pub dtype: ComputeType,
    /// Longest sequence, prompt and output together, in tokens.
    pub context: u32,
    /// Tokens of one KV block.
    pub block_tokens: u32,
    /// KV blocks of each attention worker.
    pub kv_blocks: u32,
    /// Tokens that an attention worker computes at most in one step: the size of slots and scratch.
    pub max_rows: u32,
    /// Prompt tokens in one step at most.
    pub prefill_tokens: u32,
    /// Requests that may wait for a place.
    pub max_waiting: usize,
    /// How long a worker waits for a peer's frame before it calls the peer lost.
    pub peer_deadline: Duration,
    /// Spans of the timeline kept for each worker; 0 records none.
    pub timeline_spans: usize,
}
