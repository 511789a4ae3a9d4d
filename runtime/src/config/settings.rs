//! The second stage: what a configuration means for one model on one machine. No `auto` is left.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use toml::Value;
use volley_actors::ClusterConfig;
use volley_models::{ComputeType, LoadFormat, ModelSpec, Quantization};
use volley_transports::Spin;
use volley_transports::rdma::{GidChoice, RailName, RdmaOptions};
use volley_transports::verbs::{Mtu, Pages};

use super::keys;
use super::policy::SchedulerSettings;
use super::problem::{ConfigError, Problem};
use super::raw::{
    Auto, Dtype, Isolate, LogFormat, LogSettings, MembershipBackend, OnAnomaly, Quantize, Raw,
    SlotPages, Transport, WeightsFrom,
};
use super::size::ByteSize;

/// `limits.max_context = "auto"` is not more than this many tokens, so that a model of a long context starts on a small machine.
pub const CONTEXT_AUTO_MAX: u32 = 8192;
/// `limits.kv_cache_memory = "auto"` holds this many sequences of full length on each attention worker, if memory allows.
pub const KV_CONTEXTS_AUTO: u64 = 16;
/// The divisor of the machine's available memory that an automatic KV cache takes at most, over all workers.
const KV_SHARE_AUTO: u64 = 4;
/// Spans kept for each worker when a trace is to be written.
pub const TRACE_SPANS_AUTO: usize = 65_536;
/// Spans kept for each worker of a server, for `/admin/timeline`: 400 KiB a worker, and the last hundred steps of a model of 60 layers.
pub(super) const SERVING_SPANS_AUTO: usize = 8192;
/// Seed of dummy weights. Fixed, so that two runs speak the same nonsense.
const DUMMY_SEED: u64 = 0;

/// A configuration without open questions.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Section `[model]`.
    pub model: ModelSettings,
    /// Sections `[cluster]` and `[limits]`.
    pub cluster: ClusterConfig,
    /// Section `[scheduler]`.
    pub scheduler: SchedulerSettings,
    /// Where workers run.
    pub isolate: Isolate,
    /// What carries rows between processes.
    pub transport: Transport,
    /// Section `[network]`.
    pub network: NetworkSettings,
    /// Section `[rdma]`.
    pub rdma: RdmaSettings,
    /// Section `[membership]`.
    pub membership: MembershipSettings,
    /// Section `[server]`.
    pub server: ServerSettings,
    /// Section `[log]`.
    pub log: LogSettings,
    /// Section `[trace]`.
    pub trace: TraceSettings,
}

/// The model and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSettings {
    /// Its directory; `None` is the demo model inside the program.
    pub path: Option<PathBuf>,
    /// Its name in the API.
    pub name: String,
    /// Whether its weights are read or made up.
    pub load_format: LoadFormat,
}

/// Section `[server]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ServerSettings {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 lets the system choose.
    pub port: u16,
    /// File with the key clients must send; `None` asks for none.
    pub api_key_file: Option<PathBuf>,
    /// Largest request body in bytes.
    pub max_body: ByteSize,
    /// Bytes of request bodies in memory at once, over all requests.
    pub bodies_memory: ByteSize,
    /// Longest time for a request's body to arrive.
    pub body_timeout: Duration,
    /// HTTP connections at once.
    pub max_connections: usize,
    /// Largest head of a request in bytes.
    pub max_head: ByteSize,
    /// Longest time for a request's head to arrive, and for a connection to rest.
    pub head_timeout: Duration,
    /// Time after which a client that takes nothing is gone.
    pub stall_timeout: Duration,
    /// Longest time from a request's arrival to its last token.
    pub request_timeout: Duration,
    /// Time for running requests to finish after the signal to stop.
    pub drain_timeout: Duration,
}

/// Section `[network]`.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkSettings {
    /// Where the controller is: HOST:PORT.
    pub controller: String,
    /// Where to listen, if not the default: HOST:PORT.
    pub listen: Option<String>,
    /// The directory with this process's certificate.
    pub certificates: Option<PathBuf>,
    /// Connections of each pair of workers.
    pub connections: u8,
    /// After this long without a sign of life a process is lost.
    pub idle: Duration,
}

