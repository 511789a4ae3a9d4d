//! The attention worker: keeps its sequences' KV cache, computes attention and gate, sends rows to the experts and samples.

mod actor;
mod data_loop;
mod rally;
mod sampler;
mod sequences;

pub(crate) use actor::live;
pub use rally::{Rally, Task, Wait};
pub use sampler::{LOGPROBS_MAX, Sampler};
pub use sequences::{Sequence, SequenceError, Sequences};
