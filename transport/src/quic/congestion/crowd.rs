//! Competing for a queue that others hold: a window that grows and falls as cubic's does.
//!
//! Who fills a queue until it overflows can be lived with only by doing the same: a window in
//! proportion to the own rate either starves (its rate falls with its share) or starves the others.
//! Who answers no overflow (bbr) takes whatever is left to it; against that, half of the link is held.
//! What is lost at random, with the queue far from its usual height, is not taken for an overflow.
//= RFC 9438, sections 4.2, 4.3, 4.6 and 4.7; its constants are 0.4, 0.7 and 0.53, ours make up for
//= the rounds in which this flow steps back to look.

use std::time::{Duration, Instant};

use super::rounds::Round;

/// Scale of the curve in packets / s^3, and what is left of a window after an overflow.
const SCALE: f64 = 0.5;
const LEFT: f64 = 0.8;
/// Packets per round by which a flow of TCP Reno would grow.
const RENO_STEP: f64 = 0.65;
/// Least and greatest window in bandwidth-delay products, see [`Crowd::gain`].
const GAIN: (f64, f64) = (1.0, 2.0);
const GAIN_FIRST: f64 = 1.5;
/// Rounds after an overflow by which polite others have made room, and what the answer changes.
const ANSWER_AFTER: u32 = 6;
const GAIN_UP: f64 = 0.25;
const GAIN_DOWN: f64 = 0.2;
/// Part of the link that is claimed when overflows move nobody at all; what a round leaves of it that
/// loses more than the last number, and what another one gives back.
pub(super) const CLAIM: f64 = 0.5;
const CLAIM_LEFT: f64 = 0.95;
const CLAIM_LOSS: f64 = 0.25;
/// Part of the highest queue below which it has dipped since an overflow.
const ANSWER: f64 = 0.75;
/// Growth per round before the first overflow.
const OPENING: f64 = 1.15;
/// Rounds after an overflow in which losses still belong to it.
const AFTERMATH: u32 = 3;
const WINDOW_MIN: f64 = 4.0;
/// Part of the highest queue lately at which a loss is an overflow.
const OVERFLOW_QUEUE: f64 = 0.7;
/// What the highest queue that was seen loses each round.
const FORGET: f64 = 0.995;
/// Part of the usual queue below which it has dipped: others have made room.
const DIP: f64 = 0.6;

/// When to look whether the others have left, after the first time; and how often that doubles.
const LOOK_AFTER: (Duration, Duration) = (Duration::from_secs(4), Duration::from_secs(8));
const LOOKS_SLOWER: u32 = 2;

/// A window among others' windows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Crowd {
    /// In packets.
    window: f64,
    /// Where the curve is flat: the window at the last overflow.
    top: f64,
    /// When the curve began, and with which window.
    since: Instant,
    from: f64,
    /// The window that Reno would have by now.
    reno: f64,
    /// `None` before the first overflow, else the rounds since.
    overflow: Option<u32>,
    /// Highest queue lately, in seconds.
    queue_max: f64,
    gain: f64,
    /// Part of the link that is claimed from those who do not answer.
    claim: f64,
    /// Least queue since the last overflow, in seconds.
    queue_min: f64,
    /// How often it looked in vain whether the others have left.
    looks: u32,
}

impl Crowd {
    pub(super) fn begin(now: Instant, packets: f64, queue: Duration) -> Self {
        let window = packets.max(WINDOW_MIN);
        Self {
            window,
            top: window,
            since: now,
            from: window,
            reno: window,
            overflow: None,
            queue_max: queue.as_secs_f64(),
            gain: GAIN_FIRST,
            claim: CLAIM,
            queue_min: queue.as_secs_f64(),
            looks: 0,
        }
    }

    /// Goes on after a time in which the others seemed to have left.
    pub(super) fn again(self, now: Instant, packets: f64) -> Self {
        let window = packets.max(self.window * LEFT);
        Self {
            window,
            top: window.max(self.window),
            since: now,
            from: window,
            reno: window,
            ..self
        }
    }

