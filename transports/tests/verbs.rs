//! Verbs against a device: needs two RDMA devices that reach each other, as in `integration/rdma-guest`. Elsewhere each test says that it was left out.
#![allow(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use volley_transports::verbs::{
    Access, AddressHandle, AsyncEventKind, Buffer, Completion, CompletionChannel, CompletionKind,
    CompletionQueue, CompletionStatus, Connection, Context, DeviceList, GidEntry, GidKind,
    GlobalRoute, MemoryRegion, Mtu, Operation, Pages, Path, ProtectionDomain, QueuePair,
    QueuePairKind, QueuePairOptions, QueuePairState, Receive, Reliability, RemoteMemory,
    SendRequest,
};

const LIMIT: Duration = Duration::from_secs(30);
const BYTES: usize = 256 << 10;

/// One device with a region, and what is needed to connect to it.
struct Side {
    context: Context,
    domain: ProtectionDomain,
    channel: CompletionChannel,
    completions: CompletionQueue,
    region: MemoryRegion,
    gid: GidEntry,
}

/// Tests take turns: some take a link down.
static TURN: Mutex<()> = Mutex::new(());

/// Both devices; none where there are no two.
fn sides() -> Option<(MutexGuard<'static, ()>, Side, Side)> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Ok(list) = DeviceList::open() else {
        return left_out("no libibverbs");
    };
    let mut roce = list.iter().filter_map(|device| {
        let context = device.open().ok()?;
        let gids = context.gids().ok()?;
        let gid = gids
            .into_iter()
            .find(|row| row.kind == GidKind::RoceV2 && !row.gid.is_link_local())?;
        Some((context, gid))
    });
    let (Some(a), Some(b)) = (roce.next(), roce.next()) else {
        return left_out("no two RoCE devices");
    };
    Some((turn, side(a.0, a.1), side(b.0, b.1)))
}

/// In the guest nothing may be left out.
fn left_out<T>(why: &str) -> Option<T> {
    assert!(std::env::var_os("RDMA_GUEST").is_none(), "{why}");
    eprintln!("left out: {why}");
    None
}

fn side(context: Context, gid: GidEntry) -> Side {
    let domain = context.protection_domain().unwrap();
    let channel = CompletionChannel::new(&context).unwrap();
    let completions = CompletionQueue::new(&context, 256, Some(&channel)).unwrap();
    let buffer = Arc::new(Buffer::new(BYTES, Pages::Transparent).unwrap());
    let region = MemoryRegion::new(&domain, &buffer, Access::ALL).unwrap();
    Side {
        context,
        domain,
        channel,
        completions,
        region,
        gid,
    }
}

impl Side {
    fn queue_pair(&self, kind: QueuePairKind) -> QueuePair {
        let options = QueuePairOptions {
            kind,
            send_pieces: 4,
            receive_pieces: 2,
            inline_bytes: 64,
            ..QueuePairOptions::default()
        };
        let pair = QueuePair::new(&self.domain, &self.completions, &self.completions, &options);
        let pair = pair.unwrap();
        assert!(pair.inline_bytes() >= 64);
        pair.initialize(self.gid.port, Access::ALL, 0x1111).unwrap();
        pair
    }

    fn path(&self, to: &Side) -> Path {
        let route = GlobalRoute {
            destination: to.gid.gid,
            source_index: self.gid.index,
            traffic_class: 0x68,
            flow_label: 7,
            hop_limit: 64,
        };
        Path {
            port: self.gid.port,
            lid: 0,
            service_level: 0,
            route: Some(route),
        }
    }

    #[track_caller]
    fn completion(&self) -> Completion {
        let start = Instant::now();
        let mut room = [Completion::EMPTY; 1];
        while start.elapsed() < LIMIT {
            if let [completion] = self.completions.poll(&mut room).unwrap() {
                return *completion;
            }
            std::thread::yield_now();
        }
        panic!("nothing completed on {:?}", self.context);
    }

    #[track_caller]
    fn success(&self, kind: CompletionKind) -> Completion {
        let completion = self.completion();
        assert_eq!(completion.status(), CompletionStatus::SUCCESS);
        assert_eq!(completion.kind(), kind);
        completion
    }

    fn memory(&self, at: u64) -> RemoteMemory {
        RemoteMemory {
            address: self.region.address() + at,
            key: self.region.remote_key(),
        }
    }
}

fn connected(
    a: &Side,
    b: &Side,
    kind: QueuePairKind,
    reliability: Reliability,
) -> (QueuePair, QueuePair) {
    let (x, y) = (a.queue_pair(kind), b.queue_pair(kind));
    let connection = |from: &Side, to: &Side, number, receive_psn, send_psn| Connection {
        queue_pair: number,
        path: from.path(to),
        mtu: Mtu::B1024,
        receive_psn,
        send_psn,
        reliability,
    };
    x.connect(&connection(a, b, y.number(), 5, 9)).unwrap();
    y.connect(&connection(b, a, x.number(), 9, 5)).unwrap();
    assert_eq!(x.state().unwrap(), QueuePairState::ReadyToSend);
    (x, y)
}

