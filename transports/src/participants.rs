//! Which attention workers take part in one exchange.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A set of attention workers, as a bitmap sized once.
///
/// The scheduler decides who takes part in a step of a micro-batch; every participant names the same set in its
/// dispatch, and an expert worker fires when all of them have sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Participants {
    workers: u16,
    words: Box<[u64]>,
}

impl Participants {
    /// Number of 64-bit words of a bitmap over `workers` workers.
    pub const fn words_for(workers: u16) -> usize {
        (workers as usize).div_ceil(64)
    }

    /// No worker of `workers`.
    pub fn none(workers: u16) -> Self {
        Self {
            workers,
            words: vec![0; Self::words_for(workers)].into(),
        }
    }

    /// All of `workers` workers.
    pub fn all(workers: u16) -> Self {
        let mut all = Self::none(workers);
        (0..workers).for_each(|worker| all.insert(worker));
        all
    }

    /// Number of workers the set is drawn from.
    pub const fn workers(&self) -> u16 {
        self.workers
    }

    /// Removes every worker.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds a worker. A worker that the set is not drawn from is not added.
    pub fn insert(&mut self, worker: u16) {
        if worker < self.workers {
            set_bit(&mut self.words, worker);
        }
    }

    /// Removes a worker.
    pub fn remove(&mut self, worker: u16) {
        if worker < self.workers {
            self.words[usize::from(worker) / 64] &= !(1 << (worker % 64));
        }
    }

    /// Whether a worker takes part.
    pub fn contains(&self, worker: u16) -> bool {
        bit(&self.words, worker)
    }

    /// Number of workers that take part.
    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// The workers that take part, in order.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        bits(&self.words)
    }

    /// The bitmap as it travels: worker `i` is bit `i % 64` of word `i / 64`.
    pub fn words(&self) -> &[u64] {
        &self.words
    }
}

/// Whether bit `index` is set; false beyond the end.
pub(crate) fn bit(words: &[u64], index: u16) -> bool {
    words
        .get(usize::from(index) / 64)
        .is_some_and(|word| word >> (index % 64) & 1 == 1)
}

/// Travels as the number of workers and those that take part.
impl Serialize for Participants {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (self.workers, self.iter().collect::<Vec<u16>>()).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Participants {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (workers, members) = <(u16, Vec<u16>)>::deserialize(deserializer)?;
        let mut participants = Self::none(workers);
        for member in members {
            if member >= workers {
                let message = format!("worker {member} of {workers} cannot take part");
                return Err(serde::de::Error::custom(message));
            }
            participants.insert(member);
        }
        Ok(participants)
    }
}

/// Sets bit `index`, which the caller has checked.
pub(crate) fn set_bit(words: &mut [u64], index: u16) {
    words[usize::from(index) / 64] |= 1 << (index % 64);
}

/// The set bits in order.
pub(crate) fn bits(words: &[u64]) -> impl Iterator<Item = u16> + '_ {
    words.iter().zip(0u16..).flat_map(|(&word, at)| {
        let rest = |rest: &u64| Some(rest & (rest - 1)).filter(|&rest| rest != 0);
        let words = std::iter::successors(Some(word).filter(|&word| word != 0), rest);
        // Bit 63 of word 1,023 is the last there can be: 65,535.
        words.map(move |rest| at * 64 + rest.trailing_zeros() as u16)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_across_words() {
        let mut set = Participants::none(130);
        for worker in [0, 63, 64, 129, 130, 500] {
            set.insert(worker);
        }
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 63, 64, 129]);
        assert_eq!(set.count(), 4);
        set.remove(63);
        assert!(!set.contains(63) && set.contains(64) && !set.contains(500));
        assert_eq!(set.words(), [1, 1, 2]);
        set.clear();
        assert_eq!(set, Participants::none(130));
        assert_eq!(Participants::all(65).words(), [u64::MAX, 1]);
    }
}
