//! A host with one worker's process on it: the shell around a worker's [`Logic`] in virtual time.
//!
//! A process takes a turn when something comes or its rest is over, and computes for as long as the [`Costs`] say; what comes meanwhile waits, as it
//! does for the thread of a real worker. Its link to the controller is a queue in each direction that keeps order and breaks after a silence.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use volley_models::ComputeType;
use volley_transports::{Detached, Element, Endpoint, Epoch, ExchangeShape, Role, WorkerId};

use super::config::SimulationConfig;
use super::costs::{AttentionLoad, Costs, ExpertRound};
use super::model::{HIDDEN, HashAttention, HashBatch, HashExperts, HashModel};
use crate::attention::{AttentionLogic, AttentionParts, Started};
use crate::clock::Clock;
use crate::data_loop::{Fatal, Logic, Signal, Turn};
use crate::expert::{Begun, ExpertCommand, ExpertLoad, ExpertLogic, ExpertParts};
use crate::grouping::Grouping;
use crate::protocol::{AttentionCommand, AttentionWord};
use crate::timeline::Timeline;
use crate::voice::{Ear, Voice, WorkerWord};

/// What the controller says to a worker.
pub(super) enum Down {
    Regroup(Box<dyn Endpoint>, Grouping),
    Command(AttentionCommand),
    Adopt(Vec<u16>),
    Released,
}

/// What a worker says to the controller.
#[derive(Debug, Clone)]
pub(super) enum Up {
    Word(WorkerWord),
    Report(AttentionWord),
    Leaving,
}

/// A host and what happens to it.
pub(super) struct Host {
    pub(super) process: Option<Process>,
    /// Processes started here so far.
    pub(super) starts: u64,
    pub(super) link: Option<ControlLink>,
    /// Reasons for which no process is started here.
    pub(super) away: u32,
    /// Reasons for which its process does not run.
    pub(super) stopped: u32,
    /// Reasons for which it is not heard by the controller.
    pub(super) unheard: u32,
    /// Since when it has not been.
    pub(super) unheard_since: Option<Duration>,
    /// Its computing takes so many times as long.
    pub(super) slowness: u32,
    /// Time spent computing.
    pub(super) busy: Duration,
}

/// The two directions between a worker and the controller.
pub(super) struct ControlLink {
    pub(super) life: u64,
    /// When the last message of each direction arrives; the next one does not before.
    pub(super) down_until: Duration,
    pub(super) up_until: Duration,
    pub(super) stuck_down: Vec<Down>,
    pub(super) stuck_up: Vec<Up>,
}

/// A running worker.
pub(super) struct Process {
    pub(super) number: u64,
    /// The experts it holds, when it has loaded.
    pub(super) holds: Option<Vec<u16>>,
    pub(super) leaving: bool,
    /// Pause before the controller is called again.
    pub(super) redial: Duration,
    body: Body,
    said: Arc<Said>,
}

enum Body {
    Attention(Box<Shell<AttentionLogic<HashAttention>>>),
    Expert(Box<Shell<ExpertLogic<HashExperts>>>),
}

/// What comes of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// It computes for so long.
    Busy(Duration),
    /// It loads for so long.
    Loads(Duration),
    /// It rests until something comes, or for so long.
    Rest(Duration),
}

struct Shell<L: Logic> {
    logic: L,
    inbox: VecDeque<Signal<L::Command>>,
    /// What it computes.
    task: Option<L::Task>,
    busy: bool,
    /// A task ended while the process did not run.
    ended: bool,
    /// When its next turn is due.
    wakes: Option<Duration>,
    /// It has spent the time that an adoption takes.
    fetched: bool,
}

/// Logic whose tasks have a size.
trait Sized: Logic {
    fn cost(&self, worker: u16, task: &Self::Task, costs: &mut dyn Costs) -> Duration;

    /// Time before a signal is heard: that of loading what it calls for.
    fn delay(signal: &Signal<Self::Command>, adopt: Duration) -> Duration;
}

/// Words since they were last carried on.
#[derive(Default)]
struct Said(Mutex<Vec<Up>>);

impl Ear for Said {
    fn word(&self, _: WorkerId, _: u64, word: WorkerWord) {
        self.say(Up::Word(word));
    }

    fn report(&self, word: AttentionWord) -> Option<AttentionWord> {
        self.say(Up::Report(word));
        None
    }
}

