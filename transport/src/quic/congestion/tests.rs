//! What our controller makes of the links that reports know by name. The other controllers' numbers
//! stand beside it where the difference is the reason for having our own.

use std::time::Duration;

use testbed_link::{LinkParams, Loss, named};

use super::super::Controller;
use super::simulation::{Outcome, Simulation};
use super::{Mode, YIELD_QUEUEING};

/// Share of a link's IP bytes that can be goodput: headers of IP, UDP, QUIC and AEAD are 4.1 %.
const CEILING: f64 = 0.959;

/// Full links stay full and their queues short.
#[test]
fn clean_links_are_filled_with_a_short_queue() {
    check(
        "wan-100m",
        Expected {
            share: 0.96,
            p50_ms: 8.0,
            p95_ms: 10.0,
        },
    );
    check(
        "bloat-50m",
        Expected {
            share: 0.96,
            p50_ms: 8.0,
            p95_ms: 10.0,
        },
    );
}

/// Random loss is not congestion.
#[test]
fn lossy_links_are_filled_too() {
    check(
        "wan-100m-lossy",
        Expected {
            share: 0.96,
            p50_ms: 8.0,
            p95_ms: 10.0,
        },
    );
    check(
        "dsl-20m",
        Expected {
            share: 0.96,
            p50_ms: 15.0,
            p95_ms: 26.0,
        },
    );
    check(
        "metro-500m",
        Expected {
            share: 0.96,
            p50_ms: 8.0,
            p95_ms: 10.0,
        },
    );
    check(
        "lan-500m",
        Expected {
            share: 0.96,
            p50_ms: 8.0,
            p95_ms: 10.0,
        },
    );
    check(
        "burst-200m",
        Expected {
            share: 0.90,
            p50_ms: 12.0,
            p95_ms: 20.0,
        },
    );
}

/// Jitter looks like a queue, and the least round trip time of single packets would spiral down.
#[test]
fn jitter_does_not_starve_the_flow() {
    check(
        "jitter-40m",
        Expected {
            share: 0.95,
            p50_ms: 15.0,
            p95_ms: 30.0,
        },
    );
}

/// Cubic keeps a clean link as full, with ten times the queue, and all but stops when 1 % is lost.
#[test]
fn cubic_is_why() {
    let lossy = named("wan-100m-lossy").expect("a known name");
    let mut simulation = Simulation::new(&lossy, Controller::Cubic, 1);
    let outcome = simulation.run(Duration::from_secs(10));
    let share = share_of_ceiling(&outcome, &lossy);
    println!(
        "cubic on wan-100m-lossy: {:.1} % of the ceiling",
        share * 100.0
    );
    assert!(share < 0.2, "{share}");
}

/// Startup finds the rate within a second and overshoots by less than the buffer.
#[test]
fn startup_is_quick_and_does_not_flood() {
    let link = named("wan-100m").expect("a known name");
    let mut simulation = Simulation::new(&link, Controller::Scaleaway, 2);
    let first = simulation.run(Duration::from_secs(1));
    let second = simulation.run(Duration::from_secs(1));
    let share = share_of_ceiling(&second, &link);
    assert!(first.queue_drops < 500, "{first:?}");
    assert!(share > 0.9, "{share}");
}

/// The link falls to a fifth: after two and a half seconds, at any phase of probing, the queue that
/// this built is gone. It recovers: the rate is found again as soon.
#[test]
fn a_link_that_changes_its_rate_is_followed() {
    let fast = named("wan-100m").expect("a known name");
    let slow = LinkParams {
        rate_bps: 20_000_000,
        ..fast
    };
    let mut simulation = Simulation::new(&fast, Controller::Scaleaway, 3);
    simulation.run(Duration::from_secs(5));
    for link in [slow, fast] {
        simulation.set_link(&link);
        let first = simulation.run(Duration::from_millis(2500));
        let later = simulation.run(Duration::from_secs(4));
        let share = share_of_ceiling(&later, &link);
        assert_eq!(first.queue_drops + later.queue_drops, 0);
        assert!(share > 0.95, "{share}");
        assert!(later.queue_ms_at(0.95) < 15.0, "{later:?}");
    }
}

