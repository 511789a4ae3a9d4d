//! Membership in etcd: what a process says of itself lives as long as its lease.
//!
//! Under `/volley/CLUSTER/`: `member/NAME` holds a member's address, `office/OFFICE` is created by whoever is first and holds its address; the revision of its creation is
//! the term. One thread of its own renews the lease and watches, so that nothing that computes can keep it from renewing.
//!
//! # When etcd is away
//! The view freezes and offices stay with whoever held them. Attempts are spread (jittered back-off, the next endpoint each time, names looked up rarely). When etcd is
//! back, a lease that lives goes on as if nothing had been; one that is gone is granted anew, what was announced is written again, and offices are run for again. Only when
//! another holds an office by then is its former holder told so.

mod api;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use self::api::{Change, KeyValue, Watch};
use super::http::Server;
use super::pace::{Backoff, LeaseTime, random};
use super::shared::{Keeper, Shared};
use super::{Member, Membership, Office, Term, View};
use crate::config::MembershipSettings;
use crate::failure::Failure;

/// At the end the lease is given back within this time, or runs out by itself.
const FAREWELL: Duration = Duration::from_secs(1);

/// See the module.
pub struct Etcd {
    shared: Arc<Shared>,
    _keeper: Keeper,
}

impl Etcd {
    /// Starts the thread that talks to etcd.
    ///
    /// # Errors
    /// An endpoint is no URL, or a file cannot be read.
    pub fn open(settings: &MembershipSettings) -> Result<Self, Failure> {
        let servers = settings
            .endpoints
            .split(',')
            .map(|url| Server::parse(url, settings.ca.as_deref(), None));
        let servers = servers.collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::new(Shared::default());
        let mut session = Session {
            servers,
            prefix: format!("/volley/{}/", settings.cluster),
            ttl: settings.ttl,
            shared: Arc::clone(&shared),
            began: Instant::now(),
            lease: None,
            keys: BTreeMap::new(),
        };
        let keeper = Keeper::start(move |ended| async move {
            tokio::select! {
                () = session.run() => {}
                _ = ended => {}
            }
            session.farewell().await;
        })?;
        Ok(Etcd {
            shared,
            _keeper: keeper,
        })
    }
}

impl Membership for Etcd {
    fn view(&self) -> View {
        self.shared.view()
    }

    fn announce(&self, member: Member) {
        self.shared.announce(member);
    }

    fn campaign(&self, office: Office, address: &str) -> Term {
        self.shared.campaign(office, address)
    }

    fn backend(&self) -> &'static str {
        "etcd"
    }
}

/// The thread's state.
struct Session {
    servers: Vec<Server>,
    prefix: String,
    ttl: Duration,
    shared: Arc<Shared>,
    began: Instant,
    lease: Option<(i64, LeaseTime)>,
    /// Every key under the prefix, as last heard.
    keys: BTreeMap<String, KeyValue>,
}

impl Session {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Goes on for ever.
    async fn run(&mut self) {
        let mut backoff = Backoff::default();
        for turn in 0.. {
            let server = turn % self.servers.len();
            let before = self.now();
            let Err(why) = self.serve(server).await;
            // One that went well for a while failed for the first time.
            if self.now() - before > self.ttl {
                backoff.reset();
            }
            self.shared.freeze("etcd", &why);
            sleep(backoff.pause(random())).await;
        }
    }

