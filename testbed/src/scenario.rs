//! Scenarios: a guest and its work (a family), a link, and the arms that are compared.

use anyhow::{Context, bail};
use serde::Deserialize;
use testbed_link::LinkParams;

use crate::arm::{Arm, Way};
use crate::guest::{Machine, Past};

/// Each file is a family; one that names a link is a scenario by itself.
const FAMILIES: [(&str, &str); 19] = [
    ("demo", include_str!("../scenarios/demo.toml")),
    ("smoke", include_str!("../scenarios/smoke.toml")),
    ("smoke-back", include_str!("../scenarios/smoke-back.toml")),
    ("cold-idle", include_str!("../scenarios/cold-idle.toml")),
    (
        "cold-idle-known",
        include_str!("../scenarios/cold-idle-known.toml"),
    ),
    ("cold-used", include_str!("../scenarios/cold-used.toml")),
    (
        "cold-used-known",
        include_str!("../scenarios/cold-used-known.toml"),
    ),
    ("cold-redis", include_str!("../scenarios/cold-redis.toml")),
    ("filecache", include_str!("../scenarios/filecache.toml")),
    (
        "filecache-known",
        include_str!("../scenarios/filecache-known.toml"),
    ),
    ("return-idle", include_str!("../scenarios/return-idle.toml")),
    (
        "return-redis",
        include_str!("../scenarios/return-redis.toml"),
    ),
    ("return-use", include_str!("../scenarios/return-use.toml")),
    ("dirty8", include_str!("../scenarios/dirty8.toml")),
    ("dirty20", include_str!("../scenarios/dirty20.toml")),
    ("flood", include_str!("../scenarios/flood.toml")),
    ("pair", include_str!("../scenarios/pair.toml")),
    ("beside", include_str!("../scenarios/beside.toml")),
    ("beside-game", include_str!("../scenarios/beside-game.toml")),
];

/// A migration to be run.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// `FAMILY/LINK`, or the name of a file with a link of its own.
    pub name: String,
    /// What it is, in a line.
    pub about: String,
    /// The link's name.
    pub link_name: String,
    /// The link.
    pub link: LinkParams,
    /// The guest.
    pub machine: Machine,
    /// What happened to it before. With a stay at the client the scenario is its way back.
    pub past: Past,
    /// Whether the target has the guest's disk image, and shares what stands on it.
    pub known: bool,
    /// The longest downtime, which all arms are asked for.
    pub downtime_ms: u64,
    /// More words for the product's `send`.
    pub send_flags: Vec<String>,
    /// Other people's flows on the overlay while the guest moves.
    pub beside: Option<Beside>,
    /// A second guest of the same sort moves at the same time.
    pub pair: bool,
    /// Arms when none are asked for.
    pub arms: Vec<Arm>,
}

/// Flows beside a migration: a game's and pings always.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Beside {
    /// A TCP stream that takes all that it gets, by its congestion control.
    #[serde(default)]
    pub tcp: Option<String>,
}

/// A file of `testbed/scenarios`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Family {
    about: String,
    #[serde(default)]
    link: Option<String>,
    arms: Vec<String>,
    #[serde(default)]
    known: bool,
    #[serde(default = "default_downtime")]
    downtime_ms: u64,
    #[serde(default)]
    send_flags: Vec<String>,
    #[serde(default)]
    beside: Option<Beside>,
    #[serde(default)]
    pair: bool,
    guest: Machine,
    #[serde(default)]
    past: Past,
}

fn default_downtime() -> u64 {
    300
}

