//! Who is in the cluster, and which epoch follows from it. Pure: what happened and the time go in, a [`Grouping`] comes out.
//!
//! Every worker has a *seat*, named by role and index. Whoever sits there has a number of its own, its *life*, so that words of an earlier occupant are known.
//! A new epoch begins when those who can take part are others than before, and only if they suffice: one attention worker, and an owner for each expert.
//!
//! # Where experts are
//! Worker `w` is at home with the `w`-th range of experts ([`Placement::even`]); with `replicas > 1` the workers behind it hold that range too. Rows go to the first owner
//! that takes part, counted from home, or to the one that [`Roster::rebalance`] prefers by the measured load: an epoch changes who computes, and nothing is
//! loaded for it, so no row goes to a replica that has no weights. When an expert has no owner left, living workers with spare room *adopt* it: [`Roster::adoptions`] says who loads what.
//!
//! # Accusations
//! A worker that accuses a peer may be right, or the link between the two is broken while both are well. A process cannot be rebuilt from here, so the accused is *barred*:
//! it sits out for a while, longer with each time, if the others suffice; else the epoch is begun again with the same workers and new lanes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use volley_transports::{Epoch, Participants, Placement, PlacementError, Role, WorkerId};

use crate::balance;
use crate::grouping::Grouping;
use crate::protocol::Now;

/// How long a worker is barred the first time; doubles with each further one.
const BAR: Duration = Duration::from_millis(500);
/// Longest bar.
const BAR_MAX: Duration = Duration::from_secs(15);
/// A worker that was good for so long is barred as if it were the first time.
const BAR_FORGOTTEN: Duration = Duration::from_secs(60);

/// The seats, and how experts are spread over them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RosterShape {
    /// Seats of attention workers.
    pub attention: u16,
    /// Seats of expert workers.
    pub expert_workers: u16,
    /// Experts of a layer.
    pub experts: u16,
    /// Workers that hold each expert.
    pub replicas: u16,
    /// Experts that a worker may adopt beside its own.
    pub spare: u16,
}

impl RosterShape {
    /// The experts that an expert worker holds from the start, ascending.
    ///
    /// # Errors
    /// There are no experts or no workers.
    pub fn home(&self, worker: u16) -> Result<Vec<u16>, PlacementError> {
        let placement = self.placement(Epoch(0))?;
        Ok(placement
            .local_experts(volley_transports::Layer(0), worker)
            .to_vec())
    }

