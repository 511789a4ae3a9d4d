//! The data path: frames out by WRITE WITH IMMEDIATE, frames in as completions.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::bell::Bell;
use super::fabric::RdmaFabric;
use super::link::{Link, Order};
use super::slots::Slots;
use crate::endpoint::lane_index;
use crate::quic::{LINGER, Leave, QuicNode};
use crate::verbs::{
    Completion, CompletionChannel, CompletionKind, CompletionQueue, CompletionStatus, Operation,
    PostError, Receive, SendRequest,
};
use crate::{
    Endpoint, Epoch, Event, Lane, LaneError, LostReason, MicroBatch, Spin, Wake, Waker, WorkerId,
};

/// Completions taken at once.
const TAKE: usize = 16;
/// Frames to one peer that one doorbell hands over.
const BATCH: usize = 8;
/// Bit of a request's number that tells sends from receives.
const SENT: u64 = 1 << 63;

/// One worker's end of an RDMA fabric, made by [`RdmaFabric::join`](super::RdmaFabric::join).
pub struct RdmaEndpoint {
    /// Always there until the endpoint is dropped.
    core: Option<Box<Core>>,
    ending: Ending,
}

/// What an end of an endpoint needs beside it.
pub(super) struct Ending {
    pub(super) node: QuicNode,
    /// Ports are watched as long as an end is there.
    pub(super) _fabric: RdmaFabric,
    pub(super) tasks: Vec<JoinHandle<()>>,
    pub(super) leave: Option<Leave>,
}

/// Everything the data loop touches.
pub(super) struct Core {
    pub(super) id: WorkerId,
    pub(super) epoch: Epoch,
    pub(super) micro_batches: u8,
    pub(super) spin: Spin,
    pub(super) depth: u32,
    pub(super) bell: Arc<Bell>,
    pub(super) lanes: Box<[LaneState]>,
    pub(super) peers: Box<[PeerState]>,
    /// Room for an arrival on each lane and a loss of each peer.
    pub(super) events: VecDeque<Event>,
    /// Dropped before the completion queues: peers' links hold queue pairs, which hold what they need.
    pub(super) slots: Slots,
    /// By rail.
    pub(super) completions: Box<[(CompletionQueue, CompletionChannel)]>,
}

/// Where a lane is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Here,
    /// Posted, but not yet handed to the card: the peer was not met, or the queue is full.
    Waiting,
    There,
}

#[derive(Clone, Copy)]
pub(super) struct LaneState {
    pub(super) place: Place,
    /// Length of the frame that came last.
    pub(super) received: usize,
    /// Length of the frame that goes.
    pub(super) len: usize,
}

pub(super) struct PeerState {
    /// None: it takes no part.
    pub(super) link: Option<Arc<Link>>,
    pub(super) standing: Standing,
    /// Frames that have come, and gone, since the epoch began.
    pub(super) arrived: u64,
    pub(super) posted: u64,
    /// Lanes that wait.
    pub(super) waiting: u8,
    /// By rail.
    pub(super) sends: Box<[Sends]>,
}

/// Requests on one queue pair: the next one's number, and how many are known to be done. Both wrap.
#[derive(Clone, Copy, Default)]
pub(super) struct Sends {
    next: u32,
    done: u32,
}

#[derive(Clone, Copy)]
pub(super) enum Standing {
    Here,
    /// It has left, having sent so many frames; the last ones are awaited until then.
    Leaving {
        frames: u64,
        until: Instant,
    },
    Lost,
}

/// The number of a receive: which peer and rail it is for.
pub(super) fn receive_id(peer: u16, rail: usize) -> u64 {
    (rail as u64) << 16 | u64::from(peer)
}

/// The number of a send: also which of the queue pair's it is.
fn send_id(peer: u16, rail: usize, number: u32) -> u64 {
    SENT | (rail as u64) << 48 | u64::from(peer) << 32 | u64::from(number)
}

impl Core {
    fn index(&self, lane: Lane) -> Result<usize, LaneError> {
        lane_index(self.id, self.peers.len() as u16, self.micro_batches, lane)
    }

    fn peer(&self, index: u16) -> WorkerId {
        self.id.role.opposite().worker(index)
    }

    fn lane(&self, peer: u16, micro_batch: u8) -> usize {
        usize::from(peer) * usize::from(self.micro_batches) + usize::from(micro_batch)
    }