/// Section `[rdma]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaSettings {
    /// How the cards are used.
    pub options: RdmaOptions,
    /// How often a worker looks before it sleeps.
    pub spin: Spin,
    /// What is known of the fabric's anomalies.
    pub known_anomalies: Option<PathBuf>,
    /// Whether MTU and depth may be changed to keep clear of them.
    pub avoid: bool,
}

/// Section `[membership]`.
#[derive(Debug, Clone, PartialEq)]
pub struct MembershipSettings {
    /// Who is asked.
    pub backend: MembershipBackend,
    /// URLs with commas between them.
    pub endpoints: String,
    /// Name of the cluster.
    pub cluster: String,
    /// Time that offices outlive their last renewal.
    pub ttl: Duration,
    /// The authority of `https` endpoints.
    pub ca: Option<PathBuf>,
    /// The bearer token for Kubernetes.
    pub token_file: Option<PathBuf>,
    /// Kubernetes namespace.
    pub namespace: String,
}

/// Section `[trace]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceSettings {
    /// Where the timeline is written at the end; `None` writes none.
    pub file: Option<PathBuf>,
}

/// How much KV cache the automatic size is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// A server's unknown future: [`KV_CONTEXTS_AUTO`] sequences of full length on each attention worker.
    Serving,
    /// A known offline load: this many sequences of so many tokens at once, over all attention workers.
    Batch {
        /// Sequences at once.
        sequences: u32,
        /// Tokens of each at its end.
        tokens: u32,
    },
}

impl ModelSettings {
    /// Whether its weights are made up.
    pub fn is_dummy(&self) -> bool {
        matches!(self.load_format, LoadFormat::Dummy { .. })
    }
}

impl Raw {
    /// The model's directory, or `None` for the demo model.
    pub fn model_path(&self) -> Option<&std::path::Path> {
        self.model.path.as_deref()
    }

    /// Whether its weights are read or made up.
    pub fn load_format(&self) -> LoadFormat {
        match self.model.load_format {
            WeightsFrom::Auto => LoadFormat::Auto,
            WeightsFrom::Dummy => LoadFormat::Dummy { seed: DUMMY_SEED },
        }
    }

    /// File with the key that clients must send.
    pub fn api_key_file(&self) -> Option<&std::path::Path> {
        self.server.api_key_file.as_deref()
    }

    /// Attention and expert workers.
    pub fn workers(&self) -> (u16, u16) {
        (self.cluster.attention_workers, self.cluster.expert_workers)
    }

    /// Section `[network]`, which needs no model to be known.
    pub fn network(&self) -> NetworkSettings {
        let network = &self.network;
        NetworkSettings {
            controller: network.controller.clone(),
            listen: network.listen.clone(),
            certificates: network.certificates.clone(),
            connections: network.connections,
            idle: Duration::from_secs_f64(network.idle_s),
        }
    }

    /// Section `[membership]`, which needs no model to be known.
    pub fn membership(&self) -> MembershipSettings {
        let membership = &self.membership;
        MembershipSettings {
            backend: membership.backend,
            endpoints: membership.endpoints.clone(),
            cluster: membership.cluster.clone(),
            ttl: Duration::from_secs_f64(membership.ttl_s),
            ca: membership.ca.clone(),
            token_file: membership.token_file.clone(),
            namespace: membership.namespace.clone(),
        }
    }

    /// Section `[scheduler]`, which needs no model to be known.
    ///
    /// # Errors
    /// With all that is wrong in it.
    pub fn scheduler(&self) -> Result<SchedulerSettings, ConfigError> {
        let mut problems = Vec::new();
        let settings = SchedulerSettings::resolve(&self.scheduler, &mut problems);
        if problems.is_empty() {
            Ok(settings)
        } else {
            Err(ConfigError { problems })
        }
    }

    /// The directory with this process's certificate.
    pub fn certificates(&self) -> Option<&std::path::Path> {
        self.network.certificates.as_deref()
    }

    /// Host and port to listen on, which need no model to be known.
    pub fn address(&self) -> (&str, u16) {
        (&self.server.host, self.server.port)
    }
}

