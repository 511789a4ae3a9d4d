//! How much memory this process may still take: the machine's and the control group's, whichever is less.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory in bytes that is there for the taking, or `None` where the system does not say (other than Linux).
pub fn available_bytes() -> Option<u64> {
    available_under(Path::new("/"))
}

/// The same, with the system's files under `root`.
fn available_under(root: &Path) -> Option<u64> {
    let machine = fs::read_to_string(root.join("proc/meminfo"))
        .ok()
        .as_deref()
        .and_then(mem_available);
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let limits = group_directories(root, &groups)
        .into_iter()
        .filter_map(|dir| group_headroom(&dir));
    machine.into_iter().chain(limits).min()
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// Directories of this process's memory control group and all above it, whose limits hold too.
/// Within a container the group's path may not exist under the mount; then the mount itself is the group.
fn group_directories(root: &Path, groups: &str) -> Vec<PathBuf> {
    let mut directories = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let mount = match controllers {
            "" => root.join("sys/fs/cgroup"),
            list if list.split(',').any(|name| name == "memory") => {
                root.join("sys/fs/cgroup/memory")
            }
            _ => continue,
        };
        let group = mount.join(path.trim_start_matches('/'));
        directories.extend(
            group
                .ancestors()
                .take_while(|dir| dir.starts_with(&mount))
                .map(Path::to_owned),
        );
    }
    directories
}

/// A group's limit less what it uses and could not give back (inactive file pages are given back first).
fn group_headroom(dir: &Path) -> Option<u64> {
    let number = |name: &str| {
        fs::read_to_string(dir.join(name))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    // Version 2 first; "max" is no number and means no limit. Version 1 says "no limit" with a number near 2^63.
    let (limit, used) = match number("memory.max") {
        Some(limit) => (limit, number("memory.current")?),
        None => (
            number("memory.limit_in_bytes")?,
            number("memory.usage_in_bytes")?,
        ),
    };
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let inactive = |name: &str| {
        stat.lines().find_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix(' ')?
                .parse::<u64>()
                .ok()
        })
    };
    let reclaimable = inactive("total_inactive_file")
        .or_else(|| inactive("inactive_file"))
        .unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(reclaimable)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pretended system: path and text of each file.
    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:   8000 kB\n",
    );

    #[test]
    fn without_a_limit_the_machine_decides() {
        let root = system(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
        ]);
        assert_eq!(available_under(root.path()), Some(8000 * 1024));
        assert_eq!(available_under(system(&[]).path()), None);
    }

    #[test]
    fn the_tightest_group_on_the_way_up_decides() {
        let root = system(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.max", "1000000\n"),
            ("sys/fs/cgroup/a/memory.current", "400000\n"),
            (
                "sys/fs/cgroup/a/memory.stat",
                "anon 5\ninactive_file 100000\n",
            ),
        ]);
        assert_eq!(available_under(root.path()), Some(700_000));
    }

    #[test]
    fn version_1_counts_too_and_its_mount_stands_for_a_path_that_is_not_there() {
        let root = system(&[
            MEMINFO,
            (
                "proc/self/cgroup",
                "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "3000000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1000000\n"),
        ]);
        assert_eq!(available_under(root.path()), Some(2_000_000));
    }

    #[test]
    fn a_group_over_its_limit_leaves_nothing() {
        let root = system(&[
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "10\n"),
            ("sys/fs/cgroup/memory.current", "20\n"),
        ]);
        assert_eq!(available_under(root.path()), Some(0));
    }
}
