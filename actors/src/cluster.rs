//! A cluster on one machine: a control thread with the actors, and one thread for each worker.

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use actix::{Actor, Addr, System};
use metrics::{counter, gauge};
use volley_models::{Crew, ModelSpec, WeightSource};
use volley_transports::WorkerId;
use volley_transports::quic::QuicNode;

use crate::clock::Clock;
use crate::cluster_config::ClusterConfig;
use crate::cluster_error::ClusterError;
use crate::expert::ExpertLoad;
use crate::frontend::{Client, Frontend, Limits};
use crate::metric_names as names;
use crate::remote::{Fingerprint, Gate, GateError, SchedulingHints};
use crate::scheduler::{FirstCome, PolicyScheduler, SchedulerActor, StartScheduler};
use crate::supervisor::{
    AskWorkers, CrashWorker, DrainWorker, LoadProgress, LoadReporter, ProcessEnded, Rebalance,
    Shutdown, Site, Supervisor,
};
use crate::timeline::Timeline;
use crate::waits::WorkerState;
use crate::worker::Blueprint;

/// Experts with a series of their own in the metrics.
const EXPERT_SERIES_MAX: usize = 256;
/// Threads of workers get this long to end after the cluster was stopped.
const JOIN_DEADLINE: Duration = Duration::from_secs(10);

/// A running cluster. Dropping it stops it without waiting for its requests.
pub struct Cluster {
    client: Client,
    timeline: Timeline,
    load: Arc<ExpertLoad>,
    expert_workers: u16,
    micro_batches: u8,
    supervisor: Addr<Supervisor>,
    control: Mutex<Option<JoinHandle<()>>>,
    /// Takes calls of workers in other processes.
    gate: Mutex<Option<Gate>>,
    published: Mutex<Vec<u64>>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("client", &self.client)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// Starts a cluster on threads of this process and waits until every worker has loaded. `scheduler` takes the place of the shipped one
    /// ([`FirstCome`]); `progress` hears from the workers' threads how far each has loaded.
    ///
    /// # Errors
    /// When the configuration does not fit the model, or a worker cannot load; nothing is left running then.
    pub fn start(
        config: ClusterConfig,
        weights: Arc<dyn WeightSource>,
        scheduler: Option<StartScheduler>,
        progress: Arc<dyn Fn(LoadProgress) + Send + Sync>,
    ) -> Result<Cluster, ClusterError> {
        let spec = weights.spec().clone();
        config.check(&spec)?;
        let shape = config.shape(&spec)?;
        let topology = shape.topology(config.micro_batches)?;
        let timeline = Timeline::new(topology.ids(), config.timeline_spans);
        let load = Arc::new(ExpertLoad::new(spec.layers.len(), spec.experts));
        let clock = Clock::start();
        let blueprint = Blueprint {
            attention: config.attention_options(),
            experts: config.expert_options(shape.max_merged()?),
            shape,
            crew: Crew::new(config.threads, config.workers()).map_err(ClusterError::Control)?,
            clock: clock.clone(),
            timeline: timeline.clone(),
            load: Arc::clone(&load),
            progress: LoadReporter(progress),
            apart: false,
            weights,
            config: config.clone(),
        };
        let site = Site::Here(Arc::new(blueprint));
        Self::launch(
            config,
            &spec,
            scheduler,
            site,
            clock,
            timeline,
            load,
            |_, _| Ok(None),
        )
    }