    /// The index of a lane that is held, or why it is not.
    fn held(&self, lane: Lane) -> Result<usize, LaneError> {
        let index = self.index(lane)?;
        if self.lanes[index].place == Place::Here {
            return Ok(index);
        }
        let (at, peer, micro_batch) = (self.id, self.peer(lane.peer), lane.micro_batch);
        Err(match self.peers[usize::from(lane.peer)].standing {
            Standing::Lost => LaneError::PeerLost {
                at,
                peer,
                micro_batch,
            },
            _ => LaneError::NotHeld {
                at,
                peer,
                micro_batch,
            },
        })
    }

    /// Whether frames to the peer have somewhere to go, as far as is known.
    fn is_open(&self, peer: u16) -> bool {
        let state = &self.peers[usize::from(peer)];
        matches!(state.standing, Standing::Here)
            && state
                .link
                .as_ref()
                .is_some_and(|link| link.farewell().is_none())
    }

    fn post(&mut self, lane: Lane, len: usize) -> Result<(), LaneError> {
        let index = self.held(lane)?;
        let (at, peer, micro_batch) = (self.id, self.peer(lane.peer), lane.micro_batch);
        let capacity = self.slots.outgoing.capacity;
        if len > capacity {
            return Err(LaneError::TooLong {
                at,
                peer,
                micro_batch,
                len,
                capacity,
            });
        }
        if self.is_open(lane.peer) {
            self.lanes[index].len = len;
            self.lanes[index].place = Place::Waiting;
            self.peers[usize::from(lane.peer)].waiting += 1;
            self.flush(lane.peer);
            if !matches!(self.peers[usize::from(lane.peer)].standing, Standing::Lost) {
                return Ok(());
            }
            self.lanes[index].place = Place::Here;
        }
        Err(LaneError::PeerLost {
            at,
            peer,
            micro_batch,
        })
    }

    /// Hands waiting frames to the card, as many as its queues take; those for one rail with one doorbell.
    fn flush(&mut self, peer: u16) {
        let Some(link) = self.peers[usize::from(peer)].link.clone() else {
            return;
        };
        let Some(agreed) = link.agreed() else { return };
        for rail in 0..link.pairs.len() {
            while self.peers[usize::from(peer)].waiting > 0 {
                let sends = self.peers[usize::from(peer)].sends[rail];
                let room = self.depth - sends.next.wrapping_sub(sends.done);
                let mut batch = [0_u8; BATCH];
                let mut count = 0;
                for micro_batch in 0..self.micro_batches {
                    let lane = self.lanes[self.lane(peer, micro_batch)];
                    if lane.place == Place::Waiting
                        && usize::from(agreed.rails[usize::from(micro_batch)]) == rail
                        && count < BATCH.min(room as usize)
                    {
                        batch[count] = micro_batch;
                        count += 1;
                    }
                }
                if count == 0 {
                    break;
                }
                if let Err(error) = self.send(peer, rail, &link, &batch[..count]) {
                    if !error.is_full() {
                        self.fail(peer, LostReason::Broken, &error.to_string());
                    }
                    // A queue that is full is flushed again when something completes.
                    return;
                }
            }
        }
    }

    fn send(&mut self, peer: u16, rail: usize, link: &Link, batch: &[u8]) -> Result<(), PostError> {
        let Some(agreed) = link.agreed() else {
            return Ok(());
        };
        let pair = &link.pairs[rail];
        let first = self.peers[usize::from(peer)].sends[rail].next;
        let at = |index: usize| {
            let micro_batch = batch[index.min(batch.len() - 1)];
            (micro_batch, self.lane(peer, micro_batch))
        };
        let region = &self.slots.regions[rail].1;
        let pieces: [_; BATCH] = std::array::from_fn(|index| {
            let lane = at(index).1;
            let part = self.slots.outgoing.range(lane, self.lanes[lane].len);
            [region.piece(part).expect("a slot lies in its region")]
        });
        let requests: [_; BATCH] = std::array::from_fn(|index| {
            let number = first.wrapping_add(index as u32);
            let (micro_batch, lane) = at(index);
            let len = self.lanes[lane].len;
            SendRequest {
                id: send_id(peer, rail, number),
                operation: Operation::Write {
                    to: agreed.slots[usize::from(micro_batch)],
                    immediate: Some(self.immediate(micro_batch)),
                },
                pieces: if len == 0 { &[] } else { &pieces[index][..] },
                // Twice in a queue's length: so its places come back in time, and few completions are for nothing but that.
                signalled: number.wrapping_add(1).is_multiple_of(self.depth / 2),
                inline: len > 0 && len <= pair.inline_bytes() as usize,
                fence: false,
                solicited: false,
            }
        });
        let posted = pair.post(&requests[..batch.len()]);
        let taken = posted
            .as_ref()
            .map_or_else(|error| error.taken, |()| batch.len());
        for &micro_batch in &batch[..taken] {
            let lane = self.lane(peer, micro_batch);
            self.lanes[lane].place = Place::There;
        }
        let state = &mut self.peers[usize::from(peer)];
        state.sends[rail].next = first.wrapping_add(taken as u32);
        state.waiting -= taken as u8;
        state.posted += taken as u64;
        posted
    }

