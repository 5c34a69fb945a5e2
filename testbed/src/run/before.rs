//! The time before the start, and what crossed the link then and later.

use std::path::Path;
use std::time::Duration;

use super::beside::{self, Flowing};
use super::fly::Ended;
use crate::clock;
use crate::lab::Lab;
use crate::report::Beside;
use crate::scenario::Scenario;
use crate::wan::WanCounters;

/// The guest is observed for so long before the start.
const BEFORE: Duration = Duration::from_secs(4);

/// The time before the start, when nothing moves yet.
pub(super) struct Before {
    /// When it began.
    pub(super) from_us: u64,
    /// What had crossed the link when it began.
    wan: WanCounters,
    /// The same at its end, and when that was.
    wan_end: WanCounters,
    to_us: u64,
    /// Other people's flows, and since when they had found their rate.
    flows: Option<(Flowing, u64)>,
}

/// IP packets and bytes of a migration.
pub(super) struct Wire {
    pub(super) bytes: u64,
    /// By what crossed the link each second before.
    pub(super) background_bytes: Option<u64>,
    pub(super) delivered_bytes: u64,
    pub(super) queue_drops: u64,
    /// When the migration was over.
    pub(super) to_us: u64,
}

impl Before {
    /// Begins whatever goes on beside the migration, and watches for a while.
    pub(super) fn observe(scenario: &Scenario, lab: &Lab, program: &Path) -> anyhow::Result<Self> {
        let from_us = clock::epoch_us();
        let wan = lab.wan.counters()?;
        let flows = match &scenario.beside {
            Some(asked) => {
                let flowing = Flowing::start(lab, asked, program)?;
                clock::pause(beside::SETTLE);
                let alone_from_us = clock::epoch_us();
                clock::pause(beside::ALONE);
                Some((flowing, alone_from_us))
            }
            None => {
                clock::pause(BEFORE);
                None
            }
        };
        Ok(Self {
            from_us,
            wan,
            wan_end: lab.wan.counters()?,
            to_us: clock::epoch_us(),
            flows,
        })
    }

    /// The migration, which began when this time ended, is over: what crossed the link.
    pub(super) fn wire(&self, lab: &Lab) -> anyhow::Result<Wire> {
        let (before, after) = (&self.wan_end, lab.wan.counters()?);
        let to_us = clock::epoch_us();
        let idle_bytes = before.wire_bytes() - self.wan.wire_bytes();
        let idle_us = (self.to_us - self.from_us).max(1);
        let background = u128::from(idle_bytes) * u128::from(to_us - self.to_us);
        Ok(Wire {
            bytes: after.wire_bytes() - before.wire_bytes(),
            background_bytes: u64::try_from(background / u128::from(idle_us)).ok(),
            delivered_bytes: after.wire_bytes_delivered() - before.wire_bytes_delivered(),
            queue_drops: after.queue_drops() - before.queue_drops(),
            to_us,
        })
    }

    /// Ends the flows; what they felt of the migration, which was over at `over_us`.
    pub(super) fn felt(&mut self, ended: &Ended, over_us: u64) -> anyhow::Result<Option<Beside>> {
        let Some((flowing, alone_from_us)) = self.flows.take() else {
            return Ok(None);
        };
        let to_us = ended.completed_us.or(ended.resumed_us).unwrap_or(over_us);
        let flown = flowing.stop()?;
        let (alone, during) = ((alone_from_us, ended.started_us), (ended.started_us, to_us));
        Ok(Some(flown.figures(alone, during)))
    }
}
