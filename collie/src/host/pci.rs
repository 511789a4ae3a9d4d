//! The configuration space of a PCI device, as far as the kernel shows it: 64 bytes to everybody, all of it to root.

/// Capability and extended capability of PCI Express and of access control services (PCI Express base specification, chapter 7).
const PCI_EXPRESS: u8 = 0x10;
const ACS: u16 = 0x0d;
/// Capabilities of a list, at most: a list that is longer goes in a circle.
const LIST_MAX: usize = 64;

/// The bytes of a configuration space.
pub(super) struct Config(pub Vec<u8>);

impl Config {
    fn byte(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    fn word(&self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte(at)?, self.byte(at + 1)?]))
    }

    /// Whether the device may relax the order of its writes. None if the kernel does not show it.
    pub(super) fn relaxed_ordering(&self) -> Option<bool> {
        let mut at = usize::from(self.byte(0x34)?);
        for _ in 0..LIST_MAX {
            if at < 0x40 {
                return None;
            }
            if self.byte(at)? == PCI_EXPRESS {
                return Some(self.word(at + 8)? & 1 << 4 != 0);
            }
            at = usize::from(self.byte(at + 1)?);
        }
        None
    }

    /// Whether access control services send traffic between peers through the root complex. None if the kernel does not show it.
    pub(super) fn redirects_peers(&self) -> Option<bool> {
        let mut at = 0x100;
        for _ in 0..LIST_MAX {
            let (id, next) = (self.word(at)?, self.word(at + 2)? >> 4);
            if id == ACS {
                // Request redirect and completion redirect.
                return Some(self.word(at + 6)? & 0b1100 != 0);
            }
            if next < 0x100 {
                return Some(false);
            }
            at = usize::from(next);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(relaxed: bool, redirect: bool) -> Config {
        let mut bytes = vec![0; 4096];
        bytes[0x34] = 0x40;
        (bytes[0x40], bytes[0x41]) = (0x01, 0x60);
        bytes[0x60] = PCI_EXPRESS;
        bytes[0x68] = u8::from(relaxed) << 4;
        bytes[0x100..0x104].copy_from_slice(&[0x01, 0, 0x01, 0x14]);
        bytes[0x140..0x142].copy_from_slice(&[0x0d, 0]);
        bytes[0x146] = if redirect { 0b1100 } else { 0 };
        Config(bytes)
    }

    #[test]
    fn both_are_found_by_their_lists() {
        for (relaxed, redirect) in [(true, false), (false, true)] {
            let config = config(relaxed, redirect);
            assert_eq!(config.relaxed_ordering(), Some(relaxed));
            assert_eq!(config.redirects_peers(), Some(redirect));
        }
    }

    #[test]
    fn what_the_kernel_hides_is_not_guessed_and_a_circle_ends() {
        let mut short = config(true, true);
        short.0.truncate(64);
        assert_eq!(
            (short.relaxed_ordering(), short.redirects_peers()),
            (None, None)
        );
        let mut circle = config(true, true);
        (circle.0[0x40], circle.0[0x41]) = (0x01, 0x40);
        assert_eq!(circle.relaxed_ordering(), None);
    }
}
