//! What can fill a link, by itself or two at a time.

use std::fmt;
use std::str::FromStr;

use anyhow::Context;

/// One flow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Flow {
    /// `scaleaway bench link`.
    Scaleaway,
    /// `scaleaway bench link --yield`.
    Yielding,
    /// `iperf3` over TCP with this congestion control.
    Tcp(&'static str),
}

/// What fills the link.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LinkArm {
    /// One flow.
    Alone(Flow),
    /// Two at once. The first starts first, unless it yields: then it comes to a busy link.
    Beside(Flow, Flow),
}

/// The names of the arms of one flow, in the order in which they run.
pub const LINK_ARMS: [LinkArm; 4] = [
    LinkArm::Alone(Flow::Scaleaway),
    LinkArm::Alone(Flow::Yielding),
    LinkArm::Alone(Flow::Tcp("bbr")),
    LinkArm::Alone(Flow::Tcp("cubic")),
];

/// The names of the arms of two flows, which run when they are asked for.
pub const PAIR_ARMS: [LinkArm; 6] = [
    LinkArm::Beside(Flow::Scaleaway, Flow::Scaleaway),
    LinkArm::Beside(Flow::Scaleaway, Flow::Tcp("bbr")),
    LinkArm::Beside(Flow::Scaleaway, Flow::Tcp("cubic")),
    LinkArm::Beside(Flow::Yielding, Flow::Tcp("bbr")),
    LinkArm::Beside(Flow::Yielding, Flow::Tcp("cubic")),
    LinkArm::Beside(Flow::Tcp("bbr"), Flow::Tcp("cubic")),
];

impl fmt::Display for Flow {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scaleaway => formatter.write_str("scaleaway"),
            Self::Yielding => formatter.write_str("scaleaway-yield"),
            Self::Tcp(congestion) => write!(formatter, "tcp-{congestion}"),
        }
    }
}

impl fmt::Display for LinkArm {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alone(flow) => flow.fmt(formatter),
            Self::Beside(first, second) => write!(formatter, "{first}+{second}"),
        }
    }
}

impl FromStr for LinkArm {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Self> {
        LINK_ARMS
            .into_iter()
            .chain(PAIR_ARMS)
            .find(|arm| arm.to_string() == name)
            .with_context(|| format!("no arm {name} for a link: see `testbed list`"))
    }
}
