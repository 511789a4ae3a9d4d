//! A worker in a process of its own: loads, calls the controller, serves, and calls again whenever the link breaks.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use volley_models::{Crew, WeightSource};
use volley_transports::quic::{ControlReceiver, ControlSender, NodeRole, QuicNode};
use volley_transports::{Endpoint, Fabric, Role, Topology, WorkerId};

use super::Fingerprint;
use super::message::{FromWorker, ToWorker, decode, encode};
use super::probe::edge;
use super::redial::Redial;
use crate::clock::Clock;
use crate::cluster_config::ClusterConfig;
use crate::cluster_error::ClusterError;
use crate::data_loop::Exit;
use crate::expert::ExpertLoad;
use crate::metered::Metered;
use crate::protocol::AttentionWord;
use crate::startup::{Startup, mark};
use crate::supervisor::{LoadProgress, LoadReporter};
use crate::timeline::Timeline;
use crate::voice::{Ear, WorkerWord};
use crate::worker::{Blueprint, Lanes, Order, StopWorker, Worker};

/// How often the controller is told which experts computed how many rows.
const LOAD_EVERY: Duration = Duration::from_secs(1);
/// The controller has this long to answer a hello.
const WELCOME_DEADLINE: Duration = Duration::from_secs(5);

/// What a worker of another process is made of.
pub struct RemoteWorker {
    /// Which seat it wants.
    pub worker: WorkerId,
    /// The cluster's configuration; `threads` are those of this process.
    pub config: ClusterConfig,
    /// Where its weights come from.
    pub weights: Arc<dyn WeightSource>,
    /// What it has in common with the controller.
    pub fingerprint: Fingerprint,
    /// The network over which the controller is called.
    pub node: QuicNode,
    /// What carries rows to other workers.
    pub fabric: Arc<dyn Fabric>,
    /// Finds the controller; asked again before each call, so it may move.
    pub controller: Box<dyn FnMut() -> Result<SocketAddr, String>>,
    /// Hears how far loading is.
    pub progress: Arc<dyn Fn(LoadProgress) + Send + Sync>,
    /// How long work may take to go elsewhere when the worker is to leave.
    pub drain: Duration,
    /// When its process began.
    pub began: std::time::Instant,
}

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteWorkerError {
    /// It could not be started.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The controller does not want it.
    #[error("the controller at {controller} refuses {worker}: {reason}")]
    Refused {
        /// Where it is.
        controller: SocketAddr,
        /// The worker.
        worker: WorkerId,
        /// Why.
        reason: String,
    },
    /// It could not load, or found something that must not be.
    #[error("{worker}: {reason}")]
    Failed {
        /// The worker.
        worker: WorkerId,
        /// What happened.
        reason: String,
    },
}

/// Carries words to the task that has the link.
struct ToLink(mpsc::UnboundedSender<FromWorker>);

impl Ear for ToLink {
    fn word(&self, _: WorkerId, _: u64, word: WorkerWord) {
        let _ = self.0.send(FromWorker::Word(word));
    }

    fn report(&self, word: AttentionWord) -> Option<AttentionWord> {
        // Bounded by the protocol: two steps a micro-batch.
        let _ = self.0.send(FromWorker::Attention(word));
        None
    }
}

/// How a link ended.
enum LinkEnd {
    /// It broke; call again.
    Broken(String),
    /// The work has gone elsewhere.
    Released,
}

