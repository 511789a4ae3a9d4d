//! `volley doctor`: what of this host makes Volley slow, or keeps it from running. Each finding names the thing, the place and the remedy.

mod rdma;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;
use serde_json::{Value, json};
use volley_models::Isa;
use volley_models::kernels::InstructionSet;
use volley_transports::quic::{Identity, NodeRole, QuicNode};

use crate::certificate::{self, Validity};
use crate::config::{ByteSize, Settings};
use crate::failure::Failure;
use crate::flags::{ConfigFlags, Serving};
use crate::{inspection, launch, memory, network};

/// Check this host, and the way to the controller.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct DoctorArgs {
    /// Also call the controller (network.controller), as a worker would
    #[arg(long)]
    call: bool,
    /// Take the controller's place and have all workers try the ways between them; FILE is the cluster's volley.toml
    #[arg(long, value_name = "FILE", conflicts_with = "call")]
    cluster: Option<PathBuf>,
    /// With --cluster: wait so many seconds for workers to call
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    wait: f64,
    /// One JSON object on standard output instead of lines
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigFlags<Serving>,
}

const AFTER_HELP: &str = "\
  volley doctor                                                     this host
  volley doctor --call --controller HOST:7600 --certificates certs/worker
  volley doctor --cluster volley.toml --certificates certs/controller

--cluster is for before the first `volley serve`, and for when it does not come up: start the workers, and the doctor in the place of the server. Each attention worker tries
the way to each expert worker; what fails is named with its cause (no route, nobody listens, UDP blocked, wrong certificate, ...) and remedy.

Exit code 1 if something keeps Volley from running; what only costs speed is a warning.";

/// UDP receive buffers that hold a burst of frames.
const UDP_BUFFER: u64 = 4 << 20;
/// Open files of a server with thousands of clients.
const FILES: u64 = 65_536;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Good,
    Slow,
    Bad,
    /// It cannot be seen from here.
    Unknown,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    verdict: Verdict,
    what: String,
    found: String,
    remedy: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.verdict {
            Verdict::Good => "ok  ",
            Verdict::Slow => "slow",
            Verdict::Bad => "BAD ",
            Verdict::Unknown => "?   ",
        };
        write!(f, "{mark}  {}: {}", self.what, self.found)?;
        match self.verdict {
            Verdict::Good => Ok(()),
            _ => write!(f, "\n        {}", self.remedy),
        }
    }
}

fn finding(good: bool, or: Verdict, what: &str, found: String, remedy: &str) -> Finding {
    Finding {
        verdict: if good { Verdict::Good } else { or },
        what: what.to_owned(),
        found,
        remedy: remedy.to_owned(),
    }
}

/// Looks at everything and prints what it finds.
///
/// # Errors
/// When something keeps Volley from running.
pub fn run(args: DoctorArgs) -> Result<(), Failure> {
    let raw = args.config.with_file(args.cluster.clone()).load()?;
    let mut cluster = Value::Null;
    let mut findings = host(Path::new("/"));
    findings.extend(rdma::devices(Path::new("/")));
    findings.extend(raw.certificates().map(certificate));
    if args.call {
        let model = launch::open_model(&raw)?;
        let settings = Settings::resolve(
            &raw,
            model.spec(),
            model.name(),
            memory::available_bytes(),
            crate::config::Demand::Serving,
        )?;
        findings.push(call(&settings));
    }
    if args.cluster.is_some() {
        let wait = Duration::from_secs_f64(args.wait.clamp(0.0, 3600.0));
        let (remarks, found) = inspection::run(&raw, wait)?;
        cluster = found;
        findings.extend(remarks.into_iter().map(|remark| Finding {
            verdict: match (remark.bad, &remark.remedy) {
                (true, _) => Verdict::Bad,
                (false, Some(_)) => Verdict::Slow,
                (false, None) => Verdict::Good,
            },
            what: remark.what,
            found: remark.found,
            remedy: remark.remedy.unwrap_or_default(),
        }));
    }
    if args.json {
        let list = findings.iter().map(|finding| {
            let verdict = format!("{:?}", finding.verdict).to_lowercase();
            json!({"what": finding.what, "verdict": verdict, "found": finding.found, "remedy": finding.remedy})
        });
        println!(
            "{}",
            json!({"findings": list.collect::<Vec<_>>(), "cluster": cluster})
        );
    } else {
        findings.iter().for_each(|finding| println!("{finding}"));
    }
    match findings
        .iter()
        .filter(|f| f.verdict == Verdict::Bad)
        .count()
    {
        0 => Ok(()),
        bad => Err(Failure::new(format!(
            "{bad} of {} things are bad",
            findings.len()
        ))),
    }
}

