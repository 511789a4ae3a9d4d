//! Links side by side: the in-process fabric, QUIC, plain TCP, and TCP under TLS (the service that QUIC gives) with the same pattern and sizes, in one run.
//!
//! `cargo bench -p volley-transports --bench links [-- SHAPE...] [LINK...] [SIZE...] [--json]`. The pattern is the exchange's: M attention workers each send a frame to each of N expert workers, which
//! send as many bytes back; the next turn begins when all are back. One thread for each worker. Printed: time of a turn (median, P99), bytes a second both ways together, and
//! bytes for each second of processor time of this process, which is what the cores are spent on when they have other work.

#![allow(unsafe_code, missing_docs)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use volley_transports::quic::{CertificateAuthority, NodeRole, QuicNode, QuicOptions};
use volley_transports::{
    Endpoint, Epoch, Event, InProcessFabric, Lane, LostReason, MicroBatch, Role, Spin, Topology,
};

const SIZES: [usize; 8] = [
    256,
    1 << 10,
    4 << 10,
    16 << 10,
    64 << 10,
    256 << 10,
    1 << 20,
    4 << 20,
];
/// Bytes that a measurement moves, about.
const VOLUME: usize = 256 << 20;

struct Figures {
    turns: Vec<Duration>,
    wall: Duration,
    cpu: Duration,
}

/// Processor time of this process so far.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the clock exists on every Linux, and `time` is ours to be written.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn turns_for(size: usize, pairs: usize) -> usize {
    (VOLUME / (2 * size * pairs)).clamp(20, 3000)
}

fn topology(m: u16, n: u16, size: usize) -> Topology {
    Topology {
        attention: m,
        experts: n,
        micro_batches: 1,
        dispatch_bytes: size,
        combine_bytes: size,
    }
}

fn measure(turns: usize, mut turn: impl FnMut()) -> Figures {
    for _ in 0..turns / 10 + 1 {
        turn();
    }
    let (wall, cpu) = (Instant::now(), cpu_time());
    let turns = (0..turns)
        .map(|_| {
            let start = Instant::now();
            turn();
            start.elapsed()
        })
        .collect();
    Figures {
        turns,
        wall: wall.elapsed(),
        cpu: cpu_time() - cpu,
    }
}

fn arrivals(end: &mut dyn Endpoint, count: usize, mut each: impl FnMut(&mut dyn Endpoint, Lane)) {
    let mut seen = 0;
    while seen < count {
        match end.poll() {
            Some(Event::Arrived { lane, .. }) => {
                each(end, lane);
                seen += 1;
            }
            // The first to be done close; whoever still needs them fails when it posts.
            Some(Event::Lost {
                reason: LostReason::Closed,
                ..
            }) => {}
            Some(Event::Lost { peer, reason }) => panic!("{peer} is lost: {reason}"),
            None => end.wait(Duration::from_secs(10)),
        }
    }
}

/// Turns over any fabric. Attention worker 0 keeps the time; the others run beside it.
fn fabric(mut ends: Vec<Box<dyn Endpoint>>, m: u16, n: u16, size: usize) -> Figures {
    let turns = turns_for(size, usize::from(m) * usize::from(n));
    let all = turns + turns / 10 + 1;
    let experts = ends.split_off(m.into());
    let send = move |end: &mut dyn Endpoint| {
        for peer in 0..n {
            end.post(Lane::new(peer, MicroBatch(0)), size)
                .expect("a lane that is held");
        }
        arrivals(end, n.into(), |_, _| ());
    };
    std::thread::scope(|scope| {
        for mut end in experts {
            scope.spawn(move || {
                arrivals(&mut *end, all * usize::from(m), |end, lane| {
                    end.post(lane, size).expect("a lane that is held");
                });
                // The last answers have to be on their way before the end closes.
                end
            });
        }
        let mut ends = ends.into_iter();
        let mut first = ends.next().expect("an attention worker");
        for mut end in ends {
            scope.spawn(move || {
                (0..all).for_each(|_| send(&mut *end));
                end
            });
        }
        measure(turns, || send(&mut *first))
    })
}

