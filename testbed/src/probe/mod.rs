//! What the user sees during a move: of the guest by `ping` and the counter over TCP, and of the
//! network by flows of other people (`flow`).
//!
//! All run in a host and stamp what they see by the machine's clock (microseconds since 1970), the
//! clock of QEMU's events. Their logs are cut into spans afterwards.

mod counter;
mod flow;
mod lines;
mod ping;

pub use counter::{CounterLog, CounterProbe, Sample, watch as watch_counter};
pub use flow::{
    BulkLog, BulkProbe, GameLog, GameProbe, GameStats, receive_bulk, receive_game, send_bulk,
    send_game,
};
pub use ping::{PingLog, PingProbe, PingStats, Reply};
