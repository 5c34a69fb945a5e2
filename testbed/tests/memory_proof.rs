//! What the target holds is proved from real memory, and blocks outside of guest RAM travel too.

use std::time::Duration;

use anyhow::Context;
use serde_json::json;
use testbed::clock;
use testbed::guest::{Bytes, Machine, compare};
use testbed::pair::Pair;
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(90);

fn can_run() -> anyhow::Result<bool> {
    Ok(met(&GUESTS)? && met(&[Requirement::Product])?)
}

/// S10: a byte of the source's RAM changes behind QEMU's back after its page was sent. What was sent
/// agrees with what arrived, so only a look at real memory can tell; then the guest stays.
#[test]
fn memory_that_differs_from_what_was_sent_is_found() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let pair = Pair::new("spoiled", &Machine::small())?;
    let receive = pair.receive(&["--verify", "full"])?;
    let mut send = pair.send(&["--max-bandwidth", "60M"])?;
    clock::wait_until("the end of the first pass", MOVE_MAX, || {
        let state = pair.source.monitor().execute("query-migrate", &json!({}))?;
        let passes = state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
        let left = state["ram"]["remaining"].as_u64().unwrap_or(u64::MAX);
        Ok((passes > 1 || left < 4096 * 300).then_some(()))
    })?;
    let memory = Bytes::of(&pair.source)?;
    // The last pages of RAM are free: the guest was given more than it uses.
    let page = zero_page_from_the_end(&memory, "pc.ram")?;
    memory.spoil("pc.ram", page, b"spoiled")?;

    assert_eq!(
        send.wait(MOVE_MAX)?,
        1,
        "{}\n{}",
        send.output(),
        receive.output()
    );
    assert!(pair.source.is_running()?);
    assert_eq!(pair.running_max(), 1);
    Ok(())
}

/// S9: a page outside of guest RAM that is zero at the source and not at the target: it is sent as
/// every other, and the target's is zero after the move.
#[test]
fn a_zero_page_of_a_rom_is_sent() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let pair = Pair::new("rom", &Machine::small())?;
    let (source, target) = (Bytes::of(&pair.source)?, Bytes::of(&pair.target)?);
    let mut spoiled = Vec::new();
    for (block, _) in source.blocks() {
        if block == "pc.ram" {
            continue;
        }
        if let Ok(page) = zero_page_from_the_end(&source, block) {
            target.spoil(block, page, b"not zero")?;
            spoiled.push((block.to_owned(), page));
        }
    }
    assert!(
        !spoiled.is_empty(),
        "no block outside of RAM has a zero page: {:?}",
        source.blocks()
    );

    let mut receive = pair.receive(&["--paused", "--verify", "full"])?;
    let mut send = pair.send(&["--keep-source"])?;
    let (sent, received) = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    assert_eq!(
        (sent, received),
        (0, 0),
        "{}\n{}",
        send.output(),
        receive.output()
    );
    for (block, page) in &spoiled {
        assert!(
            target.page(block, *page)?.iter().all(|byte| *byte == 0),
            "{block}, page {page}"
        );
    }
    assert_eq!(compare(&pair.source, &pair.target)?.differing(), 0);
    Ok(())
}

/// S5: the guest stops unasked in the middle of pre-copy, far more pages than the budget unsent. It
/// arrives whole, or stays whole; and it stays stopped, since that is what it was.
#[test]
fn an_unasked_stop_loses_nothing() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let pair = Pair::new("unasked-stop", &Machine::small())?;
    let mut receive = pair.receive(&["--verify", "full"])?;
    let mut send = pair.send(&["--keep-source", "--max-bandwidth", "40M"])?;
    clock::wait_until("the first pages", MOVE_MAX, || {
        let state = pair.source.monitor().execute("query-migrate", &json!({}))?;
        Ok((state["ram"]["transferred"].as_u64().unwrap_or(0) > 4 << 20).then_some(()))
    })?;
    pair.source.monitor().execute("stop", &json!({}))?;
    let (sent, received) = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    assert_eq!(
        (sent, received),
        (0, 0),
        "{}\n{}",
        send.output(),
        receive.output()
    );
    assert_eq!(pair.target.monitor().run_state()?, "paused");
    assert_eq!(compare(&pair.source, &pair.target)?.differing(), 0);
    pair.target.monitor().execute("cont", &json!({}))?;
    assert_eq!(pair.target.control()?.verify()?.errors, 0);
    assert_eq!(pair.running_max(), 1);
    Ok(())
}

fn zero_page_from_the_end(memory: &Bytes, block: &str) -> anyhow::Result<u64> {
    let pages = memory
        .blocks()
        .into_iter()
        .find(|(name, _)| *name == block)
        .map_or(0, |(_, pages)| pages);
    for page in (0..pages).rev() {
        if memory.page(block, page)?.iter().all(|byte| *byte == 0) {
            return Ok(page);
        }
    }
    None.with_context(|| format!("{block} has no zero page"))
}
