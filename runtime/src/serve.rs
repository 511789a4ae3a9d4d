//! `volley serve`: a cluster on this machine behind an OpenAI-compatible HTTP API, from the first check to the last request.
//!
//! The order is such that what can be refused is refused early: configuration, port and key before the model's files, memory before weights.
//! At a signal the server drains: `/readyz` says 503, new requests get 503, those under way end; a second signal ends all at once.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::net::{TcpListener, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use volley_actors::Cluster;

use crate::config::Demand;
use crate::engine::Engine;
use crate::failure::Failure;
use crate::flags::{ConfigFlags, Serving};
use crate::http::{self, HttpOptions, Limits};
use crate::launch::Launch;
use crate::progress::LoadDisplay;
use crate::signals::Signals;
use crate::{files, logging, recorder};

/// Serve a model over an OpenAI-compatible HTTP API.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ServeArgs {
    #[command(flatten)]
    config: ConfigFlags<Serving>,
}

const AFTER_HELP: &str = "\
Examples:
  volley serve                                                   the demo model on 127.0.0.1:8000
  volley serve --model ~/models/Mixtral-8x7B --expert-workers 2
  volley serve --config volley.toml --host 0.0.0.0 --api-key-file key
  volley serve --model DIR --load-format dummy                   any shape, without its weights

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
       -d '{\"model\": \"volley-demo\", \"prompt\": \"ROMEO:\", \"max_tokens\": 32}'

SIGTERM or Ctrl-C drains: running requests finish (server.drain_timeout_s), new ones get 503. A second signal stops at once.";

/// Threads of the HTTP server. The work is in the cluster's threads; these only move text.
const HTTP_THREADS: usize = 2;
/// How often a server looks whether its cluster can still go on.
const GIVEN_UP_POLL: Duration = Duration::from_secs(1);
/// How often a draining server looks whether it is done.
const DRAIN_POLL: Duration = Duration::from_millis(20);
/// Connections get this long to be closed after the last request has ended.
const CLOSE_DEADLINE: Duration = Duration::from_secs(2);

/// Serves until a signal.
///
/// # Errors
/// When something is refused at the start, or the server fails.
pub fn run(args: ServeArgs) -> Result<(), Failure> {
    let raw = args.config.load()?;
    logging::start(&raw.log);
    let (host, port) = raw.address();
    let listener = listen(host, port)?;
    let api_key = raw.api_key_file().map(read_api_key).transpose()?;
    let metrics = recorder::install()?;
    let launch = Launch::prepare(&raw, Demand::Serving)?;
    let settings = launch.settings.clone();
    if let Some(file) = &settings.trace.file {
        check_writable(file)?;
    }
    tracing::info!("the cluster takes\n{}", launch.memory);
    let engine = Arc::new(launch.start(&Arc::new(LoadDisplay::new()))?);

    let runtime = http_runtime()?;
    let address = listener
        .local_addr()
        .map_err(|error| Failure::new(format!("the listening socket: {error}")))?;
    let options = HttpOptions {
        api_key,
        max_body_bytes: settings.server.max_body.0 as usize,
        bodies_bytes: settings.server.bodies_memory.0 as usize,
        body_timeout: settings.server.body_timeout,
        request_timeout: settings.server.request_timeout,
        limits: Limits {
            connections: settings.server.max_connections,
            head_bytes: settings.server.max_head.0 as usize,
            head_timeout: settings.server.head_timeout,
            stall_timeout: settings.server.stall_timeout,
        },
    };
    files::prepare(options.limits.connections);
    let (close, closed) = oneshot::channel::<()>();
    let server = http::serve(Arc::clone(&engine), listener, options, metrics, async {
        // A sender that is gone means the same.
        let _ = closed.await;
    });
    let served = runtime.block_on(async {
        let mut signals = Signals::new()?;
        let mut server = tokio::spawn(server);
        announce(&engine, address, &settings)?;
        tokio::select! {
            ended = &mut server => return Err(ended_early(ended)),
            never = tell_waits(&engine) => match never {},
            name = signals.next() => tracing::info!(
                "{name}: draining; running requests have {:?} to finish, a second signal stops at once",
                settings.server.drain_timeout
            ),
            holder = deposed(&engine) => tracing::error!(
                "another process is the controller ({holder}): draining; running requests have {:?} to finish, workers then join the other",
                settings.server.drain_timeout
            ),
            reason = given_up(&engine) => {
                // Requests have been told. A process that can only refuse is of no use; whoever watches it shall start another.
                return Err(Failure::new(format!("the cluster cannot go on: {reason}")));
            }
        }
        drain(&engine, &mut signals, settings.server.drain_timeout).await;
        drop(close);
        // Clients that do not close their connections shall not keep the process.
        let _ = tokio::time::timeout(CLOSE_DEADLINE, server).await;
        Ok(())
    });
    engine.shutdown(Duration::ZERO);
    runtime.shutdown_timeout(Duration::from_millis(100));
    if let Some(file) = &settings.trace.file {
        write_trace(&engine.cluster, file)?;
    }
    served?;
    tracing::info!("stopped");
    Ok(())
}

