//! Device state in pieces, each compressed on its own.

use bytes::Bytes;

use super::limits::FRAME_MAX_BYTES;
use super::{Frame, WireError};

/// Most bytes of one piece before compression: even what does not shrink fits a frame.
pub const TAIL_PIECE_MAX_BYTES: usize = 512 * 1024;
/// Device state is small and on the black-out path: a quick level, twice as good as none.
const LEVEL: i32 = 3;

/// Compresses a piece into a [`Frame::Tail`].
///
/// # Errors
/// When the piece is longer than [`TAIL_PIECE_MAX_BYTES`], or zstd has no memory.
pub fn pack(piece: &[u8]) -> Result<Frame, WireError> {
    if piece.len() > TAIL_PIECE_MAX_BYTES {
        return Err(WireError::LocalTooLong {
            field: "tail",
            bytes: piece.len(),
            bytes_max: TAIL_PIECE_MAX_BYTES,
        });
    }
    let data = zstd::bulk::compress(piece, LEVEL)
        .map_err(|error| WireError::LocalCompress(error.to_string()))?;
    let raw_len = crate::block::length_u32(piece.len());
    Ok(Frame::Tail {
        data: Bytes::from(data),
        raw_len,
    })
}

/// Decompresses a piece to exactly its announced size.
///
/// # Errors
/// When the size is above the limit or the piece does not have it.
pub fn unpack(data: &[u8], raw_len: u32) -> Result<Vec<u8>, WireError> {
    let bytes = crate::block::index(raw_len);
    if bytes > FRAME_MAX_BYTES {
        return Err(WireError::PeerTail(raw_len));
    }
    let mut piece = vec![0; bytes];
    match zstd::bulk::decompress_to_buffer(data, piece.as_mut_slice()) {
        Ok(found) if found == bytes => Ok(piece),
        Ok(_) | Err(_) => Err(WireError::PeerTail(raw_len)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(frame: Frame) -> (Bytes, u32) {
        let Frame::Tail { data, raw_len } = frame else {
            panic!("{frame:?}")
        };
        (data, raw_len)
    }

    /// A piece comes back as it was, whatever its size.
    #[test]
    fn pieces_come_back() {
        for bytes in [0, 1, 70_000, TAIL_PIECE_MAX_BYTES] {
            let piece: Vec<u8> = (0..bytes).map(|n| (n * n).to_le_bytes()[0] % 251).collect();
            let (data, raw_len) = tail(pack(&piece).unwrap());
            assert_eq!(unpack(&data, raw_len).unwrap(), piece);
        }
    }

    /// Limits on both sides, and a bomb that claims less than it holds.
    #[test]
    fn sizes_are_bounded() {
        assert_eq!(
            pack(&vec![0; TAIL_PIECE_MAX_BYTES + 1]),
            Err(WireError::LocalTooLong {
                field: "tail",
                bytes: TAIL_PIECE_MAX_BYTES + 1,
                bytes_max: TAIL_PIECE_MAX_BYTES
            })
        );
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        assert_eq!(unpack(&bomb, 4096), Err(WireError::PeerTail(4096)));
        assert_eq!(unpack(&bomb, 64 << 20), Err(WireError::PeerTail(64 << 20)));
        let (data, _) = tail(pack(&[7; 100]).unwrap());
        assert_eq!(unpack(&data, 101), Err(WireError::PeerTail(101)));
        assert_eq!(unpack(b"no zstd", 7), Err(WireError::PeerTail(7)));
    }
}
