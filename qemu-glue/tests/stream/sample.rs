//! A stream as 10.0 sends it with a return path, written by hand.

use qemu_glue::stream::PAGE_SIZE;

/// Bytes of the sample's device state, and of all after RAM.
pub(super) const DEVICES: usize = 29;
pub(super) const TAIL: usize = DEVICES + 1 + 5 + 34;

/// Where the first PART begins in the sample.
pub(super) fn ram_start() -> usize {
    24 + 40 + 5 + 9 + 17 + 8 + 15 + 15 + 13
}

/// Where its first record begins.
pub(super) fn first_record() -> usize {
    ram_start() + 5
}

/// Where the second PART begins.
pub(super) fn after_first_part() -> usize {
    first_record() + (8 + 7 + PAGE_SIZE) + 9 + 16 + 13
}

/// The stream.
pub(super) fn sample() -> Vec<u8> {
    let mut page = [0xff; PAGE_SIZE];
    page[0] = 0x53;
    [
        b"QEVM\0\0\0\x03",                    // magic, version
        b"\x07\0\0\0\x0bpc-q35-10.0".as_slice(), // configuration: machine type
        b"\x05\x12configuration/uuid\0\0\0\x01\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff\0",
        b"\x08\0\x01\0\0",                    // OPEN_RETURN_PATH
        b"\x08\0\x02\0\x04\0\0\0\x01",        // PING 1
        b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04", // START, section 2, version 4 (17 bytes)
        b"\0\0\0\0\0\0\x50\x04",              // MEM_SIZE: 0x5000 bytes
        b"\x06pc.ram\0\0\0\0\0\0\x40\0",
        b"\x06pc.rom\0\0\0\0\0\0\x10\0",
        b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",  // EOS, footer
        b"\x02\0\0\0\x02",                    // PART
        b"\0\0\0\0\0\0\0\x08\x06pc.ram",      // page 0 of pc.ram
        &page,
        b"\0\0\0\0\0\0\x10\x22\0",            // page 1 is zero, same block
        b"\0\0\0\0\0\0\0\x02\x06pc.rom\0",    // page 0 of pc.rom is zero
        b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
        b"\x02\0\0\0\x02",                    // PART that continues in pc.rom
        b"\0\0\0\0\0\0\0\x22\0",
        b"\0\0\0\0\0\0\0\x40\x06pc.ram\x01\0\x03\0\x01\x54", // change of page 0
        b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
        b"\x08\0\x0b\0\0",                    // SWITCHOVER_START
        b"\x03\0\0\0\x02",                    // END
        b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
        b"\x04\0\0\0\0\x05timer\0\0\0\0\0\0\0\x02state\x7e\0\0\0\0", // device state
        b"\0",                                // EOF
        b"\x06\0\0\0\x22{\"page_size\": 4096, \"devices\": []}", // description
    ]
    .concat()
}