impl Settings {
    /// Gives every `auto` its value for `spec`, a model called `model_name`, with `available` bytes of memory to be had.
    ///
    /// # Errors
    /// With every contradiction between the configuration and the model.
    pub fn resolve(
        raw: &Raw,
        spec: &ModelSpec,
        model_name: &str,
        available: Option<u64>,
        demand: Demand,
    ) -> Result<Settings, ConfigError> {
        let mut problems = Vec::new();
        let dtype = match raw.model.dtype {
            Dtype::Auto => ComputeType::for_stored(spec.stored_as),
            Dtype::F32 => ComputeType::F32,
            Dtype::Bf16 => ComputeType::Bf16,
        };
        let cluster = &raw.cluster;
        if usize::from(cluster.expert_workers) > spec.experts {
            problems.push(Problem::derived(
                "cluster.expert_workers",
                format!(
                    "is {}, but the model has {} experts; each worker needs one",
                    cluster.expert_workers, spec.experts
                ),
            ));
        }
        if cluster.expert_replicas > cluster.expert_workers {
            problems.push(Problem::derived(
                "cluster.expert_replicas",
                format!(
                    "is {}, but there are {} expert workers, and each holds an expert once",
                    cluster.expert_replicas, cluster.expert_workers
                ),
            ));
        }
        if usize::from(cluster.spare_experts) > spec.experts {
            problems.push(Problem::derived(
                "cluster.spare_experts",
                format!(
                    "is {}, but the model has {} experts",
                    cluster.spare_experts, spec.experts
                ),
            ));
        }
        let context = context(raw, spec, &mut problems);
        let rows = raw.limits.max_batch_tokens;
        let prefill_tokens = match raw.limits.prefill_tokens {
            Auto::Auto => (rows / 2).max(1),
            Auto::Value(tokens) => tokens,
        };
        if prefill_tokens > rows {
            problems.push(Problem::derived(
                "limits.prefill_tokens",
                format!("is {prefill_tokens}, but a step has {rows} tokens at most (`limits.max_batch_tokens`)"),
            ));
        }
        let (body, bodies) = (raw.server.max_body, raw.server.bodies_memory);
        if body.0 > bodies.0 {
            problems.push(Problem::derived(
                "server.max_body",
                format!(
                    "is {body}, but there are {bodies} for all bodies (`server.bodies_memory`)"
                ),
            ));
        }
        let kv_blocks = kv_blocks(raw, spec, dtype, context, available, demand, &mut problems);
        let rdma = rdma(raw, &mut problems);
        let scheduler = SchedulerSettings::resolve(&raw.scheduler, &mut problems);
        if !problems.is_empty() {
            return Err(ConfigError { problems });
        }
        let timeline_spans = match (raw.trace.spans, &raw.trace.file) {
            (Auto::Value(spans), _) => spans,
            (Auto::Auto, Some(_)) => TRACE_SPANS_AUTO,
            (Auto::Auto, None) if matches!(demand, Demand::Serving) => SERVING_SPANS_AUTO,
            (Auto::Auto, None) => 0,
        };
        let server = &raw.server;
        Ok(Settings {
            model: ModelSettings {
                path: raw.model.path.clone(),
                name: raw
                    .model
                    .name
                    .clone()
                    .unwrap_or_else(|| model_name.to_owned()),
                load_format: raw.load_format(),
            },
            cluster: ClusterConfig {
                attention_workers: cluster.attention_workers,
                expert_workers: cluster.expert_workers,
                expert_replicas: cluster.expert_replicas,
                spare_experts: cluster.spare_experts,
                micro_batches: cluster.micro_batches,
                micro_batch_rows: match cluster.micro_batch_rows {
                    Auto::Auto => ClusterConfig::filling_rows(spec, cluster.attention_workers),
                    Auto::Value(rows) => rows,
                },
                threads: match cluster.threads {
                    Auto::Auto => ClusterConfig::cores(),
                    Auto::Value(threads) => threads,
                },
                dtype,
                quantize: match raw.model.quantize {
                    Quantize::None => None,
                    Quantize::Q8 => Some(Quantization::Q8),
                    Quantize::Q4 => Some(Quantization::Q4),
                },
                context,
                block_tokens: cluster.block_tokens,
                kv_blocks,
                max_rows: rows,
                prefill_tokens,
                max_waiting: raw.limits.max_waiting,
                peer_deadline: Duration::from_secs_f64(cluster.peer_deadline_s),
                timeline_spans,
            },
            scheduler,
            isolate: cluster.isolate,
            transport: cluster.transport,
            rdma,
            network: raw.network(),
            membership: raw.membership(),
            server: ServerSettings {
                host: server.host.clone(),
                port: server.port,
                api_key_file: server.api_key_file.clone(),
                max_body: server.max_body,
                bodies_memory: server.bodies_memory,
                body_timeout: Duration::from_secs_f64(server.body_timeout_s),
                max_connections: server.max_connections,
                max_head: server.max_head,
                head_timeout: Duration::from_secs_f64(server.head_timeout_s),
                stall_timeout: Duration::from_secs_f64(server.stall_timeout_s),
                request_timeout: Duration::from_secs_f64(server.request_timeout_s),
                drain_timeout: Duration::from_secs_f64(server.drain_timeout_s),
            },
            log: raw.log.clone(),
            trace: TraceSettings {
                file: raw.trace.file.clone(),
            },
        })
    }

