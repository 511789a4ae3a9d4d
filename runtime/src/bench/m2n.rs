//! `volley bench m2n`: M senders to N receivers over any transport, with nothing computed in between.
//!
//! All ends are threads of this process, so that one clock tells when a frame was posted and when it was seen. Every lane is a ball: a sender posts a frame, the
//! receiver answers (with nothing, or with as much: `--both-ways`), and the sender posts the next. So `--lanes` frames of each pair are under way at once.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;
use volley_transports::quic::{CertificateAuthority, NodeRole, QuicNode, QuicOptions};
use volley_transports::rdma::{RailName, RdmaFabric, RdmaOptions};
use volley_transports::{
    Endpoint, Epoch, Event, Fabric, InProcessFabric, Lane, LaneError, MicroBatch, Role, Spin,
    Topology,
};

use crate::config::ByteSize;
use crate::failure::Failure;
use crate::stats::Summary;

/// Nothing comes for so long: the run is over.
const HANG: Duration = Duration::from_secs(60);
/// Where the time of a frame's post stands in it.
const STAMP: usize = 8;

/// M senders to N receivers, over any transport.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct M2nArgs {
    /// What carries frames
    #[arg(long, value_enum, default_value = "in-process")]
    transport: Transport,
    /// M: attention workers
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    senders: u16,
    /// N: expert workers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    receivers: u16,
    /// Bytes of a frame, on average over receivers
    #[arg(long, value_name = "SIZE", default_value = "256KiB")]
    bytes: ByteSize,
    /// The first receiver gets so many times the bytes of each other one; the sum stays
    #[arg(long, value_name = "TIMES", default_value_t = 1.0)]
    skew: f64,
    /// Answers are as long as frames, instead of empty
    #[arg(long)]
    both_ways: bool,
    /// Lanes (micro-batches) of each pair: frames under way at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    lanes: u8,
    /// Frames on each lane that are measured
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Frames on each lane before that
    #[arg(long, value_name = "N", default_value_t = 20)]
    warm_up: u32,
    /// Looks before a thread that waits sleeps; 0 where there are fewer cores than workers
    #[arg(long, value_name = "N")]
    spin: Option<u32>,
    /// RDMA ports of the senders, as in `mlx5_0,mlx5_1:2`; all by default
    #[arg(long, value_name = "PORTS", value_delimiter = ',')]
    rails: Vec<RailName>,
    /// RDMA ports of the receivers, if others
    #[arg(long, value_name = "PORTS", value_delimiter = ',')]
    peer_rails: Vec<RailName>,
    /// Also write the results to this file
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    json: Option<PathBuf>,
}

const AFTER_HELP: &str = "\
Examples:
  volley bench m2n --transport quic --senders 8 --receivers 8 --bytes 256KiB
  volley bench m2n --transport rdma --rails mlx5_0 --peer-rails mlx5_1 --lanes 16 --bytes 64KiB    beside ib_write_bw
  volley bench m2n --transport rdma --both-ways --bytes 64                                       half a round trip is beside ib_write_lat

Frame: from post to the receiver's poll. Round trip: from post to the answer's poll. Throughput counts frames and answers.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Transport {
    InProcess,
    Quic,
    Rdma,
}

/// A run. Times in microseconds.
#[derive(Debug, Serialize)]
struct Report {
    transport: Transport,
    senders: u16,
    receivers: u16,
    lanes: u8,
    /// Bytes of frames, by receiver.
    bytes: Vec<usize>,
    both_ways: bool,
    rounds: u32,
    frame_us: Summary,
    round_trip_us: Summary,
    /// Of single frames; 1 would be the same time always.
    p99_over_median: f64,
    megabytes_per_s: f64,
    frames_per_s: f64,
}

