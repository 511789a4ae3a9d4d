//! A point as something to type: the command that reproduces it here, and the perftest one to send to a vendor.

use std::fmt::Write as _;

use super::feature::{Axis, Category};
use super::point::{Direction, Memory, Operation, Point};

/// The command that measures this point of a subsystem again. Two adapters are named `A,B`, or `A,B@AGENT`; models have no comma.
pub fn probe_command(subsystem: &str, point: &Point) -> String {
    let mut command = match (subsystem.contains(','), subsystem.split_once('@')) {
        (true, Some((devices, agent))) => {
            format!("volley vet probe --devices {devices} --agent {agent}")
        }
        (true, None) => format!("volley vet probe --devices {subsystem}"),
        (false, _) => format!("volley vet probe --subsystem {subsystem}"),
    };
    for category in Category::ALL {
        let _ = write!(command, " --{} {}", category.name(), category.of(point));
    }
    for axis in Axis::ALL {
        let derived = matches!(
            axis,
            Axis::SmallestBytes | Axis::LargestBytes | Axis::Messages
        );
        if !derived && axis.applies(point) {
            let _ = write!(command, " --{} {}", axis.name(), axis.of(point));
        }
    }
    let sizes: Vec<String> = point.messages.iter().map(u32::to_string).collect();
    let _ = write!(command, " --messages {}", sizes.join(","));
    command
}

/// The perftest command of the client: host B, which has the data, or for a READ host A, which wants it. The other host runs it without the address.
///
/// # Errors
/// What of the point perftest cannot express.
pub fn perftest_command(point: &Point) -> Result<String, &'static str> {
    if point.messages.windows(2).any(|pair| pair[0] != pair[1]) {
        return Err("perftest sends messages of one size");
    }
    if point.sges > 1 {
        return Err("perftest sends one scatter/gather element a work request");
    }
    if point.regions > 1 {
        return Err("perftest registers one region a queue pair");
    }
    if point.direction == Direction::Loopback {
        return Err("perftest does not mix loopback with receive traffic");
    }
    let (program, connection) = match point.operation {
        Operation::RcSend => ("ib_send_bw", "RC"),
        Operation::RcWrite => ("ib_write_bw", "RC"),
        Operation::RcWriteImm => ("ib_write_bw --write_with_imm", "RC"),
        Operation::RcRead => ("ib_read_bw", "RC"),
        Operation::UcSend => ("ib_send_bw", "UC"),
        Operation::UcWrite => ("ib_write_bw", "UC"),
        Operation::UcWriteImm => ("ib_write_bw --write_with_imm", "UC"),
        Operation::UdSend => ("ib_send_bw", "UD"),
    };
    let (memory, server) = match point.operation {
        Operation::RcRead => (point.memory_a, "HOST_B"),
        _ => (point.memory_b, "HOST_A"),
    };
    let mut command = String::new();
    if let Memory::Dram(node) = memory {
        let _ = write!(command, "numactl --membind={node} ");
    }
    let _ = write!(
        command,
        "{program} -c {connection} -q {} -m {} -s {} -l {} -t {}",
        point.qps,
        point.mtu,
        point.largest(),
        point.batch,
        point.send_depth
    );
    if point.operation.consumes_receives() {
        let _ = write!(command, " -r {}", point.receive_depth);
    }
    if point.direction == Direction::Bidirectional {
        command.push_str(" -b");
    }
    if let Memory::Gpu(index) = memory {
        let _ = write!(command, " --use_cuda={index}");
    }
    let _ = write!(command, " -D 5 {server}");
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point() -> Point {
        Point {
            operation: Operation::UdSend,
            direction: Direction::Bidirectional,
            mtu: 2048,
            memory_a: Memory::Dram(0),
            memory_b: Memory::Dram(1),
            qps: 4,
            regions: 1,
            region_bytes: 65536,
            batch: 64,
            send_depth: 256,
            receive_depth: 512,
            sges: 1,
            messages: vec![2048, 2048],
        }
    }

    #[test]
    fn both_commands_name_every_setting_that_matters() {
        let probe = probe_command("F", &point());
        for part in [
            "--operation ud-send",
            "--qps 4",
            "--receive-depth 512",
            "--messages 2048,2048",
            "--memory-b dram1",
        ] {
            assert!(probe.contains(part), "{probe}");
        }
        let perftest = perftest_command(&point()).unwrap();
        assert_eq!(
            perftest,
            "numactl --membind=1 ib_send_bw -c UD -q 4 -m 2048 -s 2048 -l 64 -t 256 -r 512 -b -D 5 HOST_A"
        );
    }

    #[test]
    fn adapters_are_named_as_their_commands_name_them() {
        let local = probe_command("mlx5_0,mlx5_1:2", &point());
        assert!(local.starts_with("volley vet probe --devices mlx5_0,mlx5_1:2 --operation"));
        let remote = probe_command("mlx5_0,mlx5_0@10.0.0.2:7471", &point());
        assert!(remote.contains(" --devices mlx5_0,mlx5_0 --agent 10.0.0.2:7471 "));
        let read = Point {
            operation: Operation::RcRead,
            ..point()
        };
        let perftest = perftest_command(&read).unwrap();
        assert!(perftest.starts_with("numactl --membind=0") && perftest.ends_with("HOST_B"));
    }

    #[test]
    fn what_perftest_lacks_is_named() {
        let lists = Point { sges: 3, ..point() };
        assert!(
            perftest_command(&lists)
                .unwrap_err()
                .contains("scatter/gather")
        );
        let mixed = Point {
            messages: vec![64, 2048],
            ..point()
        };
        assert!(perftest_command(&mixed).unwrap_err().contains("one size"));
    }
}
