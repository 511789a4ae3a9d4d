//! Membership in Kubernetes: members are the Pods with the label `volley/cluster=CLUSTER`, offices are Leases called `CLUSTER-OFFICE`.
//!
//! Pods are watched, and need not announce themselves: the API server knows. A Lease is read three times in its time; whoever finds it unchanged for longer than it lasts
//! takes it, with the version that it read, so that of two one is refused. Time is counted from when a change was *seen*, so clocks of hosts need not agree. Its
//! annotation `volley/address` holds the address, and the number of its transitions is the term. The service account needs `get`, `list`, `watch` of Pods and `get`,
//! `create`, `update` of Leases; docs/cluster.md has the role.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::FormatItem;
use time::macros::format_description;
use tokio::time::sleep;

use super::http::{Server, Token};
use super::pace::{Backoff, random};
use super::shared::{Keeper, Shared};
use super::{Member, Membership, Office, Term, View};
use crate::config::MembershipSettings;
use crate::failure::Failure;

/// Where a Pod finds what it may do.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// A Lease is read and renewed this often in its time.
const LOOKS: u32 = 3;
/// Kubernetes' own form of a time.
const MICRO: &[FormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");

/// See the module.
pub struct Kubernetes {
    shared: Arc<Shared>,
    _keeper: Keeper,
}

impl Kubernetes {
    /// Starts the thread that talks to the API.
    ///
    /// # Errors
    /// An endpoint is no URL, or a file cannot be read.
    pub fn open(settings: &MembershipSettings) -> Result<Self, Failure> {
        let in_pod =
            |name: &str| Some(PathBuf::from(ACCOUNT).join(name)).filter(|path| path.exists());
        let ca = settings.ca.clone().or_else(|| in_pod("ca.crt"));
        let token = settings.token_file.clone().or_else(|| in_pod("token"));
        let servers = settings
            .endpoints
            .split(',')
            .map(|url| Server::parse(url, ca.as_deref(), token.clone().map(Token)));
        let servers = servers.collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::new(Shared::default());
        let mut session = Session {
            servers,
            namespace: settings.namespace.clone(),
            cluster: settings.cluster.clone(),
            ttl: settings.ttl,
            // Unique: a process that was started again is another.
            identity: format!(
                "{}-{}",
                std::process::id(),
                OffsetDateTime::now_utc().unix_timestamp_nanos()
            ),
            shared: Arc::clone(&shared),
            began: Instant::now(),
            pods: BTreeMap::new(),
            seen: BTreeMap::new(),
        };
        let keeper = Keeper::start(move |ended| async move {
            tokio::select! {
                () = session.run() => {}
                _ = ended => {}
            }
        })?;
        Ok(Kubernetes {
            shared,
            _keeper: keeper,
        })
    }
}

impl Membership for Kubernetes {
    fn view(&self) -> View {
        self.shared.view()
    }

    // The Pod is known already.
    fn announce(&self, _: Member) {}

    fn campaign(&self, office: Office, address: &str) -> Term {
        self.shared.campaign(office, address)
    }

    fn backend(&self) -> &'static str {
        "kubernetes"
    }
}

/// A Lease as it was last seen.
#[derive(Debug, Clone)]
struct Seen {
    version: String,
    since: Duration,
    lasts: Duration,
    holder: String,
    address: Option<String>,
    transitions: u64,
}