impl RemoteWorker {
    /// Runs until `leave` says so, or until something ends it. Blocks the calling thread, which must not be one of an async runtime.
    ///
    /// # Errors
    /// The worker cannot be started or load, fails, or is refused.
    pub fn run(self, leave: impl Future<Output = ()> + 'static) -> Result<(), RemoteWorkerError> {
        let spec = self.weights.spec();
        self.config.check(spec)?;
        let shape = self.config.shape(spec)?;
        let topology = shape
            .topology(self.config.micro_batches)
            .map_err(ClusterError::from)?;
        let (words, heard) = mpsc::unbounded_channel();
        let progress = Arc::clone(&self.progress);
        let (told, answers) = (words.clone(), words.clone());
        let progress = move |update| {
            progress(update);
            let _ = told.send(FromWorker::Progress(update));
        };
        let load = Arc::new(ExpertLoad::new(spec.layers.len(), spec.experts));
        let startup = Startup {
            opened: Some(self.began.elapsed()),
            ..Startup::default()
        };
        let crew = Crew::new(self.config.threads, 1).map_err(ClusterError::Control)?;
        let clock = Clock::start();
        let timeline = Timeline::new(std::iter::once(self.worker), self.config.timeline_spans);
        let blueprint = Blueprint {
            attention: self.config.attention_options_for(1),
            experts: self
                .config
                .expert_options(shape.max_merged().map_err(ClusterError::from)?),
            shape,
            crew,
            clock: clock.clone(),
            timeline: timeline.clone(),
            load: Arc::clone(&load),
            progress: LoadReporter(Arc::new(progress)),
            apart: true,
            weights: Arc::clone(&self.weights),
            config: self.config.clone(),
        };
        let worker = self.worker;
        System::new().block_on(async move {
            let ear = Arc::new(ToLink(words));
            let addr = Worker::new(Arc::new(blueprint), worker, 0, ear)
                .map_err(|error| ClusterError::Thread { worker, error })?
                .start();
            let mut serving = Serving {
                this: self,
                topology,
                addr: addr.clone(),
                heard,
                answers,
                startup,
                load,
                told: BTreeMap::new(),
                clock,
                timeline,
                told_until: Duration::ZERO,
                holds: None,
                leaving: None,
            };
            let result = serving.serve(leave).await;
            let thread = addr.send(StopWorker).await.ok().flatten();
            if let (Ok(()), Some(thread)) = (&result, thread) {
                let joined = actix_rt::task::spawn_blocking(move || thread.join());
                let _ = timeout(Duration::from_secs(10), joined).await;
            }
            result
        })
    }
}

/// A running worker between the data loop and the controller.
struct Serving {
    this: RemoteWorker,
    topology: Topology,
    addr: Addr<Worker>,
    heard: mpsc::UnboundedReceiver<FromWorker>,
    startup: Startup,
    /// Rows that its experts have computed.
    load: Arc<ExpertLoad>,
    /// How many of them the controller knows of, by layer and expert.
    told: BTreeMap<(u16, u16), u64>,
    /// What its spans are timed by.
    clock: Clock,
    timeline: Timeline,
    /// End of the last span that the controller was told of.
    told_until: Duration,
    /// Where answers go that take a while.
    answers: mpsc::UnboundedSender<FromWorker>,
    /// The experts it holds, when it has loaded.
    holds: Option<Vec<u16>>,
    /// Since when it wants to leave.
    leaving: Option<Instant>,
}

impl Serving {
    async fn serve(
        &mut self,
        leave: impl Future<Output = ()> + 'static,
    ) -> Result<(), RemoteWorkerError> {
        let mut leave = Box::pin(leave);
        let mut redial = Redial::new();
        loop {
            // Words that come meanwhile wait, but for the one that ends everything, which is looked for below.
            let called = tokio::select! {
                called = self.call() => called,
                () = &mut leave => return Ok(()),
            };
            match called {
                Ok((controller, sender, receiver)) => {
                    tracing::info!(
                        "{} has joined the controller at {controller}",
                        self.this.worker
                    );
                    redial.reached();
                    self.mark(|startup| &mut startup.joined);
                    match self.with_link(sender, receiver, &mut leave).await? {
                        LinkEnd::Released => return Ok(()),
                        LinkEnd::Broken(reason) if self.leaving.is_some() => {
                            tracing::warn!(
                                "{}: the link to the controller broke ({reason}) while it was about to leave",
                                self.this.worker
                            );
                            return Ok(());
                        }
                        LinkEnd::Broken(reason) => tracing::warn!(
                            "{}: the link to the controller broke ({reason}); calling again, weights stay",
                            self.this.worker
                        ),
                    }
                }
                Err(CallError::Refused(error)) => return Err(error),
                Err(CallError::Later(reason)) => {
                    if redial.complains() {
                        tracing::warn!("{}: {reason}; calling again", self.this.worker);
                    }
                }
            }
            self.note_all()?;
            tokio::select! {
                () = sleep(redial.next_pause()) => {}
                () = &mut leave => return Ok(()),
            }
        }
    }

