//! One peer of an endpoint, seen from the network: the meeting, then the watch until one side goes.
//!
//! The data loop and this task share little: what was agreed on and how the peer went are each written once by the task and read by the loop; orders go the other way.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream, VarInt};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use super::bell::Bell;
use super::offer::{OFFER_MAX, Offer, RailOffer, common};
use super::rail::{Rail, RdmaOptions};
use super::slots::Layout;
use crate::quic::{self, Calls, Carrier, DataHello, LINGER, QuicNode};
use crate::verbs::{self, QueuePair, RemoteMemory, VerbsError};
use crate::{Epoch, LostReason, Role, Topology, WorkerId};

/// What loop and task share.
pub(super) struct Link {
    /// By rail.
    pub(super) pairs: Box<[QueuePair]>,
    pub(super) orders: mpsc::UnboundedSender<Order>,
    agreed: OnceLock<Agreed>,
    farewell: OnceLock<Farewell>,
    bell: Arc<Bell>,
}

/// Where frames to the peer go, by micro-batch.
pub(super) struct Agreed {
    pub(super) rails: Box<[u8]>,
    pub(super) slots: Box<[RemoteMemory]>,
}

/// How the peer went.
#[derive(Clone, Copy, Debug)]
pub(super) struct Farewell {
    pub(super) reason: LostReason,
    /// How many frames it has sent altogether, if it said so: the last may still be on their way.
    pub(super) frames: Option<u64>,
}

/// What the loop tells the task.
pub(super) enum Order {
    /// The worker leaves, having sent so many frames.
    Leave(u64),
    /// The peer broke something.
    Break(String),
    /// All frames of a peer that left have come.
    Heard,
}

impl Link {
    pub(super) fn new(
        pairs: Box<[QueuePair]>,
        bell: Arc<Bell>,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Order>) {
        let (orders, obeyed) = mpsc::unbounded_channel();
        let link = Self {
            pairs,
            orders,
            agreed: OnceLock::new(),
            farewell: OnceLock::new(),
            bell,
        };
        (Arc::new(link), obeyed)
    }

    pub(super) fn agreed(&self) -> Option<&Agreed> {
        self.agreed.get()
    }

    pub(super) fn farewell(&self) -> Option<Farewell> {
        self.farewell.get().copied()
    }

    fn part(&self, reason: LostReason, frames: Option<u64>) {
        if self.farewell.set(Farewell { reason, frames }).is_ok() {
            self.bell.announce();
        }
    }
}

/// What the task of a peer has.
pub(super) struct Meeting {
    pub(super) me: WorkerId,
    pub(super) peer: WorkerId,
    pub(super) epoch: Epoch,
    pub(super) topology: Topology,
    pub(super) options: Arc<RdmaOptions>,
    pub(super) rails: Arc<[Rail]>,
    pub(super) link: Arc<Link>,
    pub(super) orders: mpsc::UnboundedReceiver<Order>,
    /// Our side of it.
    pub(super) offer: Offer,
    /// Rails that are dead, as bits.
    pub(super) dead: watch::Receiver<u32>,
}

impl Meeting {
    /// Calls the peer, an expert worker, and serves the link.
    pub(super) async fn call(self, node: QuicNode, address: SocketAddr) {
        let data = DataHello {
            carrier: Carrier::Verbs,
            epoch: self.epoch,
            attention: self.me.index,
            expert: self.peer.index,
            connection: 0,
            connections: 1,
            topology: self.topology,
        };
        let abandoned = || !self.orders.is_empty() || self.orders.is_closed();
        let limit = node.connect_limit();
        match node.dial(data, address, abandoned).await {
            Ok(connection) => self.meet(connection, limit).await,
            Err(reason) => self.link.part(reason, None),
        }
    }

    /// Waits for the peer, an attention worker, and serves the link.
    pub(super) async fn be_called(self, mut calls: Calls, limit: Duration) {
        match timeout(limit, calls.recv()).await {
            Ok(Some((connection, _))) => self.meet(connection, limit).await,
            // This worker has left.
            Ok(None) => {}
            Err(_) => self.link.part(LostReason::Unreachable, None),
        }
    }

    async fn meet(mut self, connection: Connection, limit: Duration) {
        let agreed = match timeout(limit, self.agree(&connection)).await {
            Ok(agreed) => agreed,
            Err(_) => Err("it did not answer an offer".to_owned()),
        };
        match agreed {
            Ok((agreed, streams)) => {
                let used = agreed
                    .rails
                    .iter()
                    .fold(0, |used, &rail| used | 1_u32 << rail);
                let _ = self.link.agreed.set(agreed);
                self.link.bell.announce();
                self.watch(connection, streams, used).await;
            }
            Err(reason) => {
                let (me, peer, epoch) = (self.me, self.peer, self.epoch);
                tracing::warn!("{me}: no lanes over RDMA to {peer} in {epoch}: {reason}");
                connection.close(VarInt::from_u32(1), reason.as_bytes());
                self.link.part(LostReason::Unreachable, None);
            }
        }
    }

    /// Offers go both ways; when the called side's is on its way it takes frames, and when the caller has read it both do.
    async fn agree(
        &self,
        connection: &Connection,
    ) -> Result<(Agreed, (SendStream, RecvStream)), String> {
        let ours = self.offer.encode();
        let (mut send, mut receive);
        let agreed = match self.me.role {
            Role::Attention => {
                (send, receive) = connection.open_bi().await.map_err(|e| e.to_string())?;
                write(&mut send, &ours).await?;
                self.connect(&read(&mut receive).await?).await?
            }
            Role::Expert => {
                (send, receive) = connection.accept_bi().await.map_err(|e| e.to_string())?;
                let agreed = self.connect(&read(&mut receive).await?).await?;
                write(&mut send, &ours).await?;
                agreed
            }
        };
        Ok((agreed, (send, receive)))
    }

