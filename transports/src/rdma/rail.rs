//! Rails: the ports of network cards that frames travel by, and how they are used.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::RdmaError;
use super::offer::RAILS_MAX;
use crate::verbs::{
    Context, DeviceList, GidEntry, GlobalRoute, LinkLayer, Mtu, Pages, Path, Port, PortState,
    ProtectionDomain, Reliability,
};

/// A port of a device: `mlx5_0`, or `mlx5_0:2` for the second port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RailName {
    /// Name of the device, as in `/sys/class/infiniband`.
    pub device: String,
    /// Port, from 1.
    pub port: u8,
}

impl fmt::Display for RailName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.device, self.port)
    }
}

impl FromStr for RailName {
    type Err = RdmaOptionsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (device, port) = text.split_once(':').unwrap_or((text, "1"));
        match port.parse() {
            Ok(port) if port > 0 && !device.is_empty() => Ok(Self {
                device: device.to_owned(),
                port,
            }),
            _ => Err(RdmaOptionsError(format!(
                "`{text}` is no port of a device; write `mlx5_0`, or `mlx5_0:2` for its second port"
            ))),
        }
    }
}

/// Which of a port's addresses is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GidChoice {
    /// RoCEv2 with an address that is routed, else RoCEv2, else RoCEv1; on InfiniBand the first.
    #[default]
    Auto,
    /// This row of the table.
    Index(u8),
}

/// How rails are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaOptions {
    /// Which rails, in the same order on every host; empty takes all ports that carry traffic.
    pub rails: Vec<RailName>,
    /// Which address of each.
    pub gid: GidChoice,
    /// DSCP and ECN bits of RoCEv2: what switches tell the traffic apart by.
    pub traffic_class: u8,
    /// Service level of InfiniBand, priority of RoCEv1.
    pub service_level: u8,
    /// Largest packets; none takes the port's.
    pub mtu: Option<Mtu>,
    /// An acknowledgement is waited for 4.096 us times 2 to this power.
    pub timeout: u8,
    /// How often a packet is sent again.
    pub retries: u8,
    /// Frames of a queue pair that may wait to be acknowledged. At least two for each micro-batch are taken.
    pub depth: u32,
    /// Frames up to this length travel inside the request, as far as the card allows.
    pub inline_bytes: u32,
    /// What slots are made of.
    pub pages: Pages,
    /// A port that is down for so long has lost its peers.
    pub port_patience: Duration,
}

impl Default for RdmaOptions {
    fn default() -> Self {
        Self {
            rails: Vec::new(),
            gid: GidChoice::Auto,
            traffic_class: 0,
            service_level: 0,
            mtu: None,
            // 67 ms, eight times: half a second until a peer that is silent is lost.
            timeout: 14,
            retries: 7,
            depth: 64,
            inline_bytes: 220,
            pages: Pages::Transparent,
            port_patience: Duration::from_millis(800),
        }
    }
}

/// A setting that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RdmaOptionsError(pub(super) String);

impl RdmaOptions {
    pub(super) fn check(&self) -> Result<(), RdmaOptionsError> {
        let refuse = |text: String| Err(RdmaOptionsError(text));
        if self.rails.len() > RAILS_MAX {
            return refuse(format!(
                "{} rails, but there may be {RAILS_MAX}",
                self.rails.len()
            ));
        }
        // A timeout of 0 would wait for ever for a peer that is gone.
        if !(1..=31).contains(&self.timeout) || self.retries > 7 {
            return refuse(format!(
                "a timeout of {} and {} retries; it takes 1 to 31, and 0 to 7",
                self.timeout, self.retries
            ));
        }
        if self.service_level > 15 {
            return refuse(format!(
                "service level {}; there are 0 to 15",
                self.service_level
            ));
        }
        if !(2..=16_384).contains(&self.depth) {
            return refuse(format!("a depth of {}; it takes 2 to 16384", self.depth));
        }
        Ok(())
    }

    pub(super) fn reliability(&self) -> Reliability {
        Reliability {
            timeout: self.timeout,
            retries: self.retries,
            // Receives always wait before a peer can send; a peer without one is broken.
            not_ready_retries: 6,
            not_ready_timer: 12,
            reads: 1,
        }
    }
}

/// An opened rail.
pub(super) struct Rail {
    pub(super) name: RailName,
    pub(super) context: Context,
    pub(super) domain: ProtectionDomain,
    pub(super) port: Port,
    pub(super) gid: GidEntry,
}

impl Rail {
    fn open(list: &DeviceList, name: &RailName, options: &RdmaOptions) -> Result<Self, RdmaError> {
        let context = list.context(&name.device)?;
        let refuse = |reason: String| RdmaError::Rail {
            rail: name.to_string(),
            reason,
        };
        if context.is_iwarp() {
            return Err(refuse(
                "it is an iWARP device, which has no WRITE WITH IMMEDIATE; use RoCE or InfiniBand, or `transport = \"quic\"`".to_owned(),
            ));
        }
        let port = context.port(name.port)?;
        let gids = context.gids()?;
        let gid = choose(&gids, name.port, options.gid).ok_or_else(|| {
            refuse(match options.gid {
                GidChoice::Auto => "it has no address (GID); give its network interface an IP address".to_owned(),
                GidChoice::Index(index) => format!(
                    "it has no GID at index {index}; `rdma.gid_index = \"auto\"` chooses one by its type"
                ),
            })
        })?;
        let domain = context.protection_domain()?;
        Ok(Self {
            name: name.clone(),
            context,
            domain,
            port,
            gid,
        })
    }

