//! The controller in virtual time: the shell around [`Roster`], [`Ledger`] and [`Scheduler`], as supervisor and frontend are in production.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use volley_transports::simulated::SimulatedNetwork;
use volley_transports::{Endpoint, Epoch, Role, Topology, WorkerId};

use super::config::SimulationConfig;
use super::host::{Down, Up};
use crate::data_loop::Exit;
use crate::frontend::{Ledger, Limits, Output};
use crate::grouping::Grouping;
use crate::protocol::{
    AttentionCapacity, AttentionWord, Membership, SchedulerEvent, SequenceId, StepDone, StepPlan,
};
use crate::request::{Request, RequestEvent, SubmitError};
use crate::roster::Roster;
use crate::scheduler::Scheduler;
use crate::voice::WorkerWord;

/// As the supervisor's: a worker that is accused has this long to be reported dead.
const ACCUSED_GRACE: Duration = Duration::from_millis(100);

/// What the controller wants done.
pub(super) enum Deed {
    /// Tell the occupant of a seat.
    Tell(WorkerId, u64, Down),
    /// End the link to an occupant.
    HangUp(WorkerId, u64),
    /// Consider an accusation, after this time.
    Consider(Duration, WorkerId, Epoch, String),
    /// The scheduler has been asked; it answers after its time.
    Asked(u64),
    /// Tell a client.
    Client(SequenceId, RequestEvent),
    /// A step has ended.
    Step(StepDone),
    /// For the log.
    Note(String),
    /// Part of a plan was refused, which the shipped schedulers never give cause for.
    Refused(String),
    /// What must not be.
    Wrong(String),
}

/// See the module.
pub(super) struct Controller {
    config: SimulationConfig,
    topology: Topology,
    network: SimulatedNetwork,
    roster: Roster,
    pub(super) ledger: Ledger,
    make: Box<dyn Fn() -> Box<dyn Scheduler>>,
    scheduler: Box<dyn Scheduler>,
    /// Lives by seat.
    seats: BTreeMap<WorkerId, u64>,
    /// By attention worker: which life commands are for.
    links: Vec<Option<u64>>,
    moving: BTreeSet<WorkerId>,
    regrouped: Duration,
    next_life: u64,
    /// The answer that is under way.
    asked: Option<(u64, Vec<StepPlan>)>,
    asks: u64,
    down: bool,
    deeds: Vec<Deed>,
}

impl Controller {
    pub(super) fn new(
        config: SimulationConfig,
        topology: Topology,
        network: SimulatedNetwork,
        make: Box<dyn Fn() -> Box<dyn Scheduler>>,
    ) -> Self {
        let limits = Limits {
            context: config.context,
            vocab: config.vocab,
            max_waiting: config.max_waiting,
        };
        Controller {
            roster: Roster::new(config.roster),
            ledger: Ledger::new(limits),
            scheduler: make(),
            make,
            seats: BTreeMap::new(),
            links: Vec::new(),
            moving: BTreeSet::new(),
            regrouped: Duration::ZERO,
            next_life: 0,
            asked: None,
            asks: 0,
            down: false,
            deeds: Vec::new(),
            config,
            topology,
            network,
        }
    }

    /// What is to be done since the last call, in order.
    pub(super) fn deeds(&mut self) -> Vec<Deed> {
        std::mem::take(&mut self.deeds)
    }

    /// A worker calls. Returns its life, or nothing if its seat is taken. Call [`Controller::welcomed`] when it has its link.
    pub(super) fn hello(&mut self, worker: WorkerId, loaded: Option<Vec<u16>>) -> Option<u64> {
        if self.seats.contains_key(&worker) {
            return None;
        }
        self.next_life += 1;
        let life = self.next_life;
        self.roster.seat(worker, life);
        self.seats.insert(worker, life);
        if let Some(holds) = loaded {
            self.roster.loaded(worker, life, holds);
        }
        Some(life)
    }

    /// Goes on with a worker that has joined.
    pub(super) fn welcomed(&mut self, now: Duration) {
        self.advance(now);
    }

