//! Everything under way in a simulated network, in order of virtual time.
//!
//! A frame leaves when its sender's line is free, travels, waits until the receiver's line is free, and is there when its last byte
//! is. Alone it takes latency + jitter + bytes / rate. What happens at the same time happens in the order in which it was begun,
//! so a seed and the calls determine everything.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::Conditions;
use crate::ball::{Ball, Inbox, Parcel};
use crate::{LostReason, MicroBatch, WorkerId};

/// A lost packet is sent again at most so often before it gets through.
const RETRANSMITS_MAX: u32 = 8;

/// See the module.
pub(super) struct World {
    conditions: Conditions,
    random: Pcg64,
    pub(super) now: Duration,
    /// Of what is under way: grows with each, and makes the order of simultaneous events that of their making.
    serial: u64,
    queue: BinaryHeap<Reverse<Entry>>,
    lines: BTreeMap<WorkerId, Line>,
    links: Vec<LinkState>,
    cuts: BTreeMap<Pair, Duration>,
    silent: BTreeMap<WorkerId, Duration>,
    /// What waits for a pair to reach each other again.
    stuck: Vec<What>,
}

/// Which direction between which endpoints.
pub(super) type LinkId = usize;

type Pair = (WorkerId, WorkerId);

/// A worker's line, and what it carried.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Line {
    sends_until: Duration,
    receives_until: Duration,
    /// Frames that arrived.
    pub frames: u64,
    /// Bytes that arrived.
    pub bytes: u64,
    /// Time for which frames waited because others were being received.
    pub incast: Duration,
}

struct LinkState {
    from: WorkerId,
    to: WorkerId,
    inbox: Arc<Inbox>,
    in_flight: u32,
    /// Its sender has closed; told when nothing is under way any more.
    closing: bool,
    /// Nothing comes over it any more, and the receiver knows.
    done: bool,
}

struct Entry {
    at: Duration,
    serial: u64,
    what: What,
}

enum What {
    /// A frame's first bit is at the receiver.
    Reached(Frame),
    /// Its last bit was received.
    Received(Frame),
    /// The sender has closed the link.
    Closed(LinkId),
    /// Two workers that cannot reach each other give up, if it has been so since then.
    Silence(Pair, Duration),
}

struct Frame {
    link: LinkId,
    micro_batch: MicroBatch,
    ball: Box<Ball>,
    bytes: usize,
}

impl World {
    pub(super) fn new(conditions: Conditions, seed: u64) -> Self {
        World {
            conditions,
            random: Pcg64::seed_from_u64(seed),
            now: Duration::ZERO,
            serial: 0,
            queue: BinaryHeap::new(),
            lines: BTreeMap::new(),
            links: Vec::new(),
            cuts: BTreeMap::new(),
            silent: BTreeMap::new(),
            stuck: Vec::new(),
        }
    }

    /// Makes room for `lanes` more lanes, so that posting allocates nothing.
    pub(super) fn reserve(&mut self, lanes: usize) {
        self.queue.reserve(2 * lanes);
        self.stuck.reserve(lanes);
    }

    /// A new direction between two endpoints.
    pub(super) fn link(&mut self, from: WorkerId, to: WorkerId, inbox: Arc<Inbox>) -> LinkId {
        self.lines.entry(from).or_default();
        self.links.push(LinkState {
            from,
            to,
            inbox,
            in_flight: 0,
            closing: false,
            done: false,
        });
        if self.blocked_since(from, to).is_some() {
            // Made while the two cannot reach each other: they are given the usual time.
            self.give_up_later((from, to));
        }
        self.links.len() - 1
    }

    /// Whether frames may still be sent.
    pub(super) fn is_open(&self, link: LinkId) -> bool {
        let link = &self.links[link];
        !link.done && !link.closing && !link.inbox.is_closed()
    }

    pub(super) fn send(
        &mut self,
        link: LinkId,
        micro_batch: MicroBatch,
        ball: Box<Ball>,
        bytes: usize,
    ) {
        if self.links[link].done {
            return;
        }
        self.links[link].in_flight += 1;
        let line = self.lines.entry(self.links[link].from).or_default();
        let start = line.sends_until.max(self.now);
        line.sends_until = start + self.conditions.line_time(bytes);
        let reached = start + self.travel(bytes);
        self.push(
            reached,
            What::Reached(Frame {
                link,
                micro_batch,
                ball,
                bytes,
            }),
        );
    }

    pub(super) fn close(&mut self, link: LinkId) {
        if !self.links[link].done {
            let at = self.now + self.conditions.latency;
            self.push(at, What::Closed(link));
        }
    }

    /// Lets the receiver's thread look whether time brings something, if it sleeps.
    pub(super) fn unpark(&self, link: LinkId) {
        self.links[link].inbox.unpark();
    }

    /// From now on the two do not reach each other.
    pub(super) fn cut(&mut self, a: WorkerId, b: WorkerId) {
        if self.blocked_since(a, b).is_none() {
            self.give_up_later((a, b));
        }
        self.cuts.insert(pair(a, b), self.now);
    }

    /// From now on nothing that a worker sends or is sent gets through.
    pub(super) fn silence(&mut self, worker: WorkerId) {
        let met = self.links.iter().filter(|link| !link.done);
        let peers: BTreeSet<Pair> = met
            .filter(|link| link.from == worker || link.to == worker)
            .map(|link| pair(link.from, link.to))
            .collect();
        for pair in peers {
            if self.blocked_since(pair.0, pair.1).is_none() {
                self.give_up_later(pair);
            }
        }
        self.silent.insert(worker, self.now);
    }

