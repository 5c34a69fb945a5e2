//! Traffic of people beside a migration: a flow like a game's, and a TCP stream that takes all that
//! it gets. Both go from one host to another; sender and receiver are verbs of the lab's own program.

mod bulk;
mod game;

pub use bulk::{BulkLog, BulkProbe, receive as receive_bulk, send as send_bulk};
pub use game::{GameLog, GameProbe, GameStats, receive as receive_game, send as send_game};
