//! Header and tables of a qcow2 file, as far as reading needs them.
//!
//! ```text
//! L1 (in memory, at most 32 MiB)  ->  L2 (one cluster, read when asked)  ->  cluster of data
//! ```
//! //= qemu docs/interop/qcow2.txt

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::layer::read_or_zero;
use super::{DiskError, Kind};

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Header of version 2, and of version 3 as far as it is needed.
const HEAD_V2_BYTES: usize = 72;
const HEAD_V3_BYTES: usize = 104;
/// QEMU's own limit.
const L1_MAX_BYTES: u64 = 32 << 20;
/// A block of 4 KiB never spans two clusters; 2 MiB is QEMU's limit.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 12..=21;
const BACKING_NAME_MAX_BYTES: u32 = 1023;
const EXTENSIONS_MAX: usize = 64;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;

/// Incompatible features: refcounts may be off (irrelevant here), metadata is corrupt, data is in
/// another file, compression is not zlib (irrelevant), subclusters.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
const DATA_FILE: u64 = 4;
const COMPRESSION: u64 = 8;
const EXTENDED_L2: u64 = 16;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// A backing file as the header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backing {
    pub(super) name: String,
    pub(super) format: Option<String>,
}

/// See the module's doc.
#[derive(Debug)]
pub(super) struct Qcow2 {
    bytes: u64,
    cluster_bits: u32,
    encrypted: bool,
    l1: Box<[u64]>,
    backing: Option<Backing>,
}

/// What an L2 entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cluster {
    Below,
    Zero,
    Packed,
    At(u64),
}

