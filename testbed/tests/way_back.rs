//! A guest's way back: its state after a stay, what both ends of the product have kept, the other
//! direction of the link, and what a call of the lab leaves behind.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use serde_json::Value;
use testbed::guest::{Guest, Image, Machine, Place};
use testbed::pair::TestFolder;
use testbed::progress::Progress;
use testbed::requirement::{GUESTS, met};

const PROGRAM: &str = env!("CARGO_BIN_EXE_testbed");

/// The product and QEMU each move the small guest from client to cloud; the results say so, the page
/// shows both, and a second call takes all runs over.
#[test]
fn smoke_back() -> anyhow::Result<()> {
    if !met(&GUESTS)? {
        return Ok(());
    }
    let results = TestFolder::new("way-back")?;
    let run = || {
        Command::new(PROGRAM)
            .args(["run", "smoke-back", "--resume"])
            .arg(results.path())
            .output()
            .context("cannot start the lab")
    };
    let first = run()?;
    let said = String::from_utf8_lossy(&first.stdout).into_owned();
    let errors = String::from_utf8_lossy(&first.stderr).into_owned();
    assert!(first.status.success(), "{said}\n{errors}");
    assert!(
        said.contains("scaleaway / qemu-multifd-zstd: wire bytes"),
        "{said}"
    );

    let text = fs::read(results.path().join("smoke-back/report.json"))?;
    let document: Value = serde_json::from_slice(&text)?;
    assert_eq!(document["guest"]["past"]["stay"]["seconds"], 5);
    let runs = document["runs"].as_array().context("runs are a list")?;
    assert_eq!(runs.len(), 2);
    for run in runs {
        assert_eq!(run["outcome"], "arrived", "{run}");
        assert_eq!(run["self_check_errors"], 0, "{run}");
    }

    let again = run()?;
    let errors = String::from_utf8_lossy(&again.stderr).into_owned();
    assert_eq!(errors.matches("taken over").count(), 2, "{errors}");

    let page = Command::new(PROGRAM)
        .arg("report")
        .arg(results.path())
        .output()?;
    assert!(page.status.success());
    let page = fs::read_to_string(results.path().join("report.html"))?;
    assert!(page.contains("qemu-multifd-zstd") && page.contains("</html>"));
    Ok(())
}

/// Commands run in the guest to their end, one that fails is an error, and the guest's own work goes
/// on beside them.
#[test]
fn commands_run_in_the_guest() -> anyhow::Result<()> {
    if !met(&GUESTS)? {
        return Ok(());
    }
    let folder = TestFolder::new("commands")?;
    let image = Image::ready(&Progress::silent())?;
    let guest = Guest::boot(Place::Here, &image, &Machine::small(), folder.path())?;
    guest.wait_ready()?;
    let control = guest.control()?;
    let limit = Duration::from_secs(20);
    let before = control.next()?;
    control.run("echo text >/tmp/written && sleep 1", limit)?;
    control.run("grep -q text /tmp/written", limit)?;
    let error = control.run("exit 7", limit).unwrap_err().to_string();
    assert_eq!(error, "`exit 7` ended with 7 in the guest");
    assert!(control.next()?.count > before.count + 50);
    Ok(())
}
