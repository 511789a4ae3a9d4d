//! A workload as options of the command line.

use clap::Args;
use volley_collie::{Direction, Memory, Operation, Point};

/// A workload, setting by setting.
#[derive(Debug, Args)]
pub(super) struct WorkloadArgs {
    /// Transport and verb: rc-send, rc-write, rc-write-imm, rc-read, uc-send, uc-write, uc-write-imm, ud-send
    #[arg(long)]
    operation: Operation,
    /// unidirectional (from B to A), bidirectional or loopback (A also sends to itself)
    #[arg(long, default_value = "unidirectional")]
    direction: Direction,
    /// Path MTU, bytes
    #[arg(long, default_value_t = 4096)]
    mtu: u32,
    /// Where host A's buffers lie: dramN or gpuN
    #[arg(long, default_value = "dram0")]
    memory_a: Memory,
    /// Where host B's buffers lie: dramN or gpuN
    #[arg(long, default_value = "dram0")]
    memory_b: Memory,
    /// Queue pairs in each direction
    #[arg(long, default_value_t = 1)]
    qps: u32,
    /// Memory regions of a queue pair
    #[arg(long, default_value_t = 1)]
    regions: u32,
    /// Length of a region, bytes [default: the largest message, 4096 at least]
    #[arg(long)]
    region_bytes: Option<u32>,
    /// Work requests of a doorbell
    #[arg(long, default_value_t = 1)]
    batch: u32,
    /// Work requests a send queue holds
    #[arg(long, default_value_t = 128)]
    send_depth: u32,
    /// Work requests a receive queue holds
    #[arg(long, default_value_t = 128)]
    receive_depth: u32,
    /// Scatter/gather elements of a work request
    #[arg(long, default_value_t = 1)]
    sges: u32,
    /// Sizes of consecutive messages, bytes
    #[arg(long, value_delimiter = ',', default_value = "65536")]
    messages: Vec<u32>,
}

impl WorkloadArgs {
    pub(super) fn point(self) -> Point {
        let largest = self.messages.iter().copied().max().unwrap_or(0);
        Point {
            operation: self.operation,
            direction: self.direction,
            mtu: self.mtu,
            memory_a: self.memory_a,
            memory_b: self.memory_b,
            qps: self.qps,
            regions: self.regions,
            region_bytes: self.region_bytes.unwrap_or(largest.max(4096)),
            batch: self.batch,
            send_depth: self.send_depth,
            receive_depth: self.receive_depth,
            sges: self.sges,
            messages: self.messages,
        }
    }
}