    /// Waits at `node` for workers of other processes, and returns when all are there and have loaded. See [`RemoteWorker`](crate::RemoteWorker).
    /// Workers that are this process's `children` end with the cluster; others go on and call again.
    ///
    /// # Errors
    /// When the configuration does not fit the model.
    pub fn gather(
        config: ClusterConfig,
        spec: &ModelSpec,
        scheduler: Option<StartScheduler>,
        progress: Arc<dyn Fn(LoadProgress) + Send + Sync>,
        node: QuicNode,
        fingerprint: Fingerprint,
        children: bool,
    ) -> Result<Cluster, ClusterError> {
        config.check(spec)?;
        let topology = config.shape(spec)?.topology(config.micro_batches)?;
        let timeline = Timeline::new(topology.ids(), config.timeline_spans);
        let load = Arc::new(ExpertLoad::new(spec.layers.len(), spec.experts));
        let theirs = Arc::clone(&load);
        let clock = Clock::start();
        let (seen, time) = (timeline.clone(), clock.clone());
        let hints = SchedulingHints {
            prefill_tokens: config.prefill_tokens,
            micro_batch_rows: config.micro_batch_rows,
        };
        let open = move |frontend: &Addr<Frontend>, supervisor: &Addr<Supervisor>| {
            let gate = Gate::open(
                node,
                fingerprint,
                hints,
                supervisor.clone(),
                frontend.clone(),
                LoadReporter(progress),
                theirs,
                seen,
                time,
            );
            Ok(Some(gate.map_err(|GateError(error)| {
                ClusterError::Control(error)
            })?))
        };
        let site = Site::Afar { children };
        Self::launch(config, spec, scheduler, site, clock, timeline, load, open)
    }

    /// Starts the control thread with frontend and supervisor, and waits until all workers have loaded.
    fn launch(
        config: ClusterConfig,
        spec: &ModelSpec,
        scheduler: Option<StartScheduler>,
        site: Site,
        clock: Clock,
        timeline: Timeline,
        load: Arc<ExpertLoad>,
        open: impl FnOnce(&Addr<Frontend>, &Addr<Supervisor>) -> Result<Option<Gate>, ClusterError>,
    ) -> Result<Cluster, ClusterError> {
        let limits = Limits {
            context: config.context,
            vocab: spec.vocab,
            max_waiting: config.max_waiting,
        };
        let (expert_workers, micro_batches) = (config.expert_workers, config.micro_batches);
        let (built, addresses) = mpsc::channel();
        let (started, outcome) = mpsc::channel();
        let spec = spec.clone();
        let control = move || {
            let system = System::new();
            let addresses = system.block_on(async move {
                let shipped = first_come(config.prefill_tokens, config.micro_batch_rows);
                let frontend = Frontend::new(limits, scheduler, shipped, clock.clone()).start();
                let supervisor =
                    Supervisor::new(site, clock, config, &spec, frontend.clone(), started).start();
                (frontend, supervisor)
            });
            let _ = built.send(addresses);
            if let Err(error) = system.run() {
                tracing::error!("the cluster's control thread ended: {error}");
            }
        };
        let control = std::thread::Builder::new()
            .name("control".into())
            .spawn(control)
            .map_err(ClusterError::Control)?;
        let (frontend, supervisor) = addresses.recv().map_err(|_| ClusterError::ControlEnded)?;
        let gate = open(&frontend, &supervisor);
        let cluster = Cluster {
            client: Client::new(frontend),
            timeline,
            load,
            expert_workers,
            micro_batches,
            supervisor,
            control: Mutex::new(Some(control)),
            gate: Mutex::new(None),
            published: Mutex::new(Vec::new()),
        };
        *cluster.gate.lock().unwrap_or_else(PoisonError::into_inner) = gate?;
        outcome.recv().map_err(|_| ClusterError::ControlEnded)??;
        Ok(cluster)
    }

    /// The way to hand requests in.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// What the workers did when, if the configuration keeps spans.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Micro-batches that may be in flight (m).
    pub fn micro_batches(&self) -> u8 {
        self.micro_batches
    }

    /// Rows computed so far, `[layer][expert]`.
    pub fn expert_load(&self) -> Vec<Vec<u64>> {
        self.load.rows()
    }

