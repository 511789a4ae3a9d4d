//! A whole cluster in virtual time, with everything that can go wrong.
//!
//! The logic is that of production, unchanged: [`Ledger`](crate::Ledger), [`Scheduler`], roster, the turns of attention and expert workers with their
//! [`Rally`](crate::Rally), scatter, gather and merge, over the lanes of the simulated fabric. What is replaced are the shells: threads by events, the clock by a
//! hand, actors and control links by `controller` and `host`, and kernels by a `model` that costs nothing and gives another token
//! when anything was computed wrongly. So the same seed gives the same history, and a history takes milliseconds.
//!
//! Two use it: the test of failures (`tests/cluster_simulation.rs`), which runs thousands of seeds against the invariants checked here, and the planner,
//! which gives it [`Costs`] of real hardware to see what a deployment will deliver.

mod config;
mod controller;
mod costs;
mod faults;
mod host;
mod links;
mod model;
mod outcome;
mod random;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::SeedableRng;
use rand_pcg::Pcg64;
use volley_transports::simulated::{Pace, SimulatedNetwork};
use volley_transports::{Epoch, FrameKind, HEADER_BYTES, Header, WorkerId};

pub use config::{Arrival, Fault, FaultKind, SimulationConfig};
pub use costs::{AttentionLoad, Costs, ExpertRound, FlatCosts};
pub use outcome::{Outcome, Stream, Utilisation, Violation};
pub use random::{Scenario, scenario};

use controller::{Controller, Deed};
use host::{Down, Host, Mold, Next, Process, Up};
use model::HashModel;

use crate::clock::Clock;
use crate::expert::ExpertLoad;
use crate::protocol::{SequenceId, StepTiming};
use crate::request::{FinishReason, RequestEvent};
use crate::scheduler::Scheduler;
use crate::timeline::Timeline;
use crate::voice::WorkerWord;

/// Pause before the controller is called again; doubles up to [`REDIAL_MAX`], as in production.
const REDIAL: Duration = Duration::from_millis(50);
/// See [`REDIAL`].
const REDIAL_MAX: Duration = Duration::from_secs(1);
/// How often the controller looks after what is due.
const TICK: Duration = Duration::from_millis(50);
/// With no fault under way, a step has to end within this while there are requests: every deadline, pause and bar of the cluster is shorter.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time given to what is still under way when the last stream has ended.
const AFTERMATH: Duration = Duration::from_secs(3);
/// How long a worker that leaves waits for its work to go elsewhere.
const DRAIN: Duration = Duration::from_secs(5);
/// Lines of the log that are kept.
const LOG_LINES: usize = 200;

/// A cluster in virtual time. See the module.
pub struct Simulation {
    mold: Mold,
    costs: Box<dyn Costs>,
    network: SimulatedNetwork,
    controller: Controller,
    hosts: BTreeMap<WorkerId, Host>,
    queue: BinaryHeap<Reverse<Due>>,
    serial: u64,
    random: Pcg64,
    arrivals: Vec<Arrival>,
    faults: Vec<Fault>,
    streams: Vec<Stream>,
    by_sequence: BTreeMap<SequenceId, usize>,
    /// Streams and faults that have not ended.
    open: usize,
    /// See [`unchecked`](Simulation::unchecked).
    check: bool,
    steps: u64,
    /// When the last step ended, or the last fault or arrival, if that is later.
    progress: Duration,
    timing: StepTiming,
    events: u64,
    log: VecDeque<(Duration, String)>,
    wrong: Option<String>,
}

struct Due {
    at: Duration,
    serial: u64,
    what: Happening,
}

