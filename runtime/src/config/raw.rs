//! The first stage: what was typed, layer over layer, each checked against the table of keys.

use std::path::{Path, PathBuf};

use config::{Config, File, FileFormat, Map, Source, Value, ValueKind};
use serde::{Deserialize, Deserializer};

use super::keys::{self, Default as KeyDefault, KEYS, VARIABLE_PREFIX};
use super::problem::{ConfigError, Place, Problem};
use super::size::ByteSize;
use super::suggest;

/// A configuration as it was typed, with the table's defaults underneath: types and ranges are right, `auto` is still `auto`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Raw {
    pub(super) model: RawModel,
    pub(super) cluster: RawCluster,
    pub(super) limits: RawLimits,
    pub(super) scheduler: RawScheduler,
    pub(super) network: RawNetwork,
    pub(super) rdma: RawRdma,
    pub(super) membership: RawMembership,
    pub(super) server: RawServer,
    /// What is logged, and how: known before the model is.
    pub log: LogSettings,
    pub(super) trace: RawTrace,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct RawModel {
    pub(super) path: Option<PathBuf>,
    pub(super) name: Option<String>,
    pub(super) dtype: Dtype,
    pub(super) quantize: Quantize,
    pub(super) load_format: WeightsFrom,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct RawCluster {
    pub(super) attention_workers: u16,
    pub(super) expert_workers: u16,
    pub(super) isolate: Isolate,
    pub(super) transport: Transport,
    pub(super) expert_replicas: u16,
    pub(super) spare_experts: u16,
    pub(super) micro_batches: u8,
    pub(super) micro_batch_rows: Auto<u32>,
    pub(super) threads: Auto<usize>,
    pub(super) block_tokens: u32,
    pub(super) peer_deadline_s: f64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct RawLimits {
    pub(super) max_context: Auto<u32>,
    pub(super) max_batch_tokens: u32,
    pub(super) prefill_tokens: Auto<u32>,
    pub(super) max_waiting: usize,
    pub(super) kv_cache_memory: Auto<ByteSize>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct RawScheduler {
    pub(super) policy: PolicyName,
    pub(super) weights: Option<String>,
    pub(super) classes: Option<String>,
    pub(super) target_s: f64,
    pub(super) pace_s: f64,
}

/// A shipped policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum PolicyName {
    FirstCome,
    FairShare,
    EarliestDeadline,
}

impl PolicyName {
    /// As it is written in the configuration.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::FirstCome => "first-come",
            Self::FairShare => "fair-share",
            Self::EarliestDeadline => "earliest-deadline",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct RawNetwork {
    pub(super) controller: String,
    pub(super) listen: Option<String>,
    pub(super) certificates: Option<PathBuf>,
    pub(super) connections: u8,
    pub(super) idle_s: f64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct RawRdma {
    pub(super) rails: String,
    pub(super) gid_index: Auto<u8>,
    pub(super) traffic_class: u8,
    pub(super) service_level: u8,
    pub(super) mtu: Auto<u32>,
    pub(super) timeout: u8,
    pub(super) retries: u8,
    pub(super) depth: u32,
    pub(super) inline_bytes: u32,
    pub(super) pages: SlotPages,
    pub(super) spin: u32,
    pub(super) known_anomalies: Option<PathBuf>,
    pub(super) anomalies: OnAnomaly,
}

/// What is done with traffic that meets a known anomaly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum OnAnomaly {
    Refuse,
    Avoid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum SlotPages {
    Transparent,
    Reserved,
}

/// What carries rows between processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Any network.
    Quic,
    /// RoCE or InfiniBand.
    Rdma,
}

impl Transport {
    /// As it is written in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Rdma => "rdma",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct RawMembership {
    pub(super) backend: MembershipBackend,
    pub(super) endpoints: String,
    pub(super) cluster: String,
    pub(super) ttl_s: f64,
    pub(super) ca: Option<PathBuf>,
    pub(super) token_file: Option<PathBuf>,
    pub(super) namespace: String,
}

/// How processes of a cluster find each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MembershipBackend {
    /// By the configuration.
    Static,
    /// Through etcd.
    Etcd,
    /// Through the API of Kubernetes.
    Kubernetes,
}

/// Where workers run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolate {
    /// On threads of the server's process.
    Thread,
    /// In processes that the server starts.
    Process,
    /// In processes that join the server.
    Host,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct RawServer {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) api_key_file: Option<PathBuf>,
    pub(super) max_body: ByteSize,
    pub(super) bodies_memory: ByteSize,
    pub(super) body_timeout_s: f64,
    pub(super) max_connections: usize,
    pub(super) max_head: ByteSize,
    pub(super) head_timeout_s: f64,
    pub(super) stall_timeout_s: f64,
    pub(super) request_timeout_s: f64,
    pub(super) drain_timeout_s: f64,
}

/// Section `[log]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct LogSettings {
    /// A level or directives.
    pub level: String,
    /// Shape of a line.
    pub format: LogFormat,
}

/// Shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct RawTrace {
    pub(super) file: Option<PathBuf>,
    pub(super) spans: Auto<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Dtype {
    Auto,
    F32,
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Quantize {
    None,
    Q8,
    Q4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum WeightsFrom {
    Auto,
    Dummy,
}

/// A value, or the word `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Auto<T> {
    Auto,
    Value(T),
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Auto<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum Word {
            Auto,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either<T> {
            Word(Word),
            Value(T),
        }
        Ok(match Either::deserialize(deserializer)? {
            Either::Word(Word::Auto) => Auto::Auto,
            Either::Value(value) => Auto::Value(value),
        })
    }
}

/// Values from the command line: keys, and the text that was typed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FlagValues {
    given: Vec<(&'static str, String)>,
    defaults: Vec<(&'static str, String)>,
}

impl FlagValues {
    /// Takes over a flag that was given; `key` is the path of a key in the table.
    pub fn set(&mut self, key: &'static str, value: Option<impl ToString>) {
        debug_assert!(
            keys::find(key).is_some_and(|key| key.flag.is_some()),
            "no key with a flag: {key}"
        );
        self.given
            .extend(value.map(|value| (key, value.to_string())));
    }

    /// Lays a command's own default over the table's, under everything that was typed.
    pub fn set_default(&mut self, key: &'static str, value: impl ToString) {
        self.defaults.push((key, value.to_string()));
    }
}

impl Raw {
    /// Lays flags over `variables` over `file` over the defaults.
    ///
    /// # Errors
    /// With everything that is wrong in any layer: unknown keys with the one that was probably meant, wrong types, values out of range.
    pub fn load(
        file: Option<&Path>,
        variables: impl IntoIterator<Item = (String, String)>,
        flags: &FlagValues,
    ) -> Result<Raw, ConfigError> {
        let mut problems = Vec::new();
        let mut layers =
            Config::builder().add_source(Layer(read_flags(&flags.defaults, &mut problems)));
        if let Some(path) = file {
            let values = read_file(path, &mut problems);
            layers = layers.add_source(Layer(values));
        }
        let values = read_variables(variables, &mut problems);
        layers = layers.add_source(Layer(values));
        let values = read_flags(&flags.given, &mut problems);
        layers = layers.add_source(Layer(values));
        if !problems.is_empty() {
            return Err(ConfigError { problems });
        }
        for key in KEYS {
            if let KeyDefault::Value(text) = key.default {
                // The table's own values are right: a test reads them all.
                let value = key.kind.parse(text).unwrap_or(ValueKind::Nil);
                layers = layers.set_default(key.path, value).map_err(internal)?;
            }
        }
        let merged = layers.build().map_err(internal)?;
        merged.try_deserialize().map_err(internal)
    }
}

/// The process's own environment, without variables that are no text.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// What the layers' checks did not foresee; it can only come from a key whose table entry contradicts its field.
fn internal(error: config::ConfigError) -> ConfigError {
    ConfigError {
        problems: vec![Problem::derived("", error.to_string())],
    }
}

/// A layer's values, by key path, as a source of the `config` crate.
#[derive(Debug, Clone, Default)]
struct Layer(Vec<(&'static str, ValueKind)>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, config::ConfigError> {
        let mut sections: Map<String, Map<String, Value>> = Map::new();
        for (path, value) in &self.0 {
            if let Some((section, name)) = path.split_once('.') {
                let value = Value::new(None, value.clone());
                sections
                    .entry(section.to_owned())
                    .or_default()
                    .insert(name.to_owned(), value);
            }
        }
        Ok(sections
            .into_iter()
            .map(|(name, table)| (name, Value::new(None, ValueKind::Table(table))))
            .collect())
    }
}

/// Values of a file, with its unknown keys and wrong values among the problems.
fn read_file(path: &Path, problems: &mut Vec<Problem>) -> Vec<(&'static str, ValueKind)> {
    let mut refuse = |key: &str, message: String| {
        problems.push(Problem {
            place: Place::File(path.to_owned()),
            key: key.to_owned(),
            message,
        });
    };
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            refuse("", format!("cannot be read: {error}"));
            return Vec::new();
        }
    };
    let sections = match File::from_str(&text, FileFormat::Toml).collect() {
        Ok(sections) => sections,
        Err(error) => {
            refuse("", format!("is not TOML: {}", error.to_string().trim_end()));
            return Vec::new();
        }
    };
    let mut values = Vec::new();
    for (section, table) in in_order(sections) {
        let ValueKind::Table(table) = table.kind else {
            match suggest::key(&section) {
                Some(key) => refuse(
                    &section,
                    format!("is not a key of its own; did you mean `{key}`?"),
                ),
                None => refuse(&section, unknown("section", suggest::section(&section))),
            }
            continue;
        };
        if !keys::sections().contains(&section.as_str()) {
            let suggestion =
                suggest::section(&section).map(|name| format!("did you mean `[{name}]`?"));
            let sections = keys::sections().join("], [");
            refuse(
                &section,
                match suggestion {
                    Some(suggestion) => format!("is no known section; {suggestion}"),
                    None => format!("is no known section; there are [{sections}]"),
                },
            );
            continue;
        }
        for (name, value) in in_order(table) {
            let typed = format!("{section}.{name}");
            match keys::find(&typed) {
                None => refuse(&typed, unknown("key", suggest::key(&typed))),
                Some(key) => match key.kind.check(&value.kind) {
                    Err(message) => refuse(&typed, message),
                    Ok(()) => values.push((key.path, value.kind)),
                },
            }
        }
    }
    values
}

