//! QUIC: the conformance suite, who may do what, and what strangers can do (nothing).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use volley_transports::conformance::FabricFactory;
use volley_transports::quic::{CertificateAuthority, NodeRole, QuicError, QuicNode, QuicOptions};
use volley_transports::{Endpoint, Epoch, Event, Lane, LostReason, MicroBatch, Role, Topology};

const LIMIT: Duration = Duration::from_secs(30);
const TOPOLOGY: Topology = Topology {
    attention: 1,
    experts: 1,
    micro_batches: 2,
    dispatch_bytes: 256,
    combine_bytes: 256,
};

fn options(connections: u8) -> QuicOptions {
    QuicOptions {
        connections,
        // A machine that is busy with other tests is no sign of death.
        idle: LIMIT,
        ..QuicOptions::default()
    }
}

fn node(authority: &CertificateAuthority, role: NodeRole, connections: u8) -> QuicNode {
    let identity = authority.identity(role, "test").unwrap();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    QuicNode::bind(any, &identity, options(connections)).unwrap()
}

/// One node for each side.
struct Quic(u8);

impl FabricFactory for Quic {
    fn build(&self, topology: Topology) -> Vec<Box<dyn Endpoint>> {
        let authority = CertificateAuthority::new("test").unwrap();
        let [attention, experts] = [(); 2].map(|()| node(&authority, NodeRole::Worker, self.0));
        let addresses = vec![Some(experts.local_addr()); topology.experts.into()];
        let mut ends: Vec<Box<dyn Endpoint>> = Vec::new();
        for id in topology.ids() {
            let node = match id.role {
                Role::Attention => &attention,
                Role::Expert => &experts,
            };
            ends.push(Box::new(
                node.join(Epoch(1), id, &topology, &addresses).unwrap(),
            ));
        }
        ends
    }
}

mod one_connection {
    volley_transports::conformance_tests!(super::Quic(1));
}

mod three_connections {
    volley_transports::conformance_tests!(super::Quic(3));
}

fn next(end: &mut dyn Endpoint) -> Event {
    let start = Instant::now();
    loop {
        if let Some(event) = end.poll() {
            return event;
        }
        assert!(start.elapsed() < LIMIT, "nothing came");
        end.wait(Duration::from_secs(1));
    }
}

fn rally(attention: &mut dyn Endpoint, expert: &mut dyn Endpoint) {
    for micro_batch in [0, 1].map(MicroBatch) {
        let lane = Lane::new(0, micro_batch);
        attention.slot(lane).unwrap()[..4].copy_from_slice(b"ball");
        attention.post(lane, 4).unwrap();
        assert_eq!(next(expert), Event::Arrived { lane, len: 4 });
        assert_eq!(expert.received(lane).unwrap(), b"ball");
        expert.post(lane, 0).unwrap();
        assert_eq!(next(attention), Event::Arrived { lane, len: 0 });
    }
}

#[test]
fn epochs_come_and_go_on_the_same_nodes() {
    let authority = CertificateAuthority::new("test").unwrap();
    let [a, e] = [(); 2].map(|()| node(&authority, NodeRole::Worker, 2));
    let addresses = [Some(e.local_addr())];
    let mut before = None;
    for epoch in 1..=100 {
        let join = |node: &QuicNode, role: Role| {
            node.join(Epoch(epoch), role.worker(0), &TOPOLOGY, &addresses)
                .unwrap()
        };
        // The caller may be first; the ends of the last epoch go a little later.
        let mut attention = join(&a, Role::Attention);
        let mut expert = join(&e, Role::Expert);
        rally(&mut attention, &mut expert);
        before = Some((attention, expert));
    }
    drop(before);
}

