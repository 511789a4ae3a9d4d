//! The loops that keep queues full: one thread for each completion queue, which it alone polls.
//!
//! A requester keeps as many whole batches in each send queue as fit and rings once for each batch; a batch in so many asks to be told. A receiver counts what came
//! and lays receives out again at once. Nothing is allocated while traffic flows, and no wait is longer than one look at a flag.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use volley_transports::verbs::{
    AddressHandle, Completion, CompletionQueue, CompletionStatus, Doorbell, MemoryRegion,
    Operation as Verb, Piece, QueuePair, Receive, RemoteMemory, SendRequest,
};

use super::flow::{Sequence, Volume, batches_told_together, cut, packets};
use crate::space::{Operation, Point};

/// The key of datagrams.
pub(super) const DATAGRAM_KEY: u32 = 0x1111_1111;
/// Bytes before a datagram's own.
pub(super) const DATAGRAM_HEADER: u32 = 40;
/// Completions taken in one look.
const LOOK: usize = 64;
/// Looks in vain, after which the processor is offered to others: a software adapter may need it to make progress.
const LOOKS_IN_VAIN: u32 = 64;

/// Where a queue pair's requests go.
pub(super) enum Target {
    /// Into the receives of the peer.
    Receives,
    /// Into, or out of, these regions of the peer.
    Regions(Vec<RemoteMemory>),
    /// To this queue pair, as datagrams.
    Datagrams {
        to: Arc<AddressHandle>,
        queue_pair: u32,
    },
}

/// A queue pair with its memory. Regions stay until the queue pair is gone.
pub(super) struct Link {
    pub(super) pair: QueuePair,
    pub(super) regions: Vec<MemoryRegion>,
    pub(super) target: Target,
}

/// Queue pairs of one half that share a completion queue.
pub(super) struct Lane {
    pub(super) links: Vec<Link>,
    pub(super) completions: CompletionQueue,
    /// Which half of the end.
    pub(super) half: usize,
    pub(super) requests: bool,
    pub(super) carried: Arc<Carried>,
}

/// What a lane has carried. Written by its thread only.
#[derive(Debug, Default)]
pub(super) struct Carried {
    messages: AtomicU64,
    bytes: AtomicU64,
    packets: AtomicU64,
}

impl Carried {
    fn add(&self, more: Volume) {
        self.messages.fetch_add(more.messages, Ordering::Relaxed);
        self.bytes.fetch_add(more.bytes, Ordering::Relaxed);
        self.packets.fetch_add(more.packets, Ordering::Relaxed);
    }

    pub(super) fn volume(&self) -> Volume {
        Volume {
            messages: self.messages.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            packets: self.packets.load(Ordering::Relaxed),
        }
    }
}

/// When a loop ends.
pub(super) struct Until<'a> {
    pub(super) stop: &'a AtomicBool,
    pub(super) deadline: Instant,
    pub(super) looks: u32,
}

impl Until<'_> {
    /// To be asked after each look. The clock is read rarely.
    fn over(&mut self) -> bool {
        self.looks = self.looks.wrapping_add(1);
        self.stop.load(Ordering::Relaxed)
            || (self.looks.is_multiple_of(1024) && Instant::now() >= self.deadline)
    }
}

impl Lane {
    /// Keeps the lane busy until it is told to stop, or its time is over.
    ///
    /// # Errors
    /// A request failed or could not be posted: which, where, and what the adapter says.
    pub(super) fn drive(&self, point: &Point, until: &mut Until<'_>) -> Result<(), String> {
        if self.requests {
            self.request(point, until)
        } else if point.operation.consumes_receives() {
            self.receive(point, until)
        } else {
            Ok(())
        }
    }

    /// Lays receives out in every queue, as many as it holds.
    ///
    /// # Errors
    /// The adapter refuses.
    pub(super) fn lay_out(&self, point: &Point) -> Result<(), String> {
        let mut next = vec![0; self.links.len()];
        let mut pieces = Vec::new();
        (0..self.links.len()).try_for_each(|at| {
            self.post_receives(point, at, point.receive_depth, &mut next[at], &mut pieces)
        })
    }