/// Measures and prints.
///
/// # Errors
/// The transport is not to be had, or a peer is lost on the way.
pub(super) fn run(args: &M2nArgs) -> Result<(), Failure> {
    let bytes = sizes(args)?;
    let capacity = bytes.iter().copied().max().unwrap_or(STAMP);
    let topology = Topology {
        attention: args.senders,
        experts: args.receivers,
        micro_batches: args.lanes,
        dispatch_bytes: capacity,
        combine_bytes: if args.both_ways { capacity } else { STAMP },
    };
    let ends = ends(args, topology)?;
    let start = Instant::now();
    let measured = std::thread::scope(|scope| {
        let threads = ends.into_iter().map(|end| {
            let bytes = &bytes;
            scope.spawn(move || match end.id().role {
                Role::Attention => send(end, args, bytes, start),
                Role::Expert => receive(end, args, bytes, start),
            })
        });
        let threads: Vec<_> = threads.collect();
        let joined = threads.into_iter().map(|thread| {
            let ended = thread.join();
            ended.unwrap_or_else(|_| Err(Failure::new("a thread of the benchmark panicked")))
        });
        joined.collect::<Result<Vec<Measured>, Failure>>()
    })?;
    let all = |of: fn(&Measured) -> &Vec<f64>| {
        Summary::of(measured.iter().flat_map(of).copied().collect())
    };
    let (frame_us, round_trip_us) = (all(|m| &m.frames), all(|m| &m.trips));
    let times = || measured.iter().filter(|m| !m.trips.is_empty());
    let began = times().map(|m| m.began).min().unwrap_or_default();
    let ended = times().map(|m| m.ended).max().unwrap_or_default();
    let wall = (ended - began).as_secs_f64();
    let frames = frame_us.count as f64;
    let moved: f64 = measured.iter().map(|m| m.bytes as f64).sum();
    let report = Report {
        transport: args.transport,
        senders: args.senders,
        receivers: args.receivers,
        lanes: args.lanes,
        bytes,
        both_ways: args.both_ways,
        rounds: args.rounds,
        p99_over_median: frame_us.p99 / frame_us.median,
        frame_us,
        round_trip_us,
        megabytes_per_s: moved / wall / 1e6,
        frames_per_s: frames / wall,
    };
    println!(
        "{:?}, {} x {}, {} lanes a pair, {} a frame{}",
        report.transport,
        report.senders,
        report.receivers,
        report.lanes,
        args.bytes,
        if args.both_ways { " and an answer" } else { "" }
    );
    for (what, summary) in [
        ("frame", &report.frame_us),
        ("round trip", &report.round_trip_us),
    ] {
        println!(
            "{what:>11}: median {:.1} us, P99 {:.1} us, mean {:.1} us, max {:.1} us",
            summary.median, summary.p99, summary.mean, summary.max
        );
    }
    println!(
        " throughput: {:.1} MB/s, {:.0} frames/s; P99 is {:.2} x the median",
        report.megabytes_per_s, report.frames_per_s, report.p99_over_median
    );
    super::write_json(args.json.as_deref(), &report)
}

/// Bytes of the frames of each receiver.
fn sizes(args: &M2nArgs) -> Result<Vec<usize>, Failure> {
    let (bytes, receivers) = (args.bytes.0 as f64, f64::from(args.receivers));
    if !(args.skew >= 1.0 && args.skew.is_finite()) {
        return Err(Failure::new(format!(
            "--skew is {}; it must be at least 1",
            args.skew
        )));
    }
    if args.bytes.0 < STAMP as u64 || args.bytes.0 > 1 << 30 {
        return Err(Failure::new(format!(
            "--bytes is {}; it must be from {STAMP} to 1GiB: a frame carries the time of its post",
            args.bytes
        )));
    }
    let other = bytes * receivers / (receivers - 1.0 + args.skew);
    let of = |index: u16| if index == 0 { other * args.skew } else { other };
    let sizes = (0..args.receivers).map(|index| (of(index).round() as usize).max(STAMP));
    Ok(sizes.collect())
}

