//! `volley scheduler`: a scheduler in a process of its own. Any number may run; the controller asks one, and the others stand by.

use std::sync::Arc;

use clap::Args;
use tokio::sync::oneshot;
use volley_actors::RemoteScheduler;
use volley_transports::quic::NodeRole;

use crate::failure::Failure;
use crate::flags::{ConfigFlags, Joining};
use crate::membership::{Member, Office};
use crate::signals::Signals;
use crate::{logging, membership, network};

/// Run a scheduler that offers itself to a server started with `--isolate host`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct SchedulerArgs {
    /// Its name in logs and /admin/state; each scheduler needs its own [default: the certificate's, with the process's number]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    config: ConfigFlags<Joining>,
}

const AFTER_HELP: &str = "\
A scheduler plans which sequences compute what next. It is told lengths, never tokens, holds no state that is not told again, and needs no model: kill it at any time, and
another that stands by, or else the server's own, plans on from the next step. With --membership etcd or kubernetes the one that holds the office is preferred.

  volley certs --out certs --scheduler scheduler
  volley scheduler --name one --controller HOST:7600 --certificates certs/scheduler
  volley scheduler --name two --controller HOST:7600 --certificates certs/scheduler

GET /admin/state names who plans (`scheduler`) and who stands by (`standby`).";

/// Runs until it is told to leave.
///
/// # Errors
/// When something is refused at the start, or the controller refuses it.
pub fn run(args: SchedulerArgs) -> Result<(), Failure> {
    let raw = args.config.load()?;
    logging::start(&raw.log);
    let policy = raw.scheduler()?;
    let settings = raw.network();
    let identity = network::identity(&settings, NodeRole::Scheduler)?;
    let node = network::bind(network::worker_listen(&settings)?, &identity, &settings)?;
    let name = args
        .name
        .unwrap_or_else(|| format!("{}-{}", identity.name(), std::process::id()));
    let membership = membership::open(&raw.membership(), &settings.controller)?;
    membership.announce(Member {
        name: format!("scheduler-{name}"),
        address: node.local_addr().to_string(),
    });
    let term = membership.campaign(Office::Scheduler, &name);
    tracing::info!("the scheduler {name} listens at {}", node.local_addr());

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("threads cannot be started: {error}")))?;
    let finder = Arc::clone(&membership);
    let scheduler = RemoteScheduler {
        name: name.clone(),
        node,
        controller: Box::new(move || network::find_controller(&*finder)),
        term,
        make: Box::new(move |hints| policy.scheduler(hints.prefill_tokens, hints.micro_batch_rows)),
    };
    let result = runtime.block_on(async {
        let mut signals = Signals::new()?;
        let (leave, left) = oneshot::channel();
        tokio::spawn(async move {
            let name = signals.next().await;
            tracing::info!("{name}");
            let _ = leave.send(());
        });
        let run = scheduler.run(async {
            // A sender that is gone means the same.
            let _ = left.await;
        });
        run.await.map_err(|error| Failure::new(error.to_string()))
    });
    result?;
    tracing::info!("the scheduler {name} has left");
    Ok(())
}
