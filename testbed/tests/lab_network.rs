//! The lab's hosts: kept apart, joined by the link alone, and gone without a trace.

use std::path::Path;
use std::process::Stdio;

use testbed::lab::{CLIENT_ADDRESS, Lab, LabOptions, USER_ADDRESS};
use testbed::requirement::{NETWORK, met};
use testbed_link::named;

/// Hosts have their own names, and neither can open a file of the other, by no path.
#[test]
fn hosts_cannot_open_each_others_files() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    let lab = Lab::start(&options("lan-500m")?)?;
    let inside = Path::new("/run/host/secret");
    for (host, other) in [(&lab.cloud, &lab.client), (&lab.client, &lab.cloud)] {
        std::fs::write(host.outside(inside), host.name())?;
        let own = host.output(host.command("cat").arg(inside))?;
        assert_eq!(own, host.name());
        let name = host.output(&mut host.command("hostname"))?;
        assert_eq!(name.trim(), host.name());
        // The path on the machine, and the way through the holder's root.
        let on_machine = host.outside(inside);
        let by_process = format!("/proc/{}/root/run/host/secret", host.holder());
        for path in [on_machine.as_path(), Path::new(&by_process)] {
            let error = other
                .output(other.command("cat").arg(path))
                .unwrap_err()
                .to_string();
            assert!(error.contains("No such file or directory"), "{error}");
        }
        for shared in ["/dev/shm", "/tmp", "/run"] {
            let file = format!("{shared}/of-{}", host.name());
            host.output(host.command("touch").arg(&file))?;
            assert!(!Path::new(&file).exists(), "{file} is on the machine");
            other.output(other.command("ls").arg(&file)).unwrap_err();
        }
    }
    Ok(())
}

/// Cloud and user are neighbours; the client is one round trip of the link away.
#[test]
fn only_the_link_joins_client_and_cloud() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    let lab = Lab::start(&options("wan-100m")?)?;
    let ping = |host: &testbed::host::Host, to: &str| -> anyhow::Result<f64> {
        let text = host.output(
            host.command("ping")
                .args(["-c", "5", "-i", "0.1", "-W", "1", "-q", to]),
        )?;
        let line = text.lines().last().unwrap_or_default();
        let mean = line.split('/').nth(4).unwrap_or_default();
        Ok(mean.parse()?)
    };
    let near = ping(&lab.cloud, USER_ADDRESS)?;
    let far = ping(&lab.cloud, CLIENT_ADDRESS)?;
    let user = ping(&lab.user, CLIENT_ADDRESS)?;
    println!("cloud-user {near} ms, cloud-client {far} ms, user-client {user} ms");
    assert!(near < 2.0, "{near}");
    assert!((49.9..52.0).contains(&far), "{far}");
    assert!((49.9..52.0).contains(&user), "{user}");
    let counters = lab.wan.counters()?;
    assert_eq!(counters.to_client.offered_packets, 10);
    assert_eq!(counters.wire_bytes(), 20 * 84);
    lab.wan.cut()?;
    assert!(ping(&lab.cloud, CLIENT_ADDRESS).is_err());
    lab.wan.mend()?;
    lab.change_client_address(true)?;
    assert!(ping(&lab.cloud, CLIENT_ADDRESS).is_err());
    let moved = ping(&lab.cloud, testbed::lab::CLIENT_ADDRESS_2)?;
    assert!((49.9..52.0).contains(&moved), "{moved}");
    Ok(())
}

/// A dropped lab leaves no process and no file.
#[test]
fn dropped_lab_is_gone() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    let lab = Lab::start(&options("lan-500m")?)?;
    let (dir, holder) = (lab.dir().to_owned(), lab.cloud.holder());
    let mut sleeper = lab.cloud.command("sleep");
    let mut sleeper = lab.cloud.spawn(sleeper.arg("600").stdin(Stdio::null()))?;
    let pid = sleeper.pid()?;
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    drop(lab);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(!Path::new(&format!("/proc/{holder}")).exists());
    assert!(!dir.exists());
    Ok(())
}

fn options(link: &str) -> anyhow::Result<LabOptions> {
    let mut options = LabOptions::new(named(link).expect("a named link"))?;
    options.program = env!("CARGO_BIN_EXE_testbed").into();
    Ok(options)
}
