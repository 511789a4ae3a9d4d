//! Workers in processes of their own on this machine: started with the server, started again when they die, ended with it.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use volley_actors::Cluster;
use volley_models::ModelSpec;
use volley_transports::quic::{CertificateAuthority, NodeRole, QuicNode};
use volley_transports::{Role, WorkerId};

use crate::config::{MembershipBackend, Settings};
use crate::failure::Failure;
use crate::{certs, network};

/// Pause before a child that died is started again; doubles with each death within [`QUICK`].
const PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// A child that lived longer is started again without a pause.
const QUICK: Duration = Duration::from_secs(30);
/// How often a child is looked at.
const POLL: Duration = Duration::from_millis(20);
/// A child that is told to end gets this long.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// The worker processes of a server. They end when this is dropped, or when this process dies in whatever way: their standard input ends then.
pub struct Children {
    stopping: Arc<AtomicBool>,
    keepers: Vec<JoinHandle<()>>,
    /// Configuration and certificates, removed at the end.
    _folder: TempDir,
}

/// What a child is started with.
struct Recipe {
    program: PathBuf,
    worker: WorkerId,
    config: PathBuf,
}

impl Children {
    /// The node at which children join, and what starts them once the cluster listens there. Children take exactly the settings given here, but for the threads, which
    /// they share.
    ///
    /// # Errors
    /// Files cannot be written, or the node cannot be had.
    pub fn prepare(settings: &Settings, spec: &ModelSpec) -> Result<(QuicNode, Nursery), Failure> {
        let failed =
            |what: &str, error: &dyn std::fmt::Display| Failure::new(format!("{what}: {error}"));
        let authority =
            CertificateAuthority::new("one machine").map_err(|e| failed("certificates", &e))?;
        let controller = authority
            .identity(NodeRole::Controller, "server")
            .map_err(|e| failed("certificates", &e))?;
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let node = QuicNode::bind(any, &controller, network::options(&settings.network))
            .map_err(|e| failed("the workers' network", &e))?;

        // Readable by this user alone: there is a key in it.
        let folder = tempfile::Builder::new()
            .prefix("volley-")
            .tempdir()
            .map_err(|e| failed("a directory for the workers' configuration", &e))?;
        let issued = authority
            .issue(NodeRole::Worker, "worker", CertificateAuthority::VALIDITY)
            .map_err(|e| failed("certificates", &e))?;
        let certificates = folder.path().join("worker");
        certs::write_member(&certificates, authority.certificate_pem(), &issued)?;
        let mut theirs = settings.clone();
        theirs.network.controller = node.local_addr().to_string();
        theirs.network.listen = Some("127.0.0.1:0".to_owned());
        theirs.network.certificates = Some(certificates);
        theirs.membership.backend = MembershipBackend::Static;
        let workers = usize::from(settings.cluster.attention_workers)
            + usize::from(settings.cluster.expert_workers);
        theirs.cluster.threads = (settings.cluster.threads / workers).max(1);
        theirs.isolate = crate::config::Isolate::Host;
        theirs.trace.file = None;
        let config = folder.path().join("volley.toml");
        write(&config, &theirs.to_toml(spec))
            .map_err(|e| failed("the workers' configuration", &e))?;
        Ok((
            node,
            Nursery {
                folder,
                config,
                attention: settings.cluster.attention_workers,
                experts: settings.cluster.expert_workers,
            },
        ))
    }
}

fn write(path: &Path, text: &str) -> std::io::Result<()> {
    std::fs::File::create(path)?.write_all(text.as_bytes())
}

/// Children that are prepared but not started.
pub struct Nursery {
    folder: TempDir,
    config: PathBuf,
    attention: u16,
    experts: u16,
}

impl Nursery {
    /// Starts them all. A child that ends before there is a cluster ends this process: it would end so again. Later the cluster is told.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn start(self, cluster: Arc<OnceLock<Weak<Cluster>>>) -> Result<Children, Failure> {
        let program = std::env::current_exe().map_err(|error| {
            Failure::new(format!("this program's own file is not known: {error}"))
        })?;
        let attention = (0..self.attention).map(|index| Role::Attention.worker(index));
        let experts = (0..self.experts).map(|index| Role::Expert.worker(index));
        let mut children = Children {
            stopping: Arc::new(AtomicBool::new(false)),
            keepers: Vec::new(),
            _folder: self.folder,
        };
        for worker in attention.chain(experts) {
            let recipe = Recipe {
                program: program.clone(),
                worker,
                config: self.config.clone(),
            };
            let first = recipe.start()?;
            let (stopping, cluster) = (Arc::clone(&children.stopping), Arc::clone(&cluster));
            children.keepers.push(std::thread::spawn(move || {
                recipe.keep(first, &stopping, &cluster)
            }));
        }
        Ok(children)
    }
}

impl Recipe {
    fn start(&self) -> Result<Child, Failure> {
        Command::new(&self.program)
            .arg("worker")
            .arg(self.worker.role.to_string())
            .args([
                "--index",
                &self.worker.index.to_string(),
                "--leash",
                "--config",
            ])
            .arg(&self.config)
            // Their configuration is in the file; ours is not theirs.
            .env_clear()
            .envs(
                std::env::vars_os()
                    .filter(|(name, _)| !name.to_string_lossy().starts_with("VOLLEY_")),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| Failure::new(format!("{} cannot be started: {error}", self.worker)))
    }

    /// Looks after the child until the end.
    fn keep(&self, mut child: Child, stopping: &AtomicBool, cluster: &OnceLock<Weak<Cluster>>) {
        let mut pause = PAUSE;
        let mut born = Instant::now();
        loop {
            if stopping.load(Ordering::Acquire) {
                end(&mut child);
                return;
            }
            match child.try_wait() {
                Ok(None) => {
                    std::thread::sleep(POLL);
                    continue;
                }
                Ok(Some(status)) => {
                    let Some(cluster) = cluster.get() else {
                        // It has said why.
                        eprintln!("volley: {} ended at the start ({status})", self.worker);
                        std::process::exit(1);
                    };
                    if let Some(cluster) = cluster.upgrade() {
                        cluster.process_ended(self.worker, &format!("its process ended: {status}"));
                    }
                    tracing::error!(
                        "the process of {} ended ({status}); it is started again",
                        self.worker
                    );
                }
                Err(error) => tracing::error!("the process of {} is lost: {error}", self.worker),
            }
            if born.elapsed() > QUICK {
                pause = PAUSE;
            } else {
                let until = Instant::now() + pause;
                while Instant::now() < until && !stopping.load(Ordering::Acquire) {
                    std::thread::sleep(POLL);
                }
                pause = (pause * 2).min(PAUSE_MAX);
            }
            if stopping.load(Ordering::Acquire) {
                return;
            }
            match self.start() {
                Ok(again) => (child, born) = (again, Instant::now()),
                Err(error) => tracing::error!("{error}"),
            }
        }
    }
}

/// Ends a child: its standard input ends, which it takes for the end of its parent.
fn end(child: &mut Child) {
    drop(child.stdin.take());
    let until = Instant::now() + END_DEADLINE;
    while Instant::now() < until {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(POLL);
    }
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for Children {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        for keeper in self.keepers.drain(..) {
            let _ = keeper.join();
        }
    }
}

/// Where a running engine keeps its children.
pub type Family = Mutex<Option<Children>>;

/// Ends the children, if there are any.
pub fn end_all(family: &Family) {
    let children = family.lock().unwrap_or_else(PoisonError::into_inner).take();
    drop(children);
}
