//! What two workers tell each other before their first frame: where slots are, and which queue pairs lead there. Fixed little-endian numbers.
//!
//! The other side is a worker of the cluster, but its bytes are checked all the same: what is wrong here would break at the card, with less of a message.

use super::slots::Layout;
use crate::verbs::{Gid, LinkLayer, Mtu};
use crate::{Epoch, Role, Topology};

const MAGIC: [u8; 4] = *b"VLYR";
const HEAD_BYTES: usize = 26;
const RAIL_BYTES: usize = 36;
/// Rails of an offer; more are not offered.
pub(super) const RAILS_MAX: usize = 16;
/// Bytes of the longest offer.
pub(super) const OFFER_MAX: usize = HEAD_BYTES + RAILS_MAX * RAIL_BYTES;
/// Queue pairs and packets are numbered with 24 bits.
const NUMBER_MAX: u32 = 0xff_ffff;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) epoch: Epoch,
    /// Address of the first incoming slot.
    pub(super) address: u64,
    /// Bytes of all incoming slots.
    pub(super) bytes: u64,
    pub(super) rails: Vec<RailOffer>,
}

/// One rail, and the queue pair on it that is for the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RailOffer {
    /// Whether its port carries traffic.
    pub(super) up: bool,
    pub(super) link: LinkLayer,
    pub(super) mtu: Mtu,
    pub(super) lid: u16,
    pub(super) gid: Gid,
    pub(super) queue_pair: u32,
    /// Number of the first packet that it sends.
    pub(super) psn: u32,
    /// Key of the incoming slots.
    pub(super) key: u32,
}

impl Offer {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD_BYTES + self.rails.len() * RAIL_BYTES);
        bytes.extend(MAGIC);
        bytes.extend([1, self.rails.len() as u8]);
        bytes.extend(self.epoch.0.to_le_bytes());
        bytes.extend(self.address.to_le_bytes());
        bytes.extend(self.bytes.to_le_bytes());
        for rail in &self.rails {
            bytes.extend([
                u8::from(rail.up),
                u8::from(rail.link == LinkLayer::Ethernet),
                rail.mtu as u8,
                0,
            ]);
            bytes.extend(rail.lid.to_le_bytes());
            bytes.extend([0, 0]);
            bytes.extend(rail.gid.0);
            for number in [rail.queue_pair, rail.psn, rail.key] {
                bytes.extend(number.to_le_bytes());
            }
        }
        bytes
    }

    /// Reads an offer; what is wrong with it otherwise.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (head, rails) = bytes
            .split_at_checked(HEAD_BYTES)
            .ok_or("its offer is cut off")?;
        let number = |range: std::ops::Range<usize>, of: &[u8]| {
            let bytes = of[range].iter().rev();
            bytes.fold(0_u64, |number, &byte| number << 8 | u64::from(byte))
        };
        if head[..4] != MAGIC || head[4] != 1 {
            return Err("it does not speak this protocol".to_owned());
        }
        let count = usize::from(head[5]);
        if count == 0 || count > RAILS_MAX || rails.len() != count * RAIL_BYTES {
            return Err(format!(
                "its offer has {} bytes for {count} rails",
                rails.len()
            ));
        }
        let rails = rails.chunks_exact(RAIL_BYTES).map(|rail| {
            let mtu = Mtu::from_bytes(128_u32.checked_shl(rail[2].into()).unwrap_or(0));
            let [queue_pair, psn, key] =
                [24, 28, 32].map(|at| number(at..at + 4, rail) as u32);
            if rail[0] > 1 || rail[1] > 1 || rail[3] != 0 || rail[6..8] != [0, 0] {
                return Err("a rail of its offer has bytes where there must be none".to_owned());
            }
            if queue_pair > NUMBER_MAX || psn > NUMBER_MAX {
                return Err(format!(
                    "a rail of its offer names queue pair {queue_pair} and packet {psn}; both have 24 bits"
                ));
            }
            Ok(RailOffer {
                up: rail[0] == 1,
                link: if rail[1] == 1 {
                    LinkLayer::Ethernet
                } else {
                    LinkLayer::Infiniband
                },
                mtu: mtu.ok_or("a rail of its offer has packets of no known size")?,
                lid: number(4..6, rail) as u16,
                gid: Gid(rail[8..24].try_into().map_err(|_| "a short GID")?),
                queue_pair,
                psn,
                key,
            })
        });
        Ok(Self {
            epoch: Epoch(number(6..10, head) as u32),
            address: number(10..18, head),
            bytes: number(18..26, head),
            rails: rails.collect::<Result<_, String>>()?,
        })
    }

    /// Whether an offer of a worker of `role` is one for `epoch` of `topology`; what is wrong with it otherwise.
    pub(super) fn check(
        &self,
        epoch: Epoch,
        topology: &Topology,
        role: Role,
    ) -> Result<(), String> {
        if self.epoch != epoch {
            return Err(format!("it offers lanes of {}, not of {epoch}", self.epoch));
        }
        let expected = Layout::incoming(topology, role).bytes() as u64;
        if self.bytes != expected {
            return Err(format!(
                "it offers slots of {} bytes altogether, but the topology has {expected}",
                self.bytes
            ));
        }
        if self.address.checked_add(self.bytes).is_none() || !self.address.is_multiple_of(64) {
            return Err(format!("its slots cannot be at {:#x}", self.address));
        }
        Ok(())
    }
}

