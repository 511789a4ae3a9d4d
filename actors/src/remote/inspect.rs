//! An inspection: stands in for the controller, takes the calls of the workers that are there, and has every attention worker try the way to every expert worker. No
//! weights need to be loaded, and nothing is computed; the workers call again afterwards and find the real controller.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use volley_transports::quic::{ControlLink, ControlReceiver, ControlSender, NodeRole, QuicNode};
use volley_transports::{Role, WorkerId};

use super::Fingerprint;
use super::message::{FromWorker, ToWorker, decode, encode};
use super::probe::Edge;

/// A worker that has called has this long to say hello, and to tell the time.
const WORD_DEADLINE: Duration = Duration::from_secs(5);
/// All ways of one worker are tried at once; an answer takes at most this long.
const PROBE_DEADLINE: Duration = Duration::from_secs(30);

/// What an inspection found.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Inspection {
    /// The workers that called.
    pub present: BTreeMap<WorkerId, Presence>,
    /// Workers that should be there and did not call in time.
    pub missing: Vec<WorkerId>,
    /// Callers that were turned away, and why.
    pub refused: Vec<(SocketAddr, String)>,
    /// Every way from an attention worker to an expert worker, by both names.
    pub edges: Vec<Edge>,
    /// Attention workers that did not answer when they were asked to try their ways.
    pub mute: Vec<WorkerId>,
}

/// A worker that called.
#[derive(Debug, Clone, PartialEq)]
pub struct Presence {
    /// Where from.
    pub address: SocketAddr,
    /// By how many seconds its clock is ahead of ours.
    pub clock_ahead_s: f64,
    /// How far that may be wrong: half the way there and back.
    pub clock_error_s: f64,
    /// What it disagrees about with this process.
    pub differences: Vec<String>,
}

/// Takes calls at `node` until all of `expected` are there or `wait` has passed, then has all ways tried.
pub async fn inspect(
    node: &QuicNode,
    expected: &[WorkerId],
    fingerprint: Option<&Fingerprint>,
    wait: Duration,
) -> Inspection {
    let mut found = Inspection::default();
    let mut links = BTreeMap::new();
    let until = Instant::now() + wait;
    let (met, mut meetings) = mpsc::unbounded_channel();
    while links.len() < expected.len() {
        tokio::select! {
            link = node.accept() => {
                let (met, fingerprint) = (met.clone(), fingerprint.cloned());
                // One caller that is slow to speak must not keep the others waiting.
                if let Some(link) = link {
                    tokio::spawn(async move {
                        let address = link.peer().address;
                        let _ = met.send((address, meet(link, fingerprint.as_ref()).await));
                    });
                }
            }
            Some((address, meeting)) = meetings.recv() => {
                let reason = match meeting {
                    Ok((worker, presence, link)) if expected.contains(&worker) => {
                        found.present.insert(worker, presence);
                        links.insert(worker, link);
                        continue;
                    }
                    Ok((worker, ..)) => format!("it is {worker}, which the configuration does not have"),
                    Err(reason) => reason,
                };
                // Whoever is turned away calls again; once is enough.
                let known = |(other, why): &(SocketAddr, String)| other.ip() == address.ip() && *why == reason;
                if !found.refused.iter().any(known) {
                    found.refused.push((address, reason));
                }
            }
            () = tokio::time::sleep_until(until) => break,
        }
    }
    let present = |worker: &&WorkerId| !links.contains_key(worker);
    found.missing = expected.iter().filter(present).copied().collect();
    let address = |&worker: &WorkerId| (worker, found.present[&worker].address);
    let experts: Vec<_> = links
        .keys()
        .filter(|id| id.role == Role::Expert)
        .map(address)
        .collect();
    let mut probing = JoinSet::new();
    let mut kept = Vec::new();
    for (worker, link) in links {
        match worker.role {
            Role::Attention => drop(probing.spawn(probe(worker, link, experts.clone()))),
            // Its link stays, so that it does not go looking for another controller meanwhile.
            Role::Expert => kept.push(link),
        }
    }
    while let Some(probed) = probing.join_next().await {
        match probed {
            Ok((_, Ok(edges))) => found.edges.extend(edges),
            Ok((worker, Err(reason))) => {
                tracing::warn!("{worker}: {reason}");
                found.mute.push(worker);
            }
            Err(error) => tracing::error!("an inspection's task failed: {error}"),
        }
    }
    found.edges.sort_by_key(|edge| (edge.from, edge.to));
    found
}

type Link = (ControlSender, ControlReceiver);

/// Hello, welcome and the time.
async fn meet(
    link: ControlLink,
    fingerprint: Option<&Fingerprint>,
) -> Result<(WorkerId, Presence, Link), String> {
    let peer = link.peer().clone();
    if peer.role != NodeRole::Worker {
        return Err(format!("its certificate is a {}'s", peer.role));
    }
    let (mut sender, mut receiver) = link.split();
    let until = Instant::now() + WORD_DEADLINE;
    let (worker, theirs) = match next(&mut receiver, until).await? {
        FromWorker::Hello {
            worker,
            fingerprint,
            ..
        } => (worker, fingerprint),
        _ => return Err("its first message is not a hello".to_owned()),
    };
    if let Some(seat) = peer.seat.filter(|&seat| seat != worker) {
        return Err(format!(
            "its certificate is good for {seat} only, and it wants to be {worker}"
        ));
    }
    let text = |error: volley_transports::quic::QuicError| error.to_string();
    sender
        .send(&encode(&ToWorker::Welcome))
        .await
        .map_err(text)?;
    let asked = now();
    sender.send(&encode(&ToWorker::Time)).await.map_err(text)?;
    let theirs_now = loop {
        // It may still be loading, and say so.
        if let FromWorker::Time(time) = next(&mut receiver, until).await? {
            break time;
        }
    };
    let answered = now();
    let middle = (asked.as_secs_f64() + answered.as_secs_f64()) / 2.0;
    let differences = fingerprint.map(|ours| ours.differences(&theirs));
    let presence = Presence {
        address: peer.address,
        clock_ahead_s: theirs_now.as_secs_f64() - middle,
        clock_error_s: answered.saturating_sub(asked).as_secs_f64() / 2.0,
        differences: differences
            .iter()
            .flatten()
            .map(ToString::to_string)
            .collect(),
    };
    Ok((worker, presence, (sender, receiver)))
}

/// Has one worker try its ways.
async fn probe(
    worker: WorkerId,
    (mut sender, mut receiver): Link,
    experts: Vec<(WorkerId, SocketAddr)>,
) -> (WorkerId, Result<Vec<Edge>, String>) {
    let until = Instant::now() + PROBE_DEADLINE;
    let probe = async {
        let sent = sender.send(&encode(&ToWorker::Probe(experts))).await;
        sent.map_err(|error| error.to_string())?;
        loop {
            if let FromWorker::Probed(edges) = next(&mut receiver, until).await? {
                return Ok(edges);
            }
        }
    };
    let edges = probe.await;
    (worker, edges)
}

async fn next(receiver: &mut ControlReceiver, until: Instant) -> Result<FromWorker, String> {
    let message = timeout_at(until, receiver.recv()).await;
    let message = message.map_err(|_| "it said nothing in time".to_owned())?;
    let message = message.map_err(|error| error.to_string())?;
    decode(&message.ok_or("it ended its link")?)
}

/// The time of day.
pub(super) fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}
