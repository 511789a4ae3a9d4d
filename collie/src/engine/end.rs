//! An end: one host's half of the traffic. It makes queue pairs and regions, connects them, lets traffic flow, reads what happened, and takes everything down.
//!
//! The order is always prepare, connect, run, finish; `finish` may come at any time, comes by itself when the end is dropped or prepared anew, and says whether the
//! device gave everything back. The set-up and the loops watch one deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use volley_transports::verbs::{
    Access, AddressHandle, CompletionQueue, Connection, QueuePair, QueuePairKind, QueuePairOptions,
    Reliability, RemoteMemory,
};

use super::adapter::{Adapter, memory_left};
use super::flow::{Half, Side, halves};
use super::message::{Facts, HalfOffer, Reading, Task, Timing};
use super::traffic::{Carried, DATAGRAM_HEADER, DATAGRAM_KEY, Lane, Link, Target, Until};
use super::{End, EngineError};
use crate::space::{Operation, Point, Space};

/// Threads of one half, at most.
const LANES_MAX: usize = 8;
/// Lanes of one half, at most, where completion queues are too short for fewer.
const SHORT_LANES_MAX: usize = 64;
/// Bytes of a queue pair beside its requests, and of a request beside its pieces: more than adapters take.
const PAIR_BYTES: u64 = 16 << 10;
const REQUEST_BYTES: u64 = 128;
/// How often it is looked whether traffic still flows.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Requests that a queue which is not used holds.
const UNUSED_DEPTH: u32 = 1;

/// An end on this host.
pub(super) struct LocalEnd {
    adapter: Adapter,
    /// Makes packet numbers of one workload differ from those of the last.
    workloads: u32,
    work: Option<Work>,
}

/// A workload that is set up.
struct Work {
    point: Point,
    halves: Vec<Half>,
    lanes: Vec<Lane>,
    psn: u32,
    deadline: Instant,
    flow: Option<Flowing>,
}

/// Traffic under way.
struct Flowing {
    stop: Arc<AtomicBool>,
    began: Instant,
    carried: Vec<(usize, Arc<Carried>)>,
    /// A thread for each lane that has something to do; it returns its lane.
    threads: Vec<JoinHandle<(Lane, Result<(), String>)>>,
}

impl LocalEnd {
    /// An end on a port of this host.
    ///
    /// # Errors
    /// See [`Adapter::open`].
    pub(super) fn open(device: &str, port: u8) -> Result<Self, EngineError> {
        Ok(LocalEnd {
            adapter: Adapter::open(device, port)?,
            workloads: 0,
            work: None,
        })
    }

    fn set_up(&self, task: &Task, psn: u32) -> Result<Work, EngineError> {
        let point = &task.point;
        self.check(point)?;
        let mut work = Work {
            point: point.clone(),
            halves: halves(point, task.side),
            lanes: Vec::new(),
            psn,
            deadline: Instant::now() + Duration::from_millis(task.limit_ms),
            flow: None,
        };
        let memory = match task.side {
            Side::A => point.memory_a,
            Side::B => point.memory_b,
        };
        let bytes = point.region_bytes.max(point.largest()) + DATAGRAM_HEADER;
        let regions = (point.qps * point.regions) as usize;
        let buffers = self.adapter.buffers(memory, regions, bytes as usize)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let busy = work.halves.iter().filter(|half| is_busy(half, point));
        let threads = (cores / busy.count().max(1)).clamp(1, LANES_MAX);
        let mut made = 0;
        for (number, half) in work.halves.clone().into_iter().enumerate() {
            let (depth, options) = queues(half, point);
            let entries = self.adapter.completions();
            // Queue pairs whose completions fit one queue.
            let together = (entries / depth).max(1) as usize;
            let needed = (point.qps as usize).div_ceil(together);
            if depth > entries || needed > SHORT_LANES_MAX {
                return Err(EngineError::Unfit(format!(
                    "{} queue pairs with queues of {depth}, while a completion queue has {entries} entries",
                    point.qps
                )));
            }
            let lanes = threads.max(needed).min(point.qps as usize);
            for lane in 0..lanes {
                let share =
                    (point.qps as usize * (lane + 1) / lanes) - (point.qps as usize * lane / lanes);
                let completions =
                    CompletionQueue::new(&self.adapter.context, depth * share as u32, None)?;
                let mut links = Vec::with_capacity(share);
                for _ in 0..share {
                    work.in_time()?;
                    let pair =
                        QueuePair::new(&self.adapter.domain, &completions, &completions, &options)?;
                    pair.initialize(self.adapter.number, Access::ALL, DATAGRAM_KEY)?;
                    let regions = (0..point.regions).map(|_| {
                        made += 1;
                        work.in_time()?;
                        self.adapter.region(&buffers[made % buffers.len()])
                    });
                    links.push(Link {
                        pair,
                        regions: regions.collect::<Result<_, _>>()?,
                        target: Target::Receives,
                    });
                }
                work.lanes.push(Lane {
                    links,
                    completions,
                    half: number,
                    requests: half.requests,
                    carried: Arc::default(),
                });
            }
        }
        Ok(work)
    }

