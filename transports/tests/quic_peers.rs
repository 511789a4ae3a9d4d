//! Who may be whom over QUIC: certificates of one seat, two processes that claim the same one, and probes of the way between two nodes.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use volley_transports::quic::{
    CertificateAuthority, Identity, NodeRole, QuicError, QuicNode, QuicOptions,
};
use volley_transports::{
    Endpoint, Epoch, Event, Lane, LostReason, MicroBatch, Role, Topology, WorkerId,
};

/// Longest wait of a test that goes well.
const LIMIT: Duration = Duration::from_secs(30);
const TOPOLOGY: Topology = Topology {
    attention: 2,
    experts: 2,
    micro_batches: 1,
    dispatch_bytes: 64,
    combine_bytes: 64,
};

fn options() -> QuicOptions {
    QuicOptions {
        connections: 1,
        connect: Duration::from_secs(2),
        // Tests share two cores with a compiler.
        idle: Duration::from_secs(20),
        ..QuicOptions::default()
    }
}

fn node(identity: &Identity) -> QuicNode {
    QuicNode::bind(SocketAddr::from(([127, 0, 0, 1], 0)), identity, options()).unwrap()
}

fn seated(authority: &CertificateAuthority, seat: WorkerId) -> QuicNode {
    let issued = authority
        .issue_seat(seat, "seated", CertificateAuthority::VALIDITY)
        .unwrap();
    let ca = authority.certificate_pem();
    node(&Identity::from_pem(ca, &issued.certificate_pem, &issued.key_pem, None).unwrap())
}

/// Whether a ball that attention worker `me` serves comes to expert worker `expert`.
fn plays(a: &QuicNode, me: u16, e: &QuicNode, expert: u16) -> bool {
    let mut addresses = [None, None];
    addresses[usize::from(expert)] = Some(e.local_addr());
    let expert_id = Role::Expert.worker(expert);
    let mut there = e.join(Epoch(1), expert_id, &TOPOLOGY, &[]).unwrap();
    let attention = Role::Attention.worker(me);
    let mut here = a.join(Epoch(1), attention, &TOPOLOGY, &addresses).unwrap();
    here.post(Lane::new(expert, MicroBatch(0)), 4).unwrap();
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < LIMIT, "nothing came");
        if let Some(Event::Arrived { .. }) = there.poll() {
            return true;
        }
        if let Some(Event::Lost { peer, .. }) = here.poll() {
            assert_eq!(peer, expert_id);
            return false;
        }
        there.wait(Duration::from_millis(10));
    }
}

#[test]
fn a_certificate_of_one_seat_is_good_for_no_other() {
    let authority = CertificateAuthority::new("test").unwrap();
    let any = node(&authority.identity(NodeRole::Worker, "any").unwrap());
    let attention = seated(&authority, Role::Attention.worker(1));
    let expert = seated(&authority, Role::Expert.worker(1));
    assert!(plays(&attention, 1, &expert, 1), "both are who they say");
    assert!(plays(&any, 0, &expert, 1), "one without a seat may be any");
    assert!(!plays(&attention, 0, &any, 0), "the caller is another");
    assert!(!plays(&any, 0, &expert, 0), "the called one is another");
}

#[test]
fn a_second_worker_of_the_same_index_is_refused_while_the_first_lives() {
    let authority = CertificateAuthority::new("test").unwrap();
    let [first, second, expert] =
        [(); 3].map(|()| node(&authority.identity(NodeRole::Worker, "w").unwrap()));
    let addresses = [Some(expert.local_addr()), None];
    let me = Role::Attention.worker(0);
    let lane = Lane::new(0, MicroBatch(0));
    let mut there = expert
        .join(Epoch(1), Role::Expert.worker(0), &TOPOLOGY, &[])
        .unwrap();
    let mut here = first.join(Epoch(1), me, &TOPOLOGY, &addresses).unwrap();
    here.post(lane, 4).unwrap();
    next(&mut there);
    let mut double = second.join(Epoch(1), me, &TOPOLOGY, &addresses).unwrap();
    let lost = Event::Lost {
        peer: Role::Expert.worker(0),
        reason: LostReason::Unreachable,
    };
    assert_eq!(next(&mut double), lost);
    // The first is not disturbed.
    there.post(lane, 0).unwrap();
    assert_eq!(next(&mut here), Event::Arrived { lane, len: 0 });
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

#[tokio::test]
async fn a_probe_tells_who_is_there_and_how_large_datagrams_may_be() {
    let authority = CertificateAuthority::new("test").unwrap();
    let a = seated(&authority, Role::Attention.worker(0));
    let e = seated(&authority, Role::Expert.worker(3));
    let reached = a.probe(e.local_addr(), NodeRole::Worker).await.unwrap();
    assert_eq!(reached.peer.seat, Some(Role::Expert.worker(3)));
    assert_eq!(reached.peer.address, e.local_addr());
    assert!(reached.datagram >= 1200, "{reached:?}");

    let other = CertificateAuthority::new("test").unwrap();
    let stranger = seated(&other, Role::Expert.worker(3));
    let refused = a.probe(stranger.local_addr(), NodeRole::Worker).await;
    assert!(
        matches!(refused, Err(QuicError::Connect { .. })),
        "{refused:?}"
    );
    let scheduler = node(&authority.identity(NodeRole::Scheduler, "s").unwrap());
    let refused = a.probe(scheduler.local_addr(), NodeRole::Worker).await;
    assert!(refused.is_err(), "a scheduler is no worker");
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let late = a
        .probe(silent.local_addr().unwrap(), NodeRole::Worker)
        .await;
    assert!(late.is_err(), "nobody answers there");
}