fn request<'a>(
    id: u64,
    operation: Operation<'a>,
    pieces: &'a [volley_transports::verbs::Piece<'a>],
) -> SendRequest<'a> {
    SendRequest {
        id,
        operation,
        pieces,
        signalled: true,
        inline: false,
        fence: false,
        solicited: false,
    }
}

const NOTHING: Receive<'static> = Receive {
    id: 70,
    pieces: &[],
};

#[test]
fn writes_gather_pieces_and_their_immediate_comes_after_them() {
    let Some((_turn, a, b)) = sides() else { return };
    let (x, y) = connected(&a, &b, QueuePairKind::Reliable, Reliability::default());
    a.region.copy_in(0, b"head").unwrap();
    a.region.copy_in(4096, &[7; 100_000]).unwrap();
    y.post_receives([NOTHING]).unwrap();
    let pieces = [
        a.region.piece(0..4).unwrap(),
        a.region.piece(4096..104_096).unwrap(),
    ];
    let operation = Operation::Write {
        to: b.memory(128),
        immediate: Some(0xdead_beef),
    };
    x.post(&[request(1, operation, &pieces)]).unwrap();
    let came = b.success(CompletionKind::ReceiveWrite);
    assert_eq!(
        (came.id(), came.len(), came.immediate(), came.queue_pair()),
        (70, 100_004, Some(0xdead_beef), y.number())
    );
    assert_eq!(a.success(CompletionKind::Write).id(), 1);
    let mut head = [0; 6];
    b.region.copy_out(128, &mut head).unwrap();
    assert_eq!(&head, b"head\x07\x07");
    // And back by a READ, over what was there.
    let pieces = [a.region.piece(200_000..200_004).unwrap()];
    x.post(&[request(
        2,
        Operation::Read {
            from: b.memory(128),
        },
        &pieces,
    )])
    .unwrap();
    a.success(CompletionKind::Read);
    a.region.copy_out(200_000, &mut head[..4]).unwrap();
    assert_eq!(&head[..4], b"head");
    assert!(a.region.piece(BYTES - 1..BYTES + 1).is_err());
}

#[test]
fn a_batch_goes_in_order_and_only_its_last_request_is_told() {
    let Some((_turn, a, b)) = sides() else { return };
    let (x, y) = connected(&a, &b, QueuePairKind::Reliable, Reliability::default());
    let pieces = [b.region.piece(0..64).unwrap()];
    y.post_receives((0..40).map(|id| Receive {
        id,
        pieces: &pieces,
    }))
    .unwrap();
    a.region.copy_in(0, b"inline").unwrap();
    let sent = [a.region.piece(0..6).unwrap()];
    let requests: Vec<SendRequest<'_>> = (0..40)
        .map(|id| SendRequest {
            signalled: id == 39,
            inline: id % 2 == 0,
            ..request(
                id,
                Operation::Send {
                    immediate: Some(id as u32),
                },
                &sent,
            )
        })
        .collect();
    x.post(&requests).unwrap();
    for id in 0..40 {
        let came = b.success(CompletionKind::Receive);
        assert_eq!(
            (came.id(), came.immediate(), came.len()),
            (id, Some(id as u32), 6)
        );
    }
    assert_eq!(a.success(CompletionKind::Send).id(), 39);
    let mut room = [Completion::EMPTY; 4];
    assert!(a.completions.poll(&mut room).unwrap().is_empty());
    // A queue that is full says so, and what it took goes its way.
    let many: Vec<SendRequest<'_>> = (0..400)
        .map(|id| request(id, Operation::Send { immediate: None }, &sent))
        .collect();
    let error = x.post(&many).unwrap_err();
    assert!(
        error.is_full() && error.taken >= 64 && error.taken < 400,
        "{error}"
    );
}

#[test]
fn an_armed_queue_makes_its_channel_readable_once() {
    let Some((_turn, a, b)) = sides() else { return };
    let (x, y) = connected(&a, &b, QueuePairKind::Reliable, Reliability::default());
    b.completions.arm().unwrap();
    assert_eq!(b.channel.drain(), 0);
    y.post_receives([NOTHING]).unwrap();
    x.post(&[request(
        1,
        Operation::Write {
            to: b.memory(0),
            immediate: Some(1),
        },
        &[],
    )])
    .unwrap();
    b.success(CompletionKind::ReceiveWrite);
    let start = Instant::now();
    while b.channel.drain() == 0 {
        assert!(start.elapsed() < LIMIT, "no event");
        std::thread::yield_now();
    }
    assert_eq!(b.channel.drain(), 0);
    a.success(CompletionKind::Write);
}

