//! `scaleaway content`: disk images whose blocks a peer may name instead of sending them.

mod image;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use transport::quic::Fingerprint;
use transport::store::{BlockSource, Share, Shares};

use crate::progress::say;
use crate::state_dir::{StateDir, StateDirArgs};
use crate::trust::Trust;

pub(crate) use image::open_index;

/// Say which disk images a trusted peer may use as known content.
///
/// A guest's memory is full of what its disk holds. Where this host has the guest's disk image (or
/// its base image), a peer that sends a guest names such pages instead of sending them. The peer
/// can find out whether a page that it already has is in the image.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ContentArgs {
    #[command(flatten)]
    pub(crate) state: StateDirArgs,
    #[command(subcommand)]
    pub(crate) verb: ContentVerb,
}

/// What to do with the list.
#[derive(Debug, Clone, clap::Subcommand)]
pub(crate) enum ContentVerb {
    /// Share an image, and everything below it in its backing chain.
    Add {
        /// The disk image.
        path: PathBuf,
        /// A trusted peer that may name its blocks.
        #[arg(long = "peer", value_name = "NAME|FINGERPRINT", required = true)]
        peers: Vec<String>,
        /// How to read it [default: by the end of its name: .qcow2, .raw, .img].
        #[arg(long, value_parser = ["raw", "qcow2"])]
        format: Option<String>,
    },
    /// Show all shared images.
    List {
        /// One JSON array.
        #[arg(long)]
        json: bool,
    },
    /// No longer share an image, and forget its indexes.
    Remove {
        /// The disk image.
        path: PathBuf,
        /// Only for this peer.
        #[arg(long = "peer", value_name = "NAME|FINGERPRINT")]
        peers: Vec<String>,
    },
}

/// Changes or prints the list.
pub(crate) fn run(args: &ContentArgs) -> Result<ExitCode> {
    let state = StateDir::open(&args.state)?;
    match &args.verb {
        ContentVerb::Add {
            path,
            peers,
            format,
        } => add(&state, path, peers, format.as_deref())?,
        ContentVerb::List { json } => list(&state, *json)?,
        ContentVerb::Remove { path, peers } => remove(&state, path, peers)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn add(state: &StateDir, path: &Path, peers: &[String], format: Option<&str>) -> Result<()> {
    let path = path
        .canonicalize()
        .with_context(|| format!("disk image {}", path.display()))?;
    let Some(format) = format.or_else(|| format_by_name(&path)) else {
        bail!(
            "{} does not end in .qcow2, .raw or .img; say --format raw or --format qcow2",
            path.display()
        );
    };
    let keys = keys(state, peers)?;
    let blocks = image::open_image(&path, format)?.blocks();
    let share = Share {
        path: path.clone(),
        format: format.into(),
        peers: keys.iter().map(Fingerprint::to_string).collect(),
    };
    Shares::edit(state.path(), |shares| shares.add(share))?;
    let gib = f64::from(blocks) / f64::from(1 << 18);
    say(&format!("{} is shared: {gib:.1} GiB", path.display()));
    let trust = Trust::load(state)?;
    for (key, name) in keys.into_iter().zip(peers) {
        match trust.secret(key)? {
            Some(secret) => {
                let pages = open_index(state, key, &secret)?.known_pages();
                say(&format!("{name} may name {pages} different blocks"));
            }
            None => say(&format!(
                "{name} has not been met yet; the index is built then"
            )),
        }
    }
    Ok(())
}

/// One image of the list.
#[derive(Debug, Serialize)]
struct Line<'a> {
    path: &'a Path,
    format: &'a str,
    peers: Vec<&'a str>,
    present: bool,
}

fn list(state: &StateDir, json: bool) -> Result<()> {
    let shares = Shares::load(state.path())?;
    let trust = Trust::load(state)?;
    let name = |key: &'_ str| -> String {
        let known = trust.peers().iter();
        let mut known = known.filter(|peer| peer.fingerprint.to_string() == key);
        known
            .next()
            .map_or_else(|| key.to_owned(), |peer| peer.name.clone())
    };
    let named: Vec<Vec<String>> = shares
        .all()
        .iter()
        .map(|share| share.peers.iter().map(|key| name(key)).collect())
        .collect();
    let line = |(share, peers): (&'_ Share, &'_ Vec<String>)| {
        let peers = peers.join(", ");
        let absent = if share.path.exists() { "" } else { " (absent)" };
        format!("{} {} {peers}{absent}", share.path.display(), share.format)
    };
    if json {
        let lines: Vec<Line<'_>> = shares
            .all()
            .iter()
            .zip(&named)
            .map(|(share, peers)| Line {
                path: &share.path,
                format: &share.format,
                peers: peers.iter().map(String::as_str).collect(),
                present: share.path.exists(),
            })
            .collect();
        say(&serde_json::to_string_pretty(&lines)?);
    } else if shares.all().is_empty() {
        say("no disk image is shared");
    } else {
        for shared in shares.all().iter().zip(&named) {
            say(&line(shared));
        }
    }
    Ok(())
}

fn remove(state: &StateDir, path: &Path, peers: &[String]) -> Result<()> {
    // The image may be gone; its place in the list is not.
    let path = path
        .canonicalize()
        .or_else(|_| std::path::absolute(path))
        .with_context(|| format!("disk image {}", path.display()))?;
    let keys = keys(state, peers)?;
    let remove = |shares: &mut Shares| shares.remove(state.path(), &path, &keys);
    if !Shares::edit(state.path(), remove)? {
        bail!("{} is not shared", path.display());
    }
    let with = match peers {
        [] => "anybody".to_owned(),
        peers => peers.join(", "),
    };
    say(&format!(
        "{} is no longer shared with {with}",
        path.display()
    ));
    Ok(())
}

/// The keys of peers that are named or given by fingerprint, each once.
fn keys(state: &StateDir, peers: &[String]) -> Result<Vec<Fingerprint>> {
    let trust = Trust::load(state)?;
    let mut seen = BTreeSet::new();
    let mut keys = Vec::new();
    for peer in peers {
        let named = trust.peers().iter().find(|known| known.name == *peer);
        let key = match named {
            Some(known) => known.fingerprint,
            None => peer.parse().with_context(|| {
                format!(
                    "no peer is named \"{peer}\"; run first: scaleaway trust add {peer} FINGERPRINT"
                )
            })?,
        };
        if !seen.insert(key) {
            bail!("{peer} is named twice");
        }
        keys.push(key);
    }
    Ok(keys)
}

/// By the name alone: what stands in the file may be a guest's.
fn format_by_name(path: &Path) -> Option<&'static str> {
    match path.extension()?.to_str()? {
        "qcow2" => Some("qcow2"),
        "raw" | "img" => Some("raw"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
