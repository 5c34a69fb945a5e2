//! How a doubt is settled: what one side does with its own journal and the other side's word.
//!
//! Pure table, used by a waiting `send` or `receive` and by `resolve`. The epoch belongs to one attempt
//! and begins at 0 on both sides; a source's `resolve` without contact raises its own. On contact
//! the target with the lower epoch gives way: paused, never killed.

use crate::wire::{Role, Verdict};

/// What a side knows of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Side {
    /// Source or target of the attempt.
    pub role: Role,
    /// What its journal proves.
    pub verdict: Verdict,
    /// Epoch of the VM in its journal.
    pub epoch: u64,
}

/// What to do at this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The guest is (or runs on) here; close the attempt.
    KeepHere,
    /// Run the guest here and close the attempt.
    RunHere,
    /// The guest is there; stop what is left here and close the attempt.
    LeaveThere,
    /// The other side won an epoch while the guest ran here too: pause it, for the operator.
    PauseHere,
    /// Nothing is proved yet; ask again later.
    AskAgain,
}

/// The table. `mine` is this side, `theirs` the verdict and epoch that the other side sent.
#[must_use]
pub fn settle(mine: Side, theirs: Verdict, their_epoch: u64) -> Next {
    match mine.role {
        Role::Source => match (mine.verdict, theirs) {
            // No intent, or the operator's word: whatever the target says.
            (Verdict::Stayed, _) => Next::RunHere,
            // Durable words of the target (S2).
            (_, Verdict::Refused | Verdict::NeverRan) => Next::RunHere,
            (_, Verdict::Running) => Next::LeaveThere,
            (_, Verdict::Committed | Verdict::Unknown | Verdict::Stayed) => Next::AskAgain,
        },
        Role::Target if their_epoch > mine.epoch => match mine.verdict {
            Verdict::Running | Verdict::Committed => Next::PauseHere,
            Verdict::Unknown | Verdict::Refused | Verdict::NeverRan | Verdict::Stayed => {
                Next::LeaveThere
            }
        },
        Role::Target => match mine.verdict {
            Verdict::Running => Next::KeepHere,
            // Commit was accepted: this side owns the guest and starts it.
            Verdict::Committed => Next::RunHere,
            Verdict::Unknown | Verdict::Refused | Verdict::NeverRan | Verdict::Stayed => {
                Next::LeaveThere
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERDICTS: [Verdict; 6] = [
        Verdict::Unknown,
        Verdict::Refused,
        Verdict::NeverRan,
        Verdict::Committed,
        Verdict::Running,
        Verdict::Stayed,
    ];

    fn runs(next: Next) -> bool {
        matches!(next, Next::RunHere | Next::KeepHere)
    }

    /// Over all pairs of verdicts that can stand in two journals at equal epochs, never do both
    /// sides run the guest.
    #[test]
    fn never_both() {
        for source in [Verdict::Stayed, Verdict::Unknown] {
            for target in [
                Verdict::Refused,
                Verdict::NeverRan,
                Verdict::Committed,
                Verdict::Running,
            ] {
                // Without intent no Commit was sent, so the target cannot have accepted one.
                let accepted = matches!(target, Verdict::Committed | Verdict::Running);
                if source == Verdict::Stayed && accepted {
                    continue;
                }
                let at_source = settle(
                    Side {
                        role: Role::Source,
                        verdict: source,
                        epoch: 0,
                    },
                    target,
                    0,
                );
                let at_target = settle(
                    Side {
                        role: Role::Target,
                        verdict: target,
                        epoch: 0,
                    },
                    source,
                    0,
                );
                assert!(
                    !(runs(at_source) && runs(at_target)),
                    "{source:?} {target:?}"
                );
                assert!(
                    runs(at_source) || runs(at_target),
                    "{source:?} {target:?}: nobody"
                );
            }
        }
    }

    /// A target with the lower epoch never starts the guest, and a source takes the target's durable
    /// words whatever the epochs are.
    #[test]
    fn lower_epoch_gives_way() {
        for mine in VERDICTS {
            for theirs in VERDICTS {
                let target = Side {
                    role: Role::Target,
                    verdict: mine,
                    epoch: 0,
                };
                let next = settle(target, theirs, 1);
                assert!(!runs(next), "{mine:?} {theirs:?}");
            }
        }
        let source = Side {
            role: Role::Source,
            verdict: Verdict::Unknown,
            epoch: 0,
        };
        for theirs in [Verdict::Refused, Verdict::NeverRan] {
            assert_eq!(settle(source, theirs, 7), Next::RunHere);
        }
    }
}