    /// Every expert with all its owners, home first.
    ///
    /// # Errors
    /// There are no experts or no workers.
    pub fn placement(&self, epoch: Epoch) -> Result<Placement, PlacementError> {
        let even = Placement::even(epoch, self.experts, self.expert_workers)?;
        let owners = (0..self.experts).map(|expert| {
            let home = even.owner(volley_transports::Layer(0), expert);
            let home = home.map_or(0, |owner| owner.worker);
            let replicas = self.replicas.clamp(1, self.expert_workers);
            (0..replicas)
                .map(|next| {
                    ((u32::from(home) + u32::from(next)) % u32::from(self.expert_workers)) as u16
                })
                .collect()
        });
        Placement::from_owners(epoch, self.expert_workers, &[owners.collect()])
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Roster {
    shape: RosterShape,
    epoch: Epoch,
    seats: BTreeMap<WorkerId, Seat>,
    /// What the current epoch was made of: lives by seat, owners by expert.
    current: Option<Makeup>,
    /// Begin an epoch even with the same workers.
    again: bool,
    /// By expert, who computes it if it takes part and holds it; empty where home decides.
    preferred: Vec<u16>,
}

/// Experts to adopt, by worker.
type Lists = BTreeMap<WorkerId, BTreeSet<u16>>;

#[derive(Debug, Default)]
struct Seat {
    occupant: Option<Occupant>,
    bar: Option<Bar>,
}

#[derive(Debug)]
struct Occupant {
    life: u64,
    loaded: bool,
    /// Experts it holds and will go on to hold.
    holds: BTreeSet<u16>,
    /// What it was last told to adopt: it drops, or has dropped, what it adopted before and is not named here.
    told: BTreeSet<u16>,
    /// Adoptions that it has not answered. While it loads it computes nothing.
    adoptions: u32,
    /// It joined with adopted experts, and has to be told which of them to keep: what it was told in an earlier life may still be on its way.
    unsure: bool,
    /// The epoch since which it has taken part without a break.
    since: Option<Epoch>,
    /// It leaves as soon as the others suffice.
    leaving: bool,
    /// It stays in its seat without work: somebody else decides when it goes.
    drained: bool,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    until: Now,
    length: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Makeup {
    attention: BTreeMap<u16, u64>,
    experts: BTreeMap<u16, u64>,
    owners: Vec<Vec<u16>>,
}

impl Roster {
    /// All seats empty.
    pub(crate) fn new(shape: RosterShape) -> Self {
        let attention = (0..shape.attention).map(|index| Role::Attention.worker(index));
        let experts = (0..shape.expert_workers).map(|index| Role::Expert.worker(index));
        Roster {
            shape,
            epoch: Epoch(0),
            seats: attention
                .chain(experts)
                .map(|id| (id, Seat::default()))
                .collect(),
            current: None,
            again: false,
            preferred: Vec::new(),
        }
    }

    /// The current epoch; 0 before the first.
    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether those who can take part suffice.
    pub(crate) fn is_viable(&self, now: Now) -> bool {
        self.makeup(now).is_some()
    }

    /// Who sits there.
    pub(crate) fn life(&self, worker: WorkerId) -> Option<u64> {
        self.occupant(worker).map(|occupant| occupant.life)
    }

    /// Whether the seat exists.
    pub(crate) fn has_seat(&self, worker: WorkerId) -> bool {
        self.seats.contains_key(&worker)
    }

    /// Every seat.
    pub(crate) fn all_seats(&self) -> impl Iterator<Item = WorkerId> + '_ {
        self.seats.keys().copied()
    }

    /// Seats that nobody has.
    pub(crate) fn empty_seats(&self) -> Vec<WorkerId> {
        let empty = self
            .seats
            .iter()
            .filter(|(_, seat)| seat.occupant.is_none());
        empty.map(|(&id, _)| id).collect()
    }

    /// Whether `life` is who sits there.
    pub(crate) fn is_current(&self, worker: WorkerId, life: u64) -> bool {
        self.occupant(worker)
            .is_some_and(|occupant| occupant.life == life)
    }

    /// Gives a seat to `life`, who has yet to load. Whoever had it is gone.
    pub(crate) fn seat(&mut self, worker: WorkerId, life: u64) {
        if let Some(seat) = self.seats.get_mut(&worker) {
            seat.occupant = Some(Occupant {
                life,
                loaded: false,
                holds: BTreeSet::new(),
                told: BTreeSet::new(),
                adoptions: 0,
                unsure: false,
                since: None,
                leaving: false,
                drained: false,
            });
        }
    }

    /// A worker has its weights; `holds` are the experts of an expert worker. Also the answer to an adoption.
    pub(crate) fn loaded(
        &mut self,
        worker: WorkerId,
        life: u64,
        holds: impl IntoIterator<Item = u16>,
    ) {
        let home = self.home(worker);
        let spare = self.current.is_some() && self.shape.spare > 0;
        if let Some(occupant) = self
            .occupant_mut(worker)
            .filter(|occupant| occupant.life == life)
        {
            let holds: BTreeSet<u16> = holds.into_iter().collect();
            if !std::mem::replace(&mut occupant.loaded, true) && spare {
                occupant.told = holds.difference(&home).copied().collect();
                occupant.unsure = !occupant.told.is_empty();
            }
            occupant.adoptions = occupant.adoptions.saturating_sub(1);
            // It may have said so before it heard what else it was told since.
            let lasts = |expert: &u16| home.contains(expert) || occupant.told.contains(expert);
            occupant.holds = holds.into_iter().filter(lasts).collect();
        }
    }

    /// A worker is gone.
    pub(crate) fn lost(&mut self, worker: WorkerId) {
        if let Some(seat) = self.seats.get_mut(&worker) {
            seat.occupant = None;
        }
    }

    /// A worker wants to leave: its work goes elsewhere as soon as others can take it.
    pub(crate) fn leaving(&mut self, worker: WorkerId) {
        if let Some(occupant) = self.occupant_mut(worker) {
            (occupant.leaving, occupant.drained) = (true, false);
        }
    }

    /// A worker is to have no work, but to stay; or to be used again. One that leaves by itself is not kept. Returns whether somebody sits there.
    pub(crate) fn drain(&mut self, worker: WorkerId, drained: bool) -> bool {
        let Some(occupant) = self.occupant_mut(worker) else {
            return false;
        };
        if occupant.drained || !occupant.leaving {
            (occupant.leaving, occupant.drained) = (drained, drained);
        }
        true
    }

    /// Whether its work is to go elsewhere, or has gone.
    pub(crate) fn is_leaving(&self, worker: WorkerId) -> bool {
        self.occupant(worker)
            .is_some_and(|occupant| occupant.leaving)
    }

    /// Workers that want to leave and take no part any more; each is named once.
    pub(crate) fn released(&mut self) -> Vec<WorkerId> {
        let seats = self.seats.iter_mut();
        let occupants = seats.filter_map(|(&id, seat)| Some((id, seat.occupant.as_mut()?)));
        let gone = |o: &Occupant| o.leaving && !o.drained && o.loaded && o.since.is_none();
        let released = occupants.filter(|(_, occupant)| gone(occupant));
        released
            .map(|(id, occupant)| {
                occupant.loaded = false;
                id
            })
            .collect()
    }

    /// A worker of `epoch` was said to be silent or wrong. Words of other epochs are stale. Returns whether anything follows.
    pub(crate) fn accused(&mut self, worker: WorkerId, epoch: Epoch, now: Now) -> bool {
        if epoch != self.epoch
            || self.again
            || self.occupant(worker).is_none_or(|o| o.since.is_none())
        {
            return false;
        }
        let Some(seat) = self.seats.get_mut(&worker) else {
            return false;
        };
        let before = seat.bar.take();
        let recent = before.filter(|bar| now < bar.until + BAR_FORGOTTEN);
        let length = recent.map_or(BAR, |bar| (bar.length * 2).min(BAR_MAX));
        let until = now + length;
        seat.bar = Some(Bar { until, length });
        if self.makeup(now).is_none() {
            // The others do not suffice: new lanes for all are the best that can be had.
            if let Some(seat) = self.seats.get_mut(&worker) {
                seat.bar = Some(Bar { until: now, length });
            }
            self.again = true;
        }
        true
    }

    /// Who takes part in the current epoch.
    pub(crate) fn takes_part(&self, worker: WorkerId) -> bool {
        self.occupant(worker)
            .is_some_and(|occupant| occupant.since.is_some())
    }

    /// The epoch since which a worker has taken part.
    pub(crate) fn since(&self, worker: WorkerId) -> Option<Epoch> {
        self.occupant(worker).and_then(|occupant| occupant.since)
    }

    /// The next epoch, if one is due. Before the first all seats must have loaded.
    ///
    /// # Errors
    /// A placement that makes no sense: the shape is empty.
    pub(crate) fn next(&mut self, now: Now) -> Result<Option<Grouping>, PlacementError> {
        if self.current.is_none() && !self.seats.values().all(Seat::has_loaded) {
            return Ok(None);
        }
        let Some(makeup) = self.makeup(now) else {
            return Ok(None);
        };
        if !std::mem::take(&mut self.again) && self.current.as_ref() == Some(&makeup) {
            return Ok(None);
        }
        let epoch = Epoch(self.epoch.0 + 1);
        let owners = std::slice::from_ref(&makeup.owners);
        let placement = Placement::from_owners(epoch, self.shape.expert_workers, owners)?;
        self.epoch = epoch;
        let mut attention = Participants::none(self.shape.attention);
        let mut fresh = attention.clone();
        for (id, seat) in &mut self.seats {
            let Some(occupant) = &mut seat.occupant else {
                continue;
            };
            let takes_part = match id.role {
                Role::Attention => makeup.attention.contains_key(&id.index),
                Role::Expert => placement.max_local_experts(id.index) > 0,
            };
            if !takes_part {
                occupant.since = None;
                continue;
            }
            let since = *occupant.since.get_or_insert(epoch);
            if id.role == Role::Attention {
                attention.insert(id.index);
                if since == epoch {
                    fresh.insert(id.index);
                }
            }
        }
        self.current = Some(makeup);
        Ok(Some(Grouping {
            epoch,
            placement: Arc::new(placement),
            attention: Arc::new(attention),
            fresh: Arc::new(fresh),
        }))
    }

    /// Spreads experts over their holders anew, by the rows that each has computed of late. Returns whether the busiest worker will have less to do by
    /// `gain` at least (0.1: a tenth); else all stays as it is. The next epoch takes it up.
    pub(crate) fn rebalance(&mut self, rows: &[u64], gain: f64) -> bool {
        let Some(current) = &self.current else {
            return false;
        };
        if rows.len() != current.owners.len() {
            return false;
        }
        let workers = self.shape.expert_workers;
        let costs = balance::costs(rows);
        let now: Vec<u16> = current.owners.iter().map(|owners| owners[0]).collect();
        let better = balance::assign(&costs, &current.owners, workers);
        let peak = |owners: &[u16]| balance::peak(&costs, owners, workers);
        if better == now || peak(&better) > (1.0 - gain) * peak(&now) {
            return false;
        }
        self.preferred = better;
        true
    }

    /// Whom to tell to adopt what, for experts that have no owner. Each worker is told once; the list is all that it shall have beside its own.
    pub(crate) fn adoptions(&mut self, now: Now) -> Vec<(WorkerId, Vec<u16>)> {
        if self.current.is_none() || self.shape.spare == 0 {
            return Vec::new();
        }
        let spare = usize::from(self.shape.spare);
        let mut lists = Lists::new();
        let (mut waiting, mut told) = (BTreeSet::new(), BTreeSet::new());
        for (&id, seat) in self.seats.iter().filter(|(id, _)| id.role == Role::Expert) {
            let Some(occupant) = seat.available(now) else {
                continue;
            };
            let adopting = occupant.told.difference(&occupant.holds).copied();
            let mut list = self.needed(id, occupant, now);
            list.extend(adopting.clone());
            if !occupant.leaving {
                waiting.extend(adopting);
            }
            lists.insert(id, list);
            if occupant.unsure {
                told.insert(id);
            }
        }
        let orphans = self.orphans(now, false).into_iter();
        let orphans: Vec<u16> = orphans.filter(|expert| !waiting.contains(expert)).collect();
        // All of them, or none: the lost worker has to come back if there is not enough room.
        if let Some((with, heirs)) = self.divide(&orphans, &lists, spare) {
            lists = with;
            told.extend(heirs);
        }
        for &id in &told {
            let home = self.home(id);
            if let Some(occupant) = self.occupant_mut(id) {
                occupant.adoptions += 1;
                occupant.unsure = false;
                occupant.told.clone_from(&lists[&id]);
                let told = &occupant.told;
                occupant
                    .holds
                    .retain(|expert| home.contains(expert) || told.contains(expert));
            }
        }
        told.into_iter()
            .map(|id| (id, lists[&id].iter().copied().collect()))
            .collect()
    }

    /// Adds each orphan to the shortest list of those that stay; nothing if a list would be longer than `spare`. Also names whose lists have grown.
    fn divide(
        &self,
        orphans: &[u16],
        lists: &Lists,
        spare: usize,
    ) -> Option<(Lists, BTreeSet<WorkerId>)> {
        let (mut lists, mut heirs) = (lists.clone(), BTreeSet::new());
        for &expert in orphans {
            let staying = lists.iter_mut().filter(|(id, _)| {
                self.occupant(**id)
                    .is_some_and(|occupant| !occupant.leaving)
            });
            let (&id, list) = staying.min_by_key(|(_, list)| list.len())?;
            if list.len() >= spare {
                return None;
            }
            list.insert(expert);
            heirs.insert(id);
        }
        Some((lists, heirs))
    }

    /// Of the experts that a worker has adopted, those that others send to it for, or would have to.
    fn needed(&self, worker: WorkerId, occupant: &Occupant, now: Now) -> BTreeSet<u16> {
        let home = self.home(worker);
        let adopted = occupant
            .holds
            .iter()
            .filter(|expert| !home.contains(expert));
        let needed = adopted.filter(|&&expert| {
            let owners = self
                .current
                .as_ref()
                .map(|current| &current.owners[usize::from(expert)]);
            let sent_here = owners.is_some_and(|owners| owners.first() == Some(&worker.index));
            let others = self.available(Role::Expert, now, false);
            let mut others = others.filter(|&(index, _)| index != worker.index);
            sent_here || !others.any(|(_, other)| other.holds.contains(&expert))
        });
        needed.copied().collect()
    }

    /// The experts that a worker holds from the start.
    fn home(&self, worker: WorkerId) -> BTreeSet<u16> {
        match worker.role {
            Role::Attention => BTreeSet::new(),
            Role::Expert => self
                .shape
                .home(worker.index)
                .unwrap_or_default()
                .into_iter()
                .collect(),
        }
    }

    /// Experts that nobody has who could take part, now or when it has loaded what it adopts. Those that leave count if `leaving`.
    fn orphans(&self, now: Now, leaving: bool) -> Vec<u16> {
        self.orphans_of(self.available(Role::Expert, now, leaving))
    }

    /// Experts that none of these has.
    fn orphans_of<'a>(&self, workers: impl Iterator<Item = (u16, &'a Occupant)>) -> Vec<u16> {
        let owned: BTreeSet<u16> = workers
            .flat_map(|(_, occupant)| occupant.holds.iter().copied())
            .collect();
        (0..self.shape.experts)
            .filter(|expert| !owned.contains(expert))
            .collect()
    }

