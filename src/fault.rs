//! Places where a test may kill this process: `SCALEAWAY_FAULT=NAME` ends it with SIGKILL there, as
//! a power cut would. The names are the arrows of docs/handover.md; unset, this costs a look at the
//! environment per handover step.

/// Dies here if the environment says so.
pub(crate) fn point(name: &str) {
    if std::env::var_os("SCALEAWAY_FAULT").is_some_and(|wanted| wanted == name) {
        tracing::warn!(name, "fault point: killing this process");
        let killed =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        assert!(killed.is_ok(), "a process may kill itself");
    }
}

/// The same after what was handed to the network has had time to leave: a kill right after a write
/// would take the bytes with it.
pub(crate) async fn point_once_sent(name: &str) {
    if std::env::var_os("SCALEAWAY_FAULT").is_some_and(|wanted| wanted == name) {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        point(name);
    }
}
