//! What moves the guest: the product, or QEMU's own migration in its variants.

mod flight;
pub mod native;
mod ssh;

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, bail};

pub(crate) use flight::TRACE;
pub use flight::{Asked, Flight, Reports, Sides, Way};
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
    /// Nothing moves the guest: what the others are compared with where it is about the network.
    None,
    /// The product.
    Scaleaway {
        /// What follows `scaleaway-` in its name; `None` for the product as it comes.
        variant: Option<String>,
        /// What its `send` is given beyond the usual.
        flags: Vec<String>,
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
    /// Whether QEMU runs the guest at the target before all its pages are there.
    pub fn is_qemu_postcopy(&self) -> bool {
        matches!(
            self,
            Self::Qemu {
                method: Method::PostcopyPreempt,
                ..
            }
        )
    }
}

/// `scaleaway-NAME`: the product with more words for `send`.
pub const VARIANTS: [(&str, &[&str]); 5] = [
    ("yield", &["--yield"]),
    ("wait", &["--when-stuck", "wait"]),
    ("throttle", &["--when-stuck", "throttle"]),
    ("force", &["--when-stuck", "force"]),
    ("postcopy", &["--when-stuck", "post-copy"]),
];

/// What `scaleaway-no-STAGE` can go without.
pub const STAGES: [&str; 7] = ["same", "zero", "copy", "known", "delta", "literal", "raw"];

/// Names of QEMU's arms; each also with `-cubic`.
pub const QEMU_ARMS: [(&str, Method, bool); 6] = [
    ("qemu-plain", Method::Plain, false),
    ("qemu-multifd-zstd", Method::MultifdZstd, false),
    ("qemu-auto-converge", Method::AutoConverge, false),
    ("qemu-xbzrle", Method::Xbzrle, false),
    ("qemu-ssh", Method::Plain, true),
    ("qemu-postcopy-preempt", Method::PostcopyPreempt, false),
];

impl FromStr for Arm {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Self> {
        if name == "none" {
            return Ok(Self::None);
        }
        if name == "scaleaway" {
            return Ok(Self::Scaleaway {
                variant: None,
                flags: Vec::new(),
            });
        }
        if let Some(variant) = name.strip_prefix("scaleaway-") {
            return Ok(Self::Scaleaway {
                variant: Some(variant.to_owned()),
                flags: flags(variant)?,
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

/// What `send` is given for a variant of the product.
fn flags(variant: &str) -> anyhow::Result<Vec<String>> {
    if let Some(stage) = variant.strip_prefix("no-") {
        if !STAGES.contains(&stage) {
            bail!("no stage {stage}; there are {}", STAGES.join(", "));
        }
        return Ok(vec!["--disable".to_owned(), stage.to_owned()]);
    }
    let (_, flags) = VARIANTS
        .into_iter()
        .find(|(known, _)| *known == variant)
        .with_context(|| format!("no arm scaleaway-{variant}: see `testbed list`"))?;
    Ok(flags.iter().map(|flag| (*flag).to_owned()).collect())
}

impl fmt::Display for Arm {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => formatter.write_str("none"),
            Self::Scaleaway { variant: None, .. } => formatter.write_str("scaleaway"),
            Self::Scaleaway {
                variant: Some(variant),
                ..
            } => write!(formatter, "scaleaway-{variant}"),
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
        let mut names = vec!["none".to_owned(), "scaleaway".to_owned()];
        names.extend(STAGES.map(|stage| format!("scaleaway-no-{stage}")));
        names.extend(VARIANTS.map(|(variant, _)| format!("scaleaway-{variant}")));
        for (name, _, _) in QEMU_ARMS {
            names.extend([name.to_owned(), format!("{name}-cubic")]);
        }
        for name in names {
            assert_eq!(name.parse::<Arm>().unwrap().to_string(), name);
        }
        for wrong in [
            "scaleaway2",
            "scaleaway-no-page",
            "scaleaway-fast",
            "qemu-fast",
        ] {
            assert!(wrong.parse::<Arm>().is_err(), "{wrong}");
        }
    }

    /// A variant is no more than its words for `send`.
    #[test]
    fn words_of_variants() {
        let flags = |name: &str| match name.parse::<Arm>().unwrap() {
            Arm::Scaleaway { flags, .. } => flags.join(" "),
            Arm::None | Arm::Qemu { .. } => panic!("{name} is no arm of the product"),
        };
        assert_eq!(flags("scaleaway"), "");
        assert_eq!(flags("scaleaway-no-delta"), "--disable delta");
        assert_eq!(flags("scaleaway-postcopy"), "--when-stuck post-copy");
    }
}
