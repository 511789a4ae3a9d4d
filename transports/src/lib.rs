//! How frames move between attention workers and expert workers.
//!
//! * An [`Endpoint`] is one worker's end of its lanes; every fabric offers it. [`InProcessFabric`] is the fabric of
//!   one process.
//! * The wire format is a checked view over bytes: [`DispatchFrame`] out, [`CombineFrame`] back.
//! * The M2N exchange stands on both: [`Scatter`] and [`Gather`] on the attention side, [`Merge`] on the expert side.
//! * Between processes, [`quic`] and [`rdma`] are fabrics ([`Fabric`]); [`verbs`] is the interface of RDMA hardware, over libibverbs opened at run time.
//! * [`conformance`] is the suite of tests that every fabric passes.

mod ball;
pub mod conformance;
mod detached;
mod element;
mod endpoint;
mod fabric;
mod id;
mod in_process;
mod m2n;
mod participants;
pub mod quic;
pub mod rdma;
pub mod simulated;
mod slot;
mod topology;
pub mod verbs;
mod waker;
mod wire;

pub use ball::Spin;
pub use detached::Detached;
pub use element::{Element, Rows, RowsMut};
pub use endpoint::{Endpoint, Event, FIRST_HOLDER, LaneError, LostReason, lane_index};
pub use fabric::{Fabric, FabricError};
pub use id::{Epoch, Lane, Layer, MicroBatch, Role, Step, StepKey, WorkerId, WorkerNameError};
pub use in_process::{InProcess, InProcessFabric};
pub use m2n::{
    Arrival, Cause, ExchangeShape, Gather, GatherError, Groups, Merge, MergeError, Owner,
    Placement, PlacementError, Progress, Responded, Scatter, ScatterError, ShapeError,
};
pub use participants::Participants;
pub use slot::SLOT_ALIGN;
pub use topology::{Topology, TopologyError};
pub use waker::{Wake, Waker};
pub use wire::{
    CombineFrame, CombineHead, CombineLayout, CombineLimits, CombineMut, DispatchFrame,
    DispatchHead, DispatchLayout, DispatchLimits, DispatchMut, FrameError, FrameKind, HEADER_BYTES,
    Header, LayoutError, MAGIC, Status, Times, VERSION, write_status,
};
