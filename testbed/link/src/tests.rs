//! What the model promises, checked in virtual time.

use std::time::Duration;

use crate::{LINKS, Link, LinkParams, Loss, ParamError, Policer, Verdict, named};

const MS: Duration = Duration::from_millis(1);

/// A saturated link carries its rate to the nanosecond, and the carry keeps odd rates exact.
#[test]
fn rate_is_exact() {
    for rate_bps in [3_000_000, 7_777_777, 100_000_000, 500_000_000] {
        let mut link = link(LinkParams {
            buffer_bytes: u64::MAX,
            ..clean(rate_bps, 0)
        });
        for n in 0..10_000 {
            assert_eq!(link.offer(Duration::ZERO, 1500, n), Verdict::Queued);
        }
        let arrivals = drain(&mut link);
        let bits_e9: u128 = 10_000 * 1500 * 8 * 1_000_000_000;
        let expected = bits_e9 / u128::from(rate_bps);
        assert_eq!(
            arrivals[9_999].0.as_nanos(),
            expected,
            "at {rate_bps} bit/s"
        );
    }
}

/// A lone packet takes its sending time and the delay, and a pause does not give credit.
#[test]
fn delay_is_added_to_the_sending_time() {
    let mut link = link(clean(12_000_000, 25)); // 1500 bytes take 1 ms
    link.offer(Duration::ZERO, 1500, 0);
    link.offer(100 * MS, 1500, 1);
    link.offer(100 * MS, 1500, 2);
    assert_eq!(
        drain(&mut link),
        [(26 * MS, 0), (126 * MS, 1), (127 * MS, 2)]
    );
}

/// A driver may poll a little ahead of the clock; that gives no more than the rate.
#[test]
fn polling_ahead_gives_no_extra_rate() {
    let mut link = link(clean(12_000_000, 0)); // 1500 bytes take 1 ms
    link.offer(Duration::ZERO, 1500, 0);
    assert_eq!(link.poll(MS), Some(0));
    link.offer(MS / 2, 1500, 1);
    assert_eq!(link.poll(MS * 3 / 2), None);
    assert_eq!(drain(&mut link), [(2 * MS, 1)]);
}

/// The queue is bounded in bytes, drops at its tail, and takes more as it drains.
#[test]
fn full_queue_drops_its_tail() {
    let mut link = link(LinkParams {
        buffer_bytes: 4500,
        ..clean(12_000_000, 0)
    });
    let verdicts: Vec<_> = (0..5)
        .map(|n| link.offer(Duration::ZERO, 1500, n))
        .collect();
    let [queued, full] = [Verdict::Queued, Verdict::QueueDrop];
    assert_eq!(verdicts, [queued, queued, queued, full, full]);
    assert_eq!(link.offer(MS, 1500, 5), queued);
    assert_eq!(link.offer(MS, 1, 6), full);
    assert_eq!(packets(drain(&mut link)), [0, 1, 2, 5]);
    let counters = link.counters();
    assert_eq!(
        (counters.queue_drops.packets, counters.queue_drops.bytes),
        (3, 3001)
    );
    assert_eq!(counters.queue_bytes_max, 4500);
}

/// A packet larger than the whole buffer still passes an idle link.
#[test]
fn idle_link_takes_one_packet_of_any_size() {
    let mut link = link(LinkParams {
        buffer_bytes: 0,
        ..clean(12_000_000, 0)
    });
    assert_eq!(link.offer(Duration::ZERO, 9000, 0), Verdict::Queued);
    assert_eq!(link.offer(Duration::ZERO, 1, 1), Verdict::QueueDrop);
}

/// Random loss has the asked share, and lost packets have used the rate.
#[test]
fn random_loss_has_its_share() {
    let loss = Loss::Random { share: 0.01 };
    let mut link = link(LinkParams {
        loss,
        buffer_bytes: u64::MAX,
        ..clean(12_000_000, 0)
    });
    (0..200_000).for_each(|n| assert_eq!(link.offer(Duration::ZERO, 1500, n), Verdict::Queued));
    let arrivals = drain(&mut link);
    let lost = link.counters().losses.packets;
    // Five standard deviations of a binomial are 222.
    assert!((1778..=2222).contains(&lost), "{lost} of 200000");
    let (at, n) = arrivals[arrivals.len() - 1];
    assert_eq!(at, (u32::try_from(n).unwrap() + 1) * MS);
}

/// Bursts have the asked share and the asked mean length.
#[test]
fn bursts_have_their_share_and_length() {
    let loss = Loss::Bursts {
        share: 0.02,
        mean_packets: 10.0,
    };
    let mut link = link(LinkParams {
        loss,
        buffer_bytes: u64::MAX,
        ..clean(12_000_000, 0)
    });
    (0..1_000_000).for_each(|n| assert_eq!(link.offer(Duration::ZERO, 1500, n), Verdict::Queued));
    let arrived = packets(drain(&mut link));
    let gaps: Vec<u64> = arrived
        .windows(2)
        .map(|pair| pair[1] - pair[0] - 1)
        .filter(|gap| *gap > 0)
        .collect();
    let mean = gaps.iter().sum::<u64>() as f64 / gaps.len() as f64;
    let share = link.counters().losses.packets as f64 / 1e6;
    assert!((9.0..11.0).contains(&mean), "mean burst {mean}");
    assert!((0.017..0.023).contains(&share), "share {share}");
}