    /// What an epoch would be made of; nothing if they do not suffice. Workers that leave take part only if they are needed.
    fn makeup(&self, now: Now) -> Option<Makeup> {
        let attention = self.available(Role::Attention, now, false).next().is_none();
        let experts = {
            let without_leaving = self.ready(Role::Expert, now, false);
            !self.orphans_of(without_leaving).is_empty()
        };
        let lives = |role| -> BTreeMap<u16, u64> {
            let leaving = match role {
                Role::Attention => attention,
                Role::Expert => experts,
            };
            let ready = self.ready(role, now, leaving);
            ready
                .map(|(index, occupant)| (index, occupant.life))
                .collect()
        };
        let attention = lives(Role::Attention);
        if attention.is_empty() {
            return None;
        }
        let home = self.shape.placement(Epoch(0)).ok()?;
        let holders: Vec<(u16, &Occupant)> = self.ready(Role::Expert, now, experts).collect();
        let mut owners = Vec::with_capacity(self.shape.experts.into());
        for expert in 0..self.shape.experts {
            let first = home.owner(volley_transports::Layer(0), expert)?.worker;
            let holds = holders
                .iter()
                .filter(|(_, occupant)| occupant.holds.contains(&expert));
            let mut of: Vec<u16> = holds.map(|&(index, _)| index).collect();
            let n = self.shape.expert_workers;
            // Counted from home, so that the load of a lost worker goes to the one behind it.
            of.sort_by_key(|&worker| {
                (u32::from(worker) + u32::from(n) - u32::from(first)) % u32::from(n)
            });
            if of.is_empty() {
                return None;
            }
            let preferred = self.preferred.get(usize::from(expert));
            if let Some(at) = preferred.and_then(|worker| of.iter().position(|of| of == worker)) {
                of[..=at].rotate_right(1);
            }
            owners.push(of);
        }
        Some(Makeup {
            attention,
            experts: lives(Role::Expert),
            owners,
        })
    }

