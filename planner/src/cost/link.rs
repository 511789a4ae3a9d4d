//! T_c: a hop, and the collectives inside a server.

use crate::{Efficiency, Gpu, Transport};

/// One side's way out of its server and into it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkCost {
    transport: Transport,
    /// Of all adapters of the worker, one way.
    bytes_per_s: f64,
}

impl LinkCost {
    /// Of a worker of `tp` GPUs, each with an adapter.
    pub(crate) fn new(transport: Transport, gpu: &Gpu, tp: usize) -> Self {
        Self {
            transport,
            bytes_per_s: gpu.nic_bytes_per_s() * tp as f64,
        }
    }

    /// A link of `bytes_per_s` all in all.
    pub fn of(transport: Transport, bytes_per_s: f64) -> Self {
        Self {
            transport,
            bytes_per_s,
        }
    }

    /// Median time in which all of `bytes` leave for `peers`, or arrive from them.
    pub fn hop_s(&self, bytes: f64, peers: usize) -> f64 {
        self.transport.hop_s(bytes, self.bytes_per_s)
            + peers as f64 * self.transport.per_peer_us * 1e-6
    }

    /// What all adapters carry one way, in bytes/s.
    pub fn line_bytes_per_s(&self) -> f64 {
        self.bytes_per_s
    }

    /// P99 by median.
    pub fn tail(&self) -> f64 {
        self.transport.tail
    }

    /// Util of eq. 6: the share of the line that a hop of `bytes` reaches.
    pub fn utilisation(&self, bytes: f64, peers: usize) -> f64 {
        bytes / self.bytes_per_s / self.hop_s(bytes, peers)
    }
}

/// An all-reduce of `bytes` over `gpus` GPUs, in seconds: twice the bytes, less one share, over the slowest link. More
/// GPUs than a server has go on over the network, each with its share.
pub fn all_reduce_s(gpu: &Gpu, used: &Efficiency, gpus: usize, bytes: f64) -> f64 {
    if gpus <= 1 {
        return 0.0;
    }
    let inside = gpus.min(gpu.node_gpus) as f64;
    let servers = gpus.div_ceil(gpu.node_gpus) as f64;
    let way = |count: f64, bytes: f64, bytes_per_s: f64| {
        2.0 * (count - 1.0) / count * bytes / bytes_per_s
    };
    let mut time_s = used.collective_us * 1e-6
        + way(inside, bytes, gpu.node_link_bytes_per_s() * used.node_link);
    if servers > 1.0 {
        // Reduced inside each server first, so each GPU sends its share only.
        time_s += 2.0 * used.collective_us * 1e-6
            + way(
                servers,
                bytes / inside,
                gpu.nic_bytes_per_s() * used.network,
            );
    }
    time_s
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hardware;

    #[test]
    fn an_all_reduce_sends_almost_twice_the_bytes() {
        let hardware = Hardware::embedded();
        let (_, gpu) = hardware.gpu("A800").unwrap();
        let used = hardware.efficiency;
        assert_eq!(all_reduce_s(gpu, &used, 1, 1e9), 0.0);
        let eight = all_reduce_s(gpu, &used, 8, 1e9);
        assert!((eight - (8e-6 + 1.75 * 1e9 / 120e9)).abs() < 1e-9);
        let sixteen = all_reduce_s(gpu, &used, 16, 1e9);
        assert!((sixteen - eight - (16e-6 + 0.125e9 / 20e9)).abs() < 1e-9);
    }
}
