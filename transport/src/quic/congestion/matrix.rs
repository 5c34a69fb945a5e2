//! Our controller on hundreds of links in virtual time: none kills a connection, starves the flow
//! or drowns the link.
//!
//! `make test` runs the slow links, which are cheap. The whole table, and a hundred connections
//! under heavy loss:
//! ```text
//! LINK_MATRIX=all cargo test -p transport --lib matrix -- --nocapture
//! ```

use std::time::Duration;

use testbed_link::{LinkParams, Loss, Policer};

use super::super::Controller;
use super::simulation::Simulation;

/// Share of a link's IP bytes that can be goodput.
const CEILING: f64 = 0.959;
/// Bits that a measured part carries at most, so that fast links cost no more than slow ones.
const BITS_MAX: f64 = 60e6;
const BITS_MAX_ALL: f64 = 100e6;
/// Ten round trips of more bits than this are left out.
const TEN_ROUNDS_MAX: f64 = 500e6;

/// What is special about a link.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Trait {
    Plain,
    /// Lost at random.
    Lossy(f64),
    /// Buffer in bandwidth-delay products.
    Buffer(f64),
    /// Added delay, of this part of the round trip time, in order.
    Jitter(f64),
    /// The same for each packet alone, so that they overtake each other.
    Reordering(f64),
    /// Packets come at multiples of this many milliseconds.
    Bunched(u64),
    /// A policer at the rate on a link of four times it.
    Policed,
    /// Falls to a quarter when half of the time is over.
    Falling,
    /// The round trip time doubles when half of the time is over.
    Longer,
}

const TRAITS: [Trait; 15] = [
    Trait::Plain,
    Trait::Lossy(0.001),
    Trait::Lossy(0.01),
    Trait::Lossy(0.05),
    Trait::Lossy(0.10),
    Trait::Buffer(0.1),
    Trait::Buffer(0.5),
    Trait::Buffer(5.0),
    Trait::Jitter(0.2),
    Trait::Reordering(0.1),
    Trait::Bunched(4),
    Trait::Bunched(20),
    Trait::Policed,
    Trait::Falling,
    Trait::Longer,
];

/// Least share of the ceiling, and longest queue (median) beyond the allowed one.
fn expected(special: Trait) -> (f64, Duration) {
    let ms = Duration::from_millis;
    match special {
        Trait::Plain => (0.90, ms(30)),
        Trait::Lossy(share) if share < 0.02 => (0.90, ms(30)),
        Trait::Buffer(part) if part >= 0.5 => (0.90, ms(30)),
        Trait::Lossy(_) => (0.60, ms(30)),
        Trait::Buffer(_) => (0.60, ms(30)),
        Trait::Jitter(_) | Trait::Bunched(_) => (0.75, ms(60)),
        Trait::Reordering(_) => (0.50, ms(60)),
        Trait::Policed => (0.50, ms(30)),
        // On a slow link a longer path may count as a queue for half a minute.
        Trait::Falling | Trait::Longer => (0.60, ms(100)),
    }
}

/// Why a link is not as expected, where that is known; everything else fails the test.
fn known(mbps: u64, rtt_us: u64, special: Trait) -> Option<&'static str> {
    match special {
        // A window of one round trip passes while one bunch is collected, and then nothing.
        Trait::Bunched(ms) if mbps >= 100 && rtt_us <= ms * 1_000 => {
            Some("bunches further apart than a round trip")
        }
        // Late packets end start-up early; probing then doubles the rate in some ten rounds, which
        // is more time than the table has.
        Trait::Jitter(_) | Trait::Reordering(_) if mbps >= 20 && rtt_us >= 400_000 => {
            Some("jitter ends start-up early")
        }
        // Looks like others' queue until it has stood for a second and this flow has stepped back.
        Trait::Longer if mbps >= 20 => Some("a longer path is noticed after seconds"),
        // 20 round trips of an overfull queue are still being emptied.
        Trait::Falling if mbps >= 20 && rtt_us >= 400_000 => {
            Some("the fall's queue is still there")
        }
        _ if mbps >= 10_000 => Some("ten round trips are all that is measured"),
        Trait::Plain
        | Trait::Lossy(_)
        | Trait::Buffer(_)
        | Trait::Jitter(_)
        | Trait::Reordering(_)
        | Trait::Bunched(_)
        | Trait::Policed
        | Trait::Falling
        | Trait::Longer => None,
    }
}

#[test]
fn slow_links_of_all_sorts() {
    let all = std::env::var_os("LINK_MATRIX").is_some();
    let rates: &[u64] = if all {
        &[1, 5, 20, 100, 1_000, 10_000]
    } else {
        &[2, 10]
    };
    let rtts: &[u64] = if all {
        &[200, 5_000, 25_000, 100_000, 400_000]
    } else {
        &[10_000, 100_000]
    };
    let (mut failures, mut exceptions) = (Vec::new(), 0);
    let mut count = 0;
    for &mbps in rates {
        for &rtt_us in rtts {
            if mbps as f64 * rtt_us as f64 * 10.0 > TEN_ROUNDS_MAX {
                continue;
            }
            for special in TRAITS {
                count += 1;
                let line = run(
                    mbps,
                    rtt_us,
                    special,
                    if all { BITS_MAX_ALL } else { BITS_MAX },
                );
                println!("{}", line.text);
                match known(mbps, rtt_us, special) {
                    Some(reason) if !line.is_good => {
                        exceptions += 1;
                        println!("known: {reason}");
                    }
                    None if !line.is_good => failures.push(line.text),
                    Some(_) | None => {}
                }
            }
        }
    }
    let failed = failures.len();
    println!("{count} links, {failed} not as expected, and {exceptions} of which it is known");
    failures
        .iter()
        .for_each(|line| println!("not as expected: {line}"));
    assert!(failures.is_empty(), "{failures:#?}");
}

