//! The commands that turn a stream into a post-copy one. The captured guest knows nothing of it: the
//! target is told which pages it lacks, runs with its devices, and asks for them.
//!
//! ```text
//! head, OPEN_RETURN_PATH, ADVISE, PING, ram_start .. pages ..     erases RAM: nothing before it stays
//! DISCARD*, PACKAGED{ LISTEN, devices, PING, RUN }                the guest may run
//! ram parts, each lacking page once                               answers and the rest
//! ram end, EOF                                                    complete
//!
//! broken: a new connection, RECV_BITMAP*, RESUME, ram parts ..    the target says what it has
//! ```
//!
//! `//= qemu migration/savevm.c, loadvm_process_command; migration/ram.c, ram_load_postcopy`

use super::writer::push_name;
use super::{
    COMMAND_PACKAGED, COMMAND_PING, COMMAND_POSTCOPY_ADVISE, COMMAND_POSTCOPY_LISTEN,
    COMMAND_POSTCOPY_RAM_DISCARD, COMMAND_POSTCOPY_RESUME, COMMAND_POSTCOPY_RUN,
    COMMAND_RECV_BITMAP, PAGE_SIZE_U64, Phase, RamBlock, TYPE_COMMAND, TYPE_DESCRIPTION, TYPE_EOF,
    WriteError, Writer,
};

/// Version of the discard command's payload.
const DISCARD_VERSION: u8 = 0;
/// Runs in one discard command: its length is 16 bits.
const DISCARD_MAX_RUNS: usize = 1024;
/// Bytes of EOF, type and length in front of a description.
const DESCRIPTION_HEAD: usize = 6;

impl Writer {
    /// Announces post-copy of RAM with 4 KiB pages on both sides. It *erases* the target's RAM, so it
    /// stands before the first page.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] after the block list.
    pub fn postcopy_advise(&mut self) -> Result<(), WriteError> {
        self.between("the post-copy advice")?;
        if self.phase.is_some() {
            return Err(WriteError::OutOfOrder("the post-copy advice"));
        }
        // Host page sizes (a set of bits), and the target's page size.
        put_command(&mut self.out, COMMAND_POSTCOPY_ADVISE, 16);
        self.out.extend_from_slice(&PAGE_SIZE_U64.to_be_bytes());
        self.out.extend_from_slice(&PAGE_SIZE_U64.to_be_bytes());
        Ok(())
    }

    /// The target throws these runs (first page, number) of a block away: it will ask for them.
    ///
    /// # Errors
    /// [`WriteError::NoSuchPage`], or [`WriteError::OutOfOrder`] inside a ram section or before one.
    pub fn postcopy_discard(&mut self, block: u16, runs: &[(u32, u32)]) -> Result<(), WriteError> {
        self.between("a discard")?;
        let missing = |page| WriteError::NoSuchPage { block, page };
        let known = self.blocks.get(usize::from(block)).ok_or(missing(0))?;
        let outside = |(first, count): &&(u32, u32)| {
            *count == 0
                || first
                    .checked_add(*count)
                    .is_none_or(|end| end > known.pages)
        };
        if let Some((first, _)) = runs.iter().find(outside) {
            return Err(missing(*first));
        }
        for runs in runs.chunks(DISCARD_MAX_RUNS) {
            // At most 3 + 255 + 16 * 1024 bytes.
            let payload = 3 + known.name.len() + 16 * runs.len();
            let payload = u16::try_from(payload).map_err(|_| WriteError::Blocks)?;
            put_command(&mut self.out, COMMAND_POSTCOPY_RAM_DISCARD, payload);
            self.out.push(DISCARD_VERSION);
            push_name(&mut self.out, known.name.as_bytes());
            self.out.push(0);
            for (first, count) in runs {
                for pages in [first, count] {
                    let bytes = u64::from(*pages) * PAGE_SIZE_U64;
                    self.out.extend_from_slice(&bytes.to_be_bytes());
                }
            }
        }
        Ok(())
    }

    /// The target watches its RAM, loads these devices ([`devices_of`]), answers the ping and runs
    /// (or is paused, when it was stopped before). Loading devices may already ask for pages.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] inside a ram section, before RAM or after its end;
    /// [`WriteError::Blocks`] for devices above 4 GiB.
    pub fn postcopy_package(&mut self, devices: &[u8], ping: u32) -> Result<(), WriteError> {
        self.between("the package")?;
        if self.phase.is_none() {
            return Err(WriteError::OutOfOrder("the package"));
        }
        let mut package = Vec::with_capacity(devices.len() + 32);
        put_command(&mut package, COMMAND_POSTCOPY_LISTEN, 0);
        package.extend_from_slice(devices);
        put_command(&mut package, COMMAND_PING, 4);
        package.extend_from_slice(&ping.to_be_bytes());
        put_command(&mut package, COMMAND_POSTCOPY_RUN, 0);
        let length = u32::try_from(package.len()).map_err(|_| WriteError::Blocks)?;
        put_command(&mut self.out, COMMAND_PACKAGED, 4);
        self.out.extend_from_slice(&length.to_be_bytes());
        self.out.extend_from_slice(&package);
        Ok(())
    }

    /// Every page is there: ends RAM and the stream.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] inside a ram section or after the end.
    pub fn postcopy_end(&mut self) -> Result<(), WriteError> {
        self.ram_begin(Phase::Complete)?;
        self.ram_end()?;
        self.out.push(TYPE_EOF);
        Ok(())
    }

