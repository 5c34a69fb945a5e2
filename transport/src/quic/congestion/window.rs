//! From phase and path to a window, within what the operator allows.

use std::time::Duration;

use super::crowd::CLAIM;
use super::machine::Machine;
use super::phase::{
    CROWDED_RTT_WINDOW, CROWDED_TRIM, CRUISE_GAINS, DRAIN_GAIN, HOLD_GAIN, PROBE_END, Phase,
    STARTUP_GAIN_MAX, STEP_BACK_GAIN, TRIM_MIN, YIELD_GAINS, YIELD_TRIM_MIN,
};
use super::{Mode, scaled};

pub(super) const WINDOW_MIN_PACKETS: u64 = 4;
/// On top of every Cruise window: acknowledgements cover two packets, batches ten.
const CRUISE_EXTRA_PACKETS: u64 = 4;
/// Packets for each root of a packet in the window.
const CRUISE_ROOT: f64 = 0.8;
/// Factors of the queue's target: for a large window, what the root of the window in packets
/// divides, and for a small window.
const TARGET_LEAST: f64 = 0.7;
const TARGET_ROOT: f64 = 6.0;
const TARGET_MOST: f64 = 1.6;
const STARTUP_EXTRA_PACKETS: u64 = 10;

/// Queue that a probe may build, and its least gain all the same.
const PROBE_QUEUE: Duration = Duration::from_micros(3_500);
const PROBE_LEAST: f64 = 1.04;

impl Machine {
    /// Queue that the operator allows; `None` in mode fill.
    pub(super) fn budget(&self) -> Option<Duration> {
        match self.shaping.mode() {
            Mode::Fill => None,
            Mode::Yield { queueing } => Some(queueing),
        }
    }

    /// The queue that is allowed. A small window may have more of it: of two flows on a link the
    /// larger one makes room first.
    pub(super) fn target(&self) -> Duration {
        let packets = (self.window / self.path.mtu.max(1)).max(16);
        let share = TARGET_LEAST + TARGET_ROOT / (packets as f64).sqrt();
        self.path.target(self.budget(), share.min(TARGET_MOST))
    }

    pub(super) fn gains(&self) -> &'static [f64; 8] {
        if self.budget().is_some() {
            &YIELD_GAINS
        } else {
            &CRUISE_GAINS
        }
    }

    pub(super) fn trim_min(&self) -> f64 {
        if self.budget().is_some() {
            YIELD_TRIM_MIN
        } else {
            TRIM_MIN
        }
    }

    pub(super) fn rtt_window(&self) -> Duration {
        if self.trim < CROWDED_TRIM {
            CROWDED_RTT_WINDOW
        } else {
            self.phase.rtt_window()
        }
    }

    pub(super) fn set_window(&mut self) {
        let mut window = self.wanted_window().unwrap_or(self.window);
        if let Some((least, most)) = self.shaped_window() {
            window = window.max(least).min(most);
        }
        self.window = window.max(WINDOW_MIN_PACKETS * self.path.mtu);
    }

    /// Least and greatest window by the operator's rates: a rate is a window per round trip, the
    /// queue in it included.
    fn shaped_window(&self) -> Option<(u64, u64)> {
        let rtt = self.path.base()? + self.queue.unwrap_or_default();
        let window = |rate| scaled(rate, rtt.as_secs_f64());
        let mtu = self.path.mtu;
        let least = self.budget().map_or(0, |_| {
            window(self.shaping.bytes_min(mtu, self.path.greatest_rate()))
        });
        let most = self.shaping.bytes_max(mtu).map_or(u64::MAX, window);
        Some((least, most))
    }

    /// What is kept beyond the bandwidth-delay product: as the root of the window, so that of two
    /// flows the smaller one grows.
    fn extra(&self, window: u64) -> u64 {
        let mtu = self.path.mtu;
        let packets = window as f64 / mtu as f64;
        let root = if self.budget().is_some() {
            0.0
        } else {
            CRUISE_ROOT
        };
        scaled(mtu, root * packets.sqrt()) + CRUISE_EXTRA_PACKETS * mtu
    }

    /// Greatest gain of a probe that follows no other: on long paths a tenth is much of a queue.
    fn probe_max(&self) -> f64 {
        let base = self.path.base().unwrap_or_default().max(PROBE_QUEUE);
        (1.0 + PROBE_QUEUE.as_secs_f64() / base.as_secs_f64()).max(PROBE_LEAST)
    }

    /// Is the operator's cap what limits the rate?
    pub(super) fn is_capped(&self) -> bool {
        self.shaped_window()
            .is_some_and(|(_, most)| self.window >= most)
    }

    /// `None` while the path is unknown.
    fn wanted_window(&self) -> Option<u64> {
        let mtu = self.path.mtu;
        Some(match self.phase {
            Phase::Startup { .. } if self.path.rounds() < 2 => self.window,
            Phase::Startup { .. } => {
                let most = scaled(self.path.bdp_early()?, STARTUP_GAIN_MAX);
                // The handshake's few packets give a rate too.
                let most = (most + STARTUP_EXTRA_PACKETS * mtu).max(self.initial_window());
                self.window.min(most)
            }
            Phase::Hold { window_max } => window_max.min(scaled(self.path.bdp_early()?, HOLD_GAIN)),
            Phase::Drain { .. } => scaled(self.path.bdp_early()?, DRAIN_GAIN),
            Phase::Cruise {
                position, boost, ..
            } => {
                let boost = if position <= PROBE_END { boost } else { 0.0 };
                let gain = self.gains()[position].min(self.probe_max()) + boost;
                let paced = scaled(self.path.bdp()?, gain * self.trim);
                paced + self.extra(paced)
            }
            Phase::Crowded { crowd, .. } => {
                let rtt = self.path.base()? + self.queue.unwrap_or_default();
                let part = |rate, part| scaled(rate, part * rtt.as_secs_f64());
                // Beyond its half of the link it may get by the curve alone.
                let half = part(self.path.greatest_rate(), CLAIM);
                let least = scaled(self.path.bdp()?, crowd.gain()).min(half);
                let claim = part(self.path.best_rate(), crowd.claim());
                scaled(mtu, crowd.window()).max(least).max(claim)
            }
            Phase::StepBack { .. } => scaled(self.path.bdp()?, STEP_BACK_GAIN),
        })
    }
}
