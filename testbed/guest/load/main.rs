//! The program inside the lab's guest: it dirties memory at a set rate, recomputes every page for
//! ever, and serves a counter.
//!
//! ```text
//! guestload serve [--listen ADDR:PORT] [--serial DEVICE] WORDS
//! guestload fill-redis KEYS,BYTES
//! guestload change-redis KEYS,BYTES,COUNT[,SEED]
//! ```
//! `WORDS` are separated by commas (all optional): `ws=MIB` working set, `rate=PAGES_PER_S`,
//! `verify=PAGES_PER_S`, `entropy=PERCENT` of random bytes in a page, `pattern=random|hot|sequential`
//! (hot: nine writes of ten go to a tenth of the pages), `seed=N`.
//!
//! Protocol, on TCP (a line every 20 ms) and on the serial device (every 100 ms), one line each:
//! `COUNT n ERRORS e WRITES w SWEEPS s`. A line `VERIFY` sent to it is answered, after every page
//! was recomputed, by `VERIFIED errors=e pages=p`. The count never falls while the program lives.
//! On the serial device alone, `RUN COMMAND` runs a shell command and is answered by `RAN code` at its
//! end: what a scenario does to its guest before the guest is saved.
//!
//! Standard library only: it is linked statically and runs from a bare initrd.
//! Reading order: `main.rs`, `memory.rs`, `worker.rs`, `serve.rs`, `redis.rs`.
#![forbid(unsafe_code)]

mod memory;
mod redis;
mod serve;
mod worker;

use std::process::ExitCode;

use memory::Pattern;
use worker::Settings;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guestload: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<(), String> {
    match arguments.first().map(String::as_str) {
        Some("serve") => serve(&arguments[1..]),
        Some("fill-redis") => {
            let words = arguments.get(1).ok_or("fill-redis needs KEYS,BYTES")?;
            redis::fill(words)
        }
        Some("change-redis") => {
            let words = arguments
                .get(1)
                .ok_or("change-redis needs KEYS,BYTES,COUNT")?;
            redis::change(words)
        }
        _ => Err("say `serve`, `fill-redis` or `change-redis`".to_owned()),
    }
}

fn serve(arguments: &[String]) -> Result<(), String> {
    let mut listen = None;
    let mut serial = None;
    let mut settings = Settings::default();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--listen" => listen = rest.next().cloned(),
            "--serial" => serial = rest.next().cloned(),
            words => settings = parse_words(words)?,
        }
    }
    let (worker, demands) = worker::Worker::new(settings);
    let counters = worker.counters();
    if let Some(address) = &listen {
        serve::on_tcp(address, &counters, &demands)
            .map_err(|error| format!("cannot listen on {address}: {error}"))?;
    }
    if let Some(device) = &serial {
        serve::on_serial(device, &counters, &demands)
            .map_err(|error| format!("cannot open {device}: {error}"))?;
    }
    worker.run()
}

fn parse_words(words: &str) -> Result<Settings, String> {
    let mut settings = Settings::default();
    for word in words.split(',').filter(|word| !word.is_empty()) {
        let (name, value) = word
            .split_once('=')
            .ok_or(format!("{word}: not NAME=VALUE"))?;
        let number = value
            .parse::<u64>()
            .map_err(|_| format!("{word}: not a number"));
        match name {
            "ws" => settings.working_set_mib = number?,
            "rate" => settings.writes_per_s = number?,
            "verify" => settings.checks_per_s = number?,
            "entropy" => settings.entropy_percent = number?.min(100),
            "seed" => settings.seed = number?,
            "pattern" => {
                settings.pattern = match value {
                    "random" => Pattern::Random,
                    "hot" => Pattern::Hot,
                    "sequential" => Pattern::Sequential,
                    _ => return Err(format!("{word}: random, hot or sequential")),
                }
            }
            _ => return Err(format!("{word}: unknown")),
        }
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every word of the kernel command line is understood, and a wrong one is an error.
    #[test]
    fn words_are_parsed() {
        let settings = parse_words("ws=4,rate=10,verify=20,entropy=30,seed=5,pattern=hot");
        let settings = settings.expect("all words are known");
        assert_eq!((settings.working_set_mib, settings.writes_per_s), (4, 10));
        assert_eq!(
            (
                settings.checks_per_s,
                settings.entropy_percent,
                settings.seed
            ),
            (20, 30, 5)
        );
        assert_eq!(settings.pattern, Pattern::Hot);
        assert_eq!(parse_words("ws"), Err("ws: not NAME=VALUE".to_owned()));
        assert_eq!(
            parse_words("rate=x"),
            Err("rate=x: not a number".to_owned())
        );
    }
}