    /// A writer for a new connection to a target whose post-copy stream broke: no head, no block
    /// list.
    pub fn postcopy_again(section_id: u32, blocks: &[RamBlock]) -> Self {
        let mut writer = Self::new();
        writer.section_id = section_id;
        writer.phase = Some(Phase::Iterate);
        writer.blocks = blocks.to_vec();
        writer
    }

    /// Asks which pages of a block the target has.
    ///
    /// # Errors
    /// [`WriteError::NoSuchPage`], or [`WriteError::OutOfOrder`] inside a ram section.
    pub fn postcopy_ask_bitmap(&mut self, block: u16) -> Result<(), WriteError> {
        self.between("a question")?;
        let known = self.blocks.get(usize::from(block));
        let known = known.ok_or(WriteError::NoSuchPage { block, page: 0 })?;
        let length = u16::try_from(known.name.len() + 1).map_err(|_| WriteError::Blocks)?;
        put_command(&mut self.out, COMMAND_RECV_BITMAP, length);
        push_name(&mut self.out, known.name.as_bytes());
        Ok(())
    }

    /// The target goes on: it asks again for what its guest waits for.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] inside a ram section.
    pub fn postcopy_resume(&mut self) -> Result<(), WriteError> {
        self.between("the resumption")?;
        put_command(&mut self.out, COMMAND_POSTCOPY_RESUME, 0);
        Ok(())
    }
}

/// The sections of a captured tail without the stream's end (EOF and description), as a package holds
/// them. `None` when the tail does not end like a stream.
#[must_use]
pub fn devices_of(tail: &[u8]) -> Option<&[u8]> {
    let described = |begin: &usize| {
        let head = tail.get(*begin..*begin + DESCRIPTION_HEAD)?;
        let [TYPE_EOF, TYPE_DESCRIPTION, length @ ..] = head else {
            return None;
        };
        let length = usize::try_from(u32::from_be_bytes(length.try_into().ok()?)).ok()?;
        let json = &tail[*begin + DESCRIPTION_HEAD..];
        (json.len() == length && (length == 0 || json.starts_with(b"{"))).then_some(*begin)
    };
    // A description holds no zero byte, so the last one that fits is the true one.
    let begin = (0..tail.len().saturating_sub(DESCRIPTION_HEAD - 1))
        .rev()
        .find_map(|begin| described(&begin));
    match begin {
        Some(begin) => Some(&tail[..begin]),
        None => tail.strip_suffix(&[TYPE_EOF]),
    }
}

fn put_command(out: &mut Vec<u8>, number: u16, length: u16) {
    out.push(TYPE_COMMAND);
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer() -> Writer {
        let blocks = [RamBlock {
            name: "ram".into(),
            pages: 8,
        }];
        Writer::postcopy_again(7, &blocks)
    }

    /// Each command as QEMU reads it.
    #[test]
    fn commands() {
        let mut writer = writer();
        writer.postcopy_discard(0, &[(1, 2)]).unwrap();
        let bytes = b"\x08\0\x06\0\x16\0\x03ram\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x20\0";
        assert_eq!(writer.take(), bytes);
        writer.postcopy_package(b"\x04..", 9).unwrap();
        let bytes = b"\x08\0\x07\0\x04\0\0\0\x16\x08\0\x04\0\0\x04..\x08\0\x02\0\x04\0\0\0\x09\x08\0\x05\0\0";
        assert_eq!(writer.take(), bytes);
        writer.postcopy_ask_bitmap(0).unwrap();
        writer.postcopy_resume().unwrap();
        assert_eq!(writer.take(), b"\x08\0\x0a\0\x04\x03ram\x08\0\x09\0\0");
        writer.postcopy_end().unwrap();
        let bytes = b"\x03\0\0\0\x07\0\0\0\0\0\0\0\x10\x7e\0\0\0\x07\0";
        assert_eq!(writer.take(), bytes);
        let mut first = Writer::new();
        first.postcopy_advise().unwrap();
        let bytes = b"\x08\0\x03\0\x10\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0";
        assert_eq!(first.take(), bytes);
    }

    /// What QEMU would refuse is not written.
    #[test]
    fn refused() {
        let mut writer = writer();
        assert!(matches!(
            writer.postcopy_discard(0, &[(7, 2)]),
            Err(WriteError::NoSuchPage { page: 7, .. })
        ));
        assert!(matches!(
            writer.postcopy_discard(1, &[]),
            Err(WriteError::NoSuchPage { block: 1, .. })
        ));
        assert_eq!(
            writer.postcopy_advise(),
            Err(WriteError::OutOfOrder("the post-copy advice"))
        );
        writer.postcopy_end().unwrap();
        assert!(writer.postcopy_package(b"", 1).is_err());
        assert!(Writer::new().postcopy_package(b"", 1).is_err());
    }

    /// The end of a stream is cut off whole, and only that.
    #[test]
    fn tails() {
        let check = |tail: &[u8], devices: Option<&[u8]>| assert_eq!(devices_of(tail), devices);
        check(b"\x04dev\0\x06\0\0\0\x02{}", Some(b"\x04dev"));
        check(b"\x04dev\0\x06\0\0\0\0", Some(b"\x04dev"));
        check(b"\x04dev\0", Some(b"\x04dev"));
        check(
            b"\x04\0\x06\0\0\0\x02{}\0\x06\0\0\0\x02{}",
            Some(b"\x04\0\x06\0\0\0\x02{}"),
        );
        check(b"\x04dev\0\x06\0\0\0\x03{}", None);
        check(b"", None);
    }
}
