//! The thread of a worker: how it is started, told things and mourned.
//!
//! A worker is an actor (lifecycle, commands, reports) that owns a *data loop* on a thread of its own: tensors never pass a mailbox, and a computation that
//! takes milliseconds blocks no actor. The loop polls its endpoint and its inbox; when both are empty it helps the other
//! workers of its crew, and sleeps when they need no help.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use volley_models::Member;
use volley_models::crew::Wake;
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

/// What a loop does when it has nothing to do: helps the rest of the crew until something comes, and sleeps if there is nothing to help with.
pub(crate) fn rest(member: &mut Member, endpoint: &mut dyn Endpoint, at_most: Duration) {
    if !member.help_until(|| endpoint.ready()) {
        member.sleep(|| endpoint.wait(at_most));
    }
}

/// What ends the sleep of a loop with this endpoint.
pub(crate) fn wake(endpoint: &dyn Endpoint) -> Wake {
    let waker = endpoint.waker();
    Box::new(move || waker.wake())
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("it panicked: {}", text.as_deref().unwrap_or("no message"))
}