    /// An occupant says something.
    pub(super) fn hear(&mut self, worker: WorkerId, life: u64, up: Up, now: Duration) {
        if !self.roster.is_current(worker, life) {
            return;
        }
        match up {
            Up::Report(AttentionWord::Step(report)) => {
                let ended = self.ledger.report(report, now);
                self.deeds
                    .extend(ended.into_iter().map(|(done, _)| Deed::Step(done)));
            }
            Up::Report(AttentionWord::Moved { worker, epoch }) => self.ledger.moved(worker, epoch),
            Up::Word(WorkerWord::Loaded(holds)) => self.roster.loaded(worker, life, holds),
            Up::Word(WorkerWord::Moved(epoch)) => {
                if epoch == self.roster.epoch() {
                    self.moving.remove(&worker);
                }
            }
            Up::Word(WorkerWord::Accused {
                epoch,
                peer,
                reason,
            }) => {
                let reason = format!("{worker} says: {reason}");
                self.deeds
                    .push(Deed::Consider(ACCUSED_GRACE, peer, epoch, reason));
            }
            Up::Word(
                WorkerWord::Waits(_) | WorkerWord::Startup(_) | WorkerWord::Ended(Exit::Stopped),
            ) => {}
            Up::Word(WorkerWord::Ended(exit)) => self.lose(worker, &format!("{exit:?}")),
            Up::Leaving => {
                self.note(|| format!("{worker} wants to leave"));
                self.roster.leaving(worker);
            }
        }
        self.advance(now);
    }

    /// An accusation has rested.
    pub(super) fn consider(&mut self, worker: WorkerId, epoch: Epoch, reason: &str, now: Duration) {
        if epoch == self.roster.epoch()
            && self.roster.takes_part(worker)
            && self.roster.accused(worker, epoch, now)
        {
            self.note(|| format!("{worker} is suspect: {reason}"));
            self.advance(now);
        }
    }

    /// An occupant is gone.
    pub(super) fn gone(&mut self, worker: WorkerId, life: u64, reason: &str, now: Duration) {
        if self.seats.get(&worker) == Some(&life) {
            self.lose(worker, reason);
            self.advance(now);
        }
    }

    /// Who sits there.
    pub(super) fn life(&self, worker: WorkerId) -> Option<u64> {
        self.seats.get(&worker).copied()
    }

    /// Looks after what is due.
    pub(super) fn tick(&mut self, now: Duration) {
        if now.saturating_sub(self.regrouped) > self.config.peer_deadline
            && let Some(worker) = self.moving.pop_first()
        {
            self.lose(worker, "it did not move to the new epoch");
        }
        self.advance(now);
    }

    /// A client asks for something.
    pub(super) fn submit(
        &mut self,
        request: Request,
        now: Duration,
    ) -> Result<SequenceId, SubmitError> {
        let sequence = self.ledger.submit(request, now)?;
        self.advance(now);
        Ok(sequence)
    }

    /// A client hangs up.
    pub(super) fn cancel(&mut self, sequence: SequenceId, now: Duration) {
        self.ledger.cancel(sequence);
        self.advance(now);
    }

    /// The scheduler's answer arrives.
    pub(super) fn answered(&mut self, ask: u64, now: Duration) {
        if let Some((_, plans)) = self.asked.take_if(|(id, _)| *id == ask) {
            self.ledger.plans(&plans, now);
            self.advance(now);
        }
    }

    /// The scheduler dies; a new one is started when no step is under way.
    pub(super) fn scheduler_dies(&mut self, now: Duration) {
        self.down = true;
        self.asked = None;
        self.advance(now);
    }

    /// What would explain that nothing goes on.
    pub(super) fn state(&self, now: Duration) -> String {
        format!(
            "epoch {}, viable: {}, seats {:?}, moving {:?}, ledger moving {:?}, live {}, waiting {}, overdue {:?}",
            self.roster.epoch(),
            self.roster.is_viable(now),
            self.seats
                .keys()
                .map(ToString::to_string)
                .collect::<Vec<_>>(),
            self.moving,
            self.ledger.moving().collect::<Vec<_>>(),
            self.ledger.live(),
            self.ledger.waiting(),
            self.ledger.overdue(now, Duration::from_secs(1)),
        )
    }

    /// The current epoch.
    pub(super) fn epoch(&self) -> Epoch {
        self.roster.epoch()
    }

