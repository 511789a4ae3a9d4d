//! Opened rails, and the ends that are made on them for each epoch.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::RdmaError;
use super::bell::Bell;
use super::endpoint::{
    Core, Ending, LaneState, PeerState, Place, RdmaEndpoint, Sends, Standing, receive_id,
};
use super::link::{Link, Meeting};
use super::offer::{Offer, RailOffer};
use super::rail::{Rail, RailName, RdmaOptions};
use super::slots::Slots;
use crate::endpoint::FIRST_HOLDER;
use crate::quic::{self, Carrier, QuicNode};
use crate::verbs::{
    Access, AsyncEventKind, CompletionChannel, CompletionQueue, Mtu, QueuePair, QueuePairKind,
    QueuePairOptions, Receive,
};
use crate::{Epoch, Role, Spin, Topology, WorkerId};

/// The rails of this process. Clones are the same.
#[derive(Clone)]
pub struct RdmaFabric(Arc<Shared>);

struct Shared {
    node: QuicNode,
    options: Arc<RdmaOptions>,
    rails: Arc<[Rail]>,
    spin: Spin,
    /// Rails that are dead, as bits.
    dead: watch::Sender<u32>,
    watchers: Vec<JoinHandle<()>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.watchers.iter().for_each(JoinHandle::abort);
    }
}

impl std::fmt::Debug for RdmaFabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<String> = self.rails().map(ToString::to_string).collect();
        write!(f, "RdmaFabric({})", names.join(", "))
    }
}

impl RdmaFabric {
    /// Opens the rails. Workers meet over `node`. A worker looks `spin` times before it sleeps.
    ///
    /// # Errors
    /// libibverbs or the devices are not there, or an option is out of range.
    pub fn open(node: QuicNode, options: RdmaOptions, spin: Spin) -> Result<Self, RdmaError> {
        options.check()?;
        let rails: Arc<[Rail]> = Rail::open_all(&options)?.into();
        let dead = watch::Sender::new(0);
        let watchers = (0..rails.len())
            .map(|index| {
                let (rails, dead) = (Arc::clone(&rails), dead.clone());
                let patience = options.port_patience;
                node.spawn(async move { watch_rail(&rails[index], index, patience, &dead).await })
            })
            .collect();
        Ok(Self(Arc::new(Shared {
            node,
            options: Arc::new(options),
            rails,
            spin,
            dead,
            watchers,
        })))
    }

    /// The largest packets that every rail takes.
    pub fn mtu(&self) -> Mtu {
        let rails = self.0.rails.iter().map(|rail| rail.mtu(&self.0.options));
        rails.min().unwrap_or(Mtu::B4096)
    }

    /// The rails that were opened.
    pub fn rails(&self) -> impl Iterator<Item = &RailName> {
        self.0.rails.iter().map(|rail| &rail.name)
    }

