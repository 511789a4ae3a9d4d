//! Peers that break the protocol, hold on for ever, or are not who they say: each loses its own connection and nothing else.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::{Connection, RecvStream, SendStream, VarInt};
use tokio::time::timeout;

use super::hello::{Hello, REFUSED, TAKEN};
use super::setup::{self, Window};
use super::welcome::STRANGERS_MAX;
use super::*;
use crate::{Endpoint, Epoch, Event, LostReason, MicroBatch, Role, Topology};

const LIMIT: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);
const TOPOLOGY: Topology = Topology {
    attention: 1,
    experts: 1,
    micro_batches: 2,
    dispatch_bytes: 256,
    combine_bytes: 256,
};
const EXPERT: crate::WorkerId = Role::Expert.worker(0);
const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

fn options(connect: Duration) -> QuicOptions {
    QuicOptions {
        // A machine that is busy with other tests is no sign of death.
        idle: LIMIT,
        connect,
        ..QuicOptions::default()
    }
}

fn node(authority: &CertificateAuthority, role: NodeRole, connect: Duration) -> QuicNode {
    let identity = authority.identity(role, "test").unwrap();
    QuicNode::bind(ANY, &identity, options(connect)).unwrap()
}

/// A caller without manners: an endpoint of its own, which says what it is told to.
struct Rogue {
    endpoint: quinn::Endpoint,
    config: quinn::ClientConfig,
}

impl Rogue {
    fn new(authority: &CertificateAuthority) -> Self {
        let identity = authority.identity(NodeRole::Worker, "rogue").unwrap();
        let transport = setup::transport(&options(LIMIT)).unwrap();
        Rogue {
            endpoint: quinn::Endpoint::client(ANY).unwrap(),
            config: setup::client(&identity, &transport).unwrap(),
        }
    }

    async fn connect(&self, node: &QuicNode, role: NodeRole) -> Connection {
        let address = node.local_addr();
        let connecting =
            self.endpoint
                .connect_with(self.config.clone(), address, role.server_name());
        within(connecting.unwrap()).await.unwrap()
    }

    /// Says hello; what the answer begins with.
    async fn hello(
        &self,
        node: &QuicNode,
        role: NodeRole,
        hello: Hello,
    ) -> (Connection, SendStream, RecvStream, u8) {
        let connection = self.connect(node, role).await;
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(&hello.encode()).await.unwrap();
        // A connection that is closed may have had an answer that did not arrive.
        let mut answer = [REFUSED];
        let _ = within(receive.read_exact(&mut answer)).await;
        (connection, send, receive, answer[0])
    }
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    timeout(LIMIT, what).await.expect("it takes for ever")
}

fn data(epoch: u32, connection: u8, connections: u8) -> DataHello {
    DataHello {
        carrier: Carrier::Streams,
        epoch: Epoch(epoch),
        attention: 0,
        expert: 0,
        connection,
        connections,
        topology: TOPOLOGY,
    }
}

