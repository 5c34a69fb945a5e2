//! After the outcome: the guest's settings, the peer, what is kept, the report.

use transport::session::Outcome;

use super::Driver;
use crate::hook::HookPhase;
use crate::waiting::now;

impl Driver {
    pub(super) async fn finish(mut self, outcome: Outcome) -> anyhow::Result<Outcome> {
        let ended = now();
        self.progress.finish();
        self.call_hook(match outcome {
            Outcome::Arrived => HookPhase::Running,
            Outcome::Stayed { .. } | Outcome::Doubt { .. } => HookPhase::Failed,
        });
        if let Outcome::Stayed { .. } = outcome
            && let Err(error) = self.vm.restore_source(&self.state).await
        {
            tracing::warn!(%error, "QEMU's migration settings could not be put back");
        }
        self.leave().await;
        if let Some(lanes) = &self.lanes {
            self.tally.stats = lanes.counters().stats;
        }
        if let Some(kept) = self.kept.take() {
            kept.settle(&outcome, self.tally.root);
        }
        self.tally.dirty_pages_per_s = self.machine.dirty_pages_per_s();
        for call in self.hook_calls.drain(..) {
            crate::hook::finish(Some(call)).await;
        }
        self.door.close().await;
        let report = self.tally.report(
            ended,
            "source",
            self.me.vm.clone(),
            self.peer_name,
            &outcome,
        );
        self.memory.keep(&self.options.state, &report);
        crate::report::write(&report, self.options.report.as_deref())?;
        if self.options.json {
            crate::progress::say(&serde_json::to_string(&report)?);
        }
        Ok(outcome)
    }
}