enum Happening {
    /// A process takes a turn.
    Turn(WorkerId, u64),
    /// A process has computed.
    Computed(WorkerId, u64),
    /// A process has its weights.
    Loaded(WorkerId, u64),
    /// A process calls the controller.
    Dial(WorkerId, u64),
    /// The call arrives.
    Hello(WorkerId, u64),
    /// A process that leaves has waited long enough.
    Impatient(WorkerId, u64),
    /// A message arrives at a worker, over the link of this life.
    Down(WorkerId, u64, Down),
    /// A message arrives at the controller.
    Up(WorkerId, u64, Up),
    /// A worker has been unheard since then.
    Silence(WorkerId, u64, Duration),
    /// The occupant of a seat has been gone for as long as it takes to notice.
    Gone(WorkerId, u64),
    /// The controller has ended a link.
    HungUp(WorkerId, u64),
    Consider(WorkerId, Epoch, String),
    Answer(u64),
    Tick,
    Arrive(usize),
    Cancel(usize),
    Break(usize),
    Mend(usize),
}

impl Simulation {
    /// A cluster whose workers start at time zero. `make` makes its scheduler, again each time the last one died.
    ///
    /// # Errors
    /// The configuration makes no cluster; the message says why.
    pub fn new(
        config: SimulationConfig,
        costs: Box<dyn Costs>,
        make: Box<dyn Fn() -> Box<dyn Scheduler>>,
    ) -> Result<Self, String> {
        let shape = Mold::shape(&config);
        let topology = shape
            .topology(config.micro_batches)
            .map_err(|e| e.to_string())?;
        let network = SimulatedNetwork::new(config.network, config.seed, Pace::Driven);
        let mut network = network.map_err(|e| e.to_string())?;
        if let Some(row_bytes) = config.row_bytes {
            network = network.with_size(Arc::new(move |frame| frame_bytes(frame, row_bytes)));
        }
        let model = HashModel {
            layers: config.layers,
            experts: config.roster.experts,
            top_k: config.top_k.into(),
            vocab: config.vocab,
            popularity: Arc::clone(&config.popularity),
        };
        if usize::from(config.roster.experts) < model.top_k {
            return Err(format!(
                "a token cannot visit {} of {} experts",
                config.top_k, config.roster.experts
            ));
        }
        let mold = Mold {
            model,
            shape,
            clock: Clock::by_hand(),
            timeline: Timeline::new(topology.ids(), config.timeline_spans),
            load: Arc::new(ExpertLoad::new(config.layers, config.roster.experts.into())),
            unfilled: Arc::new(AtomicBool::new(false)),
            config: config.clone(),
        };
        let mut simulation = Simulation {
            controller: Controller::new(config.clone(), topology, network.clone(), make),
            hosts: topology.ids().map(|id| (id, Host::new())).collect(),
            costs,
            network,
            queue: BinaryHeap::new(),
            serial: 0,
            random: Pcg64::seed_from_u64(config.seed ^ 0x5eed),
            arrivals: Vec::new(),
            faults: Vec::new(),
            streams: Vec::new(),
            by_sequence: BTreeMap::new(),
            open: 0,
            check: true,
            steps: 0,
            progress: Duration::ZERO,
            timing: StepTiming::default(),
            events: 0,
            log: VecDeque::new(),
            wrong: None,
            mold,
        };
        for worker in topology.ids() {
            simulation.start(worker);
        }
        simulation.push(TICK, Happening::Tick);
        Ok(simulation)
    }

    /// Leaves out the comparison of every stream with what it must be, which costs more than the simulation when streams are long, and lets the scheduler make plans
    /// that are refused in part, as a user's own may.
    pub fn unchecked(mut self) -> Self {
        self.check = false;
        self
    }

    /// What was computed when, if spans are kept.
    pub fn timeline(&self) -> Timeline {
        self.mold.timeline.clone()
    }