/// Another route, twice as long: its time is not taken for a queue for long, in either mode.
#[test]
fn a_path_that_becomes_longer_is_noticed() {
    let short = named("wan-100m").expect("a known name");
    let long = LinkParams {
        delay: 2 * short.delay,
        ..short
    };
    for mode in [Mode::Fill, YIELDING] {
        let mut simulation = Simulation::new(&short, Controller::Scaleaway, 3);
        simulation.shaping(0).set_mode(mode);
        simulation.run(Duration::from_secs(5));
        simulation.set_link(&long);
        simulation.run(if mode == Mode::Fill {
            Duration::from_secs(6)
        } else {
            Duration::from_secs(18)
        });
        let later = simulation.run(Duration::from_secs(5));
        let share = share_of_ceiling(&later, &short);
        let line = format!("{mode:?}: {share}, queue {:.1} ms", later.queue_ms_at(0.95));
        println!("{line}");
        assert!(share > 0.9 && later.queue_ms_at(0.95) < 15.0, "{line}");
    }
}

/// After a cut the flow comes back at its old rate, and does not take the silence for a queue.
#[test]
fn a_cut_is_survived() {
    let link = named("wan-100m").expect("a known name");
    let mut simulation = Simulation::new(&link, Controller::Scaleaway, 4);
    simulation.run(Duration::from_secs(3));
    simulation.set_cut(true);
    simulation.run(Duration::from_secs(5));
    simulation.set_cut(false);
    simulation.run(Duration::from_secs(1));
    let after = simulation.run(Duration::from_secs(2));
    let share = share_of_ceiling(&after, &link);
    assert!(share > 0.95, "{share}");
    assert!(after.queue_ms_at(0.95) < 15.0, "{after:?}");
}

/// Loss that would stop anything else, also at many packets in flight: eight streams stay below
/// the number of gaps at which a receiver gives up.
#[test]
fn heavy_loss_slows_the_flow_but_does_not_end_it() {
    let satellite = LinkParams {
        loss: Loss::Random { share: 0.05 },
        ..LinkParams::clean(400_000_000, Duration::from_millis(150))
    };
    let rough = LinkParams {
        loss: Loss::Random { share: 0.10 },
        ..LinkParams::clean(100_000_000, Duration::from_millis(25))
    };
    for link in [satellite, rough] {
        let mut simulation = Simulation::new(&link, Controller::Scaleaway, 5);
        simulation.run(Duration::from_secs(5));
        let steady = simulation.run(Duration::from_secs(4));
        let share = share_of_ceiling(&steady, &link);

        assert!(share > 0.6, "{share} on {link:?}");
    }
}

/// Two of ours, and ours beside cubic, whoever comes first, share evenly enough: Jain's index of
/// 0.9 is one to two, 0.75 one to three and a half. Beside cubic, shares swing over tens of seconds.
#[test]
fn others_on_the_link_get_their_share() {
    let wan = named("wan-100m").expect("a known name");
    let ours = Controller::Scaleaway;
    for (first, second, jain_min) in [
        (ours, ours, 0.95),
        (ours, Controller::Cubic, 0.75),
        (Controller::Cubic, ours, 0.75),
    ] {
        check_fairness("wan-100m", &wan, (first, second), jain_min);
    }
}

fn check_fairness(
    name: &str,
    link: &LinkParams,
    (first, second): (Controller, Controller),
    jain_min: f64,
) {
    let mut simulation = Simulation::new(link, first, 1);
    simulation.run(Duration::from_secs(5));
    simulation.add_flow(second);
    simulation.run(Duration::from_secs(10));
    let late = simulation.run(Duration::from_secs(20));
    let all: f64 = late.goodput_bps.iter().sum();
    let jain = jain(&late);
    let line = format!(
        "{name}: {first} + {second}: {:.1?} Mbit/s, Jain {jain:.3}, queue p50 {:.1} p95 {:.1} ms",
        mbps(&late),
        late.queue_ms_at(0.5),
        late.queue_ms_at(0.95)
    );
    println!("{line}");
    assert!(all > 0.9 * CEILING * link.rate_bps as f64, "{line}");
    assert!(jain >= jain_min, "{line}");
}