    /// The resolved configuration as a `volley.toml` that means the same. `spec` is the model's.
    pub fn to_toml(&self, spec: &ModelSpec) -> String {
        let mut document = String::new();
        for section in keys::sections() {
            let _ = writeln!(
                document,
                "{}[{section}]",
                if document.is_empty() { "" } else { "\n" }
            );
            for key in keys::KEYS.iter().filter(|key| key.section() == section) {
                if let Some(value) = self.value(key.path, spec) {
                    let _ = writeln!(document, "{} = {value}", key.name());
                }
            }
        }
        document
    }

    /// The value of a key of the table; `None` where nothing is set.
    fn value(&self, path: &str, spec: &ModelSpec) -> Option<Value> {
        let integer = |n: u64| Some(Value::Integer(n as i64));
        let text = |text: &str| Some(Value::String(text.to_owned()));
        let file = |path: &Option<PathBuf>| {
            path.as_ref()
                .map(|path| Value::String(path.display().to_string()))
        };
        let seconds = |time: Duration| Some(Value::Float(time.as_secs_f64()));
        let cluster = &self.cluster;
        match path {
            "model.path" => file(&self.model.path),
            "model.name" => text(&self.model.name),
            "model.dtype" => text(&cluster.dtype.to_string()),
            "model.quantize" => text(&match cluster.quantize {
                Some(quantization) => quantization.to_string(),
                None => "none".to_owned(),
            }),
            "model.load_format" => text(match self.model.load_format {
                LoadFormat::Auto => "auto",
                LoadFormat::Dummy { .. } => "dummy",
            }),
            "cluster.attention_workers" => integer(cluster.attention_workers.into()),
            "cluster.expert_workers" => integer(cluster.expert_workers.into()),
            "cluster.isolate" => text(match self.isolate {
                Isolate::Thread => "thread",
                Isolate::Process => "process",
                Isolate::Host => "host",
            }),
            "cluster.transport" => text(self.transport.name()),
            "rdma.rails" => match &self.rdma.options.rails[..] {
                [] => text("auto"),
                rails => {
                    let rails: Vec<String> = rails.iter().map(ToString::to_string).collect();
                    text(&rails.join(", "))
                }
            },
            "rdma.gid_index" => match self.rdma.options.gid {
                GidChoice::Auto => text("auto"),
                GidChoice::Index(index) => integer(index.into()),
            },
            "rdma.traffic_class" => integer(self.rdma.options.traffic_class.into()),
            "rdma.service_level" => integer(self.rdma.options.service_level.into()),
            "rdma.mtu" => match self.rdma.options.mtu {
                None => text("auto"),
                Some(mtu) => integer(mtu.bytes().into()),
            },
            "rdma.timeout" => integer(self.rdma.options.timeout.into()),
            "rdma.retries" => integer(self.rdma.options.retries.into()),
            "rdma.depth" => integer(self.rdma.options.depth.into()),
            "rdma.inline_bytes" => integer(self.rdma.options.inline_bytes.into()),
            "rdma.pages" => text(match self.rdma.options.pages {
                Pages::Transparent => "transparent",
                Pages::Huge => "reserved",
            }),
            "rdma.known_anomalies" => file(&self.rdma.known_anomalies),
            "rdma.anomalies" => text(if self.rdma.avoid { "avoid" } else { "refuse" }),
            "rdma.spin" => integer(self.rdma.spin.0.into()),
            "membership.backend" => text(match self.membership.backend {
                MembershipBackend::Static => "static",
                MembershipBackend::Etcd => "etcd",
                MembershipBackend::Kubernetes => "kubernetes",
            }),
            "membership.endpoints" => text(&self.membership.endpoints),
            "membership.cluster" => text(&self.membership.cluster),
            "membership.ttl_s" => seconds(self.membership.ttl),
            "membership.ca" => file(&self.membership.ca),
            "membership.token_file" => file(&self.membership.token_file),
            "membership.namespace" => text(&self.membership.namespace),
            "scheduler.policy" => text(self.scheduler.policy()),
            "scheduler.weights" => self.scheduler.weights().map(Value::String),
            "scheduler.classes" => self.scheduler.classes().map(Value::String),
            "scheduler.target_s" => self.scheduler.target().and_then(seconds),
            "scheduler.pace_s" => seconds(self.scheduler.pace.unwrap_or_default()),
            "network.controller" => text(&self.network.controller),
            "network.listen" => self.network.listen.clone().map(Value::String),
            "network.certificates" => file(&self.network.certificates),
            "network.connections" => integer(self.network.connections.into()),
            "network.idle_s" => seconds(self.network.idle),
            "cluster.expert_replicas" => integer(cluster.expert_replicas.into()),
            "cluster.spare_experts" => integer(cluster.spare_experts.into()),
            "cluster.micro_batches" => integer(cluster.micro_batches.into()),
            "cluster.micro_batch_rows" => integer(cluster.micro_batch_rows.into()),
            "cluster.threads" => integer(cluster.threads as u64),
            "cluster.block_tokens" => integer(cluster.block_tokens.into()),
            "cluster.peer_deadline_s" => seconds(cluster.peer_deadline),
            "limits.max_context" => integer(cluster.context.into()),
            "limits.max_batch_tokens" => integer(cluster.max_rows.into()),
            "limits.prefill_tokens" => integer(cluster.prefill_tokens.into()),
            "limits.max_waiting" => integer(cluster.max_waiting as u64),
            "limits.kv_cache_memory" => {
                let block = kv_block_bytes(spec, cluster.dtype, cluster.block_tokens);
                integer(block * u64::from(cluster.kv_blocks))
            }
            "server.host" => text(&self.server.host),
            "server.port" => integer(self.server.port.into()),
            "server.api_key_file" => file(&self.server.api_key_file),
            "server.max_body" => integer(self.server.max_body.0),
            "server.bodies_memory" => integer(self.server.bodies_memory.0),
            "server.body_timeout_s" => seconds(self.server.body_timeout),
            "server.max_connections" => integer(self.server.max_connections as u64),
            "server.max_head" => integer(self.server.max_head.0),
            "server.head_timeout_s" => seconds(self.server.head_timeout),
            "server.stall_timeout_s" => seconds(self.server.stall_timeout),
            "server.request_timeout_s" => seconds(self.server.request_timeout),
            "server.drain_timeout_s" => seconds(self.server.drain_timeout),
            "log.level" => text(&self.log.level),
            "log.format" => text(match self.log.format {
                LogFormat::Text => "text",
                LogFormat::Json => "json",
            }),
            "trace.file" => file(&self.trace.file),
            "trace.spans" => integer(cluster.timeline_spans as u64),
            _ => None,
        }
    }
}

