//! What the rules' tests share: plans, faults at every action, the order of what happened.

use std::time::Duration;

use transport::session::{Hold, Outcome};
use transport::wire::{AbortCode, Role};

use crate::plan::{Fault, Moment, Plan, SOURCE_ACTIONS, TARGET_ACTIONS};
use crate::sessions::run;
use crate::world::{Life, World};

/// Every action of either side, with each fault before and after it. A session in which the action
/// does not occur is one more without faults.
pub(crate) fn at_every_action(faults: &[Fault]) {
    let (mut struck, mut tried) = (0, 0);
    let source = SOURCE_ACTIONS.map(|action| (Role::Source, action));
    let target = TARGET_ACTIONS.map(|action| (Role::Target, action));
    for (role, action) in source.into_iter().chain(target) {
        for fault in faults {
            for moment in [
                Moment::Before(role, action),
                Moment::After(role, action, Duration::ZERO),
            ] {
                let mut plan = running(10);
                // Two rounds, so that passes are triggered too.
                plan.writes_per_s = 2000;
                plan.faults = vec![(moment, *fault)];
                let world = run(plan);
                struck += u32::from(world.plan.faults.is_empty());
                tried += 1;
            }
        }
    }
    // Actions of sessions that fail do not occur before the fault.
    assert!(
        struck * 4 > tried * 3,
        "only {struck} of {tried} faults struck"
    );
}

/// A guest that runs, held by the withheld acknowledgement.
pub(crate) fn running(seed: u64) -> Plan {
    let mut plan = Plan::sound(seed);
    plan.hold = Hold::SwitchoverAck;
    (plan.was_running, plan.stay_paused) = (true, false);
    plan
}

pub(crate) fn check_stayed(life: &Life, expected: AbortCode) {
    let Life::Ended(Outcome::Stayed { code, .. }) = life else {
        panic!("{life:?}");
    };
    assert_eq!(*code, expected);
}

/// The first lines that begin so come in this order.
pub(crate) fn check_order(world: &World, wanted: &[&str]) {
    let places: Vec<_> = wanted
        .iter()
        .map(|text| (position(world, text), text))
        .collect();
    assert!(
        places.is_sorted() && places.iter().all(|(place, _)| place.is_some()),
        "{places:#?}"
    );
}

pub(crate) fn position(world: &World, text: &str) -> Option<usize> {
    world.trace.iter().position(|line| line.contains(text))
}