    /// Whether this host can run a workload without harm: nothing that comes from a peer is believed.
    fn check(&self, point: &Point) -> Result<(), EngineError> {
        space(&self.adapter.facts)
            .admits(point)
            .map_err(|error| EngineError::Unfit(error.to_string()))?;
        self.adapter.mtu(point.mtu)?;
        let requests = u64::from(point.send_depth) + u64::from(point.receive_depth);
        let pair = PAIR_BYTES + requests * (REQUEST_BYTES + 16 * u64::from(point.sges));
        // Three halves at most are at one end.
        let bytes = 3 * u64::from(point.qps) * pair;
        match memory_left() {
            Some(left) if bytes > left / 2 => Err(EngineError::Unfit(format!(
                "queues of some {} MiB; half of this host's free memory is {} MiB",
                bytes >> 20,
                left >> 21
            ))),
            _ => Ok(()),
        }
    }
}

impl End for LocalEnd {
    fn facts(&self) -> &Facts {
        &self.adapter.facts
    }

    fn prepare(&mut self, task: &Task) -> Result<Vec<HalfOffer>, EngineError> {
        self.finish()?;
        self.workloads = self.workloads.wrapping_add(1);
        let psn = self.workloads.wrapping_mul(0x9e_3779) & 0xff_ffff;
        let work = self.set_up(task, psn)?;
        let offers = (0..work.halves.len()).map(|half| {
            let mut offer = self.adapter.offer(psn);
            let answers = !work.halves[half].requests && one_sided(work.point.operation);
            for link in work.links(half) {
                offer.queue_pairs.push(link.pair.number());
                if answers {
                    let named = |region: &volley_transports::verbs::MemoryRegion| {
                        (region.address(), region.remote_key())
                    };
                    offer.regions.push(link.regions.iter().map(named).collect());
                }
            }
            offer
        });
        let offers = offers.collect();
        self.work = Some(work);
        Ok(offers)
    }

    fn connect(&mut self, peers: &[HalfOffer]) -> Result<(), EngineError> {
        let work = self.work.as_mut().ok_or(EngineError::OutOfTurn)?;
        if work.flow.is_some() || peers.len() != work.halves.len() {
            return Err(EngineError::OutOfTurn);
        }
        let mtu = self.adapter.mtu(work.point.mtu)?;
        let operation = work.point.operation;
        for (number, peer) in peers.iter().enumerate() {
            let half = work.halves[number];
            let wants_regions = half.requests && one_sided(operation);
            let pairs = work.point.qps as usize;
            let whole = peer.queue_pairs.len() == pairs
                && (!wants_regions
                    || (peer.regions.len() == pairs
                        && peer.regions.iter().all(|regions| !regions.is_empty())));
            if !whole {
                return Err(EngineError::OutOfTurn);
            }
            let path = self.adapter.path(peer);
            let datagrams_to = operation
                .is_datagram()
                .then(|| AddressHandle::new(&self.adapter.domain, &path).map(Arc::new))
                .transpose()?;
            let reads = peer.reads.min(self.adapter.offer(0).reads);
            let (psn, deadline) = (work.psn, work.deadline);
            let lanes = work.lanes.iter_mut().filter(|lane| lane.half == number);
            for (at, link) in lanes.flat_map(|lane| lane.links.iter_mut()).enumerate() {
                in_time(deadline)?;
                let queue_pair = peer.queue_pairs[at];
                if let Some(to) = &datagrams_to {
                    link.pair.open_datagrams(psn)?;
                    let to = Arc::clone(to);
                    link.target = Target::Datagrams { to, queue_pair };
                    continue;
                }
                link.pair.connect(&Connection {
                    queue_pair,
                    path,
                    mtu,
                    receive_psn: peer.psn & 0xff_ffff,
                    send_psn: psn,
                    reliability: Reliability {
                        reads,
                        ..Reliability::default()
                    },
                })?;
                if wants_regions {
                    let named = |&(address, key): &(u64, u32)| RemoteMemory { address, key };
                    link.target = Target::Regions(peer.regions[at].iter().map(named).collect());
                }
            }
        }
        let receives = operation.consumes_receives();
        let answering = work.lanes.iter().filter(|lane| !lane.requests && receives);
        for lane in answering {
            lane.lay_out(&work.point).map_err(EngineError::Broken)?;
        }
        Ok(())
    }

