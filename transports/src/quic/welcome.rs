//! Taking calls: who calls, what for, and whether there is room for it.
//!
//! A caller is a *stranger* until it has shown its certificate and said hello; strangers have [`STRANGERS_MAX`] places and a deadline. A worker whose epoch has not
//! begun here yet waits at one of [`CALLERS_MAX`] other places, so neither can keep the other out.

use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Incoming, RecvStream, SendStream, VarInt};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

use super::control::{ControlLink, Peer};
use super::fabric::PeerSide;
use super::hello::{DataHello, HELLO_BYTES, Hello, LEFT, TAKEN, refusal};
use super::identity::NodeRole;
use super::node::{Calls, MTU_SEARCH, Shared, peer};
use super::setup::Window;
use crate::{LostReason, Role};

/// Handshakes and hellos of strangers under way at once; more are turned away.
pub(super) const STRANGERS_MAX: usize = 256;
/// Workers that wait at once for an epoch to begin here; more are refused, and call again.
pub(super) const CALLERS_MAX: usize = 1024;
/// Control links that wait to be accepted; more are turned away.
pub(super) const LINKS_WAITING_MAX: usize = 64;
/// Time for a caller to read why it was refused.
const LAST_WORD: Duration = Duration::from_secs(1);

/// A data connection that was taken, and what its caller said.
pub(crate) type Arrived = (Connection, DataHello);

/// A caller that has shown who it is and said hello.
struct Caller {
    connection: Connection,
    peer: Peer,
    send: SendStream,
    receive: RecvStream,
    hello: Result<Hello, String>,
}

/// Why a caller gets nothing.
enum Refusal {
    /// The worker was in that epoch and has left it.
    Left,
    /// For this reason.
    Because(String),
}

impl Shared {
    /// Takes calls until the node ends.
    pub(super) async fn listen(self: Arc<Self>) {
        while let Some(incoming) = self.endpoint.accept().await {
            let places = self.strangers.available_permits();
            let Ok(place) = Arc::clone(&self.strangers).try_acquire_owned() else {
                incoming.refuse();
                continue;
            };
            // When they get few, whoever calls has to show first that it is where it says: an address can be made up, a way back cannot.
            if places < STRANGERS_MAX / 2 && !incoming.remote_address_validated() {
                let _ = incoming.retry();
                continue;
            }
            let shared = Arc::clone(&self);
            tokio::spawn(async move {
                let from = incoming.remote_address();
                let limit = shared.options.connect;
                let caller = timeout(limit, greet(incoming)).await;
                drop(place);
                match caller {
                    Ok(Ok(caller)) => {
                        if let Err(reason) = shared.welcome(caller).await {
                            tracing::warn!("a call from {from} was refused: {reason}");
                        }
                    }
                    Ok(Err(reason)) => tracing::warn!("a call from {from} was refused: {reason}"),
                    Err(_) => tracing::warn!("a call from {from} said nothing within {limit:?}"),
                }
            });
        }
    }

    /// Gives a caller what it wants, or says why not.
    async fn welcome(&self, caller: Caller) -> Result<(), String> {
        let Caller {
            connection,
            peer,
            mut send,
            receive,
            hello,
        } = caller;
        let said = |error: quinn::WriteError| error.to_string();
        let refused = match hello {
            Ok(Hello::Control) => match self.links.try_reserve() {
                Ok(place) => {
                    send.write_all(&[TAKEN]).await.map_err(said)?;
                    Window::control().open(&connection);
                    place.send(ControlLink::new(peer, connection, send, receive));
                    return Ok(());
                }
                Err(_) => Refusal::Because("too many links wait to be taken".to_owned()),
            },
            Ok(Hello::Probe) => {
                send.write_all(&[TAKEN]).await.map_err(said)?;
                // It looks how large datagrams may be, and hangs up.
                let _ = timeout(MTU_SEARCH, connection.closed()).await;
                return Ok(());
            }
            Ok(Hello::Data(data)) => match self.take(&peer, &data).await {
                Ok(place) => {
                    send.write_all(&[TAKEN]).await.map_err(said)?;
                    Window::lanes(&data).open(&connection);
                    // Dropped without a word if the worker has left meanwhile; the caller sees the connection close.
                    place.send((connection, data));
                    return Ok(());
                }
                Err(refusal) => refusal,
            },
            Err(reason) => Refusal::Because(reason),
        };
        let answer = match &refused {
            Refusal::Left => vec![LEFT],
            Refusal::Because(reason) => refusal(reason),
        };
        let _ = send.write_all(&answer).await;
        let _ = send.finish();
        let _ = timeout(LAST_WORD, send.stopped()).await;
        match refused {
            Refusal::Left => Ok(()),
            Refusal::Because(reason) => {
                connection.close(VarInt::from_u32(1), reason.as_bytes());
                Err(format!("{} {}: {reason}", peer.role, peer.name))
            }
        }
    }

