//! Source QEMU: guest memory, dirty log and migration thread, as QEMU 8.2 to 10.0 behave with a
//! withheld SWITCHOVER_ACK and 7.2 without one.
//!
//! ```text
//! migrate -> Iterating -(threshold, ack)-> AwaitShut -SHUT(0)-> Completing -> Postmigrate
//!                |                             |
//!                +------- socket closed -------+--> NotMigrating, runs again if it ran before
//! ```

use std::time::Duration;

use transport::session::Hold;

/// What QEMU says: events of its monitor and the parts of its stream.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Said {
    Stop,
    Resume,
    Pass,
    Failed,
    Completed,
    /// Stream: header, configuration and block list.
    Head,
    /// Stream: a page in this version.
    Page {
        page: usize,
        version: u32,
    },
    /// Stream: end of a section with so many pages.
    Section {
        pages: u64,
    },
    RamEnd,
    Tail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Migration {
    NotMigrating,
    Iterating,
    AwaitShut,
    /// SHUT(0) is given; `completed` is on its way.
    Completing,
    Postmigrate,
}

/// Pages that QEMU writes per step into a local socket.
const PAGES_PER_STEP: u64 = 256;
/// A step of the migration thread.
pub(crate) const STEP: Duration = Duration::from_millis(1);
/// Rates and thresholds are worked out in these windows.
const WINDOW: Duration = Duration::from_millis(100);
/// Silence by which the capture knows the end of the stream.
const QUIET: Duration = Duration::from_millis(5);

/// Source QEMU.
#[derive(Debug)]
pub(crate) struct SourceQemu {
    pub(crate) is_alive: bool,
    pub(crate) is_running: bool,
    /// Version of each page.
    pub(crate) memory: Vec<u32>,
    pub(crate) migration: Migration,
    /// Memory at the last STOP that the migration waits at.
    pub(crate) at_stop: Option<Vec<u32>>,
    hold: Hold,
    log: Vec<bool>,
    pending: Vec<bool>,
    pending_pages: u64,
    next_page: usize,
    limit: Duration,
    rate: u64,
    has_ack: bool,
    threshold: f64,
    window_from: Duration,
    window_bytes: u64,
    ran_before: bool,
}

impl SourceQemu {
    pub(crate) fn new(memory: Vec<u32>, is_running: bool, hold: Hold) -> SourceQemu {
        let pages = memory.len();
        SourceQemu {
            is_alive: true,
            is_running,
            memory,
            migration: Migration::NotMigrating,
            at_stop: None,
            hold,
            log: vec![false; pages],
            pending: vec![false; pages],
            pending_pages: 0,
            next_page: 0,
            limit: Duration::ZERO,
            rate: 0,
            has_ack: false,
            threshold: 0.0,
            window_from: Duration::ZERO,
            window_bytes: 0,
            ran_before: false,
        }
    }

    /// The guest writes a page.
    pub(crate) fn write(&mut self, page: usize, version: u32) {
        assert!(self.is_running, "a stopped guest writes nothing");
        self.memory[page] = version;
        self.log[page] = true;
    }

    pub(crate) fn set(&mut self, limit: Option<Duration>, rate: Option<u64>) {
        self.limit = limit.unwrap_or(self.limit);
        self.rate = rate.unwrap_or(self.rate);
    }

    pub(crate) fn migrate(&mut self, now: Duration) -> Vec<Said> {
        self.migration = Migration::Iterating;
        self.has_ack = false;
        self.threshold = 0.0;
        (self.window_from, self.window_bytes) = (now, 0);
        self.pending.fill(true);
        self.log.fill(false);
        self.pending_pages = as_u64(self.pending.len());
        vec![Said::Head, Said::Pass]
    }

    pub(crate) fn acknowledge(&mut self) {
        self.has_ack = true;
    }

    /// A step of the migration thread; what is said comes after the given delay.
    pub(crate) fn step(&mut self, now: Duration) -> Vec<(Duration, Said)> {
        let mut said = Vec::new();
        if !self.is_alive || self.migration != Migration::Iterating {
            return said;
        }
        if now >= self.window_from + WINDOW {
            let ms = (now - self.window_from).as_secs_f64() * 1e3;
            self.threshold = as_f64(self.window_bytes) / ms * self.limit.as_secs_f64() * 1e3;
            (self.window_from, self.window_bytes) = (now, 0);
        }
        // 1 to 9 would mean unlimited.
        let room = if self.rate < 10 {
            u64::MAX
        } else {
            self.rate / 10
        };
        if self.window_bytes >= room {
            return said;
        }
        let mut pages = 0;
        while pages < PAGES_PER_STEP && self.window_bytes < room && self.pending_pages > 0 {
            let page = self.next_pending();
            pages += 1;
            self.window_bytes += 4104;
            said.push((Duration::ZERO, self.send(page)));
        }
        self.window_bytes += 18;
        said.push((Duration::ZERO, Said::Section { pages }));
        if as_f64(self.pending_pages * 4096) < self.threshold {
            self.sync();
            said.push((Duration::ZERO, Said::Pass));
        }
        let left = self.pending_pages * 4096;
        let is_free = self.has_ack || self.hold == Hold::Starvation || !self.is_running;
        if (left == 0 || as_f64(left) < self.threshold) && is_free {
            self.complete(&mut said);
        }
        said
    }

