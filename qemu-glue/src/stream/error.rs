//! What can be wrong with a source's stream.

/// Where the parser stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Header, configuration and its subsections.
    Head,
    /// Between sections, before RAM's last one.
    Sections,
    /// Inside a ram section.
    Ram,
    /// Inside a dirty-bitmap section.
    DirtyBitmap,
    /// In the device state or the description at the end.
    Tail,
}

/// A stream that is broken, or that needs something that this program does not do.
///
/// `Unsupported..` is a proper stream with something unknown in it: before the first page the
/// migration may go on as a byte relay ([`StreamError::may_relay`]).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The first bytes are not a migration stream.
    #[error("not a migration stream: magic {magic:#010x}, version {version}")]
    NotAStream {
        /// Found instead of "QEVM".
        magic: u32,
        /// Found instead of 3.
        version: u32,
    },
    /// A subsection of the configuration is unknown; its length cannot be told.
    #[error("unknown configuration subsection {name:?}")]
    UnsupportedConfiguration {
        /// Its name.
        name: String,
    },
    /// The source uses a capability that changes the stream's layout.
    #[error("capability {name:?} of the source is not supported")]
    UnsupportedCapability {
        /// Its name.
        name: String,
    },
    /// The guest's pages are not 4 KiB.
    #[error("guest pages of 2^{bits} bytes are not supported")]
    UnsupportedPageSize {
        /// Binary logarithm of the page size.
        bits: u32,
    },
    /// A section that is not known, or in a version or place that is not known.
    #[error("unknown section {name:?} (instance {instance}, version {version})")]
    UnsupportedSection {
        /// Its name.
        name: String,
        /// Its instance.
        instance: u32,
        /// Its version.
        version: u32,
    },
    /// A command that no pre-copy source sends to a plain target.
    #[error("command {number} with {length} bytes is not supported")]
    UnsupportedCommand {
        /// Its number.
        number: u16,
        /// Bytes of its payload.
        length: u16,
    },
    /// A ram record with flags that are not known, such as those of removed compression.
    #[error("ram record with unknown flags {flags:#05x}")]
    UnsupportedRamRecord {
        /// Low twelve bits of the record's word.
        flags: u64,
    },
    /// A dirty-bitmap chunk with unknown flags.
    #[error("dirty-bitmap chunk with unknown flags {flags:#04x}")]
    UnsupportedBitmapChunk {
        /// The chunk's flag byte.
        flags: u8,
    },
    /// What comes before the first page is larger than the limit.
    #[error("more than {max} bytes before the first page")]
    PreludeTooLarge {
        /// The limit in bytes.
        max: usize,
    },
    /// Header and configuration are larger than the limit.
    #[error("header and configuration of more than {max} bytes")]
    HeadTooLarge {
        /// The limit in bytes.
        max: usize,
    },
    /// The block list is refused.
    #[error("block list: {0}")]
    Blocks(&'static str),
    /// A ram record does not fit the block list or its own layout.
    #[error("ram record: {0}")]
    RamRecord(&'static str),
    /// A byte where a section's type should be, or a section out of order.
    #[error("section type {0:#04x} is out of place")]
    SectionType(u8),
    /// A PART or END section that no START opened or that has ended, or a number used twice.
    #[error("section number {0} does not fit the sections that are open")]
    SectionNumber(u32),
    /// A section without its footer.
    #[error("section {expected} ends without its footer")]
    Footer {
        /// The section's number.
        expected: u32,
    },
    /// The stream ended before it was complete.
    #[error("the stream ends too early ({0:?})")]
    Truncated(Place),
    /// The stream ended with a zero byte and without a description: complete if, and only if, the
    /// source's machine suppresses the description.
    #[error("the stream ends without a description of the devices")]
    NoDescription,
    /// The parser was used after an error.
    #[error("the stream already failed")]
    AlreadyFailed,
}

impl StreamError {
    /// Whether the stream may go on as a byte relay, provided that no page was seen
    /// ([`super::Parser::take_prelude`] knows).
    pub fn may_relay(&self) -> bool {
        match self {
            Self::UnsupportedConfiguration { .. }
            | Self::UnsupportedSection { .. }
            | Self::UnsupportedCommand { .. }
            | Self::UnsupportedRamRecord { .. }
            | Self::UnsupportedBitmapChunk { .. }
            | Self::UnsupportedPageSize { .. } => true,
            // Memory outside the stream: a relay would start a guest without it.
            Self::UnsupportedCapability { .. }
            | Self::NotAStream { .. }
            | Self::PreludeTooLarge { .. }
            | Self::HeadTooLarge { .. }
            | Self::Blocks(_)
            | Self::RamRecord(_)
            | Self::SectionType(_)
            | Self::SectionNumber(_)
            | Self::Footer { .. }
            | Self::Truncated(_)
            | Self::NoDescription
            | Self::AlreadyFailed => false,
        }
    }
}
