//! A synthetic guest: pages of known classes from fixed seeds, so that runs can be compared.

use std::io;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};

use transport::block::{BlockSpec, Contents, Layout, PAGE_SIZE, PageAddress, Replica, Sink};

/// What a page is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// All zero.
    Zero,
    /// Words: zstd finds much.
    Text,
    /// Pointers and small numbers, as on a heap: zstd finds some.
    Heap,
    /// Nothing to find.
    Random,
}

impl Class {
    pub(super) const ALL: [Class; 4] = [Class::Zero, Class::Text, Class::Heap, Class::Random];

    pub(super) fn name(self) -> &'static str {
        match self {
            Class::Zero => "zero",
            Class::Text => "text",
            Class::Heap => "heap",
            Class::Random => "random",
        }
    }

    fn fill(self, seed: u64, page: &mut [u8]) {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        match self {
            Class::Zero => page.fill(0),
            Class::Text => fill_text(&mut random, page),
            Class::Heap => fill_heap(&mut random, page),
            Class::Random => {
                for eight in page.as_chunks_mut::<8>().0 {
                    *eight = random.next().to_le_bytes();
                }
            }
        }
    }
}

const WORDS: [&str; 16] = [
    "the", "guest", "moves", "page", "after", "source", "target", "round", "and", "link", "of",
    "memory", "to", "batch", "dirty", "is",
];

fn fill_text(random: &mut Random, page: &mut [u8]) {
    let mut at = 0;
    while at < page.len() {
        let choice = random.next();
        let word = WORDS[usize::try_from(choice % 16).unwrap_or(0)];
        let number = (choice >> 32) % 1000;
        for byte in format!("{word}{number} ").bytes() {
            if let Some(place) = page.get_mut(at) {
                *place = byte;
            }
            at += 1;
        }
    }
}

fn fill_heap(random: &mut Random, page: &mut [u8]) {
    for eight in page.as_chunks_mut::<8>().0 {
        let choice = random.next();
        let value = match choice % 4 {
            0 => 0x7f3a_0000_0000 | (choice >> 40 << 4),
            1 => choice >> 56,
            2 => 0,
            _ => choice >> 24,
        };
        *eight = value.to_le_bytes();
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// Shares of the classes.
#[derive(Debug, Clone)]
pub(crate) struct Mix([u32; 4]);

impl Mix {
    pub(super) fn only(class: Class) -> Mix {
        Mix(Class::ALL.map(|known| u32::from(known == class)))
    }

    /// Class of a page: classes come in runs of 16 pages, as allocations do.
    fn class(&self, page: u32) -> Class {
        let total: u32 = self.0.iter().sum();
        let mut random = Random(u64::from(page / 16).wrapping_mul(0x9e37_79b9) | 1);
        random.next();
        let mut point = u32::try_from(random.next() % u64::from(total.max(1))).unwrap_or(0);
        for (class, share) in Class::ALL.into_iter().zip(self.0) {
            if point < share {
                return class;
            }
            point -= share;
        }
        Class::Zero
    }
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Mix, String> {
        let mut shares = [0; 4];
        for part in text.split(',') {
            let (name, share) = part
                .split_once('=')
                .ok_or_else(|| format!("{part:?} is not CLASS=SHARE"))?;
            let place = Class::ALL.iter().position(|class| class.name() == name);
            let place = place.ok_or_else(|| {
                format!("no class named {name:?}; known are zero, text, heap, random")
            })?;
            shares[place] = share
                .parse::<u16>()
                .map_err(|_| format!("{share:?} is no share"))?
                .into();
        }
        if shares.iter().sum::<u32>() == 0 {
            return Err("all shares are zero".into());
        }
        Ok(Mix(shares))
    }
}

/// Memory of one block. Readers and the one writer of a page meet at a lock per 2 MiB.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) layout: Arc<Layout>,
    pieces: Vec<RwLock<Vec<u8>>>,
}

const PIECE_BYTES: usize = 2 << 20;

impl Memory {
    fn new(memory_mib: u32) -> Memory {
        let block = BlockSpec {
            name: "ram".into(),
            pages: memory_mib * 256,
        };
        let layout = Layout::new(vec![block]).expect("one block of some pages");
        let pieces = u64::from(memory_mib).div_ceil(2);
        Memory {
            layout: Arc::new(layout),
            pieces: (0..pieces)
                .map(|_| RwLock::new(vec![0; PIECE_BYTES]))
                .collect(),
        }
    }

    /// As large, and all zero.
    pub(super) fn empty_like(&self) -> Memory {
        Memory::new(u32::try_from(self.layout.pages_total() / 256).unwrap_or(u32::MAX))
    }

    fn with<T>(&self, page: u32, work: impl FnOnce(&[u8]) -> T) -> T {
        let (piece, from) = place(page);
        let piece = self.pieces[piece]
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        work(&piece[from..from + PAGE_SIZE])
    }

    fn with_mut(&self, page: u32, work: impl FnOnce(&mut [u8])) {
        let (piece, from) = place(page);
        let mut piece = self.pieces[piece]
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        work(&mut piece[from..from + PAGE_SIZE]);
    }

    pub(super) fn is_equal(&self, other: &Memory) -> bool {
        self.layout
            .pages()
            .all(|at| self.with(at.page, |mine| other.with(at.page, |theirs| mine == theirs)))
    }
}

fn place(page: u32) -> (usize, usize) {
    let byte = page as usize * PAGE_SIZE;
    (byte / PIECE_BYTES, byte % PIECE_BYTES)
}

impl Replica for Memory {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.with(at.page, |page| into.copy_from_slice(page));
        Ok(())
    }

    fn write(&self, first: PageAddress, contents: &[u8]) -> io::Result<()> {
        for (page, content) in (first.page..).zip(contents.as_chunks::<PAGE_SIZE>().0) {
            self.with_mut(page, |place| place.copy_from_slice(content));
        }
        Ok(())
    }

    fn zero(&self, first: PageAddress, count: u32) -> io::Result<()> {
        (first.page..first.page + count)
            .for_each(|page| self.with_mut(page, |place| place.fill(0)));
        Ok(())
    }
}