/// To 10 % loss and 400 ms: a dead connection panics in the simulation.
#[test]
fn no_connection_dies_of_loss() {
    let all = std::env::var_os("LINK_MATRIX").is_some();
    let runs = if all { 100 } else { 10 };
    for seed in 0..runs {
        let rtt = Duration::from_millis(10 + (seed * 97) % 390);
        let loss = if seed % 2 == 0 {
            Loss::Random { share: 0.10 }
        } else {
            Loss::Bursts {
                share: 0.10,
                mean_packets: 20.0,
            }
        };
        let rate_bps = if all { 50_000_000 } else { 20_000_000 };
        let link = LinkParams {
            loss,
            ..LinkParams::clean(rate_bps, rtt / 2)
        };
        let mut simulation = Simulation::new(&link, Controller::Scaleaway, seed);
        let seconds = if all { 10 } else { 5 };
        let outcome = simulation.run(Duration::from_secs(seconds));
        assert!(outcome.goodput_bps[0] > 0.0, "nothing arrives, seed {seed}");
    }
}

struct Line {
    text: String,
    is_good: bool,
}

fn run(mbps: u64, rtt_us: u64, special: Trait, bits_max: f64) -> Line {
    let (rate_bps, rtt) = (mbps * 1_000_000, Duration::from_micros(rtt_us));
    let link = link(rate_bps, rtt, special);
    let enough = (rtt * 40).max(Duration::from_secs(4)).as_secs_f64();
    let affordable = bits_max / rate_bps as f64;
    let span = Duration::from_secs_f64(enough.min(affordable).max(rtt.as_secs_f64() * 10.0));
    let mut simulation = Simulation::new(&link, Controller::Scaleaway, mbps + rtt_us);
    // A lost packet of the handshake costs 300 ms; start-up takes a dozen rounds.
    let handshake = Duration::from_millis(if mbps > 1_000 { 50 } else { 500 });
    simulation.run(span.max(handshake).max(rtt * 16));
    let changed = if special == Trait::Falling {
        Some(LinkParams {
            rate_bps: rate_bps / 4,
            ..link
        })
    } else if special == Trait::Longer {
        Some(LinkParams {
            delay: link.delay * 2,
            ..link
        })
    } else {
        None
    };
    if let Some(changed) = &changed {
        simulation.set_link(changed);
        simulation.run(span.max(Duration::from_secs(4)));
    }
    let outcome = simulation.run(span);
    // A policer's link is faster than what it lets pass.
    let rate_bps = if special == Trait::Falling {
        rate_bps / 4
    } else {
        rate_bps
    };
    let kept = match link.loss {
        Loss::None => 1.0,
        Loss::Random { share } | Loss::Bursts { share, .. } => 1.0 - share,
    };
    let share = outcome.goodput_bps[0] / (rate_bps as f64 * CEILING * kept);
    let queue_ms = outcome.queue_ms_at(0.5);
    let (share_min, queue) = expected(special);
    // Ten packets leave at once, see the pacer; and a flow may keep a tenth of the round trip time.
    let batch = Duration::from_secs_f64(15_000.0 * 8.0 / rate_bps as f64);
    let queue_max_ms = (queue + 2 * batch + rtt / 5).as_secs_f64() * 1e3;
    let text = format!(
        "{mbps:6} Mbit/s {:7.1} ms {special:<18} {:5.1} % queue p50 {queue_ms:6.1} p95 {:6.1} ms drops {:6}",
        rtt.as_secs_f64() * 1e3,
        share * 100.0,
        outcome.queue_ms_at(0.95),
        outcome.queue_drops,
        special = format!("{special:?}"),
    );
    Line {
        text,
        is_good: share >= share_min && queue_ms <= queue_max_ms,
    }
}

fn link(rate_bps: u64, rtt: Duration, special: Trait) -> LinkParams {
    let mut clean = LinkParams::clean(rate_bps, rtt / 2);
    // Less than quinn's batch of ten packets is no buffer.
    clean.buffer_bytes = clean.buffer_bytes.max(20_000);
    match special {
        Trait::Plain | Trait::Falling | Trait::Longer => clean,
        Trait::Lossy(share) => LinkParams {
            loss: Loss::Random { share },
            ..clean
        },
        Trait::Buffer(part) => LinkParams {
            buffer_bytes: bytes(rate_bps, rtt.mul_f64(part)).max(20_000),
            ..clean
        },
        Trait::Jitter(part) => LinkParams {
            jitter: rtt.mul_f64(part),
            ..clean
        },
        Trait::Reordering(part) => LinkParams {
            jitter: rtt.mul_f64(part),
            jitter_reorders: true,
            ..clean
        },
        Trait::Bunched(ms) => LinkParams {
            bunch_every: Duration::from_millis(ms),
            ..clean
        },
        Trait::Policed => LinkParams {
            policer: Some(Policer {
                rate_bps,
                burst_bytes: bytes(rate_bps, Duration::from_millis(50)).max(30_000),
            }),
            ..LinkParams::clean(rate_bps * 4, rtt / 2)
        },
    }
}

fn bytes(rate_bps: u64, time: Duration) -> u64 {
    let bits = u128::from(rate_bps) * time.as_nanos() / 1_000_000_000;
    u64::try_from(bits / 8).expect("a buffer")
}