/// Which rails two workers share, by index: up at both, and of the same kind.
pub(super) fn common(ours: &[RailOffer], theirs: &[RailOffer]) -> Vec<u8> {
    let pairs = ours.iter().zip(theirs).zip(0_u8..);
    pairs
        .filter(|((ours, theirs), _)| ours.up && theirs.up && ours.link == theirs.link)
        .map(|(_, index)| index)
        .collect()
}

/// For the fuzzer: reads bytes as an offer.
#[doc(hidden)]
pub fn describe_offer(bytes: &[u8]) -> String {
    match Offer::decode(bytes) {
        Ok(offer) => {
            assert_eq!(
                offer.encode(),
                bytes,
                "an offer that is read is written the same"
            );
            format!("{offer:?}")
        }
        Err(reason) => reason,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_rail() -> impl Strategy<Value = RailOffer> {
        let numbers = (0..=NUMBER_MAX, 0..=NUMBER_MAX, any::<u32>(), any::<u16>());
        (any::<(bool, bool)>(), 1..=5_u32, any::<[u8; 16]>(), numbers).prop_map(
            |((up, ethernet), mtu, gid, (queue_pair, psn, key, lid))| RailOffer {
                up,
                link: if ethernet {
                    LinkLayer::Ethernet
                } else {
                    LinkLayer::Infiniband
                },
                mtu: Mtu::from_bytes(128 << mtu).unwrap(),
                lid,
                gid: Gid(gid),
                queue_pair,
                psn,
                key,
            },
        )
    }

    proptest! {
        #[test]
        fn an_offer_reads_back_as_written(
            rails in prop::collection::vec(any_rail(), 1..=RAILS_MAX),
            (epoch, address, bytes) in any::<(u32, u64, u64)>(),
        ) {
            let offer = Offer { epoch: Epoch(epoch), address, bytes, rails };
            let encoded = offer.encode();
            prop_assert!(encoded.len() <= OFFER_MAX);
            prop_assert_eq!(Offer::decode(&encoded), Ok(offer));
            prop_assert!(Offer::decode(&encoded[..encoded.len() - 1]).is_err());
        }

        #[test]
        fn no_bytes_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), rails in 0..5_usize) {
            if bytes.len() >= HEAD_BYTES + rails * RAIL_BYTES {
                bytes.truncate(HEAD_BYTES + rails * RAIL_BYTES);
                bytes[..6].copy_from_slice(&[b'V', b'L', b'Y', b'R', 1, rails as u8]);
            }
            describe_offer(&bytes);
        }
    }

    #[test]
    fn offers_that_do_not_fit_are_refused_with_the_numbers() {
        let topology = Topology {
            attention: 2,
            experts: 3,
            micro_batches: 2,
            dispatch_bytes: 128,
            combine_bytes: 64,
        };
        let good = Offer {
            epoch: Epoch(3),
            address: 4096,
            bytes: 2 * 2 * 128,
            rails: Vec::new(),
        };
        let check = |offer: &Offer| offer.check(Epoch(3), &topology, Role::Expert);
        assert_eq!(check(&good), Ok(()));
        for (bad, word) in [
            (
                Offer {
                    epoch: Epoch(2),
                    ..good.clone()
                },
                "epoch 2",
            ),
            (
                Offer {
                    bytes: 513,
                    ..good.clone()
                },
                "513",
            ),
            (
                Offer {
                    address: 65,
                    ..good.clone()
                },
                "0x41",
            ),
            (
                Offer {
                    address: u64::MAX - 63,
                    ..good.clone()
                },
                "0xffff",
            ),
        ] {
            let reason = check(&bad).unwrap_err();
            assert!(reason.contains(word), "{reason}");
        }
    }
}
