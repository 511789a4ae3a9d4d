//! The shape of a cluster on one machine, and the memory it takes.

use std::num::NonZero;
use std::time::Duration;

use volley_models::{
    AttentionModule, AttentionOptions, ComputeType, Crew, ExpertModule, ExpertOptions, Isa,
    ModelSpec, Quantization,
};
use volley_transports::{Element, Epoch, ExchangeShape, Role, Topology, WorkerId};

use crate::cluster_error::ClusterError;
use crate::roster::RosterShape;
use crate::timeline::Span;

/// Rows of one expert computed at once; larger groups are worked off in pieces, so that scratch stays small.
const EXPERT_ROWS: u32 = 512;

/// Rows of an expert from which its product is bound by arithmetic rather than by reading weights, about, on the processors we measured.
const ROWS_PER_EXPERT: usize = 16;

/// Shape and limits of a cluster. Everything is sized from this at start-up; nothing grows later.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterConfig {
    /// Attention workers (M): each holds all attention weights and the KV cache of its own sequences.
    pub attention_workers: u16,
    /// Expert workers (N): each holds its share of every layer's experts.
    pub expert_workers: u16,
    /// Micro-batches in flight (m).
    pub micro_batches: u8,
    /// Rows of a micro-batch before a worker opens another.
    pub micro_batch_rows: u32,
    /// Threads that compute. Each worker has one; those beyond help whoever has work.
    pub threads: usize,
    /// Type of KV cache and frames, and of weights unless they are quantised.
    pub dtype: ComputeType,
    /// What weights are quantised to while they are loaded, if at all.
    pub quantize: Option<Quantization>,
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
    /// Expert workers that hold each expert (R): the first that lives computes it.
    pub expert_replicas: u16,
    /// Experts of a layer that a worker may take over from lost ones, beside its own.
    pub spare_experts: u16,
    /// How long a worker waits for a peer's frame before it calls the peer lost.
    pub peer_deadline: Duration,
    /// Spans of the timeline kept for each worker; 0 records none.
    pub timeline_spans: usize,
}

impl ClusterConfig {
    /// One attention and one expert worker, two micro-batches, and room for eight full contexts of at most 4,096 tokens.
    pub fn for_model(spec: &ModelSpec) -> Self {
        let context = spec.max_positions.min(4096) as u32;
        let block_tokens = 16;
        ClusterConfig {
            attention_workers: 1,
            expert_workers: 1,
            micro_batches: 2,
            micro_batch_rows: Self::filling_rows(spec, 1),
            threads: Self::cores(),
            dtype: ComputeType::for_stored(spec.stored_as),
            quantize: None,
            context,
            block_tokens,
            kv_blocks: 8 * context.div_ceil(block_tokens),
            max_rows: 512,
            prefill_tokens: 256,
            max_waiting: 1024,
            expert_replicas: 1,
            spare_experts: 0,
            peer_deadline: Duration::from_secs(30),
            timeline_spans: 0,
        }
    }

    /// Rows that each of so many attention workers brings to a micro-batch which gives every expert 16 on average.
    pub fn filling_rows(spec: &ModelSpec, attention_workers: u16) -> u32 {
        let rows = (ROWS_PER_EXPERT * spec.experts).div_ceil(spec.top_k.max(1));
        rows.div_ceil(usize::from(attention_workers.max(1))) as u32
    }

    /// Cores of this machine that this process may use.
    pub fn cores() -> usize {
        std::thread::available_parallelism().map_or(1, NonZero::get)
    }

    /// What it computes in, for messages: `bf16`, or `bf16 with q4 weights`.
    pub fn precision(&self) -> String {
        match self.quantize {
            None => self.dtype.to_string(),
            Some(quantization) => format!("{} with {quantization} weights", self.dtype),
        }
    }