impl Scenario {
    /// Finds a scenario by its name.
    ///
    /// # Errors
    /// When there is no such family or link; the text names those that are.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        let (family_name, link_name) = match name.split_once('/') {
            Some((family, link)) => (family, Some(link)),
            None => (name, None),
        };
        let Some((_, text)) = FAMILIES.iter().find(|(known, _)| *known == family_name) else {
            bail!("no scenario {name}: see `testbed list`");
        };
        let family = parse(family_name, text)?;
        let link_name = match (link_name, &family.link) {
            (Some(asked), None) => asked.to_owned(),
            (None, Some(own)) => own.clone(),
            (Some(_), Some(own)) => {
                bail!("{family_name} has its own link, {own}: say {family_name}")
            }
            (None, None) => bail!("say on which link: {family_name}/LINK (see `testbed list`)"),
        };
        let link = testbed_link::named(&link_name)
            .with_context(|| format!("no link {link_name}: see `testbed list`"))?;
        let arms = family
            .arms
            .iter()
            .map(|arm| arm.parse())
            .collect::<anyhow::Result<_>>()?;
        Ok(Self {
            name: name.to_owned(),
            about: family.about,
            link_name,
            link,
            machine: family.guest,
            past: family.past,
            known: family.known,
            downtime_ms: family.downtime_ms,
            send_flags: family.send_flags,
            beside: family.beside,
            pair: family.pair,
            arms,
        })
    }

    /// Which way the guest goes.
    #[must_use]
    pub fn way(&self) -> Way {
        match self.past.stay {
            Some(_) => Way::Back,
            None => Way::Out,
        }
    }
}

/// Names of families, what they are, and their own link if they have one.
///
/// # Errors
/// When a file is wrong.
pub fn families() -> anyhow::Result<Vec<(String, String, Option<String>)>> {
    FAMILIES
        .iter()
        .map(|(name, text)| {
            let family = parse(name, text)?;
            Ok(((*name).to_owned(), family.about, family.link))
        })
        .collect()
}

fn parse(name: &str, text: &str) -> anyhow::Result<Family> {
    toml::from_str(text).with_context(|| format!("testbed/scenarios/{name}.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every file is right, and every family runs on every link.
    #[test]
    fn all_scenarios_exist() {
        for (name, _, link) in families().unwrap() {
            if link.is_some() {
                assert_eq!(Scenario::named(&name).unwrap().name, name);
                continue;
            }
            for link in testbed_link::LINKS {
                Scenario::named(&format!("{name}/{}", link.name)).unwrap();
            }
        }
    }

    /// A family and its `-known` sister differ in nothing but what the target has, and a guest comes
    /// back in the state in which it once left.
    #[test]
    fn sisters_share_their_states() {
        let named = |name: &str| Scenario::named(&format!("{name}/wan-100m")).unwrap();
        for name in ["cold-idle", "cold-used", "filecache"] {
            let (cold, known) = (named(name), named(&format!("{name}-known")));
            assert_eq!((cold.machine, cold.past), (known.machine, known.past));
            assert!(known.known && !cold.known, "{name}");
        }
        for (back, out) in [
            ("return-idle", "cold-idle"),
            ("return-redis", "cold-redis"),
            ("return-use", "cold-redis"),
        ] {
            let (back, out) = (named(back), named(out));
            assert_eq!((back.way(), out.way()), (Way::Back, Way::Out));
            assert_eq!(back.machine, out.machine);
            assert_eq!(back.past.before_stay(), out.past);
        }
    }

    /// What is beside the migration changes nothing of the guest.
    #[test]
    fn beside_is_dirty8() {
        let named = |name: &str| Scenario::named(&format!("{name}/wan-100m")).unwrap();
        for name in ["beside", "beside-game", "pair"] {
            assert_eq!(named(name).machine, named("dirty8").machine);
            assert_eq!(named(name).beside.is_none(), named(name).pair, "{name}");
        }
    }

    /// The demo is dirty8 on its link.
    #[test]
    fn demo_is_dirty8() {
        let demo = Scenario::named("demo").unwrap();
        let same = Scenario::named("dirty8/wan-100m-demo").unwrap();
        assert_eq!((demo.machine, demo.link), (same.machine, same.link));
    }

    #[test]
    fn wrong_names_say_what_to_do() {
        let error = |name: &str| Scenario::named(name).unwrap_err().to_string();
        assert_eq!(error("nothing"), "no scenario nothing: see `testbed list`");
        assert_eq!(
            error("dirty8"),
            "say on which link: dirty8/LINK (see `testbed list`)"
        );
        assert_eq!(error("dirty8/moon"), "no link moon: see `testbed list`");
    }
}