    /// Which lane, and a check of the epoch: keys and queue pairs are an epoch's own, so a frame of another one is a defect, and must not pass for one of this.
    fn immediate(&self, micro_batch: u8) -> u32 {
        u32::from(micro_batch) << 24 | self.epoch.0 & 0xff_ffff
    }

    /// Takes everything that the cards and the peers' tasks have to say.
    fn pump(&mut self) {
        // Before the completions are taken: what came before a farewell is then among them.
        let news = self.bell.take_news();
        let mut room = [Completion::EMPTY; TAKE];
        for rail in 0..self.completions.len() {
            loop {
                let taken = match self.completions[rail].0.poll(&mut room) {
                    Ok(taken) => taken.len(),
                    Err(error) => {
                        for peer in 0..self.peers.len() as u16 {
                            self.fail(peer, LostReason::Broken, &error.to_string());
                        }
                        0
                    }
                };
                for completion in &room[..taken] {
                    self.completed(completion);
                }
                if taken < TAKE {
                    break;
                }
            }
        }
        if news {
            self.hear();
        }
        self.say_farewell();
    }

    fn completed(&mut self, completion: &Completion) {
        let id = completion.id();
        let sent = id & SENT != 0;
        let (peer, rail) = if sent {
            ((id >> 32) as u16, (id >> 48 & 0xff) as usize)
        } else {
            (id as u16, (id >> 16) as usize)
        };
        if matches!(self.peers[usize::from(peer)].standing, Standing::Lost) {
            return;
        }
        let status = completion.status();
        if status != CompletionStatus::SUCCESS {
            let reason = match status {
                CompletionStatus::RETRIES_EXCEEDED => LostReason::TimedOut,
                _ => LostReason::Broken,
            };
            return self.fail(
                peer,
                reason,
                &format!("{status} (vendor code {:#x})", completion.vendor_error()),
            );
        }
        if sent {
            self.peers[usize::from(peer)].sends[rail].done = (id as u32).wrapping_add(1);
            if self.peers[usize::from(peer)].waiting > 0 {
                self.flush(peer);
            }
            return;
        }
        match self.arrived(peer, completion) {
            Ok(event) => {
                self.events.push_back(event);
                self.peers[usize::from(peer)].arrived += 1;
                let again = Receive { id, pieces: &[] };
                let link = self.peers[usize::from(peer)].link.clone();
                if let Some(Err(error)) = link.map(|link| link.pairs[rail].post_receives([again])) {
                    self.fail(peer, LostReason::Broken, &error.to_string());
                }
            }
            Err(why) => self.fail(peer, LostReason::Broken, why),
        }
    }