    fn advance(&mut self, now: Duration) {
        // What the ledger wants done belongs to the epoch before.
        self.carry_out();
        for (worker, experts) in self.roster.adoptions(now) {
            self.note(|| format!("{worker} adopts {experts:?}"));
            self.tell(worker, Down::Adopt(experts));
        }
        match self.roster.next(now) {
            Ok(Some(grouping)) => self.regroup(grouping, now),
            Ok(None) => {}
            Err(error) => self.deeds.push(Deed::Wrong(error.to_string())),
        }
        for worker in self.roster.released() {
            self.note(|| format!("{worker} is released"));
            self.tell(worker, Down::Released);
        }
        self.consult(now);
    }

    fn regroup(&mut self, grouping: Grouping, now: Duration) {
        let epoch = grouping.epoch;
        let members: BTreeSet<WorkerId> = self
            .seats
            .keys()
            .copied()
            .filter(|id| grouping.includes(*id))
            .collect();
        self.note(|| {
            let names: Vec<String> = members.iter().map(ToString::to_string).collect();
            format!("{epoch} begins with {}", names.join(", "))
        });
        let attention: Vec<AttentionCapacity> = (0..self.config.roster.attention)
            .map(|index| {
                let since = self.roster.since(Role::Attention.worker(index));
                AttentionCapacity {
                    alive: since.is_some(),
                    since: since.unwrap_or(epoch),
                    kv_blocks: self.config.kv_blocks,
                    block_tokens: self.config.block_tokens,
                    max_rows: self.config.max_rows,
                }
            })
            .collect();
        self.links = attention
            .iter()
            .zip(0..)
            .map(|(capacity, index)| {
                let worker = Role::Attention.worker(index);
                capacity.alive.then(|| self.roster.life(worker)).flatten()
            })
            .collect();
        self.ledger.regroup(Membership {
            epoch,
            micro_batches: self.config.micro_batches,
            attention,
        });
        let attention = members.iter().filter(|id| id.role == Role::Attention);
        self.moving = attention.copied().collect();
        self.regrouped = now;
        match self.network.lanes(self.topology) {
            Ok(ends) => {
                for end in ends {
                    let worker = end.id();
                    if members.contains(&worker) && self.roster.takes_part(worker) {
                        self.tell(worker, Down::Regroup(Box::new(end), grouping.clone()));
                    }
                }
            }
            Err(error) => self.deeds.push(Deed::Wrong(error.to_string())),
        }
    }

    fn lose(&mut self, worker: WorkerId, reason: &str) {
        self.note(|| format!("{worker} is lost: {reason}"));
        if let Some(life) = self.seats.remove(&worker) {
            self.deeds.push(Deed::HangUp(worker, life));
        }
        self.roster.lost(worker);
        self.moving.remove(&worker);
    }

    fn consult(&mut self, now: Duration) {
        self.carry_out();
        if self.down {
            self.ledger.absorb();
            self.carry_out();
            if self.ledger.steps_in_flight() > 0 {
                return;
            }
            self.note(|| "a new scheduler is started".to_owned());
            self.scheduler = (self.make)();
            self.down = false;
            self.ledger.introduce();
        }
        if self.asked.is_some() {
            return;
        }
        let Some(event) = self.ledger.next_event() else {
            return;
        };
        if let SchedulerEvent::Refused(refused) = &event {
            self.deeds
                .push(Deed::Refused(format!("a plan was refused: {refused:?}")));
        }
        let mut plans = Vec::new();
        self.scheduler.handle(&event, now, &mut plans);
        self.asks += 1;
        self.asked = Some((self.asks, plans));
        self.deeds.push(Deed::Asked(self.asks));
        self.carry_out();
    }

    fn carry_out(&mut self) {
        for output in self.ledger.outputs().collect::<Vec<_>>() {
            match output {
                Output::Worker(index, command) => {
                    if let Some(Some(life)) = self.links.get(usize::from(index)) {
                        let worker = Role::Attention.worker(index);
                        self.deeds
                            .push(Deed::Tell(worker, *life, Down::Command(command)));
                    }
                }
                Output::Client(sequence, event) => self.deeds.push(Deed::Client(sequence, event)),
            }
        }
    }

    fn tell(&mut self, worker: WorkerId, down: Down) {
        if let Some(&life) = self.seats.get(&worker) {
            self.deeds.push(Deed::Tell(worker, life, down));
        }
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        self.deeds.push(Deed::Note(text()));
    }
}
