//! `volley doctor --cluster`: every way of the attention x expert graph, tried by the workers themselves before anything is served.
//!
//! The doctor stands where the controller will: at its address, with its certificate, or in its office. Workers that are started (they may still be loading, or have no
//! weights yet) call it as they would call the controller, try their ways when they are asked, and call again afterwards.

use std::time::Duration;

use serde_json::{Value, json};
use volley_actors::{Cause, Edge, Fingerprint, Inspection, Way, inspect};
use volley_transports::quic::NodeRole;
use volley_transports::{Role, WorkerId};

use crate::config::{Demand, Raw, Settings};
use crate::failure::Failure;
use crate::membership::{self, Office};
use crate::{fingerprint, launch, memory, network};

/// Clocks that are further apart than this make logs and traces of hosts incomparable.
const SKEW_S: f64 = 0.5;
/// Any Ethernet takes datagrams of this many bytes; a path that does not loses larger packets without a word, or has a tunnel on it.
const DATAGRAM: u16 = 1_400;
/// A worker that called and whose way is slower than this is far away for what crosses it every layer.
const FAR: Duration = Duration::from_millis(5);

/// How bad something is, and what to say about it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Remark {
    /// It keeps the cluster from running.
    pub(crate) bad: bool,
    /// Workers, an edge, or the thing.
    pub(crate) what: String,
    /// What was found.
    pub(crate) found: String,
    /// What to do, unless all is well.
    pub(crate) remedy: Option<String>,
}

/// Waits for the configured workers and has them try their ways. Returns what there is to say, and the same for programs.
///
/// # Errors
/// The configuration or certificates are refused, or the controller's address is taken.
pub(crate) fn run(raw: &Raw, wait: Duration) -> Result<(Vec<Remark>, Value), Failure> {
    let network = raw.network();
    let identity = network::identity(&network, NodeRole::Controller)?;
    let listen = network::controller_listen(&network)?;
    let node = network::bind(listen, &identity, &network).map_err(|error| {
        Failure::new(format!("{error}\nThe doctor takes the controller's place. If `volley serve` runs here already, its /admin/state says how its workers stand"))
    })?;
    let (attention, experts) = raw.workers();
    let expected: Vec<WorkerId> = (0..attention)
        .map(|index| Role::Attention.worker(index))
        .chain((0..experts).map(|index| Role::Expert.worker(index)))
        .collect();
    let mut remarks = Vec::new();
    let print = match of_model(raw) {
        Ok(print) => Some(print),
        Err(error) => {
            remarks.push(Remark {
                bad: false,
                what: "model".to_owned(),
                found: format!("not compared: {error}"),
                remedy: Some(
                    "on a host that has the model, the doctor compares it with the workers'"
                        .to_owned(),
                ),
            });
            None
        }
    };
    let membership = membership::open(&raw.membership(), &network.controller)?;
    let mut term = membership.campaign(Office::Controller, &network.controller);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("threads cannot be started: {error}")))?;
    eprintln!(
        "waiting at {} (UDP) for {attention} attention and {experts} expert workers, {wait:?} at most; start them as for `volley serve`",
        node.local_addr()
    );
    let found = runtime.block_on(async {
        let held = membership::hold(&mut term, &*membership, Office::Controller);
        if tokio::time::timeout(wait, held).await.is_err() {
            let view = membership.view();
            let why = view.frozen.or(view
                .controller
                .map(|at| format!("the controller is at {at}")));
            let why = why.unwrap_or_else(|| "it does not answer".to_owned());
            return Err(Failure::new(format!(
                "{} does not let the doctor take the controller's place: {why}",
                membership.backend()
            )));
        }
        Ok(inspect(&node, &expected, print.as_ref(), wait).await)
    })?;
    remarks.extend(judge(&found));
    Ok((remarks, as_json(&found)))
}

fn of_model(raw: &Raw) -> Result<Fingerprint, Failure> {
    let model = launch::open_model(raw)?;
    let available = memory::available_bytes();
    let settings = Settings::resolve(raw, model.spec(), model.name(), available, Demand::Serving)?;
    fingerprint::of(&settings)
}

/// What there is to say about an inspection.
fn judge(found: &Inspection) -> Vec<Remark> {
    let bad = |what: String, found: String, remedy: &str| Remark {
        bad: true,
        what,
        found,
        remedy: Some(remedy.to_owned()),
    };
    let mut remarks = Vec::new();
    for worker in &found.missing {
        let remedy = "is it started, with this address (or membership) and a certificate of this cluster, and is UDP open from its host to here? `volley doctor --call` there names the cause";
        remarks.push(bad(worker.to_string(), "did not call".to_owned(), remedy));
    }
    for (address, reason) in &found.refused {
        let remedy = "workers need a worker's certificate, each its own index";
        remarks.push(bad(
            format!("the caller from {address}"),
            reason.clone(),
            remedy,
        ));
    }
    for (worker, presence) in &found.present {
        if !presence.differences.is_empty() {
            let remedy = "all processes need the same model, [model], [cluster] and [limits]";
            remarks.push(bad(
                worker.to_string(),
                presence.differences.join("; "),
                remedy,
            ));
        }
        let (ahead, error) = (presence.clock_ahead_s, presence.clock_error_s);
        let skewed = ahead.abs() - error > SKEW_S;
        remarks.push(Remark {
            bad: false,
            what: worker.to_string(),
            found: format!("called from {}, its clock is {ahead:+.3} s from ours (within {error:.3} s)", presence.address),
            remedy: skewed.then(|| "have both hosts follow one time server (chrony, systemd-timesyncd): logs and traces cannot be put in order otherwise".to_owned()),
        });
    }
    for worker in &found.mute {
        let remedy = "it called but did not answer: its log says more";
        remarks.push(bad(
            worker.to_string(),
            "did not try its ways".to_owned(),
            remedy,
        ));
    }
    remarks.extend(found.edges.iter().map(edge));
    remarks
}