async fn next(end: &mut QuicEndpoint) -> Event {
    let start = Instant::now();
    loop {
        if let Some(event) = end.poll() {
            return event;
        }
        assert!(start.elapsed() < LIMIT, "nothing came");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// That a worker and a controller who keep to the rules still find each other.
async fn still_serves(authority: &CertificateAuthority, controller: &QuicNode) {
    let worker = node(authority, NodeRole::Worker, LIMIT);
    let called = worker.call(controller.local_addr(), NodeRole::Controller);
    let (link, _) = within(async { tokio::join!(called, controller.accept()) }).await;
    link.unwrap();
}

#[tokio::test]
async fn who_has_no_certificate_gets_nothing() {
    let authority = CertificateAuthority::new("test").unwrap();
    let controller = node(&authority, NodeRole::Controller, LIMIT);
    let mut rogue = Rogue::new(&authority);
    let mut roots = rustls::RootCertStore::empty();
    let pem = authority.certificate_pem().as_bytes();
    let root = rustls::pki_types::pem::PemObject::from_pem_slice(pem).unwrap();
    roots.add(root).unwrap();
    let mut crypto = rustls::ClientConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_protocol_versions(&[&rustls::version::TLS13])
    .unwrap()
    .with_root_certificates(roots)
    .with_no_client_auth();
    crypto.alpn_protocols = vec![hello::ALPN.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(crypto).unwrap();
    rogue.config = quinn::ClientConfig::new(Arc::new(crypto));

    // A client may believe in a handshake before the server has looked at its certificate.
    let connecting = rogue.endpoint.connect_with(
        rogue.config.clone(),
        controller.local_addr(),
        NodeRole::Controller.server_name(),
    );
    if let Ok(connection) = within(connecting.unwrap()).await {
        if let Ok((mut send, _receive)) = connection.open_bi().await {
            let _ = send.write_all(&Hello::Control.encode()).await;
        }
        let reason = within(connection.closed()).await;
        assert!(
            matches!(reason, quinn::ConnectionError::ConnectionClosed(_)),
            "{reason}"
        );
    }
    still_serves(&authority, &controller).await;
}

#[tokio::test]
async fn certificates_end_and_can_be_revoked() {
    let authority = CertificateAuthority::new("test").unwrap();
    let controller = node(&authority, NodeRole::Controller, LIMIT);
    let bind = |issued: &IssuedCertificate, revoked: Option<&str>| {
        let (certificate, key) = (&issued.certificate_pem, &issued.key_pem);
        let identity =
            Identity::from_pem(authority.certificate_pem(), certificate, key, revoked).unwrap();
        QuicNode::bind(ANY, &identity, options(Duration::from_secs(5))).unwrap()
    };
    let issue = |validity| authority.issue(NodeRole::Worker, "a", validity).unwrap();
    let calls = async |worker: &QuicNode| {
        let link = worker.call(controller.local_addr(), NodeRole::Controller);
        within(link).await.is_ok()
    };

    let ended = bind(&issue(Duration::ZERO), None);
    // Certificates end with a whole second.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(!calls(&ended).await, "it has ended");

    let issued = issue(DAY);
    let worker = bind(&issued, None);
    assert!(calls(&worker).await);
    let list = authority.revoke(None, &issued.certificate_pem).unwrap();
    let of_controller = authority.issue(NodeRole::Controller, "c", DAY).unwrap();
    let renewed = Identity::from_pem(
        authority.certificate_pem(),
        &of_controller.certificate_pem,
        &of_controller.key_pem,
        Some(&list),
    );
    controller.renew(&renewed.unwrap()).unwrap();
    assert!(!calls(&worker).await, "it is revoked");
    assert!(
        calls(&bind(&issue(DAY), Some(&list))).await,
        "this one is not"
    );
    // A worker with a new certificate is itself again, without a new socket.
    let again = authority.identity(NodeRole::Worker, "a").unwrap();
    worker.renew(&again).unwrap();
    assert!(calls(&worker).await);
    // Callers look at the list as well.
    let list = authority
        .revoke(Some(&list), &of_controller.certificate_pem)
        .unwrap();
    assert!(
        !calls(&bind(&issue(DAY), Some(&list))).await,
        "the controller is revoked"
    );
}

#[tokio::test]
async fn hellos_that_do_not_come_to_an_end_are_not_waited_for() {
    let authority = CertificateAuthority::new("test").unwrap();
    let controller = node(&authority, NodeRole::Controller, Duration::from_millis(500));
    let rogue = Rogue::new(&authority);
    let mut held = Vec::new();
    for count in 0..20 {
        let connection = rogue.connect(&controller, NodeRole::Controller).await;
        if let Ok((mut send, receive)) = connection.open_bi().await {
            let _ = send.write_all(&Hello::Control.encode()[..count]).await;
            held.push((connection, send, receive));
        }
    }
    for (connection, ..) in held {
        within(connection.closed()).await;
    }
    let (.., answer) = rogue
        .hello(&controller, NodeRole::Controller, Hello::Control)
        .await;
    assert_eq!(answer, TAKEN);
    let connection = rogue.connect(&controller, NodeRole::Controller).await;
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(&[7; hello::HELLO_BYTES]).await.unwrap();
    let mut answer = [0];
    within(receive.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer[0], REFUSED);
    still_serves(&authority, &controller).await;
}

#[tokio::test]
async fn frames_that_break_the_rules_end_their_own_lanes_only() {
    let authority = CertificateAuthority::new("test").unwrap();
    let expert = node(&authority, NodeRole::Worker, LIMIT);
    let rogue = Rogue::new(&authority);
    let frame = |len: u32, bytes: &[u8]| [&len.to_le_bytes(), bytes].concat();
    // What is written to the stream of lane 0, and whether the stream is ended then.
    let cases: [(&str, Vec<u8>, bool); 5] = [
        ("cut off in its length", vec![3, 0], true),
        ("cut off in its bytes", frame(100, &[1; 50]), true),
        ("longer than its slot", frame(257, &[1; 257]), false),
        ("as long as can be said", frame(u32::MAX, &[1; 300]), false),
        (
            "out of turn",
            [frame(2, b"ab"), frame(2, b"cd")].concat(),
            false,
        ),
    ];
    for (epoch, (case, bytes, ends)) in (1..).zip(cases) {
        let mut end = expert.join(Epoch(epoch), EXPERT, &TOPOLOGY, &[]).unwrap();
        let hello = Hello::Data(data(epoch, 0, 1));
        let (connection, .., answer) = rogue.hello(&expert, NodeRole::Worker, hello).await;
        assert_eq!(answer, TAKEN, "{case}");
        let mut lanes = Vec::new();
        for lane in 0..TOPOLOGY.micro_batches {
            let (mut send, receive) = connection.open_bi().await.unwrap();
            send.write_all(&[lane]).await.unwrap();
            lanes.push((send, receive));
        }
        let send = &mut lanes[0].0;
        // It may be found out before everything is written.
        let _ = send.write_all(&bytes).await;
        if ends {
            let _ = send.finish();
        }
        let lost = loop {
            match next(&mut end).await {
                // Of two frames in a row the first is in order.
                Event::Arrived { .. } => {}
                lost => break lost,
            }
        };
        let expected = Event::Lost {
            peer: Role::Attention.worker(0),
            reason: LostReason::Broken,
        };
        assert_eq!(lost, expected, "{case}");
        within(connection.closed()).await;
    }
    // Lanes that do not exist, or are opened twice.
    for (epoch, named) in (10..).zip([[0, 0], [0, 2], [255, 1]]) {
        let mut end = expert.join(Epoch(epoch), EXPERT, &TOPOLOGY, &[]).unwrap();
        let hello = Hello::Data(data(epoch, 0, 1));
        let (connection, ..) = rogue.hello(&expert, NodeRole::Worker, hello).await;
        let mut lanes = Vec::new();
        for lane in named {
            if let Ok((mut send, receive)) = connection.open_bi().await {
                let _ = send.write_all(&[lane]).await;
                lanes.push((send, receive));
            }
        }
        let lost = next(&mut end).await;
        assert!(
            matches!(
                lost,
                Event::Lost {
                    reason: LostReason::Broken,
                    ..
                }
            ),
            "{named:?}: {lost:?}"
        );
    }
    // The node goes on.
    let attention = node(&authority, NodeRole::Worker, LIMIT);
    let mut there = expert.join(Epoch(20), EXPERT, &TOPOLOGY, &[]).unwrap();
    let me = Role::Attention.worker(0);
    let addresses = [Some(expert.local_addr())];
    let mut here = attention
        .join(Epoch(20), me, &TOPOLOGY, &addresses)
        .unwrap();
    let lane = crate::Lane::new(0, MicroBatch(1));
    here.post(lane, 3).unwrap();
    assert_eq!(next(&mut there).await, Event::Arrived { lane, len: 3 });
}

#[tokio::test]
async fn connections_nobody_asked_for_are_refused() {
    let authority = CertificateAuthority::new("test").unwrap();
    let expert = node(&authority, NodeRole::Worker, LIMIT);
    let rogue = Rogue::new(&authority);
    let mut end = expert.join(Epoch(1), EXPERT, &TOPOLOGY, &[]).unwrap();
    let hello = |connection, connections| Hello::Data(data(1, connection, connections));
    let (first, .., answer) = rogue.hello(&expert, NodeRole::Worker, hello(0, 2)).await;
    assert_eq!(answer, TAKEN);
    // The same one again, and one that counts otherwise.
    for again in [hello(0, 2), hello(2, 3)] {
        let (connection, .., answer) = rogue.hello(&expert, NodeRole::Worker, again).await;
        if answer == TAKEN {
            within(connection.closed()).await;
        }
    }
    assert!(first.close_reason().is_none());
    let (second, .., answer) = rogue.hello(&expert, NodeRole::Worker, hello(1, 2)).await;
    assert_eq!(answer, TAKEN);
    // The lanes are served now; whoever comes as the same worker is told so.
    let refused = async || {
        let (_connection, _send, mut receive, answer) =
            rogue.hello(&expert, NodeRole::Worker, hello(0, 2)).await;
        let reason = within(receive.read_to_end(1000)).await.unwrap_or_default();
        (answer, String::from_utf8_lossy(&reason).into_owned())
    };
    let until = Instant::now() + LIMIT;
    loop {
        let (answer, reason) = refused().await;
        if reason.contains("attention-0 has its lanes") {
            assert_eq!(answer, REFUSED);
            break;
        }
        assert!(Instant::now() < until, "they are taken for ever");
    }
    assert!(first.close_reason().is_none() && second.close_reason().is_none());
    assert_eq!(end.poll(), None);
}

#[tokio::test]
async fn workers_that_wait_for_an_epoch_keep_nobody_out() {
    let authority = CertificateAuthority::new("test").unwrap();
    let expert = node(&authority, NodeRole::Worker, LIMIT);
    let rogue = Rogue::new(&authority);
    let mut waiting = Vec::new();
    for _ in 0..STRANGERS_MAX + 10 {
        let connection = rogue.connect(&expert, NodeRole::Worker).await;
        let (mut send, receive) = connection.open_bi().await.unwrap();
        let hello = Hello::Data(data(7, 0, 1)).encode();
        send.write_all(&hello).await.unwrap();
        waiting.push((connection, send, receive));
    }
    let (.., answer) = rogue.hello(&expert, NodeRole::Worker, Hello::Control).await;
    assert_eq!(answer, TAKEN);
    // The epoch begins: one of them gets the lanes.
    let _end = expert.join(Epoch(7), EXPERT, &TOPOLOGY, &[]).unwrap();
    let mut taken = 0;
    for (_, _, receive) in &mut waiting {
        let mut answer = [0];
        if within(receive.read_exact(&mut answer)).await.is_ok() {
            taken += usize::from(answer[0] == TAKEN);
        }
    }
    assert!(taken >= 1);
}

/// Writes until nothing more is taken; how much was.
async fn stuff(send: &mut SendStream, most: usize) -> usize {
    let mut taken = 0;
    while taken < most {
        match timeout(Duration::from_millis(300), send.write(&[0; 1 << 10])).await {
            Ok(Ok(count)) => taken += count,
            Ok(Err(_)) | Err(_) => break,
        }
    }
    taken
}

#[tokio::test]
async fn what_a_connection_can_make_a_node_hold_is_bounded() {
    const OWN: usize = 16 << 10;
    let authority = CertificateAuthority::new("test").unwrap();
    let controller = node(&authority, NodeRole::Controller, LIMIT);
    let mut rogue = Rogue::new(&authority);
    let mut transport = quinn::TransportConfig::default();
    transport.send_window(OWN as u64);
    rogue.config.transport_config(Arc::new(transport));
    // Before the hello is there, on whatever streams.
    let connection = rogue.connect(&controller, NodeRole::Controller).await;
    let (mut first, _keep) = connection.open_bi().await.unwrap();
    first
        .write_all(&Hello::Control.encode()[..3])
        .await
        .unwrap();
    let mut taken = 3;
    let mut streams = Vec::new();
    for _ in 0..4 {
        let (mut send, receive) = connection.open_bi().await.unwrap();
        taken += stuff(&mut send, 1 << 20).await;
        streams.push((send, receive));
    }
    assert!(taken <= 4096 + OWN + 1024, "a stranger left {taken} bytes");
    // A link whose messages nobody takes.
    let (_connection, mut send, _receive, answer) = rogue
        .hello(&controller, NodeRole::Controller, Hello::Control)
        .await;
    assert_eq!(answer, TAKEN);
    let taken = stuff(&mut send, 64 << 20).await;
    assert!(
        taken <= (1 << 20) + OWN + 1024,
        "a worker left {taken} bytes"
    );
    connection.close(VarInt::from_u32(0), b"");
}

#[test]
fn lanes_get_room_for_their_frames_and_no_more_than_the_most() {
    let of = |bytes: usize, connections: u8| {
        let mut data = data(1, 0, connections);
        data.topology.dispatch_bytes = bytes;
        Window::lanes(&data)
    };
    assert!(of(0, 1) < of(1 << 20, 2) && of(1 << 20, 2) < of(1 << 20, 1));
    assert_eq!(of(usize::MAX, 1), Window::MAX);
}
