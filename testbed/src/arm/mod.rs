//! What moves the guest: the product, or QEMU's own migration in its variants.

mod flight;
pub mod native;
mod ssh;

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, bail};

pub use flight::{Flight, Sides, Way};
pub use ssh::Tunnel;

use native::Method;

/// TCP's congestion control in both hosts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Congestion {
    /// Their best here.
    Bbr,
    /// The usual default.
    Cubic,
}

impl Congestion {
    /// The kernel's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bbr => "bbr",
            Self::Cubic => "cubic",
        }
    }
}

/// One arm of a comparison.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Arm {
    /// The product, with a stage switched off or whole.
    Scaleaway {
        /// Given to `send --disable`.
        disabled: Option<String>,
    },
    /// QEMU's own migration.
    Qemu {
        /// How QEMU sends.
        method: Method,
        /// Through an ssh tunnel between the hosts.
        through_ssh: bool,
        /// TCP's congestion control.
        congestion: Congestion,
    },
}

impl Arm {
    /// Whether the guest runs at the target before all its pages are there.
    pub fn is_postcopy(&self) -> bool {
        matches!(
            self,
            Self::Qemu {
                method: Method::PostcopyPreempt,
                ..
            }
        )
    }
}

/// What `scaleaway-no-STAGE` can go without.
pub const STAGES: [&str; 7] = ["same", "zero", "copy", "known", "delta", "literal", "raw"];

/// Names of QEMU's arms; each also with `-cubic`.
pub const QEMU_ARMS: [(&str, Method, bool); 5] = [
    ("qemu-plain", Method::Plain, false),
    ("qemu-multifd-zstd", Method::MultifdZstd, false),
    ("qemu-xbzrle", Method::Xbzrle, false),
    ("qemu-ssh", Method::Plain, true),
    ("qemu-postcopy-preempt", Method::PostcopyPreempt, false),
];

impl FromStr for Arm {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Self> {
        if name == "scaleaway" {
            return Ok(Self::Scaleaway { disabled: None });
        }
        if let Some(stage) = name.strip_prefix("scaleaway-no-") {
            if !STAGES.contains(&stage) {
                bail!("no stage {stage}; there are {}", STAGES.join(", "));
            }
            return Ok(Self::Scaleaway {
                disabled: Some(stage.to_owned()),
            });
        }
        if !name.starts_with("qemu-") {
            bail!("no arm {name}: see `testbed list`");
        }
        let (base, congestion) = match name.strip_suffix("-cubic") {
            Some(base) => (base, Congestion::Cubic),
            None => (name, Congestion::Bbr),
        };
        let (_, method, through_ssh) =
            QEMU_ARMS
                .into_iter()
                .find(|(known, _, _)| *known == base)
                .with_context(|| format!("no arm {name}: see `testbed list`"))?;
        Ok(Self::Qemu {
            method,
            through_ssh,
            congestion,
        })
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scaleaway { disabled: None } => formatter.write_str("scaleaway"),
            Self::Scaleaway {
                disabled: Some(stage),
            } => write!(formatter, "scaleaway-no-{stage}"),
            Self::Qemu {
                method,
                through_ssh,
                congestion,
            } => {
                let name = QEMU_ARMS
                    .iter()
                    .find(|(_, known, ssh)| known == method && ssh == through_ssh)
                    .map_or("qemu", |(name, _, _)| *name);
                let suffix = match congestion {
                    Congestion::Bbr => "",
                    Congestion::Cubic => "-cubic",
                };
                write!(formatter, "{name}{suffix}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every arm's name is read and written alike.
    #[test]
    fn names() {
        let mut names = vec!["scaleaway".to_owned()];
        names.extend(STAGES.map(|stage| format!("scaleaway-no-{stage}")));
        for (name, _, _) in QEMU_ARMS {
            names.extend([name.to_owned(), format!("{name}-cubic")]);
        }
        for name in names {
            assert_eq!(name.parse::<Arm>().unwrap().to_string(), name);
        }
        for wrong in ["scaleaway2", "scaleaway-no-page", "qemu-fast"] {
            assert!(wrong.parse::<Arm>().is_err(), "{wrong}");
        }
    }
}