/// The guest at the source.
#[derive(Debug)]
pub(super) struct Guest(pub(super) Memory);

impl Guest {
    pub(super) fn new(memory_mib: u32, mix: &Mix) -> Guest {
        let memory = Memory::new(memory_mib);
        for at in memory.layout.pages() {
            let class = mix.class(at.page);
            memory.with_mut(at.page, |page| class.fill(u64::from(at.page), page));
        }
        Guest(memory)
    }

    /// Changes 200 bytes of every tenth page.
    pub(super) fn touch_tenth(&self) {
        for at in self.0.layout.pages().filter(|at| at.page % 10 == 0) {
            let mut random = Random(u64::from(at.page) | 1);
            self.0.with_mut(at.page, |page| {
                for eight in page[1000..1200].as_chunks_mut::<8>().0 {
                    *eight = random.next().to_le_bytes();
                }
            });
        }
    }
}

impl Contents for Guest {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        Replica::read(&self.0, at, into)
    }
}

/// One lane's way into the target's memory.
#[derive(Debug)]
pub(super) struct Arrived(pub(super) Arc<Memory>);

impl Sink for Arrived {
    fn zero(&mut self, first: PageAddress, count: u32) -> io::Result<()> {
        self.0.zero(first, count)
    }

    fn page(&mut self, at: PageAddress, content: &[u8; PAGE_SIZE]) -> io::Result<()> {
        self.0.write(at, content)
    }

    fn read(&mut self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        Replica::read(&*self.0, at, into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mix has about the shares that it asks for, and nonsense is refused.
    #[test]
    fn mixes() {
        let mix: Mix = "zero=50,random=50".parse().unwrap();
        let zeros = (0..16_000).filter(|page| mix.class(*page) == Class::Zero);
        assert!((6_000..10_000).contains(&zeros.count()));
        for wrong in ["", "zero", "zero=x", "disk=3", "zero=0"] {
            assert!(wrong.parse::<Mix>().is_err(), "{wrong}");
        }
    }
}