impl Qcow2 {
    pub(super) fn open(path: &Path, file: &File) -> Result<Self, DiskError> {
        let failed = |cause| DiskError::LocalFile {
            path: path.into(),
            cause,
        };
        let mut head = [0; HEAD_V3_BYTES];
        read_or_zero(file, 0, &mut head).map_err(failed)?;
        let damaged = |what| DiskError::ImageDamaged {
            path: path.into(),
            what,
        };
        let unsupported = |what| DiskError::UnsupportedFeature {
            path: path.into(),
            what,
        };
        if head[..4] != *MAGIC {
            return Err(damaged("it does not begin as one"));
        }
        let header_bytes = match be32(&head, 4) {
            2 => HEAD_V2_BYTES as u64,
            3 => u64::from(be32(&head, 100)),
            _ => return Err(unsupported("another version than 2 or 3")),
        };
        check_features(&head, header_bytes).map_err(|fault| match fault {
            Fault::Damaged(what) => damaged(what),
            Fault::Unsupported(what) => unsupported(what),
        })?;
        let cluster_bits = be32(&head, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(unsupported("clusters below 4 KiB or above 2 MiB"));
        }
        let bytes = be64(&head, 24);
        let l1_entries = u64::from(be32(&head, 36));
        // Each L2 table has cluster size / 8 entries.
        let l1_needed = bytes.div_ceil(1 << (2 * cluster_bits - 3));
        if l1_entries * 8 > L1_MAX_BYTES || l1_entries < l1_needed {
            return Err(damaged("its first table is too long or too short"));
        }
        let l1_bytes = usize::try_from(l1_needed * 8).map_err(|_| damaged("its size"))?;
        let mut table = vec![0; l1_bytes];
        read_or_zero(file, be64(&head, 40) & OFFSET_MASK, &mut table).map_err(failed)?;
        let (entries, _) = table.as_chunks::<8>();
        let backing = read_backing(file, &head, header_bytes).map_err(failed)?;
        Ok(Self {
            bytes,
            cluster_bits,
            encrypted: be32(&head, 32) != 0,
            l1: entries
                .iter()
                .map(|entry| u64::from_be_bytes(*entry))
                .collect(),
            backing,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// What `at` is, and for how many bytes: neighbours of one sort within one L2 table are one
    /// answer. `None`: not in this file.
    pub(super) fn map(&self, file: &File, at: u64, limit: u64) -> io::Result<(Option<Kind>, u64)> {
        let cluster_bytes = 1_u64 << self.cluster_bits;
        let (l1, l2) = self.indexes(at);
        let in_cluster = at % cluster_bytes;
        let last = (at + limit.max(1) - 1) >> self.cluster_bits;
        let clusters_left = last - (at >> self.cluster_bits) + 1;
        let table_left = (1 << (self.cluster_bits - 3)) - l2;
        let entries = self.l2_entries(file, l1, l2, clusters_left.min(table_left))?;
        let mut clusters = entries.iter().map(|entry| self.parse(*entry));
        let first = clusters.next().unwrap_or(Cluster::Below);
        // Data may go on elsewhere in the file: only contiguous clusters are one extent.
        let mut run = 1_u64;
        for next in clusters {
            let continues = match (first, next) {
                (Cluster::At(begin), Cluster::At(here)) => {
                    Some(here) == begin.checked_add(run << self.cluster_bits)
                }
                (first, next) => first == next,
            };
            if !continues {
                break;
            }
            run += 1;
        }
        let kind = match first {
            Cluster::Below => None,
            Cluster::Zero => Some(Kind::Zero),
            Cluster::Packed => Some(Kind::Packed),
            Cluster::At(_) if self.encrypted => Some(Kind::Packed),
            Cluster::At(_) => Some(Kind::Data),
        };
        Ok((kind, limit.min((run << self.cluster_bits) - in_cluster)))
    }

    /// Where a byte of a data cluster lies in the file.
    pub(super) fn host_offset(&self, file: &File, at: u64) -> io::Result<u64> {
        let (l1, l2) = self.indexes(at);
        let entries = self.l2_entries(file, l1, l2, 1)?;
        match entries.first().map(|entry| self.parse(*entry)) {
            Some(Cluster::At(begin)) => Ok(begin + at % (1 << self.cluster_bits)),
            // It was data a moment ago: a VM writes this disk.
            Some(Cluster::Below | Cluster::Zero | Cluster::Packed) | None => {
                Err(io::ErrorKind::StaleNetworkFileHandle.into())
            }
        }
    }

    fn indexes(&self, at: u64) -> (u64, u64) {
        let cluster = at >> self.cluster_bits;
        let l2_bits = self.cluster_bits - 3;
        (cluster >> l2_bits, cluster % (1 << l2_bits))
    }

    /// Entries of an L2 table from `first` on; none when the table is not there.
    fn l2_entries(&self, file: &File, l1: u64, first: u64, count: u64) -> io::Result<Vec<u64>> {
        let entry = usize::try_from(l1).ok().and_then(|l1| self.l1.get(l1));
        let table = entry.map_or(0, |entry| entry & OFFSET_MASK);
        // A table that is not there says for all its clusters that they are below.
        let count = usize::try_from(count).map_err(|_| io::ErrorKind::InvalidData)?;
        if table == 0 {
            return Ok(vec![0; count]);
        }
        let mut bytes = vec![0; count * 8];
        file.read_exact_at(&mut bytes, table + first * 8)?;
        let (entries, _) = bytes.as_chunks::<8>();
        Ok(entries
            .iter()
            .map(|entry| u64::from_be_bytes(*entry))
            .collect())
    }

    fn parse(&self, entry: u64) -> Cluster {
        let offset = entry & OFFSET_MASK;
        if entry & COMPRESSED != 0 {
            Cluster::Packed
        } else if entry & ZERO != 0 {
            Cluster::Zero
        } else if offset == 0 {
            Cluster::Below
        } else {
            Cluster::At(offset)
        }
    }
}

enum Fault {
    Damaged(&'static str),
    Unsupported(&'static str),
}

fn check_features(head: &[u8; HEAD_V3_BYTES], header_bytes: u64) -> Result<(), Fault> {
    if be32(head, 4) == 2 {
        return Ok(());
    }
    if !(HEAD_V3_BYTES as u64..=4096).contains(&header_bytes) {
        return Err(Fault::Damaged("the length of its header"));
    }
    let features = be64(head, 72);
    if features & CORRUPT != 0 {
        return Err(Fault::Damaged("QEMU has marked it as corrupt"));
    }
    if features & DATA_FILE != 0 {
        return Err(Fault::Unsupported("a separate data file"));
    }
    if features & EXTENDED_L2 != 0 {
        return Err(Fault::Unsupported("subclusters"));
    }
    if features & !(DIRTY | COMPRESSION) != 0 {
        return Err(Fault::Unsupported("a feature of a later version"));
    }
    Ok(())
}

fn read_backing(
    file: &File,
    head: &[u8; HEAD_V3_BYTES],
    header_bytes: u64,
) -> io::Result<Option<Backing>> {
    let (at, length) = (be64(head, 8), be32(head, 16));
    if at == 0 || length == 0 {
        return Ok(None);
    }
    if length > BACKING_NAME_MAX_BYTES {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    let name = read_text(file, at, length)?;
    let mut extension = header_bytes;
    for _ in 0..EXTENSIONS_MAX {
        let mut bytes = [0; 8];
        read_or_zero(file, extension, &mut bytes)?;
        let (kind, length) = (be32(&bytes, 0), be32(&bytes, 4));
        if kind == 0 {
            break;
        }
        if kind == EXTENSION_BACKING_FORMAT && length <= BACKING_NAME_MAX_BYTES {
            let format = Some(read_text(file, extension + 8, length)?);
            return Ok(Some(Backing { name, format }));
        }
        extension += 8 + u64::from(length).next_multiple_of(8);
    }
    let format = None;
    Ok(Some(Backing { name, format }))
}

fn read_text(file: &File, at: u64, length: u32) -> io::Result<String> {
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, at)?;
    String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidFilename.into())
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes[at..].first_chunk();
    u32::from_be_bytes(*field.expect("the header's fields lie inside it"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    let field = bytes[at..].first_chunk();
    u64::from_be_bytes(*field.expect("the header's fields lie inside it"))
}
