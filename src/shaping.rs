//! Words of the command line for what a flow may take of the link.

use std::time::Duration;

use transport::quic::{Mode, Shaping};

use crate::cli::rate;

/// Default and bounds of `--yield`, in ms.
const YIELD_MS: &str = "5";
const YIELD_MS_MAX: u64 = 1000;

/// How much of the link this side's pages take.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ShapingArgs {
    /// Cap of the transfer's rate in bit/s (k, M, G).
    #[arg(long, value_name = "RATE", value_parser = rate)]
    max_bandwidth: Option<u64>,
    /// Give way to other traffic: keep the queueing delay of the link below so many ms, down to
    /// --min-bandwidth.
    #[arg(
        long = "yield",
        value_name = "MS",
        num_args = 0..=1,
        default_missing_value = YIELD_MS,
        value_parser = clap::value_parser!(u64).range(1..=YIELD_MS_MAX)
    )]
    yields: Option<u64>,
    /// Least rate in bit/s that is kept while giving way; without, a twentieth of the link's rate,
    /// at least 1M.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    min_bandwidth: Option<u64>,
}

impl ShapingArgs {
    pub(crate) fn shaping(&self) -> Shaping {
        let shaping = Shaping::default();
        shaping.set_rate_max(self.max_bandwidth);
        shaping.set_rate_min(self.min_bandwidth);
        shaping.set_mode(self.yields.map_or(Mode::Fill, yielding));
        shaping
    }
}

/// What a cap in IP bits leaves for lanes: about a twentieth is headers of IP, UDP, QUIC and frames.
pub(crate) fn lane_bytes_per_s(ip_bps: u64) -> u64 {
    (ip_bps / 160 * 19).max(1)
}

/// `set VM yield VALUE`: `off`, `on` or ms.
pub(crate) fn yield_ms(text: &str) -> Option<u64> {
    match text {
        "off" => Some(0),
        "on" => YIELD_MS.parse().ok(),
        _ => text
            .parse()
            .ok()
            .filter(|ms| (1..=YIELD_MS_MAX).contains(ms)),
    }
}

/// 0 is off.
pub(crate) fn mode(ms: u64) -> Mode {
    if ms == 0 { Mode::Fill } else { yielding(ms) }
}

fn yielding(ms: u64) -> Mode {
    Mode::Yield {
        queueing: Duration::from_millis(ms.min(YIELD_MS_MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words and bounds.
    #[test]
    fn yielding_in_words() {
        let check = |text, expected| assert_eq!(yield_ms(text), expected, "{text}");
        check("off", Some(0));
        check("on", Some(5));
        check("12", Some(12));
        check("0", None);
        check("1001", None);
        check("soon", None);
        assert_eq!(mode(0), Mode::Fill);
    }
}