fn in_process(m: u16, n: u16, size: usize) -> Figures {
    let ends = InProcessFabric::build_with(topology(m, n, size), Spin::NONE).expect("a shape");
    fabric(
        ends.into_iter()
            .map(|end| Box::new(end) as Box<dyn Endpoint>)
            .collect(),
        m,
        n,
        size,
    )
}

fn quic(m: u16, n: u16, size: usize) -> Figures {
    let authority = CertificateAuthority::new("bench").expect("an authority");
    let node = || {
        let identity = authority
            .identity(NodeRole::Worker, "bench")
            .expect("an identity");
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        // One core at a time is no sign of death here.
        let options = QuicOptions {
            idle: Duration::from_secs(30),
            connect: Duration::from_secs(30),
            threads: 1,
            ..QuicOptions::default()
        };
        QuicNode::bind(any, &identity, options).expect("a node")
    };
    let (attention, experts): (Vec<QuicNode>, Vec<QuicNode>) = (
        (0..m).map(|_| node()).collect(),
        (0..n).map(|_| node()).collect(),
    );
    let addresses: Vec<Option<SocketAddr>> =
        experts.iter().map(|node| Some(node.local_addr())).collect();
    let shape = topology(m, n, size);
    let ends = shape.ids().map(|id| {
        let node = match id.role {
            Role::Attention => &attention[usize::from(id.index)],
            Role::Expert => &experts[usize::from(id.index)],
        };
        Box::new(node.join(Epoch(1), id, &shape, &addresses).expect("an end")) as Box<dyn Endpoint>
    });
    fabric(ends.collect(), m, n, size)
}

/// The kernel's own.
fn tcp(m: u16, n: u16, size: usize) -> Figures {
    streams(m, n, size, |client, server| (client, server))
}

/// The same, encrypted as QUIC is: TLS 1.3 with the same cipher from the same library, a thread's own work.
fn tls(m: u16, n: u16, size: usize) -> Figures {
    let authority = CertificateAuthority::new("bench").expect("an authority");
    let identity = authority
        .identity(NodeRole::Worker, "bench")
        .expect("an identity");
    streams(m, n, size, |client, server| {
        let name = "worker.volley.internal".try_into().expect("a name");
        let ours = rustls::ClientConnection::new(identity.client(), name).expect("a client");
        let theirs = rustls::ServerConnection::new(identity.server()).expect("a server");
        let (mut client, mut server) = (
            rustls::StreamOwned::new(ours, client),
            rustls::StreamOwned::new(theirs, server),
        );
        std::thread::scope(|scope| {
            scope.spawn(|| {
                server
                    .conn
                    .complete_io(&mut server.sock)
                    .expect("a handshake")
            });
            client
                .conn
                .complete_io(&mut client.sock)
                .expect("a handshake");
        });
        (client, server)
    })
}