impl Said {
    fn say(&self, up: Up) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(up);
    }

    fn take(&self) -> Vec<Up> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Host {
    pub(super) fn new() -> Self {
        Host {
            process: None,
            starts: 0,
            link: None,
            away: 0,
            stopped: 0,
            unheard: 0,
            unheard_since: None,
            slowness: 1,
            busy: Duration::ZERO,
        }
    }
}

impl ControlLink {
    pub(super) fn new(life: u64, now: Duration) -> Self {
        ControlLink {
            life,
            down_until: now,
            up_until: now,
            stuck_down: Vec::new(),
            stuck_up: Vec::new(),
        }
    }
}

/// What every process of a cluster is made from.
pub(super) struct Mold {
    pub(super) config: SimulationConfig,
    pub(super) model: HashModel,
    pub(super) shape: ExchangeShape,
    pub(super) clock: Clock,
    pub(super) timeline: Timeline,
    pub(super) load: Arc<ExpertLoad>,
    pub(super) unfilled: Arc<AtomicBool>,
}

impl Mold {
    /// The exchange of a cluster like that.
    pub(super) fn shape(config: &SimulationConfig) -> ExchangeShape {
        ExchangeShape {
            attention_workers: config.roster.attention,
            expert_workers: config.roster.expert_workers,
            max_rows: config.max_rows,
            hidden: HIDDEN as u32,
            top_k: config.top_k,
            element: Element::F32,
        }
    }

    pub(super) fn process(&self, worker: WorkerId, number: u64) -> Result<Process, Fatal> {
        let config = &self.config;
        let said = Arc::new(Said::default());
        let voice = Voice::new(worker, number, Arc::clone(&said) as Arc<dyn Ear>);
        let none = config
            .roster
            .placement(Epoch(0))
            .map_err(|e| e.to_string())?;
        let none = Grouping::none(config.roster.attention, none);
        let endpoint: Box<dyn Endpoint> = Box::new(Detached::new(worker));
        let recorder = self.timeline.recorder(worker);
        let body = match worker.role {
            Role::Attention => {
                let parts = AttentionParts {
                    worker,
                    module: HashAttention::new(
                        self.model.clone(),
                        config.kv_blocks,
                        config.block_tokens,
                    ),
                    activations: (0..config.micro_batches)
                        .map(|_| HashBatch::default())
                        .collect(),
                    outline: self.model.outline(),
                    dtype: ComputeType::F32,
                    shape: self.shape,
                    kv_blocks: config.kv_blocks,
                    block_tokens: config.block_tokens,
                    peer_deadline: config.peer_deadline,
                    hops_are_named: false,
                    clock: self.clock.clone(),
                    recorder,
                    voice,
                };
                Body::Attention(Box::new(Shell::new(AttentionLogic::new(
                    parts, none, endpoint,
                )?)))
            }
            Role::Expert => {
                let home = config
                    .roster
                    .home(worker.index)
                    .map_err(|e| e.to_string())?;
                let parts = ExpertParts {
                    worker,
                    module: HashExperts::new(home, Arc::clone(&self.unfilled)),
                    hidden: HIDDEN,
                    dtype: ComputeType::F32,
                    shape: self.shape,
                    micro_batches: config.micro_batches,
                    peer_deadline: config.peer_deadline,
                    clock: self.clock.clone(),
                    recorder,
                    load: Arc::clone(&self.load),
                    voice,
                };
                Body::Expert(Box::new(Shell::new(ExpertLogic::new(
                    parts, none, endpoint,
                )?)))
            }
        };
        Ok(Process {
            number,
            holds: None,
            leaving: false,
            redial: super::REDIAL,
            body,
            said,
        })
    }

    /// The experts that a worker has loaded when it starts.
    pub(super) fn home(&self, worker: WorkerId) -> Vec<u16> {
        match worker.role {
            Role::Attention => Vec::new(),
            Role::Expert => self.config.roster.home(worker.index).unwrap_or_default(),
        }
    }
}