    /// Checks the numbers against each other and the model.
    ///
    /// # Errors
    /// Names the number, its value and its range.
    pub fn check(&self, spec: &ModelSpec) -> Result<(), ClusterError> {
        let range = |name: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(ClusterError::Config(format!(
                    "{name} is {value}; it must be from {low} to {high}"
                )))
            }
        };
        range("attention_workers", self.attention_workers.into(), 1, 1024)?;
        range("expert_workers", self.expert_workers.into(), 1, 1024)?;
        range(
            "expert_replicas",
            self.expert_replicas.into(),
            1,
            self.expert_workers.into(),
        )?;
        range(
            "spare_experts",
            self.spare_experts.into(),
            0,
            spec.experts as u64,
        )?;
        range("micro_batches", self.micro_batches.into(), 1, 64)?;
        range(
            "micro_batch_rows",
            self.micro_batch_rows.into(),
            1,
            u32::MAX.into(),
        )?;
        range("threads", self.threads as u64, 1, 4096)?;
        range(
            "max_context",
            self.context.into(),
            1,
            spec.max_positions as u64,
        )?;
        range("max_batch_tokens", self.max_rows.into(), 1, 1 << 20)?;
        range(
            "prefill_tokens",
            self.prefill_tokens.into(),
            1,
            self.max_rows.into(),
        )?;
        range("block_tokens", self.block_tokens.into(), 1, 1024)?;
        let positions = u64::from(self.kv_blocks) * u64::from(self.block_tokens);
        if positions < u64::from(self.context) {
            return Err(ClusterError::Config(format!(
                "a KV cache of {} blocks of {} tokens holds {positions} tokens, less than one sequence of max_context = {}; enlarge the cache or shorten the context",
                self.kv_blocks, self.block_tokens, self.context
            )));
        }
        Ok(())
    }

    /// The memory all parts take, as the start-up will allocate it.
    ///
    /// # Errors
    /// When the numbers are out of range, or a product does not fit 64 bits.
    pub fn memory(&self, spec: &ModelSpec) -> Result<MemoryPlan, ClusterError> {
        self.check(spec)?;
        let shape = self.shape(spec)?;
        let attention = AttentionModule::memory(spec, self.attention_options())?;
        let (weights, kv, scratch) = (
            attention.weights as u64,
            attention.kv as u64,
            attention.scratch as u64,
        );
        let slots = shape.topology(self.micro_batches)?.bytes()? as u64;
        let (m, n) = (
            u64::from(self.attention_workers),
            u64::from(self.expert_workers),
        );
        let merged = shape.max_merged()?;
        let placement = self.roster(spec).placement(Epoch(0))?;
        let mut experts = (0, 0);
        for worker in 0..self.expert_workers {
            let local = usize::from(placement.max_local_experts(worker) + self.spare_experts);
            let estimate = ExpertModule::memory(spec, local, self.expert_options(merged))?;
            experts = (
                experts.0 + estimate.weights as u64,
                experts.1 + estimate.scratch as u64,
            );
        }
        // Summed outputs of each micro-batch at attention workers; the grouped batch and its outputs at expert workers.
        let row = spec.hidden as u64 * 4;
        let combined = m * u64::from(self.micro_batches) * u64::from(self.max_rows) * row;
        let grouped = n * u64::from(merged) * row * 2;
        let parts = vec![
            (
                format!("attention weights, {m} x {}", Bytes(weights)),
                m * weights,
            ),
            (format!("expert weights, on {n} workers"), experts.0),
            (
                format!(
                    "KV cache, {m} x {} blocks of {} tokens, {} tokens in all",
                    self.kv_blocks,
                    self.block_tokens,
                    m * u64::from(self.kv_blocks) * u64::from(self.block_tokens)
                ),
                m * kv,
            ),
            (
                format!("slots, {m} x {n} x {} lanes", self.micro_batches),
                slots,
            ),
            (
                format!("timeline, {} x {} spans", m + n, self.timeline_spans),
                (m + n) * (self.timeline_spans * size_of::<Span>()) as u64,
            ),
            (
                "scratch of all workers".to_owned(),
                m * scratch + experts.1 + combined + grouped,
            ),
        ];
        Ok(MemoryPlan { parts })
    }

    /// The memory of one worker in a process of its own.
    ///
    /// # Errors
    /// As [`ClusterConfig::memory`].
    pub fn worker_memory(
        &self,
        spec: &ModelSpec,
        worker: WorkerId,
    ) -> Result<MemoryPlan, ClusterError> {
        self.check(spec)?;
        let shape = self.shape(spec)?;
        let merged = shape.max_merged()?;
        let topology = shape.topology(self.micro_batches)?;
        let row = spec.hidden as u64 * 4;
        let (estimate, buffers, alone) = match worker.role {
            Role::Attention => (
                AttentionModule::memory(spec, self.attention_options_for(1))?,
                u64::from(self.micro_batches) * u64::from(self.max_rows) * row,
                Topology {
                    attention: 1,
                    ..topology
                },
            ),
            Role::Expert => {
                let placement = self.roster(spec).placement(Epoch(0))?;
                let experts = placement.max_local_experts(worker.index) + self.spare_experts;
                (
                    ExpertModule::memory(spec, experts.into(), self.expert_options(merged))?,
                    u64::from(merged) * row * 2,
                    Topology {
                        experts: 1,
                        ..topology
                    },
                )
            }
        };
        let parts = vec![
            ("weights".to_owned(), estimate.weights as u64),
            ("KV cache".to_owned(), estimate.kv as u64),
            ("slots".to_owned(), alone.bytes()? as u64),
            ("scratch".to_owned(), estimate.scratch as u64 + buffers),
        ];
        Ok(MemoryPlan { parts })
    }

    /// Attention and expert workers together.
    pub(crate) fn workers(&self) -> usize {
        usize::from(self.attention_workers) + usize::from(self.expert_workers)
    }

    /// The seats, and how experts are spread over them.
    pub fn roster(&self, spec: &ModelSpec) -> RosterShape {
        RosterShape {
            attention: self.attention_workers,
            expert_workers: self.expert_workers,
            experts: spec.experts as u16,
            replicas: self.expert_replicas,
            spare: self.spare_experts,
        }
    }

    /// The lanes between the workers, and the bytes of their slots.
    ///
    /// # Errors
    /// A slot would be larger than the address space.
    pub fn topology(&self, spec: &ModelSpec) -> Result<Topology, ClusterError> {
        Ok(self.shape(spec)?.topology(self.micro_batches)?)
    }

    pub(crate) fn shape(&self, spec: &ModelSpec) -> Result<ExchangeShape, ClusterError> {
        Ok(ExchangeShape {
            attention_workers: self.attention_workers,
            expert_workers: self.expert_workers,
            max_rows: self.max_rows,
            hidden: spec.hidden as u32,
            top_k: spec.top_k as u16,
            element: match self.dtype {
                ComputeType::F32 => Element::F32,
                ComputeType::Bf16 => Element::Bf16,
            },
        })
    }

    pub(crate) fn attention_options(&self) -> AttentionOptions {
        self.attention_options_for(self.workers())
    }

    /// For a process with so many workers.
    pub(crate) fn attention_options_for(&self, workers: usize) -> AttentionOptions {
        AttentionOptions {
            dtype: self.dtype,
            quantize: self.quantize,
            isa: Isa::detect(),
            kv_blocks: self.kv_blocks as usize,
            block_tokens: self.block_tokens as usize,
            max_rows: self.max_rows as usize,
            micro_batches: self.micro_batches as usize,
            seats: Crew::seats(self.threads, workers),
        }
    }

    pub(crate) fn expert_options(&self, merged: u32) -> ExpertOptions {
        let max_rows = merged.min(EXPERT_ROWS) as usize;
        ExpertOptions {
            dtype: self.dtype,
            quantize: self.quantize,
            isa: Isa::detect(),
            max_rows,
        }
    }
}

/// The memory a cluster takes, part by part. Its `Display` is the arithmetic.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryPlan {
    parts: Vec<(String, u64)>,
}

impl MemoryPlan {
    /// All parts together, in bytes.
    pub fn total(&self) -> u64 {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }

    /// What each part is, and its bytes.
    pub fn parts(&self) -> &[(String, u64)] {
        &self.parts
    }
}

impl std::fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (what, bytes) in &self.parts {
            writeln!(f, "  {:>10}  {what}", Bytes(*bytes).to_string())?;
        }
        write!(f, "  {:>10}  in all", Bytes(self.total()).to_string())
    }
}

/// Bytes as people read them: 1.50 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let exponent = (self.0.ilog2() / 10) as usize;
        write!(
            f,
            "{:.2} {}",
            self.0 as f64 / 1024f64.powi(exponent as i32),
            units[exponent - 1]
        )
    }
}