    /// Keeps everything up to date with one server until something fails.
    async fn serve(&mut self, server: usize) -> Result<std::convert::Infallible, String> {
        self.renew(server).await?;
        // Before anything is claimed: what was known may be long gone.
        let (all, revision) = api::list(&self.servers[server], &self.prefix).await?;
        self.keys = all.into_iter().map(|kv| (kv.key.clone(), kv)).collect();
        self.publish();
        self.claim(server).await?;
        let mut watch = Watch::open(&self.servers[server], &self.prefix, revision + 1).await?;
        let shared = Arc::clone(&self.shared);
        loop {
            let renew_at = self
                .lease
                .map_or(Duration::ZERO, |(_, time)| time.renew_at());
            tokio::select! {
                changes = watch.next() => {
                    for change in changes? {
                        match change {
                            Change::Put(kv) => drop(self.keys.insert(kv.key.clone(), kv)),
                            Change::Deleted(key) => drop(self.keys.remove(&key)),
                        }
                    }
                    self.publish();
                    self.claim(server).await?;
                }
                () = sleep(renew_at.saturating_sub(self.now())) => {
                    self.renew(server).await?;
                    self.claim(server).await?;
                }
                () = shared.wanted.notified() => self.claim(server).await?,
            }
        }
    }

    /// Renews the lease, or takes a new one if it is gone.
    async fn renew(&mut self, server: usize) -> Result<(), String> {
        let asked = self.now();
        let server = &self.servers[server];
        if let Some((id, _)) = self.lease {
            if let Some(ttl) = api::keep_alive(server, id).await? {
                self.lease = Some((id, LeaseTime::new(asked, ttl)));
                return Ok(());
            }
            tracing::warn!(
                "the lease in etcd ran out; what this process announces is written again"
            );
            self.lease = None;
            // What lived with it is gone, whether we have heard of it or not: our own old office is not another's.
            self.keys.retain(|_, kv| kv.lease != id);
        }
        let asked = self.now();
        let id = api::grant(server, self.ttl).await?;
        self.lease = Some((id, LeaseTime::new(asked, self.ttl)));
        Ok(())
    }

    /// Writes what is to be announced and is not there, and runs for offices that nobody holds.
    async fn claim(&mut self, server: usize) -> Result<(), String> {
        let Some((lease, _)) = self.lease else {
            return Ok(());
        };
        let server = &self.servers[server];
        for member in self.shared.members() {
            let key = format!("{}member/{}", self.prefix, member.name);
            let there = self.keys.get(&key);
            if there.is_none_or(|kv| kv.lease != lease) {
                api::put(server, &key, &member.address, lease).await?;
                let kv = KeyValue {
                    key: key.clone(),
                    value: member.address,
                    created: 0,
                    lease,
                };
                self.keys.insert(key, kv);
            }
        }
        for (office, address) in self.shared.campaigns() {
            let key = format!("{}office/{}", self.prefix, office.name());
            // One of an earlier lease of ours goes by itself, and then the office is free.
            let held = match self.keys.get(&key) {
                Some(held) => held.clone(),
                None => {
                    let Some(held) = api::create(server, &key, &address, lease).await? else {
                        continue;
                    };
                    self.keys.insert(key, held.clone());
                    held
                }
            };
            self.shared
                .elected(office, (held.lease == lease).then_some(held.created));
        }
        Ok(())
    }

    fn publish(&self) {
        let office = |office: Office| {
            let held = self
                .keys
                .get(&format!("{}office/{}", self.prefix, office.name()));
            held.map(|kv| kv.value.clone())
        };
        let members = format!("{}member/", self.prefix);
        let member = |kv: &KeyValue| {
            Some(Member {
                name: kv.key.strip_prefix(&members)?.to_owned(),
                address: kv.value.clone(),
            })
        };
        self.shared.publish(View {
            members: self.keys.values().filter_map(member).collect(),
            controller: office(Office::Controller),
            scheduler: office(Office::Scheduler),
            frozen: None,
        });
    }

    /// Gives the lease back, so that nobody has to wait until it runs out.
    async fn farewell(&mut self) {
        let Some((lease, time)) = self.lease.take() else {
            return;
        };
        if self.now() >= time.expires() {
            return;
        }
        for server in &self.servers {
            if let Ok(Ok(())) = timeout(FAREWELL, api::revoke(server, lease)).await {
                return;
            }
        }
    }
}