fn edge(edge: &Edge) -> Remark {
    let what = format!("{} -> {} at {}", edge.from, edge.to, edge.address);
    match &edge.result {
        Err(trouble) => Remark {
            bad: true,
            what,
            found: format!("{}: {}", cause(trouble.cause), trouble.detail),
            remedy: Some(trouble.cause.remedy().to_owned()),
        },
        Ok(way) => Remark {
            bad: false,
            what,
            found: format!(
                "{:.2} ms there and back, datagrams of {} bytes",
                way.round_trip.as_secs_f64() * 1e3,
                way.datagram
            ),
            remedy: slow(way),
        },
    }
}

fn slow(way: &Way) -> Option<String> {
    if way.datagram < DATAGRAM {
        return Some(format!(
            "larger packets than {} bytes vanish on the way (a black hole: a link with a smaller MTU whose ICMP is filtered, or a tunnel): set one MTU on all links; it works, but slowly",
            way.datagram
        ));
    }
    (way.round_trip > FAR).then(|| "frames cross this way twice for every layer of every token: put both hosts on one switch".to_owned())
}

/// A cause in words.
fn cause(cause: Cause) -> &'static str {
    match cause {
        Cause::NoRoute => "no route",
        Cause::NobodyListens => "nobody listens there",
        Cause::UdpBlocked => "UDP is blocked",
        Cause::Silent => "no answer at all",
        Cause::Certificate => "wrong certificate",
        Cause::Refused => "refused",
    }
}

fn as_json(found: &Inspection) -> Value {
    let seconds = |time: Duration| time.as_secs_f64();
    let edges = found.edges.iter().map(|edge| {
        let mut value = json!({"from": edge.from.to_string(), "to": edge.to.to_string(), "address": edge.address.to_string()});
        match &edge.result {
            Ok(way) => {
                value["open"] = json!(true);
                value["handshake_s"] = json!(seconds(way.handshake));
                value["round_trip_s"] = json!(seconds(way.round_trip));
                value["datagram_bytes"] = json!(way.datagram);
            }
            Err(trouble) => {
                value["open"] = json!(false);
                value["cause"] = json!(trouble.cause);
                value["detail"] = json!(trouble.detail);
                value["remedy"] = json!(trouble.cause.remedy());
            }
        }
        value
    });
    let present = found.present.iter().map(|(worker, presence)| {
        json!({
            "worker": worker.to_string(),
            "address": presence.address.to_string(),
            "clock_ahead_s": presence.clock_ahead_s,
            "clock_error_s": presence.clock_error_s,
            "differences": presence.differences,
        })
    });
    let names = |list: &[WorkerId]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    let refused = found
        .refused
        .iter()
        .map(|(address, reason)| json!({"address": address.to_string(), "reason": reason}));
    json!({
        "workers": present.collect::<Vec<_>>(),
        "missing": names(&found.missing),
        "mute": names(&found.mute),
        "refused": refused.collect::<Vec<_>>(),
        "edges": edges.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use volley_actors::{Presence, Trouble};

    use super::*;

    fn way(datagram: u16) -> Edge {
        Edge {
            from: Role::Attention.worker(0),
            to: Role::Expert.worker(1),
            address: "10.0.0.2:4000".parse().unwrap(),
            result: Ok(Way {
                handshake: Duration::from_millis(3),
                round_trip: Duration::from_micros(400),
                datagram,
            }),
        }
    }

    #[test]
    fn each_trouble_names_its_edge_its_cause_and_its_remedy() {
        let mut found = Inspection {
            missing: vec![Role::Expert.worker(2)],
            edges: vec![way(1452), way(1200)],
            ..Inspection::default()
        };
        found.present.insert(
            Role::Attention.worker(0),
            Presence {
                address: "10.0.0.1:5".parse().unwrap(),
                clock_ahead_s: 3.0,
                clock_error_s: 0.01,
                differences: vec!["model.hash is a here and b there".to_owned()],
            },
        );
        let trouble = Trouble {
            cause: Cause::UdpBlocked,
            detail: "no answer within 2s".to_owned(),
        };
        found.edges.push(Edge {
            result: Err(trouble),
            ..way(0)
        });
        let remarks = judge(&found);
        let bad: Vec<&str> = remarks
            .iter()
            .filter(|r| r.bad)
            .map(|r| r.what.as_str())
            .collect();
        assert_eq!(
            bad,
            [
                "expert-2",
                "attention-0",
                "attention-0 -> expert-1 at 10.0.0.2:4000"
            ]
        );
        let text = format!("{remarks:?}");
        for part in [
            "UDP is blocked: no answer",
            "+3.000 s",
            "time server",
            "1200 bytes vanish",
            "model.hash",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let value = as_json(&found);
        assert_eq!(value["edges"][2]["cause"], "udp_blocked");
        assert_eq!(value["missing"][0], "expert-2");
    }
}