/// Values of the variables that are named after keys.
fn read_variables(
    variables: impl IntoIterator<Item = (String, String)>,
    problems: &mut Vec<Problem>,
) -> Vec<(&'static str, ValueKind)> {
    let mut values = Vec::new();
    let mut variables: Vec<_> = variables.into_iter().collect();
    variables.sort();
    for (variable, text) in variables {
        let Some(name) = variable.strip_prefix(VARIABLE_PREFIX) else {
            continue;
        };
        if text.is_empty() || is_service_link(&variable, &text) {
            continue;
        }
        let mut refuse = |key: &str, message| {
            problems.push(Problem {
                place: Place::Variable(variable.clone()),
                key: key.to_owned(),
                message,
            });
        };
        match KEYS.iter().find(|key| key.variable() == variable) {
            Some(key) => match key.kind.parse(&text) {
                Err(message) => refuse(key.path, message),
                Ok(value) => values.push((key.path, value)),
            },
            // Other variables are other programs' business, but not those that begin like ours.
            None => {
                let lower = name.to_lowercase();
                let section = keys::sections()
                    .into_iter()
                    .find(|section| lower.starts_with(&format!("{section}_")));
                if let Some(section) = section {
                    let typed = format!("{section}.{}", &lower[section.len() + 1..]);
                    let meant = suggest::key(&typed)
                        .and_then(keys::find)
                        .map(keys::Key::variable);
                    refuse("", unknown("variable of Volley", meant.as_deref()));
                }
            }
        }
    }
    values
}

/// Kubernetes gives every container variables for each service (`VOLLEY_SERVER_PORT=tcp://10.0.0.7:8000` for one called
/// `volley-server`), which would otherwise be taken for configuration.
fn is_service_link(variable: &str, text: &str) -> bool {
    let address = ["tcp://", "udp://", "sctp://"]
        .iter()
        .any(|scheme| text.starts_with(scheme));
    let part = ["_TCP", "_UDP", "_SCTP"]
        .iter()
        .any(|protocol| variable.contains(protocol));
    address || part || variable.contains("_SERVICE_HOST") || variable.contains("_SERVICE_PORT")
}

fn read_flags(
    flags: &[(&'static str, String)],
    problems: &mut Vec<Problem>,
) -> Vec<(&'static str, ValueKind)> {
    let mut values = Vec::new();
    for (path, text) in flags {
        let Some(key) = keys::find(path) else {
            continue;
        };
        match key.kind.parse(text) {
            Ok(value) => values.push((key.path, value)),
            Err(message) => {
                let place = key.flag.map_or(Place::Derived, Place::Flag);
                problems.push(Problem {
                    place,
                    key: key.path.to_owned(),
                    message,
                });
            }
        }
    }
    values
}

fn unknown(what: &str, suggestion: Option<&str>) -> String {
    match suggestion {
        Some(meant) => format!("is no known {what}; did you mean `{meant}`?"),
        None => format!("is no known {what}; docs/configuration.md lists them all"),
    }
}

/// Tables come as hash maps; problems shall come in the same order each time.
fn in_order(table: Map<String, Value>) -> Vec<(String, Value)> {
    let mut entries: Vec<_> = table.into_iter().collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    entries
}

#[cfg(test)]
mod tests;
