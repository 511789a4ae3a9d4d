//! Cores that compute together: whoever has an operation cuts it into pieces, and whoever is idle takes some of them.
//!
//! Every thread that computes is a [`Member`] of its machine's [`Crew`]: each worker's own, and as many more as there are cores without a
//! worker. A member that has work calls [`Member::each`], which pins a *notice* to its seat and begins with the first piece; members that have
//! nothing to do look for notices ([`Member::help_until`]) and take the next piece of one until none is left or work of their own
//! comes. So one token uses every core, two busy workers use one each, and a core is idle only when no piece is left anywhere.
//!
//! Nobody waits for help: a notice that no one answers is worked off by its owner alone, and correctness never depends on who does what, for a
//! piece's result does not depend on the thread. The owner waits at the end, for pieces that others began.
//!
//! Threads spin while the cluster is busy, because waking a thread costs more than most pieces. They do so only while there are no more
//! awake members than the crew has threads, give way to other threads at every turn, and sleep when nothing came for a few hundred microseconds.

#![allow(unsafe_code)]

mod parts;

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use parts::{Chunks, Grid, Parts};

/// How long a member looks for work before it sleeps.
const SPIN: Duration = Duration::from_micros(300);
/// Looks between two glances at the clock.
const LOOKS: u32 = 64;
/// A member returns from helping after this long, so that its worker can look at its deadlines.
const HELP_AT_MOST: Duration = Duration::from_millis(20);

/// The threads of one machine that compute together. Dropping it ends the threads it started itself.
#[derive(Debug)]
pub struct Crew {
    board: Arc<Board>,
    helpers: Vec<JoinHandle<()>>,
}

/// What all members share.
#[derive(Debug)]
struct Board {
    id: u32,
    /// Members that may be awake at once before those without work go to sleep.
    threads: usize,
    awake: AtomicUsize,
    closing: AtomicBool,
    notices: Box<[Notice]>,
}

/// One seat's place on the board.
#[repr(align(128))]
struct Notice {
    /// [`OPEN`] while pieces may be taken; below it, how many other members are at it.
    state: AtomicUsize,
    /// The next piece.
    next: AtomicUsize,
    pieces: AtomicUsize,
    /// Valid while `state` is not 0.
    work: UnsafeCell<Option<Work>>,
    /// A piece panicked in another member's hands.
    panicked: AtomicBool,
    occupied: AtomicBool,
    asleep: AtomicBool,
    wake: Mutex<Option<Wake>>,
}

/// Ends a member's sleep.
pub type Wake = Box<dyn Fn() + Send + Sync>;

/// The closure of a notice, its lifetime forgotten: see [`Member::run`].
type Work = *const (dyn Fn(usize, &mut Seat) + Sync);

const OPEN: usize = 1 << (usize::BITS - 1);

// SAFETY: `work` is written by the seat's member alone, while `state` is 0; it is read by members that raised `state` while it was open.
unsafe impl Sync for Notice {}
// SAFETY: the pointer is to a closure that is `Sync`.
unsafe impl Send for Notice {}

impl std::fmt::Debug for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Notice")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// A thread's place in a crew. Moves with the thread's work; freed when dropped.
#[derive(Debug)]
pub struct Member {
    board: Arc<Board>,
    seat: Seat,
}

/// Which member runs a piece: what [`PerSeat`] asks for.
#[derive(Debug)]
pub struct Seat {
    crew: u32,
    index: usize,
}

/// All seats of a crew are taken: threads of lost workers have not ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("all {seats} seats of the crew are taken; threads of lost workers have not ended")]
pub struct NoSeat {
    /// Seats there are.
    pub seats: usize,
}

impl Crew {
    /// A crew of `threads` threads for `workers` workers, each of which will [`join`](Crew::join); the threads beyond theirs are started here.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(threads: usize, workers: usize) -> std::io::Result<Self> {
        let helpers = threads.saturating_sub(workers);
        let board = Board::new(threads, Self::seats(threads, workers));
        let mut crew = Crew {
            board,
            helpers: Vec::new(),
        };
        for index in 0..helpers {
            let member = crew.join().expect("helpers come first");
            let thread = std::thread::Builder::new()
                .name(format!("helper {index}"))
                .spawn(move || member.serve())?;
            crew.helpers.push(thread);
        }
        Ok(crew)
    }

    /// Seats of such a crew: more than threads, for a lost worker's thread may keep its seat for a while after its successor sat down.
    pub fn seats(threads: usize, workers: usize) -> usize {
        threads.saturating_sub(workers) + 2 * workers + 4
    }

    /// Takes a seat.
    ///
    /// # Errors
    /// When none is free.
    pub fn join(&self) -> Result<Member, NoSeat> {
        Board::join(&self.board)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.board.closing.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            // Remembered, should it only be about to sleep.
            helper.thread().unpark();
            // It catches the panics of pieces, so it does not panic.
            let _ = helper.join();
        }
    }
}

