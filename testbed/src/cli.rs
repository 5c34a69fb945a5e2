//! The lab's command line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::{Parser, Subcommand};

use crate::arm::{QEMU_ARMS, STAGES, VARIANTS};
use crate::link_run;
use crate::progress::Progress;
use crate::record::{Recording, record};
use crate::report::{Folder, Results, judged, table, write_page};
use crate::run::{self, Options};
use crate::scenario::{self, Scenario};

/// Scaleaway's lab: moves real guests over emulated links, beside QEMU's own migration.
#[derive(Debug, Parser)]
#[command(name = "testbed")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Names of scenarios, links and arms.
    List,
    /// Run scenarios and print their tables.
    Run {
        /// FAMILY/LINK, link/LINK, demo or smoke; one or more.
        #[arg(required = true)]
        names: Vec<String>,
        /// An arm instead of the scenario's own; may be given again.
        #[arg(long = "arm")]
        arms: Vec<String>,
        /// Runs of each arm.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..1000))]
        repeat: u32,
        /// Leave the files of each lab behind, and say where.
        #[arg(long)]
        keep: bool,
        /// Where results go; runs that an earlier call finished there are not run again.
        #[arg(long, value_name = "DIR")]
        resume: Option<PathBuf>,
        /// Length of the guest's stay at the client, where the scenario is its way back.
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..100_000))]
        stay: Option<u32>,
        /// The longest downtime that all arms are asked for, instead of the scenario's.
        #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..1_000_000))]
        downtime: Option<u64>,
        /// Another QEMU than the installed one, at both ends.
        #[arg(long, value_name = "PROGRAM")]
        qemu: Option<PathBuf>,
        /// A word for the product's `send`; may be given again.
        #[arg(long = "send-flag", value_name = "WORD", allow_hyphen_values = true)]
        send_flags: Vec<String>,
        /// Have the product write down what it sees and decides on the way, for charts over time.
        #[arg(long)]
        trace: bool,
        /// Have the product predict the move before, and compare.
        #[arg(long)]
        plan: bool,
        /// Write the report of the only scenario here as well.
        #[arg(long, value_name = "FILE")]
        report: Option<PathBuf>,
    },
    /// Write down which pages a guest writes, for simulations.
    Record {
        /// Whose guest; that of a way back lives its stay.
        family: String,
        /// Where it goes.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// How long.
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..10_000))]
        seconds: u32,
        /// Time between two readings of its memory.
        #[arg(long, value_name = "MS", default_value_t = 1000,
            value_parser = clap::value_parser!(u64).range(100..60_000))]
        interval: u64,
    },
    /// Print the tables of an earlier call, and write its page with charts.
    Report {
        /// Its folder.
        dir: PathBuf,
    },
}

/// Runs the lab's command line.
pub fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    let result = match crate::internal::run(&arguments) {
        Some(done) => done.map(|()| true),
        None => Cli::parse_from(arguments).verb.run(),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Verb {
    /// Whether all that ran went well.
    fn run(self) -> anyhow::Result<bool> {
        match self {
            Self::List => list().map(|()| true),
            Self::Run {
                names,
                arms,
                repeat,
                keep,
                resume,
                stay,
                downtime,
                qemu,
                send_flags,
                trace,
                plan,
                report,
            } => {
                if report.is_some() && names.len() > 1 {
                    bail!("--report is for one scenario: see `testbed report` for more");
                }
                let folder = match resume {
                    Some(path) => Folder::open(&path)?,
                    None => Folder::new(&names)?,
                };
                let options = Options {
                    arms,
                    repeat,
                    keep,
                    stay,
                    downtime_ms: downtime,
                    qemu,
                    send_flags,
                    trace,
                    plan,
                    folder,
                };
                run_all(&names, &options, report.as_deref())
            }
            Self::Record {
                family,
                out,
                seconds,
                interval,
            } => {
                require_root()?;
                let recording = Recording {
                    family,
                    seconds,
                    interval: Duration::from_millis(interval),
                };
                record(&recording, &out, &Progress::shown()).map(|()| true)
            }
            Self::Report { dir } => report(&Folder::open(&dir)?).map(|()| true),
        }
    }
}

fn require_root() -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the lab makes network namespaces: run it as root");
    }
    Ok(())
}

