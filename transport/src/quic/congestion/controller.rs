//! The machine behind quinn's `Controller` trait.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use super::{Estimate, Machine, Shaping};

/// Makes a controller per path.
#[derive(Debug, Clone, Default)]
pub struct ScaleawayConfig {
    /// What the operator allows, on all paths alike.
    pub shaping: Shaping,
}

impl ControllerFactory for ScaleawayConfig {
    fn build(self: Arc<Self>, _now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Scaleaway {
            machine: Machine::new(current_mtu, self.shaping.clone()),
        })
    }
}

/// Our controller on one path.
#[derive(Debug, Clone)]
pub struct Scaleaway {
    machine: Machine,
}

impl Scaleaway {
    /// What it knows of the path.
    pub fn estimate(&self) -> Estimate {
        self.machine.estimate()
    }
}

impl Controller for Scaleaway {
    fn on_sent(&mut self, now: Instant, _bytes: u64, _last_packet_number: u64) {
        self.machine.on_sent(now);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        // One ACK old: the machine takes `now - sent` instead.
        _rtt: &RttEstimator,
    ) {
        self.machine.on_acked(now, sent, bytes, app_limited);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.machine.on_end_acks(now, in_flight, app_limited);
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.machine.on_lost(lost_bytes, is_persistent_congestion);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.machine.on_mtu(new_mtu);
    }

    fn window(&self) -> u64 {
        self.machine.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.machine.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.machine.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