    fn run(&mut self, timing: Timing) -> Result<Vec<Reading>, EngineError> {
        let work = self.work.as_mut().ok_or(EngineError::OutOfTurn)?;
        if work.flow.is_some() {
            return Err(EngineError::OutOfTurn);
        }
        let timing = timing
            .checked()
            .map_err(|what| EngineError::Unfit(what.to_owned()))?;
        work.start();
        let began = Instant::now();
        let mut readings = Vec::new();
        for reading in 0..=u64::from(timing.samples) {
            let at = timing.settle_ms + reading * timing.sample_ms;
            work.sleep_until(began + Duration::from_millis(at))?;
            readings.push(work.read(&self.adapter));
        }
        Ok(readings)
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        match self.work.take() {
            Some(work) => work.take_down(),
            None => Ok(()),
        }
    }
}

impl Drop for LocalEnd {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _told = self.finish();
    }
}

impl Work {
    fn links(&self, half: usize) -> impl Iterator<Item = &Link> {
        let lanes = self.lanes.iter().filter(move |lane| lane.half == half);
        lanes.flat_map(|lane| &lane.links)
    }

    fn in_time(&self) -> Result<(), EngineError> {
        in_time(self.deadline)
    }

    fn start(&mut self) {
        let stop = Arc::new(AtomicBool::new(false));
        let carried = self.lanes.iter();
        let carried = carried.map(|lane| (lane.half, Arc::clone(&lane.carried)));
        let mut flow = Flowing {
            stop,
            began: Instant::now(),
            carried: carried.collect(),
            threads: Vec::new(),
        };
        let deadline = self.deadline;
        let (busy, idle) = std::mem::take(&mut self.lanes)
            .into_iter()
            .partition(|lane| is_busy(&self.halves[lane.half], &self.point));
        self.lanes = idle;
        // Who receives begins first.
        let mut busy: Vec<Lane> = busy;
        busy.sort_by_key(|lane| lane.requests);
        for lane in busy {
            let (stop, point) = (Arc::clone(&flow.stop), self.point.clone());
            flow.threads.push(std::thread::spawn(move || {
                let mut until = Until {
                    stop: &stop,
                    deadline,
                    looks: 0,
                };
                let ended = lane.drive(&point, &mut until);
                (lane, ended)
            }));
        }
        self.flow = Some(flow);
    }

