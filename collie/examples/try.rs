use volley_collie::*;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let model = Model::named(&args[1]).unwrap();
    let seeds: u64 = args[2].parse().unwrap();
    let which: Vec<Strategy> = args[3].chars().map(|c| Strategy::ALL[c.to_digit(10).unwrap() as usize]).collect();
    let t = std::time::Instant::now();
    for s in evaluate(&model, &which, seeds, 10.0).strategies {
        println!("{}: found {:.2} min {} | probes {:.0} false {:.4} P {:?} R {:?} probes/mfs {:?}", s.name, s.found_mean, s.found_min, s.probes, s.false_verdicts, s.mfs_precision, s.mfs_recall, s.probes_per_mfs);
        println!("   {:?}", s.minutes_to_kth_at_least.iter().map(|m| m.round()).collect::<Vec<_>>());
        println!("   {:?}", s.found_share);
    }
    eprintln!("{:.1} s", t.elapsed().as_secs_f64());
}
