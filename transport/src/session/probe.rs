//! A probe before a move: what a target lets its caller do, and when a source has seen enough.
//!
//! ```text
//!  target   Hello <-> Hello, Ready ->   then any of  Probe (once), Query.., filler on the lanes
//!           <- LayoutTaken, Known.., Progress..      until the source closes, or a limit
//! ```
//! Sans-IO, like the machines beside it. docs/protocol.md#probe is the spec.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::wire::limits::{PROBE_MAX_BYTES, PROBE_MAX_MS, PROBE_MAX_QUESTIONS};
use crate::wire::{AbortCode, Frame};

/// What a target does for a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Compare these ranges with its own replica.
    Compare(Vec<(u32, [u8; 16])>),
    /// Look these prefixes up.
    Look {
        /// Number of the first question.
        first: u32,
        /// First bytes of page hashes.
        prefixes: Vec<[u8; 8]>,
    },
}

/// Why a target ends a probe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// The source took longer than a probe may.
    #[error("the probe is longer than {} s", PROBE_MAX_MS / 1000)]
    PeerTooLong,
    /// The source sent more than a probe may.
    #[error("the probe's filler is more than {PROBE_MAX_BYTES} bytes")]
    PeerTooMuch,
    /// The source asked more than a probe may.
    #[error("the probe asks for more than {PROBE_MAX_QUESTIONS} pages")]
    PeerAsksTooMuch,
    /// The frame has no place in a probe.
    #[error("{0} has no place in a probe")]
    PeerFrame(&'static str),
}

impl ProbeError {
    /// The class that the source is told.
    #[must_use]
    pub fn code(&self) -> AbortCode {
        match self {
            ProbeError::PeerFrame(_) => AbortCode::Protocol,
            ProbeError::PeerTooLong | ProbeError::PeerTooMuch | ProbeError::PeerAsksTooMuch => {
                AbortCode::Resources
            }
        }
    }
}

/// A target's side of one probe: every limit in one place.
#[derive(Debug)]
pub struct ProbeGuard {
    deadline: Instant,
    has_compared: bool,
    questions_left: u64,
}

impl ProbeGuard {
    /// The probe begins.
    #[must_use]
    pub fn new(now: Instant) -> ProbeGuard {
        ProbeGuard {
            deadline: now + Duration::from_millis(PROBE_MAX_MS),
            has_compared: false,
            questions_left: PROBE_MAX_QUESTIONS,
        }
    }

    /// When the probe ends at the latest.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Takes a frame of the source.
    ///
    /// # Errors
    /// When it has no place here, or asks too much: the probe ends.
    pub fn frame(&mut self, frame: Frame) -> Result<Answer, ProbeError> {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "all others are out of place"
        )]
        match frame {
            Frame::Probe { ranges } if !self.has_compared => {
                self.has_compared = true;
                Ok(Answer::Compare(ranges))
            }
            Frame::Query { first, prefixes } => {
                let asked = prefixes.len() as u64;
                let left = self.questions_left.checked_sub(asked);
                self.questions_left = left.ok_or(ProbeError::PeerAsksTooMuch)?;
                Ok(Answer::Look { first, prefixes })
            }
            other => Err(ProbeError::PeerFrame(other.name())),
        }
    }

    /// Looks at the clock and at what has come on the lanes.
    ///
    /// # Errors
    /// When a limit is reached: the probe ends.
    pub fn check(&self, now: Instant, filler_bytes: u64) -> Result<(), ProbeError> {
        if filler_bytes > PROBE_MAX_BYTES {
            return Err(ProbeError::PeerTooMuch);
        }
        if now >= self.deadline {
            return Err(ProbeError::PeerTooLong);
        }
        Ok(())
    }
}

/// Bytes per second as the target counted them: the mean and the extremes of its windows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MeasuredRate {
    /// Least window.
    pub low: f64,
    /// Mean of the windows.
    pub mean: f64,
    /// Best window.
    pub high: f64,
}

/// Turns the target's counts into a rate and says when it has settled.
#[derive(Debug, Default)]
pub struct LinkMeter {
    began: Option<Instant>,
    marks: VecDeque<(Instant, u64)>,
    best: Option<MeasuredRate>,
}

impl LinkMeter {
    /// Windows that are compared.
    const WINDOWS: u32 = 4;
    /// Length of each: some of the target's counts.
    const WINDOW: Duration = Duration::from_millis(200);
    /// A rate that is found sooner is that of start-up.
    const LEAST: Duration = Duration::from_millis(1_200);
    /// Start-up takes about so many round trips.
    const START_RTTS: u32 = 12;
    /// Windows that differ by less from their mean agree.
    const AGREE: f64 = 0.06;
    /// Looked at in any case no longer than this.
    const MOST: Duration = Duration::from_millis(4_000);
    const MARKS_MAX: usize = 512;

    /// Takes the target's running total.
    pub fn record(&mut self, now: Instant, total_bytes: u64) {
        if total_bytes == 0 {
            return;
        }
        self.began.get_or_insert(now);
        if self.marks.len() == Self::MARKS_MAX {
            self.marks.pop_front();
        }
        self.marks.push_back((now, total_bytes));
        let best = self.best.map_or(0.0, |best| best.mean);
        if let Some(rate) = self.rate().filter(|rate| rate.mean > best) {
            self.best = Some(rate);
        }
    }

    /// The rate over the best windows so far: a host that was busy with something else for a moment says
    /// nothing of its link.
    #[must_use]
    pub fn best(&self) -> Option<MeasuredRate> {
        self.best
    }