/// How long the certificate in `folder` holds.
fn certificate(folder: &Path) -> Finding {
    let (verdict, found) = match Identity::load(folder) {
        Err(error) => (Verdict::Bad, error.to_string()),
        Ok(identity) => {
            let (validity, when) = certificate::validity(identity.expires(), SystemTime::now());
            let verdict = match validity {
                Validity::Good => Verdict::Good,
                Validity::Soon => Verdict::Slow,
                Validity::Ended => Verdict::Bad,
            };
            let (role, name) = (identity.role(), identity.name());
            (verdict, format!("a {role}'s, {name}, {when}"))
        }
    };
    Finding {
        verdict,
        what: "certificate".to_owned(),
        found,
        remedy: certificate::REMEDY.to_owned(),
    }
}

/// What the files of the system under `root` tell.
fn host(root: &Path) -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let isa = Isa::detect().instruction_set();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut findings = vec![
        finding(
            isa != InstructionSet::Portable,
            Verdict::Slow,
            "processor",
            format!("{cores} cores, kernels for {isa}"),
            "without AVX2 or AVX-512 the portable kernels run, several times slower",
        ),
        match memory::available_bytes() {
            Some(bytes) => finding(
                true,
                Verdict::Slow,
                "memory",
                format!("{} available", ByteSize(bytes)),
                "",
            ),
            None => finding(
                false,
                Verdict::Slow,
                "memory",
                "how much is available is not known".to_owned(),
                "set limits.kv_cache_memory: `auto` cannot be worked out here",
            ),
        },
    ];
    let huge = read("sys/kernel/mm/transparent_hugepage/enabled");
    findings.push(finding(
        huge.contains("[always]") || huge.contains("[madvise]"),
        Verdict::Slow,
        "huge pages",
        chosen(&huge),
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: weights are read up to twice as fast from huge pages",
    ));
    let rmem: u64 = read("proc/sys/net/core/rmem_max")
        .trim()
        .parse()
        .unwrap_or(0);
    findings.push(finding(
        rmem >= UDP_BUFFER,
        Verdict::Slow,
        "UDP buffers",
        format!("at most {}", ByteSize(rmem)),
        "sysctl -w net.core.rmem_max=8388608 net.core.wmem_max=8388608: bursts of frames are lost and sent again otherwise",
    ));
    let limits = read("proc/self/limits");
    let files = limit(&limits, "Max open files");
    findings.push(finding(
        files.is_none_or(|files| files >= FILES),
        Verdict::Slow,
        "open files",
        shown(files),
        "raise the limit (LimitNOFILE= in a systemd unit): each client's connection is a file",
    ));
    let devices = names(&root.join("sys/class/infiniband"));
    let locked = limit(&limits, "Max locked memory");
    findings.push(finding(
        devices.is_empty() || locked.is_none(),
        Verdict::Bad,
        "locked memory",
        format!("{}, RDMA devices: {}", shown(locked), listed(&devices)),
        "RDMA registers memory: ulimit -l unlimited (LimitMEMLOCK=infinity in a systemd unit)",
    ));
    let links = names(&root.join("sys/class/net"));
    let mtus = links.iter().filter(|link| *link != "lo").map(|link| {
        format!(
            "{link} {}",
            read(&format!("sys/class/net/{link}/mtu")).trim()
        )
    });
    let mtus: Vec<String> = mtus.collect();
    findings.push(finding(true, Verdict::Slow, "MTU", listed(&mtus), ""));
    let cards = links.iter().filter(|link| *link != "lo").map(|link| {
        let read = |name: &str| {
            read(&format!("sys/class/net/{link}/{name}"))
                .trim()
                .to_owned()
        };
        match read("speed").parse::<u32>() {
            Ok(speed) => format!("{link} {} at {speed} Mb/s", read("operstate")),
            // Bridges and virtual links have no speed.
            Err(_) => format!("{link} {}", read("operstate")),
        }
    });
    let cards: Vec<String> = cards.collect();
    findings.push(finding(
        !cards.is_empty(),
        Verdict::Slow,
        "network cards",
        format!("{}; RDMA: {}", listed(&cards), listed(&devices)),
        "without a network card this host can only be a cluster of its own",
    ));
    let clock = read("sys/devices/system/clocksource/clocksource0/current_clocksource");
    let clock = clock.trim();
    if !clock.is_empty() {
        findings.push(finding(
            !["hpet", "acpi_pm", "jiffies", "pit"].contains(&clock),
            Verdict::Slow,
            "clock",
            clock.to_owned(),
            "reading this clock is a call into the kernel or to a device, and workers read it several times for each layer: boot with tsc=reliable, or give the virtual machine kvm-clock or the TSC",
        ));
    }
    let gpus = names(&root.join("proc/driver/nvidia/gpus"));
    findings.push(finding(
        true,
        Verdict::Slow,
        "GPUs",
        format!("{} (not used yet)", listed(&gpus)),
        "",
    ));
    findings
}