#[test]
fn unreliable_connections_and_datagrams_carry_messages() {
    let Some((_turn, a, b)) = sides() else { return };
    let (x, y) = connected(&a, &b, QueuePairKind::Unreliable, Reliability::default());
    y.post_receives([NOTHING]).unwrap();
    let pieces = [a.region.piece(0..100).unwrap()];
    x.post(&[request(
        1,
        Operation::Write {
            to: b.memory(0),
            immediate: Some(3),
        },
        &pieces,
    )])
    .unwrap();
    assert_eq!(b.success(CompletionKind::ReceiveWrite).immediate(), Some(3));
    a.success(CompletionKind::Write);

    let (x, y) = (
        a.queue_pair(QueuePairKind::Datagram),
        b.queue_pair(QueuePairKind::Datagram),
    );
    x.open_datagrams(1).unwrap();
    y.open_datagrams(1).unwrap();
    let to = AddressHandle::new(&a.domain, &a.path(&b)).unwrap();
    let room = [b.region.piece(0..1024).unwrap()];
    y.post_receives([Receive {
        id: 8,
        pieces: &room,
    }])
    .unwrap();
    a.region.copy_in(0, b"datagram").unwrap();
    let pieces = [a.region.piece(0..8).unwrap()];
    let operation = Operation::Datagram {
        to: &to,
        queue_pair: y.number(),
        key: 0x1111,
        immediate: Some(9),
    };
    x.post(&[request(2, operation, &pieces)]).unwrap();
    let came = b.success(CompletionKind::Receive);
    assert_eq!(
        (came.len(), came.immediate(), came.source()),
        (48, Some(9), x.number())
    );
    let mut text = [0; 8];
    b.region.copy_out(40, &mut text).unwrap();
    assert_eq!(&text, b"datagram");
}

#[test]
fn what_a_peer_does_not_allow_or_answer_is_an_error_with_its_name() {
    let Some((_turn, a, b)) = sides() else { return };
    let pieces = [a.region.piece(0..64).unwrap()];
    let hasty = Reliability {
        timeout: 8,
        retries: 1,
        not_ready_retries: 0,
        ..Reliability::default()
    };
    let write = |to, immediate| request(1, Operation::Write { to, immediate }, &pieces);

    let (x, y) = connected(&a, &b, QueuePairKind::Reliable, hasty);
    let mut wrong = b.memory(0);
    wrong.key ^= 0x100;
    x.post(&[write(wrong, None)]).unwrap();
    assert_eq!(a.completion().status(), CompletionStatus::REMOTE_ACCESS);
    drop((x, y));
    let (x, y) = connected(&a, &b, QueuePairKind::Reliable, hasty);
    x.post(&[write(b.memory(BYTES as u64 - 32), None)]).unwrap();
    assert_eq!(
        a.completion().status(),
        CompletionStatus::REMOTE_ACCESS,
        "beyond the region"
    );
    drop((x, y));
    let (x, y) = connected(&a, &b, QueuePairKind::Reliable, hasty);
    x.post(&[write(b.memory(0), Some(1))]).unwrap();
    assert_eq!(
        a.completion().status(),
        CompletionStatus::NOT_READY_EXCEEDED
    );
    drop((x, y));
    let (x, y) = connected(&a, &b, QueuePairKind::Reliable, hasty);
    drop(y);
    x.post(&[write(b.memory(0), None)]).unwrap();
    assert_eq!(a.completion().status(), CompletionStatus::RETRIES_EXCEEDED);
    x.post(&[write(b.memory(0), None)]).unwrap();
    assert_eq!(a.completion().status(), CompletionStatus::FLUSHED);
    assert_eq!(x.state().unwrap(), QueuePairState::Error);
}

/// Drops in every order; a leak would show as a device that runs out.
#[test]
fn nothing_is_left_of_a_thousand_connections() {
    let Some((_turn, a, b)) = sides() else { return };
    for round in 0..1000 {
        let (x, y) = connected(&a, &b, QueuePairKind::Reliable, Reliability::default());
        let buffer = Arc::new(Buffer::new(4096, Pages::Transparent).unwrap());
        let region = MemoryRegion::new(&a.domain, &buffer, Access::ALL).unwrap();
        match round % 3 {
            0 => drop((x, y, region, buffer)),
            1 => drop((buffer, region, y, x)),
            _ => drop((region, x, buffer, y)),
        }
    }
}

#[test]
fn a_link_that_goes_down_is_an_event() {
    let Some((_turn, a, _b)) = sides() else {
        return;
    };
    let name = a.context.name();
    let netdev = std::fs::read_to_string(format!(
        "/sys/class/infiniband/{name}/ports/1/gid_attrs/ndevs/0"
    ));
    let (Ok(netdev), Ok(_)) = (netdev, std::env::var("RDMA_GUEST")) else {
        eprintln!("left out: links are taken down in the guest only");
        return;
    };
    let ip = |state: &str| {
        let status = std::process::Command::new("ip")
            .args(["link", "set", netdev.trim(), state])
            .status();
        assert!(status.unwrap().success());
    };
    let wait = |wanted: AsyncEventKind| {
        let start = Instant::now();
        loop {
            match a.context.next_event() {
                Some(event) if event.kind == wanted => return,
                _ => assert!(start.elapsed() < LIMIT, "no {wanted:?}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    ip("down");
    wait(AsyncEventKind::PortDown(1));
    ip("up");
    wait(AsyncEventKind::PortUp(1));
}