    /// Whether more would tell little more: start-up is over and the last windows agree.
    #[must_use]
    pub fn has_settled(&self, now: Instant, rtt: Duration) -> bool {
        let Some(began) = self.began else {
            return false;
        };
        let spent = now.duration_since(began);
        if spent >= Self::MOST {
            return true;
        }
        if spent < Self::LEAST.max(rtt * Self::START_RTTS + Self::WINDOW * Self::WINDOWS) {
            return false;
        }
        self.rate().is_some_and(|rate| {
            let off = (rate.high - rate.mean).max(rate.mean - rate.low);
            off <= rate.mean * Self::AGREE
        })
    }

    /// The rate over the last windows; `None` before they are full.
    #[must_use]
    pub fn rate(&self) -> Option<MeasuredRate> {
        let (last, _) = self.marks.back()?;
        let total_at = |ago: Duration| {
            let at = last.checked_sub(ago)?;
            let before = self.marks.iter().rev().find(|(mark, _)| *mark <= at)?;
            Some(*before)
        };
        let mut rates = Vec::new();
        for nth in 0..Self::WINDOWS {
            let (from, low) = total_at(Self::WINDOW * (nth + 1))?;
            let (to, high) = total_at(Self::WINDOW * nth)?;
            let span = to.duration_since(from).as_secs_f64();
            if span <= 0.0 {
                return None;
            }
            rates.push(as_f64(high.saturating_sub(low)) / span);
        }
        let mean = rates.iter().sum::<f64>() / f64::from(Self::WINDOWS);
        Some(MeasuredRate {
            low: rates.iter().copied().fold(f64::INFINITY, f64::min),
            mean,
            high: rates.iter().copied().fold(0.0, f64::max),
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "estimates need no 53rd bit")]
fn as_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::limits::QUERY_MAX_PAGES;

    fn origin() -> Instant {
        #[expect(clippy::disallowed_methods, reason = "an origin for virtual time")]
        Instant::now()
    }

    /// Every limit ends the probe with its own reason, and nothing else has a place in one.
    #[test]
    fn limits() {
        let start = origin();
        let mut guard = ProbeGuard::new(start);
        let probe = || Frame::Probe {
            ranges: vec![(1, [2; 16])],
        };
        assert_eq!(
            guard.frame(probe()),
            Ok(Answer::Compare(vec![(1, [2; 16])]))
        );
        assert_eq!(guard.frame(probe()), Err(ProbeError::PeerFrame("Probe")));
        assert_eq!(
            guard.frame(Frame::Stopped),
            Err(ProbeError::PeerFrame("Stopped"))
        );
        let query = || Frame::Query {
            first: 0,
            prefixes: vec![[0; 8]; QUERY_MAX_PAGES],
        };
        for _ in 0..PROBE_MAX_QUESTIONS / QUERY_MAX_PAGES as u64 {
            assert!(guard.frame(query()).is_ok());
        }
        assert_eq!(guard.frame(query()), Err(ProbeError::PeerAsksTooMuch));
        assert_eq!(guard.check(start, PROBE_MAX_BYTES), Ok(()));
        assert_eq!(
            guard.check(start, PROBE_MAX_BYTES + 1),
            Err(ProbeError::PeerTooMuch)
        );
        let late = start + Duration::from_millis(PROBE_MAX_MS);
        assert_eq!(guard.check(late, 0), Err(ProbeError::PeerTooLong));
    }

    /// A start-up is not taken for the rate; a steady flow settles soon, an unsteady one at the limit.
    #[test]
    fn settles() {
        let check = |rate_at: &dyn Fn(u32) -> u64, rtt_ms, expected_ms: std::ops::Range<u64>| {
            let start = origin();
            let rtt = Duration::from_millis(rtt_ms);
            let mut meter = LinkMeter::default();
            let mut total = 0;
            for step in 0..400_u32 {
                let now = start + step * Duration::from_millis(20);
                total += rate_at(step);
                meter.record(now, total);
                if meter.has_settled(now, rtt) {
                    let ms = u64::try_from(now.duration_since(start).as_millis()).unwrap();
                    assert!(expected_ms.contains(&ms), "{ms} ms");
                    return meter.rate().unwrap();
                }
            }
            panic!("never settled");
        };
        let steady = check(&|_| 20_000, 50, 1_000..2_000);
        assert!((steady.mean - 1e6).abs() < 1e3, "{steady:?}");
        let rising = check(&|step| u64::from(step.min(80)) * 1_000, 50, 1_700..3_000);
        assert!((rising.mean / 4e6 - 1.0).abs() < 0.05, "{rising:?}");
        let unsteady = check(
            &|step| if step % 40 < 20 { 10_000 } else { 30_000 },
            50,
            3_900..4_100,
        );
        assert!(unsteady.low < 0.7 * unsteady.high, "{unsteady:?}");
    }

    /// A stall at the end does not hide what the link could do.
    #[test]
    fn best_windows() {
        let start = origin();
        let mut meter = LinkMeter::default();
        for step in 0..200_u32 {
            let now = start + step * Duration::from_millis(20);
            meter.record(now, u64::from(step.clamp(1, 120)) * 20_000);
        }
        let best = meter.best().unwrap();
        assert!((best.mean / 1e6 - 1.0).abs() < 0.01, "{best:?}");
        assert!(meter.rate().unwrap().mean < 0.1e6);
    }
}
