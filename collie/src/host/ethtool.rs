//! The statistics of an interface, by the program `ethtool` where it is installed: the kernel tells them to ioctls only.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::counters::{Counters, parse_ethtool};

/// How long the program may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// What `ethtool -S` prints of an interface. Nothing if the program is missing, fails, or takes too long: the port's own counters remain.
pub fn read_ethtool(name: &str) -> Counters {
    let known = Path::new("/usr/sbin/ethtool");
    let program = if known.exists() {
        known
    } else {
        Path::new("ethtool")
    };
    let Ok(mut child) = Command::new(program)
        .args(["-S", name])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
    else {
        return Counters::default();
    };
    let Some(mut stdout) = child.stdout.take() else {
        return Counters::default();
    };
    // Read beside the wait, or a long list would fill the pipe.
    let reader = thread::spawn(move || {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut stdout, &mut text).map(|_| text)
    });
    let deadline = Instant::now() + PATIENCE;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() >= deadline {
            // Its pipe closes with it, and the reader ends.
            let _ended = child.kill().and_then(|()| child.wait());
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    match reader.join() {
        Ok(Ok(text)) => parse_ethtool(&text),
        _ => Counters::default(),
    }
}