    /// Calls the controller and says hello.
    async fn call(&mut self) -> Result<(SocketAddr, ControlSender, ControlReceiver), CallError> {
        let later = |reason: String| CallError::Later(reason);
        let controller = (self.this.controller)().map_err(later)?;
        let link = self.this.node.call(controller, NodeRole::Controller).await;
        let link = link.map_err(|error| later(error.to_string()))?;
        let (mut sender, mut receiver) = link.split();
        // It may have loaded since the last call.
        self.note_all().map_err(CallError::Refused)?;
        let hello = FromWorker::Hello {
            worker: self.this.worker,
            fingerprint: self.this.fingerprint.clone(),
            loaded: self.holds.clone(),
        };
        let sent = sender.send(&encode(&hello)).await;
        sent.map_err(|error| later(error.to_string()))?;
        let answer = timeout(WELCOME_DEADLINE, receiver.recv()).await;
        let answer = answer.map_err(|_| later(format!("{controller} does not answer a hello")))?;
        let answer = answer.map_err(|error| later(error.to_string()))?;
        let answer = answer.ok_or_else(|| later(format!("{controller} ended the link")))?;
        match decode(&answer) {
            Ok(ToWorker::Welcome) => Ok((controller, sender, receiver)),
            Ok(ToWorker::Refused {
                reason,
                again: true,
            }) => Err(later(format!("{controller} says: {reason}"))),
            Ok(ToWorker::Refused { reason, .. }) => {
                Err(CallError::Refused(RemoteWorkerError::Refused {
                    controller,
                    worker: self.this.worker,
                    reason,
                }))
            }
            Ok(_) => Err(later(format!(
                "{controller} answered a hello with something else"
            ))),
            Err(error) => Err(later(format!("{controller} cannot be understood: {error}"))),
        }
    }

    /// Serves over a link until it ends.
    async fn with_link(
        &mut self,
        mut sender: ControlSender,
        mut receiver: ControlReceiver,
        leave: &mut (impl Future<Output = ()> + Unpin),
    ) -> Result<LinkEnd, RemoteWorkerError> {
        let broken = |reason: String| Ok(LinkEnd::Broken(reason));
        let mut tell = tokio::time::interval(LOAD_EVERY);
        self.tell_startup();
        loop {
            let patience = self.leaving.map_or(Duration::MAX, |since| {
                self.this.drain.saturating_sub(since.elapsed())
            });
            tokio::select! {
                word = self.heard.recv() => {
                    let Some(word) = word else {
                        return Err(self.failed("its data loop has ended".to_owned()));
                    };
                    let sent = sender.send(&encode(&word)).await;
                    self.note(word)?;
                    if let Err(error) = sent {
                        return broken(error.to_string());
                    }
                }
                message = receiver.recv() => {
                    let message = match message {
                        Ok(Some(message)) => message,
                        Ok(None) => return broken("the controller ended it".to_owned()),
                        Err(error) => return broken(error.to_string()),
                    };
                    match decode(&message) {
                        Ok(ToWorker::Released) => return Ok(LinkEnd::Released),
                        Ok(message) => self.obey(message)?,
                        Err(error) => return broken(format!("a message cannot be read: {error}")),
                    }
                }
                _ = tell.tick() => {
                    let news = self.load_news();
                    if !news.is_empty()
                        && let Err(error) = sender.send(&encode(&FromWorker::Load(news))).await
                    {
                        return broken(error.to_string());
                    }
                }
                () = &mut *leave, if self.leaving.is_none() => {
                    tracing::info!("{} leaves; its work goes elsewhere first", self.this.worker);
                    self.leaving = Some(Instant::now());
                    if let Err(error) = sender.send(&encode(&FromWorker::Leaving)).await {
                        return broken(error.to_string());
                    }
                }
                () = sleep(patience), if self.leaving.is_some() => {
                    tracing::warn!("{}: its work could not go elsewhere within {:?}; it leaves all the same", self.this.worker, self.this.drain);
                    return Ok(LinkEnd::Released);
                }
            }
        }
    }

