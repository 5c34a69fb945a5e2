//! What the peer, QEMU and the capture say, as the machine's inputs.

use qemu_glue::qmp::{Event, EventKind, MigrationStatus};
use transport::session::VmMigration;
use transport::session::source::Input;
use transport::wire::Frame;

use super::Driver;
use crate::capture::Captured;
use crate::hook::HookPhase;
use crate::waiting::now;

impl Driver {
    pub(super) fn frame(&mut self, frame: Frame) {
        if let (Frame::Known { first, numbers }, Some(questions)) = (&frame, &self.questions) {
            questions.answered(*first, numbers.clone());
        }
        if let (Frame::Missing { runs }, Some(lanes)) = (&frame, &self.lanes)
            && let Err(detail) = lanes.missing(runs)
        {
            self.machine.handle(now(), Input::CaptureFailed(detail));
            return;
        }
        if let (Frame::Progress { applied_bytes }, Some(lanes)) = (&frame, &self.lanes) {
            lanes.applied(*applied_bytes);
        }
        if let Frame::Loaded { .. } = frame {
            crate::fault::point("source-before-shut");
        }
        if frame == Frame::Running {
            self.tally.running(now());
            self.trace_event("running");
            crate::fault::point("source-before-retire");
        }
        self.machine.handle(now(), Input::Frame(frame));
    }

    pub(super) fn vm_event(&mut self, event: Option<Event>) {
        let kind = event.map(|event| event.kind);
        let input = match kind {
            Some(EventKind::Stop) => {
                self.tally.stopped(now());
                self.trace_event("stopped");
                if let Some(capture) = &self.capture {
                    capture.guest_stopped();
                }
                self.begin_last_round();
                self.call_hook(HookPhase::Stopped);
                Input::VmStopped
            }
            Some(EventKind::Resume) => Input::VmResumed,
            Some(EventKind::MigrationPass { .. }) => Input::PassStarted,
            #[expect(clippy::wildcard_enum_match_arm, reason = "QEMU adds statuses")]
            Some(EventKind::Migration { status }) => match status {
                MigrationStatus::Failed | MigrationStatus::Cancelled => {
                    Input::VmMigration(VmMigration::Failed(status.to_string()))
                }
                // `completed` alone authorises nothing: it is read again with `postmigrate`.
                _ => Input::VmMigration(VmMigration::Other),
            },
            Some(EventKind::MonitorClosed { reason }) => Input::VmGone(reason.to_string()),
            Some(EventKind::Shutdown { .. } | EventKind::Other { .. }) => return,
            None => Input::VmGone("its monitor is closed".into()),
        };
        self.machine.handle(now(), input);
    }

    pub(super) fn captured(&mut self, captured: Captured) {
        let input = match captured {
            Captured::Head { head, image } => {
                self.tally.pages_total = Some(image.layout.pages_total());
                self.tally.mapped = image.memory.is_main_shared();
                self.opened = Some(self.open_kept(head, &image));
                self.image = Some(image);
                return;
            }
            Captured::Relay { spool } => {
                self.spool = Some(spool);
                Input::Relay
            }
            Captured::PassDrained { pages, era } => {
                // A small pass may be over before its era began; its pages count all the same.
                self.pass_pages += pages;
                if era != self.era {
                    return;
                }
                Input::PassDrained {
                    pages: std::mem::take(&mut self.pass_pages),
                }
            }
            Captured::RamEnd => Input::RamEnd,
            Captured::Tail {
                pieces,
                total_bytes,
            } => Input::Tail {
                pieces,
                total_bytes,
            },
            Captured::Failed(detail) => Input::CaptureFailed(detail),
        };
        self.machine.handle(now(), input);
    }

    /// The guest is stopped: nothing is asked any more, nothing refers to another batch (S10).
    fn begin_last_round(&mut self) {
        self.questions = None;
        self.queries = None;
        if let Some(lanes) = &self.lanes {
            lanes.begin_last_round();
        }
    }
}
