//! The search on simulated subsystems: what it finds, that it can be cut off, and that it says what it knows.

use std::cell::RefCell;
use std::io::Write;
use std::rc::Rc;

use volley_collie::{
    JournalError, Mfs, Model, Monitor, Record, Session, Simulated, Strategy, Subsystem, evaluate,
};

const HOUR_S: f64 = 3600.0;

/// A journal that a test can look into.
#[derive(Clone, Default)]
struct Journal(Rc<RefCell<Vec<u8>>>);

impl Write for Journal {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.borrow_mut().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Journal {
    fn records(&self) -> Vec<Record> {
        let text = String::from_utf8(self.0.borrow().clone()).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

/// A search whose subsystem answers from its own noise, from a journal's end if there is one.
fn search(
    model: &Model,
    hours: f64,
    seed: u64,
    done: Vec<Record>,
    journal: &Journal,
) -> (Vec<Mfs>, Option<JournalError>) {
    let mut subsystem = Simulated::new(model, 1000 + done.len() as u64);
    let space = subsystem.space().clone();
    let mut session = Session::new(&mut subsystem, space, Monitor::default(), hours * HOUR_S)
        .with_journal(done, journal.clone());
    let learnt = Strategy::Diagnostic.run(&mut session, seed);
    let broken = session.broken();
    (learnt, broken)
}

#[test]
fn guided_search_finds_what_random_points_do_not_and_never_slower() {
    let model = Model::named("F").unwrap();
    let evaluation = evaluate(&model, &[Strategy::Diagnostic, Strategy::Random], 16, 10.0);
    let [guided, random] = &evaluation.strategies[..] else {
        panic!("two strategies")
    };
    assert!(
        guided.found_min >= 11 && guided.found_mean > 12.5,
        "{guided:?}"
    );
    assert!(random.found_mean < 10.0, "{random:?}");
    for k in 5..13 {
        assert!(
            guided.minutes_to_kth_at_least[k] < random.minutes_to_kth_at_least[k],
            "anomaly {}",
            k + 1
        );
    }
    assert!(guided.false_verdicts < 0.01);
    assert!(
        guided.mfs_precision.unwrap() > 0.82 && guided.mfs_recall.unwrap() > 0.84,
        "{guided:?}"
    );
}

#[test]
fn what_is_learnt_names_the_true_conditions() {
    let model = Model::named("H").unwrap();
    let (learnt, _) = search(&model, 10.0, 3, vec![], &Journal::default());
    let seventeen = learnt
        .iter()
        .find(|mfs| {
            model
                .cause(&mfs.anchor)
                .map(|cause| model.mechanisms[cause].name.as_str())
                == Some("#17")
        })
        .expect("#17 is found");
    let words = seventeen.region(&model.space).to_string();
    for part in [
        "operation is rc-send",
        "doorbell batch at most 16",
        "receive queue depth at least 12",
        "queue pairs at least 6",
    ] {
        assert!(words.contains(part), "{part}: {words}");
    }
}

#[test]
fn conditions_never_admit_a_workload_that_was_clean() {
    for (name, seed) in [("F", 1), ("random:4", 2), ("random:9", 3), ("random:17", 4)] {
        let model = Model::named(name).unwrap();
        let journal = Journal::default();
        let (learnt, _) = search(&model, 5.0, seed, vec![], &journal);
        assert!(learnt.len() > 3, "{name}: {learnt:?}");
        let records = journal.records();
        let clean = records.iter().filter(|record| record.verdict.is_clean());
        for record in clean.filter(|record| record.verdict.confidence() >= 0.75) {
            for mfs in &learnt {
                let region = mfs.region(&model.space);
                assert!(
                    !region.contains(&record.point),
                    "{name}: {region} admits {:?}",
                    record.point
                );
            }
        }
    }
}

#[test]
fn a_search_that_was_cut_off_goes_on_where_it_was() {
    let model = Model::named("random:4").unwrap();
    let whole = Journal::default();
    let (learnt, _) = search(&model, 4.0, 7, vec![], &whole);
    let records = whole.records();
    // Cut in the middle: the rest is measured anew, with other noise, but nothing that was measured is measured again.
    let half = records.len() / 2;
    let rest = Journal::default();
    search(&model, 4.0, 7, records[..half].to_vec(), &rest);
    assert!(!rest.records().is_empty() && rest.records()[0].at_s > records[half - 1].at_s);
    assert!(rest.records().last().unwrap().at_s >= 4.0 * HOUR_S);
    // Cut at the very end: the same answer without a single probe.
    let nothing = Journal::default();
    let (again, broken) = search(&model, 4.0, 7, records, &nothing);
    assert!(broken.is_none());
    assert_eq!((again, nothing.records().len()), (learnt, 0));
}

#[test]
fn the_journal_of_another_search_is_refused() {
    let model = Model::named("random:4").unwrap();
    let journal = Journal::default();
    search(&model, 1.0, 7, vec![], &journal);
    let (_, broken) = search(&model, 1.0, 8, journal.records(), &Journal::default());
    assert!(
        matches!(broken, Some(JournalError::OtherSearch(1))),
        "{broken:?}"
    );
}

#[test]
fn every_strategy_runs_its_time_and_no_more() {
    let model = Model::named("random:9").unwrap();
    for result in evaluate(&model, &Strategy::ALL, 2, 2.0).strategies {
        assert!(result.probes > 100.0, "{result:?}");
        assert!(result.found_mean > 0.0, "{result:?}");
        assert!(
            result
                .minutes_to_kth
                .iter()
                .flatten()
                .all(|minutes| *minutes < 121.0)
        );
    }
}
