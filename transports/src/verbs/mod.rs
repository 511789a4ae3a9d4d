//! Verbs: the interface of RDMA hardware, as owned types over libibverbs.
//!
//! libibverbs is opened at run time ([`DeviceList::open`]): the program is built without it, starts without it, and says what is missing when RDMA is asked for.
//! Everything that can hang, leak or be freed in the wrong order is an owned type here; what moves bytes is in [`crate::rdma`] and in Collie's engine, which call
//! this and contain no `unsafe` of their own beyond looking into registered memory.
//!
//! # What holds what alive
//! ```text
//! Context <- ProtectionDomain <- MemoryRegion, AddressHandle, QueuePair
//! Context <- CompletionChannel <- CompletionQueue <- QueuePair
//! ```
//! Arrows are counted references, so a thing is destroyed after everything that was made from it, whatever the order of drops. A region is deregistered before its
//! memory is freed; a request under way then fails at the device and touches nothing.
//!
//! # Threads
//! libibverbs locks inside: every type is `Send` and `Sync`. One thread per queue pair and completion queue is fastest.
//!
//! # Limits
//! No shared receive queues, no atomics, no extended (`ibv_wr_*`) posting, no memory windows. iWARP devices are listed but cannot be connected by hand
//! ([`Context::is_iwarp`]): they connect through rdmacm and know no WRITE WITH IMMEDIATE.

#![allow(unsafe_code)]

mod completion;
mod context;
mod device;
mod error;
mod event;
mod ffi;
mod library;
mod memory;
mod queue_pair;
mod work;

pub use completion::{
    Completion, CompletionChannel, CompletionKind, CompletionQueue, CompletionStatus,
};
pub use context::{
    Context, DeviceLimits, Gid, GidEntry, GidKind, LinkLayer, Mtu, Port, PortState,
    ProtectionDomain,
};
pub use device::{Device, DeviceList};
pub use error::VerbsError;
pub use event::{AsyncEvent, AsyncEventKind};
pub use memory::{Access, Buffer, MemoryRegion, Pages, Piece};
pub use queue_pair::{
    AddressHandle, Connection, GlobalRoute, Path, QueuePair, QueuePairKind, QueuePairOptions,
    QueuePairState, Reliability,
};
pub use work::{Doorbell, Operation, PostError, Receive, RemoteMemory, SendRequest};
