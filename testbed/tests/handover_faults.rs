//! `kill -9` of either agent between every two steps of the handover: the guest never runs twice,
//! and `status` and `resolve` lead to where it runs once.
//!
//! The product dies at a named place (`SCALEAWAY_FAULT`); docs/handover.md has the steps.

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
const TRIES_MAX: usize = 4;
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

    let story = way_out(&pair, source_dies, survivor)?;
    let said = || {
        format!(
            "{point}\n{story}send:\n{}\nreceive:\n{}",
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

/// What a user does: looks at `status`, resolves, and looks again, a few times at most. What was
/// tried is told when it does not help.
fn way_out(pair: &Pair, source_died: bool, survivor: &mut Running) -> anyhow::Result<String> {
    let mut story = String::new();
    for _ in 0..TRIES_MAX {
        let survives = survivor.wait(ALONE_MAX).is_err();
        let unsettled = unsettled(pair)?;
        if !survives && unsettled.is_empty() {
            return Ok(story);
        }
        if survives {
            // It waits for its peer; `resolve` takes the dead agent's place, in its own way.
            let (died, way) = match source_died {
                true => (&pair.cloud, "--to"),
                false => (&pair.client, "--listen"),
            };
            story += &resolve(pair, died, &[way, &pair.address()])?;
            continue;
        }
        for (is_source, advice) in unsettled {
            story += &format!("advice (source: {is_source}): {advice}\n");
            let product = if is_source { &pair.cloud } else { &pair.client };
            if advice.contains("--listen") {
                story += &both_resolve(pair)?;
            } else {
                let side = if advice.contains("--here") {
                    "--here"
                } else {
                    "--there"
                };
                story += &resolve(pair, product, &[side])?;
            }
        }
    }
    Ok(story)
}

/// (is it the source, advice) of each side that has something open.
fn unsettled(pair: &Pair) -> anyhow::Result<Vec<(bool, String)>> {
    let mut found = Vec::new();
    for (product, is_source) in [(&pair.client, false), (&pair.cloud, true)] {
        let status = product.status()?;
        for vm in status
            .as_array()
            .into_iter()
            .flatten()
            .filter(|vm| vm["settled"] != true)
        {
            found.push((
                is_source,
                vm["advice"].as_str().unwrap_or_default().to_owned(),
            ));
        }
    }
    Ok(found)
}

/// Both agents are gone: the two hosts' `resolve` talk.
fn both_resolve(pair: &Pair) -> anyhow::Result<String> {
    let address = pair.address();
    let arguments = |way: &str| vec![GUEST_UUID.to_owned(), way.to_owned(), address.clone()];
    let log = pair.file("resolve-target.log");
    let mut listening = pair
        .client
        .start_with("resolve", &arguments("--listen"), &[], &log)?;
    listening.wait_listening()?;
    let dialing = resolve(pair, &pair.cloud, &["--to", &address])?;
    let code = listening.wait(TALK_MAX)?;
    Ok(format!(
        "{dialing}resolve --listen: {code}\n{}\n",
        listening.output()
    ))
}

fn resolve(pair: &Pair, product: &Product<'_>, words: &[&str]) -> anyhow::Result<String> {
    let arguments: Vec<String> = [GUEST_UUID]
        .iter()
        .chain(words)
        .map(|word| (*word).to_owned())
        .collect();
    let mut running = product.start_with("resolve", &arguments, &[], &pair.file("resolve.log"))?;
    let code = match running.wait(TALK_MAX) {
        Ok(code) => code.to_string(),
        Err(_) => "killed, since it did not end".to_owned(),
    };
    running.kill();
    Ok(format!("resolve {words:?}: {code}\n{}\n", running.output()))
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