    /// Plays until every request has its answer and every fault is over.
    ///
    /// # Errors
    /// A stream is lost or wrong, a token was routed to a replica that is not filled, a plan of the scheduler was refused, or there is no end.
    pub fn run(
        &mut self,
        arrivals: Vec<Arrival>,
        faults: Vec<Fault>,
    ) -> Result<Outcome, Box<Violation>> {
        let ends = faults.iter().map(|fault| fault.at + fault.lasts);
        let last = arrivals.iter().map(|arrival| arrival.at).chain(ends).max();
        self.progress = last.unwrap_or_default();
        self.open = arrivals.len() + faults.len();
        for (index, arrival) in arrivals.iter().enumerate() {
            self.push(arrival.at, Happening::Arrive(index));
        }
        for (index, fault) in faults.iter().enumerate() {
            self.push(fault.at, Happening::Break(index));
        }
        let stream = |arrival: &Arrival| Stream::new(arrival.at, arrival.request.prompt.len());
        self.streams = arrivals.iter().map(stream).collect();
        (self.arrivals, self.faults) = (arrivals, faults);
        let mut woken = Vec::new();
        let mut until = None;
        loop {
            let due = self.queue.peek().map(|Reverse(due)| due.at);
            let next = self.network.next_at();
            let Some(at) = due.into_iter().chain(next).min() else {
                return Err(self.violation("nothing is left to happen".to_owned()));
            };
            if self.open == 0 && at > *until.get_or_insert(self.now() + AFTERMATH) {
                break;
            }
            if at > self.progress + PATIENCE && self.open > 0 {
                let state = self.controller.state(self.now());
                return Err(self.violation(format!("no step has ended for {PATIENCE:?}: {state}")));
            }
            self.events += 1;
            self.mold.clock.set(at);
            if next.is_some_and(|next| next <= at) {
                self.network.step(&mut woken);
                for worker in woken.drain(..) {
                    self.wake(worker);
                }
            } else if let Some(Reverse(due)) = self.queue.pop() {
                self.network.pass_until(at);
                self.happen(due.what);
            }
            if self.mold.unfilled.load(Ordering::Relaxed) {
                self.wrong.get_or_insert(
                    "rows were sent to an expert worker for an expert that it does not hold".into(),
                );
            }
            if let Some(wrong) = self.wrong.take() {
                return Err(self.violation(wrong));
            }
        }
        self.books_are_closed()?;
        Ok(self.outcome())
    }

    fn now(&self) -> Duration {
        self.mold.clock.now()
    }

    fn happen(&mut self, what: Happening) {
        let now = self.now();
        match what {
            Happening::Turn(worker, number) => {
                if let Some(process) = self.process(worker, number)
                    && process.wakes().take_if(|at| *at == now).is_some()
                {
                    self.turn(worker);
                }
            }
            Happening::Computed(worker, number) => self.computed(worker, number),
            Happening::Loaded(worker, number) => {
                let home = self.mold.home(worker);
                if self.process(worker, number).is_some() {
                    self.say(worker, Up::Word(WorkerWord::Loaded(home)));
                }
            }
            Happening::Dial(worker, number) => self.dial(worker, number),
            Happening::Hello(worker, number) => self.hello(worker, number),
            Happening::Impatient(worker, number) => {
                if self.process(worker, number).is_some() {
                    self.note(format!("{worker} leaves without being released"));
                    self.end_process(worker);
                }
            }
            Happening::Down(worker, life, down) => self.arrives(worker, life, down),
            Happening::Up(worker, life, up) => {
                let unheard = self.hosts[&worker].unheard > 0;
                let Some(link) = self.link(worker, life) else {
                    return;
                };
                if unheard {
                    link.stuck_up.push(up);
                } else {
                    self.controller.hear(worker, life, up, now);
                    self.do_deeds();
                }
            }
            Happening::Silence(worker, life, since) => {
                if self.hosts[&worker].unheard_since == Some(since) {
                    self.happen(Happening::Gone(worker, life));
                    self.link_broke(worker, life);
                }
            }
            Happening::Gone(worker, life) => {
                self.controller
                    .gone(worker, life, "nothing is heard of it", now);
                self.do_deeds();
            }
            Happening::HungUp(worker, life) => self.link_broke(worker, life),
            Happening::Consider(worker, epoch, reason) => {
                self.controller.consider(worker, epoch, &reason, now);
                self.do_deeds();
            }
            Happening::Answer(ask) => {
                self.controller.answered(ask, now);
                self.do_deeds();
            }
            Happening::Tick => {
                self.controller.tick(now);
                self.do_deeds();
                self.push(now + TICK, Happening::Tick);
            }
            Happening::Arrive(index) => self.arrive(index),
            Happening::Cancel(index) => {
                if let Some((&sequence, _)) = self.by_sequence.iter().find(|(_, at)| **at == index)
                {
                    self.controller.cancel(sequence, now);
                    self.do_deeds();
                }
            }
            Happening::Break(index) => self.strike(index),
            Happening::Mend(index) => self.mend(index),
        }
    }

