//! Pages by class, the same for every run: fixed seed.

/// A page class of a real guest, and one page of it.
pub(crate) struct Class {
    /// Name in the benchmark's identifier.
    pub(crate) name: &'static str,
    /// Makes page number `n`.
    pub(crate) make: fn(u64) -> [u8; 4096],
}

/// Every class that is measured.
pub(crate) const CLASSES: [Class; 4] = [
    Class {
        name: "zero",
        make: |_| [0; 4096],
    },
    Class {
        name: "text",
        make: text,
    },
    Class {
        name: "heap-like",
        make: heap_like,
    },
    Class {
        name: "random",
        make: random,
    },
];

/// splitmix64
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Words of a log file with numbers between them.
fn text(n: u64) -> [u8; 4096] {
    const WORDS: [&str; 12] = [
        "connection",
        "from",
        "the",
        "user",
        "session",
        "opened",
        "closed",
        "error:",
        "status",
        "request",
        "GET /index.html",
        "\n",
    ];
    let mut state = n;
    let mut page = String::new();
    while page.len() < 4096 {
        let random = next(&mut state);
        match random % 5 {
            0 => page.push_str(&(random >> 48).to_string()),
            _ => page.push_str(WORDS[(random >> 32) as usize % WORDS.len()]),
        }
        page.push(' ');
    }
    *page.as_bytes().first_chunk().expect("filled to 4096")
}

/// Records of a pointer, a length, flags and a short value, half of them free.
fn heap_like(n: u64) -> [u8; 4096] {
    let mut state = n;
    let mut page = [0; 4096];
    for record in page.chunks_exact_mut(64) {
        let random = next(&mut state);
        if random & 1 == 0 {
            continue;
        }
        let pointer = 0x7f3a_1200_0000 | (random >> 40) << 4;
        record[..8].copy_from_slice(&pointer.to_le_bytes());
        record[8..16].copy_from_slice(&(random >> 58).to_le_bytes());
        record[16..20].copy_from_slice(&[1, 0, 0, 0x80]);
        record[32..44].copy_from_slice(format!("key:{:08x}", random & 0xffff_ffff).as_bytes());
        record[44..52].copy_from_slice(&next(&mut state).to_le_bytes());
    }
    page
}

fn random(n: u64) -> [u8; 4096] {
    let mut state = !n;
    let mut page = [0; 4096];
    for word in page.chunks_exact_mut(8) {
        word.copy_from_slice(&next(&mut state).to_le_bytes());
    }
    page
}
