//! The fabric over RDMA: frames are written by the sender's network card into the receiver's slots, and announced by an immediate.
//!
//! It is the paper's M2N transport (MegaScale-Infer, section 6) behind [`Endpoint`](crate::Endpoint): one reliable queue pair for each peer and rail, slots registered
//! when an epoch begins, one completion queue for each rail, polled by the data loop, which sleeps on its channel when nothing comes. On the way of a frame nothing is
//! allocated, registered or copied (but for frames short enough to travel inside the request), and no lock is taken that is ours.
//!
//! ```text
//!  worker                        network card                  peer's card                   peer
//!  builds the frame in its slot
//!  post: WRITE WITH IMMEDIATE -> reads the slot, sends     -> writes the peer's slot,
//!                                                             completes a receive        -> poll: Arrived
//! ```
//!
//! # How two workers meet
//! Over a data connection of the [`QuicNode`](crate::quic::QuicNode), so both have proved who they are, for one epoch. Each says in an offer where its slots are
//! and which queue pairs it has; both connect. The connection stays: its end is the peer's end, and it carries the farewell of a worker that leaves in order. Keys,
//! queue pairs and memory are an epoch's own and go with it.
//!
//! # Why the slots are safe to use in place
//! A lane is a ball: a worker touches its outgoing slot only while it holds the lane, and then the peer's answer has come, so the last frame was received whole (a
//! packet that is sent again after that is a duplicate, which a receiver drops). The incoming slot is written by the peer only while the peer holds the lane. A
//! peer that breaks this (it has proved that it is a worker of the cluster) can spoil frames, not more: what it may write is slots and nothing else.
//!
//! # When things break
//! A broken queue pair, a port that stays down, a connection that ends: the peer is lost, with a reason, within the network's deadline, and the next epoch makes everything anew over
//! the rails that work.
#![allow(unsafe_code)]

mod bell;
mod endpoint;
mod error;
mod fabric;
mod link;
mod offer;
mod rail;
mod slots;

pub use endpoint::RdmaEndpoint;
pub use error::RdmaError;
pub use fabric::RdmaFabric;
#[doc(hidden)]
pub use offer::describe_offer;
pub use rail::{GidChoice, RailName, RdmaOptions, RdmaOptionsError};