    /// Waits; ends early if traffic broke off or time is over.
    fn sleep_until(&mut self, then: Instant) -> Result<(), EngineError> {
        loop {
            self.in_time()?;
            let flow = self.flow.as_mut().ok_or(EngineError::OutOfTurn)?;
            if let Some(at) = flow.threads.iter().position(JoinHandle::is_finished) {
                let ended = flow.threads.swap_remove(at).join();
                let (lane, how) = ended.map_err(|_| {
                    EngineError::Broken("a traffic loop panicked; this is a defect".to_owned())
                })?;
                self.lanes.push(lane);
                return Err(how.map_or_else(EngineError::Broken, |()| EngineError::OutOfTime));
            }
            let left = then.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(LOOK_AGAIN));
        }
    }

    fn read(&self, adapter: &Adapter) -> Reading {
        let mut volumes = vec![super::flow::Volume::default(); self.halves.len()];
        let mut at_us = 0;
        if let Some(flow) = &self.flow {
            at_us = flow.began.elapsed().as_micros() as u64;
            for (half, carried) in &flow.carried {
                volumes[*half].add(carried.volume());
            }
        }
        Reading {
            at_us,
            volumes,
            counters: adapter.counters().0,
        }
    }

    /// Stops the loops, destroys everything and says what did not go.
    fn take_down(mut self) -> Result<(), EngineError> {
        let mut first = None;
        let mut note = |what: String| {
            first.get_or_insert(what);
        };
        if let Some(flow) = self.flow.take() {
            flow.stop.store(true, Ordering::Relaxed);
            for thread in flow.threads {
                match thread.join() {
                    Ok((lane, _)) => self.lanes.push(lane),
                    Err(_) => note("a traffic loop panicked".to_owned()),
                }
            }
        }
        for lane in self.lanes {
            for link in lane.links {
                if let Err(error) = link.pair.destroy() {
                    note(error.to_string());
                }
                for region in link.regions {
                    if let Err(error) = region.deregister() {
                        note(error.to_string());
                    }
                }
            }
            if let Err(error) = lane.completions.destroy() {
                note(error.to_string());
            }
        }
        match first {
            None => Ok(()),
            Some(what) => Err(EngineError::LeftOver(what)),
        }
    }
}

/// The workloads that an end can run, by what it is made of.
pub(super) fn space(facts: &Facts) -> Space {
    use crate::space::{Axis, Memory};
    let nodes: Vec<Memory> = facts.nodes.iter().copied().map(Memory::Dram).collect();
    let mut space = Space {
        mtu: [256, 512, 1024, 2048, 4096]
            .into_iter()
            .filter(|mtu| *mtu <= facts.mtu)
            .collect(),
        memory_a: nodes.clone(),
        memory_b: nodes,
        ..Space::default()
    };
    // Three halves of a workload's flows may be at one end.
    let most = [
        (Axis::Qps, facts.queue_pairs / 3),
        (Axis::Sges, facts.sges),
        (Axis::SendDepth, facts.queue_depth),
        (Axis::ReceiveDepth, facts.queue_depth),
        (Axis::Batch, facts.queue_depth),
        (Axis::Regions, facts.regions / 3),
    ];
    for (axis, most) in most {
        let range = space.axes.get_mut(&axis).expect("every axis has a range");
        range.1 = range.1.min(most).max(1);
    }
    space.regions_total_max = space.regions_total_max.min(facts.regions / 3).max(1);
    space
}

fn in_time(deadline: Instant) -> Result<(), EngineError> {
    match Instant::now() < deadline {
        true => Ok(()),
        false => Err(EngineError::OutOfTime),
    }
}

/// Whether the requester names the responder's memory.
fn one_sided(operation: Operation) -> bool {
    !matches!(
        operation,
        Operation::RcSend | Operation::UcSend | Operation::UdSend
    )
}

/// Whether a half has a loop to run.
fn is_busy(half: &Half, point: &Point) -> bool {
    half.requests || point.operation.consumes_receives()
}

/// The queue pairs of a half: how many completions each may cause at once, and its sizes.
fn queues(half: Half, point: &Point) -> (u32, QueuePairOptions) {
    let (send_depth, receive_depth) = match half.requests {
        true => (point.send_depth, UNUSED_DEPTH),
        false if point.operation.consumes_receives() => (UNUSED_DEPTH, point.receive_depth),
        false => (UNUSED_DEPTH, UNUSED_DEPTH),
    };
    let kind = match point.operation {
        Operation::UcSend | Operation::UcWrite | Operation::UcWriteImm => QueuePairKind::Unreliable,
        Operation::UdSend => QueuePairKind::Datagram,
        _ => QueuePairKind::Reliable,
    };
    let options = QueuePairOptions {
        kind,
        send_depth,
        receive_depth,
        send_pieces: point.sges,
        receive_pieces: point.sges,
        inline_bytes: 0,
    };
    (send_depth.max(receive_depth), options)
}