/// At each SIGUSR1: who waits for whom, in the log.
async fn tell_waits(engine: &Engine) -> std::convert::Infallible {
    let mut asked = match signal(SignalKind::user_defined1()) {
        Ok(asked) => asked,
        Err(error) => {
            tracing::warn!("SIGUSR1 cannot be handled: {error}");
            return std::future::pending().await;
        }
    };
    loop {
        asked.recv().await;
        for worker in engine.cluster.workers().await {
            tracing::warn!("{worker}");
        }
    }
}

/// Waits until another process has become the controller, and says which. Never ends without an election.
async fn deposed(engine: &Engine) -> String {
    let Some(office) = &engine.office else {
        return std::future::pending().await;
    };
    let mut term = office.term.clone();
    match term.wait_for(Option::is_none).await {
        Ok(_) => {}
        // There is no election.
        Err(_) => return std::future::pending().await,
    }
    let holder = office.membership.view().controller;
    holder.unwrap_or_else(|| "not known which".to_owned())
}

/// Waits until the cluster gives up, and says why.
async fn given_up(engine: &Engine) -> String {
    loop {
        tokio::time::sleep(GIVEN_UP_POLL).await;
        let status = engine.client.status().await;
        if let Some(reason) = status.and_then(|status| status.failed) {
            return reason;
        }
    }
}

/// Opens the listening socket, so that a port in use is found before the weights are read.
///
/// # Errors
/// When the address does not resolve, or cannot be listened on.
pub fn listen(host: &str, port: u16) -> Result<TcpListener, Failure> {
    let addresses: Vec<_> = (host, port)
        .to_socket_addrs()
        .map_err(|error| Failure::new(format!("server.host `{host}` does not resolve: {error}")))?
        .collect();
    TcpListener::bind(addresses.as_slice()).map_err(|error| {
        let remedy = match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                "another program has the port; stop it, or choose another port with --port (0 lets the system choose)"
            }
            std::io::ErrorKind::PermissionDenied => "ports below 1024 are for privileged programs; choose another with --port",
            std::io::ErrorKind::AddrNotAvailable => "this machine has no such address; choose another with --host",
            _ => "choose another address with --host and --port",
        };
        Failure::new(format!("cannot listen on {host}:{port}: {error}; {remedy}"))
    })
}

/// Reads the key clients must send.
///
/// # Errors
/// When the file cannot be read, or holds no key that fits a header.
pub fn read_api_key(path: &Path) -> Result<String, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| Failure::file(path, &error))?;
    let key = text.trim();
    if key.is_empty() || !key.chars().all(|c| c.is_ascii_graphic()) {
        let message =
            "must hold one key of visible ASCII characters without spaces (server.api_key_file)";
        return Err(Failure::new(format!("{}: {message}", path.display())));
    }
    Ok(key.to_owned())
}

/// Writes the timeline to `file`, for Perfetto or `chrome://tracing`.
///
/// # Errors
/// When the file cannot be written.
pub fn write_trace(cluster: &Cluster, file: &Path) -> Result<(), Failure> {
    let failed = |error| Failure::file(file, &error);
    let mut out = BufWriter::new(File::create(file).map_err(failed)?);
    cluster
        .timeline()
        .write_chrome_trace(&mut out)
        .and_then(|()| out.flush())
        .map_err(failed)?;
    tracing::info!(
        "wrote the timeline to {}; open it in https://ui.perfetto.dev",
        file.display()
    );
    Ok(())
}

/// Finds out now, not after a day of serving, that a file cannot be written.
fn check_writable(file: &Path) -> Result<(), Failure> {
    let opened = File::options().append(true).create(true).open(file);
    opened
        .map(drop)
        .map_err(|error| Failure::file(file, &error))
}

fn http_runtime() -> Result<Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .thread_name("http")
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("the HTTP threads could not be started: {error}")))
}

/// The one line on standard output: whoever waits for the server reads it.
fn announce(
    engine: &Engine,
    address: std::net::SocketAddr,
    settings: &crate::config::Settings,
) -> Result<(), Failure> {
    let cluster = &settings.cluster;
    let mut out = std::io::stdout();
    writeln!(
        out,
        "volley: ready at http://{address} ({}: {} attention x {} expert workers, {} micro-batches, {}, context {})",
        engine.model, cluster.attention_workers, cluster.expert_workers, cluster.micro_batches, cluster.precision(), cluster.context
    )
    .and_then(|()| out.flush())
    // A server whose output nobody reads serves all the same.
    .or_else(|error| if error.kind() == std::io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) })
    .map_err(Failure::output)
}

/// Lets the requests under way end, until the deadline or the next signal.
async fn drain(engine: &Engine, signals: &mut Signals, timeout: Duration) {
    engine.client.drain().await;
    let until = Instant::now() + timeout;
    loop {
        let live = match engine.client.status().await {
            Some(status) if status.live > 0 => status.live,
            _ => return,
        };
        if Instant::now() >= until {
            tracing::warn!(
                "{live} requests have not finished within {timeout:?} and are cut off (server.drain_timeout_s)"
            );
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(DRAIN_POLL) => {}
            name = signals.next() => {
                tracing::warn!("{name} again: {live} requests are cut off");
                return;
            }
        }
    }
}

fn ended_early(ended: Result<std::io::Result<()>, tokio::task::JoinError>) -> Failure {
    Failure::new(match ended {
        Ok(Ok(())) => "the HTTP server ended by itself".to_owned(),
        Ok(Err(error)) => format!("the HTTP server failed: {error}"),
        Err(error) => format!("the HTTP server panicked: {error}"),
    })
}
