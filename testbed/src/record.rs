//! Records which pages a real guest writes, for simulations of the pre-copy's rule.
//!
//! The guest's RAM is read again and again, and each page is compared with what it was: pages that
//! were written with what they held before do not count, unlike in QEMU's dirty log. A reading takes
//! a part of the interval; each page is still looked at once in each.
//!
//! The file is text: lines that start with `#` are remarks, the first other line has the number of
//! pages that it speaks of and the interval in ms, and each further line the pages that were
//! written in one interval. Pages that were empty at the start and never written are left out and
//! the others are numbered without gaps, so that small numbers say as much: `GAP` or `GAP+LENGTH`,
//! where the gap is counted from the end of the run before, and a length of 1 is not written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::clock;
use crate::guest::{Guest, Image, Network, Place, State};
use crate::pair::TestFolder;
use crate::progress::Progress;
use crate::scenario::Scenario;

const PAGE_BYTES: usize = 4096;
const CHUNK_BYTES: usize = 4 << 20;
/// Any link does: nothing is moved.
const LINK: &str = "lan-500m";

/// What is recorded.
#[derive(Clone, Debug)]
pub struct Recording {
    /// A family.
    pub family: String,
    /// How long.
    pub seconds: u32,
    /// Time between two readings.
    pub interval: Duration,
}

/// Records a guest from its saved state on into a file. A guest with a stay lives its stay.
///
/// # Errors
/// When the guest does not start, or its memory cannot be read in the interval.
pub fn record(recording: &Recording, out: &Path, progress: &Progress) -> anyhow::Result<()> {
    let family = &recording.family;
    let scenario =
        Scenario::named(&format!("{family}/{LINK}")).or_else(|_| Scenario::named(family))?;
    let image = Image::ready(progress)?;
    let (machine, past) = (&scenario.machine, &scenario.past);
    let state = State::after(&image, machine, &past.before_stay(), progress)?;
    let folder = TestFolder::new("record")?;
    let (files, network) = ((&image).into(), Network::Nothing);
    let guest = State::restore(
        state.file(),
        Place::Here,
        &files,
        machine,
        &network,
        folder.path(),
    )?;
    let control = guest.control()?;
    let bytes = u64::from(machine.memory_mib) << 20;
    let mut memory = Memory::first(ram(&guest, bytes)?)?;
    if let Some(command) = past.stay.as_ref().and_then(|stay| stay.run.as_ref()) {
        let seconds = recording.seconds.to_string();
        control.begin(&command.replace("{seconds}", &seconds))?;
    }
    let written = readings(recording, &mut memory, progress)?;
    let text = text(recording, &memory.with_content, &written);
    fs::write(out, text).with_context(|| format!("cannot write {}", out.display()))?;
    let all: usize = written.iter().map(BTreeSet::len).sum();
    progress.note(&format!(
        "{family}: {} pages with content, {all} written in {} intervals",
        memory.with_content.len(),
        written.len()
    ));
    Ok(())
}

/// The pages that were written in each interval.
fn readings(
    recording: &Recording,
    memory: &mut Memory,
    progress: &Progress,
) -> anyhow::Result<Vec<BTreeSet<u32>>> {
    let interval_ms = u32::try_from(recording.interval.as_millis())?.max(1);
    let count = recording.seconds.saturating_mul(1000) / interval_ms;
    let mut due = clock::now();
    let mut written = Vec::new();
    for number in 0..count {
        due += recording.interval;
        clock::pause(due.saturating_duration_since(clock::now()));
        let pages = memory.changed()?;
        let late = clock::now().saturating_duration_since(due);
        ensure!(
            late < recording.interval,
            "reading the guest's memory takes {} ms: give a longer interval",
            late.as_millis()
        );
        progress.detail(&format!("{number} of {count}: {} pages", pages.len()));
        written.push(pages);
    }
    Ok(written)
}

/// A guest's RAM as it was at the last reading.
struct Memory {
    /// QEMU's own descriptor of it.
    file: File,
    last: Vec<u8>,
    /// Pages that held something at the first reading.
    with_content: BTreeSet<u32>,
}