/// A cut loses what is on the link and what is offered; a mended link starts clean.
#[test]
fn cut_loses_all_until_mended() {
    let mut link = link(clean(12_000_000, 25));
    (0..10).for_each(|n| assert_eq!(link.offer(Duration::ZERO, 1500, n), Verdict::Queued));
    assert_eq!(link.poll(26 * MS), Some(0));
    link.cut(26 * MS);
    assert_eq!(link.offer(27 * MS, 1500, 10), Verdict::CutDrop);
    assert_eq!(link.next_delivery(), None);
    link.mend();
    assert_eq!(link.offer(30 * MS, 1500, 11), Verdict::Queued);
    assert_eq!(drain(&mut link), [(56 * MS, 11)]);
    assert_eq!(link.counters().cut_drops.packets, 10);
    assert_balanced(&link);
}

/// Jitter in order never reorders, stays within its bound, and moves.
#[test]
fn jitter_in_order_keeps_order() {
    let mut link = link(LinkParams {
        jitter: 12 * MS,
        ..clean(1_000_000_000, 25)
    });
    let sent: Vec<_> = (0..5_000u32).map(|n| n * MS).collect();
    for (n, at) in sent.iter().enumerate() {
        link.offer(*at, 100, n as u64);
    }
    let arrivals = drain(&mut link);
    assert!(arrivals.windows(2).all(|pair| pair[0].1 < pair[1].1));
    let added: Vec<_> = arrivals
        .iter()
        .zip(&sent)
        .map(|((at, _), sent)| *at - *sent - 25 * MS)
        .collect();
    // 100 bytes take 0.8 us to send.
    assert!(
        added
            .iter()
            .all(|added| *added <= 12 * MS + Duration::from_micros(1))
    );
    assert!(added.iter().any(|added| *added < 2 * MS));
    assert!(added.iter().any(|added| *added > 10 * MS));
}

/// Jitter that reorders does, within its bound.
#[test]
fn jitter_may_reorder() {
    let params = LinkParams {
        jitter: 12 * MS,
        jitter_reorders: true,
        ..clean(1_000_000_000, 25)
    };
    let mut link = link(params);
    (0..1000u32).for_each(|n| assert_eq!(link.offer(n * MS, 100, n.into()), Verdict::Queued));
    let arrivals = drain(&mut link);
    assert!(arrivals.windows(2).any(|pair| pair[0].1 > pair[1].1));
    assert_eq!(arrivals.len(), 1000);
}

/// A reordered packet arrives late by the asked time and the others do not wait for it.
#[test]
fn reorder_holds_back_its_share() {
    let params = LinkParams {
        reorder_share: 0.1,
        reorder_by: 10 * MS,
        ..clean(12_000_000, 25)
    };
    let mut link = link(params);
    (0..1000u32).for_each(|n| assert_eq!(link.offer(n * MS, 1500, n.into()), Verdict::Queued));
    let late = drain(&mut link)
        .into_iter()
        .filter(|(at, n)| *at == Duration::from_millis(*n) + 36 * MS)
        .count();
    let in_time = 1000 - late;
    assert!((60..140).contains(&late), "{late} late, {in_time} in time");
}

/// A live change of the rate applies to the rest of the packet being sent.
#[test]
fn rate_changes_live() {
    let mut link = link(LinkParams {
        buffer_bytes: u64::MAX,
        ..clean(12_000_000, 0)
    });
    (0..3).for_each(|n| assert_eq!(link.offer(Duration::ZERO, 1500, n), Verdict::Queued));
    let slower = LinkParams {
        rate_bps: 6_000_000,
        ..*link.params()
    };
    link.set_params(MS / 2, slower).unwrap();
    let times: Vec<_> = drain(&mut link).into_iter().map(|(at, _)| at).collect();
    assert_eq!(times, [MS * 3 / 2, MS * 7 / 2, MS * 11 / 2]);
}