fn ends(args: &M2nArgs, topology: Topology) -> Result<Vec<Box<dyn Endpoint>>, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(error.to_string());
    let workers = usize::from(args.senders) + usize::from(args.receivers);
    let spin = args.spin.map_or_else(|| Spin::for_workers(workers), Spin);
    if args.transport == Transport::InProcess {
        let ends = InProcessFabric::build_with(topology, spin).map_err(|e| failed(&e))?;
        return Ok(ends.into_iter().map(|end| Box::new(end) as _).collect());
    }
    let authority = CertificateAuthority::new("bench").map_err(|e| failed(&e))?;
    let node = || {
        let identity = authority.identity(NodeRole::Worker, "bench");
        let options = QuicOptions {
            // Threads of the benchmark may keep the network's from the cores; that is no sign of death.
            idle: HANG,
            connect: HANG,
            ..QuicOptions::default()
        };
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        QuicNode::bind(any, &identity.map_err(|e| failed(&e))?, options).map_err(|e| failed(&e))
    };
    let (senders, receivers) = (node()?, node()?);
    let addresses = vec![Some(receivers.local_addr()); args.receivers.into()];
    let fabric = |node: QuicNode, rails: &[RailName]| -> Result<Box<dyn Fabric>, Failure> {
        if args.transport == Transport::Quic {
            return Ok(Box::new(node));
        }
        let options = RdmaOptions {
            rails: rails.to_vec(),
            ..RdmaOptions::default()
        };
        let fabric = RdmaFabric::open(node, options, spin).map_err(|e| failed(&e))?;
        Ok(Box::new(fabric))
    };
    let theirs = match args.peer_rails.is_empty() {
        true => &args.rails,
        false => &args.peer_rails,
    };
    let (senders, receivers) = (fabric(senders, &args.rails)?, fabric(receivers, theirs)?);
    let ends = topology.ids().map(|id| {
        let fabric = match id.role {
            Role::Attention => &senders,
            Role::Expert => &receivers,
        };
        fabric.join(Epoch(1), id, &topology, &addresses)
    });
    ends.collect::<Result<_, _>>().map_err(|e| failed(&e))
}

