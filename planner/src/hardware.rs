//! The hardware catalogue: GPUs, how well they are used, and transports.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Dtype, PlanError, Profile};

/// Everything that can be rented, and what of its data sheets is reached.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hardware {
    /// GPUs by name.
    pub gpus: BTreeMap<String, Gpu>,
    /// What of a data sheet a kernel reaches.
    pub efficiency: Efficiency,
    /// Transports by name.
    pub transports: BTreeMap<String, Transport>,
    /// What was measured on a machine, if that is where the plan will run.
    pub profile: Option<Profile>,
}

/// One type of GPU and the server it stands in. `hardware.toml` explains the figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Gpu {
    pub price: f64,
    pub price_source: PriceSource,
    pub memory_gb: f64,
    pub memory_gbs: f64,
    pub bf16_tflops: f64,
    pub fp8_tflops: Option<f64>,
    pub power_w: f64,
    pub node_gpus: usize,
    pub node_link_gbs: f64,
    pub nic_gbps: f64,
    /// GPUs there are; without it, as many as one likes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available: Option<usize>,
    /// What of these figures is reached, where it is not the table's `[efficiency]`: what `volley profile` measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub efficiency: Option<Efficiency>,
}

/// Where a price is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PriceSource {
    /// The paper's table.
    Paper,
    /// A guess of ours.
    Estimate,
    /// Your own.
    User,
}

/// What of a data sheet's figure is reached, the same for every GPU.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Efficiency {
    /// Share of the tensor cores' rate.
    pub compute: f64,
    /// Share of the memory's bandwidth.
    pub memory: f64,
    /// Share of the bandwidth between GPUs of one server.
    pub node_link: f64,
    /// Share of a GPU's memory that weights, cache and slots may take.
    pub memory_usable: f64,
    /// Time of an empty kernel.
    pub kernel_us: f64,
    /// Time of an empty all-reduce inside a server.
    pub collective_us: f64,
    /// Share of the adapters' bandwidth that all-reduces over servers reach.
    #[serde(default = "network_default")]
    pub network: f64,
    /// Whether an all-reduce inside a server is fused with the product before it, so that the longer of both counts.
    #[serde(default)]
    pub fused_all_reduce: bool,
}

fn network_default() -> f64 {
    0.8
}

/// How a hop between attention and experts uses the network.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transport {
    /// Time of a hop without bytes.
    pub overhead_us: f64,
    /// Share of the line that many bytes reach.
    pub share: f64,
    /// P99 of a hop by its median.
    pub tail: f64,
    /// For each peer that is sent to or waited for.
    #[serde(default)]
    pub per_peer_us: f64,
}

impl Transport {
    /// Time in which one GPU sends or receives `bytes` over a line of `bytes_per_s`.
    pub fn hop_s(&self, bytes: f64, bytes_per_s: f64) -> f64 {
        self.overhead_us * 1e-6 + bytes / (bytes_per_s * self.share)
    }

    /// Util of eq. 6: what share of the line a hop of `bytes` reaches.
    pub fn utilisation(&self, bytes: f64, bytes_per_s: f64) -> f64 {
        bytes / bytes_per_s / self.hop_s(bytes, bytes_per_s)
    }
}

impl Gpu {
    /// Multiply-and-add rate for weights of `dtype`, in operations/s.
    pub fn flops(&self, dtype: Dtype) -> f64 {
        let bf16 = self.bf16_tflops * 1e12;
        match dtype {
            Dtype::Fp8 => self.fp8_tflops.map_or(bf16, |tflops| tflops * 1e12),
            // TF32 has half the rate of bf16.
            Dtype::F32 => bf16 / 2.0,
            Dtype::Bf16 | Dtype::Q8 | Dtype::Q4 => bf16,
        }
    }

    /// Bandwidth of its memory in bytes/s.
    pub fn memory_bytes_per_s(&self) -> f64 {
        self.memory_gbs * 1e9
    }

    /// Its memory in bytes.
    pub fn memory_bytes(&self) -> f64 {
        self.memory_gb * 1e9
    }

    /// To the other GPUs of its server, one way, in bytes/s.
    pub fn node_link_bytes_per_s(&self) -> f64 {
        self.node_link_gbs * 1e9 / 2.0
    }

