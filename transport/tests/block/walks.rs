//! Any history with every kind of reference on, lanes that arrive in any order and late, and what
//! that makes the target miss: the target ends with the source's memory and the same root.

use std::collections::VecDeque;

use bytes::BytesMut;
use proptest::prelude::*;
use transport::block::*;

use crate::memory::*;

/// Both ends of a move and what is under way.
struct Move {
    source: Memory,
    kept: Kept,
    copies: CopyIndex,
    known: KnownTable,
    dirty: DirtySet,
    encoders: [LaneEncoder; LANES],
    cursors: [LaneCursor; LANES],
    /// Batches with their numbers.
    under_way: [VecDeque<(u32, Vec<u8>)>; LANES],
    decoders: [LaneDecoder; LANES],
    target: Memory,
    missed: u64,
    stats: BatchStats,
}

impl Move {
    /// Both sides hold `basis` since before; the source's guest may have moved on.
    fn new(basis: &[(u32, u32)]) -> Self {
        let layout = layout();
        let known = KnownTable::new(1000);
        let hasher = PageHasher::new(&KEY);
        for number in 0..DISK_PAGES {
            known.insert(
                *hasher.hash(&disk_page(number)).0.first_chunk().unwrap(),
                number,
            );
        }
        let mut this = Self {
            source: Memory::default(),
            kept: Kept::default(),
            copies: CopyIndex::new(&layout, 200_000),
            known,
            dirty: DirtySet::new(layout),
            encoders: std::array::from_fn(|lane| encoder(lane, Disable::default())),
            cursors: std::array::from_fn(LaneCursor::new),
            under_way: Default::default(),
            decoders: std::array::from_fn(decoder),
            target: Memory::default(),
            missed: 0,
            stats: BatchStats::default(),
        };
        for (page, seed) in basis {
            let content = text_page(*seed);
            let lane = layout_lane(*page);
            this.kept.memory().write(ram(*page), content);
            this.target.write(ram(*page), content);
            this.source.write(ram(*page), content);
            let hash = hasher.hash(&content);
            this.encoders[lane].ledger_mut().seed(ram(*page), hash);
            this.decoders[lane].ledger_mut().seed(ram(*page), hash);
            this.copies.insert(hash, ram(*page), 1);
            this.copies.acknowledge(lane, 2);
        }
        this
    }

    fn write(&mut self, page: u32, content: [u8; PAGE_SIZE]) {
        self.source.write(ram(page), content);
        self.dirty.mark_data(ram(page));
    }

    /// One take of a lane.
    fn send(&mut self, lane: usize, last_round: bool) {
        let taken = self.dirty.take(&mut self.cursors[lane], 5);
        let sources = Sources {
            contents: &self.source,
            replica: Some(&self.kept),
            copies: Some(&self.copies).filter(|_| !last_round),
            known: Some(&self.known).filter(|_| !last_round),
        };
        let mut out = BytesMut::new();
        let encoder = &mut self.encoders[lane];
        let first = encoder.last_seq() + 1;
        self.stats += encoder.encode(&taken, &sources, &mut out).unwrap();
        self.under_way[lane].extend((first..).zip(bodies(&out)));
    }

    /// One batch of a lane arrives; the source hears of it.
    fn arrive(&mut self, lane: usize) {
        let Some((seq, body)) = self.under_way[lane].pop_front() else {
            return;
        };
        let applied = self.decoders[lane].apply(&body, &mut self.target).unwrap();
        self.copies.acknowledge(lane, seq);
        for run in applied.missing {
            for page in run.first.page..run.first.page + u32::from(run.count) {
                self.encoders[lane].ledger_mut().forget(ram(page));
                self.copies.forget(ram(page));
                self.dirty.mark_data(ram(page));
                self.missed += 1;
            }
        }
    }

    fn finish(&mut self) {
        for _ in 0..10 {
            for lane in 0..LANES {
                while self.dirty.lane_dirty(lane) > 0 {
                    self.send(lane, true);
                }
                while !self.under_way[lane].is_empty() {
                    self.arrive(lane);
                }
            }
            if self.dirty.dirty_pages() == 0 {
                return;
            }
        }
        panic!("pages are missed for ever");
    }
}

fn layout_lane(page: u32) -> usize {
    layout().lane_of(ram(page))
}