    /// Stops the guest and writes everything that is left.
    fn complete(&mut self, said: &mut Vec<(Duration, Said)>) {
        self.ran_before = self.is_running;
        if self.is_running {
            self.is_running = false;
            said.push((Duration::ZERO, Said::Stop));
        }
        self.sync();
        self.at_stop = Some(self.memory.clone());
        let steps = self.pending_pages / PAGES_PER_STEP + 1;
        let mut after = Duration::ZERO;
        let mut pages: u64 = 0;
        while self.pending_pages > 0 {
            let page = self.next_pending();
            said.push((after, self.send(page)));
            pages += 1;
            if pages.is_multiple_of(PAGES_PER_STEP) {
                after += STEP;
            }
        }
        let after = STEP * u32::try_from(steps).expect("few steps");
        said.push((after, Said::RamEnd));
        said.push((after + STEP + QUIET, Said::Tail));
        self.migration = Migration::AwaitShut;
    }

    fn sync(&mut self) {
        for page in 0..self.log.len() {
            if std::mem::take(&mut self.log[page]) && !self.pending[page] {
                self.pending[page] = true;
                self.pending_pages += 1;
            }
        }
    }

    fn next_pending(&mut self) -> usize {
        while !self.pending[self.next_page] {
            self.next_page = (self.next_page + 1) % self.pending.len();
        }
        self.next_page
    }

    fn send(&mut self, page: usize) -> Said {
        self.pending[page] = false;
        self.pending_pages -= 1;
        Said::Page {
            page,
            version: self.memory[page],
        }
    }

    /// SHUT(0): from now on only `cont` runs this guest. `completed` is seen a little later.
    pub(crate) fn shut(&mut self) -> Option<Said> {
        if self.is_alive && self.migration == Migration::AwaitShut {
            self.migration = Migration::Completing;
            return Some(Said::Completed);
        }
        None
    }

    /// The migration is finalized.
    pub(crate) fn completed(&mut self) {
        if self.migration == Migration::Completing {
            self.migration = Migration::Postmigrate;
        }
    }

    /// The socket closes without SHUT(0): QEMU fails the migration and resumes by itself.
    pub(crate) fn socket_closed(&mut self) -> Vec<Said> {
        if !self.is_alive {
            return Vec::new();
        }
        match self.migration {
            Migration::NotMigrating | Migration::Completing | Migration::Postmigrate => Vec::new(),
            Migration::Iterating => {
                self.migration = Migration::NotMigrating;
                vec![Said::Failed]
            }
            Migration::AwaitShut => {
                self.migration = Migration::NotMigrating;
                let mut said = vec![Said::Failed];
                if self.ran_before {
                    self.is_running = true;
                    said.push(Said::Resume);
                }
                said
            }
        }
    }

    /// The operator's `stop`, or an I/O error, or a suspend.
    pub(crate) fn stop(&mut self) -> Option<Said> {
        (self.is_alive && std::mem::take(&mut self.is_running)).then_some(Said::Stop)
    }

    pub(crate) fn cont(&mut self) -> Result<Option<Said>, String> {
        if !self.is_alive {
            return Err("QEMU is gone".into());
        }
        if matches!(self.migration, Migration::AwaitShut | Migration::Completing) {
            return Err("Migration is not finalized yet".into());
        }
        if std::mem::replace(&mut self.is_running, true) {
            return Ok(None);
        }
        self.migration = Migration::NotMigrating;
        Ok(Some(Said::Resume))
    }

    /// The operator's `cont` while a migration iterates, which goes on.
    pub(crate) fn run(&mut self) -> Option<Said> {
        (!std::mem::replace(&mut self.is_running, true)).then_some(Said::Resume)
    }

    pub(crate) fn quit(&mut self) {
        self.is_alive = false;
        self.is_running = false;
    }
}

#[expect(clippy::cast_precision_loss, reason = "estimates need no 53rd bit")]
fn as_f64(value: u64) -> f64 {
    value as f64
}

fn as_u64(value: usize) -> u64 {
    u64::try_from(value).expect("a count fits 64 bits")
}