    /// Have others really filled the queue?
    pub(super) fn has_overflowed(&self) -> bool {
        self.overflow.is_some()
    }

    /// Packets that may be in flight.
    pub(super) fn window(&self) -> f64 {
        self.window
    }

    /// Least window in bandwidth-delay products. It grows while overflows move nobody else to make
    /// room: whoever does not mind losses (bbr) would otherwise take all.
    pub(super) fn gain(&self) -> f64 {
        self.gain
    }

    /// Part of the link that this flow holds on to, whatever is lost. Who answers no overflow (bbr)
    /// keeps what others leave: the shares of such flows stand where they happened to begin.
    pub(super) fn claim(&self) -> f64 {
        let unanswered = (self.gain - GAIN.0) / (GAIN.1 - GAIN.0);
        self.claim * unanswered
    }

    /// A round is over that found a queue; `usual_loss` is the share that is always lost.
    pub(super) fn end_round(
        &mut self,
        now: Instant,
        round: &Round,
        queue: Duration,
        usual_loss: f64,
    ) {
        let queue = queue.as_secs_f64();
        self.queue_max = (self.queue_max * FORGET).max(queue);
        let is_full = queue >= OVERFLOW_QUEUE * self.queue_max;
        self.queue_min = self.queue_min.min(queue);
        // Much loss says that the link is not what it was, or that there are many.
        if round.lost_share() > usual_loss + CLAIM_LOSS {
            self.claim *= CLAIM_LEFT;
        } else {
            self.claim = (self.claim / CLAIM_LEFT).min(CLAIM);
        }
        if self.overflow == Some(ANSWER_AFTER) {
            self.judge_answer();
        }
        let is_over = self.overflow.is_none_or(|rounds| rounds >= AFTERMATH);
        self.overflow = self.overflow.map(|rounds| rounds.saturating_add(1));
        if is_over && (round.ecn || (is_full && round.lost_share() > usual_loss)) {
            self.fall(now);
        } else if self.overflow.is_none() {
            self.window *= OPENING;
        } else {
            self.grow(now);
        }
    }

    /// Have others made room after the last overflow?
    fn judge_answer(&mut self) {
        let polite = self.queue_min < ANSWER * self.queue_max;
        let change = if polite { -GAIN_DOWN } else { GAIN_UP };
        self.gain = (self.gain + change).clamp(GAIN.0, GAIN.1);
    }

    fn fall(&mut self, now: Instant) {
        // The next overflow came before anybody's answer was due.
        if self.overflow.is_some_and(|rounds| rounds <= ANSWER_AFTER) {
            self.judge_answer();
        }
        self.top = if self.window < self.top {
            self.window * (1.0 + LEFT) / 2.0
        } else {
            self.window
        };
        self.window = (self.window * LEFT).max(WINDOW_MIN);
        (self.from, self.reno, self.since) = (self.window, self.window, now);
        self.overflow = Some(0);
        self.queue_min = self.queue_max;
    }

    fn grow(&mut self, now: Instant) {
        let flat_after = ((self.top - self.from).max(0.0) / SCALE).cbrt();
        let age = now.saturating_duration_since(self.since).as_secs_f64();
        let cubic = SCALE * (age - flat_after).powi(3) + self.top;
        self.reno += RENO_STEP;
        // At most half as much again in a round.
        self.window = cubic.max(self.reno).clamp(self.window, self.window * 1.5);
    }

    /// Is it time to look whether the others have left? At the first dip of the queue in an
    /// interval that doubles with each look in vain: flows of ours look together, and find it gone.
    pub(super) fn looks_around(&mut self, age: Duration, queue: Duration) -> bool {
        let factor = 1 << self.looks.min(LOOKS_SLOWER);
        let due = age >= LOOK_AFTER.1 * factor
            || (age >= LOOK_AFTER.0 * factor && self.has_dipped(queue));
        self.looks += u32::from(due);
        due
    }

    /// Is the queue far below what it was lately?
    fn has_dipped(&self, queue: Duration) -> bool {
        queue.as_secs_f64() < DIP * self.queue_max
    }
}
