//! A verb of the lab's own program at work in a host, which prints one JSON value a line.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context;
use serde::de::DeserializeOwned;

use crate::host::{Host, HostProcess};

/// Values kept: 50 a second for more than five hours.
const VALUES_MAX: usize = 1_000_000;

/// The process and what it has said. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Lines<T> {
    process: HostProcess,
    values: Arc<Mutex<Vec<T>>>,
    reader: JoinHandle<()>,
}

impl<T: DeserializeOwned + Send + Clone + 'static> Lines<T> {
    /// Starts a command made by [`Host::command`]. Lines that are no `T` are passed over.
    pub(super) fn start(host: &Host, command: &mut Command) -> anyhow::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = host.spawn(command)?;
        let stdout = process
            .child()
            .stdout
            .take()
            .context("its output is no pipe")?;
        let values = Arc::<Mutex<Vec<T>>>::default();
        let shared = Arc::clone(&values);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let Ok(value) = serde_json::from_str(&line) else {
                    continue;
                };
                let mut values = shared.lock().unwrap_or_else(PoisonError::into_inner);
                if values.len() < VALUES_MAX {
                    values.push(value);
                }
            }
        });
        Ok(Self {
            process,
            values,
            reader,
        })
    }

    /// What it has said so far.
    pub(super) fn so_far(&self) -> Vec<T> {
        self.values
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Ends it; all that it said.
    pub(super) fn stop(mut self) -> anyhow::Result<Vec<T>> {
        self.process.kill()?;
        self.reader
            .join()
            .map_err(|_| anyhow::anyhow!("reading its output failed"))?;
        Ok(std::mem::take(
            &mut self.values.lock().unwrap_or_else(PoisonError::into_inner),
        ))
    }
}