impl Board {
    fn new(threads: usize, seats: usize) -> Arc<Self> {
        static NEXT_ID: AtomicU32 = AtomicU32::new(0);
        Arc::new(Board {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            threads: threads.max(1),
            awake: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            notices: (0..seats).map(|_| Notice::new()).collect(),
        })
    }

    fn join(board: &Arc<Self>) -> Result<Member, NoSeat> {
        let free = |notice: &Notice| !notice.occupied.swap(true, Ordering::AcqRel);
        let index = board.notices.iter().position(free).ok_or(NoSeat {
            seats: board.notices.len(),
        })?;
        board.awake.fetch_add(1, Ordering::Relaxed);
        Ok(Member {
            board: Arc::clone(board),
            seat: Seat {
                crew: board.id,
                index,
            },
        })
    }

    /// Wakes sleeping members for up to `pieces` pieces, as long as fewer are awake than there are threads.
    fn rouse(&self, pieces: usize) {
        let free = self
            .threads
            .saturating_sub(self.awake.load(Ordering::Relaxed));
        let mut wanted = free.min(pieces);
        for notice in &self.notices {
            if wanted == 0 {
                return;
            }
            wanted -= usize::from(notice.rouse());
        }
    }
}

impl Notice {
    fn new() -> Self {
        Notice {
            state: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            pieces: AtomicUsize::new(0),
            work: UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            occupied: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake: Mutex::new(None),
        }
    }

    fn has_pieces(&self) -> bool {
        self.state.load(Ordering::Relaxed) & OPEN != 0
            && self.next.load(Ordering::Relaxed) < self.pieces.load(Ordering::Relaxed)
    }

    /// Ends the sleep of the seat's member; false if it was awake.
    fn rouse(&self) -> bool {
        if !self.asleep.load(Ordering::Relaxed) || !self.asleep.swap(false, Ordering::SeqCst) {
            return false;
        }
        let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(wake) = &*wake {
            wake();
        }
        true
    }

