//! Real guests for the simulation: which pages they wrote, second by second.
//!
//! The texts are what `testbed record FAMILY --out FILE` wrote, whose head has the rest of the call:
//! an idle Debian, and one that is used (values of redis change, files are read, sorted and packed).
//! Numbers are those of pages with content alone. The order within an interval is not recorded; pages
//! are spread over it.

mod hot;

use std::time::Duration;

pub(super) const IDLE: &str = include_str!("cold-idle.txt");
pub(super) const USE: &str = include_str!("return-use.txt");

/// A recording that is played again and again.
pub(super) struct Recorded {
    /// With content.
    pub(super) pages: u32,
    interval: Duration,
    /// In each interval.
    written: Vec<Vec<u32>>,
}

impl Recorded {
    /// Reads what the lab wrote.
    pub(super) fn parse(text: &str) -> Recorded {
        let mut lines = text.lines().filter(|line| !line.starts_with('#'));
        let head = lines.next().and_then(|head| head.split_once(' '));
        let (pages, interval_ms) = head.expect("the head has two numbers");
        let number = |word: &str| word.parse::<u32>().expect("a number");
        let recorded = Recorded {
            pages: number(pages),
            interval: Duration::from_millis(number(interval_ms).into()),
            written: lines.map(|line| spread(pages_of(line))).collect(),
        };
        let all = recorded.written.iter().flatten();
        assert!(all.max().is_some_and(|last| *last < recorded.pages));
        recorded
    }

    /// Pages that are written from one moment of the guest's own time up to another.
    pub(super) fn between(&self, from: Duration, to: Duration) -> Vec<u32> {
        let mut found = Vec::new();
        let mut at = from;
        while at < to {
            let place = at.as_micros() / self.interval.as_micros();
            let begin = self.interval * u32::try_from(place).expect("hours at most");
            let until = to.min(begin + self.interval);
            let of = &self.written[usize::try_from(place).expect("small") % self.written.len()];
            let index = |time: Duration| {
                let share = (time - begin).as_secs_f64() / self.interval.as_secs_f64();
                (0..of.len())
                    .take_while(|index| part(*index, of.len()) < share)
                    .count()
            };
            found.extend(&of[index(at)..index(until)]);
            at = until;
        }
        found
    }
}

/// When in its interval a page is written.
fn part(index: usize, all: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a model")]
    let (index, all) = (index as f64, all as f64);
    (index + 0.5) / all
}

/// `GAP` or `GAP+LENGTH`, gaps counted from the end of the run before.
fn pages_of(line: &str) -> Vec<u32> {
    let mut end = 0;
    let mut pages = Vec::new();
    for word in line.split_whitespace() {
        let (gap, length) = word.split_once('+').unwrap_or((word, "1"));
        let number = |word: &str| word.parse::<u32>().expect("a number");
        let first = end + number(gap);
        end = first + number(length);
        pages.extend(first..end);
    }
    pages
}

/// An order that has nothing to do with where pages are.
fn spread(mut pages: Vec<u32>) -> Vec<u32> {
    pages.sort_by_key(|page| page.wrapping_mul(0x9e37_79b1));
    pages
}

/// Every page of an interval is written once in it, in whatever steps time goes, and the recording
/// begins again after its end.
#[test]
fn nothing_is_left_out() {
    let text = "# a guest\n10 1000\n1+2 3\n\n0+10\n";
    let recorded = Recorded::parse(text);
    for step_ms in [10, 70, 3000] {
        let mut at = Duration::ZERO;
        let mut written = Vec::new();
        while at < Duration::from_secs(6) {
            let to = (at + Duration::from_millis(step_ms)).min(Duration::from_secs(6));
            written.extend(recorded.between(at, to));
            at = to;
        }
        written.sort_unstable();
        let mut twice: Vec<u32> = (0..10)
            .chain([1, 2, 6])
            .flat_map(|page| [page; 2])
            .collect();
        twice.sort_unstable();
        assert_eq!(written, twice, "steps of {step_ms} ms");
    }
    let silent = recorded.between(Duration::from_millis(1000), Duration::from_millis(2000));
    assert!(silent.is_empty(), "{silent:?}");
}