/// What happens next.
#[derive(Debug, Clone)]
enum Step {
    Text(u32, u32),
    Random(u32, u32),
    Disk(u32, u32),
    Poke(u32, usize),
    CopyOf(u32, u32),
    Announce(u32),
    Zero(u32),
    Send(usize),
    Arrive(usize),
}

fn page() -> impl Strategy<Value = u32> {
    // Few ranges of a few lanes, and neighbours in them.
    (0_u32..4, 0_u32..12).prop_map(|(range, page)| range * 512 + page)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (page(), 0_u32..6).prop_map(|(page, seed)| Step::Text(page, seed)),
        (page(), 0_u32..6).prop_map(|(page, seed)| Step::Random(page, seed)),
        (page(), 0..DISK_PAGES).prop_map(|(page, number)| Step::Disk(page, number)),
        (page(), 0..PAGE_SIZE).prop_map(|(page, place)| Step::Poke(page, place)),
        (page(), page()).prop_map(|(page, other)| Step::CopyOf(page, other)),
        page().prop_map(Step::Announce),
        page().prop_map(Step::Zero),
        (0_usize..4).prop_map(Step::Send),
        (0_usize..4).prop_map(Step::Send),
        (0_usize..4).prop_map(Step::Arrive),
        (0_usize..4).prop_map(Step::Arrive),
    ]
}

fn run(basis: &[(u32, u32)], steps: &[Step]) -> Move {
    let mut this = Move::new(basis);
    for step in steps {
        let content = |this: &Move, page| {
            let mut content = [0; PAGE_SIZE];
            Contents::read(&this.source, ram(page), &mut content).unwrap();
            content
        };
        match *step {
            Step::Text(page, seed) => this.write(page, text_page(seed)),
            Step::Random(page, seed) => this.write(page, random_page(seed)),
            Step::Disk(page, number) => this.write(page, disk_page(number)),
            Step::Poke(page, place) => {
                let mut content = content(&this, page);
                content[place] ^= 0x5a;
                this.write(page, content);
            }
            Step::CopyOf(page, other) => {
                let content = content(&this, other);
                this.write(page, content);
            }
            Step::Announce(page) => {
                this.dirty.mark_data(ram(page));
            }
            Step::Zero(page) => this.write(page, [0; PAGE_SIZE]),
            Step::Send(lane) => this.send(lane, false),
            Step::Arrive(lane) => this.arrive(lane),
        }
    }
    this.finish();
    this
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn target_becomes_source_with_references(
        basis in prop::collection::vec((page(), 0_u32..6), 0..20),
        steps in prop::collection::vec(step(), 0..200),
    ) {
        let basis: Vec<_> = std::collections::BTreeMap::from_iter(basis).into_iter().collect();
        let this = run(&basis, &steps);
        prop_assert!(this.target == this.source, "memory differs");
        prop_assert!(*this.kept.memory() == this.source, "the replica differs");
        let sent = this.encoders.each_ref().map(LaneEncoder::ledger);
        let applied = this.decoders.each_ref().map(LaneDecoder::ledger);
        prop_assert_eq!(Ledger::root(&layout(), &sent, &KEY), Ledger::root(&layout(), &applied, &KEY));
    }
}

/// The walks above do meet every encoding, and misses: one long walk with a fixed seed.
#[test]
fn walks_meet_everything() {
    let mut state = 7_u64;
    let mut next = |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        ((state >> 33) % below) as u32
    };
    let steps: Vec<Step> = (0..20_000)
        .map(|_| {
            let page = next(4) * 512 + next(12);
            match next(11) {
                0 => Step::Text(page, next(6)),
                1 => Step::Random(page, next(6)),
                2 => Step::Disk(page, next(DISK_PAGES.into())),
                3 => Step::Poke(page, next(4096) as usize),
                4 => Step::CopyOf(page, next(4) * 512 + next(12)),
                5 => Step::Announce(page),
                6 => Step::Zero(page),
                7 | 8 => Step::Send(next(4) as usize),
                _ => Step::Arrive(next(4) as usize),
            }
        })
        .collect();
    let this = run(&[(1, 1), (2, 2), (700, 3)], &steps);
    assert!(this.target == this.source);
    let BatchStats {
        same,
        zero,
        copy,
        known,
        delta,
        literal,
        raw,
        ..
    } = this.stats;
    for amount in [same, zero, copy, known, delta, literal, raw] {
        assert!(amount.pages > 20, "{:?}", this.stats);
    }
    assert!(this.missed > 10, "{} pages missed", this.missed);
}