    fn available(
        &self,
        role: Role,
        now: Now,
        leaving: bool,
    ) -> impl Iterator<Item = (u16, &Occupant)> {
        let seats = self.seats.iter().filter(move |(id, _)| id.role == role);
        let available = seats.filter_map(move |(id, seat)| Some((id.index, seat.available(now)?)));
        available.filter(move |(_, occupant)| leaving || !occupant.leaving)
    }

    /// Those available that can take part now.
    fn ready(&self, role: Role, now: Now, leaving: bool) -> impl Iterator<Item = (u16, &Occupant)> {
        let available = self.available(role, now, leaving);
        available.filter(|(_, occupant)| occupant.adoptions == 0 && !occupant.unsure)
    }

    fn occupant(&self, worker: WorkerId) -> Option<&Occupant> {
        self.seats.get(&worker)?.occupant.as_ref()
    }

    fn occupant_mut(&mut self, worker: WorkerId) -> Option<&mut Occupant> {
        self.seats.get_mut(&worker)?.occupant.as_mut()
    }
}

impl Seat {
    fn has_loaded(&self) -> bool {
        self.occupant
            .as_ref()
            .is_some_and(|occupant| occupant.loaded)
    }

    fn available(&self, now: Now) -> Option<&Occupant> {
        let barred = self.bar.is_some_and(|bar| now < bar.until);
        self.occupant
            .as_ref()
            .filter(|occupant| occupant.loaded && !barred)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use volley_transports::Layer;

    use super::*;

    impl Roster {
        fn is_barred(&self, worker: WorkerId, now: Now) -> bool {
            let bar = self.seats.get(&worker).and_then(|seat| seat.bar);
            bar.is_some_and(|bar| now < bar.until)
        }
    }

    fn shape(replicas: u16, spare: u16) -> RosterShape {
        RosterShape {
            attention: 2,
            expert_workers: 3,
            experts: 8,
            replicas,
            spare,
        }
    }

    fn ms(ms: u64) -> Now {
        Duration::from_millis(ms)
    }

    fn started(shape: RosterShape) -> (Roster, Grouping) {
        let mut roster = Roster::new(shape);
        for (life, worker) in roster.empty_seats().into_iter().enumerate() {
            assert!(roster.next(ms(0)).unwrap().is_none());
            roster.seat(worker, life as u64);
            arrive(&mut roster, worker, life as u64);
        }
        let grouping = roster.next(ms(0)).unwrap().unwrap();
        assert_eq!(grouping.epoch, Epoch(1));
        assert!(roster.next(ms(0)).unwrap().is_none(), "nothing has changed");
        (roster, grouping)
    }

    fn arrive(roster: &mut Roster, worker: WorkerId, life: u64) {
        let holds = match worker.role {
            Role::Attention => Vec::new(),
            Role::Expert => roster.shape.home(worker.index).unwrap(),
        };
        roster.loaded(worker, life, holds);
    }

    fn owner(grouping: &Grouping, expert: u16) -> u16 {
        grouping.placement.owner(Layer(3), expert).unwrap().worker
    }

    #[test]
    fn a_replica_takes_over_at_once_and_the_home_comes_back() {
        let (mut roster, first) = started(shape(2, 0));
        assert_eq!([0, 3, 6].map(|expert| owner(&first, expert)), [0, 1, 2]);
        assert!(first.attention.contains(1) && first.fresh.contains(1));
        roster.lost(Role::Expert.worker(1));
        let second = roster.next(ms(1)).unwrap().unwrap();
        assert_eq!([0, 3, 6].map(|expert| owner(&second, expert)), [0, 2, 2]);
        assert!(!second.fresh.contains(1), "attention workers go on");
        assert!(!second.includes(Role::Expert.worker(1)));
        roster.seat(Role::Expert.worker(1), 99);
        assert!(
            roster.next(ms(2)).unwrap().is_none(),
            "it has to load first"
        );
        arrive(&mut roster, Role::Expert.worker(1), 99);
        let third = roster.next(ms(3)).unwrap().unwrap();
        assert_eq!(owner(&third, 3), 1);
    }

    #[test]
    fn orphans_are_adopted_where_there_is_room_and_wait_where_there_is_not() {
        let (mut roster, _) = started(shape(1, 0));
        roster.lost(Role::Expert.worker(0));
        assert!(roster.next(ms(1)).unwrap().is_none());
        assert!(roster.adoptions(ms(1)).is_empty());

        let (mut roster, _) = started(shape(1, 2));
        roster.lost(Role::Expert.worker(0));
        assert_eq!(roster.orphans(ms(1), true), [0, 1, 2]);
        let told = roster.adoptions(ms(1));
        assert_eq!(told.iter().map(|(_, list)| list.len()).sum::<usize>(), 3);
        assert!(roster.adoptions(ms(1)).is_empty(), "told once");
        for (worker, list) in told {
            assert!(roster.next(ms(1)).unwrap().is_none());
            let holds = roster.shape.home(worker.index).unwrap();
            let life = roster.occupant(worker).unwrap().life;
            roster.loaded(worker, life, holds.into_iter().chain(list));
        }
        let grouping = roster.next(ms(2)).unwrap().unwrap();
        assert!((0..8).all(|expert| owner(&grouping, expert) != 0));

        let (mut roster, _) = started(shape(1, 1));
        roster.lost(Role::Expert.worker(0));
        assert!(
            roster.adoptions(ms(1)).is_empty(),
            "three do not fit two places"
        );
    }

    #[test]
    fn who_adopts_again_keeps_what_rows_are_sent_to_it_for() {
        // Experts 0-2, 3-5 and 6-7 are at home with workers 0, 1 and 2.
        let (mut roster, _) = started(shape(1, 8));
        let adopt = |roster: &mut Roster| {
            for (worker, list) in roster.adoptions(ms(1)) {
                let home = roster.shape.home(worker.index).unwrap();
                let life = roster.occupant(worker).unwrap().life;
                roster.loaded(worker, life, home.into_iter().chain(list));
            }
            roster.next(ms(2)).unwrap()
        };
        roster.lost(Role::Expert.worker(0));
        assert!(adopt(&mut roster).is_some());
        roster.lost(Role::Expert.worker(1));
        let grouping = adopt(&mut roster).expect("one worker has room for all");
        assert!((0..8).all(|expert| owner(&grouping, expert) == 2));

        // What it says it holds is not believed where it was told to drop it since.
        let (worker, life) = (
            Role::Expert.worker(2),
            roster.life(Role::Expert.worker(2)).unwrap(),
        );
        for home in [0, 1] {
            roster.seat(Role::Expert.worker(home), 100 + u64::from(home));
            arrive(
                &mut roster,
                Role::Expert.worker(home),
                100 + u64::from(home),
            );
        }
        let grouping = roster.next(ms(3)).unwrap().unwrap();
        assert_eq!([0, 3, 6].map(|expert| owner(&grouping, expert)), [0, 1, 2]);
        roster.lost(Role::Expert.worker(0));
        roster.lost(Role::Expert.worker(1));
        assert!(
            roster.next(ms(4)).unwrap().is_some(),
            "worker 2 has replicas of all"
        );
        roster.loaded(worker, life, 0..8);
        assert!(roster.occupant(worker).unwrap().holds.len() == 8);
        roster.occupant_mut(worker).unwrap().told = BTreeSet::from([0]);
        roster.loaded(worker, life, 0..8);
        assert_eq!(
            roster.occupant(worker).unwrap().holds,
            BTreeSet::from([0, 6, 7])
        );
    }

    #[test]
    fn the_accused_sit_out_longer_and_longer_and_are_kept_if_nobody_else_is_there() {
        let (mut roster, _) = started(shape(1, 0));
        let attention = Role::Attention.worker(0);
        assert!(!roster.accused(attention, Epoch(0), ms(0)), "stale");
        assert!(roster.accused(attention, Epoch(1), ms(0)));
        let without = roster.next(ms(0)).unwrap().unwrap();
        assert!(!without.attention.contains(0));
        assert!(
            !roster.accused(attention, Epoch(2), ms(0)),
            "it takes no part"
        );
        assert!(roster.next(ms(499)).unwrap().is_none());
        let again = roster.next(ms(500)).unwrap().unwrap();
        assert!(again.fresh.contains(0) && !again.fresh.contains(1));
        assert!(roster.accused(attention, Epoch(3), ms(600)));
        assert!(roster.is_barred(attention, ms(1599)) && !roster.is_barred(attention, ms(1600)));
        roster.next(ms(600)).unwrap().unwrap();

        let expert = Role::Expert.worker(2);
        assert!(roster.accused(expert, Epoch(4), ms(700)));
        let same = roster.next(ms(700)).unwrap().unwrap();
        assert!(same.includes(expert), "nobody else has its experts");
        assert_eq!(same.epoch, Epoch(5));
    }

    #[test]
    fn who_leaves_stays_until_others_can_take_the_work() {
        let (mut roster, _) = started(shape(1, 3));
        let (attention, expert) = (Role::Attention.worker(1), Role::Expert.worker(0));
        roster.leaving(attention);
        assert!(roster.released().is_empty(), "it still takes part");
        assert!(!roster.next(ms(0)).unwrap().unwrap().attention.contains(1));
        assert_eq!(roster.released(), [attention]);
        assert!(roster.released().is_empty(), "told once");
        roster.lost(attention);
        roster.leaving(Role::Attention.worker(0));
        assert!(
            roster.next(ms(0)).unwrap().is_none(),
            "the last one has to stay"
        );

        roster.leaving(expert);
        assert!(roster.next(ms(1)).unwrap().is_none());
        for (worker, list) in roster.adoptions(ms(1)) {
            assert_ne!(worker, expert);
            let holds = roster.shape.home(worker.index).unwrap();
            let life = roster.occupant(worker).unwrap().life;
            roster.loaded(worker, life, holds.into_iter().chain(list));
        }
        assert!(!roster.next(ms(2)).unwrap().unwrap().includes(expert));
        assert_eq!(roster.released(), [expert]);
    }

    #[test]
    fn who_is_drained_keeps_its_seat_and_can_be_used_again() {
        let (mut roster, _) = started(shape(1, 0));
        let worker = Role::Attention.worker(1);
        assert!(roster.drain(worker, true));
        assert!(!roster.next(ms(0)).unwrap().unwrap().attention.contains(1));
        assert!(roster.released().is_empty(), "it is not sent away");
        assert!(roster.drain(worker, false));
        assert!(roster.next(ms(1)).unwrap().unwrap().attention.contains(1));
        // One that wants to leave itself is sent away, drained or not, and is not kept.
        roster.drain(worker, true);
        roster.leaving(worker);
        assert!(roster.drain(worker, false) && roster.is_leaving(worker));
        roster.next(ms(2)).unwrap();
        assert_eq!(roster.released(), [worker]);
        roster.lost(worker);
        assert!(!roster.drain(worker, true), "nobody sits there");
    }

    #[test]
    fn the_last_attention_worker_is_missed_but_not_replaced_by_nothing() {
        let (mut roster, _) = started(shape(1, 0));
        roster.lost(Role::Attention.worker(0));
        assert!(roster.next(ms(0)).unwrap().is_some());
        roster.lost(Role::Attention.worker(1));
        assert!(roster.next(ms(1)).unwrap().is_none());
        roster.seat(Role::Attention.worker(0), 50);
        arrive(&mut roster, Role::Attention.worker(0), 49);
        assert!(
            roster.next(ms(2)).unwrap().is_none(),
            "words of another life"
        );
        arrive(&mut roster, Role::Attention.worker(0), 50);
        assert!(roster.next(ms(2)).unwrap().unwrap().fresh.contains(0));
    }

    fn seated(shape: RosterShape) -> Roster {
        let mut roster = Roster::new(shape);
        for (life, worker) in roster
            .all_seats()
            .collect::<Vec<_>>()
            .into_iter()
            .enumerate()
        {
            let life = life as u64;
            roster.seat(worker, life);
            let holds: Vec<u16> = match worker.role {
                Role::Attention => Vec::new(),
                Role::Expert => shape.home(worker.index).unwrap(),
            };
            roster.loaded(worker, life, holds);
        }
        roster
    }

    #[test]
    fn load_that_drifts_moves_rows_to_other_holders_and_never_to_others() {
        let mut roster = seated(shape(2, 0));
        let now = Duration::from_secs(1);
        let first = roster.next(now).unwrap().unwrap();
        // Even load: nothing to gain.
        assert!(!roster.rebalance(&[10; 8], 0.1));
        assert!(roster.next(now).unwrap().is_none());
        // The first worker's experts are hot.
        let rows = [90, 90, 90, 5, 5, 5, 5, 5];
        assert!(roster.rebalance(&rows, 0.1));
        let second = roster.next(now).unwrap().unwrap();
        assert!(second.epoch > first.epoch);
        let owner = |grouping: &Grouping, expert| {
            grouping.placement.owner(Layer(0), expert).unwrap().worker
        };
        let load = |grouping: &Grouping| {
            let mut load = [0; 3];
            (0..8u16).for_each(|e| load[usize::from(owner(grouping, e))] += rows[usize::from(e)]);
            load.into_iter().max().unwrap()
        };
        assert!(load(&second) < load(&first));
        for expert in 0..8 {
            let worker = Role::Expert.worker(owner(&second, expert));
            assert!(roster.occupant(worker).unwrap().holds.contains(&expert));
        }
        // The same load again: it is balanced.
        assert!(!roster.rebalance(&rows, 0.1) && roster.next(now).unwrap().is_none());
        // A preferred worker that is lost is not waited for.
        let gone = Role::Expert.worker(owner(&second, 0));
        roster.lost(gone);
        let third = roster.next(now).unwrap().unwrap();
        assert_ne!(owner(&third, 0), gone.index);
    }

    #[test]
    fn without_replicas_there_is_no_choice() {
        let mut roster = seated(shape(1, 0));
        roster.next(Duration::ZERO).unwrap().unwrap();
        assert!(!roster.rebalance(&[1000, 0, 0, 0, 0, 0, 0, 0], 0.0));
    }

    proptest! {
        /// Whatever happens: rows go only to workers that hold the expert and take part, epochs grow, and as soon as all are back, all take part at home.
        #[test]
        fn every_epoch_is_sound(
            acts in prop::collection::vec((0..5u8, 0..5usize, 0..400u64), 0..80),
            replicas in 1..4u16,
            spare in 0..9u16,
        ) {
            let (mut roster, first) = started(shape(replicas, spare));
            let workers: Vec<WorkerId> = roster.seats.keys().copied().collect();
            let (mut epoch, mut now, mut life) = (first.epoch, ms(0), 100);
            let mut lives: BTreeMap<WorkerId, u64> = workers.iter().map(|&id| (id, roster.occupant(id).unwrap().life)).collect();
            let mut check = |roster: &mut Roster, now: Now, lives: &BTreeMap<WorkerId, u64>| {
                for (worker, list) in roster.adoptions(now) {
                    assert!(list.len() <= usize::from(spare));
                    let home = roster.shape.home(worker.index).unwrap();
                    roster.loaded(worker, lives[&worker], home.into_iter().chain(list));
                }
                let Some(next) = roster.next(now).unwrap() else { return };
                assert!(next.epoch > epoch);
                epoch = next.epoch;
                for expert in 0..8 {
                    for owner in next.placement.owners(Layer(0), expert) {
                        let id = Role::Expert.worker(owner.worker);
                        let occupant = roster.occupant(id).unwrap();
                        assert!(occupant.loaded && occupant.holds.contains(&expert) && !roster.is_barred(id, now));
                    }
                }
                assert!((0..2).any(|index| next.attention.contains(index)));
                for index in (0..2).filter(|&index| next.attention.contains(index)) {
                    assert!(roster.occupant(Role::Attention.worker(index)).unwrap().loaded);
                }
            };
            for (act, which, pause) in acts {
                now += ms(pause);
                let worker = workers[which];
                match act {
                    0 => {
                        roster.lost(worker);
                        lives.remove(&worker);
                    }
                    1 if !lives.contains_key(&worker) => {
                        life += 1;
                        roster.seat(worker, life);
                        lives.insert(worker, life);
                    }
                    2 => {
                        if let Some(&life) = lives.get(&worker) {
                            arrive(&mut roster, worker, life);
                        }
                    }
                    3 => {
                        let epoch = roster.epoch();
                        roster.accused(worker, epoch, now);
                    }
                    _ => {}
                }
                check(&mut roster, now, &lives);
            }
            for &worker in &workers {
                life += 1;
                roster.lost(worker);
                roster.seat(worker, life);
                lives.insert(worker, life);
                arrive(&mut roster, worker, life);
            }
            now += BAR_MAX;
            check(&mut roster, now, &lives);
            prop_assert!(workers.iter().all(|&id| roster.takes_part(id)));
            prop_assert!(roster.orphans(now, true).is_empty());
        }
    }
}
