use super::*;
use crate::kernels::MatrixMut;

/// Members on threads of their own that help until the crew closes.
fn crew(threads: usize) -> (Crew, Member) {
    let crew = Crew::new(threads, 1).unwrap();
    let member = crew.join().unwrap();
    (crew, member)
}

#[test]
fn every_part_is_worked_on_once_by_members_of_different_seats() {
    let (_crew, mut member) = crew(4);
    let seats: Vec<AtomicUsize> = (0..10).map(|_| AtomicUsize::new(0)).collect();
    for round in 0..2_000usize {
        let mut data = vec![0u32; 1 + round % 97];
        member.each(Chunks::new(&mut data, 3), |index, chunk, seat| {
            for (i, x) in chunk.iter_mut().enumerate() {
                *x += (3 * index + i) as u32 + 1;
            }
            seats[seat.index].fetch_add(1, Ordering::Relaxed);
        });
        assert!(data.iter().zip(1..).all(|(x, i)| *x == i), "round {round}");
    }
    let pieces: usize = seats.iter().map(|n| n.load(Ordering::Relaxed)).sum();
    let expected: usize = (0..2_000usize).map(|r| (1 + r % 97).div_ceil(3)).sum();
    assert_eq!(pieces, expected);
}

#[test]
fn helpers_do_take_pieces() {
    let (_crew, mut member) = crew(2);
    // Pieces that wait for each other: the second must be in other hands than the first.
    let barrier = std::sync::Barrier::new(2);
    member.each(2, |_, (), _| {
        barrier.wait();
    });
}

#[test]
fn members_help_each_other_and_use_scratch_of_their_own() {
    let crew = Crew::new(4, 4).unwrap();
    let total = AtomicUsize::new(0);
    let scratch = {
        let member = crew.join().unwrap();
        PerSeat::new(&member, || 0usize)
    };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let mut member = crew.join().unwrap();
            let (total, scratch) = (&total, &scratch);
            scope.spawn(move || {
                for round in 0..500 {
                    member.each(round % 7, |_, (), seat| {
                        let mine = scratch.of(seat);
                        let before = *mine;
                        std::hint::spin_loop();
                        *mine = before + 1;
                        total.fetch_add(1, Ordering::Relaxed);
                    });
                    member.help_until(|| true);
                }
            });
        }
    });
    let expected = 4 * (0..500).map(|round| round % 7).sum::<usize>();
    assert_eq!(total.into_inner(), expected);
    let counted: usize = scratch.items.into_iter().map(UnsafeCell::into_inner).sum();
    assert_eq!(counted, expected);
}

#[test]
fn a_grid_covers_its_matrix() {
    let (_crew, mut member) = crew(3);
    let mut data = vec![0.0; 7 * 10];
    let bounds = [0, 2, 2, 5];
    let grid = Grid::new(MatrixMut::new(&mut data, 7, 9, 10), &bounds, 4);
    assert_eq!((grid.across(), grid.count()), (3, 9));
    member.each(grid, |index, mut part, _| {
        for row in 0..part.rows() {
            part.row(row)
                .iter_mut()
                .for_each(|x| *x += index as f32 + 1.0);
        }
    });
    for (i, x) in data.iter().enumerate() {
        let (row, col) = (i / 10, i % 10);
        let group = match row {
            0..2 => 0,
            2..5 => 2,
            _ => 9,
        };
        let expected = if group == 9 || col == 9 {
            0.0
        } else {
            (group * 3 + col / 4 + 1) as f32
        };
        assert_eq!(*x, expected, "row {row} column {col}");
    }
}

#[test]
fn a_panic_in_any_hands_reaches_the_owner_and_the_crew_lives_on() {
    let (_crew, mut member) = crew(2);
    // The helper, the owner, or both.
    for culprits in [[true, false], [false, true], [true, true]] {
        let barrier = std::sync::Barrier::new(2);
        let owner = member.seat.index;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            member.each(2, |_, (), seat| {
                barrier.wait();
                assert!(!culprits[usize::from(seat.index == owner)], "told to");
            });
        }));
        assert!(outcome.is_err());
        let done = AtomicUsize::new(0);
        member.each(50, |_, (), _| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 50);
    }
}

#[test]
fn a_sleeper_is_woken_for_pieces_and_seats_come_back() {
    let crew = Crew::new(2, 2).unwrap();
    let mut owner = crew.join().unwrap();
    let mut sleeper = crew.join().unwrap();
    std::thread::scope(|scope| {
        let (asleep, told) = std::sync::mpsc::channel();
        scope.spawn(move || {
            let thread = std::thread::current();
            sleeper.wake_by(Box::new(move || thread.unpark()));
            asleep.send(()).unwrap();
            for _ in 0..2 {
                sleeper.sleep(std::thread::park);
                sleeper.help_until(|| false);
            }
        });
        told.recv().unwrap();
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(5));
            let barrier = std::sync::Barrier::new(2);
            owner.each(2, |_, (), _| {
                barrier.wait();
            });
        }
    });
    drop(owner);
    let members: Vec<Member> = (0..Crew::seats(2, 2))
        .map(|_| crew.join().unwrap())
        .collect();
    assert_eq!(
        crew.join().unwrap_err(),
        NoSeat {
            seats: members.len()
        }
    );
    drop(members);
    assert!(crew.join().is_ok());
}

#[test]
#[should_panic(expected = "another crew")]
fn scratch_of_another_crew_is_refused() {
    let mut member = Member::alone();
    let scratch = PerSeat::new(&Member::alone(), || 0);
    member.each(1, |_, (), seat| *scratch.of(seat) += 1);
}
