//! `kill -9` of either agent between every two steps of the handover: the guest never runs twice,
//! and `status` and `resolve` lead to where it runs once.
//!
//! The product dies at a named place (`SCALEAWAY_FAULT`); docs/handover.md has the steps.

use std::process::Output;
use std::time::Duration;

use testbed::clock;
use testbed::guest::{GUEST_UUID, Guest, Machine};
use testbed::pair::Pair;
use testbed::product::{Product, Running};
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(90);
/// A survivor that can settle by itself does so in this time; one that cannot waits for its peer.
const ALONE_MAX: Duration = Duration::from_secs(5);
const TALK_MAX: Duration = Duration::from_secs(40);
const KILLED: i32 = -1;

/// Where the guest must be in the end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Source,
    Target,
}

fn check(point: &str, expected: Place) -> anyhow::Result<()> {
    if !(met(&GUESTS)? && met(&[Requirement::Product])?) {
        return Ok(());
    }
    let pair = Pair::new(point, &Machine::small())?;
    let fault = [("SCALEAWAY_FAULT", point)];
    let source_dies = point.starts_with("source-");
    let (at_source, at_target) = if source_dies {
        (&fault[..], &[][..])
    } else {
        (&[][..], &fault[..])
    };
    let mut receive = pair.receive_with(&pair.client, &["--verify", "full"], at_target)?;
    let mut send = pair.send_with(&pair.cloud, &[], at_source)?;
    let (victim, survivor) = if source_dies {
        (&mut send, &mut receive)
    } else {
        (&mut receive, &mut send)
    };
    assert_eq!(
        victim.wait(MOVE_MAX)?,
        KILLED,
        "{point}: {}",
        victim.output()
    );

    way_out(&pair, source_dies, survivor)?;
    let said = || {
        format!(
            "{point}\nsend:\n{}\nreceive:\n{}",
            send.output(),
            receive.output()
        )
    };
    let runs = (runs(&pair.source), runs(&pair.target));
    assert_eq!(
        runs,
        (expected == Place::Source, expected == Place::Target),
        "{}",
        said()
    );
    assert_eq!(pair.running_max(), 1, "{}", said());
    let guest = if expected == Place::Source {
        &pair.source
    } else {
        &pair.target
    };
    let control = guest.control()?;
    control.next()?;
    assert_eq!(control.verify()?.errors, 0, "{}", said());
    for (product, at) in [(&pair.cloud, Place::Source), (&pair.client, Place::Target)] {
        let status = product.status()?;
        let word = if at == expected { "here" } else { "there" };
        assert_eq!(status[0]["settled"], true, "{status}\n{}", said());
        assert_eq!(status[0]["at"], word, "{status}\n{}", said());
    }
    Ok(())
}

/// What a user does: looks at `status` of the host whose agent died, and resolves.
fn way_out(pair: &Pair, source_died: bool, survivor: &mut Running) -> anyhow::Result<()> {
    let died = if source_died {
        &pair.cloud
    } else {
        &pair.client
    };
    if survivor.wait(ALONE_MAX).is_err() {
        // It waits for its peer; `resolve` takes the dead agent's place.
        talk(pair, died, source_died, survivor)?;
    }
    // Each side for itself, as `status` advises, until nothing is unsettled.
    for (product, is_source) in [(&pair.client, false), (&pair.cloud, true)] {
        let status = product.status()?;
        if status[0]["settled"] == true {
            continue;
        }
        let advice = status[0]["advice"].as_str().unwrap_or_default();
        if advice.contains("--listen") {
            both_resolve(pair)?;
        } else if advice.contains("--here") {
            resolve(product, &["--here"])?;
        } else {
            assert!(
                advice.contains("--there"),
                "{advice:?} (source: {is_source})"
            );
            resolve(product, &["--there"])?;
        }
    }
    Ok(())
}

/// `receive` listens and `send` dials; the one that died is stood in for in its own way.
fn talk(
    pair: &Pair,
    died: &Product<'_>,
    source_died: bool,
    survivor: &mut Running,
) -> anyhow::Result<()> {
    let address = pair.address();
    let way = if source_died {
        ["--to", &address]
    } else {
        ["--listen", &address]
    };
    let output = bounded_resolve(pair, died, &way)?;
    let code = survivor.wait(TALK_MAX)?;
    assert!(
        matches!(code, 0 | 1),
        "the survivor ended with {code}:\n{}\nresolve:\n{output}",
        survivor.output()
    );
    Ok(())
}

/// Both agents are gone: the two hosts' `resolve` talk.
fn both_resolve(pair: &Pair) -> anyhow::Result<()> {
    let address = pair.address();
    let arguments = |way: &str| vec![GUEST_UUID.to_owned(), way.to_owned(), address.clone()];
    let log = pair.file("resolve-target.log");
    let mut listening = pair
        .client
        .start_with("resolve", &arguments("--listen"), &[], &log)?;
    listening.wait_listening()?;
    let log = pair.file("resolve-source.log");
    let mut dialing = pair
        .cloud
        .start_with("resolve", &arguments("--to"), &[], &log)?;
    let codes = (dialing.wait(TALK_MAX)?, listening.wait(TALK_MAX)?);
    assert_eq!(
        codes,
        (0, 0),
        "{}\n{}",
        dialing.output(),
        listening.output()
    );
    Ok(())
}

fn bounded_resolve(pair: &Pair, product: &Product<'_>, way: &[&str; 2]) -> anyhow::Result<String> {
    let arguments: Vec<String> = [GUEST_UUID, way[0], way[1]]
        .map(str::to_owned)
        .into_iter()
        .collect();
    let mut running = product.start_with("resolve", &arguments, &[], &pair.file("resolve.log"))?;
    let code = running.wait(TALK_MAX)?;
    assert_eq!(code, 0, "resolve: {}", running.output());
    Ok(running.output())
}

fn resolve(product: &Product<'_>, words: &[&str]) -> anyhow::Result<()> {
    let mut command = product.command(&["resolve", GUEST_UUID]);
    let Output { status, stderr, .. } = command.args(words).output()?;
    assert!(
        status.success(),
        "resolve {words:?}: {}",
        String::from_utf8_lossy(&stderr)
    );
    Ok(())
}

/// A QEMU that is gone runs nothing.
fn runs(guest: &Guest) -> bool {
    // `cont` may have been asked for a moment ago.
    clock::wait_until("the guest", Duration::from_secs(2), || {
        Ok(guest.is_running().unwrap_or(false).then_some(()))
    })
    .is_ok()
}

/// One test per place, so that each has a name and a time of its own.
macro_rules! places {
    ($($test:ident: $point:literal => $expected:ident,)*) => {$(
        #[test]
        fn $test() -> anyhow::Result<()> {
            check($point, Place::$expected)
        }
    )*};
}

places! {
    target_before_loaded: "target-before-loaded" => Source,
    target_after_loaded: "target-after-loaded" => Source,
    source_before_shut: "source-before-shut" => Source,
    source_after_shut: "source-after-shut" => Source,
    source_before_intent: "source-before-intent" => Source,
    source_after_intent: "source-after-intent" => Source,
    source_after_commit: "source-after-commit" => Target,
    target_before_committed: "target-before-committed" => Source,
    target_after_committed: "target-after-committed" => Target,
    target_after_cont: "target-after-cont" => Target,
    target_after_running: "target-after-running" => Target,
    source_before_retire: "source-before-retire" => Target,
    source_after_retire: "source-after-retire" => Target,
}