    /// A place for a data connection with the worker it is for. Waits for a worker that is about to join the epoch.
    async fn take(
        &self,
        peer: &Peer,
        data: &DataHello,
    ) -> Result<mpsc::OwnedPermit<Arrived>, Refusal> {
        let because = |reason: String| Err(Refusal::Because(reason));
        if peer.role != NodeRole::Worker {
            return because("only workers exchange rows".to_owned());
        }
        let caller = Role::Attention.worker(data.attention);
        if let Some(seat) = peer.seat.filter(|&seat| seat != caller) {
            return because(format!(
                "its certificate is {seat}'s, and it calls as {caller}"
            ));
        }
        let Ok(_place) = self.callers.try_acquire() else {
            return because(format!("{CALLERS_MAX} workers wait for an epoch already"));
        };
        let until = Instant::now() + self.options.connect;
        let mut changes = self.changes.subscribe();
        loop {
            if let Some(joined) = self.joined().get(&data.expert) {
                let (ours, theirs) = (joined.epoch, data.epoch);
                if theirs < ours {
                    let expert = data.expert;
                    return because(format!("{theirs} is over; expert-{expert} is in {ours}"));
                }
                if theirs == ours {
                    let disagreement = data.disagreement(&joined.topology);
                    if joined.carrier != data.carrier {
                        let (ours, theirs) = (joined.carrier, data.carrier);
                        return because(format!("rows travel by {ours} there, by {theirs} here"));
                    }
                    if !disagreement.is_empty() {
                        return because(format!("we disagree: {disagreement}"));
                    }
                    let Some(taker) = joined.takers.get(usize::from(data.attention)) else {
                        return Err(Refusal::Left);
                    };
                    return taker.clone().try_reserve_owned().map_err(|_| {
                        Refusal::Because(format!(
                            "attention-{} has its lanes of {ours}, or did not come for them in time",
                            data.attention
                        ))
                    });
                }
            }
            match timeout_at(until, changes.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return because("the node ends".to_owned()),
                Err(_) => {
                    let (expert, epoch) = (data.expert, data.epoch);
                    return because(format!("expert-{expert} has not joined {epoch} here"));
                }
            }
        }
    }
}

/// Handshake and hello.
async fn greet(incoming: Incoming) -> Result<Caller, String> {
    let connection = incoming.await.map_err(|error| error.to_string())?;
    let peer = peer(&connection)?;
    let (send, mut receive) = connection.accept_bi().await.map_err(|e| e.to_string())?;
    let mut bytes = [0; HELLO_BYTES];
    receive
        .read_exact(&mut bytes)
        .await
        .map_err(|e| e.to_string())?;
    Ok(Caller {
        connection,
        peer,
        send,
        receive,
        hello: Hello::decode(&bytes),
    })
}

/// Waits for an attention worker's connections, and serves its lanes. Whoever calls for it after that is refused.
pub(super) async fn serve_as_called(side: PeerSide, mut calls: Calls, limit: Duration) {
    let until = Instant::now() + limit;
    let mut open: Vec<(Connection, DataHello)> = Vec::new();
    while open
        .first()
        .is_none_or(|(_, data)| open.len() < usize::from(data.connections))
    {
        match timeout_at(until, calls.recv()).await {
            Ok(Some((connection, data))) => {
                let contradicts = |(_, other): &Arrived| {
                    other.connection == data.connection || other.connections != data.connections
                };
                if open.iter().any(contradicts) {
                    let reason = b"the same connection twice, or another number of them";
                    connection.close(VarInt::from_u32(1), reason);
                    continue;
                }
                open.push((connection, data));
            }
            // Nobody calls any more: the worker has left, or the peer is not there.
            Ok(None) => return,
            Err(_) => return side.lose(LostReason::Unreachable),
        }
    }
    drop(calls);
    let lanes = |(connection, data): Arrived| (connection, data.micro_batches().collect());
    side.serve(open.into_iter().map(lanes).collect()).await;
}