impl Seen {
    /// What a Lease says, seen `now`; an unchanged one is as old as it was.
    fn new(lease: &Value, before: Option<&Seen>, now: Duration) -> Self {
        let version = lease["metadata"]["resourceVersion"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let unchanged = before.filter(|before| before.version == version);
        let spec = &lease["spec"];
        Seen {
            since: unchanged.map_or(now, |before| before.since),
            version,
            lasts: Duration::from_secs(spec["leaseDurationSeconds"].as_u64().unwrap_or(0)),
            holder: spec["holderIdentity"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            address: lease["metadata"]["annotations"]["volley/address"]
                .as_str()
                .map(str::to_owned),
            transitions: spec["leaseTransitions"].as_u64().unwrap_or(0),
        }
    }

    fn is_over(&self, now: Duration) -> bool {
        self.holder.is_empty() || now.saturating_sub(self.since) > self.lasts
    }
}

/// The thread's state.
struct Session {
    servers: Vec<Server>,
    namespace: String,
    cluster: String,
    ttl: Duration,
    identity: String,
    shared: Arc<Shared>,
    began: Instant,
    /// Pods that run, by name.
    pods: BTreeMap<String, Member>,
    seen: BTreeMap<Office, Seen>,
}

impl Session {
    /// Goes on for ever.
    async fn run(&mut self) {
        let mut backoff = Backoff::default();
        for turn in 0.. {
            let before = self.began.elapsed();
            let ended = self.serve(turn % self.servers.len()).await;
            if self.began.elapsed() - before > self.ttl {
                backoff.reset();
            }
            if let Err(why) = ended {
                self.shared.freeze("kubernetes", &why);
                // Nobody could renew meanwhile: holders get their whole time again once the API is back.
                self.seen.clear();
            }
            sleep(backoff.pause(random())).await;
        }
    }

    /// Keeps everything up to date with one server until something fails, or the watch ends, as watches do.
    async fn serve(&mut self, server: usize) -> Result<(), String> {
        let path = format!(
            "/api/v1/namespaces/{}/pods?labelSelector=volley%2Fcluster%3D{}",
            self.namespace, self.cluster
        );
        let list = self
            .get(server, &path)
            .await?
            .ok_or("there is no such namespace")?;
        let items = list["items"].as_array().map_or(&[][..], Vec::as_slice);
        self.pods = items
            .iter()
            .filter_map(pod)
            .map(|member| (member.name.clone(), member))
            .collect();
        self.offices(server).await?;
        let version = list["metadata"]["resourceVersion"].as_str().unwrap_or("0");
        let path = format!("{path}&watch=1&resourceVersion={version}");
        let mut watch = self.servers[server]
            .stream(Method::GET, &path, None)
            .await?;
        let shared = Arc::clone(&self.shared);
        let every = self.ttl / LOOKS;
        let mut look = self.began.elapsed() + every;
        loop {
            tokio::select! {
                event = watch.next() => {
                    let Some(event) = event? else { return Ok(()) };
                    if event["type"] == "ERROR" {
                        return Ok(()); // most often too old a version: list anew
                    }
                    let name = event["object"]["metadata"]["name"].as_str().unwrap_or_default();
                    match pod(&event["object"]).filter(|_| event["type"] != "DELETED") {
                        Some(member) => drop(self.pods.insert(name.to_owned(), member)),
                        None => drop(self.pods.remove(name)),
                    }
                    self.publish();
                }
                () = sleep(look.saturating_sub(self.began.elapsed())) => {
                    self.offices(server).await?;
                    look += every;
                }
                () = shared.wanted.notified() => self.offices(server).await?,
            }
        }
    }

    /// Looks who holds the offices; renews ours, and takes what is free and run for.
    async fn offices(&mut self, server: usize) -> Result<(), String> {
        for office in [Office::Controller, Office::Scheduler] {
            let name = format!("{}-{}", self.cluster, office.name());
            let path = format!(
                "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
                self.namespace
            );
            let lease = self.get(server, &format!("{path}/{name}")).await?;
            let now = self.began.elapsed();
            match &lease {
                Some(lease) => {
                    let seen = Seen::new(lease, self.seen.get(&office), now);
                    self.seen.insert(office, seen);
                }
                None => drop(self.seen.remove(&office)),
            }
            let campaigns = self.shared.campaigns();
            let Some((_, address)) = campaigns.into_iter().find(|(of, _)| *of == office) else {
                continue;
            };
            let seen = self.seen.get(&office);
            let ours = seen.is_some_and(|seen| seen.holder == self.identity);
            if ours || seen.is_none_or(|seen| seen.is_over(now)) {
                let transitions = seen.map_or(0, |seen| seen.transitions + u64::from(!ours));
                let wanted = self.lease(&name, &address, seen, transitions);
                let (method, path) = match lease {
                    Some(_) => (Method::PUT, format!("{path}/{name}")),
                    None => (Method::POST, path),
                };
                let (status, answer) = self.servers[server]
                    .ask(method, &path, Some(&wanted))
                    .await?;
                match status {
                    StatusCode::OK | StatusCode::CREATED => {
                        let seen = Seen::new(&answer, None, self.began.elapsed());
                        self.seen.insert(office, seen);
                    }
                    // Another was quicker; the next look shows who.
                    StatusCode::CONFLICT => {}
                    status => return Err(refusal(&path, status, &answer)),
                }
            }
            let held = self
                .seen
                .get(&office)
                .filter(|seen| seen.holder == self.identity);
            self.shared
                .elected(office, held.map(|seen| seen.transitions + 1));
        }
        self.publish();
        Ok(())
    }

    fn lease(&self, name: &str, address: &str, seen: Option<&Seen>, transitions: u64) -> Value {
        let now = OffsetDateTime::now_utc().format(MICRO).unwrap_or_default();
        let version = seen.map_or("", |seen| seen.version.as_str());
        json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "resourceVersion": version,
                "annotations": {"volley/address": address},
            },
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": self.ttl.as_secs(),
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        })
    }

    /// An object, none if there is none.
    async fn get(&self, server: usize, path: &str) -> Result<Option<Value>, String> {
        let (status, answer) = self.servers[server].ask(Method::GET, path, None).await?;
        match status {
            StatusCode::OK => Ok(Some(answer)),
            StatusCode::NOT_FOUND => Ok(None),
            status => Err(refusal(path, status, &answer)),
        }
    }

    fn publish(&self) {
        let now = self.began.elapsed();
        let office = |office| {
            let seen = self.seen.get(&office).filter(|seen| !seen.is_over(now));
            seen.and_then(|seen| seen.address.clone())
        };
        self.shared.publish(View {
            members: self.pods.values().cloned().collect(),
            controller: office(Office::Controller),
            scheduler: office(Office::Scheduler),
            frozen: None,
        });
    }
}

fn refusal(path: &str, status: StatusCode, answer: &Value) -> String {
    let why = answer["message"].as_str().unwrap_or("it does not say why");
    format!("{path}: {status}: {why}")
}

/// A Pod that runs and is not about to end.
fn pod(object: &Value) -> Option<Member> {
    let running = object["status"]["phase"] == "Running";
    let ending = !object["metadata"]["deletionTimestamp"].is_null();
    (running && !ending).then_some(())?;
    Some(Member {
        name: object["metadata"]["name"].as_str()?.to_owned(),
        address: object["status"]["podIP"].as_str()?.to_owned(),
    })
}