/// What one end saw. Times in microseconds.
#[derive(Default)]
struct Measured {
    /// Of each frame that came to a receiver.
    frames: Vec<f64>,
    /// Of each frame that a sender sent, and its answer.
    trips: Vec<f64>,
    /// When a sender's first measured frame was posted, and its last answer came.
    began: Duration,
    ended: Duration,
    /// Bytes that came here, in what was measured.
    bytes: u64,
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The next lane that came here; none when all peers are gone.
fn arrival(end: &mut dyn Endpoint, open: &mut u16) -> Result<Option<(Lane, usize)>, Failure> {
    let start = Instant::now();
    loop {
        match end.poll() {
            Some(Event::Arrived { lane, len }) => return Ok(Some((lane, len))),
            Some(Event::Lost { peer, reason }) => {
                *open -= 1;
                if end.id().role == Role::Attention {
                    return Err(Failure::new(format!("{} lost {peer}: {reason}", end.id())));
                }
                if *open == 0 {
                    return Ok(None);
                }
            }
            None if start.elapsed() > HANG => {
                return Err(Failure::new(format!(
                    "{}: nothing came for {HANG:?}",
                    end.id()
                )));
            }
            None => end.wait(HANG),
        }
    }
}

fn post(end: &mut dyn Endpoint, lane: Lane, len: usize, start: Instant) -> Result<(), Failure> {
    let stamp = (start.elapsed().as_nanos() as u64).to_le_bytes();
    let failed = |error: LaneError| Failure::new(error.to_string());
    let slot = end.slot(lane).map_err(failed)?;
    if len >= STAMP {
        slot[..STAMP].copy_from_slice(&stamp);
    }
    end.post(lane, len).map_err(failed)
}

fn send(
    mut end: Box<dyn Endpoint>,
    args: &M2nArgs,
    bytes: &[usize],
    start: Instant,
) -> Result<Measured, Failure> {
    let rounds = args.warm_up + args.rounds;
    let lanes = usize::from(args.receivers) * usize::from(args.lanes);
    let mut posted = vec![Duration::ZERO; lanes];
    let mut round = vec![0_u32; lanes];
    let mut measured = Measured {
        trips: Vec::with_capacity(lanes * args.rounds as usize),
        ..Measured::default()
    };
    let index = |lane: Lane| {
        usize::from(lane.peer) * usize::from(args.lanes) + usize::from(lane.micro_batch.0)
    };
    let mut open = args.receivers;
    for peer in 0..args.receivers {
        for micro_batch in (0..args.lanes).map(MicroBatch) {
            let lane = Lane::new(peer, micro_batch);
            posted[index(lane)] = start.elapsed();
            post(&mut *end, lane, bytes[usize::from(peer)], start)?;
        }
    }
    let mut left = lanes;
    while left > 0 {
        let Some((lane, len)) = arrival(&mut *end, &mut open)? else {
            return Err(Failure::new("all receivers are gone"));
        };
        let (at, now) = (index(lane), start.elapsed());
        if round[at] >= args.warm_up {
            if measured.trips.is_empty() {
                measured.began = posted[at];
            }
            measured.trips.push(micros(now - posted[at]));
            measured.bytes += len as u64;
            measured.ended = now;
        }
        round[at] += 1;
        if round[at] == rounds {
            left -= 1;
            continue;
        }
        posted[at] = start.elapsed();
        post(&mut *end, lane, bytes[usize::from(lane.peer)], start)?;
    }
    Ok(measured)
}

fn receive(
    mut end: Box<dyn Endpoint>,
    args: &M2nArgs,
    bytes: &[usize],
    start: Instant,
) -> Result<Measured, Failure> {
    let lanes = usize::from(args.senders) * usize::from(args.lanes);
    let answer = match args.both_ways {
        true => bytes[usize::from(end.id().index)],
        false => 0,
    };
    let mut measured = Measured {
        frames: Vec::with_capacity(lanes * args.rounds as usize),
        ..Measured::default()
    };
    let mut round = vec![0_u32; lanes];
    let mut open = args.senders;
    while let Some((lane, len)) = arrival(&mut *end, &mut open)? {
        let now = start.elapsed();
        let at = usize::from(lane.peer) * usize::from(args.lanes) + usize::from(lane.micro_batch.0);
        if round[at] >= args.warm_up {
            let received = end.received(lane).ok();
            let stamp = received.and_then(|frame| frame.first_chunk::<STAMP>().copied());
            let posted = stamp.map_or(now, |stamp| Duration::from_nanos(u64::from_le_bytes(stamp)));
            measured.frames.push(micros(now.saturating_sub(posted)));
            measured.bytes += len as u64;
        }
        round[at] += 1;
        post(&mut *end, lane, answer, start)?;
    }
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: M2nArgs,
    }

    fn args(line: &[&str]) -> M2nArgs {
        Line::parse_from([&["m2n"], line].concat()).args
    }

    #[test]
    fn skew_moves_bytes_and_keeps_their_sum() {
        let even = sizes(&args(&["--receivers", "4", "--bytes", "1000"])).unwrap();
        assert_eq!(even, [1000; 4]);
        let skewed = sizes(&args(&[
            "--receivers",
            "4",
            "--bytes",
            "1000",
            "--skew",
            "5",
        ]))
        .unwrap();
        assert_eq!(skewed, [2500, 500, 500, 500]);
        assert!(sizes(&args(&["--skew", "0.5"])).is_err());
        assert!(sizes(&args(&["--bytes", "4"])).is_err());
    }

    #[test]
    fn every_frame_is_counted_on_transports_that_are_always_there() {
        for transport in ["in-process", "quic"] {
            let file = tempfile::NamedTempFile::new().unwrap();
            let path = file.path().to_str().unwrap();
            let line = [
                "--transport",
                transport,
                "--senders",
                "2",
                "--receivers",
                "3",
                "--lanes",
                "2",
                "--rounds",
                "5",
                "--warm-up",
                "1",
                "--bytes",
                "600",
                "--both-ways",
                "--json",
                path,
            ];
            run(&args(&line)).unwrap();
            let text = std::fs::read_to_string(path).unwrap();
            let report: serde_json::Value = serde_json::from_str(&text).unwrap();
            for times in ["frame_us", "round_trip_us"] {
                assert_eq!(report[times]["count"], 2 * 3 * 2 * 5);
            }
            assert!(report["megabytes_per_s"].as_f64().unwrap() > 0.0);
        }
    }
}