/// The kernel's BBR answers no loss; so this flow holds on to its half of the link, as far as it has
/// seen the link without it.
#[test]
fn bbr_does_not_push_the_flow_aside() {
    let link = named("wan-100m").expect("a known name");
    for (rival_first, jain_min) in [(false, 0.9), (true, 0.75)] {
        let mut simulation = Simulation::new(&link, Controller::Scaleaway, 1);
        if rival_first {
            simulation.add_rival();
        }
        simulation.run(Duration::from_secs(3));
        if !rival_first {
            simulation.add_rival();
        }
        simulation.run(Duration::from_secs(7));
        let late = simulation.run(Duration::from_secs(20));
        let jain = jain(&late);
        let line = format!(
            "beside bbr, which came {}: {:.1?} Mbit/s, Jain {jain:.3}, {} drops",
            if rival_first { "first" } else { "later" },
            mbps(&late),
            late.queue_drops
        );
        println!("{line}");
        assert!(jain >= jain_min, "{line}");
    }
}

/// Alone, a yielding flow all but fills the link, with a queue below its budget.
#[test]
fn yielding_alone_keeps_the_queue_below_its_budget() {
    for (name, share_min, p95_ms) in [
        ("wan-100m", 0.90, 5.0),
        ("wan-100m-lossy", 0.90, 5.0),
        ("metro-500m", 0.90, 5.0),
        ("bloat-50m", 0.90, 5.0),
        ("dsl-20m", 0.90, 12.0),
        ("jitter-40m", 0.80, 25.0),
    ] {
        let link = named(name).expect("a known name");
        let mut simulation = Simulation::new(&link, Controller::Scaleaway, 1);
        simulation.shaping(0).set_mode(YIELDING);
        simulation.run(Duration::from_secs(2));
        let steady = simulation.run(Duration::from_secs(8));
        let share = share_of_ceiling(&steady, &link);
        let line = format!(
            "{name}, yielding: {:.1} % of the ceiling, queue p50 {:.1} p95 {:.1} ms",
            share * 100.0,
            steady.queue_ms_at(0.5),
            steady.queue_ms_at(0.95),
        );
        println!("{line}");
        assert!(
            share > share_min && steady.queue_ms_at(0.95) <= p95_ms,
            "{line}"
        );
    }
}

/// Beside cubic a yielding flow keeps its least rate, not more and not less; when cubic has ended
/// the link is its own within seconds.
#[test]
fn yielding_leaves_the_link_to_others() {
    let link = named("wan-100m").expect("a known name");
    let mut simulation = Simulation::new(&link, Controller::Scaleaway, 1);
    simulation.shaping(0).set_mode(YIELDING);
    simulation.run(Duration::from_secs(3));
    simulation.add_flow(Controller::Cubic);
    simulation.run(Duration::from_secs(6));
    let beside = mbps(&simulation.run(Duration::from_secs(20)));
    println!("yielding beside cubic: {beside:.1?} Mbit/s");
    assert!(beside[1] > 0.9 * 95.9 && beside[0] > 3.0, "{beside:?}");
    simulation.end_flow(1);
    simulation.run(Duration::from_secs(4));
    let after = simulation.run(Duration::from_secs(3));
    println!("and after it: {:.1?} Mbit/s", mbps(&after));
    assert!(share_of_ceiling(&after, &link) > 0.85, "{after:?}");
}

/// A cap is kept, changes at once, and is forgotten when it is lifted.
#[test]
fn a_cap_is_kept_and_lifted() {
    let link = named("wan-100m").expect("a known name");
    let mut simulation = Simulation::new(&link, Controller::Scaleaway, 1);
    simulation.shaping(0).set_rate_max(Some(30_000_000));
    simulation.run(Duration::from_secs(2));
    for cap in [30_000_000u32, 60_000_000, 10_000_000] {
        simulation.shaping(0).set_rate_max(Some(u64::from(cap)));
        simulation.run(Duration::from_millis(500));
        let outcome = simulation.run(Duration::from_secs(3));
        let share = outcome.goodput_bps[0] / (f64::from(cap) * CEILING);
        println!("capped at {cap}: {:.1} % of it", share * 100.0);
        assert!((0.93..1.02).contains(&share), "{share}");
        assert!(outcome.queue_ms_at(0.95) < 2.0, "{outcome:?}");
    }
    simulation.shaping(0).set_rate_max(None);
    simulation.run(Duration::from_secs(3));
    let free = simulation.run(Duration::from_secs(3));
    assert!(share_of_ceiling(&free, &link) > 0.95, "{free:?}");
}

