//! The RDMA fabric: the conformance suite, and what breaks. Needs RoCE devices that reach each other, as in `integration/rdma-guest`; elsewhere each test says that it
//! was left out.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use volley_transports::conformance::FabricFactory;
use volley_transports::quic::{CertificateAuthority, NodeRole, QuicNode, QuicOptions};
use volley_transports::rdma::{RdmaEndpoint, RdmaError, RdmaFabric, RdmaOptions};
use volley_transports::verbs::DeviceList;
use volley_transports::{
    Endpoint, Epoch, Event, Lane, LaneError, LostReason, MicroBatch, Role, Spin, Topology,
};

const LIMIT: Duration = Duration::from_secs(60);
const TOPOLOGY: Topology = Topology {
    attention: 1,
    experts: 1,
    micro_batches: 2,
    dispatch_bytes: 4096,
    combine_bytes: 4096,
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged; the counter is a plain cell that never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise on `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `alloc` above with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Names of devices with which frames can go both ways.
fn devices() -> Result<[String; 2], String> {
    let list = DeviceList::open().map_err(|error| error.to_string())?;
    let roce = list.iter().filter(|device| {
        device
            .open()
            .is_ok_and(|context| !context.is_iwarp() && context.gids().is_ok_and(|g| !g.is_empty()))
    });
    let names: Vec<String> = roce.map(|device| device.name().to_owned()).collect();
    match &names[..] {
        [a, b, ..] => Ok([a.clone(), b.clone()]),
        // There nothing may be left out.
        _ if in_guest() => panic!("no two RoCE devices"),
        _ => Err("no two RoCE devices".to_owned()),
    }
}

/// The devices, or a return from the test.
macro_rules! devices {
    () => {
        match devices() {
            Ok(devices) => devices,
            Err(missing) => return eprintln!("left out: {missing}"),
        }
    };
}

fn node(authority: &CertificateAuthority) -> QuicNode {
    // Why a link broke stands in the log alone.
    let log = tracing_subscriber::fmt().with_test_writer();
    let _ = log.with_max_level(tracing::Level::WARN).try_init();
    let identity = authority.identity(NodeRole::Worker, "test").unwrap();
    let options = QuicOptions {
        // A machine that is busy with other tests is no sign of death.
        idle: LIMIT,
        connect: LIMIT,
        ..QuicOptions::default()
    };
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    QuicNode::bind(any, &identity, options).unwrap()
}

fn options(rails: &[&str]) -> RdmaOptions {
    RdmaOptions {
        rails: rails.iter().map(|rail| rail.parse().unwrap()).collect(),
        // Emulated, many times slower than a card.
        timeout: 17,
        ..RdmaOptions::default()
    }
}

fn fabric(authority: &CertificateAuthority, options: RdmaOptions) -> (QuicNode, RdmaFabric) {
    let node = node(authority);
    let fabric = RdmaFabric::open(node.clone(), options, Spin::NONE).unwrap();
    (node, fabric)
}

/// Tests poll one end at a time, and what is posted to a peer that was not met yet waits for its sender to be polled.
fn until_met<'a>(ends: impl IntoIterator<Item = &'a RdmaEndpoint> + Clone) {
    let until = Instant::now() + LIMIT;
    while !ends.clone().into_iter().all(RdmaEndpoint::has_met_all) {
        assert!(Instant::now() < until, "workers do not meet");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A fabric on each side: of one rail, or of two.
struct Rdma {
    rails: usize,
    depth: u32,
}

impl FabricFactory for Rdma {
    fn missing(&self) -> Option<String> {
        devices().err()
    }

    fn build(&self, topology: Topology) -> Vec<Box<dyn Endpoint>> {
        let [a, b] = devices().unwrap();
        let authority = CertificateAuthority::new("test").unwrap();
        let options = |rails: [&str; 2]| RdmaOptions {
            depth: self.depth,
            ..options(&rails[..self.rails])
        };
        // The other way round: each rail really leads from one device to the other.
        let (_, attention) = fabric(&authority, options([&a, &b]));
        let (node, experts) = fabric(&authority, options([&b, &a]));
        let addresses = vec![Some(node.local_addr()); topology.experts.into()];
        let ends = topology.ids().map(|id| {
            let fabric = match id.role {
                Role::Attention => &attention,
                Role::Expert => &experts,
            };
            fabric.join(Epoch(1), id, &topology, &addresses).unwrap()
        });
        let ends: Vec<_> = ends.collect();
        until_met(&ends);
        let boxed = ends
            .into_iter()
            .map(|end| Box::new(end) as Box<dyn Endpoint>);
        boxed.collect()
    }
}

mod one_rail {
    volley_transports::conformance_tests!(super::Rdma {
        rails: 1,
        depth: 64
    });
}

/// Short queues are full all the time.
mod two_rails_and_short_queues {
    volley_transports::conformance_tests!(super::Rdma { rails: 2, depth: 2 });
}

struct Pair {
    node: QuicNode,
    attention: RdmaFabric,
    experts: RdmaFabric,
}

impl Pair {
    fn new(a: RdmaOptions, b: RdmaOptions) -> Self {
        let authority = CertificateAuthority::new("test").unwrap();
        let (_, attention) = fabric(&authority, a);
        let (node, experts) = fabric(&authority, b);
        Self {
            node,
            attention,
            experts,
        }
    }

    fn join(&self, epoch: u32) -> (RdmaEndpoint, RdmaEndpoint) {
        let addresses = [Some(self.node.local_addr())];
        let join = |fabric: &RdmaFabric, role: Role| {
            fabric
                .join(Epoch(epoch), role.worker(0), &TOPOLOGY, &addresses)
                .unwrap()
        };
        let (attention, expert) = (
            join(&self.attention, Role::Attention),
            join(&self.experts, Role::Expert),
        );
        until_met([&attention, &expert]);
        (attention, expert)
    }
}

#[track_caller]
fn next(end: &mut RdmaEndpoint) -> Event {
    let start = Instant::now();
    loop {
        if let Some(event) = end.poll() {
            return event;
        }
        assert!(start.elapsed() < LIMIT, "nothing came");
        end.wait(Duration::from_secs(1));
    }
}

#[track_caller]
fn rally(attention: &mut RdmaEndpoint, expert: &mut RdmaEndpoint, len: usize) {
    let lane = Lane::new(0, MicroBatch(0));
    attention.post(lane, len).unwrap();
    assert_eq!(next(expert), Event::Arrived { lane, len });
    expert.post(lane, len).unwrap();
    assert_eq!(next(attention), Event::Arrived { lane, len });
}

/// What the kernel has of a kind of thing, of all processes: the guest runs nothing else.
fn kernel_has(kind: &str) -> usize {
    let output = Command::new("rdma")
        .args(["resource", "show", kind])
        .output();
    String::from_utf8_lossy(&output.unwrap().stdout)
        .lines()
        .count()
}

fn in_guest() -> bool {
    std::env::var_os("RDMA_GUEST").is_some()
}

#[test]
fn a_frame_costs_no_allocation_no_registration_and_no_copy() {
    let [a, b] = devices!();
    let pair = Pair::new(options(&[&a]), options(&[&b]));
    let (mut attention, mut expert) = pair.join(1);
    let lane = Lane::new(0, MicroBatch(0));
    rally(&mut attention, &mut expert, 4096);
    let regions = in_guest().then(|| kernel_has("mr"));
    let slot = attention.slot(lane).unwrap().as_ptr();
    let received = attention.received(lane).unwrap().as_ptr();
    let before = ALLOCATIONS.with(Cell::get);
    for round in 0..500_usize {
        // Short ones travel in the request, long ones from the slot.
        let len = if round % 2 == 0 { 64 } else { 4096 };
        let out = attention.slot(lane).unwrap();
        assert_eq!(
            out.as_ptr(),
            slot,
            "frames are built where they are sent from"
        );
        out[..len].fill(round as u8);
        rally(&mut attention, &mut expert, len);
        let back = attention.received(lane).unwrap();
        assert_eq!(back.as_ptr(), received, "and read where they arrive");
    }
    assert_eq!(
        ALLOCATIONS.with(Cell::get),
        before,
        "the data path allocated"
    );
    if let Some(regions) = regions {
        assert_eq!(kernel_has("mr"), regions, "the data path registered memory");
    }
}

#[test]
fn a_thousand_epochs_leave_nothing_behind() {
    let [a, b] = devices!();
    let pair = Pair::new(options(&[&a]), options(&[&b]));
    let kinds = ["qp", "mr", "cq", "pd"];
    let count = || kinds.map(|kind| if in_guest() { kernel_has(kind) } else { 0 });
    let rounds = if in_guest() { 1000 } else { 20 };
    let before = count();
    for epoch in 1..=rounds {
        let (mut attention, mut expert) = pair.join(epoch);
        rally(&mut attention, &mut expert, 300);
        if epoch % 2 == 0 {
            drop((attention, expert));
        } else {
            drop((expert, attention));
        }
    }
    // The last ones go when their farewell is said.
    let start = Instant::now();
    while count() != before {
        assert!(
            start.elapsed() < LIMIT,
            "{kinds:?}: {before:?} before, {:?} after",
            count()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_link_that_stays_down_loses_the_peer_and_the_next_epoch_works() {
    let [a, b] = devices!();
    if !in_guest() {
        return eprintln!("left out: links are taken down in the guest only");
    }
    let netdev = std::fs::read_to_string(format!(
        "/sys/class/infiniband/{b}/ports/1/gid_attrs/ndevs/0"
    ));
    let netdev = netdev.unwrap();
    let ip = |state: &str| {
        let set = Command::new("ip")
            .args(["link", "set", netdev.trim(), state])
            .status();
        assert!(set.unwrap().success());
    };
    let quick = |rail: &str| RdmaOptions {
        port_patience: Duration::from_millis(200),
        ..options(&[rail])
    };
    let pair = Pair::new(quick(&a), quick(&b));
    let (mut attention, mut expert) = pair.join(1);
    rally(&mut attention, &mut expert, 1000);
    ip("down");
    for end in [&mut attention, &mut expert] {
        let event = next(end);
        assert!(
            matches!(
                event,
                Event::Lost {
                    reason: LostReason::Broken | LostReason::TimedOut,
                    ..
                }
            ),
            "{event:?}"
        );
    }
    let lane = Lane::new(0, MicroBatch(1));
    assert!(matches!(
        attention.post(lane, 1),
        Err(LaneError::PeerLost { .. })
    ));
    ip("up");
    drop((attention, expert));
    let start = Instant::now();
    let mut epoch = 2;
    loop {
        let (mut attention, mut expert) = pair.join(epoch);
        attention.post(lane, 5).unwrap();
        match next(&mut expert) {
            Event::Arrived { len: 5, .. } => break,
            // The port is not up yet, or its address is not back.
            Event::Lost { .. } => assert!(start.elapsed() < LIMIT, "the link does not come back"),
            event => panic!("{event:?}"),
        }
        std::thread::sleep(Duration::from_millis(200));
        epoch += 1;
    }
}

#[test]
fn packets_that_are_lost_are_sent_again() {
    let [a, b] = devices!();
    if !in_guest() {
        return eprintln!("left out: packets are dropped in the guest only");
    }
    let netdev = std::fs::read_to_string(format!(
        "/sys/class/infiniband/{b}/ports/1/gid_attrs/ndevs/0"
    ));
    let netdev = netdev.unwrap();
    let tc = |arguments: &[&str]| {
        let set = Command::new("tc").args(arguments).status();
        assert!(set.unwrap().success());
    };
    let hasty = |rail: &str| RdmaOptions {
        timeout: 14,
        ..options(&[rail])
    };
    let pair = Pair::new(hasty(&a), hasty(&b));
    let (mut attention, mut expert) = pair.join(1);
    rally(&mut attention, &mut expert, 100);
    let lane = Lane::new(0, MicroBatch(0));
    tc(&[
        "qdisc",
        "add",
        "dev",
        netdev.trim(),
        "root",
        "netem",
        "loss",
        "5%",
    ]);
    for round in 0..60_u8 {
        attention.slot(lane).unwrap().fill(round);
        attention.post(lane, 4096).unwrap();
        next(&mut expert);
        assert!(
            expert
                .received(lane)
                .unwrap()
                .iter()
                .all(|&byte| byte == round)
        );
        let (received, slot) = expert.both(lane).unwrap();
        slot.copy_from_slice(received);
        expert.post(lane, 4096).unwrap();
        next(&mut attention);
        assert!(
            attention
                .received(lane)
                .unwrap()
                .iter()
                .all(|&byte| byte == round)
        );
    }
    tc(&["qdisc", "del", "dev", netdev.trim(), "root"]);
}

#[test]
fn epochs_do_not_mix_and_those_who_are_not_there_are_unreachable() {
    let [a, b] = devices!();
    let authority = CertificateAuthority::new("test").unwrap();
    let quick = QuicOptions {
        connect: Duration::from_millis(500),
        ..QuicOptions::default()
    };
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let identity = authority.identity(NodeRole::Worker, "quick").unwrap();
    let nodes = [(); 2].map(|()| QuicNode::bind(any, &identity, quick).unwrap());
    let addresses = [Some(nodes[1].local_addr())];
    let attention = RdmaFabric::open(nodes[0].clone(), options(&[&a]), Spin::NONE).unwrap();
    let experts = RdmaFabric::open(nodes[1].clone(), options(&[&b]), Spin::NONE).unwrap();
    let unreachable = |end: &mut RdmaEndpoint, peer| {
        let reason = LostReason::Unreachable;
        assert_eq!(next(end), Event::Lost { peer, reason });
    };
    // One is an epoch ahead.
    let (me, them) = (Role::Attention.worker(0), Role::Expert.worker(0));
    let mut late = attention.join(Epoch(1), me, &TOPOLOGY, &addresses).unwrap();
    let mut early = experts.join(Epoch(2), them, &TOPOLOGY, &[]).unwrap();
    unreachable(&mut late, them);
    unreachable(&mut early, me);
    // One speaks QUIC.
    let _quic = nodes[1].join(Epoch(3), them, &TOPOLOGY, &[]).unwrap();
    let mut rdma = attention.join(Epoch(3), me, &TOPOLOGY, &addresses).unwrap();
    unreachable(&mut rdma, them);
    // One takes no part.
    let mut alone = attention.join(Epoch(4), me, &TOPOLOGY, &[None]).unwrap();
    assert!(alone.post(Lane::new(0, MicroBatch(0)), 1).is_err());
    assert_eq!(alone.poll(), None);
}

#[test]
fn what_cannot_be_opened_is_named() {
    let authority = CertificateAuthority::new("test").unwrap();
    let open = |options| RdmaFabric::open(node(&authority), options, Spin::NONE).unwrap_err();
    let error = open(RdmaOptions {
        timeout: 0,
        ..RdmaOptions::default()
    });
    assert!(matches!(error, RdmaError::Options(_)));
    let error = open(options(&["nothing0"])).to_string();
    assert!(
        ["nothing0", "libibverbs", "ibv_get_device_list"]
            .iter()
            .any(|what| error.contains(what)),
        "{error}"
    );
}
