//! Changed pages packed with their neighbours into one zstd frame: a batch of 64 pages shrinks
//! to a third where single pages would stay at two fifths.

use std::fmt;
use std::io;

use zstd::bulk::{Compressor, Decompressor};

/// Compression level where nothing else is asked.
pub const LEVEL_DEFAULT: i32 = 3;

/// A frame must be smaller than its pages by this part, or the pages go raw.
const SHRINK_MIN_PART: usize = 16;

/// Compresses pages with one context that is used again.
pub(super) struct Packer {
    compressor: Compressor<'static>,
    frame: Vec<u8>,
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

impl Packer {
    /// # Errors
    /// When zstd has no memory for a context.
    pub(super) fn new(level: i32, input_max_bytes: usize) -> io::Result<Self> {
        let frame = vec![0; zstd::zstd_safe::compress_bound(input_max_bytes)];
        Ok(Self {
            compressor: Compressor::new(level)?,
            frame,
        })
    }

    /// # Errors
    /// When zstd has no memory for a context.
    pub(super) fn set_level(&mut self, level: i32) -> io::Result<()> {
        self.compressor.set_compression_level(level)
    }

    /// Packs pages into one frame, `None` when that is not worth it.
    pub(super) fn pack(&mut self, pages: &[u8]) -> io::Result<Option<&[u8]>> {
        let bytes = self
            .compressor
            .compress_to_buffer(pages, self.frame.as_mut_slice())?;
        Ok((bytes <= pages.len() - pages.len() / SHRINK_MIN_PART).then(|| &self.frame[..bytes]))
    }
}

/// Decompresses frames into memory of a known size with one context that is used again.
pub(super) struct Unpacker(Decompressor<'static>);

impl fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Unpacker")
    }
}

impl Unpacker {
    /// # Errors
    /// When zstd has no memory for a context.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Decompressor::new()?))
    }

    /// Decompresses a frame to exactly `pages`; whatever the frame claims, no byte more is written.
    pub(super) fn unpack(&mut self, frame: &[u8], pages: &mut [u8]) -> Result<(), BadFrame> {
        match self.0.decompress_to_buffer(frame, pages) {
            Ok(bytes) if bytes == pages.len() => Ok(()),
            Ok(_) | Err(_) => Err(BadFrame),
        }
    }
}

/// The frame is no zstd frame of the announced size.
#[derive(Debug)]
pub(super) struct BadFrame;