    /// Brings the metrics that are not kept up at each event up to date; call it before they are read.
    pub fn publish_metrics(&self) {
        let layers = self.load.rows();
        let experts = layers.first().map_or(0, Vec::len);
        let total = |expert: usize| layers.iter().map(|layer| layer[expert]).sum::<u64>();
        let totals: Vec<u64> = (0..experts).map(total).collect();

        let mut published = self
            .published
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        published.resize(experts.min(EXPERT_SERIES_MAX), 0);
        for (expert, before) in published.iter_mut().enumerate() {
            let counter = counter!(names::EXPERT_ROWS, "expert" => expert.to_string());
            counter.increment(totals[expert] - *before);
            *before = totals[expert];
        }
        // As `Placement::even` spreads them: contiguous ranges, the first ones longer by one.
        let workers = self.expert_workers as usize;
        let mut rest = totals.as_slice();
        let loads: Vec<u64> = (0..workers)
            .map(|worker| {
                let (mine, others) =
                    rest.split_at(experts / workers + usize::from(worker < experts % workers));
                rest = others;
                mine.iter().sum()
            })
            .collect();
        let max = loads.iter().copied().max().unwrap_or(0);
        let mean = loads.iter().sum::<u64>() as f64 / workers as f64;
        gauge!(names::EXPERT_BALANCE).set(if max > 0 { mean / max as f64 } else { 1.0 });
    }

    /// How every worker's seat stands, and what each worker waits for. Takes a fifth of a second if one does not answer; empty when the cluster has stopped.
    pub async fn workers(&self) -> Vec<WorkerState> {
        self.supervisor.send(AskWorkers).await.unwrap_or_default()
    }

    /// Moves a worker's work elsewhere and lets it sit by, until it is stopped or `drained` is false again. The work moves as soon as the others suffice; [`Cluster::workers`]
    /// tells when it has.
    ///
    /// # Errors
    /// There is no such worker, or the cluster has stopped.
    pub async fn drain_worker(&self, worker: WorkerId, drained: bool) -> Result<(), String> {
        let asked = self.supervisor.send(DrainWorker { worker, drained }).await;
        asked.unwrap_or_else(|_| Err("the cluster has stopped".to_owned()))
    }

    /// Spreads experts over the workers that hold them as if each had computed `rows[expert]` rows of late, under a new epoch; requests go on with
    /// the same answers. The supervisor does so by itself when measured load drifts. `false` if nothing would be gained: then all stays as it is.
    pub async fn rebalance(&self, rows: Vec<u64>) -> bool {
        self.supervisor.send(Rebalance(rows)).await.unwrap_or(false)
    }

    /// Says that the process of a worker has ended, sooner than its link would show it.
    pub fn process_ended(&self, worker: WorkerId, reason: &str) {
        self.supervisor
            .do_send(ProcessEnded(worker, reason.to_owned()));
    }

    /// Makes a worker's thread panic, to try out what a failure does: the worker is rebuilt, and every request goes on. An unknown worker is
    /// ignored.
    pub fn crash(&self, worker: WorkerId) {
        self.supervisor.do_send(CrashWorker(worker));
    }

    /// Takes no new requests, lets those under way finish until the deadline, then stops every thread. Requests that are cut off end with an error that says so.
    /// A second call returns at once.
    pub fn shutdown(&self, deadline: Duration) {
        let control = self
            .control
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(control) = control else { return };
        let (done, threads) = mpsc::channel();
        self.supervisor.do_send(Shutdown { deadline, done });
        let until = Instant::now() + deadline + JOIN_DEADLINE;
        let threads = threads
            .recv_timeout(deadline + JOIN_DEADLINE)
            .unwrap_or_default();
        for thread in threads.into_iter().chain([control]) {
            let name = thread.thread().name().unwrap_or("worker").to_owned();
            while !thread.is_finished() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !thread.is_finished() {
                tracing::error!("the thread of {name} does not end; it is left behind");
            } else if thread.join().is_err() {
                tracing::error!("the thread of {name} panicked");
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown(Duration::ZERO);
    }
}

/// The shipped scheduler, in the frontend's own thread: it is quick and does not panic.
fn first_come(prefill_tokens: u32, fill: u32) -> StartScheduler {
    Box::new(move || {
        let scheduler = PolicyScheduler::new(FirstCome::new(prefill_tokens, fill));
        SchedulerActor(scheduler).start().recipient()
    })
}