fn rdma(raw: &Raw, problems: &mut Vec<Problem>) -> RdmaSettings {
    let typed = &raw.rdma;
    let rails = match typed.rails.trim() {
        "auto" => Ok(Vec::new()),
        names => names
            .split(',')
            .map(|name| name.trim().parse::<RailName>())
            .collect(),
    };
    let rails = rails.unwrap_or_else(|error| {
        problems.push(Problem::derived("rdma.rails", error.to_string()));
        Vec::new()
    });
    let mtu = match typed.mtu {
        Auto::Auto => None,
        Auto::Value(bytes) => {
            let mtu = Mtu::from_bytes(bytes);
            if mtu.is_none() {
                let message = format!("is {bytes}; there are 256, 512, 1024, 2048 and 4096");
                problems.push(Problem::derived("rdma.mtu", message));
            }
            mtu
        }
    };
    let options = RdmaOptions {
        rails,
        gid: match typed.gid_index {
            Auto::Auto => GidChoice::Auto,
            Auto::Value(index) => GidChoice::Index(index),
        },
        traffic_class: typed.traffic_class,
        service_level: typed.service_level,
        mtu,
        timeout: typed.timeout,
        retries: typed.retries,
        depth: typed.depth,
        inline_bytes: typed.inline_bytes,
        pages: match typed.pages {
            SlotPages::Transparent => Pages::Transparent,
            SlotPages::Reserved => Pages::Huge,
        },
        port_patience: Duration::from_secs_f64(raw.network.idle_s),
    };
    RdmaSettings {
        options,
        spin: Spin(typed.spin),
        known_anomalies: typed.known_anomalies.clone(),
        avoid: typed.anomalies == OnAnomaly::Avoid,
    }
}

