//! What a backend's thread and its owner share: the view, and what the owner wants.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use tokio::sync::{Notify, oneshot, watch};

use super::{Member, Office, Term, View};
use crate::failure::Failure;

/// A backend's thread, with a runtime of its own. It ends when this is dropped.
pub(super) struct Keeper {
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Runs what `keep` makes of the word that all is over. A word that never comes means the same as its sender's end.
    pub(super) fn start<F: Future<Output = ()>>(
        keep: impl FnOnce(oneshot::Receiver<()>) -> F + Send + 'static,
    ) -> Result<Self, Failure> {
        let failed =
            |error| Failure::new(format!("membership's thread cannot be started: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        let (end, ended) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("membership".into())
            .spawn(move || runtime.block_on(keep(ended)))
            .map_err(failed)?;
        Ok(Keeper {
            end: Some(end),
            thread: Some(thread),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A campaign for an office.
pub(super) struct Campaign {
    pub(super) office: Office,
    pub(super) address: String,
    pub(super) term: watch::Sender<Option<u64>>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Shared {
    view: Mutex<View>,
    members: Mutex<Vec<Member>>,
    campaigns: Mutex<Vec<Campaign>>,
    /// Woken when there is something new to announce or to run for.
    pub(super) wanted: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn view(&self) -> View {
        lock(&self.view).clone()
    }

    pub(super) fn announce(&self, member: Member) {
        lock(&self.members).push(member);
        self.wanted.notify_one();
    }

    pub(super) fn campaign(&self, office: Office, address: &str) -> Term {
        let (term, receiver) = watch::channel(None);
        lock(&self.campaigns).push(Campaign {
            office,
            address: address.to_owned(),
            term,
        });
        self.wanted.notify_one();
        receiver
    }

    /// What is to be made known.
    pub(super) fn members(&self) -> Vec<Member> {
        lock(&self.members).clone()
    }

    /// The offices that are run for, with the address to be published.
    pub(super) fn campaigns(&self) -> Vec<(Office, String)> {
        let campaigns = lock(&self.campaigns);
        campaigns
            .iter()
            .map(|c| (c.office, c.address.clone()))
            .collect()
    }

    /// Enters what the backend says now; what was frozen is not any more.
    pub(super) fn publish(&self, view: View) {
        let mut known = lock(&self.view);
        if let Some(why) = known.frozen.take() {
            tracing::info!("membership is up to date again (it was frozen: {why})");
        }
        *known = view;
    }

    /// The backend does not answer: what is known stays. Said once.
    pub(super) fn freeze(&self, backend: &str, why: &str) {
        let mut known = lock(&self.view);
        if known.frozen.is_none() {
            tracing::warn!(
                "{backend} does not answer ({why}): membership is frozen as it is; serving goes on"
            );
        }
        known.frozen = Some(why.to_owned());
    }

    /// An office is ours with this term, or another's. Only changes are told.
    pub(super) fn elected(&self, office: Office, term: Option<u64>) {
        for campaign in lock(&self.campaigns).iter().filter(|c| c.office == office) {
            let changed = campaign
                .term
                .send_if_modified(|now| std::mem::replace(now, term) != term);
            match (changed, term) {
                (true, Some(term)) => tracing::info!(
                    "this process holds the office of the {} (term {term})",
                    office.name()
                ),
                (true, None) => tracing::warn!(
                    "this process does not hold the office of the {} any more",
                    office.name()
                ),
                (false, _) => {}
            }
        }
    }
}
