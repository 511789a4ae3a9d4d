//! The M2N exchange: M attention workers, N expert workers, any M and N (MegaScale-Infer, section 5).
//!
//! On the attention side [`Scatter`] sends every row once to each expert worker that holds at least one of its
//! experts, and [`Gather`] sums the outputs that come back. On the expert side [`Merge`] waits until all participants
//! of an exchange have sent, hands their rows out grouped by expert, and sends every output back to where its row
//! came from. All are plain state: they are told of arrivals, have no clock and no thread, and allocate nothing after
//! construction.
//!
//! The sum over a row's experts runs in top-k order whatever the placement, the number of workers or the order of
//! arrivals, so the result is the same to the bit.

mod gather;
mod merge;
mod placement;
mod scatter;
mod shape;

pub use gather::{Cause, Gather, GatherError, Progress};
pub use merge::{Arrival, Groups, Merge, MergeError, Responded};
pub use placement::{Owner, Placement, PlacementError};
pub use scatter::{Scatter, ScatterError};
pub use shape::{ExchangeShape, ShapeError};