    /// The two reach each other again; what was stuck is sent again.
    pub(super) fn heal(&mut self, a: WorkerId, b: WorkerId) {
        self.cuts.remove(&pair(a, b));
        self.retry();
    }

    /// A worker is heard again.
    pub(super) fn unsilence(&mut self, worker: WorkerId) {
        self.silent.remove(&worker);
        self.retry();
    }

    /// When something happens next.
    pub(super) fn next_at(&self) -> Option<Duration> {
        self.queue.peek().map(|Reverse(entry)| entry.at)
    }

    /// Lets the next thing happen and adds the workers to `woken` that something came to. False: nothing is under way.
    pub(super) fn step(&mut self, woken: &mut Vec<WorkerId>) -> bool {
        let Some(Reverse(entry)) = self.queue.pop() else {
            return false;
        };
        self.now = self.now.max(entry.at);
        match entry.what {
            What::Reached(frame) => self.reached(frame),
            What::Received(frame) => woken.extend(self.received(frame)),
            What::Closed(link) => woken.extend(self.closed(link)),
            What::Silence(pair, since) => self.silence_ends(pair, since, woken),
        }
        true
    }

    pub(super) fn line(&self, worker: WorkerId) -> Line {
        self.lines.get(&worker).copied().unwrap_or_default()
    }

    fn reached(&mut self, frame: Frame) {
        let LinkState { from, to, done, .. } = self.links[frame.link];
        if done {
            return;
        }
        if self.blocked_since(from, to).is_some() {
            self.stuck.push(What::Reached(frame));
            return;
        }
        let took = self.conditions.line_time(frame.bytes);
        let line = self.lines.entry(to).or_default();
        let start = line.receives_until.max(self.now);
        line.incast += start - self.now;
        line.receives_until = start + took;
        self.push(start + took, What::Received(frame));
    }

    fn received(&mut self, frame: Frame) -> Option<WorkerId> {
        let link = &mut self.links[frame.link];
        if link.done {
            return None;
        }
        link.in_flight -= 1;
        let line = self.lines.entry(link.to).or_default();
        line.frames += 1;
        line.bytes += frame.bytes as u64;
        let (micro_batch, ball) = (frame.micro_batch, frame.ball);
        link.inbox.deliver(Parcel::Frame {
            from: link.from.index,
            micro_batch,
            ball,
        });
        if link.closing && link.in_flight == 0 {
            link.end(LostReason::Closed);
        }
        Some(link.to)
    }

    fn closed(&mut self, id: LinkId) -> Option<WorkerId> {
        let link = &mut self.links[id];
        if link.done {
            return None;
        }
        link.closing = true;
        let (from, to) = (link.from, link.to);
        if self.blocked_since(from, to).is_some() {
            self.stuck.push(What::Closed(id));
            return None;
        }
        // Else the last frame under way brings the news.
        let link = &mut self.links[id];
        (link.in_flight == 0).then(|| {
            link.end(LostReason::Closed);
            to
        })
    }

    fn silence_ends(&mut self, between: Pair, since: Duration, woken: &mut Vec<WorkerId>) {
        let blocked = self.blocked_since(between.0, between.1);
        if blocked.is_none_or(|blocked| blocked > since) {
            return;
        }
        for link in &mut self.links {
            if !link.done && pair(link.from, link.to) == between {
                link.end(LostReason::TimedOut);
                woken.push(link.to);
            }
        }
    }

    fn give_up_later(&mut self, between: Pair) {
        let at = self.now + self.conditions.idle_timeout;
        self.push(at, What::Silence(pair(between.0, between.1), self.now));
    }

    /// Since when the two have not reached each other.
    fn blocked_since(&self, a: WorkerId, b: WorkerId) -> Option<Duration> {
        let causes = [
            self.cuts.get(&pair(a, b)),
            self.silent.get(&a),
            self.silent.get(&b),
        ];
        causes.into_iter().flatten().min().copied()
    }

    fn retry(&mut self) {
        for what in std::mem::take(&mut self.stuck) {
            let at = self.now + self.conditions.latency + self.conditions.retransmit;
            self.push(at, what);
        }
    }

    /// From the first bit's departure to its arrival.
    fn travel(&mut self, bytes: usize) -> Duration {
        let Conditions {
            latency,
            jitter,
            loss,
            packet_bytes,
            retransmit,
            ..
        } = self.conditions;
        let mut time = latency;
        if !jitter.is_zero() {
            time += jitter.mul_f64(self.random.random::<f64>());
        }
        if loss > 0.0 {
            let packets = bytes.div_ceil(packet_bytes).max(1);
            let mut lost = 1.0 - (1.0 - loss).powi(packets.min(i32::MAX as usize) as i32);
            for attempt in 0..RETRANSMITS_MAX {
                if self.random.random::<f64>() >= lost {
                    break;
                }
                time += retransmit * 2u32.pow(attempt);
                // Only what was lost is sent again.
                lost = loss;
            }
        }
        time
    }

    fn push(&mut self, at: Duration, what: What) {
        self.serial += 1;
        self.queue.push(Reverse(Entry {
            at,
            serial: self.serial,
            what,
        }));
    }
}

impl LinkState {
    fn end(&mut self, reason: LostReason) {
        self.done = true;
        self.inbox.deliver(Parcel::Lost {
            from: self.from.index,
            reason,
        });
    }
}

fn pair(a: WorkerId, b: WorkerId) -> Pair {
    (a.min(b), a.max(b))
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.serial == other.serial
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.serial).cmp(&(other.at, other.serial))
    }
}
