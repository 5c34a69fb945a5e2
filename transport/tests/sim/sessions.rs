//! Sessions by seed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use transport::session::Hold;

use crate::errors::count_errors;
use crate::plan::Plan;
use crate::world::World;

const SEEDS_DEFAULT: u64 = 200;

/// Every seed ends well: one guest, the right memory, within bounds and deadlines.
#[test]
fn seeds() {
    if let Some(seed) = number("SIM_SEED") {
        println!("{}", story(&run(Plan::of_seed(seed)), usize::MAX));
        return;
    }
    let seeds = number("SIM_SEEDS").unwrap_or(SEEDS_DEFAULT);
    let mut misses = 0;
    for seed in 0..seeds {
        let world = run(Plan::of_seed(seed));
        misses += world.target_qemu.misses;
    }
    println!("{misses} references did not resolve");
    assert!(
        misses > 50 || seeds < SEEDS_DEFAULT,
        "{misses} references did not resolve: the sessions show little of misses"
    );
}

/// Sessions without faults arrive with a stop not above `--downtime` and one RTT, whatever the
/// link, while the guest dirties less than the link carries.
#[test]
fn sound_sessions_keep_the_downtime() {
    let seeds = number("SIM_SEEDS").unwrap_or(SEEDS_DEFAULT) / 5;
    for seed in 10_000..10_000 + seeds {
        let mut plan = Plan::sound(seed);
        plan.hold = Hold::SwitchoverAck;
        (plan.was_running, plan.stay_paused) = (true, false);
        let most = plan.downtime + 2 * plan.link.delay + 2 * plan.link.jitter;
        let world = run(plan);
        let away = world.downtime().unwrap_or(Duration::MAX);
        assert!(
            away <= most,
            "seed {seed}: away for {away:?}, allowed are {most:?}"
        );
    }
}

/// A guest that writes nothing, or a page now and then, is moved as soon as its memory is across.
#[test]
fn idle_guests_stop_soon() {
    for writes_per_s in [0, 1, 10] {
        let mut plan = Plan::sound(20_000);
        plan.hold = Hold::SwitchoverAck;
        (plan.was_running, plan.stay_paused) = (true, false);
        plan.writes_per_s = writes_per_s;
        let bytes = u64::from(plan.ram_pages) * 4096;
        let most = Duration::from_millis(2500 + bytes * 8000 / plan.link.rate_bps);
        let world = run(plan);
        let arrived = world.arrived_at.unwrap_or(Duration::MAX);
        assert!(
            arrived <= most,
            "{writes_per_s} pages/s: {arrived:?}, {most:?}"
        );
    }
}

/// Runs a plan; a failure names its seed and tells what happened before.
pub(crate) fn run(plan: Plan) -> World {
    let seed = plan.seed;
    let is_sound = plan.is_sound();
    let mut world = World::new(plan);
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let ((), errors) = count_errors(|| world.run());
        assert!(
            errors == 0 || world.may_report_errors(),
            "{errors} error-level events"
        );
        if is_sound {
            world.check_sound();
        }
    }));
    assert!(
        ran.is_ok(),
        "{}seed {seed} failed; again with SIM_SEED={seed}",
        story(&world, 80)
    );
    world
}

/// The last lines of what happened, and how it was recorded.
fn story(world: &World, lines: usize) -> String {
    let from = world.trace.len().saturating_sub(lines);
    let mut story = format!("{:#?}\n", world.plan);
    for line in &world.trace[from..] {
        story.push_str(line);
        story.push('\n');
    }
    for (journal, life) in world
        .journals
        .iter()
        .zip([&world.source.life, &world.target.life])
    {
        story.push_str(&format!(
            "{:?}: {:?} {life:?}\n",
            journal.role, journal.steps
        ));
    }
    story
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().expect("a number of seeds"))
}
