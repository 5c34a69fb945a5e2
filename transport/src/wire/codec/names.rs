//! Numbers of the small enums.

use crate::wire::{AbortCode, Purpose, Role, RunState, Verdict, Verify};

/// An enum with a number for each value on the wire.
pub(super) trait Coded: Sized + Copy + PartialEq + 'static {
    /// Every value with its number.
    const CODES: &'static [(Self, u8)];

    fn code(self) -> u8 {
        let found = Self::CODES.iter().find(|(value, _)| *value == self);
        found.expect("CODES lists every value, see its test").1
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::CODES
            .iter()
            .find(|(_, known)| *known == code)
            .map(|(value, _)| *value)
    }
}

impl Coded for Role {
    const CODES: &'static [(Self, u8)] = &[(Self::Source, 1), (Self::Target, 2)];
}

impl Coded for Purpose {
    const CODES: &'static [(Self, u8)] = &[(Self::Migrate, 1), (Self::Settle, 2), (Self::Probe, 3)];
}

impl Coded for Verify {
    const CODES: &'static [(Self, u8)] = &[(Self::Off, 0), (Self::Sample, 1), (Self::Full, 2)];
}

impl Coded for RunState {
    const CODES: &'static [(Self, u8)] = &[(Self::Running, 1), (Self::Paused, 2)];
}

impl Coded for Verdict {
    const CODES: &'static [(Self, u8)] = &[
        (Self::Unknown, 0),
        (Self::Refused, 1),
        (Self::NeverRan, 2),
        (Self::Committed, 3),
        (Self::Running, 4),
        (Self::Stayed, 5),
    ];
}

impl Coded for AbortCode {
    const CODES: &'static [(Self, u8)] = &[
        (Self::Operator, 1),
        (Self::Incompatible, 2),
        (Self::Qemu, 3),
        (Self::Protocol, 4),
        (Self::Memory, 5),
        (Self::Resources, 6),
        (Self::Unsettled, 7),
        (Self::Link, 8),
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Coded + std::fmt::Debug>(all: &[T]) {
        assert_eq!(all.len(), T::CODES.len());
        for value in all {
            assert_eq!(T::from_code(value.code()), Some(*value));
        }
        assert_eq!(T::from_code(200), None);
    }

    /// Every value has one number, and numbers without a value are refused.
    #[test]
    fn every_value_has_its_number() {
        check(&[Role::Source, Role::Target]);
        check(&[Purpose::Migrate, Purpose::Settle, Purpose::Probe]);
        check(&[Verify::Off, Verify::Sample, Verify::Full]);
        check(&[RunState::Running, RunState::Paused]);
        check(&[
            Verdict::Unknown,
            Verdict::Refused,
            Verdict::NeverRan,
            Verdict::Committed,
            Verdict::Running,
            Verdict::Stayed,
        ]);
        check(&[
            AbortCode::Operator,
            AbortCode::Incompatible,
            AbortCode::Qemu,
            AbortCode::Protocol,
            AbortCode::Memory,
            AbortCode::Resources,
            AbortCode::Unsettled,
            AbortCode::Link,
        ]);
    }
}