#[test]
fn a_node_that_vanishes_is_lost_and_one_that_was_never_there_is_unreachable() {
    let authority = CertificateAuthority::new("test").unwrap();
    let [a, e] = [(); 2].map(|()| node(&authority, NodeRole::Worker, 1));
    let addresses = [Some(e.local_addr())];
    let mut attention = a
        .join(Epoch(1), Role::Attention.worker(0), &TOPOLOGY, &addresses)
        .unwrap();
    let mut expert = e
        .join(Epoch(1), Role::Expert.worker(0), &TOPOLOGY, &[])
        .unwrap();
    rally(&mut attention, &mut expert);
    drop((expert, e));
    let peer = Role::Expert.worker(0);
    assert_eq!(
        next(&mut attention),
        Event::Lost {
            peer,
            reason: LostReason::Closed
        }
    );

    // Nobody answers there.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let addresses = [Some(silent.local_addr().unwrap())];
    let quick = QuicOptions {
        connect: Duration::from_millis(300),
        ..options(1)
    };
    let identity = authority.identity(NodeRole::Worker, "quick").unwrap();
    let quick = QuicNode::bind(SocketAddr::from(([127, 0, 0, 1], 0)), &identity, quick).unwrap();
    let mut attention = quick
        .join(Epoch(1), Role::Attention.worker(0), &TOPOLOGY, &addresses)
        .unwrap();
    assert_eq!(
        next(&mut attention),
        Event::Lost {
            peer,
            reason: LostReason::Unreachable
        }
    );
    // And nobody calls.
    let mut expert = quick
        .join(Epoch(1), Role::Expert.worker(0), &TOPOLOGY, &[])
        .unwrap();
    let peer = Role::Attention.worker(0);
    assert_eq!(
        next(&mut expert),
        Event::Lost {
            peer,
            reason: LostReason::Unreachable
        }
    );
}

#[test]
fn ends_that_disagree_get_no_lanes_and_the_node_goes_on() {
    let authority = CertificateAuthority::new("test").unwrap();
    let quick = QuicOptions {
        connect: Duration::from_millis(500),
        ..options(1)
    };
    let identity = authority.identity(NodeRole::Worker, "quick").unwrap();
    let bind = || QuicNode::bind(SocketAddr::from(([127, 0, 0, 1], 0)), &identity, quick).unwrap();
    let (a, e) = (bind(), bind());
    let addresses = [Some(e.local_addr())];
    let other = Topology {
        combine_bytes: 128,
        ..TOPOLOGY
    };
    let expert = e
        .join(Epoch(5), Role::Expert.worker(0), &TOPOLOGY, &[])
        .unwrap();
    for (epoch, topology) in [(5, other), (4, TOPOLOGY), (6, TOPOLOGY)] {
        let mut attention = a
            .join(
                Epoch(epoch),
                Role::Attention.worker(0),
                &topology,
                &addresses,
            )
            .unwrap();
        let peer = Role::Expert.worker(0);
        assert_eq!(
            next(&mut attention),
            Event::Lost {
                peer,
                reason: LostReason::Unreachable
            }
        );
    }
    drop(expert);
    let mut expert = e
        .join(Epoch(7), Role::Expert.worker(0), &TOPOLOGY, &[])
        .unwrap();
    let mut attention = a
        .join(Epoch(7), Role::Attention.worker(0), &TOPOLOGY, &addresses)
        .unwrap();
    rally(&mut attention, &mut expert);
}

#[test]
fn posts_to_a_peer_that_takes_no_part_fail_and_limits_are_checked() {
    let authority = CertificateAuthority::new("test").unwrap();
    let a = node(&authority, NodeRole::Worker, 1);
    let mut end = a
        .join(Epoch(1), Role::Attention.worker(0), &TOPOLOGY, &[None])
        .unwrap();
    let lane = Lane::new(0, MicroBatch(0));
    assert!(end.post(lane, 1).is_err());
    assert_eq!(end.poll(), None, "nobody is lost that was never there");
    for topology in [
        Topology {
            micro_batches: 65,
            ..TOPOLOGY
        },
        Topology {
            dispatch_bytes: 1 << 32,
            ..TOPOLOGY
        },
    ] {
        let joined = a.join(Epoch(2), Role::Expert.worker(0), &topology, &[]);
        assert!(matches!(joined, Err(QuicError::Option(_))));
    }
}

