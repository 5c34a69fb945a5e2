//! What is left to send when the guest stops, and so how long the stop is: for a guest that does all of its
//! writing, or a part of it because its processors are slowed.

use super::dirtying::Dirtying;
use super::model::Inputs;

/// Part of all cores that encoding may take.
const CORES_SHARE: f64 = 0.75;
/// From the last look to the guest's stop: QEMU's window, and what the look itself takes.
pub(super) const LAST_LOOK_S: f64 = 0.25;
/// The link goes on in QEMU's window: what it takes then does not wait for the stop.
const STOP_WINDOW_S: f64 = 0.1;
/// Part of a stop that does not depend on what is dirty: device state, its load, journals, `cont`; and for
/// each page of the guest, of its comparison and of QEMU's bitmaps.
const STOP_FIXED_S: f64 = 0.02;
const STOP_PER_PAGE_S: f64 = 0.53e-6;
/// On a busy host each step of the stop waits for its turn: so much more for each program too many on a core,
/// and at most.
const STOP_PER_LOAD: f64 = 0.08;
const STOP_LOAD_MAX: f64 = 1.5;
/// Of one and a half round trips a part passes while something else is done.
const STOP_RTTS: f64 = 1.1;
/// What the rule of the session takes for them.
const POLICY_RTTS: f64 = 1.5;
/// The rule calls a backlog drained that takes so long and a round trip.
const DRAINED_S: f64 = 0.1;

/// What a page takes: seconds of the link or of the encoder, whichever is longer.
pub(super) struct Pace {
    rate: f64,
    encoder: f64,
}

impl Pace {
    pub(super) fn of(inputs: &Inputs) -> Pace {
        Pace {
            rate: inputs.rate_bytes_per_s.max(1.0),
            encoder: inputs.cores * CORES_SHARE * inputs.costs.core_bytes_per_s.max(1e6) / 4096.0,
        }
    }

    pub(super) fn seconds(&self, pages: f64, bytes: f64) -> f64 {
        (bytes / self.rate).max(pages / self.encoder)
    }
}

/// A slowed guest writes in a span as it would in a shorter one.
pub(super) fn slowed(dirtying: &Dirtying, writing: f64) -> Dirtying {
    Dirtying {
        pages_per_s: dirtying.pages_per_s * writing,
        ..*dirtying
    }
}

/// Stops of one guest, by the part of its writing that it does.
pub(super) struct Stops<'a> {
    pub(super) inputs: &'a Inputs,
    pub(super) pace: &'a Pace,
}

impl Stops<'_> {
    pub(super) fn hot_s(&self, seconds: f64) -> f64 {
        let pages = self.inputs.dirtying.hot_in(seconds);
        self.pace
            .seconds(pages, pages * self.inputs.costs.hot_bytes_per_page)
    }

    pub(super) fn broad_s(&self, pages: f64) -> f64 {
        self.pace
            .seconds(pages, pages * self.inputs.costs.again_bytes_per_page)
    }

    /// Pages dirtied by pages that the link takes, in the same time.
    pub(super) fn writes_by_takes(&self, writing: f64) -> f64 {
        self.inputs.dirtying.pages_per_s * writing * self.broad_s(1.0)
    }

    /// Pages that always wait, where the guest dirties them faster than the link takes them: those that are
    /// dirty already cost nothing more.
    fn backlog(&self, writing: f64) -> f64 {
        let by = self.writes_by_takes(writing);
        if by <= 1.0 {
            return 0.0;
        }
        self.inputs.dirtying.working_set * (1.0 - 1.0 / by)
    }

    pub(super) fn drained_s(&self) -> f64 {
        DRAINED_S + self.inputs.rtt_s
    }

    /// Whether the link comes to the end of what waits.
    pub(super) fn drains(&self, writing: f64) -> bool {
        self.broad_s(self.backlog(writing)) <= self.drained_s()
    }

    /// Seconds of the link for what is left at the stop.
    fn left_s(&self, writing: f64) -> f64 {
        let span = LAST_LOOK_S * writing;
        let last = self.hot_s(span) + self.broad_s(self.inputs.dirtying.broad_in(span));
        let waiting = match self.drains(writing) {
            true => 0.0,
            false => self.broad_s(self.backlog(writing)),
        };
        (last - STOP_WINDOW_S).max(0.0) + waiting
    }

    /// What no throttle shortens of the stop that the rule sees.
    pub(super) fn floor_s(&self) -> f64 {
        POLICY_RTTS * self.inputs.rtt_s + self.inputs.policy.fixed.as_secs_f64()
    }

    /// The stop that the rule sees.
    pub(super) fn asked_s(&self, writing: f64) -> f64 {
        self.left_s(writing) + self.floor_s()
    }

    /// Whether the rule stops the guest by itself.
    pub(super) fn fits(&self, writing: f64) -> bool {
        self.asked_s(writing) <= self.inputs.policy.downtime.as_secs_f64()
    }

    /// The stop of a guest that leaves nothing to send.
    pub(super) fn least_s(&self) -> f64 {
        let inputs = self.inputs;
        let busy = (1.0 + STOP_PER_LOAD * (inputs.load - 1.0).max(0.0)).min(STOP_LOAD_MAX);
        let fixed_s = (STOP_FIXED_S + STOP_PER_PAGE_S * inputs.pages_total) * busy;
        STOP_RTTS * inputs.rtt_s + fixed_s
    }

    /// The stop as it will be.
    pub(super) fn stop_s(&self, writing: f64) -> f64 {
        self.least_s() + self.left_s(writing)
    }
}