/// A connection for each pair; experts have a thread for each, attention workers write to all and then read from all. `wrap` makes of a pair of sockets what is used.
fn streams<C, S>(
    m: u16,
    n: u16,
    size: usize,
    wrap: impl Fn(TcpStream, TcpStream) -> (C, S),
) -> Figures
where
    C: Read + Write + Send,
    S: Read + Write + Send,
{
    let turns = turns_for(size, usize::from(m) * usize::from(n));
    let all = turns + turns / 10 + 1;
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::scope(|scope| {
        let mut workers: Vec<Vec<C>> = Vec::new();
        for _ in 0..m {
            let mut peers = Vec::new();
            for _ in 0..n {
                let client = TcpStream::connect(address).expect("a connection");
                let (server, _) = listener.accept().expect("a connection");
                client.set_nodelay(true).expect("an option");
                server.set_nodelay(true).expect("an option");
                let (client, mut server) = wrap(client, server);
                peers.push(client);
                scope.spawn(move || {
                    let mut buffer = vec![0; size];
                    for _ in 0..all {
                        server.read_exact(&mut buffer).expect("bytes");
                        server.write_all(&buffer).expect("bytes");
                        server.flush().expect("bytes");
                    }
                });
            }
            workers.push(peers);
        }
        let turn = move |peers: &mut [C], buffer: &mut [u8]| {
            // Experts read while we write, so no side waits for the other's buffers for ever.
            for peer in &mut *peers {
                peer.write_all(buffer).expect("bytes");
                peer.flush().expect("bytes");
            }
            for peer in peers {
                peer.read_exact(buffer).expect("bytes");
            }
        };
        let mut workers = workers.into_iter();
        let mut first = workers.next().expect("an attention worker");
        for mut peers in workers {
            scope.spawn(move || {
                let mut buffer = vec![0; size];
                (0..all).for_each(|_| turn(&mut peers, &mut buffer));
            });
        }
        let mut buffer = vec![0; size];
        measure(turns, || turn(&mut first, &mut buffer))
    })
}

type Link = fn(u16, u16, usize) -> Figures;
const LINKS: [(&str, Link); 4] = [
    ("tcp", tcp),
    ("tls", tls),
    ("quic", quic),
    ("in-process", in_process),
];

fn main() {
    let asked: Vec<String> = std::env::args().skip(1).collect();
    let json = asked.iter().any(|arg| arg == "--json");
    // What is not asked for of a kind is all of it.
    let chosen = |all: &[String]| -> Vec<String> {
        let some: Vec<String> = all
            .iter()
            .filter(|one| asked.contains(one))
            .cloned()
            .collect();
        if some.is_empty() { all.to_vec() } else { some }
    };
    let shapes = chosen(&["1x1", "2x2", "2x4", "4x4", "8x8"].map(str::to_owned));
    let sizes = chosen(&SIZES.map(|size| size.to_string()));
    let links = chosen(&LINKS.map(|(name, _)| name.to_owned()));
    if !json {
        println!(
            "{:>5} {:>9} {:12} {:>10} {:>10} {:>10} {:>12} {:>8}",
            "MxN", "bytes", "link", "median us", "P99 us", "MB/s", "MB/cpu-s", "to TCP"
        );
    }
    for shape in &shapes {
        let (m, n) = shape.split_once('x').expect("MxN");
        let (m, n): (u16, u16) = (m.parse().expect("M"), n.parse().expect("N"));
        for size in &sizes {
            let size: usize = size.parse().expect("a size");
            let mut plain = f64::NAN;
            for (name, run) in LINKS {
                if !links.iter().any(|link| link == name) {
                    continue;
                }
                let mut figures = run(m, n, size);
                figures.turns.sort();
                let at = |share: f64| {
                    let index = ((figures.turns.len() - 1) as f64 * share) as usize;
                    figures.turns[index].as_secs_f64() * 1e6
                };
                let bytes =
                    (2 * size * usize::from(m) * usize::from(n) * figures.turns.len()) as f64 / 1e6;
                let (wall, spent) = (
                    bytes / figures.wall.as_secs_f64(),
                    bytes / figures.cpu.as_secs_f64(),
                );
                if name == "tcp" {
                    plain = spent;
                }
                let (median, p99) = (at(0.5), at(0.99));
                if json {
                    println!(
                        "{{\"shape\": \"{shape}\", \"bytes\": {size}, \"link\": \"{name}\", \"median_us\": {median:.1}, \"p99_us\": {p99:.1}, \"mb_s\": {wall:.1}, \"mb_cpu_s\": {spent:.1}}}"
                    );
                } else {
                    println!(
                        "{shape:>5} {size:>9} {name:12} {median:>10.1} {p99:>10.1} {wall:>10.1} {spent:>12.1} {:>8.2}",
                        spent / plain,
                    );
                }
            }
        }
    }
}
