//! The counter on TCP and on a serial line.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::worker::{Counters, Demands};

const TCP_INTERVAL: Duration = Duration::from_millis(20);
const SERIAL_INTERVAL: Duration = Duration::from_millis(100);
/// A full sweep of a large working set on a slow CPU.
const SWEEP_MAX: Duration = Duration::from_secs(120);
const CONNECTIONS_MAX: usize = 64;

/// Starts to serve; returns once the port is bound.
pub(crate) fn on_tcp(address: &str, counters: &Arc<Counters>, demands: &Demands) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    let (counters, demands) = (Arc::clone(counters), demands.clone());
    let open = Arc::new(AtomicUsize::new(0));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
                open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (counters, demands) = (Arc::clone(&counters), demands.clone());
            let open = Arc::clone(&open);
            thread::spawn(move || {
                // A connection that breaks is the client's affair.
                drop(serve_stream(stream, &counters, &demands));
                open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    Ok(())
}

/// Starts to serve on a terminal device that is already in raw mode.
pub(crate) fn on_serial(
    device: &str,
    counters: &Arc<Counters>,
    demands: &Demands,
) -> io::Result<()> {
    let input = OpenOptions::new().read(true).write(true).open(device)?;
    let output = Arc::new(Mutex::new(input.try_clone()?));
    let (line_output, counters, demands) =
        (Arc::clone(&output), Arc::clone(counters), demands.clone());
    thread::spawn(move || {
        loop {
            pause(SERIAL_INTERVAL);
            write_serial(&line_output, &counter_line(&counters));
        }
    });
    thread::spawn(move || {
        for line in BufReader::new(input).lines().map_while(Result::ok) {
            let line = line.trim();
            if line == "VERIFY" {
                write_serial(&output, &verify(&demands));
            } else if let Some(command) = line.strip_prefix("RUN ") {
                // The counter goes on meanwhile; the next command waits.
                write_serial(&output, &format!("RAN {}\n", run(command)));
            }
        }
    });
    Ok(())
}

/// Runs a shell command to its end; its exit code, or -1 where it had none.
fn run(command: &str) -> i32 {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).stdin(Stdio::null());
    shell
        .status()
        .ok()
        .and_then(|status| status.code())
        .unwrap_or(-1)
}

fn serve_stream(mut stream: TcpStream, counters: &Counters, demands: &Demands) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TCP_INTERVAL))?;
    let mut typed = Vec::new();
    let mut buffer = [0_u8; 64];
    loop {
        stream.write_all(counter_line(counters).as_bytes())?;
        // The read is also the wait for the next line.
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => typed.extend_from_slice(&buffer[..length]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
        while let Some(end) = typed.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = typed.drain(..=end).collect();
            if line.trim_ascii() == b"VERIFY" {
                stream.write_all(verify(demands).as_bytes())?;
            }
        }
        // Nobody sends so long a line in good faith.
        typed.truncate(64);
    }
}

fn counter_line(counters: &Counters) -> String {
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let (count, errors) = (read(&counters.count), read(&counters.errors));
    let (writes, sweeps) = (read(&counters.writes), read(&counters.sweeps));
    format!("COUNT {count} ERRORS {errors} WRITES {writes} SWEEPS {sweeps}\n")
}

fn verify(demands: &Demands) -> String {
    let (sender, answer) = sync_channel(1);
    if demands.try_send(sender).is_err() {
        return "BUSY\n".to_owned();
    }
    match answer.recv_timeout(SWEEP_MAX) {
        Ok(verified) => format!(
            "VERIFIED errors={} pages={}\n",
            verified.errors, verified.pages
        ),
        Err(_) => "BUSY\n".to_owned(),
    }
}

fn write_serial(output: &Mutex<File>, line: &str) {
    let mut file = output.lock().unwrap_or_else(PoisonError::into_inner);
    // A serial line without a reader loses its bytes, as a real one does.
    drop(file.write_all(line.as_bytes()));
}

#[expect(
    clippy::disallowed_methods,
    reason = "a line every so often is what this thread is for"
)]
fn pause(duration: Duration) {
    thread::sleep(duration);
}