#[tokio::test]
async fn control_links_carry_messages_of_any_length_both_ways() {
    let authority = CertificateAuthority::new("test").unwrap();
    let controller = node(&authority, NodeRole::Controller, 1);
    let worker = node(&authority, NodeRole::Worker, 1);
    let called = worker.call(controller.local_addr(), NodeRole::Controller);
    let (link, other) = tokio::join!(called, controller.accept());
    let (link, other) = (link.unwrap(), other.unwrap());
    assert_eq!(
        (link.peer().role, other.peer().role),
        (NodeRole::Controller, NodeRole::Worker)
    );
    assert_eq!(other.peer().address, worker.local_addr());
    let (mut there, mut back) = link.split();
    let (mut answer, mut heard) = other.split();
    for len in [0, 1, 1000, 70_000, 5_000_000] {
        let message: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let (sent, got) = tokio::join!(there.send(&message), heard.recv());
        sent.unwrap();
        assert_eq!(got.unwrap().unwrap(), message);
        answer.send(b"ok").await.unwrap();
        assert_eq!(back.recv().await.unwrap().unwrap(), b"ok");
    }
    let long = vec![0; volley_transports::quic::CONTROL_MESSAGE_MAX + 1];
    assert!(matches!(
        there.send(&long).await,
        Err(QuicError::TooLong { .. })
    ));
    there.finish().await;
    assert!(heard.recv().await.unwrap().is_none());
    answer.close("that is all");
    let error = back.recv().await.unwrap_err().to_string();
    assert!(error.contains("that is all"), "{error}");
}

#[tokio::test]
async fn a_role_cannot_be_pretended_and_other_clusters_get_nothing() {
    let authority = CertificateAuthority::new("ours").unwrap();
    let controller = node(&authority, NodeRole::Controller, 1);
    let worker = node(&authority, NodeRole::Worker, 1);
    let other = CertificateAuthority::new("ours").unwrap();
    let stranger = node(&other, NodeRole::Worker, 1);
    let impostor = node(&other, NodeRole::Controller, 1);

    // A worker that says it is the controller is found out by its certificate.
    let error = worker.call(
        node(&authority, NodeRole::Worker, 1).local_addr(),
        NodeRole::Controller,
    );
    assert!(matches!(error.await, Err(QuicError::Connect { .. })));
    // The same name from another authority is worth nothing, in either direction.
    let called = stranger
        .call(controller.local_addr(), NodeRole::Controller)
        .await;
    assert!(called.is_err());
    assert!(
        worker
            .call(impostor.local_addr(), NodeRole::Controller)
            .await
            .is_err()
    );
    // Controllers exchange no rows.
    let quick = QuicOptions {
        connect: Duration::from_millis(500),
        ..options(1)
    };
    let identity = authority.identity(NodeRole::Controller, "quick").unwrap();
    let pushy = QuicNode::bind(SocketAddr::from(([127, 0, 0, 1], 0)), &identity, quick).unwrap();
    let _expert = worker
        .join(Epoch(1), Role::Expert.worker(0), &TOPOLOGY, &[])
        .unwrap();
    let addresses = [Some(worker.local_addr())];
    let mut end = pushy
        .join(Epoch(1), Role::Attention.worker(0), &TOPOLOGY, &addresses)
        .unwrap();
    assert!(matches!(
        next(&mut end),
        Event::Lost {
            reason: LostReason::Unreachable,
            ..
        }
    ));
    // None of this has come to the controller.
    let (link, _) = tokio::join!(
        worker.call(controller.local_addr(), NodeRole::Controller),
        controller.accept()
    );
    assert_eq!(link.unwrap().peer().role, NodeRole::Controller);
}

#[tokio::test]
async fn datagrams_of_garbage_disturb_nobody() {
    let authority = CertificateAuthority::new("test").unwrap();
    let controller = node(&authority, NodeRole::Controller, 1);
    let worker = node(&authority, NodeRole::Worker, 1);
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut random = 1u64;
    for len in 0..1500 {
        let datagram: Vec<u8> = (0..len)
            .map(|_| {
                random = random
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                (random >> 56) as u8
            })
            .collect();
        let _ = socket.send_to(&datagram, controller.local_addr());
    }
    let called = worker.call(controller.local_addr(), NodeRole::Controller);
    let (link, _) = tokio::join!(called, controller.accept());
    link.unwrap();
}
