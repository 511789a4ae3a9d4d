//! Membership against a real etcd, and against the API of Kubernetes as a small server speaks it.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use volley::config::{MembershipBackend, MembershipSettings};
use volley::membership::{self, Member, Membership, Office, View};

mod kubernetes_api;

const PATIENCE: Duration = Duration::from_secs(60);

fn settings(backend: MembershipBackend, endpoints: &str) -> MembershipSettings {
    MembershipSettings {
        backend,
        endpoints: endpoints.to_owned(),
        cluster: "test".to_owned(),
        ttl: Duration::from_secs(2),
        ca: None,
        token_file: None,
        namespace: "default".to_owned(),
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A real etcd with a folder of its own; killed when dropped.
struct Etcd {
    child: Child,
    url: String,
    _folder: tempfile::TempDir,
}

impl Etcd {
    /// None, said aloud, where etcd is not installed.
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let port = || {
            std::net::TcpListener::bind("127.0.0.1:0")
                .unwrap()
                .local_addr()
                .unwrap()
                .port()
        };
        let [client, peer] = [(); 2].map(|()| format!("http://127.0.0.1:{}", port()));
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(folder.path())
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args([
                "--initial-cluster",
                &format!("default={peer}"),
                "--log-level",
                "error",
            ])
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            eprintln!(
                "LEFT OUT: etcd is not installed (Debian: etcd-server), so membership through etcd is NOT tested here"
            );
            return None;
        };
        Some(Etcd {
            child,
            url: client,
            _folder: folder,
        })
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([name, &self.child.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn open(backend: MembershipBackend, endpoints: &str) -> Arc<dyn Membership> {
    membership::open(&settings(backend, endpoints), "unused").unwrap()
}

/// What every backend with an election must do. `open` makes another member's membership.
fn elections(open: &dyn Fn() -> Arc<dyn Membership>) {
    let (one, two, watcher) = (open(), open(), open());
    let first = one.campaign(Office::Controller, "10.0.0.1:7600");
    until("the first is elected", || first.borrow().is_some());
    let mut second = two.campaign(Office::Controller, "10.0.0.2:7600");
    let controller = |of: &Arc<dyn Membership>| of.view().controller;
    until("others find it", || {
        controller(&watcher).as_deref() == Some("10.0.0.1:7600")
    });
    until("the second knows it too", || controller(&two).is_some());
    assert_eq!(*second.borrow_and_update(), None);
    // Another office is another matter.
    let planner = two.campaign(Office::Scheduler, "two");
    until("an office that nobody wants is free", || {
        planner.borrow().is_some()
    });

    let term = first.borrow().unwrap();
    drop(one);
    until("the second takes over", || second.borrow().is_some());
    assert!(second.borrow().unwrap() > term, "terms grow");
    until("others find the second", || {
        controller(&watcher).as_deref() == Some("10.0.0.2:7600")
    });
}

#[test]
fn etcd_elects_and_members_find_each_other() {
    let Some(etcd) = Etcd::start() else { return };
    let backend = || open(MembershipBackend::Etcd, &etcd.url);
    elections(&backend);
    let (one, two) = (backend(), backend());
    let member = Member {
        name: "expert-3".to_owned(),
        address: "10.0.0.3:4000".to_owned(),
    };
    one.announce(member.clone());
    until("a member is seen", || two.view().members.contains(&member));
    drop(one);
    until("one that left is gone", || two.view().members.is_empty());
}

#[test]
fn an_outage_of_etcd_freezes_what_is_known_and_takes_no_office_away() {
    let Some(etcd) = Etcd::start() else { return };
    // Nobody listens at the second endpoint; it must not matter.
    let endpoints = format!("{},http://127.0.0.1:9", etcd.url);
    let (one, watcher) = (
        open(MembershipBackend::Etcd, &endpoints),
        open(MembershipBackend::Etcd, &endpoints),
    );
    let mut term = one.campaign(Office::Controller, "10.0.0.1:7600");
    until("it is elected", || term.borrow().is_some());
    until("others find it", || watcher.view().controller.is_some());
    term.borrow_and_update();
    etcd.signal("-STOP");
    let frozen = |of: &Arc<dyn Membership>| of.view().frozen.is_some();
    until("the outage is seen", || frozen(&one) && frozen(&watcher));
    // Longer than the lease: etcd will find it run out.
    std::thread::sleep(Duration::from_secs(3));
    let View { controller, .. } = watcher.view();
    assert_eq!(controller.as_deref(), Some("10.0.0.1:7600"));
    assert!(term.borrow().is_some(), "an outage deposes nobody");
    etcd.signal("-CONT");
    until("all is as before", || !frozen(&one) && !frozen(&watcher));
    until("it holds the office again", || {
        watcher.view().controller.is_some()
    });
    assert!(term.borrow().is_some());
}

#[test]
fn kubernetes_elects_and_members_find_each_other() {
    let api = kubernetes_api::Api::start();
    let backend = || open(MembershipBackend::Kubernetes, &api.url);
    elections(&backend);
    let watcher = backend();
    let names = || -> Vec<String> {
        watcher
            .view()
            .members
            .into_iter()
            .map(|of| of.name)
            .collect()
    };
    api.pod("volley-expert-0", "Running", "10.1.0.7", false);
    api.pod("volley-expert-1", "Pending", "", false);
    until("a Pod that runs is seen", || names() == ["volley-expert-0"]);
    api.pod("volley-expert-1", "Running", "10.1.0.8", false);
    until("one that begins to run", || names().len() == 2);
    api.pod("volley-expert-0", "Running", "10.1.0.7", true);
    until("one that is about to end is not", || {
        names() == ["volley-expert-1"]
    });
    let before = watcher.view();
    api.refuse(true);
    until("an outage freezes", || watcher.view().frozen.is_some());
    assert_eq!(watcher.view().members, before.members);
    api.refuse(false);
    until("and ends", || watcher.view().frozen.is_none());
}

#[test]
fn settings_that_make_no_sense_are_refused_by_name() {
    for (endpoints, part) in [
        ("etcd:2379", "neither http nor https"),
        ("https://etcd:2379", "membership.ca"),
        ("http://", "membership.endpoints"),
    ] {
        let refused = membership::open(&settings(MembershipBackend::Etcd, endpoints), "x");
        let text = refused.err().unwrap().to_string();
        assert!(text.contains(part), "{text}");
    }
}
