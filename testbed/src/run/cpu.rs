//! What the move costs the source's CPU: all of its QEMU, and the thread in it that holds or sends
//! pages.

use std::fs;
use std::path::Path;

use crate::clock;
use crate::report::SourceCpu;

/// Starts of names that QEMU gives to threads of its outgoing migration: 7.2, then 10.0. A name has
/// 15 letters at most.
const MIGRATION_THREADS: [&str; 2] = ["live_migration", "mig/src"];

/// CPU time of one QEMU, looked at again and again: a thread that has ended cannot be asked.
#[derive(Debug)]
pub(super) struct CpuWatch {
    pid: i32,
    first: Option<Usage>,
    started: Option<Usage>,
    last: Option<Usage>,
}

/// Ticks of CPU time up to a moment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Usage {
    at_us: u64,
    process: u64,
    /// Of threads of the migration that live.
    threads: u64,
}

impl CpuWatch {
    /// Begins to look at a process.
    pub(super) fn new(pid: i32) -> Self {
        Self {
            pid,
            first: usage(pid),
            started: None,
            last: None,
        }
    }

    /// The migration starts.
    pub(super) fn start(&mut self) {
        self.started = usage(self.pid);
        self.last = self.started;
    }

    /// The migration is on its way. Once its thread has ended, nothing is added.
    pub(super) fn look(&mut self) {
        let Some(seen) = usage(self.pid) else { return };
        let ended = self.last.is_some_and(|last| seen.threads < last.threads);
        if !ended {
            self.last = Some(seen);
        }
    }

    /// Cores before the start, and from it to the last look at which the migration went on.
    pub(super) fn figures(&self, ticks_per_s: u64) -> SourceCpu {
        let cores = |from: Option<Usage>, to: Option<Usage>, of: fn(Usage) -> u64| {
            let (from, to) = (from?, to?);
            let ticks = u32::try_from(of(to).checked_sub(of(from))?).ok()?;
            let passed_us = u32::try_from(to.at_us.checked_sub(from.at_us)?).ok()?;
            let ticks_per_s = u32::try_from(ticks_per_s).ok()?;
            let spent_s = f64::from(ticks) / f64::from(ticks_per_s);
            (passed_us > 0).then(|| spent_s / (f64::from(passed_us) / 1e6))
        };
        let threads = self.last.filter(|last| last.threads > 0);
        SourceCpu {
            cores_before: cores(self.first, self.started, |usage| usage.process),
            cores_during: cores(self.started, self.last, |usage| usage.process),
            migration_thread_cores: cores(self.started, threads, |usage| usage.threads),
        }
    }
}

fn usage(pid: i32) -> Option<Usage> {
    let folder = format!("/proc/{pid}");
    let process = ticks(&fs::read_to_string(format!("{folder}/stat")).ok()?)?;
    let tasks = fs::read_dir(format!("{folder}/task")).ok()?;
    let threads = tasks
        .flatten()
        .filter(|task| is_of_migration(&task.path()))
        .filter_map(|task| ticks(&fs::read_to_string(task.path().join("stat")).ok()?))
        .sum();
    Some(Usage {
        at_us: clock::epoch_us(),
        process,
        threads,
    })
}

fn is_of_migration(task: &Path) -> bool {
    let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
    MIGRATION_THREADS
        .iter()
        .any(|start| name.starts_with(start))
}

/// User and system time in a line of /proc: fields 14 and 15, counted behind the name in brackets,
/// which may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    user.checked_add(system)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name with brackets and blanks in it moves no field.
    #[test]
    fn fields() {
        let stat = "812 (mig/src) a (b) S 1 812 812 0 -1 4194624 999 0 3 0 250 50 0 0 20 0 9 0 77";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("812 (cat) S 1 2"), None);
    }

    /// Half a core before; one and a half during, one of them the thread's, which is gone at the last
    /// look.
    #[test]
    fn cores() {
        let usage = |at_s: u64, process: u64, threads: u64| Usage {
            at_us: at_s * 1_000_000,
            process,
            threads,
        };
        let watch = CpuWatch {
            pid: 0,
            first: Some(usage(0, 1000, 0)),
            started: Some(usage(2, 1100, 0)),
            last: Some(usage(6, 1700, 400)),
        };
        let expected = SourceCpu {
            cores_before: Some(0.5),
            cores_during: Some(1.5),
            migration_thread_cores: Some(1.0),
        };
        assert_eq!(watch.figures(100), expected);
        let unseen = CpuWatch {
            last: Some(usage(6, 1700, 0)),
            ..watch
        };
        assert_eq!(unseen.figures(100).migration_thread_cores, None);
    }
}