impl Process {
    /// Puts a message into the inbox.
    pub(super) fn deliver(&mut self, down: Down) {
        match (down, &mut self.body) {
            (Down::Regroup(endpoint, grouping), Body::Attention(shell)) => {
                shell.inbox.push_back(Signal::Regroup(endpoint, grouping));
            }
            (Down::Regroup(endpoint, grouping), Body::Expert(shell)) => {
                shell.inbox.push_back(Signal::Regroup(endpoint, grouping));
            }
            (Down::Command(command), Body::Attention(shell)) => {
                shell.inbox.push_back(Signal::Command(command));
            }
            (Down::Adopt(experts), Body::Expert(shell)) => {
                shell
                    .inbox
                    .push_back(Signal::Command(ExpertCommand::Adopt(experts)));
            }
            (Down::Command(_) | Down::Adopt(_) | Down::Released, _) => {}
        }
    }

    /// What it has said since this was last asked.
    pub(super) fn said(&self) -> Vec<Up> {
        self.said.take()
    }

    /// Takes a turn, if it is not computing.
    pub(super) fn turn(
        &mut self,
        worker: WorkerId,
        adopt: Duration,
        costs: &mut dyn Costs,
    ) -> Result<Option<Next>, Fatal> {
        match &mut self.body {
            Body::Attention(shell) => shell.turn(worker.index, adopt, costs),
            Body::Expert(shell) => shell.turn(worker.index, adopt, costs),
        }
    }

    /// Its computing has come to its end.
    pub(super) fn done(&mut self) -> Result<(), Fatal> {
        match &mut self.body {
            Body::Attention(shell) => shell.done(),
            Body::Expert(shell) => shell.done(),
        }
    }

    /// Its computing came to its end while it did not run; returns whether that was so once it runs again.
    pub(super) fn ended(&mut self) -> &mut bool {
        match &mut self.body {
            Body::Attention(shell) => &mut shell.ended,
            Body::Expert(shell) => &mut shell.ended,
        }
    }

    /// When its next turn is due.
    pub(super) fn wakes(&mut self) -> &mut Option<Duration> {
        match &mut self.body {
            Body::Attention(shell) => &mut shell.wakes,
            Body::Expert(shell) => &mut shell.wakes,
        }
    }
}

impl<L: Sized> Shell<L> {
    fn new(logic: L) -> Self {
        Shell {
            logic,
            inbox: VecDeque::new(),
            task: None,
            busy: false,
            ended: false,
            wakes: None,
            fetched: false,
        }
    }

    fn turn(
        &mut self,
        worker: u16,
        adopt: Duration,
        costs: &mut dyn Costs,
    ) -> Result<Option<Next>, Fatal> {
        if self.busy {
            return Ok(None);
        }
        while let Some(signal) = self.inbox.pop_front() {
            let delay = L::delay(&signal, adopt);
            if !delay.is_zero() && !std::mem::replace(&mut self.fetched, true) {
                self.inbox.push_front(signal);
                self.busy = true;
                return Ok(Some(Next::Loads(delay)));
            }
            self.fetched = false;
            self.logic.hear(signal)?;
        }
        Ok(Some(match self.logic.turn() {
            Turn::Compute(task) => {
                let cost = self.logic.cost(worker, &task, costs);
                (self.task, self.busy) = (Some(task), true);
                Next::Busy(cost)
            }
            Turn::Rest(at_most) => Next::Rest(at_most),
        }))
    }

    fn done(&mut self) -> Result<(), Fatal> {
        (self.busy, self.ended) = (false, false);
        self.task
            .take()
            .map_or(Ok(()), |task| self.logic.perform(task))
    }
}

impl Sized for AttentionLogic<HashAttention> {
    fn cost(&self, worker: u16, started: &Started, costs: &mut dyn Costs) -> Duration {
        let size = self.size(started);
        costs.attention(&AttentionLoad {
            worker,
            rows: size.rows,
            cached: size.cached,
            head: size.head,
        })
    }

    fn delay(_: &Signal<AttentionCommand>, _: Duration) -> Duration {
        Duration::ZERO
    }
}

impl Sized for ExpertLogic<HashExperts> {
    fn cost(&self, worker: u16, begun: &Begun, costs: &mut dyn Costs) -> Duration {
        let offsets = self.offsets(begun);
        costs.experts(&ExpertRound { worker, offsets })
    }

    fn delay(signal: &Signal<ExpertCommand>, adopt: Duration) -> Duration {
        match signal {
            Signal::Command(ExpertCommand::Adopt(_)) => adopt,
            _ => Duration::ZERO,
        }
    }
}
