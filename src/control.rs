//! The control socket of a running `send` or `receive`: `STATE_DIR/run/VM.sock`, mode 0600, one
//! JSON object a line each way.
//!
//! ```text
//! {"command":"status"}                    -> the latest progress object
//! {"command":"set","downtime_ms":500}     -> {"ok":true}
//! {"command":"set","max_bandwidth_bps":0} -> {"ok":true}     0 = no cap
//! {"command":"set","yield_ms":5}          -> {"ok":true}     0 = fill the link
//! {"command":"set","when_stuck":"force"}  -> {"ok":true}
//! {"command":"abort"}                     -> {"ok":true} or {"ok":false,"error":"..."}
//! ```

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::journal::safe_name;
use crate::state_dir::StateDir;

/// Longest request line.
const LINE_MAX_BYTES: u64 = 4096;
/// Longest path of a Unix socket, and the longest last part of ours.
const PATH_MAX_BYTES: usize = 107;
const LONGEST_KIND: &str = "incoming";
/// Requests that may wait.
const WAITING_MAX: usize = 16;

/// What an operator asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "command", deny_unknown_fields)]
pub(crate) enum Command {
    Status,
    Set(Setting),
    Abort,
}

/// What is changed; the rest stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Setting {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) downtime_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_bandwidth_bps: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) yield_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) when_stuck: Option<String>,
}

/// A request and where its answer goes.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) command: Command,
    pub(crate) answer: oneshot::Sender<serde_json::Value>,
}

/// Asks the running `send` or `receive` of this VM.
pub(crate) async fn call(
    state: &StateDir,
    vm: &str,
    command: &Command,
) -> anyhow::Result<serde_json::Value> {
    let path = socket_path(state, vm, "sock")?;
    let stream = UnixStream::connect(&path).await.with_context(|| {
        format!("no send or receive of {vm} runs with this state dir: `scaleaway status` lists what is known")
    })?;
    let (reader, mut writer) = stream.into_split();
    let line = serde_json::to_string(command)? + "\n";
    writer.write_all(line.as_bytes()).await?;
    let mut answer = String::new();
    BufReader::new(reader)
        .take(LINE_MAX_BYTES)
        .read_line(&mut answer)
        .await?;
    serde_json::from_str(&answer).context("the migration ended before it answered")
}

/// The listening socket; its file goes with it.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl ControlSocket {
    /// Binds it. The caller holds the VM's journal lock, so a file that is there is stale.
    pub(crate) fn bind(
        state: &StateDir,
        vm: &str,
    ) -> anyhow::Result<(ControlSocket, mpsc::Receiver<Request>)> {
        let path = socket_path(state, vm, "sock")?;
        if path.exists() {
            std::fs::remove_file(&path)?;
        }
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("cannot listen on the control socket {}", path.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, sender.clone()));
            }
        });
        Ok((ControlSocket { path, task }, receiver))
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.task.abort();
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, "control socket file was gone");
        }
    }
}

/// `STATE_DIR/run/VM.KIND`, with a clear word where the system would refuse its length.
pub(crate) fn socket_path(state: &StateDir, vm: &str, kind: &str) -> anyhow::Result<PathBuf> {
    let folder = state.folder("run")?;
    let longest = folder.join(format!("{}.{LONGEST_KIND}", safe_name(vm)));
    anyhow::ensure!(
        longest.as_os_str().len() <= PATH_MAX_BYTES,
        "sockets would lie at {}, which is longer than {PATH_MAX_BYTES} bytes: give a shorter --state-dir",
        longest.display()
    );
    Ok(folder.join(format!("{}.{kind}", safe_name(vm))))
}

async fn serve(stream: UnixStream, requests: mpsc::Sender<Request>) {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = String::new();
        let mut bounded = (&mut reader).take(LINE_MAX_BYTES);
        match bounded.read_line(&mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let answer = match serde_json::from_str::<Command>(&line) {
            Ok(command) => ask(command, &requests).await,
            Err(error) => serde_json::json!({"ok": false, "error": error.to_string()}),
        };
        if writer
            .write_all(format!("{answer}\n").as_bytes())
            .await
            .is_err()
        {
            return;
        }
    }
}

async fn ask(command: Command, requests: &mpsc::Sender<Request>) -> serde_json::Value {
    let (answer, reply) = oneshot::channel();
    let gone = || serde_json::json!({"ok": false, "error": "the migration has ended"});
    if requests.send(Request { command, answer }).await.is_err() {
        return gone();
    }
    reply.await.unwrap_or_else(|_| gone())
}
