//! Pages that are named instead of sent: what each reference costs, and what happens when it does
//! not resolve.

use bytes::BytesMut;
use transport::block::*;

use crate::memory::*;

/// What one encoder may draw on.
#[derive(Debug)]
struct Held {
    kept: Kept,
    copies: CopyIndex,
    known: KnownTable,
}

impl Held {
    fn new() -> Self {
        let held = Self {
            kept: Kept::default(),
            copies: CopyIndex::new(&layout(), 1 << 20),
            known: KnownTable::new(1000),
        };
        let hasher = PageHasher::new(&KEY);
        for number in 0..DISK_PAGES {
            let hash = hasher.hash(&disk_page(number));
            assert!(held.known.insert(*hash.0.first_chunk().unwrap(), number));
        }
        held
    }

    fn sources<'a>(&'a self, memory: &'a Memory) -> Sources<'a> {
        Sources {
            contents: memory,
            replica: Some(&self.kept),
            copies: Some(&self.copies),
            known: Some(&self.known),
        }
    }
}

fn encode(
    encoder: &mut LaneEncoder,
    taken: &[Taken],
    sources: &Sources<'_>,
) -> (BatchStats, Vec<Vec<u8>>) {
    let mut out = BytesMut::new();
    let stats = encoder.encode(taken, sources, &mut out).unwrap();
    (stats, bodies(&out))
}

fn changed(mut page: [u8; PAGE_SIZE], places: std::ops::Range<usize>) -> [u8; PAGE_SIZE] {
    page[places].fill(0x77);
    page
}

/// A page that is on the disk, one that is there twice, one that changed a little: each is named.
#[test]
fn pages_are_named() {
    let (mut source, mut target, held) = (Memory::default(), Memory::default(), Held::new());
    let (mut encoder, mut decoder) = (encoder(0, Disable::default()), decoder(0));
    let mut apply = |bodies: Vec<Vec<u8>>, source: &Memory| {
        for body in bodies {
            assert_eq!(decoder.apply(&body, &mut target).unwrap().missing, []);
        }
        assert!(target == *source);
    };
    // Three neighbours of the disk, one more; a page twice, and its neighbour twice.
    for (page, number) in [(0, 5), (1, 6), (2, 7), (3, 9)] {
        source.write(ram(page), disk_page(number));
    }
    for page in [10, 20] {
        source.write(ram(page), random_page(1));
        source.write(ram(page + 1), random_page(2));
    }
    let pages: Vec<u32> = (0..4).chain(10..12).chain(20..22).collect();
    let (stats, first) = encode(&mut encoder, &data(pages.clone()), &held.sources(&source));
    assert_eq!(
        stats.known,
        Amount {
            pages: 4,
            bytes: 2 * (9 + 4)
        }
    );
    assert_eq!(
        stats.copy,
        Amount {
            pages: 2,
            bytes: 9 + 6
        }
    );
    assert_eq!(stats.raw.pages, 2);
    apply(first, &source);
    assert!(
        *held.kept.memory() == source,
        "the replica has what was sent"
    );

    // Known as applied: other pages copy from there.
    held.copies.acknowledge(0, encoder.last_seq());
    for page in 0..2 {
        source.write(ram(30 + page), random_page(1 + page));
    }
    let (stats, second) = encode(&mut encoder, &data(30..32), &held.sources(&source));
    assert_eq!(
        stats.copy,
        Amount {
            pages: 2,
            bytes: 9 + 6
        }
    );
    assert_eq!(stats.pages(), 2);
    apply(second, &source);

    // Noise that changed a little.
    for page in 0..2 {
        source.write(ram(30 + page), changed(random_page(1 + page), 100..200));
    }
    let (stats, third) = encode(&mut encoder, &data(30..32), &held.sources(&source));
    assert_eq!(stats.delta.pages, 2);
    assert!(stats.delta.bytes < 100, "{stats:?}");
    apply(third, &source);
    assert!(*held.kept.memory() == source);
}