    /// All rails of the options.
    pub(super) fn open_all(options: &RdmaOptions) -> Result<Vec<Self>, RdmaError> {
        let list = DeviceList::open()?;
        if !options.rails.is_empty() {
            let rails = options.rails.iter();
            return rails.map(|name| Self::open(&list, name, options)).collect();
        }
        let mut rails = Vec::new();
        let mut reasons = Vec::new();
        for device in list.iter() {
            let context = match device.open() {
                Ok(context) => context,
                Err(error) => {
                    reasons.push(error.to_string());
                    continue;
                }
            };
            for port in 1..=context.limits()?.ports {
                let name = RailName {
                    device: device.name().to_owned(),
                    port,
                };
                match Self::open(&list, &name, options) {
                    Ok(rail) if rail.port.state == PortState::Active => rails.push(rail),
                    Ok(_) => reasons.push(format!("{name} is down")),
                    Err(error) => reasons.push(error.to_string()),
                }
            }
        }
        if rails.is_empty() {
            let reason = match reasons.is_empty() {
                true => "there is none on this host".to_owned(),
                false => reasons.join("; "),
            };
            return Err(RdmaError::NoRail(reason));
        }
        rails.truncate(RAILS_MAX);
        Ok(rails)
    }

    /// Whether its port carries traffic now.
    pub(super) fn is_up(&self) -> bool {
        let port = self.context.port(self.name.port);
        port.is_ok_and(|port| port.state == PortState::Active)
    }

    /// The largest packets, as options and port allow.
    pub(super) fn mtu(&self, options: &RdmaOptions) -> Mtu {
        options.mtu.unwrap_or(self.port.mtu).min(self.port.mtu)
    }

    /// The way to a port with this LID and GID. `flow` spreads queue pairs over a switch's ways.
    pub(super) fn path(
        &self,
        lid: u16,
        gid: crate::verbs::Gid,
        options: &RdmaOptions,
        flow: u32,
    ) -> Path {
        let route = GlobalRoute {
            destination: gid,
            source_index: self.gid.index,
            traffic_class: options.traffic_class,
            flow_label: flow & 0xf_ffff,
            hop_limit: 64,
        };
        Path {
            port: self.name.port,
            lid,
            service_level: options.service_level,
            route: (self.port.link == LinkLayer::Ethernet).then_some(route),
        }
    }
}

/// The row of the table that is used.
fn choose(rows: &[GidEntry], port: u8, choice: GidChoice) -> Option<GidEntry> {
    match choice {
        GidChoice::Index(index) => rows
            .iter()
            .copied()
            .find(|row| row.port == port && row.index == index),
        GidChoice::Auto => GidEntry::best(rows, port),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verbs::{Gid, GidKind};

    #[test]
    fn names_of_rails_are_read() {
        let name: RailName = "mlx5_0".parse().unwrap();
        assert_eq!(name.to_string(), "mlx5_0:1");
        assert_eq!("mlx5_0:2".parse::<RailName>().unwrap().port, 2);
        for bad in ["", ":1", "mlx5_0:0", "mlx5_0:x", "mlx5_0:256"] {
            assert!(bad.parse::<RailName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_address_is_chosen_by_its_type() {
        let row = |index, kind, gid: [u8; 2], port| GidEntry {
            gid: Gid([gid[0], gid[1], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
            index,
            port,
            kind,
        };
        let mut ipv4 = row(3, GidKind::RoceV2, [0, 0], 1);
        ipv4.gid.0[10..12].copy_from_slice(&[0xff, 0xff]);
        let rows = [
            row(0, GidKind::RoceV1, [0xfe, 0x80], 1),
            row(1, GidKind::RoceV2, [0xfe, 0x80], 1),
            row(2, GidKind::RoceV2, [0x20, 0x01], 1),
            ipv4,
            row(4, GidKind::RoceV2, [0x20, 0x01], 2),
        ];
        let index =
            |rows: &[GidEntry], port, choice| choose(rows, port, choice).map(|row| row.index);
        assert_eq!(index(&rows, 1, GidChoice::Auto), Some(3));
        assert_eq!(index(&rows[..3], 1, GidChoice::Auto), Some(2));
        assert_eq!(index(&rows[..2], 1, GidChoice::Auto), Some(1));
        assert_eq!(index(&rows[..1], 1, GidChoice::Auto), Some(0));
        assert_eq!(index(&rows, 2, GidChoice::Auto), Some(4));
        assert_eq!(index(&rows, 1, GidChoice::Index(0)), Some(0));
        assert_eq!(index(&rows, 1, GidChoice::Index(4)), None);
    }

    #[test]
    fn options_out_of_range_are_refused() {
        let default = RdmaOptions::default();
        assert_eq!(default.check(), Ok(()));
        for bad in [
            RdmaOptions {
                timeout: 0,
                ..default.clone()
            },
            RdmaOptions {
                timeout: 32,
                ..default.clone()
            },
            RdmaOptions {
                retries: 8,
                ..default.clone()
            },
            RdmaOptions {
                service_level: 16,
                ..default.clone()
            },
            RdmaOptions {
                depth: 1,
                ..default.clone()
            },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