    /// To other servers, one way, in bytes/s.
    pub fn nic_bytes_per_s(&self) -> f64 {
        self.nic_gbps * 1e9 / 8.0
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    gpu: BTreeMap<String, Gpu>,
    efficiency: Option<Efficiency>,
    #[serde(default)]
    transport: BTreeMap<String, Transport>,
    profile: Option<Profile>,
}

impl Hardware {
    /// The catalogue that the planner brings along.
    pub fn embedded() -> Self {
        let file: File =
            toml::from_str(include_str!("hardware.toml")).expect("a test parses this file");
        Self {
            gpus: file.gpu,
            efficiency: file.efficiency.expect("a test looks for it"),
            transports: file.transport,
            profile: None,
        }
    }

    /// The embedded catalogue with what `path` adds and overrides.
    ///
    /// # Errors
    /// The file cannot be read, has keys that do not exist, or contradicts itself.
    pub fn with_file(path: &Path) -> Result<Self, PlanError> {
        let place = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| PlanError::File {
            path: place.clone(),
            source,
        })?;
        Self::with_text(&place, &text)
    }

    fn with_text(place: &str, text: &str) -> Result<Self, PlanError> {
        let file: File = toml::from_str(text).map_err(|source| PlanError::Syntax {
            path: place.to_owned(),
            source: Box::new(source),
        })?;
        let mut hardware = Self::embedded();
        hardware.gpus.extend(file.gpu);
        hardware.transports.extend(file.transport);
        hardware.profile = file.profile;
        hardware.efficiency = file.efficiency.unwrap_or(hardware.efficiency);
        hardware.check(place)?;
        Ok(hardware)
    }

    /// The GPU of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn gpu(&self, name: &str) -> Result<(&str, &Gpu), PlanError> {
        self.gpus
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(known, gpu)| (known.as_str(), gpu))
            .ok_or_else(|| PlanError::unknown("GPU", name, self.gpus.keys().map(String::as_str)))
    }

    /// What of a GPU's data sheet is reached.
    pub fn efficiency_of(&self, gpu: &Gpu) -> Efficiency {
        gpu.efficiency.unwrap_or(self.efficiency)
    }

    /// The transport of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn transport(&self, name: &str) -> Result<Transport, PlanError> {
        self.transports.get(name).copied().ok_or_else(|| {
            PlanError::unknown(
                "transport",
                name,
                self.transports.keys().map(String::as_str),
            )
        })
    }

    fn check(&self, place: &str) -> Result<(), PlanError> {
        for (name, gpu) in &self.gpus {
            gpu.check(&format!("{place}: gpu.{name}"))?;
        }
        self.efficiency.check(&format!("{place}: efficiency"))?;
        if let Some(profile) = &self.profile {
            profile.check(place)?;
        }
        for (name, transport) in &self.transports {
            let section = format!("{place}: transport.{name}");
            share(&section, "share", transport.share)?;
            at_least(&section, "overhead_us", transport.overhead_us, 0.0)?;
            at_least(&section, "tail", transport.tail, 1.0)?;
            at_least(&section, "per_peer_us", transport.per_peer_us, 0.0)?;
        }
        Ok(())
    }
}

impl Efficiency {
    fn check(&self, section: &str) -> Result<(), PlanError> {
        for (key, value) in [
            ("compute", self.compute),
            ("memory", self.memory),
            ("node_link", self.node_link),
            ("network", self.network),
            ("memory_usable", self.memory_usable),
        ] {
            share(section, key, value)?;
        }
        at_least(section, "kernel_us", self.kernel_us, 0.0)?;
        at_least(section, "collective_us", self.collective_us, 0.0)
    }
}

impl Gpu {
    fn check(&self, section: &str) -> Result<(), PlanError> {
        for (key, value) in [
            ("price", self.price),
            ("memory_gb", self.memory_gb),
            ("memory_gbs", self.memory_gbs),
            ("bf16_tflops", self.bf16_tflops),
            ("fp8_tflops", self.fp8_tflops.unwrap_or(1.0)),
            ("power_w", self.power_w),
            ("node_link_gbs", self.node_link_gbs),
            ("nic_gbps", self.nic_gbps),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(PlanError::invalid(
                    format!("{section}.{key}"),
                    format!("{value} is not a positive number"),
                    "write what the data sheet says",
                ));
            }
        }
        if !(1..=1024).contains(&self.node_gpus) {
            return Err(PlanError::invalid(
                format!("{section}.node_gpus"),
                format!("{} GPUs in a server", self.node_gpus),
                "write a number from 1 to 1024",
            ));
        }
        if self.fp8_tflops.is_some_and(|fp8| fp8 < self.bf16_tflops) {
            return Err(PlanError::invalid(
                format!("{section}.fp8_tflops"),
                "FP8 is slower than bf16",
                "leave it out if the GPU has no FP8 units",
            ));
        }
        if let Some(efficiency) = &self.efficiency {
            efficiency.check(&format!("{section}.efficiency"))?;
        }
        if self.node_gpus > 1 && self.node_link_bytes_per_s() < self.nic_bytes_per_s() {
            return Err(PlanError::invalid(
                format!("{section}.node_link_gbs"),
                format!(
                    "{} GB/s both ways inside a server is less than {} Gb/s each way outside it",
                    self.node_link_gbs, self.nic_gbps
                ),
                "node_link_gbs is in bytes and counts both ways, nic_gbps in bits and one way",
            ));
        }
        Ok(())
    }
}

