//! Fills redis with values of made-up words, all different, that compress like text, and changes
//! some of them.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::memory::mix;

const ADDRESS: &str = "127.0.0.1:6379";
const CONNECT_TRIES_MAX: u32 = 200;
const VALUE_BYTES_MAX: usize = 1 << 20;
/// Commands in flight before their answers are read.
const BATCH: u16 = 500;
/// So many words let zstd level 1 shrink the guest to about a third.
const VOCABULARY: u64 = 400;

/// Value of a key that is set for the first time.
const FIRST: u64 = 0;

/// `words` is `KEYS,BYTES`: sets that many keys to values of that many bytes each.
pub(crate) fn fill(words: &str) -> Result<(), String> {
    let [keys, bytes] = numbers(words).ok_or(format!("{words}: not KEYS,BYTES"))?;
    set(keys, |place| (place, FIRST), bytes)
}

/// `words` is `KEYS,BYTES,COUNT` and perhaps `,SEED`: sets so many keys, chosen at random among
/// those that [`fill`] made, to other values of that many bytes.
pub(crate) fn change(words: &str) -> Result<(), String> {
    let wrong = || format!("{words}: not KEYS,BYTES,COUNT[,SEED]");
    let ([keys, bytes, count], seed) = match numbers(words) {
        Some([keys, bytes, count, seed]) => ([keys, bytes, count], seed),
        None => (numbers(words).ok_or_else(wrong)?, 1),
    };
    let drawn = |place: u64| mix(mix(seed) ^ place);
    set(
        count,
        |place| ((drawn(place) >> 8) % keys.max(1), drawn(place)),
        bytes,
    )
}

fn numbers<const N: usize>(words: &str) -> Option<[u64; N]> {
    let parsed: Result<Vec<u64>, _> = words.split(',').map(str::parse).collect();
    parsed.ok()?.try_into().ok()
}

/// Sets `count` keys; `choose` gives each its number and the version of its value.
fn set(count: u64, choose: impl Fn(u64) -> (u64, u64), bytes: u64) -> Result<(), String> {
    let bytes = usize::try_from(bytes)
        .unwrap_or(VALUE_BYTES_MAX)
        .min(VALUE_BYTES_MAX);
    let failed = |error: std::io::Error| format!("redis: {error}");
    let mut stream = connect()?;
    let mut answers = BufReader::new(stream.try_clone().map_err(failed)?);
    let mut answer = String::new();
    for first in (0..count).step_by(usize::from(BATCH)) {
        let end = first.saturating_add(u64::from(BATCH)).min(count);
        let mut batch = String::new();
        for place in first..end {
            let (key, version) = choose(place);
            let (name, value) = (format!("key:{key}"), value(key, version, bytes));
            let (name_bytes, value_bytes) = (name.len(), value.len());
            write!(
                batch,
                "*3\r\n$3\r\nSET\r\n${name_bytes}\r\n{name}\r\n${value_bytes}\r\n{value}\r\n"
            )
            .map_err(|error| error.to_string())?;
        }
        stream.write_all(batch.as_bytes()).map_err(failed)?;
        for _ in first..end {
            answer.clear();
            answers.read_line(&mut answer).map_err(failed)?;
            if answer != "+OK\r\n" {
                return Err(format!("redis answered {answer:?}"));
            }
        }
    }
    Ok(())
}

/// Words of 3 to 10 letters from a fixed vocabulary, chosen by the key and its version.
fn value(key: u64, version: u64, bytes: usize) -> String {
    let mut text = String::with_capacity(bytes + 16);
    let mut state = mix(key ^ 0x0007_ed15).wrapping_add(version);
    while text.len() < bytes {
        state = mix(state);
        // Small numbers come more often, as frequent words do in text.
        let draws = [state, state >> 20, state >> 40].map(|draw| draw % VOCABULARY);
        let rank = draws[0].min(draws[1]).min(draws[2]);
        let mut letters = mix(rank ^ 0xabcd);
        for _ in 0..3 + letters % 8 {
            text.push(char::from(b'a' + u8::try_from(letters % 26).unwrap_or(0)));
            letters = mix(letters);
        }
        text.push(' ');
    }
    text.truncate(bytes);
    text
}

fn connect() -> Result<TcpStream, String> {
    for _ in 0..CONNECT_TRIES_MAX {
        if let Ok(stream) = TcpStream::connect(ADDRESS) {
            return Ok(stream);
        }
        pause(Duration::from_millis(50));
    }
    Err("redis did not come up".to_owned())
}

#[expect(
    clippy::disallowed_methods,
    reason = "redis says in no other way that it is not up yet"
)]
fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_numbers() {
        assert_eq!(numbers("250000,500"), Some([250_000, 500]));
        assert_eq!(numbers::<3>("250000,500"), None);
        assert_eq!(numbers::<2>("250000,many"), None);
    }

    /// Values have the size asked for, are all different, and the same for the same key.
    #[test]
    fn values_are_distinct_text() {
        let values: std::collections::BTreeSet<String> =
            (0..1000).map(|key| value(key, FIRST, 200)).collect();
        assert_eq!(values.len(), 1000);
        assert!(values.iter().all(|value| value.len() == 200));
        assert_eq!(value(7, FIRST, 64), value(7, FIRST, 64));
        assert_ne!(value(7, FIRST, 64), value(7, 9, 64), "a change changes it");
    }
}