    // Processes.

    fn start(&mut self, worker: WorkerId) {
        let now = self.now();
        let Some(host) = self.hosts.get_mut(&worker) else {
            return;
        };
        host.starts += 1;
        let number = host.starts;
        match self.mold.process(worker, number) {
            Ok(process) => host.process = Some(process),
            Err(reason) => self.wrong = Some(format!("{worker} cannot start: {reason}")),
        }
        self.push(now, Happening::Dial(worker, number));
        self.push(
            now + self.mold.config.load_time,
            Happening::Loaded(worker, number),
        );
    }

    /// The process is gone, and its lanes with it.
    fn end_process(&mut self, worker: WorkerId) {
        if let Some(host) = self.hosts.get_mut(&worker) {
            host.process = None;
        }
        if let Some(life) = self.controller.life(worker) {
            self.controller
                .gone(worker, life, "its process has ended", self.mold.clock.now());
            self.do_deeds();
        }
        self.start_if_none(worker);
    }

    fn process(&mut self, worker: WorkerId, number: u64) -> Option<&mut Process> {
        let process = self.hosts.get_mut(&worker)?.process.as_mut()?;
        (process.number == number).then_some(process)
    }

    /// Something has come: the worker takes a turn now, if it can.
    fn wake(&mut self, worker: WorkerId) {
        let now = self.now();
        let Some(process) = self
            .hosts
            .get_mut(&worker)
            .and_then(|host| host.process.as_mut())
        else {
            return;
        };
        let number = process.number;
        if process.wakes().is_none_or(|at| at > now) {
            *process.wakes() = Some(now);
            self.push(now, Happening::Turn(worker, number));
        }
    }

    fn turn(&mut self, worker: WorkerId) {
        let now = self.now();
        let adopt = self.mold.config.adopt_time;
        let Some(host) = self.hosts.get_mut(&worker) else {
            return;
        };
        let (Some(process), 0) = (&mut host.process, host.stopped) else {
            return;
        };
        let number = process.number;
        match process.turn(worker, adopt, &mut *self.costs) {
            Ok(Some(Next::Busy(cost))) => {
                let cost = cost * host.slowness;
                host.busy += cost;
                self.push(now + cost, Happening::Computed(worker, number));
            }
            Ok(Some(Next::Loads(time))) => {
                self.push(now + time, Happening::Computed(worker, number));
            }
            Ok(Some(Next::Rest(at_most))) => {
                *process.wakes() = Some(now + at_most);
                self.push(now + at_most, Happening::Turn(worker, number));
            }
            Ok(None) => {}
            Err(fatal) => self.wrong = Some(format!("{worker} failed: {fatal}")),
        }
        self.carry_words(worker);
    }

    fn computed(&mut self, worker: WorkerId, number: u64) {
        let stopped = self.hosts[&worker].stopped > 0;
        let Some(process) = self.process(worker, number) else {
            return;
        };
        if stopped {
            *process.ended() = true;
            return;
        }
        if let Err(fatal) = process.done() {
            self.wrong = Some(format!("{worker} failed: {fatal}"));
        }
        self.carry_words(worker);
        self.turn(worker);
    }

    /// Sends on what a worker has said in its turn.
    fn carry_words(&mut self, worker: WorkerId) {
        let Some(process) = self
            .hosts
            .get(&worker)
            .and_then(|host| host.process.as_ref())
        else {
            return;
        };
        for up in process.said() {
            self.say(worker, up);
        }
    }

    // Clients.

