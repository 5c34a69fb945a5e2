//! Post-copy goes on after an agent's death: what `resolve` does for an attempt whose guest runs at the
//! target while pages of it are at the source (S11).
//!
//! ```text
//! source: postmigrate QEMU's memory (/proc/PID/mem) -Urgent, lanes-> target: QEMU, migrate-recover
//!                                 <-Absent, Wanted-          what QEMU says that it lacks
//! ```
//!
//! Either side may also be a `send` or `receive` that still lives: the frames are the same.

mod source;
mod target;

pub(crate) use source::hold;
pub(crate) use target::fill;

use std::sync::Arc;

use qemu_glue::qmp::Client;
use transport::block::{BlockSpec, Layout};

use crate::peer::{Door, Me};

/// An attempt that is taken up again.
#[derive(Debug)]
pub(crate) struct Resumed<'a> {
    pub(crate) qmp: &'a Client,
    pub(crate) door: &'a Door,
    pub(crate) me: &'a Me,
    pub(crate) layout: Arc<Layout>,
}

impl<'a> Resumed<'a> {
    /// The image is the one that the journal names.
    pub(crate) fn new(
        qmp: &'a Client,
        door: &'a Door,
        me: &'a Me,
        blocks: &[(String, u32)],
    ) -> anyhow::Result<Self> {
        let blocks = blocks.iter().map(|(name, pages)| BlockSpec {
            name: name.clone(),
            pages: *pages,
        });
        Ok(Self {
            qmp,
            door,
            me,
            layout: Arc::new(Layout::new(blocks.collect())?),
        })
    }
}
