//! The source's doors to its QEMU: the monitor, whose commands run in order, and the capture of the
//! stream.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use transport::session::source::{Action, Input};
use transport::session::{Hold, VmMigration};
use transport::wire::{Frame, tail};

use crate::content;
use crate::lanes::Image;
use crate::source_qemu::{STEP, Said};
use crate::world::{Event, Life, World};

/// Empty sections in a row that end a pass without a page.
const EMPTY_SECTIONS: u32 = 3;
/// Device state of the modelled guest.
const TAIL_BYTES: usize = 60_000;

/// Monitor commands, run in order.
#[derive(Debug)]
pub(crate) enum Command {
    Set(Option<Duration>, Option<u64>),
    Migrate,
    Acknowledge,
    Continue,
}

/// The monitor's queue.
#[derive(Debug, Default)]
pub(crate) struct Monitor {
    pub(crate) commands: VecDeque<Command>,
    is_busy: bool,
}

/// The capture of QEMU's stream.
#[derive(Debug, Default)]
pub(crate) struct Capture {
    pub(crate) is_open: bool,
    pub(crate) era: u32,
    is_armed: bool,
    pass_pages: u64,
    empty_sections: u32,
}

impl World {
    /// What an action asks of QEMU's monitor, in order.
    pub(crate) fn vm_commands(&mut self, action: &Action) -> Option<Vec<Command>> {
        const ANY: Duration = Duration::from_secs(2000);
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "the others do not steer QEMU"
        )]
        let commands = match action {
            Action::StartCapture { .. } => {
                let (limit, rate) = match self.plan.hold {
                    Hold::SwitchoverAck => (Duration::ZERO, 0),
                    // For guests this small a twentieth of the product's first pace.
                    Hold::Starvation => (self.plan.downtime, 1_000_000),
                };
                vec![Command::Set(Some(limit), Some(rate)), Command::Migrate]
            }
            Action::TriggerPass => vec![Command::Set(Some(Duration::from_millis(1)), None)],
            Action::OpenPass => {
                self.source.capture.era += 1;
                vec![Command::Set(Some(Duration::ZERO), Some(0))]
            }
            Action::HoldPass => vec![Command::Set(None, Some(50_000))],
            Action::Pace(rate) => vec![Command::Set(None, Some((*rate).max(10)))],
            Action::Arm => {
                self.source.capture.is_armed = true;
                vec![Command::Set(Some(ANY), Some(0))]
            }
            Action::Disarm => {
                self.source.capture.is_armed = false;
                self.source.capture.era += 1;
                vec![Command::Set(Some(Duration::ZERO), Some(0))]
            }
            Action::Acknowledge => vec![Command::Acknowledge],
            // This guest writes as it is told to.
            Action::Throttle(_) => Vec::new(),
            Action::Release => vec![Command::Set(Some(ANY), Some(0)), Command::Acknowledge],
            Action::ReleaseToQemu => vec![
                Command::Set(Some(self.plan.downtime), Some(0)),
                Command::Acknowledge,
            ],
            Action::Continue => vec![Command::Continue],
            _ => return None,
        };
        Some(commands)
    }

    pub(crate) fn command(&mut self, command: Command) {
        self.source.monitor.commands.push_back(command);
        if !std::mem::replace(&mut self.source.monitor.is_busy, true) {
            let delay = self.about_ms(1);
            self.after(delay, Event::Command);
        }
    }

    pub(crate) fn run_command(&mut self) {
        let Some(command) = self.source.monitor.commands.pop_front() else {
            self.source.monitor.is_busy = false;
            return;
        };
        if self.source_qemu.is_alive {
            match command {
                Command::Set(limit, rate) => self.source_qemu.set(limit, rate),
                Command::Migrate => {
                    self.source.capture.is_open = true;
                    for said in self.source_qemu.migrate(self.now) {
                        self.source_said(said);
                    }
                    self.after(STEP, Event::QemuStep);
                }
                Command::Acknowledge => self.source_qemu.acknowledge(),
                Command::Continue => match self.source_qemu.cont() {
                    Ok(said) => said.into_iter().for_each(|said| self.source_said(said)),
                    Err(detail) => self.source_input(Input::VmCommandFailed(detail)),
                },
            }
        } else {
            self.source_input(Input::VmCommandFailed("QEMU is gone".into()));
        }
        let delay = self.about_ms(1);
        self.after(delay, Event::Command);
    }

    /// Source QEMU's events and stream.
    pub(crate) fn source_said(&mut self, said: Said) {
        match said {
            Said::Stop => {
                self.stopped_at = Some(self.now);
                if let Some(lanes) = &mut self.source.lanes {
                    lanes.last_round = true;
                }
                self.source_input(Input::VmStopped);
            }
            Said::Resume => {
                self.stopped_at = None;
                self.source_input(Input::VmResumed);
            }
            Said::Pass => self.source_input(Input::PassStarted),
            Said::Failed => {
                let status = VmMigration::Failed("failed".into());
                self.source_input(Input::VmMigration(status));
            }
            Said::Completed => {
                self.source_qemu.completed();
                self.source_input(Input::VmMigration(VmMigration::Completed));
            }
            Said::Head | Said::Page { .. } | Said::Section { .. } | Said::RamEnd | Said::Tail => {
                if self.source.capture.is_open && self.plan.relay {
                    self.relay(said);
                } else if self.source.capture.is_open {
                    self.capture(&said);
                }
            }
        }
    }

    fn capture(&mut self, said: &Said) {
        match said {
            Said::Head => {
                let layout = content::layout(self.plan.ram_pages);
                let blocks = layout.blocks().to_vec();
                self.source.image = Some(Image::new(layout));
                let head = Bytes::from_static(b"QEVM\0\0\0\x03");
                self.source_input(Input::Head {
                    head,
                    blocks,
                    basis: Vec::new(),
                });
            }
            Said::Page { page, version } => {
                let image = self.source.image.as_mut().expect("the head came first");
                image.page(*page, *version);
            }
            Said::Section { pages } => self.section(*pages),
            Said::RamEnd => self.source_input(Input::RamEnd),
            Said::Tail => {
                let state: Vec<u8> = (0..TAIL_BYTES).map(|n| n.to_le_bytes()[0]).collect();
                let Ok(Frame::Tail { data, raw_len }) = tail::pack(&state) else {
                    panic!("device state is packed into a Tail");
                };
                self.source_input(Input::Tail {
                    pieces: vec![(data, raw_len)],
                    total_bytes: u64::from(raw_len),
                });
            }
            Said::Stop | Said::Resume | Said::Pass | Said::Failed | Said::Completed => {}
        }
    }

    fn section(&mut self, pages: u64) {
        let end = &mut self.source.capture;
        if end.is_armed {
            (end.pass_pages, end.empty_sections) = (0, 0);
            return;
        }
        if pages > 0 {
            end.pass_pages += pages;
            end.empty_sections = 0;
            return;
        }
        end.empty_sections += 1;
        if end.pass_pages > 0 || end.empty_sections == EMPTY_SECTIONS {
            end.empty_sections = 0;
            let pages = std::mem::take(&mut end.pass_pages);
            let era = end.era;
            self.after(
                Duration::from_micros(200),
                Event::PassDrained { pages, era },
            );
        }
    }

    pub(crate) fn pass_drained(&mut self, pages: u64, era: u32) {
        if era == self.source.capture.era {
            self.source_input(Input::PassDrained { pages });
        }
    }

    pub(crate) fn shut_given(&mut self) {
        if self.source.life == Life::Live
            && let Some(said) = self.source_qemu.shut()
        {
            let delay = self.about_ms(3);
            self.after(delay, Event::Said(said));
        }
    }

    pub(crate) fn capture_closed(&mut self) {
        for said in self.source_qemu.socket_closed() {
            let delay = self.about_ms(1);
            self.after(delay, Event::Said(said));
        }
    }
}
