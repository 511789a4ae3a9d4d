//! Every key of `volley.toml`, once: its place, its kind and range, its default, its flag and what it means.
//!
//! The reader refuses what is not in this table, environment variables are named after it, and `docs/configuration.md` is
//! held against it by a test.

use std::fmt::Write as _;

use super::kind::Kind;

/// One key of the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Section and name, as in `server.port`.
    pub path: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// Its default as it would be typed, or what holds when it is absent.
    pub default: Default,
    /// The flag that sets it, on the commands that have it.
    pub flag: Option<&'static str>,
    /// What it decides, for the manual.
    pub help: &'static str,
}

/// What holds when a key is not given.
#[derive(Debug, Clone, Copy)]
pub enum Default {
    /// This value, in TOML's or the environment's spelling.
    Value(&'static str),
    /// Nothing is set; the text says what that means.
    Unset(&'static str),
}

/// What every variable begins with.
pub const VARIABLE_PREFIX: &str = "VOLLEY_";

impl Key {
    /// The environment variable that sets it: `server.port` is `VOLLEY_SERVER_PORT`.
    pub fn variable(&self) -> String {
        format!(
            "{VARIABLE_PREFIX}{}",
            self.path.replace('.', "_").to_uppercase()
        )
    }

    /// The section it stands in.
    pub fn section(&self) -> &'static str {
        self.path.split('.').next().unwrap_or(self.path)
    }

    /// Its name within the section.
    pub fn name(&self) -> &'static str {
        self.path.split('.').nth(1).unwrap_or(self.path)
    }
}

/// The key at `path`.
pub fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// Names of the sections, in order.
pub fn sections() -> Vec<&'static str> {
    let mut sections: Vec<_> = KEYS.iter().map(Key::section).collect();
    sections.dedup();
    sections
}

/// The tables of `docs/configuration.md`, one for each section.
pub fn markdown() -> String {
    let mut text = String::new();
    for section in sections() {
        let _ = writeln!(text, "### `[{section}]`\n");
        let _ = writeln!(
            text,
            "| Key | Values | Default | Flag | Variable | Meaning |"
        );
        let _ = writeln!(text, "|---|---|---|---|---|---|");
        for key in KEYS.iter().filter(|key| key.section() == section) {
            let default = match key.default {
                Default::Value(value) => format!("`{value}`"),
                Default::Unset(meaning) => meaning.to_owned(),
            };
            let flag = key
                .flag
                .map_or_else(|| "—".to_owned(), |flag| format!("`--{flag}`"));
            let _ = writeln!(
                text,
                "| `{}` | {} | {default} | {flag} | `{}` | {} |",
                key.name(),
                key.kind,
                key.variable(),
                key.help
            );
        }
        text.push('\n');
    }
    text
}

/// Types to compute in.
pub const DTYPES: &[&str] = &["auto", "f32", "bf16"];
/// What weights are quantised to.
pub const QUANTIZATIONS: &[&str] = &["none", "q8", "q4"];
/// Where workers run.
pub const ISOLATIONS: &[&str] = &["thread", "process", "host"];
/// What carries rows between processes.
pub const TRANSPORTS: &[&str] = &["quic", "rdma"];
/// Who comes first.
pub const POLICIES: &[&str] = &["first-come", "fair-share", "earliest-deadline"];
/// Which pages RDMA's slots are made of.
pub const PAGES: &[&str] = &["transparent", "reserved"];
/// Where weights come from.
pub const LOAD_FORMATS: &[&str] = &["auto", "dummy"];
/// Shapes of log lines.
pub const LOG_FORMATS: &[&str] = &["text", "json"];

