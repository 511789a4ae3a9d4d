//! Where the members of a cluster find each other, who is there, and who holds an office. Behind one trait, so that nothing else knows of etcd or Kubernetes.
//!
//! * [`Static`]: the configuration says where the controller is, and that is all there is to know.
//! * [`Etcd`]: members and offices are keys that live as long as their owner's lease.
//! * [`Kubernetes`]: members are Pods, offices are Leases.
//!
//! What must be right does not rest on membership: a worker is alive as long as its control link is, and the controller alone decides which scheduler it asks. Membership
//! tells where to call and whom to prefer. So a backend that is away *freezes* what is known and stops nothing: whoever holds an office keeps it until the backend
//! says that another has it. Callers: `volley serve` (holds the office of the controller), `volley worker` and `volley scheduler` (look for it), `/admin/state`.

mod etcd;
mod http;
mod kubernetes;
mod pace;
mod shared;

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;

use crate::config::{MembershipBackend, MembershipSettings};
use crate::failure::Failure;

pub use self::etcd::Etcd;
pub use self::kubernetes::Kubernetes;

/// What only one member holds at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Office {
    /// Takes workers' calls; its holder's address is where to call.
    Controller,
    /// Plans steps, for the controller.
    Scheduler,
}

impl Office {
    /// Its name in keys and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Office::Controller => "controller",
            Office::Scheduler => "scheduler",
        }
    }
}

/// A process of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Member {
    /// What it is: `controller`, `scheduler`, `attention-0`.
    pub name: String,
    /// HOST:PORT at which it is reached, as it says itself.
    pub address: String,
}

/// What is known of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct View {
    /// Who is there, by name.
    pub members: Vec<Member>,
    /// Where the controller is: HOST:PORT.
    pub controller: Option<String>,
    /// Who holds the scheduler's office.
    pub scheduler: Option<String>,
    /// Why this is not what it was: the backend does not answer. What is above is the last that it said.
    pub frozen: Option<String>,
}

/// The term of an office that this process runs for: `None` while another holds it. Later terms are larger. When the sender is gone there is no election.
pub type Term = watch::Receiver<Option<u64>>;

/// See the module. None of these wait for anything but memory: a thread of the backend's own keeps the view and the leases.
pub trait Membership: Send + Sync {
    /// What is known now.
    fn view(&self) -> View;

    /// Makes a member known for as long as this value lives.
    fn announce(&self, member: Member);

    /// Runs for an office, again whenever it is lost, for as long as this value lives. `address` is what others will read.
    fn campaign(&self, office: Office, address: &str) -> Term;

    /// The backend's name.
    fn backend(&self) -> &'static str;
}

/// Opens the configured backend. `controller` is the configured address, which counts where the backend is static.
///
/// # Errors
/// A setting makes no sense, or a file cannot be read. A backend that does not answer is no error: it may come.
pub fn open(
    settings: &MembershipSettings,
    controller: &str,
) -> Result<Arc<dyn Membership>, Failure> {
    Ok(match settings.backend {
        MembershipBackend::Static => Arc::new(Static::new(controller)),
        MembershipBackend::Etcd => Arc::new(Etcd::open(settings)?),
        MembershipBackend::Kubernetes => Arc::new(Kubernetes::open(settings)?),
    })
}

/// The controller is where the configuration says, and nobody is elected: whoever runs for the controller's office has it, and of schedulers the frontend takes the
/// first that comes.
#[derive(Debug)]
pub struct Static {
    controller: String,
}

impl Static {
    /// With the controller at this HOST:PORT.
    pub fn new(controller: &str) -> Self {
        Static {
            controller: controller.to_owned(),
        }
    }
}

impl Membership for Static {
    fn view(&self) -> View {
        View {
            controller: Some(self.controller.clone()),
            ..View::default()
        }
    }

    fn announce(&self, _: Member) {}

    fn campaign(&self, office: Office, _: &str) -> Term {
        let term = match office {
            Office::Controller => Some(0),
            Office::Scheduler => None,
        };
        watch::Sender::new(term).subscribe()
    }

    fn backend(&self) -> &'static str {
        "static"
    }
}

/// Waits until an office is ours, and says now and then for whom it waits.
pub async fn hold(term: &mut Term, membership: &dyn Membership, office: Office) {
    const SAY_EVERY: Duration = Duration::from_secs(10);
    // The first answer comes in a moment; before it there is nothing to say.
    let mut patience = Duration::from_millis(500);
    while term.borrow_and_update().is_none() {
        let changed = tokio::time::timeout(patience, term.changed()).await;
        patience = SAY_EVERY;
        match changed {
            Ok(Ok(())) => continue,
            // Nobody is elected any more: the backend has ended.
            Ok(Err(_)) => return,
            Err(_) => {}
        }
        let view = membership.view();
        let holder = match office {
            Office::Controller => view.controller,
            Office::Scheduler => view.scheduler,
        };
        let holder = holder.unwrap_or_else(|| "nobody that is known".to_owned());
        let backend = membership.backend();
        match view.frozen {
            Some(why) => tracing::warn!("waiting for {backend}: {why}"),
            None => tracing::info!(
                "standing by: {holder} is the {} by the word of {backend}",
                office.name()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_configured_is_all_that_static_membership_knows() {
        let membership = Static::new("10.0.0.1:7600");
        assert_eq!(
            membership.view().controller.as_deref(),
            Some("10.0.0.1:7600")
        );
        let elected = |office| *membership.campaign(office, "x").borrow();
        assert_eq!(
            (elected(Office::Controller), elected(Office::Scheduler)),
            (Some(0), None)
        );
    }
}
