//! How QUIC is set up: socket, limits, windows.
//!
//! What a peer can make this process hold for a connection is its window, in each direction: [`Window::stranger`] until it has shown who it is and said what it
//! wants, then what that takes. Beside it there are the datagrams of a handshake ([`HANDSHAKE_BYTES`]) and the state of at most [`LANES_MAX`] + 1 streams.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::BbrConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use super::hello::{Carrier, DataHello};
use super::identity::{Identity, IdentityError, content};
use super::welcome::STRANGERS_MAX;
use super::{QuicError, QuicOptions};

/// Lanes of a connection.
pub(super) const LANES_MAX: u32 = 64;
/// Datagrams of a handshake that wait to be looked at, for each, in bytes.
const HANDSHAKE_BYTES: u64 = 64 << 10;
/// What a connection may send before it knows the path: a few slots of small models.
const INITIAL_WINDOW: u64 = 256 << 10;
/// Largest datagram that is tried: an Ethernet jumbo frame less the IPv6 and UDP headers. Found out for each path; each packet costs about the same, so large ones pay.
const PAYLOAD_MAX: u16 = 8952;
/// Memory the system is asked for, for datagrams that have come. It gives what its own limit allows.
const SOCKET_BUFFER: usize = 8 << 20;

/// Bytes of a connection that are on their way or wait to be read, in each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Window(u32);

impl Window {
    /// The most that any connection gets.
    pub(super) const MAX: Window = Window(64 << 20);

    /// Before the hello is taken: room for it, and for its answer.
    pub(super) const fn stranger() -> Self {
        Window(4 << 10)
    }

    /// For a control link. Messages may be longer; they come in pieces.
    pub(super) const fn control() -> Self {
        Window(1 << 20)
    }

    /// For the lanes of a data connection: each has one frame on its way, and the next may begin before word is back that the last one was read.
    pub(super) fn lanes(data: &DataHello) -> Self {
        if data.carrier == Carrier::Verbs {
            // Offers and farewells are shorter than a hello's room.
            return Self::stranger();
        }
        const SLACK: usize = 64 << 10;
        let slot = data
            .topology
            .dispatch_bytes
            .max(data.topology.combine_bytes);
        let frames = slot.saturating_mul(2 * data.micro_batches().count());
        let bytes = u32::try_from(frames.saturating_add(SLACK)).unwrap_or(u32::MAX);
        Window(bytes.min(Self::MAX.0))
    }

    /// Gives a connection this window.
    pub(super) fn open(self, connection: &Connection) {
        connection.set_send_window(self.0.into());
        connection.set_receive_window(VarInt::from_u32(self.0));
    }
}

/// What all connections of a node have in common.
pub(super) fn transport(options: &QuicOptions) -> Result<Arc<TransportConfig>, QuicError> {
    let idle = IdleTimeout::try_from(options.idle).map_err(|_| {
        QuicError::Option(format!(
            "an idle time of {:?} cannot be written",
            options.idle
        ))
    })?;
    let mut transport = TransportConfig::default();
    let mut congestion = BbrConfig::default();
    congestion.initial_window(INITIAL_WINDOW);
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(PAYLOAD_MAX);
    transport
        .mtu_discovery_config(Some(mtu))
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(options.keep_alive))
        // The hello's, and one for each lane.
        .max_concurrent_bidi_streams(VarInt::from_u32(LANES_MAX + 1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        // A stream may use all of its connection's window, which is what bounds it.
        .stream_receive_window(VarInt::from_u32(Window::MAX.0))
        .receive_window(VarInt::from_u32(Window::stranger().0))
        .send_window(Window::stranger().0.into())
        .datagram_receive_buffer_size(None)
        .initial_rtt(Duration::from_millis(20))
        .congestion_controller_factory(Arc::new(congestion));
    Ok(Arc::new(transport))
}

/// What calls are made with.
pub(super) fn client(
    identity: &Identity,
    transport: &Arc<TransportConfig>,
) -> Result<quinn::ClientConfig, QuicError> {
    let crypto = QuicClientConfig::try_from(identity.client()).map_err(|e| unusable(&e))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::clone(transport));
    Ok(config)
}

/// What calls are taken with.
pub(super) fn server(
    identity: &Identity,
    transport: &Arc<TransportConfig>,
) -> Result<quinn::ServerConfig, QuicError> {
    let crypto = QuicServerConfig::try_from(identity.server()).map_err(|e| unusable(&e))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(Arc::clone(transport))
        .max_incoming(STRANGERS_MAX)
        .incoming_buffer_size(HANDSHAKE_BYTES)
        .incoming_buffer_size_total(HANDSHAKE_BYTES * STRANGERS_MAX as u64);
    Ok(config)
}

fn unusable(error: &dyn std::fmt::Display) -> IdentityError {
    content("certificate and key", error)
}

/// What the socket is used with.
pub(super) fn endpoint() -> Result<EndpointConfig, QuicError> {
    let mut config = EndpointConfig::default();
    config
        .max_udp_payload_size(PAYLOAD_MAX)
        .map_err(|error| QuicError::Option(error.to_string()))?;
    Ok(config)
}

pub(super) fn socket(listen: SocketAddr) -> std::io::Result<std::net::UdpSocket> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(
        Domain::for_address(listen),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    // What the system does not give costs speed, not correctness.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.bind(&listen.into())?;
    Ok(socket.into())
}
