//! The controller's side: takes workers' calls, checks who they are, and carries words between their links and the actors.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use actix::prelude::*;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, timeout};
use volley_transports::WorkerId;
use volley_transports::quic::{
    ControlLink, ControlReceiver, ControlSender, NodeRole, Peer, QuicNode,
};

use super::Fingerprint;
use super::message::{FromWorker, ToWorker, WireGrouping, decode, encode};
use super::{SchedulingHints, planner};
use crate::clock::Clock;
use crate::data_loop::Exit;
use crate::expert::ExpertLoad;
use crate::frontend::Frontend;
use crate::protocol::AttentionCommand;
use crate::supervisor::{Heard, Leaving, LoadReporter, Supervisor};
use crate::timeline::Timeline;
use crate::voice::WorkerWord;
use crate::worker::{Lanes, Order, StopWorker};

/// A worker that has called has this long to say hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);

/// Workers are asked for their spans this often while somebody looks at the timeline,
const SPANS_EVERY: Duration = Duration::from_secs(1);
/// and for so long after somebody has.
const SPANS_WATCH: Duration = Duration::from_secs(10);

/// Why the gate could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("the thread that takes workers' calls could not be started: {0}")]
pub(crate) struct GateError(pub(crate) std::io::Error);

/// The thread on which links are served. It ends when this is dropped.
pub(crate) struct Gate {
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What the gate hands words to.
#[derive(Clone)]
struct Actors {
    supervisor: Addr<Supervisor>,
    frontend: Addr<Frontend>,
    progress: LoadReporter,
    load: Arc<ExpertLoad>,
    timeline: Timeline,
    clock: Clock,
    fingerprint: Arc<Fingerprint>,
    hints: SchedulingHints,
}

impl Gate {
    /// Takes calls that come to `node`. On a thread of its own: links must be served also while the control thread is busy.
    pub(crate) fn open(
        node: QuicNode,
        fingerprint: Fingerprint,
        hints: SchedulingHints,
        supervisor: Addr<Supervisor>,
        frontend: Addr<Frontend>,
        progress: LoadReporter,
        load: Arc<ExpertLoad>,
        timeline: Timeline,
        clock: Clock,
    ) -> Result<Self, GateError> {
        let actors = Actors {
            supervisor,
            frontend,
            progress,
            load,
            timeline,
            clock,
            fingerprint: Arc::new(fingerprint),
            hints,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(GateError)?;
        let (end, ended) = oneshot::channel::<()>();
        let serve = move || {
            runtime.block_on(async move {
                let calls = async {
                    while let Some(link) = node.accept().await {
                        let actors = actors.clone();
                        // What a caller may be stands in its certificate, and decides what it may say.
                        match link.peer().role {
                            NodeRole::Scheduler => {
                                let Actors {
                                    frontend, hints, ..
                                } = actors;
                                tokio::spawn(planner::serve(link, frontend, hints));
                            }
                            NodeRole::Worker | NodeRole::Controller => {
                                tokio::spawn(actors.serve(link));
                            }
                        }
                    }
                };
                tokio::select! {
                    () = calls => {}
                    // A sender that is gone means the same.
                    _ = ended => {}
                }
            });
        };
        let thread = std::thread::Builder::new()
            .name("gate".into())
            .spawn(serve)
            .map_err(GateError)?;
        Ok(Gate {
            end: Some(end),
            thread: Some(thread),
        })
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.end.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Actors {
    /// A link from its hello to its end.
    async fn serve(self, link: ControlLink) {
        let peer = link.peer().clone();
        let (mut sender, mut receiver) = link.split();
        let (worker, loaded) = match self.hello(&peer, &mut receiver).await {
            Ok(hello) => hello,
            Err(reason) => return refuse(&peer, sender, reason, false).await,
        };
        let (orders, queue) = mpsc::unbounded_channel();
        let joined = Joined {
            worker,
            peer: peer.clone(),
            orders,
        };
        let life = match self.supervisor.send(joined).await {
            Ok(Ok(life)) => life,
            Ok(Err(reason)) => return refuse(&peer, sender, reason, true).await,
            Err(_) => return refuse(&peer, sender, "the cluster stops".to_owned(), true).await,
        };
        if sender.send(&encode(&ToWorker::Welcome)).await.is_ok() {
            tracing::info!("{worker} has joined from {} ({})", peer.address, peer.name);
            if let Some(holds) = loaded {
                self.word(worker, life, WorkerWord::Loaded(holds));
            }
            let writer = tokio::spawn(write(sender, queue, self.timeline.clone()));
            let reason = self.listen(worker, life, &mut receiver).await;
            writer.abort();
            self.word(worker, life, WorkerWord::Ended(Exit::Failed(reason)));
        } else {
            let reason = "its link broke at once".to_owned();
            self.word(worker, life, WorkerWord::Ended(Exit::Failed(reason)));
        }
    }

    /// The first message, checked.
    async fn hello(
        &self,
        peer: &Peer,
        receiver: &mut ControlReceiver,
    ) -> Result<(WorkerId, Option<Vec<u16>>), String> {
        if peer.role != NodeRole::Worker {
            return Err(format!("its certificate is a {}'s", peer.role));
        }
        let message = timeout(HELLO_DEADLINE, receiver.recv()).await;
        let message = message.map_err(|_| format!("it said nothing within {HELLO_DEADLINE:?}"))?;
        let message = message.map_err(|error| error.to_string())?;
        let message = message.ok_or("it ended the link at once")?;
        match decode(&message) {
            Ok(FromWorker::Hello {
                worker,
                fingerprint,
                loaded,
            }) => {
                if let Some(seat) = peer.seat.filter(|&seat| seat != worker) {
                    return Err(format!(
                        "its certificate is good for {seat} only, and it wants to be {worker}"
                    ));
                }
                let differences = self.fingerprint.differences(&fingerprint);
                if !differences.is_empty() {
                    let list: Vec<String> = differences.iter().map(ToString::to_string).collect();
                    return Err(format!(
                        "its configuration or model is another (at the controller: here): {}",
                        list.join("; ")
                    ));
                }
                for difference in self.fingerprint.dissimilarities(&fingerprint) {
                    tracing::warn!(
                        "{worker}: {difference}; answers may differ in their last bits from worker to worker"
                    );
                }
                Ok((worker, loaded))
            }
            Ok(_) => Err("its first message is not a hello".to_owned()),
            Err(error) => Err(format!("its first message cannot be read: {error}")),
        }
    }

    /// Carries words to the actors until the link ends; returns why it did.
    async fn listen(&self, worker: WorkerId, life: u64, receiver: &mut ControlReceiver) -> String {
        // By how many nanoseconds our clock is ahead of the worker's: what a message shows of it is too much by its way here, so the least is nearest.
        let mut ahead = i128::MAX;
        loop {
            let message = match receiver.recv().await {
                Ok(Some(message)) => message,
                Ok(None) => return "it ended its link".to_owned(),
                Err(error) => return error.to_string(),
            };
            match decode(&message) {
                Ok(FromWorker::Word(word)) => self.word(worker, life, word),
                // Bounded by the protocol: two steps a micro-batch.
                Ok(FromWorker::Attention(word)) if word.worker() == worker.index => {
                    self.frontend.do_send(word);
                }
                Ok(FromWorker::Progress(progress)) if progress.worker == worker => {
                    (self.progress.0)(progress);
                }
                Ok(FromWorker::Load(news)) => {
                    for (layer, expert, rows) in news {
                        self.load.add(layer.into(), expert, rows);
                    }
                }
                Ok(FromWorker::Spans(theirs, spans)) => {
                    let ours = self.clock.now().as_nanos() as i128;
                    ahead = ahead.min(ours - theirs.as_nanos() as i128);
                    let spans = spans.into_iter().map(|span| span.shifted(ahead));
                    self.timeline.append(worker, spans);
                }
                Ok(FromWorker::Leaving) => self.supervisor.do_send(Leaving { worker, life }),
                Ok(_) => return "it spoke for another worker, or said hello twice".to_owned(),
                Err(error) => return format!("a message cannot be read: {error}"),
            }
        }
    }

    fn word(&self, worker: WorkerId, life: u64, word: WorkerWord) {
        self.supervisor.do_send(Heard { worker, life, word });
    }
}

async fn refuse(peer: &Peer, mut sender: ControlSender, reason: String, again: bool) {
    tracing::warn!("{} at {} is refused: {reason}", peer.name, peer.address);
    let refused = ToWorker::Refused { reason, again };
    if sender.send(&encode(&refused)).await.is_ok() {
        let _ = timeout(HELLO_DEADLINE, sender.finish()).await;
    }
}

/// Sends what is queued, and asks for spans while somebody looks at the timeline.
async fn write(
    mut sender: ControlSender,
    mut queue: mpsc::UnboundedReceiver<ToWorker>,
    timeline: Timeline,
) {
    let mut ask = tokio::time::interval(SPANS_EVERY);
    ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            message = queue.recv() => match message {
                Some(message) => message,
                None => break,
            },
            _ = ask.tick(), if timeline.keeps() => {
                if !timeline.is_watched(SPANS_WATCH) {
                    continue;
                }
                ToWorker::Spans
            }
        };
        if sender.send(&encode(&message)).await.is_err() {
            return; // the reader sees the link end, and why
        }
    }
    sender.finish().await;
}

/// A worker wants its seat. The answer is the number of its life, or why it cannot have it.
#[derive(Message)]
#[rtype(result = "Result<u64, String>")]
pub(crate) struct Joined {
    pub(crate) worker: WorkerId,
    pub(crate) peer: Peer,
    pub(super) orders: mpsc::UnboundedSender<ToWorker>,
}

impl Joined {
    /// The actor that stands for the worker in this process.
    pub(crate) fn proxy(&self) -> Proxy {
        Proxy(self.orders.clone())
    }
}

/// Stands for a worker of another process: what it is told goes over the link. What a link that is gone does not take is void, as its worker's seat is.
pub(crate) struct Proxy(mpsc::UnboundedSender<ToWorker>);

impl Actor for Proxy {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(crate::MAILBOX_CAPACITY);
    }
}

impl Handler<AttentionCommand> for Proxy {
    type Result = ();

    fn handle(&mut self, command: AttentionCommand, _: &mut Self::Context) {
        let _ = self.0.send(ToWorker::Command(command));
    }
}

impl Handler<Order> for Proxy {
    type Result = ();

    fn handle(&mut self, order: Order, _: &mut Self::Context) {
        let message = match order {
            Order::Regroup(grouping, Lanes::Afar(addresses)) => {
                ToWorker::Regroup(WireGrouping::new(&grouping, addresses))
            }
            Order::Regroup(_, Lanes::Here(_)) => {
                debug_assert!(false, "lanes of this process lead to no other");
                return;
            }
            Order::Adopt(experts) => ToWorker::Adopt(experts),
            Order::Waits => ToWorker::Waits,
            Order::Crash => ToWorker::Crash,
            Order::Release => ToWorker::Released,
        };
        let _ = self.0.send(message);
    }
}

impl Handler<StopWorker> for Proxy {
    type Result = Option<JoinHandle<()>>;

    fn handle(&mut self, _: StopWorker, ctx: &mut Self::Context) -> Self::Result {
        // The link ends with the last sender; the worker goes on and calls again, until whoever started it ends it.
        ctx.stop();
        None
    }
}