    /// This worker's end of the lanes of one epoch; see [`QuicNode::join`], which has the same arguments. Memory is registered and queue pairs are made here; peers are met meanwhile.
    ///
    /// # Errors
    /// The topology cannot be carried, or a device has not enough of something.
    pub fn join(
        &self,
        epoch: Epoch,
        me: WorkerId,
        topology: &Topology,
        experts: &[Option<SocketAddr>],
    ) -> Result<RdmaEndpoint, RdmaError> {
        quic::check(me, topology)?;
        let shared = &*self.0;
        let (rails, options) = (&shared.rails, &shared.options);
        let peers = topology.workers(me.role.opposite());
        let micro_batches = u32::from(topology.micro_batches);
        let depth = options.depth.max(2 * micro_batches);

        let slots = Slots::new(topology, me.role, rails, options.pages)?;
        let completions = rails.iter().map(|rail| {
            let channel = CompletionChannel::new(&rail.context)?;
            // A queue pair that breaks completes everything that it had.
            let entries = u32::from(peers).max(1) * (depth + micro_batches);
            let queue = CompletionQueue::new(&rail.context, entries, Some(&channel))?;
            Ok((queue, channel))
        });
        let completions = completions.collect::<Result<Box<[_]>, RdmaError>>()?;
        let bell = Arc::new(Bell::new().map_err(RdmaError::Bell)?);
        let (mut calls, leave) = match me.role {
            Role::Attention => (Vec::new(), None),
            Role::Expert => {
                let (calls, leave) = shared.node.expect(Carrier::Verbs, epoch, me, topology);
                (calls, Some(leave))
            }
        };
        let mut calls = calls.drain(..);
        let mut tasks = Vec::new();
        let mut states = Vec::new();
        let pair_options = QueuePairOptions {
            kind: QueuePairKind::Reliable,
            send_depth: depth,
            receive_depth: micro_batches,
            send_pieces: 1,
            receive_pieces: 1,
            inline_bytes: options.inline_bytes,
        };
        for peer in 0..peers {
            let address = experts.get(usize::from(peer)).copied().flatten();
            let called = calls.next();
            let link = if me.role == Role::Attention && address.is_none() {
                None
            } else {
                let pairs = (rails.iter().zip(&completions).enumerate())
                    .map(|(index, (rail, (queue, _)))| {
                        let pair = QueuePair::new(&rail.domain, queue, queue, &pair_options)?;
                        pair.initialize(rail.name.port, Access::REMOTE_WRITE, 0)?;
                        let receive = Receive {
                            id: receive_id(peer, index),
                            pieces: &[],
                        };
                        // One for each lane: before the peer can send on it again, it is laid out again.
                        let laid = pair.post_receives((0..micro_batches).map(|_| receive));
                        laid.map_err(|error| RdmaError::Rail {
                            rail: rail.name.to_string(),
                            reason: error.to_string(),
                        })?;
                        Ok(pair)
                    })
                    .collect::<Result<Box<[_]>, RdmaError>>()?;
                let (link, orders) = Link::new(pairs, Arc::clone(&bell));
                let meeting = Meeting {
                    me,
                    peer: me.role.opposite().worker(peer),
                    epoch,
                    topology: *topology,
                    options: Arc::clone(options),
                    rails: Arc::clone(rails),
                    offer: self.offer(epoch, &slots, &link),
                    link: Arc::clone(&link),
                    orders,
                    dead: shared.dead.subscribe(),
                };
                let (node, serving) = (shared.node.clone(), shared.node.serving());
                tasks.push(shared.node.spawn(async move {
                    let limit = node.connect_limit();
                    match (address, called) {
                        (_, Some(calls)) => meeting.be_called(calls, limit).await,
                        (Some(address), None) => meeting.call(node, address).await,
                        (None, None) => {}
                    }
                    drop(serving);
                }));
                Some(link)
            };
            states.push(PeerState {
                link,
                standing: Standing::Here,
                arrived: 0,
                posted: 0,
                waiting: 0,
                sends: vec![Sends::default(); rails.len()].into(),
            });
        }
        let place = match me.role == FIRST_HOLDER {
            true => Place::Here,
            false => Place::There,
        };
        let lane = LaneState {
            place,
            received: 0,
            len: 0,
        };
        let lanes = usize::from(peers) * usize::from(topology.micro_batches);
        let core = Core {
            id: me,
            epoch,
            micro_batches: topology.micro_batches,
            spin: shared.spin,
            depth,
            bell,
            lanes: vec![lane; lanes].into(),
            peers: states.into(),
            events: VecDeque::with_capacity(lanes + usize::from(peers)),
            slots,
            completions,
        };
        let ending = Ending {
            node: shared.node.clone(),
            _fabric: self.clone(),
            tasks,
            leave,
        };
        Ok(RdmaEndpoint::new(core, ending))
    }

    /// What one peer is told. Packets begin at a number that nobody can guess.
    fn offer(&self, epoch: Epoch, slots: &Slots, link: &Link) -> Offer {
        let rails = self.0.rails.iter().zip(&slots.regions).zip(&link.pairs);
        let random = RandomState::new();
        Offer {
            epoch,
            address: slots.regions[0].0.address(),
            bytes: slots.regions[0].0.len() as u64,
            rails: rails
                .map(|((rail, (incoming, _)), pair)| RailOffer {
                    up: rail.is_up(),
                    link: rail.port.link,
                    mtu: rail.mtu(&self.0.options),
                    lid: rail.port.lid,
                    gid: rail.gid.gid,
                    queue_pair: pair.number(),
                    psn: random.hash_one(pair.number()) as u32 & 0xff_ffff,
                    key: incoming.remote_key(),
                })
                .collect(),
        }
    }
}

/// Takes a device's events as long as the fabric lives. A port that stays down is dead, until it is up again.
async fn watch_rail(
    rail: &Rail,
    index: usize,
    patience: std::time::Duration,
    dead: &watch::Sender<u32>,
) {
    let name = &rail.name;
    // SAFETY: the descriptor is the context's own, open and the same as long as the context, which is handed over, is.
    let events =
        unsafe { AsyncFd::register_with_interest(rail.context.clone(), Interest::READABLE) };
    let events = match events {
        Ok(events) => events,
        Err(error) => return tracing::error!("events of {name} cannot be heard: {error}"),
    };
    let bit = 1_u32 << index;
    let mut verdict: Option<Instant> = None;
    loop {
        let judge = verdict.unwrap_or_else(|| Instant::now() + patience);
        tokio::select! {
            readable = events.readable() => {
                let Ok(mut readable) = readable else { return };
                while let Some(event) = rail.context.next_event() {
                    match event.kind {
                        AsyncEventKind::PortDown(port) if port == name.port => {
                            tracing::warn!("{name} is down; its peers are lost if it is so for {patience:?}");
                            verdict = Some(Instant::now() + patience);
                        }
                        AsyncEventKind::PortUp(port) if port == name.port => {
                            tracing::info!("{name} is up");
                            verdict = None;
                            dead.send_modify(|dead| *dead &= !bit);
                        }
                        AsyncEventKind::Device => {
                            tracing::error!("{name}: {event}");
                            dead.send_modify(|dead| *dead |= bit);
                        }
                        _ => tracing::debug!("{name}: {event}"),
                    }
                }
                readable.clear_ready();
            }
            () = sleep_until(judge), if verdict.is_some() => {
                verdict = None;
                if !rail.is_up() {
                    tracing::error!("{name} stays down");
                    dead.send_modify(|dead| *dead |= bit);
                }
            }
        }
    }
}