impl Memory {
    fn first(file: File) -> anyhow::Result<Self> {
        let bytes = usize::try_from(file.metadata()?.len())?;
        let mut memory = Self {
            file,
            last: vec![0; bytes],
            with_content: BTreeSet::new(),
        };
        memory.with_content = memory.changed()?;
        Ok(memory)
    }

    /// Reads all of it but its holes; the pages that differ from the last reading.
    fn changed(&mut self) -> anyhow::Result<BTreeSet<u32>> {
        let mut changed = BTreeSet::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut place = 0;
        while let Some((from, to)) = self.data(place)? {
            place = from;
            while place < to {
                let len = usize::try_from((to - place).min(CHUNK_BYTES as u64))?;
                let now = &mut chunk[..len];
                self.file.read_exact_at(now, place)?;
                let first = usize::try_from(place)?;
                let last = &mut self.last[first..first + len];
                let pages = now.chunks(PAGE_BYTES).zip(last.chunks_mut(PAGE_BYTES));
                for (number, (now, last)) in (first / PAGE_BYTES..).zip(pages) {
                    if now != last {
                        last.copy_from_slice(now);
                        changed.insert(u32::try_from(number)?);
                    }
                }
                place += u64::try_from(len)?;
            }
        }
        Ok(changed)
    }

    /// The next part that holds something.
    fn data(&self, from: u64) -> anyhow::Result<Option<(u64, u64)>> {
        match seek(&self.file, SeekFrom::Data(from)) {
            Ok(begin) => Ok(Some((begin, seek(&self.file, SeekFrom::Hole(begin))?))),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error).context("look for the next part of the guest's memory"),
        }
    }
}

/// The memfd that QEMU has the guest's RAM in.
fn ram(guest: &Guest, bytes: u64) -> anyhow::Result<File> {
    let folder = format!("/proc/{}/fd", guest.pid());
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))? {
        let path = entry?.path();
        let is_memfd =
            fs::read_link(&path).is_ok_and(|name| name.to_string_lossy().starts_with("/memfd:"));
        if !is_memfd {
            continue;
        }
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        if file.metadata()?.len() == bytes {
            return Ok(file);
        }
    }
    bail!("QEMU has no memfd of {bytes} bytes: the guest's RAM is private")
}

fn text(recording: &Recording, with_content: &BTreeSet<u32>, written: &[BTreeSet<u32>]) -> String {
    let mut used = with_content.clone();
    written.iter().for_each(|pages| used.extend(pages));
    let numbers: BTreeMap<u32, u32> = used.iter().copied().zip(0..).collect();
    let interval_ms = recording.interval.as_millis();
    let mut text = format!(
        "# testbed record {} --seconds {} --interval {interval_ms}\n{} {interval_ms}\n",
        recording.family,
        recording.seconds,
        used.len()
    );
    for pages in written {
        let places: Vec<u32> = pages.iter().map(|page| numbers[page]).collect();
        text.push_str(&runs(&places));
        text.push('\n');
    }
    text
}

/// Ascending numbers as runs.
fn runs(numbers: &[u32]) -> String {
    let mut words = Vec::new();
    let mut end = 0;
    for run in numbers.chunk_by(|one, next| one + 1 == *next) {
        let [first, ..] = run else { continue };
        let gap = first - end;
        words.push(match run.len() {
            1 => gap.to_string(),
            length => format!("{gap}+{length}"),
        });
        end = run.last().map_or(end, |last| last + 1);
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gaps and lengths, from the first number on.
    #[test]
    fn runs_of_numbers() {
        assert_eq!(runs(&[0, 1, 2, 5, 9, 10]), "0+3 2 3+2");
        assert_eq!(runs(&[7]), "7");
        assert_eq!(runs(&[]), "");
    }

    /// Pages that never held anything take no number; an interval without a write is an empty line.
    #[test]
    fn whole_text() {
        let recording = Recording {
            family: "cold-idle".to_owned(),
            seconds: 1,
            interval: Duration::from_millis(500),
        };
        let with_content = [100, 101, 300].into();
        let written = [[101, 200].into(), BTreeSet::new()];
        assert_eq!(
            text(&recording, &with_content, &written),
            "# testbed record cold-idle --seconds 1 --interval 500\n4 500\n1+2\n\n"
        );
    }
}
