//! The thread of a worker: how it is started, told things and mourned.
//!
//! A worker is an actor (lifecycle, commands, reports) that owns a *data loop* on a thread of its own: tensors never pass a mailbox, and a computation that
//! takes milliseconds blocks no actor. What the worker does is its [`Logic`]; the loop ([`run`]) lets it hear what is in its inbox, look at its lanes and
//! compute one task after the other; when there is none it helps the other workers of its crew, and sleeps when they need no help. The simulation of a
//! cluster is another shell around the same logic, with virtual time in place of a thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use volley_models::Member;
use volley_transports::{Detached, Endpoint, Waker, WorkerId};

use crate::grouping::Grouping;

/// What a data loop is told.
pub(crate) enum Signal<C> {
    /// Something of its own.
    Command(C),
    /// A new epoch: other lanes, perhaps another placement. Exchanges under way are void.
    Regroup(Box<dyn Endpoint>, Grouping),
    /// Say what it waits for.
    Waits,
    /// Panic, as a defect would make it: for trying out what a failure does.
    Crash,
    /// End.
    Stop,
}

/// Something that ends a worker: it is at fault, not a peer.
pub(crate) type Fatal = String;

/// What a worker does, in turns: it hears, looks, and computes.
pub(crate) trait Logic {
    /// What it is told.
    type Command;
    /// A piece of computing.
    type Task;

    /// Hears a signal; [`Signal::Crash`] and [`Signal::Stop`] are the shell's.
    fn hear(&mut self, signal: Signal<Self::Command>) -> Result<(), Fatal>;

    /// Takes what has come over the lanes and begins the next task, if there is one.
    fn turn(&mut self) -> Turn<Self::Task>;

    /// Computes a task that was begun, and sends what comes out of it. What comes meanwhile waits for the next turn.
    fn perform(&mut self, task: Self::Task) -> Result<(), Fatal>;
}

/// What a worker's next turn comes to.
pub(crate) enum Turn<T> {
    /// Compute this.
    Compute(T),
    /// Nothing, until something comes or this time has passed.
    Rest(Duration),
}

/// A worker whose computing shares the machine's cores with others.
pub(crate) trait Crewed {
    /// Its membership, and its lanes.
    fn crew(&mut self) -> (&mut Member, &mut dyn Endpoint);
}

/// Runs a worker's turns on this thread until it is told to stop.
pub(crate) fn run<L: Logic + Crewed>(
    mut logic: L,
    inbox: &mpsc::Receiver<Signal<L::Command>>,
) -> Exit {
    match serve(&mut logic, inbox) {
        Ok(()) => Exit::Stopped,
        Err(fatal) => Exit::Failed(fatal),
    }
}

fn serve<L: Logic + Crewed>(
    logic: &mut L,
    inbox: &mpsc::Receiver<Signal<L::Command>>,
) -> Result<(), Fatal> {
    wake_by_lanes(logic);
    loop {
        loop {
            match inbox.try_recv() {
                Ok(Signal::Crash) => panic!("told to crash"),
                Ok(Signal::Stop) | Err(mpsc::TryRecvError::Disconnected) => return Ok(()),
                Ok(signal @ Signal::Regroup(..)) => {
                    logic.hear(signal)?;
                    wake_by_lanes(logic);
                }
                Ok(signal) => logic.hear(signal)?,
                Err(mpsc::TryRecvError::Empty) => break,
            }
        }
        match logic.turn() {
            Turn::Compute(task) => logic.perform(task)?,
            Turn::Rest(at_most) => {
                let (member, endpoint) = logic.crew();
                if !member.help_until(|| endpoint.ready()) {
                    member.sleep(|| endpoint.wait(at_most));
                }
            }
        }
    }
}

/// What ends a wait on the lanes ends the crew's sleep too.
fn wake_by_lanes(logic: &mut impl Crewed) {
    let (member, endpoint) = logic.crew();
    let waker = endpoint.waker();
    member.wake_by(Box::new(move || waker.wake()));
}

/// Why a data loop ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Exit {
    /// It was told to.
    Stopped,
    /// It could not load its module.
    NotLoaded(String),
    /// It found something that must not be, or panicked.
    Failed(String),
}

impl Exit {
    pub(crate) fn not_loaded(error: impl ToString) -> Self {
        Exit::NotLoaded(error.to_string())
    }
}

/// A thread that runs a data loop, and the way to it.
pub(crate) struct DataLoop<C> {
    // Unbounded as a type, bounded by the protocol: at most two steps for each micro-batch and two words for each sequence are ever under way.
    inbox: mpsc::Sender<Signal<C>>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

impl<C: Send + 'static> DataLoop<C> {
    /// Starts `body` on a thread named after the worker, with no lanes yet. `ended` is called on that thread with the reason of its end, panics included.
    pub(crate) fn start(
        worker: WorkerId,
        body: impl FnOnce(Box<dyn Endpoint>, mpsc::Receiver<Signal<C>>) -> Exit + Send + 'static,
        ended: impl FnOnce(Exit) + Send + 'static,
    ) -> std::io::Result<Self> {
        let endpoint: Box<dyn Endpoint> = Box::new(Detached::new(worker));
        let waker = endpoint.waker();
        let (inbox, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(worker.to_string())
            .spawn(move || {
                // What the loop owned is dropped by the unwinding, so its peers see it close.
                let exit = catch_unwind(AssertUnwindSafe(|| body(endpoint, receiver)));
                ended(exit.unwrap_or_else(|panic| Exit::Failed(panic_text(panic.as_ref()))));
            })?;
        Ok(DataLoop {
            inbox,
            waker,
            thread: Some(thread),
        })
    }

    /// Tells the loop something. A loop that has ended hears nothing: whoever started it was told of its end.
    pub(crate) fn command(&self, command: C) {
        self.signal(Signal::Command(command));
    }

    /// Moves the loop to new lanes.
    pub(crate) fn regroup(&mut self, endpoint: Box<dyn Endpoint>, grouping: Grouping) {
        let waker = std::mem::replace(&mut self.waker, endpoint.waker());
        let _ = self.inbox.send(Signal::Regroup(endpoint, grouping));
        waker.wake();
    }

    /// Asks the loop what it waits for.
    pub(crate) fn ask_waits(&self) {
        self.signal(Signal::Waits);
    }

    /// Makes the loop panic.
    pub(crate) fn crash(&self) {
        self.signal(Signal::Crash);
    }

    fn signal(&self, signal: Signal<C>) {
        let _ = self.inbox.send(signal);
        self.waker.wake();
    }

    /// Asks the loop to end and returns its thread.
    pub(crate) fn stop(&mut self) -> Option<JoinHandle<()>> {
        self.signal(Signal::Stop);
        self.thread.take()
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("it panicked: {}", text.as_deref().unwrap_or("no message"))
}
