//! What the user sees of the guest during a move: `ping` and the counter over TCP.
//!
//! Both run in a host and stamp what they see by the machine's clock (microseconds since 1970), the
//! clock of QEMU's events. Their logs are cut into spans afterwards.

mod counter;
mod ping;

pub use counter::{CounterLog, CounterProbe, Sample, watch as watch_counter};
pub use ping::{PingLog, PingProbe, PingStats, Reply};
