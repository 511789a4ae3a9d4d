use volley_collie::*;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let model = Model::named(&args[1]).unwrap();
    let seed: u64 = args[2].parse().unwrap();
    let mut s = Simulated::new(&model, seed ^ 0x0123_4567);
    let space = s.space().clone();
    let mut session = Session::new(&mut s, space, Monitor::default(), 36000.0);
    Strategy::Diagnostic.run(&mut session, seed);
    let (mut ns, mut ne, mut ss, mut se) = (0, 0, 0.0, 0.0);
    let mut seen = std::collections::HashSet::new();
    for (i, r) in session.records().iter().enumerate() { if r.purpose == Purpose::Search { ns += 1; ss += r.seconds/60.0 } else { ne += 1; se += r.seconds/60.0 } if r.verdict.symptom().is_some() { if let Some(c) = model.cause(&r.point) { if seen.insert(c) { println!("{} at {:.0} n={i} {:?} search {ns} {ss:.0} min extract {ne} {se:.0} min", model.mechanisms[c].name, r.at_s/60.0, r.purpose); } } } }
}
