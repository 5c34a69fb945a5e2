//! Which file is mapped at an address, from the text of `/proc/PID/maps`: pure.
//!
//! ```text
//! 7f2c1be00000-7f2c25e00000 rw-s 00000000 00:01 2054   /memfd:memory-backend-memfd (deleted)
//! ```
//! //= linux Documentation/filesystems/proc.rst maps

/// A file by the device and inode that the kernel names it with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    /// Major and minor number of its device.
    pub device: (u32, u32),
    /// Its inode.
    pub inode: u64,
}

/// A part of a file that a process shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedPart {
    /// The file.
    pub file: FileId,
    /// Place of the first byte in it.
    pub offset: u64,
}

/// The file behind `bytes` bytes at `start`.
///
/// # Errors
/// Why there is no such file, in words: a part is private, read-only, of no file, of another file,
/// or not continuous.
pub fn shared_part(maps: &str, start: u64, bytes: u64) -> Result<SharedPart, &'static str> {
    let end = start.checked_add(bytes).ok_or("its address is not sound")?;
    let mut found: Option<SharedPart> = None;
    let mut covered = start;
    for line in maps.lines().filter_map(parse) {
        if line.to <= covered {
            continue;
        }
        if line.from > covered || covered >= end {
            break;
        }
        let part = line.shared(covered)?;
        let expected = found.map_or(Some(part.offset), |first| {
            first.offset.checked_add(covered - start)
        });
        if found.is_some_and(|first| first.file != part.file) || expected != Some(part.offset) {
            return Err("its parts are not one piece of one file");
        }
        found = found.or(Some(part));
        covered = line.to;
    }
    match found {
        Some(part) if covered >= end => Ok(part),
        Some(_) | None => Err("the process has no memory at its address"),
    }
}

struct Line<'a> {
    from: u64,
    to: u64,
    rights: &'a str,
    offset: u64,
    file: FileId,
}

impl Line<'_> {
    fn shared(&self, at: u64) -> Result<SharedPart, &'static str> {
        if !self.rights.ends_with('s') {
            return Err("its memory is private (share=off)");
        }
        if !self.rights.starts_with("rw") {
            return Err("QEMU itself may not write its memory");
        }
        if self.file.inode == 0 {
            return Err("its memory is of no file");
        }
        let offset = self.offset.checked_add(at - self.from);
        Ok(SharedPart {
            file: self.file,
            offset: offset.ok_or("its place in the file is not sound")?,
        })
    }
}

fn parse(line: &str) -> Option<Line<'_>> {
    let mut words = line.split_ascii_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let rights = words.next()?;
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let device = (
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    let inode = words.next()?.parse().ok()?;
    Some(Line {
        from: hex(from)?,
        to: hex(to)?,
        rights,
        offset,
        file: FileId { device, inode },
    })
}

fn hex(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "1000-3000 rw-s 00005000 00:01 7 /memfd:ram (deleted)\n\
        3000-4000 rw-s 00007000 00:01 7 /memfd:ram (deleted)\n\
        4000-5000 rw-s 00000000 00:01 8 /memfd:ram (deleted)\n\
        5000-6000 rw-p 00000000 00:01 9 /memfd:ram (deleted)\n\
        6000-7000 r--s 00000000 00:01 10 /x\n\
        8000-9000 rw-s 00000000 00:00 0\n";

    /// Pieces that continue one another are one part; equal names say nothing.
    #[test]
    fn parts_of_files() {
        let check = |start, bytes, expected: Result<(u64, u64), &str>| {
            let found = shared_part(MAPS, start, bytes);
            let found = found.map(|part| (part.file.inode, part.offset));
            assert_eq!(found, expected, "{start:#x}");
        };
        check(0x1000, 0x3000, Ok((7, 0x5000)));
        check(0x2000, 0x1000, Ok((7, 0x6000)));
        check(
            0x3000,
            0x2000,
            Err("its parts are not one piece of one file"),
        );
        check(0x5000, 0x1000, Err("its memory is private (share=off)"));
        check(0x6000, 0x1000, Err("QEMU itself may not write its memory"));
        check(0x8000, 0x1000, Err("its memory is of no file"));
        check(0x4000, 0x1000, Ok((8, 0)));
        check(
            0x7000,
            0x1000,
            Err("the process has no memory at its address"),
        );
        check(0x8000, 0x2000, Err("its memory is of no file"));
        check(u64::MAX, 2, Err("its address is not sound"));
    }
}