/// The word in brackets.
fn chosen(text: &str) -> String {
    let word = text
        .split('[')
        .nth(1)
        .and_then(|rest| rest.split(']').next());
    word.unwrap_or("not known").to_owned()
}

/// The soft limit in a line of `/proc/self/limits`; none if there is no limit.
fn limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find(|line| line.starts_with(name))?;
    line[name.len()..].split_whitespace().next()?.parse().ok()
}

fn shown(limit: Option<u64>) -> String {
    limit.map_or_else(|| "no limit".to_owned(), |limit| limit.to_string())
}

fn listed(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Calls the controller as a worker would, and hangs up.
fn call(settings: &Settings) -> Finding {
    const REMEDY: &str = "is `volley serve --isolate host` running there, UDP open between the hosts, and the certificate of the same `volley certs`?";
    let attempt = || -> Result<String, String> {
        let text = |error: Failure| error.to_string();
        let identity = network::identity(&settings.network, NodeRole::Worker).map_err(text)?;
        let listen = network::worker_listen(&settings.network).map_err(text)?;
        let node: QuicNode = network::bind(listen, &identity, &settings.network).map_err(text)?;
        let address =
            network::resolve("network.controller", &settings.network.controller).map_err(text)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        let start = std::time::Instant::now();
        let link = runtime.block_on(node.call(address, NodeRole::Controller));
        let link = link.map_err(|error| error.to_string())?;
        Ok(format!(
            "{} at {} answered in {:.1} ms",
            link.peer().name,
            address,
            start.elapsed().as_secs_f64() * 1e3
        ))
    };
    match attempt() {
        Ok(found) => finding(true, Verdict::Bad, "controller", found, REMEDY),
        Err(reason) => finding(false, Verdict::Bad, "controller", reason, REMEDY),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_wrong_in_every_way_is_told_all_of_it() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(
            "sys/kernel/mm/transparent_hugepage/enabled",
            "always madvise [never]\n",
        );
        write("proc/sys/net/core/rmem_max", "212992\n");
        write(
            "proc/self/limits",
            "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024     4096     files\nMax locked memory         65536    65536    bytes\n",
        );
        write("sys/class/infiniband/mlx5_0/x", "");
        write("sys/class/net/eth0/mtu", "1500\n");
        write(
            "sys/devices/system/clocksource/clocksource0/current_clocksource",
            "hpet\n",
        );
        let findings = host(root.path());
        let of = |what: &str| findings.iter().find(|f| f.what == what).unwrap();
        for (what, verdict, found) in [
            ("huge pages", Verdict::Slow, "never"),
            ("UDP buffers", Verdict::Slow, "at most 208 KiB"),
            ("open files", Verdict::Slow, "1024"),
            ("locked memory", Verdict::Bad, "65536, RDMA devices: mlx5_0"),
            ("MTU", Verdict::Good, "eth0 1500"),
            ("clock", Verdict::Slow, "hpet"),
        ] {
            assert_eq!(
                (of(what).verdict, of(what).found.as_str()),
                (verdict, found)
            );
        }
        assert!(of("huge pages").to_string().contains("echo madvise"));
        // Without RDMA devices nobody needs locked memory; no limit is the best there is.
        fs::remove_dir_all(root.path().join("sys/class/infiniband")).unwrap();
        write(
            "proc/self/limits",
            "Max open files   unlimited  unlimited  files\nMax locked memory   8  8  bytes\n",
        );
        let findings = host(root.path());
        assert!(findings.iter().all(|f| f.verdict != Verdict::Bad));
        assert!(
            findings
                .iter()
                .any(|f| f.what == "open files" && f.verdict == Verdict::Good)
        );
    }
}
