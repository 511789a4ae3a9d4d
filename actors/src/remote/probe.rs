//! Whether and how one process reaches another, and if not, why: tried before anything depends on it.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use volley_transports::WorkerId;
use volley_transports::quic::{NodeRole, QuicError, QuicNode};

/// A host that refuses says so within this time.
const REFUSAL: Duration = Duration::from_millis(500);

/// The way from one worker to another, as the first found it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edge {
    /// Who tried.
    pub from: WorkerId,
    /// Whom it tried to reach.
    pub to: WorkerId,
    /// Where.
    pub address: SocketAddr,
    /// How it went.
    pub result: Result<Way, Trouble>,
}

/// A way that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// Until both had proved who they are.
    pub handshake: Duration,
    /// There and back.
    pub round_trip: Duration,
    /// Largest UDP payload that gets there, in bytes.
    pub datagram: u16,
}

/// A way that is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// What is wrong.
    pub cause: Cause,
    /// In the words of whoever noticed.
    pub detail: String,
}

/// Why a way is not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The host has no route to the address.
    NoRoute,
    /// The host is there, and nothing listens on the port.
    NobodyListens,
    /// The host answers TCP, but no UDP comes back.
    UdpBlocked,
    /// The host does not answer at all.
    Silent,
    /// Somebody is there with a certificate that is not good for this.
    Certificate,
    /// Somebody is there and refuses for another reason.
    Refused,
}

impl Cause {
    /// What to do about it.
    pub const fn remedy(self) -> &'static str {
        match self {
            Cause::NoRoute => {
                "the host has no route there: look at `ip route get ADDRESS`, the interface and its netmask"
            }
            Cause::NobodyListens => {
                "no worker listens at that port any more: is the process up, and is there translation of addresses (NAT) between the hosts, which must not be?"
            }
            Cause::UdpBlocked => {
                "the host is up but UDP does not come back: open the port (network.listen fixes it) for UDP in both directions, or packets of 1,280 bytes do not pass (MTU)"
            }
            Cause::Silent => {
                "the host is down, its address is wrong, or a firewall drops everything between the two"
            }
            Cause::Certificate => {
                "the two are of different clusters, roles or seats: give both what one `volley certs` made"
            }
            Cause::Refused => "the process there says why",
        }
    }
}

/// Tries the way from this process to a worker.
pub(super) async fn edge(
    node: &QuicNode,
    from: WorkerId,
    to: WorkerId,
    address: SocketAddr,
) -> Edge {
    let result = match node.probe(address, NodeRole::Worker).await {
        Ok(reached) => match reached.peer.seat.filter(|&seat| seat != to) {
            None => Ok(Way {
                handshake: reached.handshake,
                round_trip: reached.round_trip,
                datagram: reached.datagram,
            }),
            Some(seat) => Err(Trouble {
                cause: Cause::Certificate,
                detail: format!("the certificate there is {seat}'s"),
            }),
        },
        Err(error) => Err(diagnose(address, &error).await),
    };
    Edge {
        from,
        to,
        address,
        result,
    }
}

/// The cause behind an error, found out with plain sockets where QUIC only knows that no answer came.
async fn diagnose(address: SocketAddr, error: &QuicError) -> Trouble {
    let detail = error.to_string();
    let cause = match error {
        QuicError::Refused { .. } => Cause::Refused,
        // The words of TLS, of either side.
        _ if ["certificate", "cryptographic handshake"]
            .iter()
            .any(|word| detail.contains(word)) =>
        {
            Cause::Certificate
        }
        _ => silence(address).await,
    };
    Trouble { cause, detail }
}

/// Why nothing comes back from an address.
async fn silence(address: SocketAddr) -> Cause {
    let asked = tokio::task::spawn_blocking(move || udp(address)).await;
    if let Ok(Some(cause)) = asked {
        return cause;
    }
    match timeout(REFUSAL, tokio::net::TcpStream::connect(address)).await {
        Ok(Ok(_)) => Cause::UdpBlocked,
        Ok(Err(error)) => match error.kind() {
            ErrorKind::ConnectionRefused => Cause::UdpBlocked,
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Cause::NoRoute,
            _ => Cause::Silent,
        },
        Err(_) => Cause::Silent,
    }
}

/// What the system says of a datagram to an address; none if it says nothing.
fn udp(address: SocketAddr) -> Option<Cause> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => ([0; 4], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let told = |error: std::io::Error| match error.kind() {
        ErrorKind::ConnectionRefused => Some(Cause::NobodyListens),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Some(Cause::NoRoute),
        _ => None,
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.set_read_timeout(Some(REFUSAL)).ok()?;
    if let Err(error) = socket
        .connect(address)
        .and_then(|()| socket.send(&[0]).map(drop))
    {
        return told(error);
    }
    // A datagram of one byte is no QUIC: whoever listens says nothing, and the system only if nobody does.
    told(socket.recv(&mut [0; 16]).err()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn causes_are_told_apart() {
        // A port that was free a moment ago; and one that is bound and mute, while TCP is refused there.
        let free = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        assert_eq!(silence(free).await, Cause::NobodyListens);
        let mute = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(silence(mute.local_addr().unwrap()).await, Cause::UdpBlocked);
        let tls = QuicError::Connect {
            address: free,
            expected: NodeRole::Worker,
            reason: "the cryptographic handshake failed: error 48: invalid peer certificate: UnknownIssuer".to_owned(),
        };
        assert_eq!(diagnose(free, &tls).await.cause, Cause::Certificate);
        let refused = QuicError::Refused {
            address: free,
            reason: "full".to_owned(),
        };
        assert_eq!(diagnose(free, &refused).await.cause, Cause::Refused);
    }
}
