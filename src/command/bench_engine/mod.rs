//! `scaleaway bench engine`: what the engine carries on this host, without QEMU and without a link.
//!
//! ```text
//! synthetic guest -> lanes (encode) -> QUIC over loopback -> lanes (decode, check) -> memory
//! ```
//!
//! Both ends run in this process, so each figure is what half of this host's cores can do.
//! Reading order: this file, `guest` (the pages), `transfer` (one run).

mod guest;
mod transfer;

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde::Serialize;
use transport::block::{BatchStats, Disable};

use crate::progress::say;
use guest::{Class, Guest, Mix};
use transfer::{Pair, Transfer};

/// Measure the engine on this host: synthetic guest memory through all of it, over loopback.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct BenchEngineArgs {
    /// Guest memory of each run.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=16_384))]
    pub(crate) memory: u32,
    /// Shares of the mixed guest, such as zero=40,text=25,heap=25,random=10.
    #[arg(
        long,
        value_name = "CLASS=SHARE,…",
        default_value = "zero=40,text=25,heap=25,random=10"
    )]
    pub(crate) mix: Mix,
    /// zstd level of literal pages.
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-7..=19))]
    pub(crate) level: i32,
    /// Threads that encode, and as many that decode; default: half of the cores.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) threads: Option<u8>,
    /// Switch a stage off (same, zero, copy, known, delta, literal, raw).
    #[arg(long, value_name = "STAGE")]
    pub(crate) disable: Vec<String>,
    /// One JSON document instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// One row of the table.
#[derive(Debug, Clone, Serialize)]
struct Row {
    guest: &'static str,
    guest_bytes: u64,
    lane_bytes: u64,
    ms: f64,
    guest_bytes_per_s: f64,
    cpu_s: f64,
    pages: Pages,
}

/// Pages by encoding.
#[derive(Debug, Clone, Serialize)]
struct Pages {
    same: u64,
    zero: u64,
    copy: u64,
    delta: u64,
    literal: u64,
    raw: u64,
}

/// The whole measurement.
#[derive(Debug, Serialize)]
struct Measured {
    schema: u32,
    software: &'static str,
    memory_bytes: u64,
    threads: usize,
    level: i32,
    runs: Vec<Row>,
}

/// Runs each guest once and prints what it took.
///
/// # Errors
/// A stage that does not exist, no memory, or loopback sockets that fail.
pub(crate) async fn run(args: BenchEngineArgs) -> Result<ExitCode> {
    let mut disable = Disable::default();
    for stage in &args.disable {
        disable.add(stage)?;
    }
    let threads = args.threads.map_or_else(
        || std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1)),
        usize::from,
    );
    let transfer = Transfer {
        level: args.level,
        disable,
        threads,
    };
    let mut runs = Vec::new();
    let mut show = |row: Row| {
        if !args.json {
            if runs.is_empty() {
                say(&heading(&args, threads));
            }
            say(&line(&row));
        }
        runs.push(row);
    };
    for class in Class::ALL {
        let pair = Pair::of(Guest::new(args.memory, &Mix::only(class)));
        show(row(class.name(), transfer.run(&pair).await?));
    }
    let pair = Pair::of(Guest::new(args.memory, &args.mix));
    show(row("mix", transfer.run(&pair).await?));
    let took = transfer.run_again(&pair, |_| {}).await?;
    show(row("mix, nothing changed", took));
    let took = transfer.run_again(&pair, Guest::touch_tenth).await?;
    show(row("mix, a tenth changed", took));
    if !pair.is_equal() {
        bail!("the memory that arrived differs from the guest's");
    }
    if args.json {
        let measured = Measured {
            schema: 1,
            software: concat!("scaleaway ", env!("CARGO_PKG_VERSION")),
            memory_bytes: u64::from(args.memory) << 20,
            threads,
            level: args.level,
            runs,
        };
        say(&serde_json::to_string(&measured)?);
    }
    Ok(ExitCode::SUCCESS)
}

fn row(guest: &'static str, took: transfer::Took) -> Row {
    let BatchStats {
        same,
        zero,
        copy,
        delta,
        literal,
        raw,
        ..
    } = took.stats;
    Row {
        guest,
        guest_bytes: took.guest_bytes,
        lane_bytes: took.lane_bytes,
        ms: took.span.as_secs_f64() * 1e3,
        guest_bytes_per_s: to_f64(took.guest_bytes) / took.span.as_secs_f64(),
        cpu_s: took.cpu_s,
        pages: Pages {
            same: same.pages,
            zero: zero.pages,
            copy: copy.pages,
            delta: delta.pages,
            literal: literal.pages,
            raw: raw.pages,
        },
    }
}

fn heading(args: &BenchEngineArgs, threads: usize) -> String {
    format!(
        "{} MiB of guest memory, level {}, {threads} thread(s) at each end, loopback, both ends on this host\n\
         {:<22} {:>9} {:>10} {:>9} {:>8} {:>8}",
        args.memory, args.level, "guest", "MiB/s", "lanes MB", "x smaller", "CPU s", "s"
    )
}

fn line(row: &Row) -> String {
    let smaller = if row.lane_bytes == 0 {
        "all".to_owned()
    } else {
        format!("{:.1}", to_f64(row.guest_bytes) / to_f64(row.lane_bytes))
    };
    format!(
        "{:<22} {:>9.0} {:>10.2} {:>9} {:>8.2} {:>8.2}",
        row.guest,
        row.guest_bytes_per_s / f64::from(1 << 20),
        to_f64(row.lane_bytes) / 1e6,
        smaller,
        row.cpu_s,
        row.ms / 1e3,
    )
}

#[expect(clippy::cast_precision_loss, reason = "printed with three digits")]
fn to_f64(value: u64) -> f64 {
    value as f64
}
