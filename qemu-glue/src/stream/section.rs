//! What stands between sections: section headers, footers, commands.

use super::cursor::{Cursor, Stop, shown};
use super::{
    COMMAND_OPEN_RETURN_PATH, COMMAND_PING, COMMAND_POSTCOPY_ADVISE, COMMAND_SWITCHOVER_START,
    Command, Phase, StreamError, TYPE_COMMAND, TYPE_END, TYPE_EOF, TYPE_FOOTER, TYPE_FULL,
    TYPE_PART, TYPE_START,
};

/// The header of what comes next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<'a> {
    Command(Command),
    /// START, and FULL (`full`) that has no PART and no END.
    Named {
        full: bool,
        id: u32,
        name: &'a [u8],
        instance: u32,
        version: u32,
    },
    /// PART or END of a section that START named.
    Numbered {
        phase: Phase,
        id: u32,
    },
    /// End of all sections.
    Eof,
}

impl Next<'_> {
    pub(super) fn unsupported(name: &[u8], instance: u32, version: u32) -> StreamError {
        StreamError::UnsupportedSection {
            name: shown(name),
            instance,
            version,
        }
    }
}

/// Reads a section's header, or a whole command.
pub(super) fn next<'a>(cursor: &mut Cursor<'a>) -> Result<Next<'a>, Stop> {
    let kind = cursor.u8()?;
    match kind {
        TYPE_START | TYPE_FULL => Ok(Next::Named {
            full: kind == TYPE_FULL,
            id: cursor.u32()?,
            name: cursor.name()?,
            instance: cursor.u32()?,
            version: cursor.u32()?,
        }),
        TYPE_PART => Ok(Next::Numbered {
            phase: Phase::Iterate,
            id: cursor.u32()?,
        }),
        TYPE_END => Ok(Next::Numbered {
            phase: Phase::Complete,
            id: cursor.u32()?,
        }),
        TYPE_COMMAND => command(cursor).map(Next::Command),
        TYPE_EOF => Ok(Next::Eof),
        other => Err(StreamError::SectionType(other).into()),
    }
}

fn command(cursor: &mut Cursor<'_>) -> Result<Command, Stop> {
    let (number, length) = (cursor.u16()?, cursor.u16()?);
    match (number, length) {
        (COMMAND_OPEN_RETURN_PATH, 0) => Ok(Command::OpenReturnPath),
        (COMMAND_PING, 4) => Ok(Command::Ping(cursor.u32()?)),
        (COMMAND_POSTCOPY_ADVISE, 0) => Ok(Command::PostcopyAdviseBitmaps),
        (COMMAND_SWITCHOVER_START, 0) => Ok(Command::SwitchoverStart),
        _ => Err(StreamError::UnsupportedCommand { number, length }.into()),
    }
}

/// The footer of section `expected`.
pub(super) fn footer(cursor: &mut Cursor<'_>, expected: u32) -> Result<(), Stop> {
    let wrong = || Stop::Wrong(StreamError::Footer { expected });
    if cursor.u8()? != TYPE_FOOTER || cursor.u32()? != expected {
        return Err(wrong());
    }
    Ok(())
}
