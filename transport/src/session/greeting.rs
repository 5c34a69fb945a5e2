//! The first frame of each side, checked.

use crate::wire::{AttemptId, Hello, PROTOCOL_VERSION, Role};

/// What both sides agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
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
    if theirs.purpose != mine.purpose {
        return Err(format!(
            "peer wants to {:?}, this side to {:?}: run the matching verbs on both hosts",
            theirs.purpose, mine.purpose
        ));
    }
    if theirs.role == mine.role {
        return Err(format!(
            "both sides are the {}: run `send` where the guest is and `receive` where it goes",
            role_name(mine.role)
        ));
    }
    if theirs.vm != mine.vm {
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
        features: mine.features & theirs.features,
        attempt,
        peer_incarnation: theirs.incarnation,
        peer_software: theirs.software.clone(),
    })
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