/// Runs one after the other. A lab that breaks in one scenario does not take the others with it.
fn run_all(names: &[String], options: &Options, copy: Option<&Path>) -> anyhow::Result<bool> {
    require_root()?;
    // A wrong word is found before the first run, which may be hours before the last.
    let mut stays = false;
    for name in names.iter().filter(|name| !name.starts_with("link/")) {
        stays |= Scenario::named(name)?.past.stay.is_some();
    }
    if options.stay.is_some() && !stays {
        bail!("--stay is for a way back: return-FAMILY/LINK");
    }
    let mut well = true;
    let mut broken = Vec::new();
    for name in names {
        match run_one(name, options, copy) {
            Ok(all_well) => well &= all_well,
            Err(error) if names.len() > 1 => {
                eprintln!("testbed: {name}: {error:#}");
                broken.push(name.as_str());
            }
            Err(error) => return Err(error),
        }
    }
    say(&format!("results: {}", options.folder.path().display()));
    if names.len() > 1 {
        write_page(options.folder.path(), &results(&options.folder)?)?;
    }
    if !broken.is_empty() {
        bail!("the lab broke in {}", broken.join(", "));
    }
    Ok(well)
}

fn run_one(name: &str, options: &Options, copy: Option<&Path>) -> anyhow::Result<bool> {
    let progress = Progress::shown();
    let results = match name.strip_prefix("link/") {
        Some(link) => Results::Link(link_run::run(link, options, &progress)?),
        None => {
            let mut scenario = Scenario::named(name)?;
            if let Some(seconds) = options.stay {
                scenario.past.set_stay(seconds);
            }
            if let Some(program) = &options.qemu {
                scenario.machine.qemu.clone_from(program);
            }
            progress.note(&format!("{}: {}", scenario.name, scenario.about));
            Results::Migration(run::migration(&scenario, options, &progress)?)
        }
    };
    drop(progress);
    print(&results);
    match (&results, copy) {
        (Results::Link(document), Some(path)) => crate::report::write(path, document)?,
        (Results::Migration(document), Some(path)) => crate::report::write(path, document)?,
        (_, None) => {}
    }
    Ok(match &results {
        Results::Link(document) => link_run::all_well(document),
        Results::Migration(document) => run::all_well(document),
    })
}

/// Tables of all scenarios in a folder, and the page.
fn report(folder: &Folder) -> anyhow::Result<()> {
    let parts = folder.parts()?;
    if parts.is_empty() {
        bail!("no results in {}", folder.path().display());
    }
    let results: Vec<Results> = parts
        .iter()
        .map(Results::of)
        .collect::<anyhow::Result<_>>()?;
    results.iter().for_each(print);
    let page = write_page(folder.path(), &results)?;
    say(&format!("page: {}", page.display()));
    Ok(())
}

fn results(folder: &Folder) -> anyhow::Result<Vec<Results>> {
    let parts = folder.parts()?;
    if parts.is_empty() {
        bail!("no results in {}", folder.path().display());
    }
    parts.iter().map(Results::of).collect()
}

fn print(results: &Results) {
    let (name, table) = match results {
        Results::Link(document) => (&document.scenario, link_run::table(&document.runs)),
        Results::Migration(document) => {
            let table = table(&document.runs) + &judged(document);
            (&document.scenario, table)
        }
    };
    say(&format!("\n{name}\n{table}"));
}

#[expect(clippy::print_stdout, reason = "tables are what the command is for")]
fn say(text: &str) {
    println!("{text}");
}

#[expect(clippy::print_stdout, reason = "the list is what the command is for")]
fn list() -> anyhow::Result<()> {
    println!("scenarios (FAMILY/LINK, or by itself where the link is given)");
    for (name, about, link) in scenario::families()? {
        let link = link.map_or(String::new(), |link| format!(" [{link}]"));
        println!("  {name:<16} {about}{link}");
    }
    println!("links");
    for link in testbed_link::LINKS {
        println!("  {}", link.name);
    }
    println!(
        "arms\n  none: the guest stays\n  scaleaway, scaleaway-no-STAGE for {}",
        STAGES.join(" ")
    );
    for (variant, flags) in VARIANTS {
        println!("  scaleaway-{variant}: send {}", flags.join(" "));
    }
    for (name, _, _) in QEMU_ARMS {
        println!("  {name}, {name}-cubic");
    }
    println!("arms of link/LINK");
    for arm in link_run::LINK_ARMS {
        println!("  {arm}");
    }
    println!("two flows at once, if asked for");
    for arm in link_run::PAIR_ARMS {
        println!("  {arm}");
    }
    Ok(())
}