fn share(section: &str, key: &str, value: f64) -> Result<(), PlanError> {
    if value > 0.0 && value <= 1.0 {
        return Ok(());
    }
    Err(PlanError::invalid(
        format!("{section}.{key}"),
        format!("{value} is not a share"),
        "write a number above 0, at most 1",
    ))
}

fn at_least(section: &str, key: &str, value: f64, least: f64) -> Result<(), PlanError> {
    if value.is_finite() && value >= least {
        return Ok(());
    }
    Err(PlanError::invalid(
        format!("{section}.{key}"),
        format!("{value} is out of range"),
        format!("write a number that is at least {least}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_catalogue_passes_its_own_checks() {
        let hardware = Hardware::embedded();
        hardware.check("hardware.toml").unwrap();
        for name in [
            "L20", "H800", "A800", "H20", "L40S", "A100", "H100", "H200", "B200", "L4", "MI300X",
        ] {
            hardware.gpu(name).unwrap();
        }
    }

    #[test]
    fn hops_take_what_the_paper_measured() {
        let hardware = Hardware::embedded();
        // Receivers of 128 KB each at 200 Gb/s, and the figure's medians in microseconds.
        for (name, receivers, median) in [
            ("m2n", 8.0, 50.0),
            ("m2n", 16.0, 90.0),
            ("m2n", 32.0, 175.0),
            ("nccl", 8.0, 170.0),
            ("nccl", 16.0, 305.0),
            ("nccl", 32.0, 670.0),
        ] {
            let ours = hardware
                .transport(name)
                .unwrap()
                .hop_s(receivers * 131_072.0, 25e9)
                * 1e6;
            assert!(
                (ours / median - 1.0).abs() < 0.15,
                "{name} x {receivers}: {ours} us, measured {median} us"
            );
        }
    }

    fn refusal(text: &str) -> String {
        Hardware::with_text("my.toml", text)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_contradicts_itself_is_refused_by_name() {
        let gpu = |keys: &str| {
            let mut lines: Vec<String> = "price = 1\nprice_source = \"user\"\nmemory_gb = 80\nmemory_gbs = 2000\nbf16_tflops = 300\npower_w = 400\nnode_gpus = 8\nnode_link_gbs = 600\nnic_gbps = 200"
                .lines().map(str::to_owned).collect();
            for key in keys.lines() {
                lines.retain(|line| line.split(' ').next() != key.split(' ').next());
                lines.push(key.to_owned());
            }
            format!("[gpu.X1]\n{}", lines.join("\n"))
        };
        Hardware::with_text("my.toml", &gpu("")).unwrap();
        for (text, says) in [
            (
                gpu("memory_gbs = 0"),
                "my.toml: gpu.X1.memory_gbs: 0 is not a positive number",
            ),
            (gpu("nic_gbps = nan"), "gpu.X1.nic_gbps"),
            (gpu("price = -1"), "gpu.X1.price"),
            (gpu("node_gpus = 0"), "gpu.X1.node_gpus"),
            (gpu("fp8_tflops = 100"), "slower than bf16"),
            (gpu("nic_gbps = 4000"), "counts both ways"),
            (gpu("tflops = 3"), "unknown field `tflops`"),
            ("[gpus.X1]\n".to_owned(), "unknown field `gpus`"),
            (
                "[transport.slow]\noverhead_us = 1\nshare = 0\ntail = 1\n".to_owned(),
                "transport.slow.share",
            ),
            (
                "[transport.slow]\noverhead_us = 1\nshare = 1\ntail = 0.5\n".to_owned(),
                "transport.slow.tail",
            ),
        ] {
            let said = refusal(&text);
            assert!(said.contains(says), "{said}\nshould say {says}");
        }
    }
}
