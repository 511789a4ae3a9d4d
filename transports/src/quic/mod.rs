//! QUIC with mutual TLS: control links between processes, and a fabric whose lanes are streams.
//!
//! A process has one [`QuicNode`]: one UDP socket on which it calls and is called. Whoever calls says what for in a *hello*; everything behind it depends on that:
//! * a [`ControlLink`] carries messages of any kind between two processes;
//! * *data connections*, some for each pair of attention and expert worker and for one epoch, carry a stream for each lane. [`QuicNode::join`] makes them an
//!   [`Endpoint`](crate::Endpoint);
//! * a *probe* ([`QuicNode::probe`]) carries nothing: it tells whether and how a node is reached, before anything depends on it.
//!
//! Who may do what stands in certificates ([`Identity`]): all are signed by the cluster's own authority, and each names a [`NodeRole`]. A peer without one gets
//! no further than the handshake. Handshakes and hellos have deadlines and bounded numbers, so that strangers cannot hold resources. A peer that breaks the
//! protocol loses its connection, with a reason, and nothing else is touched.
//!
//! A frame's bytes are copied once on each side: into the connection's send buffer, and from its receive buffer into the slot.

mod authority;
mod control;
mod error;
mod fabric;
mod framing;
mod hello;
mod identity;
mod node;
mod setup;
#[cfg(test)]
mod tests;
mod welcome;

#[doc(hidden)]
pub use framing::read_messages;
#[doc(hidden)]
pub use hello::describe_hello;

pub(crate) use fabric::{LINGER, Leave, reason};
pub(crate) use hello::{Carrier, DataHello};
pub(crate) use node::{Calls, check};

pub use authority::{CertificateAuthority, IssuedCertificate, revoked_serials};
pub use control::{ControlLink, ControlReceiver, ControlSender, Peer};
pub use error::QuicError;
pub use fabric::QuicEndpoint;
pub use framing::CONTROL_MESSAGE_MAX;
pub use identity::{Details, Identity, IdentityError, NodeRole, details};
pub use node::{QuicNode, QuicOptions, Reached, WeakQuicNode};