    fn request(&self, point: &Point, until: &mut Until<'_>) -> Result<(), String> {
        let sequence = Sequence::new(&point.messages, point.mtu);
        let batch = point.batch;
        let together = batches_told_together(point);
        let told = u64::from(together) * u64::from(batch);
        let mut states = vec![Posted::default(); self.links.len()];
        let mut bell = Doorbell::default();
        let mut pieces = Vec::with_capacity((batch * point.sges) as usize);
        for (at, state) in states.iter_mut().enumerate() {
            while state.fits(point) {
                self.post_batch(
                    point,
                    &sequence,
                    (at, state),
                    together,
                    &mut bell,
                    &mut pieces,
                )?;
            }
        }
        let mut room = [Completion::EMPTY; LOOK];
        let mut in_vain = 0u32;
        loop {
            let done = self.completions.poll(&mut room);
            let done = done.map_err(|error| error.to_string())?;
            if done.is_empty() {
                in_vain = in_vain.wrapping_add(1);
                if in_vain >= LOOKS_IN_VAIN {
                    std::thread::yield_now();
                }
            } else {
                in_vain = 0;
            }
            if until.over() {
                return Ok(());
            }
            for completion in done {
                let at = self.link_of(completion)?;
                let state = &mut states[at];
                let before = sequence.first(state.done);
                state.done += told;
                let after = sequence.first(state.done);
                self.carried.add(Volume {
                    messages: after.messages - before.messages,
                    bytes: after.bytes - before.bytes,
                    packets: after.packets - before.packets,
                });
                while state.fits(point) {
                    self.post_batch(
                        point,
                        &sequence,
                        (at, state),
                        together,
                        &mut bell,
                        &mut pieces,
                    )?;
                }
            }
        }
    }

