//! What must hold: at every moment, and when everything is over.

use std::time::Duration;

use transport::block::PAGE_SIZE;
use transport::session::Outcome;
use transport::wire::Role;

use crate::content;
use crate::journal::Step;
use crate::world::{Life, World};

impl World {
    /// After every event.
    pub(crate) fn check_always(&self) {
        let both = self.source_qemu.is_running && self.target_qemu.is_running;
        assert!(!both, "two guests run");
        let back = self.source_qemu.is_running && self.target_qemu.has_run;
        assert!(!back, "the source runs a guest that has run at the target");
        if let Some(lanes) = &self.source.lanes {
            let (flight, flight_max) = lanes.flight();
            assert!(flight <= flight_max, "{flight} bytes under way");
        }
    }

    /// At the end.
    pub(crate) fn check_end(&self) {
        if self.unsolvable {
            return self.check_unsolvable();
        }
        let (source, target) = (&self.source_qemu, &self.target_qemu);
        let refused = self.journals[1].has(|step| matches!(step, Step::Refused | Step::NeverRan));
        assert!(
            !(refused && target.has_run),
            "an attempt that was refused has run"
        );
        assert!(
            !self.source.retired || self.target_owned(),
            "the source retired a guest that nobody has"
        );
        if self.target_owned() {
            assert!(
                !source.is_alive || self.qemu_killed[0],
                "both sides have the guest"
            );
            assert!(
                target.is_alive || self.qemu_killed[1],
                "nobody has the guest"
            );
            let runs = self.should_run_at_target();
            assert_eq!(
                target.is_running,
                runs && target.is_alive,
                "the target's guest runs"
            );
            self.check_memory();
        } else {
            assert!(!target.is_alive, "a copy survives at the target");
            let lost = self.qemu_killed[0];
            assert!(source.is_alive || lost, "nobody has the guest");
            if !self.run_state_unknown && !lost {
                let runs = self.plan.was_running && !self.paused_by_operator;
                assert_eq!(source.is_running, runs, "the source's guest runs");
            }
        }
        self.check_outcomes();
    }

    /// Whether the guest is the target's by its journal.
    fn target_owned(&self) -> bool {
        let committed = self.journals[1].has(|step| matches!(step, Step::Committed { .. }));
        committed && !self.journals[1].has(|step| step == Step::NeverRan || step == Step::Refused)
    }

    fn should_run_at_target(&self) -> bool {
        self.journals[1].has(|step| step == Step::Committed { paused: false })
    }

    /// Both agents say the same, and what they say is so.
    fn check_outcomes(&self) {
        for life in [&self.source.life, &self.target.life] {
            match life {
                Life::Ended(Outcome::Arrived) => assert!(self.target_owned(), "arrived?"),
                Life::Ended(Outcome::Stayed { .. }) => assert!(!self.target_owned(), "stayed?"),
                Life::Ended(Outcome::Doubt { .. })
                | Life::Live
                | Life::Crashed
                | Life::Resolving
                | Life::Closed => {}
            }
        }
    }

    /// Target memory at the first moment at which it may run, page by page.
    fn check_memory(&self) {
        let stopped = self
            .source_qemu
            .at_stop
            .as_ref()
            .expect("a guest that moved stopped");
        let mut wanted = [0; PAGE_SIZE];
        let mut found = [0; PAGE_SIZE];
        for (page, version) in stopped.iter().enumerate() {
            content::content(page, *version, &mut wanted);
            self.target_qemu.page_at(page, &mut found);
            assert!(
                wanted == found,
                "page {page} differs from version {version}"
            );
        }
        let has_root = self.source.root.is_some();
        assert!(has_root != self.plan.relay, "a moved guest has a root");
        assert_eq!(self.source.root, self.target.root, "roots of the ledgers");
    }

    /// A doubt may stay only when the target accepted Commit and its QEMU died before it said more.
    fn check_unsolvable(&self) {
        assert!(
            !self.target_qemu.is_alive,
            "a doubt that `resolve` could end"
        );
        assert_eq!(
            self.journals[1].latest(),
            Step::Committed {
                paused: self.journals[1].latest() == Step::Committed { paused: true }
            },
            "a doubt without an accepted Commit"
        );
        assert!(!self.source_qemu.is_running, "the source runs in doubt");
    }

    /// A session without faults: arrived, on time, and the guest was away for no longer than asked.
    pub(crate) fn check_sound(&self) {
        for (role, life) in [
            (Role::Source, &self.source.life),
            (Role::Target, &self.target.life),
        ] {
            assert_eq!(*life, Life::Ended(Outcome::Arrived), "{role:?}");
        }
        assert!(self.now < Duration::from_secs(120), "took {:?}", self.now);
        let should_run = self.plan.was_running && !self.plan.stay_paused;
        assert_eq!(self.target_qemu.is_running, should_run, "run state");
    }

    /// What no agent can put right is told as an error: a guest that died with its QEMU, a word
    /// that the disk does not keep, a `cont` that QEMU does not need.
    pub(crate) fn may_report_errors(&self) -> bool {
        self.qemu_killed[0] || self.plan.journal_fails.is_some() || self.run_state_unknown
    }

    /// From STOP to RUN.
    pub(crate) fn downtime(&self) -> Option<Duration> {
        Some(self.arrived_at? - self.stopped_at?)
    }
}