fn context(raw: &Raw, spec: &ModelSpec, problems: &mut Vec<Problem>) -> u32 {
    let model_max = u32::try_from(spec.max_positions).unwrap_or(u32::MAX);
    match raw.limits.max_context {
        Auto::Auto => model_max.min(CONTEXT_AUTO_MAX),
        Auto::Value(context) if context > model_max => {
            let message =
                format!("is {context}, but the model was made for {model_max} tokens at most");
            problems.push(Problem::derived("limits.max_context", message));
            model_max
        }
        Auto::Value(context) => context,
    }
}

/// Bytes of one block of KV cache: keys and values of every layer.
fn kv_block_bytes(spec: &ModelSpec, dtype: ComputeType, block_tokens: u32) -> u64 {
    let token = 2 * spec.layers.len() * spec.kv_heads * spec.head_dim * dtype.bytes();
    token as u64 * u64::from(block_tokens)
}

/// Blocks of KV cache of each attention worker: at least enough for one sequence of full length.
fn kv_blocks(
    raw: &Raw,
    spec: &ModelSpec,
    dtype: ComputeType,
    context: u32,
    available: Option<u64>,
    demand: Demand,
    problems: &mut Vec<Problem>,
) -> u32 {
    let block_tokens = raw.cluster.block_tokens;
    let block = kv_block_bytes(spec, dtype, block_tokens);
    let workers = u64::from(raw.cluster.attention_workers);
    let one_context = u64::from(context.div_ceil(block_tokens));
    let blocks = match raw.limits.kv_cache_memory {
        Auto::Value(ByteSize(bytes)) => bytes / block,
        Auto::Auto => {
            let wanted = match demand {
                Demand::Serving => KV_CONTEXTS_AUTO * one_context,
                Demand::Batch { sequences, tokens } => {
                    let each = u64::from(tokens.min(context).div_ceil(block_tokens));
                    (u64::from(sequences).div_ceil(workers) * each).max(one_context)
                }
            };
            wanted.min(available.map_or(u64::MAX, |bytes| bytes / KV_SHARE_AUTO / workers / block))
        }
    };
    if blocks < one_context {
        let source = match (raw.limits.kv_cache_memory, available) {
            (Auto::Auto, Some(available)) => {
                let available = ByteSize(available);
                format!(
                    "`auto` (a quarter of the {available} available, over {workers} attention workers)"
                )
            }
            (Auto::Auto, None) => "`auto`".to_owned(),
            (Auto::Value(size), _) => size.to_string(),
        };
        problems.push(Problem::derived(
            "limits.kv_cache_memory",
            format!(
                "is {source}, which holds {blocks} blocks of {}; one sequence of {context} tokens needs {one_context} ({}). \
                 Lower `limits.max_context` or give more memory",
                ByteSize(block),
                ByteSize(block * one_context)
            ),
        ));
    }
    u32::try_from(blocks).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