    /// Takes no more helpers, and waits until those at it are done.
    fn close(&self) {
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0u32;
        while self.state.load(Ordering::Acquire) != 0 {
            looks += 1;
            if looks.is_multiple_of(LOOKS) {
                // A helper may have lost its core to a thread of another program.
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

impl Member {
    /// The only member of a crew of its own: does everything itself.
    pub fn alone() -> Self {
        Board::join(&Board::new(1, 1)).expect("the crew is new")
    }

    /// Threads of the crew: into how many pieces it is worth cutting.
    pub fn threads(&self) -> usize {
        self.board.threads
    }

    /// Sets what ends this member's sleep when there are pieces to take.
    pub fn wake_by(&mut self, wake: Wake) {
        let notice = &self.board.notices[self.seat.index];
        *notice.wake.lock().unwrap_or_else(PoisonError::into_inner) = Some(wake);
    }

    /// Does `work` on every part, once, in no particular order, with whoever of the crew is idle. Returns when all is done.
    ///
    /// # Panics
    /// When a piece does, on whichever thread.
    pub fn each<P: Parts>(&mut self, parts: P, work: impl Fn(usize, P::Part, &mut Seat) + Sync) {
        let count = parts.count();
        self.run(count, &|index, seat| {
            // SAFETY: `run` gives every index below `count` once.
            let part = unsafe { parts.part(index) };
            work(index, part, seat);
        });
    }

    /// Calls `work` once for each of `0..pieces`.
    fn run(&mut self, pieces: usize, work: &(dyn Fn(usize, &mut Seat) + Sync)) {
        let Member { board, seat } = self;
        if pieces <= 1 || board.threads <= 1 {
            (0..pieces).for_each(|piece| work(piece, seat));
            return;
        }
        let notice = &board.notices[seat.index];
        // SAFETY: only the lifetime changes. No one reads the pointer after `close`, which the guard below calls before this function is left.
        let forgotten: Work =
            unsafe { std::mem::transmute::<&(dyn Fn(usize, &mut Seat) + Sync), Work>(work) };
        // SAFETY: `state` is 0, so nobody else looks at it.
        unsafe { *notice.work.get() = Some(forgotten) };
        // An operation whose owner panicked did not look at it.
        notice.panicked.store(false, Ordering::Relaxed);
        notice.next.store(0, Ordering::Relaxed);
        notice.pieces.store(pieces, Ordering::Relaxed);
        notice.state.store(OPEN, Ordering::Release);
        let guard = CloseOnDrop(notice);
        // Pairs with the fence in `sleep`: either the sleeper sees the notice, or we see the sleeper.
        fence(Ordering::SeqCst);
        board.rouse(pieces - 1);
        loop {
            let piece = notice.next.fetch_add(1, Ordering::Relaxed);
            if piece >= pieces {
                break;
            }
            work(piece, seat);
        }
        drop(guard);
        assert!(
            !notice.panicked.load(Ordering::Relaxed),
            "a piece of this operation panicked on a helping thread"
        );
    }

    /// Takes pieces of others' operations until `ready` says that there is work of one's own: true. False if for a while there was nothing to do.
    pub fn help_until(&mut self, mut ready: impl FnMut() -> bool) -> bool {
        let began = Instant::now();
        let mut last = began;
        loop {
            for _ in 0..LOOKS {
                if ready() {
                    return true;
                }
                match self.help(&mut ready) {
                    Help::Ready => return true,
                    Help::Done => {
                        last = Instant::now();
                        if last - began > HELP_AT_MOST {
                            return true;
                        }
                    }
                    Help::Nothing => std::hint::spin_loop(),
                }
            }
            let crowded = self.board.awake.load(Ordering::Relaxed) > self.board.threads;
            if crowded || last.elapsed() > SPIN {
                return false;
            }
            std::thread::yield_now();
        }
    }

    /// Sleeps in `sleep`, which returns when this member's waker was used, unless there are pieces to take.
    pub fn sleep(&mut self, sleep: impl FnOnce()) {
        let notice = &self.board.notices[self.seat.index];
        let crowded = self.board.awake.fetch_sub(1, Ordering::Relaxed) > self.board.threads;
        notice.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if crowded || !self.board.notices.iter().any(Notice::has_pieces) {
            sleep();
        }
        notice.asleep.store(false, Ordering::SeqCst);
        self.board.awake.fetch_add(1, Ordering::Relaxed);
    }

    /// Looks once around the board.
    fn help(&mut self, ready: &mut dyn FnMut() -> bool) -> Help {
        let Member { board, seat } = self;
        let mut helped = Help::Nothing;
        for notice in &board.notices {
            if !notice.has_pieces() || !enter(notice) {
                continue;
            }
            let leave = LeaveOnDrop(notice);
            // SAFETY: entered while it was open; its owner does not return before we leave.
            let work = unsafe { (*notice.work.get()).map(|work| &*work) };
            let Some(work) = work else { continue };
            let pieces = notice.pieces.load(Ordering::Relaxed);
            loop {
                let piece = notice.next.fetch_add(1, Ordering::Relaxed);
                if piece >= pieces {
                    break;
                }
                helped = Help::Done;
                if catch_unwind(AssertUnwindSafe(|| work(piece, seat))).is_err() {
                    // The owner panics in its turn; this thread's own worker has nothing to do with it.
                    notice.panicked.store(true, Ordering::Relaxed);
                }
                if ready() {
                    return Help::Ready;
                }
            }
            drop(leave);
        }
        helped
    }

    /// The life of a thread that only helps.
    fn serve(mut self) {
        let thread = std::thread::current();
        self.wake_by(Box::new(move || thread.unpark()));
        let board = Arc::clone(&self.board);
        let closing = || board.closing.load(Ordering::Relaxed);
        while !closing() {
            if !self.help_until(closing) {
                self.sleep(std::thread::park);
            }
        }
    }
}

/// What came of a look around.
enum Help {
    Nothing,
    Done,
    /// The member's own work came meanwhile.
    Ready,
}

/// Joins an open notice; false if it has closed.
fn enter(notice: &Notice) -> bool {
    let mut state = notice.state.load(Ordering::Relaxed);
    while state & OPEN != 0 {
        match notice.state.compare_exchange_weak(
            state,
            state + 1,
            Ordering::Acquire,
            Ordering::Relaxed,
        ) {
            Ok(_) => return true,
            Err(now) => state = now,
        }
    }
    false
}

struct CloseOnDrop<'a>(&'a Notice);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        // After a panic of the owner's, pieces that are left are not begun.
        self.0.next.store(usize::MAX / 2, Ordering::Relaxed);
        self.0.close();
    }
}

struct LeaveOnDrop<'a>(&'a Notice);

impl Drop for LeaveOnDrop<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let notice = &self.board.notices[self.seat.index];
        *notice.wake.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.board.awake.fetch_sub(1, Ordering::Relaxed);
        notice.occupied.store(false, Ordering::Release);
    }
}

/// One `T` for every seat: scratch that pieces write to.
#[derive(Debug)]
pub struct PerSeat<T> {
    crew: u32,
    items: Box<[UnsafeCell<T>]>,
}

// SAFETY: an item is reached through `&mut Seat` alone, of which there is one for each index.
unsafe impl<T: Send> Sync for PerSeat<T> {}

impl<T> PerSeat<T> {
    /// Makes one for every seat of the member's crew.
    pub fn new(member: &Member, mut make: impl FnMut() -> T) -> Self {
        PerSeat {
            crew: member.board.id,
            items: member
                .board
                .notices
                .iter()
                .map(|_| UnsafeCell::new(make()))
                .collect(),
        }
    }

    /// The seat's own.
    ///
    /// # Panics
    /// When the seat is another crew's.
    pub fn of<'a>(&'a self, seat: &'a mut Seat) -> &'a mut T {
        assert_eq!(self.crew, seat.crew, "a seat of another crew");
        // SAFETY: crews have different ids, a crew gives out each index once at a time, and the seat is borrowed as long as the item.
        unsafe { &mut *self.items[seat.index].get() }
    }
}

#[cfg(test)]
mod tests;