/// The same seed gives the same run; another one does not.
#[test]
fn seed_decides_the_run() {
    let run = |seed| {
        let mut link = Link::new(named("burst-200m").unwrap(), seed).unwrap();
        for n in 0..5_000u64 {
            link.offer(Duration::from_micros(n * 70), 1500, n);
        }
        drain(&mut link)
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

/// Parameters out of range are refused by name, on creation and live.
#[test]
fn bad_parameters_are_refused() {
    let sound = clean(1_000_000, 1);
    let refused = |params| Link::<u64>::new(params, 0).map(|_| ()).unwrap_err();
    let bad_loss = ParamError {
        field: "loss (share 0 to 1, bursts of 1 packet or more)",
    };
    assert_eq!(
        refused(LinkParams {
            rate_bps: 0,
            ..sound
        })
        .field,
        "rate_bps (1 to 10^12)"
    );
    assert_eq!(
        refused(LinkParams {
            loss: Loss::Random { share: f64::NAN },
            ..sound
        }),
        bad_loss
    );
    let certain = Loss::Bursts {
        share: 1.0,
        mean_packets: 2.0,
    };
    assert_eq!(
        refused(LinkParams {
            loss: certain,
            ..sound
        }),
        bad_loss
    );
    let mut link = link(sound);
    let slow = LinkParams {
        delay: Duration::from_secs(61),
        ..sound
    };
    assert_eq!(
        link.set_params(MS, slow).unwrap_err().field,
        "delay (at most 60 s)"
    );
    assert_eq!(*link.params(), sound);
}

/// The named links are sound, and their buffers are what the doc says.
#[test]
fn named_links_are_sound() {
    for entry in LINKS {
        assert_eq!(entry.params().check(), Ok(()), "{}", entry.name);
    }
    assert_eq!(named("wan-100m-demo").unwrap().buffer_bytes, 625_000);
    assert_eq!(named("lan-500m").unwrap().buffer_bytes, 312_500);
    assert_eq!(named("bloat-50m").unwrap().buffer_bytes, 3_125_000);
    assert_eq!(named("no-such"), None);
}

/// No packet is forgotten, whatever the link does.
#[test]
fn counters_balance() {
    let hard = LinkParams {
        jitter: 12 * MS,
        reorder_share: 0.05,
        reorder_by: 3 * MS,
        ..named("burst-200m").unwrap()
    };
    let mut link = link(hard);
    for n in 0..200_000u64 {
        link.offer(Duration::from_micros(n * 50), 1500, n);
        if n == 100_000 {
            link.cut(Duration::from_micros(n * 50));
        }
        if n == 101_000 {
            link.mend();
        }
    }
    drain(&mut link);
    assert_balanced(&link);
    let counters = link.counters();
    assert!(counters.queue_drops.packets > 0 && counters.losses.packets > 0);
}

/// A policer lets its burst pass, then its rate, and no packet waits.
#[test]
fn policer_drops_what_is_too_much() {
    let policed = LinkParams {
        policer: Some(Policer {
            rate_bps: 12_000_000,
            burst_bytes: 15_000,
        }),
        ..clean(1_000_000_000, 10)
    };
    let mut link = link(policed);
    // 1500 bytes each 100 us are ten times the rate.
    for n in 0..10_000u64 {
        link.offer(Duration::from_micros(n * 100), 1500, n);
    }
    drain(&mut link);
    assert_balanced(&link);
    let passed = link.counters().delivered.packets;
    assert!((1009..=1010).contains(&passed), "{passed}");
    assert_eq!(link.counters().queue_bytes_max, 1500);
}

/// Bunched packets come together, in order, at the ticks.
#[test]
fn bunches_come_at_ticks() {
    let bunched = LinkParams {
        bunch_every: 10 * MS,
        ..clean(120_000_000, 25)
    };
    let mut link = link(bunched);
    for n in 0..300 {
        link.offer(Duration::ZERO, 1500, n);
    }
    let arrivals = drain(&mut link);
    let late = |(time, _): &(Duration, u64)| time.as_nanos() % (10 * MS).as_nanos() != 0;
    assert!(!arrivals.iter().any(late), "{arrivals:?}");
    let first = arrivals.iter().filter(|(time, _)| *time == 30 * MS).count();
    // 100 us each: by 30 ms, 25 of them under way, 50 have left.
    assert_eq!(first, 50);
    assert_eq!(packets(arrivals), (0..300).collect::<Vec<_>>());
}

fn clean(rate_bps: u64, delay_ms: u64) -> LinkParams {
    LinkParams::clean(rate_bps, Duration::from_millis(delay_ms))
}

fn link(params: LinkParams) -> Link<u64> {
    Link::new(params, 42).unwrap()
}

/// Runs the link until it is empty; the packets with their arrival times.
fn drain(link: &mut Link<u64>) -> Vec<(Duration, u64)> {
    let mut arrivals = Vec::new();
    while let Some(now) = link.next_delivery() {
        while let Some(packet) = link.poll(now) {
            arrivals.push((now, packet));
        }
    }
    arrivals
}

fn packets(arrivals: Vec<(Duration, u64)>) -> Vec<u64> {
    arrivals.into_iter().map(|(_, packet)| packet).collect()
}

fn assert_balanced(link: &Link<u64>) {
    let c = link.counters();
    let known = [c.delivered, c.queue_drops, c.losses, c.cut_drops];
    let sum = |of: fn(&crate::Count) -> u64| known.iter().map(of).sum::<u64>();
    assert_eq!(link.next_delivery(), None);
    assert_eq!(c.offered.packets, sum(|count| count.packets));
    assert_eq!(c.offered.bytes, sum(|count| count.bytes));
}
