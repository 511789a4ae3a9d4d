//! From a configuration to a running engine: open the model, resolve the settings, check memory, start the workers.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use volley_actors::{Cluster, MemoryPlan, resident_scheduler};
use volley_models::{ChatError, ModelDir, ModelError};
use volley_transports::quic::NodeRole;

use crate::children::{Children, Family};
use crate::config::{ByteSize, Demand, Isolate, Raw, Settings};
use crate::engine::Engine;
use crate::failure::Failure;
use crate::membership::{self, Member, Membership, Office, Term};
use crate::progress::LoadDisplay;
use crate::{demo, fingerprint, memory, network};

/// A model and settings that fit each other and the machine; nothing runs yet.
#[derive(Debug)]
pub struct Launch {
    /// The model, opened and checked.
    pub model: ModelDir,
    /// What the configuration means for it.
    pub settings: Settings,
    /// The memory it takes.
    pub memory: MemoryPlan,
}

/// A cluster that runs, and what keeps it.
pub struct Started {
    /// The cluster.
    pub cluster: Arc<Cluster>,
    /// The processes that were started for it.
    pub children: Arc<Family>,
    /// With workers on other hosts: the right to be their controller.
    pub office: Option<ControllerOffice>,
}

/// The office of the controller, held for as long as this lives.
pub struct ControllerOffice {
    /// Where members find each other.
    pub membership: Arc<dyn Membership>,
    /// The term; none when another process is the controller.
    pub term: Term,
}

/// Opens the model of a configuration.
///
/// # Errors
/// When its files are absent or refused.
pub fn open_model(raw: &Raw) -> Result<ModelDir, ModelError> {
    match raw.model_path() {
        Some(path) => ModelDir::open(path, raw.load_format()),
        None => demo::model_dir(),
    }
}

/// Refuses a plan that takes more than the `available` bytes, and shows the arithmetic.
///
/// # Errors
/// With every part of the plan.
pub fn check_memory(plan: &MemoryPlan, available: Option<u64>) -> Result<(), Failure> {
    match available {
        Some(available) if plan.total() > available => Err(Failure::new(format!(
            "the cluster takes {}, but only {} are available on this machine:\n{plan}\n\
             Lower limits.kv_cache_memory, limits.max_batch_tokens or the number of workers, choose --dtype bf16 or --quantize q8, or take a larger machine",
            ByteSize(plan.total()),
            ByteSize(available),
        ))),
        _ => Ok(()),
    }
}

impl Launch {
    /// Opens the model, resolves the settings and checks that they fit this machine's memory.
    ///
    /// # Errors
    /// When the model is refused, contradicts the configuration, or does not fit.
    pub fn prepare(raw: &Raw, demand: Demand) -> Result<Launch, Failure> {
        let model = open_model(raw)?;
        let available = memory::available_bytes();
        let settings = Settings::resolve(raw, model.spec(), model.name(), available, demand)?;
        let memory = settings.cluster.memory(model.spec())?;
        // Workers on other hosts look after their own memory.
        if settings.isolate != Isolate::Host {
            check_memory(&memory, available)?;
        }
        Ok(Launch {
            model,
            settings,
            memory,
        })
    }

    /// Starts the workers, or waits for those that join, until all have their weights. `display` is told how far they are.
    ///
    /// # Errors
    /// When a worker cannot load.
    pub fn start_cluster(&self, display: &Arc<LoadDisplay>) -> Result<Started, Failure> {
        let shown = Arc::clone(display);
        let progress = Arc::new(move |progress| shown.update(&progress));
        let config = self.settings.cluster.clone();
        let policy = self.settings.scheduler.clone();
        let (prefill, fill) = (config.prefill_tokens, config.micro_batch_rows);
        let planner = Some(resident_scheduler(move || policy.scheduler(prefill, fill)));
        let spec = self.model.spec();
        let mut children = None;
        let mut office = None;
        let cluster = match self.settings.isolate {
            Isolate::Thread => Arc::new(Cluster::start(
                config,
                self.model.weights(),
                planner,
                progress,
            )?),
            Isolate::Process => {
                let (node, nursery) = Children::prepare(&self.settings, spec)?;
                let known = Arc::new(OnceLock::new());
                children = Some(nursery.start(Arc::clone(&known))?);
                let print = fingerprint::of(&self.settings)?;
                let cluster = Cluster::gather(config, spec, planner, progress, node, print, true)?;
                let cluster = Arc::new(cluster);
                let _ = known.set(Arc::downgrade(&cluster));
                cluster
            }
            Isolate::Host => {
                let network = &self.settings.network;
                let identity = network::identity(network, NodeRole::Controller)?;
                office = Some(self.take_office()?);
                let node = network::bind(network::controller_listen(network)?, &identity, network)?;
                tracing::info!(
                    "waiting at {} (UDP) for {} attention and {} expert workers",
                    node.local_addr(),
                    config.attention_workers,
                    config.expert_workers
                );
                let print = fingerprint::of(&self.settings)?;
                let cluster = Cluster::gather(config, spec, planner, progress, node, print, false)?;
                Arc::new(cluster)
            }
        };
        display.finish();
        Ok(Started {
            cluster,
            children: Arc::new(Mutex::new(children)),
            office,
        })
    }

    /// Waits until this process may be the controller: at once, unless an election is held and another was chosen.
    fn take_office(&self) -> Result<ControllerOffice, Failure> {
        let address = &self.settings.network.controller;
        let membership = membership::open(&self.settings.membership, address)?;
        membership.announce(Member {
            name: format!("controller-{address}"),
            address: address.clone(),
        });
        let mut term = membership.campaign(Office::Controller, address);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Failure::new(format!("threads cannot be started: {error}")))?;
        let held = membership::hold(&mut term, &*membership, Office::Controller);
        runtime.block_on(held);
        Ok(ControllerOffice { membership, term })
    }

    /// As [`Launch::start_cluster`], with what it takes to speak text.
    ///
    /// # Errors
    /// When the tokenizer or the chat template is refused, or a worker cannot load.
    pub fn start(self, display: &Arc<LoadDisplay>) -> Result<Engine, Failure> {
        // Texts first: they are read in a moment, weights perhaps not.
        let tokenizer = Arc::new(self.model.tokenizer()?);
        let chat = match self.model.chat_template() {
            Ok(template) => Some(template),
            // A base model speaks completions only.
            Err(ModelError::Chat {
                source: ChatError::NoTemplate,
                ..
            }) => None,
            Err(error) => return Err(error.into()),
        };
        let Started {
            cluster,
            children,
            office,
        } = self.start_cluster(display)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Engine {
            model: self.settings.model.name,
            created: now.unwrap_or(Duration::ZERO).as_secs(),
            spec: self.model.spec().clone(),
            context: self.settings.cluster.context,
            tokenizer,
            chat,
            defaults: self.model.generation_defaults(),
            client: cluster.client(),
            cluster,
            children,
            office,
        })
    }
}
