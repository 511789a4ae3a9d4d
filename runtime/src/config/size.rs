//! Amounts of memory as people write them.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};

/// An amount of memory in bytes. Reads `1073741824`, `512MiB`, `8GiB`, `1.5 GB`; prints binary units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// Units, longest first so that `MiB` is not read as `B`.
const UNITS: &[(&str, u64)] = &[
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("K", 1 << 10),
    ("M", 1 << 20),
    ("G", 1 << 30),
    ("T", 1 << 40),
    ("B", 1),
    ("", 1),
];

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError {
            text: text.to_owned(),
        };
        // The empty unit matches every text, so there is always one.
        let (number, unit) = UNITS
            .iter()
            .find_map(|(name, unit)| Some((text.strip_suffix(name)?.trim(), *unit)))
            .ok_or_else(error)?;
        if !number.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(error());
        }
        if let Ok(whole) = number.parse::<u64>() {
            return whole
                .checked_mul(unit)
                .filter(|bytes| *bytes > 0)
                .map(ByteSize)
                .ok_or_else(error);
        }
        let bytes = number.parse::<f64>().map_err(|_| error())? * unit as f64;
        if (1.0..2f64.powi(63)).contains(&bytes) {
            Ok(ByteSize(bytes as u64))
        } else {
            Err(error())
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = UNITS[..4]
            .iter()
            .rev()
            .find(|(_, unit)| self.0 >= *unit)
            .copied()
            .unwrap_or(("B", 1));
        let value = self.0 as f64 / unit as f64;
        if self.0.is_multiple_of(unit) {
            write!(f, "{} {name}", self.0 / unit)
        } else {
            write!(f, "{value:.2} {name}")
        }
    }
}

/// A text that is no amount of memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not an amount of memory; write bytes, or a number with a unit such as 512MiB or 8GiB"
)]
pub struct SizeError {
    text: String,
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes, or a text such as 8GiB")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(bytes).map(ByteSize).map_err(E::custom)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(SizeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("1", 1),
            ("512MiB", 512 << 20),
            ("8GiB", 8 << 30),
            ("8G", 8 << 30),
            ("1.5 GB", 1_500_000_000),
            ("10kB", 10_000),
            ("3B", 3),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in [
            "",
            "auto",
            "-1GiB",
            "GiB",
            "0",
            "1XB",
            "1e999GiB",
            "99999999999TiB",
            "nan",
            "inf",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn whole_units_survive_printing(count in 1u64..1023, unit in 0usize..4) {
            let size = ByteSize(count * UNITS[unit].1);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }

        #[test]
        fn no_text_panics(text in ".{0,12}") {
            let _ = text.parse::<ByteSize>();
        }
    }
}
