//! Which scheduler plans: processes that offer themselves, or the frontend's own when there is none. Pure.
//!
//! Any number of scheduler processes may be there; one is asked, the others stand by. The frontend decides which, so two of them can never plan at once, whatever
//! they believe of themselves: an election outside (a *term*, the larger the later) says whom the frontend prefers, not who may write.

use std::time::Duration;

use crate::protocol::Now;

/// A scheduler that died or was late is not asked again for so long, if there is another, so that a slow one does not make the cluster go back and forth.
const DISTRUST: Duration = Duration::from_secs(5);

/// Whom the frontend asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Leader {
    /// The frontend's own scheduler.
    #[default]
    Own,
    /// The process with this number.
    Process(u64),
}

/// A scheduler process that offers itself.
#[derive(Debug)]
pub(crate) struct Candidate<H> {
    /// Its number, which grows with each that comes.
    pub(crate) id: u64,
    /// The name in its certificate, or one of its own.
    pub(crate) name: String,
    /// Its term, if an election chose it.
    pub(crate) term: Option<u64>,
    /// The way to it.
    pub(crate) handle: H,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Candidates<H> {
    list: Vec<Candidate<H>>,
    /// Names that are not trusted until a time.
    distrusted: Vec<(String, Now)>,
}

impl<H> Default for Candidates<H> {
    fn default() -> Self {
        Candidates {
            list: Vec::new(),
            distrusted: Vec::new(),
        }
    }
}

impl<H> Candidates<H> {
    /// One offers itself.
    pub(crate) fn joined(&mut self, candidate: Candidate<H>) {
        self.list.push(candidate);
    }

    /// An election chose one, or chose another instead.
    pub(crate) fn elected(&mut self, id: u64, term: Option<u64>) {
        if let Some(candidate) = self.list.iter_mut().find(|of| of.id == id) {
            candidate.term = term;
        }
    }

    /// One is gone.
    pub(crate) fn left(&mut self, id: u64) {
        self.list.retain(|candidate| candidate.id != id);
    }

    /// One died or did not answer. It is gone too; when it offers itself again, others come first for a while.
    pub(crate) fn failed(&mut self, id: u64, now: Now) {
        if let Some(candidate) = self.get(id) {
            let name = candidate.name.clone();
            self.distrusted
                .retain(|(other, until)| *other != name && *until > now);
            self.distrusted.push((name, now + DISTRUST));
        }
        self.left(id);
    }

    /// Whom to ask: the latest elected, else whoever came first.
    pub(crate) fn best(&self, now: Now) -> Leader {
        let trusted = self.list.iter().filter(|candidate| {
            let mut doubts = self.distrusted.iter();
            !doubts.any(|(name, until)| *name == candidate.name && *until > now)
        });
        let best = trusted.max_by_key(|of| (of.term, std::cmp::Reverse(of.id)));
        best.map_or(Leader::Own, |candidate| Leader::Process(candidate.id))
    }

    /// The candidate with this number.
    pub(crate) fn get(&self, id: u64) -> Option<&Candidate<H>> {
        self.list.iter().find(|candidate| candidate.id == id)
    }

    /// All that are there, in the order in which they came.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Candidate<H>> {
        self.list.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(id: u64, name: &str, term: Option<u64>) -> Candidate<()> {
        Candidate {
            id,
            name: name.to_owned(),
            term,
            handle: (),
        }
    }

    #[test]
    fn the_first_to_come_leads_until_an_election_says_otherwise() {
        let now = Duration::ZERO;
        let mut all = Candidates::default();
        assert_eq!(all.best(now), Leader::Own);
        all.joined(candidate(1, "a", None));
        all.joined(candidate(2, "b", None));
        assert_eq!(all.best(now), Leader::Process(1));
        all.elected(2, Some(7));
        assert_eq!(all.best(now), Leader::Process(2));
        // A later term is worth more than an earlier one that has not been taken back yet.
        all.elected(1, Some(9));
        assert_eq!(all.best(now), Leader::Process(1));
        all.elected(1, None);
        assert_eq!(all.best(now), Leader::Process(2));
        all.left(2);
        all.left(1);
        assert_eq!(all.best(now), Leader::Own);
    }

    #[test]
    fn one_that_failed_comes_last_for_a_while() {
        let second = Duration::from_secs;
        let mut all = Candidates::default();
        all.joined(candidate(1, "a", Some(3)));
        all.joined(candidate(2, "b", None));
        all.failed(1, second(1));
        assert_eq!(all.best(second(1)), Leader::Process(2));
        all.joined(candidate(3, "a", Some(3)));
        assert_eq!(all.best(second(2)), Leader::Process(2));
        assert_eq!(all.best(second(7)), Leader::Process(3));
        // Alone and not trusted: the frontend plans for itself.
        all.left(2);
        assert_eq!(all.best(second(2)), Leader::Own);
    }
}
