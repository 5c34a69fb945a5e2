//! Counts and estimates: a count as a number to reckon with, and back.

/// Exact below 2^53, which no count here passes.
#[expect(clippy::cast_precision_loss, reason = "estimates need no 53rd bit")]
pub(crate) fn to_f64(value: u64) -> f64 {
    value as f64
}

/// Below zero is zero.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped first"
)]
pub(crate) fn to_u64(value: f64) -> u64 {
    value.clamp(0.0, 1e18) as u64
}