/// Each kind of reference can be switched off, and nothing is named then.
#[test]
fn references_can_be_switched_off() {
    let check = |stage: &str, named: fn(&BatchStats) -> u64| {
        let (mut source, held) = (Memory::default(), Held::new());
        let mut disable = Disable::default();
        disable.add(stage).unwrap();
        let mut encoder = encoder(0, disable);
        source.write(ram(0), disk_page(1));
        source.write(ram(1), random_page(1));
        source.write(ram(2), random_page(1));
        let (mut stats, _) = encode(&mut encoder, &data(0..3), &held.sources(&source));
        source.write(ram(1), changed(random_page(1), 0..9));
        stats += encode(&mut encoder, &data(0..3), &held.sources(&source)).0;
        assert_eq!(named(&stats), 0, "without {stage}");
        assert_eq!(stats.copy.pages + stats.known.pages + stats.delta.pages, 2);
    };
    check("copy", |stats| stats.copy.pages);
    check("known", |stats| stats.known.pages);
    check("delta", |stats| stats.delta.pages);
}

/// A reference that does not resolve leaves no trace and stops nothing: the batch's pages are asked
/// for, go again without references, and arrive.
#[test]
fn misses_go_again() {
    let (mut source, mut target, held) = (Memory::default(), Memory::default(), Held::new());
    let (mut encoder, mut decoder) = (encoder(0, Disable::default()), decoder(0));
    source.write(ram(1), random_page(1));
    source.write(ram(2), random_page(2));
    let (_, first) = encode(&mut encoder, &data([1, 2]), &held.sources(&source));
    decoder.apply(&first[0], &mut target).unwrap();
    held.copies.acknowledge(0, encoder.last_seq());

    // The target loses what the source refers to, in each of three ways.
    target.write(ram(1), text_page(9));
    target.write(ram(2), text_page(9));
    source.write(ram(3), random_page(1));
    source.write(ram(5), disk_page(3));
    source.write(ram(2), changed(random_page(2), 5..50));
    let hash = PageHasher::new(&KEY).hash(&disk_page(3));
    for (page, number) in [(3, 3), (5, DISK_PAGES), (5, 4), (2, 3)] {
        assert!(held.known.insert(*hash.0.first_chunk().unwrap(), number));
        let (stats, bodies) = encode(&mut encoder, &data([page, 7]), &held.sources(&source));
        assert_eq!(stats.copy.pages + stats.known.pages + stats.delta.pages, 1);
        let before = target.clone();
        let applied = decoder.apply(&bodies[0], &mut target).unwrap();
        let lost = PageRun {
            first: ram(page),
            count: 1,
        };
        assert!(applied.missing.contains(&lost), "{applied:?}");
        assert!(target == before);
        for run in applied.missing {
            for page in run.first.page..run.first.page + u32::from(run.count) {
                encoder.ledger_mut().forget(ram(page));
                held.copies.forget(ram(page));
            }
        }
        assert!(encoder.ledger().is_forgotten(ram(page)));
        let (stats, bodies) = encode(&mut encoder, &data([page, 7]), &held.sources(&source));
        assert_eq!(stats.copy.pages + stats.known.pages + stats.delta.pages, 0);
        decoder.apply(&bodies[0], &mut target).unwrap();
        assert_eq!(target.0.get(&ram(page)), source.0.get(&ram(page)));
        if page == 5 {
            encoder
                .ledger_mut()
                .set(ram(5), PageHash([1; 16]), FIRST_SEQ);
        }
    }
}