    /// Checks an offer and connects the queue pairs of all rails that both sides have.
    async fn connect(&self, bytes: &[u8]) -> Result<Agreed, String> {
        let theirs = Offer::decode(bytes)?;
        theirs.check(self.epoch, &self.topology, self.peer.role)?;
        let shared = common(&self.offer.rails, &theirs.rails);
        if shared.is_empty() {
            return Err(format!(
                "no rail is up at both ends: {} are offered here, {} there; list the same rails in the same order on every host (rdma.rails)",
                self.offer.rails.len(),
                theirs.rails.len()
            ));
        }
        let (link, rails) = (Arc::clone(&self.link), Arc::clone(&self.rails));
        let options = Arc::clone(&self.options);
        let ours = self.offer.rails.clone();
        let (used, offered) = (shared.clone(), theirs.rails.clone());
        // A peer's address may have to be resolved, which blocks.
        let connected = tokio::task::spawn_blocking(move || {
            used.iter()
                .map(|&rail| usize::from(rail))
                .try_for_each(|rail| {
                    let to = connection(&rails[rail], &ours[rail], &offered[rail], &options);
                    link.pairs[rail].connect(&to)
                })
        });
        let connected: Result<(), VerbsError> =
            connected.await.map_err(|error| error.to_string())?;
        connected.map_err(|error| error.to_string())?;

        let layout = Layout::incoming(&self.topology, self.peer.role);
        let rail_of = |micro_batch: u8| shared[usize::from(micro_batch) % shared.len()];
        let all = 0..self.topology.micro_batches;
        Ok(Agreed {
            rails: all.clone().map(rail_of).collect(),
            slots: all
                .map(|micro_batch| RemoteMemory {
                    address: theirs.address + layout.start(self.me.index, micro_batch) as u64,
                    key: theirs.rails[usize::from(rail_of(micro_batch))].key,
                })
                .collect(),
        })
    }

    /// Until one side goes.
    async fn watch(
        &mut self,
        connection: Connection,
        (mut send, mut receive): (SendStream, RecvStream),
        used: u32,
    ) {
        let mut count = [0; 8];
        {
            let farewell = receive.read_exact(&mut count);
            tokio::pin!(farewell);
            loop {
                tokio::select! {
                    read = &mut farewell => {
                        if read.is_err() {
                            let _ = timeout(LINGER, connection.closed()).await;
                            return self.link.part(quic::reason(&connection), None);
                        }
                        break;
                    }
                    order = self.orders.recv() => match order {
                        Some(Order::Leave(frames)) => {
                            if send.write_all(&frames.to_le_bytes()).await.is_ok() {
                                // The peer closes when it has everything; one that leaves too says so.
                                tokio::select! {
                                    _ = connection.closed() => {}
                                    _ = &mut farewell => {}
                                    () = sleep(LINGER) => {}
                                }
                            }
                            return connection.close(VarInt::from_u32(0), b"closed");
                        }
                        Some(Order::Break(why)) => {
                            return connection.close(VarInt::from_u32(1), why.as_bytes());
                        }
                        Some(Order::Heard) => {}
                        None => return connection.close(VarInt::from_u32(0), b"closed"),
                    },
                    Ok(()) = self.dead.changed() => {
                        if *self.dead.borrow() & used != 0 {
                            connection.close(VarInt::from_u32(1), b"a port is down");
                            return self.link.part(LostReason::Broken, None);
                        }
                    }
                }
            }
        }
        self.link
            .part(LostReason::Closed, Some(u64::from_le_bytes(count)));
        tokio::select! {
            _ = self.orders.recv() => {}
            _ = connection.closed() => {}
            () = sleep(LINGER) => {}
        }
        connection.close(VarInt::from_u32(0), b"closed");
    }
}

/// How the queue pair of a rail is connected.
fn connection(
    rail: &Rail,
    ours: &RailOffer,
    theirs: &RailOffer,
    options: &RdmaOptions,
) -> verbs::Connection {
    verbs::Connection {
        queue_pair: theirs.queue_pair,
        path: rail.path(theirs.lid, theirs.gid, options, ours.queue_pair),
        mtu: ours.mtu.min(theirs.mtu),
        receive_psn: theirs.psn,
        send_psn: ours.psn,
        reliability: options.reliability(),
    }
}

async fn write(send: &mut SendStream, offer: &[u8]) -> Result<(), String> {
    let len = (offer.len() as u16).to_le_bytes();
    for part in [&len[..], offer] {
        let sent = send.write_all(part).await;
        sent.map_err(|error| error.to_string())?;
    }
    Ok(())
}

async fn read(receive: &mut RecvStream) -> Result<Vec<u8>, String> {
    let mut len = [0; 2];
    let read = receive.read_exact(&mut len).await;
    read.map_err(|error| error.to_string())?;
    let len = usize::from(u16::from_le_bytes(len));
    if len > OFFER_MAX {
        return Err(format!(
            "its offer has {len} bytes; there may be {OFFER_MAX}"
        ));
    }
    let mut offer = vec![0; len];
    let read = receive.read_exact(&mut offer).await;
    read.map_err(|error| error.to_string())?;
    Ok(offer)
}