    fn arrive(&mut self, index: usize) {
        let now = self.now();
        let request = self.arrivals[index].request.clone();
        match self.controller.submit(request, now) {
            Ok(sequence) => {
                self.by_sequence.insert(sequence, index);
                if let Some(at) = self.arrivals[index].cancelled {
                    self.push(at.max(now), Happening::Cancel(index));
                }
            }
            Err(error) if error.is_overload() => {
                self.streams[index].refused = true;
                self.open -= 1;
            }
            Err(error) => self.wrong = Some(format!("request {index} was refused: {error}")),
        }
        self.do_deeds();
    }

    fn client(&mut self, sequence: SequenceId, event: RequestEvent) {
        let now = self.now();
        let Some(&index) = self.by_sequence.get(&sequence) else {
            return;
        };
        let stream = &mut self.streams[index];
        match event {
            RequestEvent::Token { token, .. } => stream.token(token, now),
            RequestEvent::Finished(reason) => {
                if stream.finished.is_some() {
                    self.wrong = Some(format!("request {index} ended twice"));
                    return;
                }
                stream.finished = Some(now);
                self.open -= 1;
                self.ended(index, &reason);
            }
            RequestEvent::Prompt(_) => {}
        }
    }

    /// Holds a stream that has ended against what it must be.
    fn ended(&mut self, index: usize, reason: &FinishReason) {
        let Arrival {
            request, cancelled, ..
        } = &self.arrivals[index];
        let stream = &mut self.streams[index];
        if !self.check {
            stream.tokens.clear();
            return;
        }
        let (tokens, end) = self.mold.model.answer(request);
        let right = match reason {
            FinishReason::Cancelled => cancelled.is_some() && tokens.starts_with(&stream.tokens),
            reason => *reason == end && stream.tokens == tokens,
        };
        if !right {
            self.wrong = Some(format!(
                "request {index} got {:?} and ended with {reason:?}, but must get {tokens:?} and end with {end:?}",
                stream.tokens
            ));
        }
    }

    // Whatever the controller wants.

    fn do_deeds(&mut self) {
        let now = self.now();
        loop {
            let deeds = self.controller.deeds();
            if deeds.is_empty() {
                return;
            }
            for deed in deeds {
                match deed {
                    Deed::Tell(worker, life, down) => self.tell(worker, life, down),
                    Deed::HangUp(worker, life) => {
                        let after = self.control_delay();
                        self.push(now + after, Happening::HungUp(worker, life));
                    }
                    Deed::Consider(after, worker, epoch, reason) => {
                        self.push(now + after, Happening::Consider(worker, epoch, reason));
                    }
                    Deed::Asked(ask) => {
                        self.push(
                            now + self.mold.config.scheduler_time,
                            Happening::Answer(ask),
                        );
                    }
                    Deed::Client(sequence, event) => self.client(sequence, event),
                    Deed::Step(done) => {
                        self.steps += 1;
                        self.progress = self.progress.max(now);
                        outcome::add(&mut self.timing, &done.timing);
                    }
                    Deed::Note(text) => self.note(text),
                    Deed::Refused(text) if self.check => self.wrong = Some(text),
                    Deed::Refused(text) => self.note(text),
                    Deed::Wrong(text) => self.wrong = Some(text),
                }
            }
        }
    }

    fn push(&mut self, at: Duration, what: Happening) {
        self.serial += 1;
        let serial = self.serial;
        self.queue.push(Reverse(Due { at, serial, what }));
    }

    fn note(&mut self, text: String) {
        if self.log.len() == LOG_LINES {
            self.log.pop_front();
        }
        self.log.push_back((self.now(), text));
    }
}

/// Bytes of a frame whose rows were as long as those of a real model.
fn frame_bytes(frame: &[u8], (dispatch, combine): (u64, u64)) -> usize {
    let Ok(header) = Header::parse(frame) else {
        return frame.len();
    };
    let rows = match header.kind {
        FrameKind::Dispatch => u64::from(header.rows) * dispatch,
        FrameKind::Combine => u64::from(header.assignments) * combine,
    };
    HEADER_BYTES + rows as usize
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.serial == other.serial
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.serial).cmp(&(other.at, other.serial))
    }
}