    /// Checks what came; the lane is then here.
    fn arrived(&mut self, peer: u16, completion: &Completion) -> Result<Event, &'static str> {
        let (CompletionKind::ReceiveWrite, Some(immediate)) =
            (completion.kind(), completion.immediate())
        else {
            return Err("something other than a frame came");
        };
        let micro_batch = (immediate >> 24) as u8;
        if micro_batch >= self.micro_batches || immediate != self.immediate(micro_batch) {
            return Err("a frame of another epoch, or of no lane, came");
        }
        let len = completion.len();
        if len > self.slots.incoming.capacity {
            return Err("a frame is longer than its slot");
        }
        let index = self.lane(peer, micro_batch);
        let lane = &mut self.lanes[index];
        if lane.place != Place::There {
            return Err("a frame came out of turn");
        }
        lane.place = Place::Here;
        lane.received = len;
        let lane = Lane::new(peer, MicroBatch(micro_batch));
        Ok(Event::Arrived { lane, len })
    }

    /// Looks at what the tasks of the peers have left.
    fn hear(&mut self) {
        for peer in 0..self.peers.len() as u16 {
            let state = &self.peers[usize::from(peer)];
            let Some(link) = state.link.as_ref().map(Arc::clone) else {
                continue;
            };
            if !matches!(state.standing, Standing::Here) {
                continue;
            }
            match link.farewell() {
                None => self.flush(peer),
                Some(farewell) => match farewell.frames {
                    Some(frames) => {
                        let until = Instant::now() + LINGER;
                        self.peers[usize::from(peer)].standing =
                            Standing::Leaving { frames, until };
                    }
                    None => self.lose(peer, farewell.reason),
                },
            }
        }
    }

    /// Peers that have left are lost when their last frame has come.
    fn say_farewell(&mut self) {
        for peer in 0..self.peers.len() as u16 {
            let state = &self.peers[usize::from(peer)];
            let Standing::Leaving { frames, until } = state.standing else {
                continue;
            };
            if state.arrived >= frames || Instant::now() >= until {
                self.tell(peer, Order::Heard);
                self.lose(peer, LostReason::Closed);
            }
        }
    }

    /// The peer broke something, or something broke on the way.
    #[cold]
    fn fail(&mut self, peer: u16, reason: LostReason, why: &str) {
        match self.peers[usize::from(peer)].standing {
            Standing::Lost => return,
            // Its queue pairs go too; what we sent last it never wanted.
            Standing::Leaving { .. } => return self.lose(peer, LostReason::Closed),
            Standing::Here => {}
        }
        let (me, who, epoch) = (self.id, self.peer(peer), self.epoch);
        tracing::warn!("{me}: the link to {who} broke in {epoch}: {why}");
        self.tell(peer, Order::Break(why.to_owned()));
        self.lose(peer, reason);
    }

    fn tell(&self, peer: u16, order: Order) {
        if let Some(link) = &self.peers[usize::from(peer)].link {
            let _ = link.orders.send(order);
        }
    }

    #[cold]
    fn lose(&mut self, peer: u16, reason: LostReason) {
        for micro_batch in 0..self.micro_batches {
            let lane = self.lane(peer, micro_batch);
            if self.lanes[lane].place == Place::Waiting {
                self.lanes[lane].place = Place::There;
            }
        }
        let who = self.peer(peer);
        let state = &mut self.peers[usize::from(peer)];
        state.waiting = 0;
        if matches!(state.standing, Standing::Lost) || state.link.is_none() {
            return;
        }
        state.standing = Standing::Lost;
        if let Some(link) = &state.link {
            // Nothing more comes into the slots.
            for pair in &link.pairs {
                let _ = pair.break_off();
            }
        }
        self.events.push_back(Event::Lost { peer: who, reason });
    }

    fn ready(&mut self) -> bool {
        if self.events.is_empty() {
            self.pump();
        }
        !self.events.is_empty() || self.bell.take_wake()
    }

    fn wait(&mut self, timeout: Duration) {
        for _ in 0..=self.spin.0 {
            if self.ready() {
                return;
            }
            std::hint::spin_loop();
        }
        // A queue that cannot be armed is looked at again soon.
        let armed = self
            .completions
            .iter()
            .all(|(queue, _)| queue.arm().is_ok());
        self.bell.fall_asleep();
        // What came before the queues were armed makes no event.
        if self.bell.is_rung() || {
            self.pump();
            !self.events.is_empty()
        } {
            self.bell.wake_up();
            self.bell.take_wake();
            return;
        }
        let soonest = self.peers.iter().filter_map(|peer| match peer.standing {
            Standing::Leaving { until, .. } => {
                Some(until.saturating_duration_since(Instant::now()))
            }
            _ => None,
        });
        let timeout = soonest.fold(timeout, Duration::min);
        self.sleep(if armed {
            timeout
        } else {
            timeout.min(Duration::from_millis(1))
        });
        self.bell.wake_up();
        for (_, channel) in &self.completions {
            channel.drain();
        }
        // The wait that a wake was for ends here.
        self.bell.take_wake();
    }

    fn sleep(&self, timeout: Duration) {
        /// Rails and the bell.
        const FILES: usize = super::offer::RAILS_MAX + 1;
        let file = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut files = [file(-1); FILES];
        files[0] = file(self.bell.as_raw_fd());
        for (slot, (_, channel)) in files[1..].iter_mut().zip(&self.completions) {
            *slot = file(channel.as_raw_fd());
        }
        let timeout = libc::timespec {
            tv_sec: timeout.as_secs().min(86_400) as libc::time_t,
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let count = 1 + self.completions.len();
        // SAFETY: `files` has `count` entries, whose descriptors are ours; interruption is one of the reasons for which a wait may end.
        unsafe {
            libc::ppoll(
                files.as_mut_ptr(),
                count as libc::nfds_t,
                &timeout,
                std::ptr::null(),
            )
        };
    }

    fn is_waiting(&self) -> bool {
        self.peers.iter().any(|peer| peer.waiting > 0)
    }
}

