//! Other people's flows over the emulated link, without guests: the figures that a migration is judged
//! by say what the link is.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use testbed::clock;
use testbed::lab::{CLIENT_ADDRESS, Lab, LabOptions};
use testbed::probe::{BulkProbe, GameProbe};
use testbed::requirement::{NETWORK, met};
use testbed_link::{Loss, named};

/// The game's datagrams take half a round trip, and the share that is lost is the link's; beside a
/// TCP stream that keeps the buffer full they take longer, and the stream has nearly all of the link.
#[test]
fn flows_say_what_the_link_is() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    let program = Path::new(env!("CARGO_BIN_EXE_testbed"));
    let mut link = named("wan-100m").expect("it is in the list");
    link.rate_bps = 20_000_000;
    link.loss = Loss::None;
    let mut options = LabOptions::new(link)?;
    options.program = program.to_owned();
    let lab = Lab::start(&options)?;
    let at = |port: u16| -> anyhow::Result<SocketAddr> {
        Ok(format!("{CLIENT_ADDRESS}:{port}").parse()?)
    };
    let game = GameProbe::start(&lab.user, &lab.client, at(7001)?, program)?;
    let alone_us = clock::epoch_us();
    clock::pause(Duration::from_secs(2));
    let bulk = BulkProbe::start(&lab.user, &lab.client, at(7002)?, "cubic", program)?;
    clock::pause(Duration::from_secs(2));
    let beside_us = clock::epoch_us();
    clock::pause(Duration::from_secs(3));
    let end_us = clock::epoch_us();
    let (game, bulk) = (game.stop()?, bulk.stop()?);

    let alone = game.span(alone_us, alone_us + 1_900_000);
    let p50 = alone.p50_ms.expect("datagrams arrived");
    assert!((24.0..40.0).contains(&p50), "{alone:?}");
    assert_eq!(alone.lost_share, Some(0.0), "{alone:?}");
    let rate = bulk.rate_bps(beside_us, end_us).expect("bytes arrived");
    // 20 Mbit/s less headers, of IP, TCP with stamps.
    assert!((12e6..19.5e6).contains(&rate), "{rate}");
    let beside = game.span(beside_us, end_us);
    assert!(
        beside.p95_ms.expect("datagrams arrived") > p50 + 5.0,
        "{beside:?}"
    );
    Ok(())
}
