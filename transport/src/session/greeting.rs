//! The first frame of each side, checked.

use crate::wire::{AttemptId, Hello, PROTOCOL_VERSION, Purpose, Role};

/// What both sides agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// What the connection is for: what both want, or the probe that one of them came with.
    pub purpose: Purpose,
    /// UUID or name of the VM.
    pub vm: String,
    /// Feature bits that both have.
    pub features: u64,
    /// The attempt, as the source named it.
    pub attempt: AttemptId,
    /// Incarnation of the peer's process.
    pub peer_incarnation: u64,
    /// The peer's program and version.
    pub peer_software: String,
}

/// Compares the peer's hello with ours.
///
/// # Errors
/// Text for the operator on both sides that tells what to change; goes out as an `Incompatible`
/// abort before closing.
pub fn greet(mine: &Hello, theirs: &Hello) -> Result<Agreed, String> {
    if theirs.version != PROTOCOL_VERSION {
        return Err(format!(
            "peer speaks protocol version {}, this side {PROTOCOL_VERSION}: install the same release on both hosts",
            theirs.version
        ));
    }
    let (source, target) = match mine.role {
        Role::Source => (mine.purpose, theirs.purpose),
        Role::Target => (theirs.purpose, mine.purpose),
    };
    let purpose = common_purpose(source, target)?;
    if theirs.role == mine.role {
        return Err(format!(
            "both sides are the {}: run `send` where the guest is and `receive` where it goes",
            role_name(mine.role)
        ));
    }
    // A target that only answers probes has no VM.
    let for_any_vm = target == Purpose::Probe && (mine.vm.is_empty() || theirs.vm.is_empty());
    if theirs.vm != mine.vm && !for_any_vm {
        return Err(format!(
            "VM names differ: {:?} here, {:?} at the peer; start target QEMU with the source's -uuid, or give the same --vm on both sides",
            mine.vm, theirs.vm
        ));
    }
    let attempt = match mine.role {
        Role::Source => mine.attempt,
        Role::Target => theirs.attempt,
    };
    if attempt == AttemptId([0; 16]) {
        return Err("the source named no attempt".into());
    }
    Ok(Agreed {
        purpose,
        vm: if mine.vm.is_empty() {
            &theirs.vm
        } else {
            &mine.vm
        }
        .clone(),
        features: mine.features & theirs.features,
        attempt,
        peer_incarnation: theirs.incarnation,
        peer_software: theirs.software.clone(),
    })
}

/// A target that waits for a guest answers probes too; all else must be the same on both sides.
fn common_purpose(source: Purpose, target: Purpose) -> Result<Purpose, String> {
    match (source, target) {
        (Purpose::Probe, Purpose::Migrate | Purpose::Probe) => Ok(Purpose::Probe),
        (Purpose::Migrate, Purpose::Probe) => Err(
            "the target only answers probes (`receive --probe`): start `scaleaway receive --qmp PATH` there"
                .into(),
        ),
        (Purpose::Migrate, Purpose::Migrate) | (Purpose::Settle, Purpose::Settle) => Ok(source),
        (Purpose::Settle, _) | (_, Purpose::Settle) => Err(format!(
            "the source wants to {source:?}, the target to {target:?}: run the matching verbs on both hosts"
        )),
    }
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Source => "source",
        Role::Target => "target",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Purpose;

    fn hello(role: Role) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            features: 3,
            role,
            purpose: Purpose::Migrate,
            vm: "vm".into(),
            attempt: AttemptId([7; 16]),
            incarnation: 1,
            secret_id: None,
            secret: None,
            software: "test".into(),
        }
    }

    /// Fitting hellos agree on the source's attempt and the common features.
    #[test]
    fn fitting_hellos_agree() {
        let source = hello(Role::Source);
        let target = Hello {
            attempt: AttemptId([0; 16]),
            features: 6,
            ..hello(Role::Target)
        };
        let agreed = greet(&target, &source).unwrap();
        assert_eq!((agreed.attempt, agreed.features), (source.attempt, 2));
    }

    /// A waiting target answers a probe of its VM; one that has no VM answers any, and takes no guest.
    #[test]
    fn probes() {
        let probing = Hello {
            purpose: Purpose::Probe,
            ..hello(Role::Source)
        };
        let waiting = hello(Role::Target);
        assert_eq!(greet(&waiting, &probing).unwrap().purpose, Purpose::Probe);
        assert_eq!(greet(&probing, &waiting).unwrap().purpose, Purpose::Probe);
        let answering = Hello {
            purpose: Purpose::Probe,
            vm: String::new(),
            ..hello(Role::Target)
        };
        assert_eq!(greet(&answering, &probing).unwrap().purpose, Purpose::Probe);
        assert_eq!(greet(&probing, &answering).unwrap().purpose, Purpose::Probe);
        let refusal = greet(&answering, &hello(Role::Source)).unwrap_err();
        assert!(refusal.contains("only answers probes"), "{refusal}");
        let settling = Hello {
            purpose: Purpose::Settle,
            ..hello(Role::Target)
        };
        assert!(greet(&settling, &probing).is_err());
        let other = Hello {
            vm: "other".into(),
            ..probing
        };
        assert!(greet(&waiting, &other).is_err());
    }

    /// Each difference that matters is refused.
    #[test]
    fn differences_are_refused() {
        let mine = hello(Role::Source);
        for theirs in [
            Hello {
                version: 9,
                ..hello(Role::Target)
            },
            Hello {
                purpose: Purpose::Settle,
                ..hello(Role::Target)
            },
            Hello {
                vm: "other".into(),
                ..hello(Role::Target)
            },
            hello(Role::Source),
        ] {
            assert!(greet(&mine, &theirs).is_err(), "accepted {theirs:?}");
        }
    }
}
