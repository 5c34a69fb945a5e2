//! `--hook PROGRAM`: told of phases, beside the data path.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// Who is told, and as whom.
#[derive(Debug, Clone)]
pub(crate) struct Hook {
    pub(crate) program: Option<PathBuf>,
    pub(crate) limit: Duration,
    pub(crate) vm: String,
    pub(crate) peer: String,
    pub(crate) role: &'static str,
}

/// The phases that a hook is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HookPhase {
    Started,
    Stopped,
    Running,
    Failed,
}

impl HookPhase {
    fn name(self) -> &'static str {
        match self {
            HookPhase::Started => "started",
            HookPhase::Stopped => "stopped",
            HookPhase::Running => "running",
            HookPhase::Failed => "failed",
        }
    }
}

/// Waits for a call that was started; it ends within its limit.
pub(crate) async fn finish(told: Option<tokio::task::JoinHandle<()>>) {
    if let Some(told) = told
        && let Err(error) = told.await
    {
        tracing::debug!(%error, "hook task");
    }
}

impl Hook {
    /// Starts the program and returns its task; a caller that ends awaits it so that the last phase
    /// is still told.
    pub(crate) fn call(&self, phase: HookPhase) -> Option<tokio::task::JoinHandle<()>> {
        let program = self.program.clone()?;
        let mut command = Command::new(&program);
        command
            .arg(phase.name())
            .env("SCALEAWAY_VM", &self.vm)
            .env("SCALEAWAY_PEER", &self.peer)
            .env("SCALEAWAY_ROLE", self.role)
            .stdin(Stdio::null())
            // Its words go to the log's stream: stdout is for scripts.
            .stdout(std::io::stderr())
            .kill_on_drop(true);
        let limit = self.limit;
        Some(tokio::spawn(async move {
            let run = async { command.spawn()?.wait().await };
            match tokio::time::timeout(limit, run).await {
                Ok(Ok(status)) if status.success() => {}
                Ok(Ok(status)) => {
                    tracing::warn!(program = %program.display(), phase = phase.name(), %status, "hook failed");
                }
                Ok(Err(error)) => {
                    tracing::warn!(program = %program.display(), phase = phase.name(), %error, "hook cannot run");
                }
                Err(_) => {
                    tracing::warn!(program = %program.display(), phase = phase.name(), "hook killed: over its time");
                }
            }
        }))
    }
}
