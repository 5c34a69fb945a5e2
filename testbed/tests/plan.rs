//! The product says what a move would be like, and the move then happens.

use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use testbed::guest::Machine;
use testbed::pair::Pair;
use testbed::product::Running;
use testbed::requirement::{GUESTS, Requirement, met};

const PLAN_MAX: Duration = Duration::from_secs(60);
const MOVE_MAX: Duration = Duration::from_secs(90);

fn can_run() -> anyhow::Result<bool> {
    Ok(met(&GUESTS)? && met(&[Requirement::Product])?)
}

/// `plan` asks a `receive` that waits; that one waits on and takes the guest, and both the report and the
/// history know what was predicted. Nothing of the guest has changed by being looked at.
#[test]
fn a_plan_and_then_the_move() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let pair = Pair::new("plan", &Machine::small())?;
    let mut receive = pair.receive(&[])?;
    let mut plan = start_plan(&pair, &["--to", &pair.address(), "--json"])?;
    assert_eq!(plan.wait(PLAN_MAX)?, 0, "{}", plan.output());
    let said = document(&plan)?;
    assert_eq!(said["schema"], 1, "{said}");
    for key in ["total_ms", "downtime_ms", "wire_bytes"] {
        let (low, high) = range(&said[key])?;
        assert!(low > 0.0 && high <= 2.0 * low + 2.0, "{key}: {said}");
    }
    let measured = &said["measured"];
    assert!(measured["target"]["qemu"].is_string(), "{said}");
    let pages = measured["guest"]["pages_total"].as_u64();
    assert!(pages.is_some_and(|pages| pages >= 160 * 256), "{said}");
    let zero = measured["guest"]["zero_share"].as_f64();
    assert!(
        zero.is_some_and(|share| (0.01..0.99).contains(&share)),
        "{said}"
    );
    assert_eq!(said["settings"]["mapped"], true, "{said}");
    assert_eq!(pair.source.monitor().run_state()?, "running");
    assert_eq!(receive.exit_code()?, None, "{}", receive.output());

    let mut send = pair.send(&[])?;
    let (sent, received) = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    let output = || format!("send:\n{}\nreceive:\n{}", send.output(), receive.output());
    assert_eq!((sent, received), (0, 0), "{}", output());
    let report = pair.report("send")?;
    assert_eq!(
        report["predicted"]["total_ms"], said["total_ms"],
        "{report}"
    );
    assert_eq!(
        report["predicted"]["wire_bytes"], said["wire_bytes"],
        "{report}"
    );
    let history = std::fs::read_to_string(pair.file("cloud-state/history/moves.jsonl"))?;
    assert_eq!(history.lines().count(), 1, "{history}");
    let record: Value = serde_json::from_str(&history)?;
    assert_eq!(record["total_ms"], report["total_ms"]);
    assert!(record["predicted"]["total_ms"].is_f64(), "{history}");
    assert_eq!(pair.target.control()?.verify()?.errors, 0);
    Ok(())
}

/// A host without a QEMU answers probes, whoever dials; a guest that is sent there stays, and is told why.
/// What earlier moves teach is used, and said.
#[test]
fn a_target_that_only_answers() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let pair = Pair::new("plan-probe", &Machine::small())?;
    let address = pair.address();
    let arguments = words(&["--probe", "--from", &address]);
    let mut dialling = pair
        .client
        .start("receive", &arguments, &pair.file("dialling.log"))?;
    let link = ["--listen", &address, "--max-bandwidth", "40M", "--yield"];
    let rule = ["--when-stuck", "force", "--timeout", "90"];
    let encoding = ["--level", "5", "--disable", "delta", "--json"];
    let mut plan = start_plan(&pair, &[&link[..], &rule[..], &encoding[..]].concat())?;
    assert_eq!(plan.wait(PLAN_MAX)?, 0, "{}", plan.output());
    let said = document(&plan)?;
    assert_eq!(said["measured"]["target"]["qemu"], Value::Null, "{said}");
    let goodput = said["measured"]["link"]["goodput_bps"].as_f64();
    assert!(
        goodput.is_some_and(|bps| bps < 50e6),
        "a cap is kept: {said}"
    );
    let settings = &said["settings"];
    assert_eq!(settings["when_stuck"], "force", "{said}");
    assert_eq!(settings["timeout_s"], 90, "{said}");
    assert_eq!(settings["level"], 5, "{said}");
    assert!(
        said["ends"] == "arrives" || said["ends"] == "forced",
        "{said}"
    );
    assert_eq!(dialling.exit_code()?, None, "{}", dialling.output());
    dialling.kill();

    let arguments = words(&["--probe", "--listen", &address]);
    let mut listening = pair
        .client
        .start("receive", &arguments, &pair.file("listening.log"))?;
    listening.wait_listening()?;
    let mut send = pair.send(&[])?;
    assert_eq!(send.wait(MOVE_MAX)?, 1, "{}", send.output());
    assert!(
        send.output().contains("only answers probes"),
        "{}",
        send.output()
    );
    assert_eq!(pair.source.monitor().run_state()?, "running");
    let mut plan = start_plan(&pair, &["--to", &address])?;
    assert_eq!(plan.wait(PLAN_MAX)?, 0, "{}", plan.output());
    assert!(
        plan.output().contains("no earlier move to learn from"),
        "{}",
        plan.output()
    );
    teach(&pair)?;
    let mut plan = start_plan(&pair, &["--to", &address])?;
    assert_eq!(plan.wait(PLAN_MAX)?, 0, "{}", plan.output());
    assert!(
        plan.output().contains("corrected by 3 earlier moves"),
        "{}",
        plan.output()
    );
    Ok(())
}

/// Three moves that took twice as long as was predicted.
fn teach(pair: &Pair) -> anyhow::Result<()> {
    let record = json!({
        "time_s": 1, "vm": "vm", "peer": pair.client.fingerprint()?, "rate_bps": null, "rtt_min_ms": null,
        "pages_total": null, "wire_bytes": 1000, "total_ms": 2000, "downtime_ms": 100,
        "predicted": { "total_ms": 1000.0, "downtime_ms": 100.0, "wire_bytes": 1000.0 },
    });
    let folder = pair.file("cloud-state/history");
    std::fs::create_dir_all(&folder)?;
    let moves = format!("{record}\n").repeat(3);
    Ok(std::fs::write(folder.join("moves.jsonl"), moves)?)
}

fn start_plan(pair: &Pair, words: &[&str]) -> anyhow::Result<Running> {
    let monitor = pair.source.product_monitor().display().to_string();
    let mut arguments = self::words(&["--qmp", &monitor]);
    arguments.extend(self::words(words));
    pair.cloud.start("plan", &arguments, &pair.file("plan.log"))
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| (*word).to_owned()).collect()
}

/// The document, among lines of the log.
fn document(plan: &Running) -> anyhow::Result<Value> {
    let output = plan.output();
    let from = output.find("{\n").context("no document")?;
    let to = output.rfind("\n}").context("no whole document")? + 2;
    serde_json::from_str(&output[from..to]).with_context(|| output.clone())
}

fn range(value: &Value) -> anyhow::Result<(f64, f64)> {
    let of = |key: &str| value[key].as_f64().context("no range");
    Ok((of("low")?, of("high")?))
}
