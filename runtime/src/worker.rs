//! `volley worker`: one attention or expert worker in a process of its own.

use std::io::Read;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use tokio::sync::oneshot;
use volley_actors::RemoteWorker;
use volley_transports::Role;
use volley_transports::quic::NodeRole;

use crate::config::{Demand, MembershipBackend, Settings};
use crate::failure::Failure;
use crate::flags::{ConfigFlags, Serving};
use crate::membership::{self, Member};
use crate::progress::LoadDisplay;
use crate::signals::Signals;
use crate::{fingerprint, launch, logging, memory, network, recorder, worker_http};

/// Run one worker that joins a server started with `--isolate host`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct WorkerArgs {
    /// What it computes
    role: WorkerRole,
    /// Its number among the workers of its role, from 0
    #[arg(long, value_name = "N", env = "VOLLEY_WORKER_INDEX")]
    index: u16,
    /// HOST:PORT for /metrics, /livez and /readyz of this worker
    #[arg(long, value_name = "HOST:PORT")]
    status: Option<String>,
    /// End when standard input does: for a process that starts workers and may die
    #[arg(long, hide = true)]
    leash: bool,
    #[command(flatten)]
    config: ConfigFlags<Serving>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum WorkerRole {
    /// Requests and their KV cache
    Attention,
    /// A share of every layer's experts
    Expert,
}

const AFTER_HELP: &str = "\
The worker loads its weights at once and calls the server (network.controller) until it is taken. It keeps its weights when the link breaks and calls again.
SIGTERM moves its work elsewhere first, within server.drain_timeout_s.

  volley certs --out certs
  volley serve            --config volley.toml --isolate host --certificates certs/controller
  volley worker attention --config volley.toml --index 0 --certificates certs/worker
  volley worker expert    --config volley.toml --index 0 --certificates certs/worker

All processes need the same model and the same [model], [cluster] and [limits]; a difference is refused by name.";

/// Runs until it is told to leave.
///
/// # Errors
/// When something is refused at the start, or the worker fails.
pub fn run(args: WorkerArgs) -> Result<(), Failure> {
    let started = Instant::now();
    let raw = args.config.load()?;
    logging::start(&raw.log);
    let metrics = recorder::install()?;
    let model = launch::open_model(&raw)?;
    let available = memory::available_bytes();
    let resolved = Settings::resolve(&raw, model.spec(), model.name(), available, Demand::Serving);
    let settings = resolved?;
    let worker = match args.role {
        WorkerRole::Attention => Role::Attention,
        WorkerRole::Expert => Role::Expert,
    }
    .worker(args.index);
    let count = match worker.role {
        Role::Attention => settings.cluster.attention_workers,
        Role::Expert => settings.cluster.expert_workers,
    };
    if worker.index >= count {
        return Err(Failure::new(format!(
            "--index is {}, but the configuration has {count} {} workers, numbered from 0",
            worker.index, worker.role
        )));
    }
    let plan = settings.cluster.worker_memory(model.spec(), worker)?;
    launch::check_memory(&plan, available)?;
    if !args.leash {
        tracing::info!("{worker} takes\n{plan}");
    }
    let identity = network::identity(&settings.network, NodeRole::Worker)?;
    let node = network::bind(
        network::worker_listen(&settings.network)?,
        &identity,
        &settings.network,
    )?;
    if let Some(seat) = identity.seat().filter(|&seat| seat != worker) {
        return Err(Failure::new(format!(
            "the certificate is good for {seat} only, and this is to be {worker}; `volley certs --seat {worker}` makes one"
        )));
    }
    let membership = membership::open(&settings.membership, &settings.network.controller)?;
    if settings.membership.backend == MembershipBackend::Static {
        // A name that does not resolve now is most often misspelt; later it may well be away for a moment.
        network::resolve("network.controller", &settings.network.controller)?;
    }
    membership.announce(Member {
        name: worker.to_string(),
        address: node.local_addr().to_string(),
    });
    let fingerprint = fingerprint::of(&settings)?;
    let fabric = network::fabric(&settings, &node, model.spec(), worker.role)?;
    tracing::info!(
        "{worker} listens at {}, {:.2} s after its start; it loads and calls the controller ({})",
        node.local_addr(),
        started.elapsed().as_secs_f64(),
        match settings.membership.backend {
            MembershipBackend::Static => settings.network.controller.as_str(),
            _ => membership.backend(),
        }
    );

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("threads cannot be started: {error}")))?;
    let ready = worker_http::Ready::default();
    if let Some(status) = &args.status {
        let listener = TcpListener::bind(status).map_err(|error| {
            Failure::new(format!("--status cannot listen on {status}: {error}"))
        })?;
        runtime.spawn(worker_http::serve(listener, metrics, ready.clone()));
    }
    let (leave, left) = oneshot::channel();
    let mut signals = {
        let _context = runtime.enter();
        Signals::new()?
    };
    runtime.spawn(async move {
        // Not within the log line: what a line that is filtered out would have awaited is not awaited.
        let name = signals.next().await;
        tracing::info!("{name}");
        let _ = leave.send(());
        // A second one ends it at once.
        let name = signals.next().await;
        tracing::warn!("{name} again");
        std::process::exit(1);
    });
    if args.leash {
        std::thread::spawn(|| {
            // Nothing is ever written: this returns when whoever started us is gone.
            let _ = std::io::stdin().read(&mut [0]);
            std::process::exit(1);
        });
    }
    // Whoever started us shows how far we are.
    let display = (!args.leash).then(LoadDisplay::new);
    let remote = RemoteWorker {
        worker,
        weights: model.weights(),
        fingerprint,
        node,
        fabric,
        controller: Box::new(move || network::find_controller(&*membership)),
        progress: Arc::new(move |progress| {
            if let Some(display) = &display {
                display.update(&progress);
            }
            ready.progress(&progress);
        }),
        drain: settings.server.drain_timeout,
        began: started,
        config: settings.cluster,
    };
    let result = remote.run(async {
        // A sender that is gone means the same.
        let _ = left.await;
    });
    runtime.shutdown_timeout(Duration::from_millis(100));
    result.map_err(|error| Failure::new(error.to_string()))?;
    tracing::info!("{worker} has left");
    Ok(())
}
