//! The attention worker: keeps its sequences' KV cache, computes attention and gate, sends rows to the experts and samples.

mod actor;
mod compute;
mod hops;
mod logic;
mod rally;
mod sampler;
mod sequences;

pub(crate) use actor::live;
pub(crate) use compute::{AttentionCompute, Outline, Routed};
pub(crate) use logic::{AttentionLogic, AttentionParts, Started};
pub use rally::{Rally, Task, Wait};
pub use sampler::{LOGPROBS_MAX, Sampler};
pub use sequences::{Sequence, SequenceError, Sequences};