    fn obey(&mut self, message: ToWorker) -> Result<(), RemoteWorkerError> {
        match message {
            ToWorker::Regroup(wire) => {
                let grouping = wire.grouping().map_err(|reason| self.failed(reason))?;
                let RemoteWorker { worker, fabric, .. } = &self.this;
                let joined = fabric.join(grouping.epoch, *worker, &self.topology, &wire.addresses);
                let endpoint = joined.map_err(|error| self.failed(error.to_string()))?;
                let endpoint: Box<dyn Endpoint> = Box::new(Metered::new(endpoint));
                let order = Order::Regroup(grouping, Lanes::Here(endpoint));
                self.addr.do_send(order);
                if self.mark(|startup| &mut startup.first_epoch) {
                    if self.this.worker.role == Role::Expert {
                        self.mark(|startup| &mut startup.ready);
                    }
                    self.tell_startup();
                }
            }
            ToWorker::Command(command) => self.addr.do_send(command),
            ToWorker::Adopt(experts) => self.addr.do_send(Order::Adopt(experts)),
            ToWorker::Spans => {
                let mut spans = self.timeline.spans();
                let mut spans = spans.pop().map(|(_, spans)| spans).unwrap_or_default();
                spans.retain(|span| span.start >= self.told_until);
                self.told_until = spans.last().map_or(self.told_until, |span| span.end);
                let news = FromWorker::Spans(self.clock.now(), spans);
                let _ = self.answers.send(news);
            }
            ToWorker::Time => {
                let _ = self.answers.send(FromWorker::Time(super::inspect::now()));
            }
            ToWorker::Probe(peers) => {
                let (node, me) = (self.this.node.clone(), self.this.worker);
                let answers = self.answers.clone();
                actix_rt::spawn(async move {
                    let tried = peers.into_iter().map(|(peer, address)| {
                        let node = node.clone();
                        actix_rt::spawn(async move { edge(&node, me, peer, address).await })
                    });
                    let mut edges = Vec::new();
                    for tried in tried.collect::<Vec<_>>() {
                        edges.extend(tried.await);
                    }
                    let _ = answers.send(FromWorker::Probed(edges));
                });
            }
            ToWorker::Waits => self.addr.do_send(Order::Waits),
            ToWorker::Crash => self.addr.do_send(Order::Crash),
            ToWorker::Welcome | ToWorker::Refused { .. } | ToWorker::Released => {}
        }
        Ok(())
    }

    /// Takes note of everything that was said while there was no link.
    fn note_all(&mut self) -> Result<(), RemoteWorkerError> {
        while let Ok(word) = self.heard.try_recv() {
            self.note(word)?;
        }
        Ok(())
    }

    fn note(&mut self, word: FromWorker) -> Result<(), RemoteWorkerError> {
        match word {
            FromWorker::Word(WorkerWord::Loaded(holds)) => {
                self.holds = Some(holds);
                if self.mark(|startup| &mut startup.loaded) {
                    self.tell_startup();
                }
            }
            FromWorker::Attention(AttentionWord::Moved { .. })
                if self.mark(|startup| &mut startup.ready) =>
            {
                self.tell_startup();
            }
            FromWorker::Word(WorkerWord::Ended(Exit::Failed(reason) | Exit::NotLoaded(reason))) => {
                return Err(self.failed(reason));
            }
            _ => {}
        }
        Ok(())
    }

    /// Notes that a point of the start was reached; false if it was before.
    fn mark(&mut self, of: impl Fn(&mut Startup) -> &mut Option<Duration>) -> bool {
        let at = of(&mut self.startup);
        let first = at.is_none();
        mark(at, self.this.began.elapsed());
        first
    }

    /// Tells the controller how the start goes, and the log when it is over.
    fn tell_startup(&self) {
        if self.startup.ready.is_some() {
            tracing::info!("{}: {}", self.this.worker, self.startup);
        }
        let word = WorkerWord::Startup(self.startup);
        let _ = self.answers.send(FromWorker::Word(word));
    }

    /// Rows computed since the controller was last told: layer, expert, rows.
    fn load_news(&mut self) -> Vec<(u16, u16, u64)> {
        let mut news = Vec::new();
        for (layer, experts) in (0u16..).zip(self.load.rows()) {
            for (expert, rows) in (0u16..).zip(experts) {
                let told = self.told.entry((layer, expert)).or_default();
                if rows > *told {
                    news.push((layer, expert, rows - *told));
                    *told = rows;
                }
            }
        }
        news
    }

    fn failed(&self, reason: String) -> RemoteWorkerError {
        RemoteWorkerError::Failed {
            worker: self.this.worker,
            reason,
        }
    }
}

enum CallError {
    /// Not now.
    Later(String),
    /// Never, as things are.
    Refused(RemoteWorkerError),
}
