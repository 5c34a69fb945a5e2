//! The frames of post-copy, both ways.

use bytes::{BufMut, BytesMut};

use super::read::{Body, at_most, run};
use super::write::{bounded, put_runs};
use crate::block::{ABSENT_RANGE_BYTES, AbsentRange, index, length_u16};
use crate::wire::limits::{ABSENT_MAX_RANGES, MISSING_MAX_RUNS, URGENT_MAX_PAGES};
use crate::wire::{Frame, WireError};

pub(super) fn put(frame: &Frame, out: &mut BytesMut) -> Result<(), WireError> {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the caller gives these only"
    )]
    match frame {
        Frame::Absent { ranges, more } => {
            bounded("ranges", ranges.len(), ABSENT_MAX_RANGES)?;
            out.put_u8(u8::from(*more));
            for range in ranges {
                out.put_u32(range.range);
                out.put_slice(&range.pages);
            }
        }
        Frame::Wanted { runs } => {
            bounded("runs", runs.len(), MISSING_MAX_RUNS)?;
            put_runs(runs, out);
        }
        Frame::Urgent { digest, runs, data } => {
            bounded("runs", runs.len(), URGENT_MAX_PAGES)?;
            out.put_slice(digest);
            out.put_u16(length_u16(runs.len()));
            put_runs(runs, out);
            out.put_slice(data);
        }
        _ => {}
    }
    Ok(())
}

pub(super) fn read_absent(body: &mut Body) -> Result<Frame, WireError> {
    const ENTRY_BYTES: usize = 4 + ABSENT_RANGE_BYTES;
    let more = body.flag("more")?;
    let entries = body.list::<ENTRY_BYTES>("ranges", ABSENT_MAX_RANGES)?;
    let ranges = entries.iter().map(|entry| {
        let (range, pages) = entry.split_first_chunk().expect("an entry is longer");
        AbsentRange {
            range: u32::from_be_bytes(*range),
            pages: *pages.first_chunk().expect("an entry is that long"),
        }
    });
    Ok(Frame::Absent {
        ranges: ranges.collect(),
        more,
    })
}

pub(super) fn read_urgent(body: &mut Body) -> Result<Frame, WireError> {
    let digest = body.array("digest")?;
    let count = usize::from(body.u16("runs")?);
    at_most("runs", count, URGENT_MAX_PAGES)?;
    let mut runs = Vec::with_capacity(count);
    for _ in 0..count {
        runs.push(run(body.array("run")?));
    }
    let pages: u32 = runs.iter().map(|run| u32::from(run.count)).sum();
    at_most("pages", index(pages), URGENT_MAX_PAGES)?;
    let data = body.rest.split_to(body.rest.len());
    Ok(Frame::Urgent { digest, runs, data })
}