impl RdmaEndpoint {
    pub(super) fn new(core: Core, ending: Ending) -> Self {
        Self {
            core: Some(Box::new(core)),
            ending,
        }
    }

    fn core(&self) -> &Core {
        self.core
            .as_deref()
            .expect("an endpoint that was not dropped")
    }

    fn core_mut(&mut self) -> &mut Core {
        self.core
            .as_deref_mut()
            .expect("an endpoint that was not dropped")
    }
}

impl Endpoint for RdmaEndpoint {
    fn id(&self) -> WorkerId {
        self.core().id
    }

    fn peers(&self) -> u16 {
        // As many as the topology counts in a u16.
        self.core().peers.len() as u16
    }

    fn micro_batches(&self) -> u8 {
        self.core().micro_batches
    }

    fn holds(&self, lane: Lane) -> bool {
        self.core().held(lane).is_ok()
    }

    fn received(&self, lane: Lane) -> Result<&[u8], LaneError> {
        let core = self.core();
        let index = core.held(lane)?;
        let part = core.slots.incoming.range(index, core.lanes[index].received);
        // SAFETY: the lane is here, so the peer does not write its slot; see the module. Nobody here ever writes it.
        Ok(unsafe { core.slots.regions[0].0.bytes(part) })
    }

    fn slot(&mut self, lane: Lane) -> Result<&mut [u8], LaneError> {
        self.both(lane).map(|(_, slot)| slot)
    }

    fn both(&mut self, lane: Lane) -> Result<(&[u8], &mut [u8]), LaneError> {
        let core = self.core_mut();
        let index = core.held(lane)?;
        let (theirs, ours) = &core.slots.regions[0];
        let received = core.slots.incoming.range(index, core.lanes[index].received);
        let slot = core
            .slots
            .outgoing
            .range(index, core.slots.outgoing.capacity);
        // SAFETY: the lane is here, so neither slot is written or read by a card, see the module; the endpoint is borrowed for as long as the slots are, and they lie in
        // different memory.
        Ok(unsafe { (theirs.bytes(received), ours.bytes_mut(slot)) })
    }

    fn post(&mut self, lane: Lane, len: usize) -> Result<(), LaneError> {
        self.core_mut().post(lane, len)
    }

    fn poll(&mut self) -> Option<Event> {
        let core = self.core_mut();
        if core.events.is_empty() {
            core.pump();
        }
        core.events.pop_front()
    }

    fn ready(&mut self) -> bool {
        self.core_mut().ready()
    }

    fn wait(&mut self, timeout: Duration) {
        self.core_mut().wait(timeout);
    }

    fn waker(&self) -> Waker {
        Waker::new(Arc::clone(&self.core().bell) as Arc<dyn Wake>)
    }
}

impl RdmaEndpoint {
    /// Whether each peer was met, or is lost. Frames that are posted before wait for that, and for this end to be polled.
    pub fn has_met_all(&self) -> bool {
        let mut links = self
            .core()
            .peers
            .iter()
            .filter_map(|peer| peer.link.as_ref());
        links.all(|link| link.agreed().is_some() || link.farewell().is_some())
    }
}

impl Drop for RdmaEndpoint {
    /// Memory and queue pairs stay until the peers have what was posted, but not long.
    fn drop(&mut self) {
        let Some(mut core) = self.core.take() else {
            return;
        };
        let Ending {
            node, tasks, leave, ..
        } = &mut self.ending;
        let (tasks, leave) = (std::mem::take(tasks), leave.take());
        let serving = node.serving();
        node.spawn(async move {
            let until = tokio::time::Instant::now() + LINGER;
            while core.is_waiting() && tokio::time::Instant::now() < until {
                core.pump();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            drop(leave);
            for peer in 0..core.peers.len() as u16 {
                let posted = core.peers[usize::from(peer)].posted;
                core.tell(peer, Order::Leave(posted));
            }
            for task in tasks {
                if tokio::time::timeout_at(until, task).await.is_err() {
                    break;
                }
            }
            drop((core, serving));
        });
    }
}