/// Every key, by section, in the order of the manual.
pub const KEYS: &[Key] = &[
    Key {
        path: "model.path",
        kind: Kind::Path,
        default: Default::Unset("the demo model inside the program"),
        flag: Some("model"),
        help: "Directory of the model: `config.json`, safetensors, `tokenizer.json`.",
    },
    Key {
        path: "model.name",
        kind: Kind::Text,
        default: Default::Unset("the directory's name"),
        flag: Some("served-model-name"),
        help: "What the model is called in the API.",
    },
    Key {
        path: "model.dtype",
        kind: Kind::Choice(DTYPES),
        default: Default::Value("auto"),
        flag: Some("dtype"),
        help: "Type of packed weights and KV cache. `auto`: bf16 if the weights are stored in bf16, else f32.",
    },
    Key {
        path: "model.quantize",
        kind: Kind::Choice(QUANTIZATIONS),
        default: Default::Value("none"),
        flag: Some("quantize"),
        help: "Fewer bits for weights, made while they are loaded; the KV cache keeps `dtype`. `q8`: 8 bits, half the memory of bf16, nearly its answers. `q4`: 4 bits for experts and 8 for the rest, faster and less exact; see `docs/performance.md`.",
    },
    Key {
        path: "model.load_format",
        kind: Kind::Choice(LOAD_FORMATS),
        default: Default::Value("auto"),
        flag: Some("load-format"),
        help: "`auto` reads the safetensors files; `dummy` fills in seeded random weights: `config.json` is all that `bench` and `trace` need then, the others also a tokenizer.",
    },
    Key {
        path: "cluster.attention_workers",
        kind: Kind::Integer { min: 1, max: 256 },
        default: Default::Value("1"),
        flag: Some("attention-workers"),
        help: "Attention workers (M). Each holds all attention weights and the KV cache of its own requests.",
    },
    Key {
        path: "cluster.expert_workers",
        kind: Kind::Integer { min: 1, max: 256 },
        default: Default::Value("1"),
        flag: Some("expert-workers"),
        help: "Expert workers (N). Each holds its share of every layer's experts; at most one worker per expert.",
    },
    Key {
        path: "cluster.isolate",
        kind: Kind::Choice(ISOLATIONS),
        default: Default::Value("thread"),
        flag: Some("isolate"),
        help: "Where workers run. `thread`: in the server's own process. `process`: in processes of their own on this machine, which the server starts and restarts. `host`: wherever `volley worker` is started; they join the server.",
    },
    Key {
        path: "cluster.transport",
        kind: Kind::Choice(TRANSPORTS),
        default: Default::Value("quic"),
        flag: Some("transport"),
        help: "What carries rows between workers in processes of their own. `quic`: any network. `rdma`: RoCE or InfiniBand, through libibverbs; see `[rdma]`. Within one process neither is used.",
    },
    Key {
        path: "cluster.expert_replicas",
        kind: Kind::Integer { min: 1, max: 256 },
        default: Default::Value("1"),
        flag: Some("expert-replicas"),
        help: "Expert workers that hold each expert (R): when one is lost, the next goes on with it at once. Takes R times the memory of the experts.",
    },
    Key {
        path: "cluster.spare_experts",
        kind: Kind::Integer { min: 0, max: 4096 },
        default: Default::Value("0"),
        flag: Some("spare-experts"),
        help: "Experts of a layer that a worker has room to take over from lost workers, beside its own. With 0 an expert that nobody else holds waits until its worker is back.",
    },
    Key {
        path: "cluster.micro_batches",
        kind: Kind::Integer { min: 1, max: 8 },
        default: Default::Value("2"),
        flag: Some("micro-batches"),
        help: "Micro-batches in flight (m). 1 switches the ping-pong off; 2 hides one side behind the other; more hide the network too.",
    },
    Key {
        path: "cluster.micro_batch_rows",
        kind: Kind::AutoInteger {
            min: 1,
            max: 1_048_576,
        },
        default: Default::Value("auto"),
        flag: Some("micro-batch-rows"),
        help: "Rows (tokens of a step) that each micro-batch of a worker has before another is opened: each makes the experts read their weights again. `auto`: 16 for each expert on average; 1 always spreads over all micro-batches.",
    },
    Key {
        path: "cluster.threads",
        kind: Kind::AutoInteger { min: 1, max: 4096 },
        default: Default::Value("auto"),
        flag: Some("threads"),
        help: "Threads that compute. Each worker has one, and helps others when it has nothing to do; threads beyond the workers only help. `auto`: one for each core.",
    },
    Key {
        path: "cluster.block_tokens",
        kind: Kind::Integer { min: 1, max: 1024 },
        default: Default::Value("16"),
        flag: None,
        help: "Tokens of one KV cache block.",
    },
    Key {
        path: "cluster.peer_deadline_s",
        kind: Kind::Seconds {
            min: 0.1,
            max: 3600.0,
        },
        default: Default::Value("30"),
        flag: None,
        help: "Seconds an attention worker waits for an expert worker's frame before it calls that worker lost; expert workers wait three quarters of it for attention workers.",
    },
    Key {
        path: "limits.max_context",
        kind: Kind::AutoInteger {
            min: 2,
            max: 16_777_216,
        },
        default: Default::Value("auto"),
        flag: Some("max-context"),
        help: "Longest sequence, prompt and output together, in tokens. `auto`: what the model allows, but not more than 8192.",
    },
    Key {
        path: "limits.max_batch_tokens",
        kind: Kind::Integer {
            min: 1,
            max: 65_536,
        },
        default: Default::Value("512"),
        flag: Some("max-batch-tokens"),
        help: "Tokens one attention worker computes at most in a step; the size of slots and scratch.",
    },
    Key {
        path: "limits.prefill_tokens",
        kind: Kind::AutoInteger {
            min: 1,
            max: 65_536,
        },
        default: Default::Value("auto"),
        flag: None,
        help: "Prompt tokens in one step at most; longer prompts are computed in chunks. `auto`: half of `max_batch_tokens`.",
    },
    Key {
        path: "limits.max_waiting",
        kind: Kind::Integer {
            min: 1,
            max: 1_000_000,
        },
        default: Default::Value("1024"),
        flag: Some("max-waiting"),
        help: "Requests that may wait for a place; more are refused with status 503.",
    },
    Key {
        path: "limits.kv_cache_memory",
        kind: Kind::AutoSize,
        default: Default::Value("auto"),
        flag: Some("kv-cache-memory"),
        help: "KV cache of each attention worker. `auto`: room for 16 sequences of full length, but together not more than a quarter of the memory available at start.",
    },
    Key {
        path: "scheduler.policy",
        kind: Kind::Choice(POLICIES),
        default: Default::Value("first-come"),
        flag: Some("policy"),
        help: "Who starts next. `first-come`: who arrived first. `fair-share`: the tenant (`user` of a request) that got the least for its weight. `earliest-deadline`: whose first token is due first by its class (`priority` of a request). See `docs/schedulers.md`.",
    },
    Key {
        path: "scheduler.weights",
        kind: Kind::Text,
        default: Default::Unset("all tenants alike"),
        flag: Some("tenant-weights"),
        help: "For `fair-share`: weights of tenants, as in `search=4,batch=0.25`; `*` is everybody who is not named, 1 if it is not given.",
    },
    Key {
        path: "scheduler.classes",
        kind: Kind::Text,
        default: Default::Unset("one class for all"),
        flag: Some("slo-classes"),
        help: "For `earliest-deadline`: the least priority of each class and its seconds to the first token, as in `10=0.5,0=5`.",
    },
    Key {
        path: "scheduler.target_s",
        kind: Kind::Seconds {
            min: 0.001,
            max: 86_400.0,
        },
        default: Default::Value("60"),
        flag: Some("slo-target"),
        help: "For `earliest-deadline`: seconds to the first token of requests below every class.",
    },
    Key {
        path: "scheduler.pace_s",
        kind: Kind::Seconds {
            min: 0.0,
            max: 60.0,
        },
        default: Default::Value("0"),
        flag: Some("pace"),
        help: "Seconds that a step should take, with any policy: sequences start only while decoding stays within it, and prompts are cut to fit. 0: as long as steps take.",
    },
    Key {
        path: "network.controller",
        kind: Kind::Text,
        default: Default::Value("127.0.0.1:7600"),
        flag: Some("controller"),
        help: "HOST:PORT (UDP) where the server takes workers' calls and workers call it, with `isolate = \"host\"`. Workers look the name up again before each call.",
    },
    Key {
        path: "network.listen",
        kind: Kind::Text,
        default: Default::Unset(
            "the server: all addresses and the port of `controller`; a worker: all addresses and any free port",
        ),
        flag: Some("listen"),
        help: "HOST:PORT (UDP) to listen on. Peers reach a worker at the address that its calls come from, so between the two there must be no translation of addresses.",
    },
    Key {
        path: "network.certificates",
        kind: Kind::Path,
        default: Default::Unset("needed with `isolate = \"host\"`"),
        flag: Some("certificates"),
        help: "Directory with `ca.pem`, `node.pem` and `node.key` of this process; `volley certs` makes it.",
    },
    Key {
        path: "network.connections",
        kind: Kind::Integer { min: 1, max: 16 },
        default: Default::Value("2"),
        flag: None,
        help: "QUIC connections of each pair of attention and expert worker; each is encrypted by one core at a time.",
    },
    Key {
        path: "network.idle_s",
        kind: Kind::Seconds {
            min: 0.1,
            max: 600.0,
        },
        default: Default::Value("0.8"),
        flag: None,
        help: "Seconds without a sign of life after which a process is taken for lost. Living ones show one five times as often.",
    },
    Key {
        path: "rdma.rails",
        kind: Kind::Text,
        default: Default::Value("auto"),
        flag: None,
        help: "Ports that rows travel by, as in `mlx5_0, mlx5_1:2`, in the same order on every host: first goes to first. Micro-batches are spread over them. `auto`: all that carry traffic.",
    },
    Key {
        path: "rdma.gid_index",
        kind: Kind::AutoInteger { min: 0, max: 255 },
        default: Default::Value("auto"),
        flag: None,
        help: "Which of a port's addresses is used (`ibv_devinfo -v` lists them). `auto`: by its type, RoCEv2 over IPv4 first.",
    },
    Key {
        path: "rdma.traffic_class",
        kind: Kind::Integer { min: 0, max: 255 },
        default: Default::Value("0"),
        flag: None,
        help: "DSCP (upper six bits) and ECN of RoCEv2 packets: what switches tell this traffic apart by. Acknowledgements have the same.",
    },
    Key {
        path: "rdma.service_level",
        kind: Kind::Integer { min: 0, max: 15 },
        default: Default::Value("0"),
        flag: None,
        help: "Service level on InfiniBand, VLAN priority on RoCE.",
    },
    Key {
        path: "rdma.mtu",
        kind: Kind::AutoInteger {
            min: 256,
            max: 4096,
        },
        default: Default::Value("auto"),
        flag: None,
        help: "Bytes of payload in a packet: 256, 512, 1024, 2048 or 4096. `auto`: as much as both ports take.",
    },
    Key {
        path: "rdma.timeout",
        kind: Kind::Integer { min: 1, max: 31 },
        default: Default::Value("14"),
        flag: None,
        help: "An acknowledgement is waited for 4.096 us times 2 to this power (14: 67 ms) before a packet is sent again.",
    },
    Key {
        path: "rdma.retries",
        kind: Kind::Integer { min: 0, max: 7 },
        default: Default::Value("7"),
        flag: None,
        help: "How often a packet is sent again before the peer is lost.",
    },
    Key {
        path: "rdma.depth",
        kind: Kind::Integer {
            min: 2,
            max: 16_384,
        },
        default: Default::Value("64"),
        flag: None,
        help: "Frames to one peer and rail that may wait to be acknowledged; never less than two for each micro-batch.",
    },
    Key {
        path: "rdma.inline_bytes",
        kind: Kind::Integer { min: 0, max: 4096 },
        default: Default::Value("220"),
        flag: None,
        help: "Frames up to this length travel inside their request, so that the card need not fetch them; the card must offer as much.",
    },
    Key {
        path: "rdma.pages",
        kind: Kind::Choice(PAGES),
        default: Default::Value("transparent"),
        flag: None,
        help: "What slots are made of. `reserved`: huge pages set aside with `vm.nr_hugepages`, fewer for the card to keep track of.",
    },
    Key {
        path: "rdma.spin",
        kind: Kind::Integer {
            min: 0,
            max: 100_000_000,
        },
        default: Default::Value("1000"),
        flag: None,
        help: "How often a worker that waits looks for a frame before it sleeps. More costs processor time and saves microseconds.",
    },
    Key {
        path: "rdma.known_anomalies",
        kind: Kind::Path,
        default: Default::Unset("nothing is known"),
        flag: None,
        help: "Anomalies of the fabric that `volley vet search` has found; a worker whose traffic would meet one does not start.",
    },
    Key {
        path: "rdma.anomalies",
        kind: Kind::Choice(&["refuse", "avoid"]),
        default: Default::Value("refuse"),
        flag: None,
        help: "What is done with traffic that meets a known anomaly. `refuse`: the worker says which and what would help. `avoid`: MTU and depth are changed, if that helps, and the log says so.",
    },
    Key {
        path: "membership.backend",
        kind: Kind::Choice(&["static", "etcd", "kubernetes"]),
        default: Default::Value("static"),
        flag: Some("membership"),
        help: "How processes of a cluster find each other. `static`: the controller is at `network.controller`. `etcd`, `kubernetes`: they look it up there, offices are elected there, and an outage of it stops nothing.",
    },
    Key {
        path: "membership.endpoints",
        kind: Kind::Text,
        default: Default::Value("http://127.0.0.1:2379"),
        flag: Some("membership-endpoints"),
        help: "URLs of etcd's servers, or of the Kubernetes API, with commas between them. In a Pod the API is `https://kubernetes.default.svc`.",
    },
    Key {
        path: "membership.cluster",
        kind: Kind::Text,
        default: Default::Value("volley"),
        flag: Some("membership-cluster"),
        help: "Name of the cluster: etcd keys are under `/volley/NAME/`; Pods have the label `volley/cluster=NAME`, and Leases are called `NAME-controller` and `NAME-scheduler`.",
    },
    Key {
        path: "membership.ttl_s",
        kind: Kind::Seconds {
            min: 2.0,
            max: 600.0,
        },
        default: Default::Value("10"),
        flag: None,
        help: "Seconds that an office and what a process announces outlive their last renewal, which comes three times as often. Short times turn a blip of the backend into elections.",
    },
    Key {
        path: "membership.ca",
        kind: Kind::Path,
        default: Default::Unset(
            "needed for `https`; in a Pod `/var/run/secrets/kubernetes.io/serviceaccount/ca.crt`",
        ),
        flag: Some("membership-ca"),
        help: "File with the authority's certificate that the endpoints' certificates are signed by.",
    },
    Key {
        path: "membership.token_file",
        kind: Kind::Path,
        default: Default::Unset(
            "in a Pod `/var/run/secrets/kubernetes.io/serviceaccount/token`; etcd takes none",
        ),
        flag: Some("membership-token-file"),
        help: "File with the bearer token for the Kubernetes API, read again before each request.",
    },
    Key {
        path: "membership.namespace",
        kind: Kind::Text,
        default: Default::Value("default"),
        flag: None,
        help: "Kubernetes namespace of Pods and Leases.",
    },
    Key {
        path: "server.host",
        kind: Kind::Text,
        default: Default::Value("127.0.0.1"),
        flag: Some("host"),
        help: "Address to listen on; `0.0.0.0` is every IPv4 interface.",
    },
    Key {
        path: "server.port",
        kind: Kind::Integer {
            min: 0,
            max: 65_535,
        },
        default: Default::Value("8000"),
        flag: Some("port"),
        help: "Port to listen on; 0 lets the system choose one.",
    },
    Key {
        path: "server.api_key_file",
        kind: Kind::Path,
        default: Default::Unset("no key is asked for"),
        flag: Some("api-key-file"),
        help: "File with the key that clients send as `Authorization: Bearer`. The key is the file's text without surrounding white space.",
    },
    Key {
        path: "server.max_body",
        kind: Kind::Size,
        default: Default::Value("4MiB"),
        flag: None,
        help: "Largest request body.",
    },
    Key {
        path: "server.bodies_memory",
        kind: Kind::Size,
        default: Default::Value("256MiB"),
        flag: None,
        help: "Memory for the bodies of all requests that are arriving; a request beyond it gets status 503.",
    },
    Key {
        path: "server.body_timeout_s",
        kind: Kind::Seconds {
            min: 0.1,
            max: 86_400.0,
        },
        default: Default::Value("60"),
        flag: None,
        help: "Seconds a request's body may take to arrive; then it gets status 408.",
    },
    Key {
        path: "server.max_connections",
        kind: Kind::Integer {
            min: 1,
            max: 1_000_000,
        },
        default: Default::Value("4096"),
        flag: None,
        help: "HTTP connections at once. One more takes the place of the one that has rested longest, or gets status 503 if each has a request at work. Each is an open file.",
    },
    Key {
        path: "server.max_head",
        kind: Kind::Size,
        default: Default::Value("32KiB"),
        flag: None,
        help: "Largest head of a request (first line and headers, of which there may be 100), and size of a connection's buffers; at least 8 KiB.",
    },
    Key {
        path: "server.head_timeout_s",
        kind: Kind::Seconds {
            min: 0.1,
            max: 86_400.0,
        },
        default: Default::Value("10"),
        flag: None,
        help: "Seconds a request's head may take to arrive, and a connection may rest; then it is closed.",
    },
    Key {
        path: "server.stall_timeout_s",
        kind: Kind::Seconds {
            min: 1.0,
            max: 86_400.0,
        },
        default: Default::Value("60"),
        flag: None,
        help: "Seconds after which a client is gone that takes nothing of what is sent to it, or whose machine gives no sign of life.",
    },
    Key {
        path: "server.request_timeout_s",
        kind: Kind::Seconds {
            min: 0.1,
            max: 86_400.0,
        },
        default: Default::Value("600"),
        flag: None,
        help: "Seconds a request may take from arrival to its last token.",
    },
    Key {
        path: "server.drain_timeout_s",
        kind: Kind::Seconds {
            min: 0.0,
            max: 86_400.0,
        },
        default: Default::Value("30"),
        flag: None,
        help: "Seconds that running requests are given to finish after SIGTERM or Ctrl-C. A second signal ends the wait.",
    },
    Key {
        path: "log.level",
        kind: Kind::Filter,
        default: Default::Value("info"),
        flag: Some("log-level"),
        help: "What is logged: a level, or directives such as `info,volley_actors=debug`.",
    },
    Key {
        path: "log.format",
        kind: Kind::Choice(LOG_FORMATS),
        default: Default::Value("text"),
        flag: Some("log-format"),
        help: "Shape of log lines on standard error.",
    },
    Key {
        path: "trace.file",
        kind: Kind::Path,
        default: Default::Unset("no trace is written"),
        flag: Some("trace"),
        help: "File for a timeline of all workers in Chrome's trace format, written at the end; opens in Perfetto.",
    },
    Key {
        path: "trace.spans",
        kind: Kind::AutoInteger {
            min: 0,
            max: 10_000_000,
        },
        default: Default::Value("auto"),
        flag: None,
        help: "Spans of the timeline kept for each worker; older ones are dropped. `auto`: 65536 if `file` is set, else 8192 for a server (its page shows the last steps) and 0 for others.",
    },
];