/// Hosts that share their processors sleep for up to 40 ms, a tenth of the time each: what their
/// packets then find is not a queue, and costs little more than the sleep itself.
#[test]
fn busy_hosts_are_not_a_queue() {
    for (name, share_min) in [
        ("wan-100m-demo", 0.87),
        ("dsl-20m", 0.90),
        ("bloat-50m", 0.80),
    ] {
        let link = named(name).expect("a known name");
        let mut simulation = Simulation::new(&link, Controller::Scaleaway, 1);
        simulation.set_naps(Duration::from_millis(40), Duration::from_millis(400));
        simulation.run(Duration::from_secs(2));
        let share = share_of_ceiling(&simulation.run(Duration::from_secs(10)), &link);
        println!("{name}, busy hosts: {:.1} % of the ceiling", share * 100.0);
        assert!(share > share_min, "{name} {share}");
    }
}

/// A buffer of a tenth of the bandwidth-delay product is overrun in bursts, not filled for ever.
#[test]
fn a_shallow_buffer_costs_little() {
    let link = LinkParams {
        buffer_bytes: 60_000,
        ..named("wan-100m").expect("a known name")
    };
    let mut simulation = Simulation::new(&link, Controller::Scaleaway, 1);
    simulation.run(Duration::from_secs(2));
    let steady = simulation.run(Duration::from_secs(5));
    let share = share_of_ceiling(&steady, &link);
    println!(
        "{:.1} % of the ceiling, {} drops",
        share * 100.0,
        steady.queue_drops
    );
    assert!(share > 0.9, "{share}");
    // 43 000 packets pass in five seconds.
    assert!(steady.queue_drops < 2_000, "{steady:?}");
}

const YIELDING: Mode = Mode::Yield {
    queueing: YIELD_QUEUEING,
};

#[derive(Clone, Copy)]
struct Expected {
    share: f64,
    p50_ms: f64,
    p95_ms: f64,
}

fn check(name: &str, expected: Expected) {
    let link = named(name).expect("a known name");
    let mut simulation = Simulation::new(&link, Controller::Scaleaway, 1);
    let startup = simulation.run(Duration::from_secs(2));
    let steady = simulation.run(Duration::from_secs(8));
    let share = share_of_ceiling(&steady, &link);
    let line = format!(
        "{name}: {:.1} % of the ceiling, queue p50 {:.1} p95 {:.1} ms, drops {} + {}; {:?}",
        share * 100.0,
        steady.queue_ms_at(0.5),
        steady.queue_ms_at(0.95),
        startup.queue_drops,
        steady.queue_drops,
        simulation.estimate(),
    );
    println!("{line}");
    assert!(share >= expected.share, "{line}");
    assert!(steady.queue_ms_at(0.5) <= expected.p50_ms, "{line}");
    assert!(steady.queue_ms_at(0.95) <= expected.p95_ms, "{line}");
}

/// Jain's index of two flows: 0.5 when one has all, 1 when they are equal.
fn jain(outcome: &Outcome) -> f64 {
    let all: f64 = outcome.goodput_bps.iter().sum();
    let squares: f64 = outcome.goodput_bps.iter().map(|bps| bps * bps).sum();
    all * all / squares / 2.0
}

fn share_of_ceiling(outcome: &Outcome, link: &LinkParams) -> f64 {
    let lost = match link.loss {
        Loss::None => 0.0,
        Loss::Random { share } | Loss::Bursts { share, .. } => share,
    };
    outcome.goodput_bps[0] / (link.rate_bps as f64 * CEILING * (1.0 - lost))
}

fn mbps(outcome: &Outcome) -> Vec<f64> {
    outcome.goodput_bps.iter().map(|bps| bps / 1e6).collect()
}