/// A target that cannot read its image asks again too.
#[test]
fn unreadable_target_asks_again() {
    #[derive(Debug)]
    struct Blind;
    impl Sink for Blind {
        fn zero(&mut self, _: PageAddress, _: u32) -> std::io::Result<()> {
            Ok(())
        }
        fn page(&mut self, _: PageAddress, _: &[u8; PAGE_SIZE]) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (mut source, held) = (Memory::default(), Held::new());
    source.write(ram(0), random_page(1));
    let (mut encoder, mut decoder) = (encoder(0, Disable::default()), decoder(0));
    let (_, first) = encode(&mut encoder, &data([0]), &held.sources(&source));
    decoder.apply(&first[0], &mut Blind).unwrap();
    source.write(ram(0), changed(random_page(1), 0..9));
    let (stats, second) = encode(&mut encoder, &data([0]), &held.sources(&source));
    assert_eq!(stats.delta.pages, 1);
    let applied = decoder.apply(&second[0], &mut Blind).unwrap();
    assert_eq!(
        applied.missing,
        [PageRun {
            first: ram(0),
            count: 1
        }]
    );
    assert_eq!(decoder.ledger().get(ram(0)).unwrap().1, FIRST_SEQ);
}

/// S10: in the last round no copy leaves its batch and nothing outside the image is named, even if
/// the target has it; a copy inside the batch and a delta stay.
#[test]
fn s10_last_round_refers_to_nothing_outside() {
    let (mut source, mut target, held) = (Memory::default(), Memory::default(), Held::new());
    let (mut encoder, mut decoder) = (encoder(0, Disable::default()), decoder(0));
    source.write(ram(0), random_page(1));
    let (_, first) = encode(&mut encoder, &data([0]), &held.sources(&source));
    decoder.apply(&first[0], &mut target).unwrap();
    held.copies.acknowledge(0, encoder.last_seq());

    source.write(ram(1), random_page(1));
    source.write(ram(2), disk_page(1));
    source.write(ram(3), disk_page(1));
    source.write(ram(0), changed(random_page(1), 0..9));
    let last_round = Sources {
        copies: None,
        known: None,
        ..held.sources(&source)
    };
    let (stats, second) = encode(&mut encoder, &data(0..4), &last_round);
    assert_eq!((stats.raw.pages, stats.copy.pages), (2, 1));
    assert_eq!((stats.known.pages, stats.delta.pages), (0, 1));
    assert_eq!(decoder.apply(&second[0], &mut target).unwrap().missing, []);
    assert!(target == source);
}

/// A base in the replica that is not what was sent is not used.
#[test]
fn stale_replica_is_no_base() {
    let (mut source, held) = (Memory::default(), Held::new());
    let mut encoder = encoder(0, Disable::default());
    source.write(ram(0), random_page(1));
    encode(&mut encoder, &data([0]), &held.sources(&source));
    let other = changed(random_page(1), 4000..4001);
    held.kept.memory().write(ram(0), other);
    source.write(ram(0), changed(random_page(1), 0..9));
    let (stats, _) = encode(&mut encoder, &data([0]), &held.sources(&source));
    assert_eq!((stats.delta.pages, stats.raw.pages), (0, 1));
}

/// A replica that fails is told and left alone; pages go on.
#[test]
fn failing_replica_is_left_alone() {
    #[derive(Debug)]
    struct Full;
    impl Replica for Full {
        fn read(&self, _: PageAddress, _: &mut [u8; PAGE_SIZE]) -> std::io::Result<()> {
            panic!("used after it failed")
        }
        fn write(&self, _: PageAddress, _: &[u8]) -> std::io::Result<()> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn zero(&self, _: PageAddress, _: u32) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (mut source, mut target) = (Memory::default(), Memory::default());
    let (mut encoder, mut decoder) = (encoder(0, Disable::default()), decoder(0));
    for round in 0..3 {
        source.write(ram(0), changed(random_page(1), 0..round));
        let sources = Sources {
            replica: Some(&Full),
            ..Sources::of(&source)
        };
        let (stats, bodies) = encode(&mut encoder, &data([0]), &sources);
        assert_eq!(stats.raw.pages, 1);
        decoder.apply(&bodies[0], &mut target).unwrap();
        let failure = encoder.replica_failure().unwrap();
        assert_eq!(failure.kind(), std::io::ErrorKind::StorageFull);
    }
    assert!(target == source);
}
