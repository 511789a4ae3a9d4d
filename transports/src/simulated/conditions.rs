//! What a simulated network is like.

use std::time::Duration;

/// The properties of a network. The same for every pair of workers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conditions {
    /// Time of the first bit from one worker to another.
    pub latency: Duration,
    /// Each frame takes longer by a time drawn evenly from zero to this.
    pub jitter: Duration,
    /// Rate of each worker's line, in bytes per second, in each direction of its own. Frames that meet at a receiver
    /// share its line one after the other: that is incast.
    pub bytes_per_s: f64,
    /// Probability that a packet is lost. It is sent again, so a frame is late by this, not gone.
    pub loss: f64,
    /// Bytes of a packet.
    pub packet_bytes: usize,
    /// Time after which a lost packet is sent again; doubles with each further loss.
    pub retransmit: Duration,
    /// A pair of workers that cannot reach each other for so long lose each other.
    pub idle_timeout: Duration,
}

impl Default for Conditions {
    /// A quiet data centre network: 5 us, 100 Gbit/s, nothing lost, peers given up after 2 s of silence.
    fn default() -> Self {
        Conditions {
            latency: Duration::from_micros(5),
            jitter: Duration::ZERO,
            bytes_per_s: 12.5e9,
            loss: 0.0,
            packet_bytes: 4096,
            retransmit: Duration::from_millis(1),
            idle_timeout: Duration::from_secs(2),
        }
    }
}

/// Why a network cannot be like that.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum ConditionsError {
    /// A line carries nothing.
    #[error("the rate of a simulated line must be a positive number of bytes per second, not {0}")]
    Rate(f64),
    /// Not a probability below 1.
    #[error("the loss of a simulated network must be at least 0 and below 1, not {0}")]
    Loss(f64),
    /// Packets hold nothing.
    #[error("a packet of a simulated network must hold at least one byte")]
    Packet,
}

impl Conditions {
    /// Checks that frames get through.
    ///
    /// # Errors
    /// A rate, probability or size that makes no sense.
    pub fn check(&self) -> Result<(), ConditionsError> {
        if !(self.bytes_per_s.is_finite() && self.bytes_per_s > 0.0) {
            return Err(ConditionsError::Rate(self.bytes_per_s));
        }
        if !(0.0..1.0).contains(&self.loss) {
            return Err(ConditionsError::Loss(self.loss));
        }
        if self.packet_bytes == 0 {
            return Err(ConditionsError::Packet);
        }
        Ok(())
    }

    /// Time that a line is busy with `bytes`.
    pub fn line_time(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.bytes_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_that_carry_nothing_are_refused() {
        let good = Conditions::default();
        assert_eq!(good.check(), Ok(()));
        for bytes_per_s in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let bad = Conditions {
                bytes_per_s,
                ..good
            };
            assert!(matches!(bad.check(), Err(ConditionsError::Rate(_))));
        }
        for loss in [-0.1, 1.0, f64::NAN] {
            assert!(matches!(
                Conditions { loss, ..good }.check(),
                Err(ConditionsError::Loss(_))
            ));
        }
        let bad = Conditions {
            packet_bytes: 0,
            ..good
        };
        assert_eq!(bad.check(), Err(ConditionsError::Packet));
    }
}