    fn post_batch<'l>(
        &'l self,
        point: &Point,
        sequence: &Sequence,
        (at, state): (usize, &mut Posted),
        together: u32,
        bell: &mut Doorbell,
        pieces: &mut Vec<Piece<'l>>,
    ) -> Result<(), String> {
        let link = &self.links[at];
        let first = state.posted;
        pieces.clear();
        for index in first..first + u64::from(point.batch) {
            gather(link, sequence.size(index), point.sges, index, 0, pieces);
        }
        state.batches += 1;
        let last = first + u64::from(point.batch) - 1;
        let tell = state.batches % together == 0;
        let mut from = 0;
        let requests = (first..=last).map(|index| {
            let count = point.sges.min(sequence.size(index)) as usize;
            let own = &pieces[from..from + count];
            from += count;
            SendRequest {
                id: at as u64,
                operation: verb(point.operation, link, index),
                pieces: own,
                signalled: tell && index == last,
                inline: false,
                fence: false,
                solicited: false,
            }
        });
        link.pair
            .ring(bell, requests)
            .map_err(|error| error.to_string())?;
        state.posted += u64::from(point.batch);
        Ok(())
    }

    fn receive(&self, point: &Point, until: &mut Until<'_>) -> Result<(), String> {
        let header = if point.operation.is_datagram() {
            DATAGRAM_HEADER
        } else {
            0
        };
        let mut next = vec![u64::from(point.receive_depth); self.links.len()];
        let mut missing = vec![0u32; self.links.len()];
        let mut touched = Vec::with_capacity(LOOK);
        let mut pieces = Vec::new();
        let mut room = [Completion::EMPTY; LOOK];
        let mut in_vain = 0u32;
        loop {
            let came = self.completions.poll(&mut room);
            let came = came.map_err(|error| error.to_string())?;
            if came.is_empty() {
                in_vain = in_vain.wrapping_add(1);
                if in_vain >= LOOKS_IN_VAIN {
                    std::thread::yield_now();
                }
            } else {
                in_vain = 0;
            }
            if until.over() {
                return Ok(());
            }
            let mut volume = Volume::default();
            for completion in came {
                let at = self.link_of(completion)?;
                let bytes = (completion.len() as u32).saturating_sub(header);
                volume.messages += 1;
                volume.bytes += u64::from(bytes);
                volume.packets += packets(bytes, point.mtu);
                if missing[at] == 0 {
                    touched.push(at);
                }
                missing[at] += 1;
            }
            self.carried.add(volume);
            for at in touched.drain(..) {
                let count = std::mem::take(&mut missing[at]);
                self.post_receives(point, at, count, &mut next[at], &mut pieces)?;
            }
        }
    }

    fn post_receives<'l>(
        &'l self,
        point: &Point,
        at: usize,
        count: u32,
        next: &mut u64,
        pieces: &mut Vec<Piece<'l>>,
    ) -> Result<(), String> {
        let link = &self.links[at];
        let first = *next;
        *next += u64::from(count);
        pieces.clear();
        let (bytes, header) = match point.operation {
            // Their data is written elsewhere.
            Operation::RcWriteImm | Operation::UcWriteImm => (0, 0),
            Operation::UdSend => (point.largest(), DATAGRAM_HEADER),
            _ => (point.largest(), 0),
        };
        let each = point.sges.min(bytes) as usize;
        for index in first..*next {
            if bytes > 0 {
                gather(link, bytes, point.sges, index, header, pieces);
            }
        }
        let receives = (0..count as usize).map(|n| Receive {
            id: at as u64,
            pieces: &pieces[n * each..(n + 1) * each],
        });
        let posted = link.pair.post_receives(receives);
        posted.map_err(|error| error.to_string())
    }

    /// The link that a completion is of.
    fn link_of(&self, completion: &Completion) -> Result<usize, String> {
        let at = completion.id() as usize;
        let Some(link) = self.links.get(at) else {
            return Err(format!(
                "a completion of no request of ours: {completion:?}"
            ));
        };
        if completion.status() == CompletionStatus::SUCCESS {
            return Ok(at);
        }
        Err(format!("{:?}: {}", link.pair, completion.status()))
    }
}

/// Requests of one queue pair.
#[derive(Clone, Default)]
struct Posted {
    posted: u64,
    done: u64,
    batches: u32,
}

impl Posted {
    /// Whether another batch has room in the queue.
    fn fits(&self, point: &Point) -> bool {
        self.posted - self.done + u64::from(point.batch) <= u64::from(point.send_depth)
    }
}

/// The pieces of a message: consecutive parts, each in the next of the queue pair's regions. `extra` bytes more go to the first.
fn gather<'l>(
    link: &'l Link,
    bytes: u32,
    sges: u32,
    index: u64,
    extra: u32,
    pieces: &mut Vec<Piece<'l>>,
) {
    for (n, (at, len)) in (0u64..).zip(cut(bytes, sges)) {
        let region = &link.regions[((index + n) % link.regions.len() as u64) as usize];
        let (at, len) = match n {
            0 => (at, len + extra),
            _ => (at + extra, len),
        };
        let part = at as usize..(at + len) as usize;
        pieces.push(region.piece(part).expect("a region holds any message"));
    }
}

fn verb<'l>(operation: Operation, link: &'l Link, index: u64) -> Verb<'l> {
    let immediate = match operation {
        Operation::RcWriteImm | Operation::UcWriteImm => Some(index as u32),
        _ => None,
    };
    match &link.target {
        Target::Receives => Verb::Send { immediate },
        Target::Regions(regions) => {
            let there = regions[(index % regions.len() as u64) as usize];
            match operation {
                Operation::RcRead => Verb::Read { from: there },
                _ => Verb::Write {
                    to: there,
                    immediate,
                },
            }
        }
        Target::Datagrams { to, queue_pair } => Verb::Datagram {
            to,
            queue_pair: *queue_pair,
            key: DATAGRAM_KEY,
            immediate,
        },
    }
}
