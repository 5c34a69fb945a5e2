//! A side's journal: durable steps, what they prove, and a disk that may fail.

use transport::session::{Outcome, source, target};
use transport::wire::{Role, RunState, Verdict};

/// The steps that the agents write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Started,
    Intent { paused: bool },
    Committed { paused: bool },
    Refused,
    NeverRan,
    Running,
    SettledHere,
    SettledThere,
}

impl Step {
    pub(crate) fn of_source(mark: &source::Mark) -> Option<Step> {
        match mark {
            source::Mark::Intent { run_state, .. } => Some(Step::Intent {
                paused: *run_state == RunState::Paused,
            }),
            source::Mark::Holding => unreachable!("no simulated source leaves pages behind"),
            source::Mark::Settled(Outcome::Arrived) => Some(Step::SettledThere),
            source::Mark::Settled(Outcome::Stayed { .. }) => Some(Step::SettledHere),
            source::Mark::Settled(Outcome::Doubt { .. }) => None,
        }
    }

    pub(crate) fn of_target(mark: &target::Mark, stay_paused: bool) -> Step {
        match mark {
            target::Mark::Committed { run_state, .. } => Step::Committed {
                paused: *run_state == RunState::Paused || stay_paused,
            },
            target::Mark::Refused(_) => Step::Refused,
            target::Mark::NeverRan(_) => Step::NeverRan,
            target::Mark::Filling => unreachable!("no simulated target lacks pages"),
            target::Mark::Running => Step::Running,
            target::Mark::Settled => Step::SettledHere,
        }
    }
}

/// One side's journal.
#[derive(Debug)]
pub(crate) struct Journal {
    pub(crate) role: Role,
    pub(crate) steps: Vec<Step>,
    /// Writes from this one on fail, counted from 0.
    pub(crate) fails_from: Option<usize>,
    writes: usize,
}

impl Journal {
    pub(crate) fn new(role: Role) -> Journal {
        Journal {
            role,
            steps: vec![Step::Started],
            fails_from: None,
            writes: 0,
        }
    }

    pub(crate) fn latest(&self) -> Step {
        *self.steps.last().expect("a journal begins with Started")
    }

    pub(crate) fn has(&self, wanted: impl Fn(Step) -> bool) -> bool {
        self.steps.iter().any(|step| wanted(*step))
    }

    /// Makes a step durable, or says that it is not.
    pub(crate) fn append(&mut self, step: Step) -> Result<(), String> {
        let nth = self.writes;
        self.writes += 1;
        if self.fails_from.is_some_and(|from| nth >= from) {
            return Err("the modelled disk is broken".into());
        }
        self.steps.push(step);
        Ok(())
    }

    /// The operator has repaired the disk.
    pub(crate) fn repair(&mut self) {
        self.fails_from = None;
    }

    /// What the latest step proves to the other side.
    pub(crate) fn verdict(&self) -> Verdict {
        match (self.latest(), self.role) {
            (Step::Started, Role::Source) | (Step::SettledHere, Role::Source) => Verdict::Stayed,
            (Step::Started, Role::Target)
            | (Step::Intent { .. }, _)
            | (Step::SettledThere, Role::Source) => Verdict::Unknown,
            (Step::Committed { .. }, _) => Verdict::Committed,
            (Step::Refused, _) | (Step::SettledThere, Role::Target) => Verdict::Refused,
            (Step::NeverRan, _) => Verdict::NeverRan,
            (Step::Running, _) | (Step::SettledHere, Role::Target) => Verdict::Running,
        }
    }
}
