//! The lab's command line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use clap::{Parser, Subcommand};

use crate::arm::{QEMU_ARMS, STAGES};
use crate::link_run;
use crate::progress::Progress;
use crate::report::{Document, Folder, table};
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
    /// Run a scenario and print its table.
    Run {
        /// FAMILY/LINK, link/LINK, demo or smoke.
        name: String,
        /// An arm instead of the scenario's own; may be given again.
        #[arg(long = "arm")]
        arms: Vec<String>,
        /// Runs of each arm.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..1000))]
        repeat: u32,
        /// Leave the files of each lab behind, and say where.
        #[arg(long)]
        keep: bool,
        /// Go on in the folder of an earlier call.
        #[arg(long, value_name = "DIR")]
        resume: Option<PathBuf>,
        /// Write the report here as well.
        #[arg(long, value_name = "FILE")]
        report: Option<PathBuf>,
    },
    /// Print the table of an earlier call.
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
                name,
                arms,
                repeat,
                keep,
                resume,
                report,
            } => {
                let options = Options {
                    arms,
                    repeat,
                    keep,
                    resume,
                    report,
                };
                match name.strip_prefix("link/") {
                    Some(link) => run_link(link, &options),
                    None => run_named(&name, &options),
                }
            }
            Self::Report { dir } => report(&dir).map(|()| true),
        }
    }
}

fn require_root() -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the lab makes network namespaces: run it as root");
    }
    Ok(())
}

fn report(dir: &Path) -> anyhow::Result<()> {
    let folder = Folder::open(dir)?;
    let path = dir.join("report.json");
    let any: Document<serde_json::Value> = folder.document()?;
    match any.kind.as_str() {
        "link" => print(&folder.document()?, link_run::table, &path),
        _ => print(&folder.document()?, table, &path),
    }
    Ok(())
}

fn run_link(link: &str, options: &Options) -> anyhow::Result<bool> {
    require_root()?;
    let progress = Progress::shown();
    let (document, path) = link_run::run(link, options, &progress)?;
    drop(progress);
    print(&document, link_run::table, &path);
    Ok(link_run::all_well(&document))
}

fn run_named(name: &str, options: &Options) -> anyhow::Result<bool> {
    require_root()?;
    let scenario = Scenario::named(name)?;
    let progress = Progress::shown();
    progress.note(&format!("{}: {}", scenario.name, scenario.about));
    let (document, path) = run::migration(&scenario, options, &progress)?;
    drop(progress);
    print(&document, table, &path);
    Ok(run::all_well(&document))
}

#[expect(clippy::print_stdout, reason = "the table is what the command is for")]
fn print<R>(document: &Document<R>, table: fn(&[R]) -> String, path: &Path) {
    print!("\n{}\n{}\n", document.scenario, table(&document.runs));
    println!("report: {}", path.display());
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
        "arms\n  scaleaway, scaleaway-no-STAGE for {}",
        STAGES.join(" ")
    );
    for (name, _, _) in QEMU_ARMS {
        println!("  {name}, {name}-cubic");
    }
    println!("arms of link/LINK");
    for arm in link_run::LINK_ARMS {
        println!("  {arm}");
    }
    Ok(())
}
