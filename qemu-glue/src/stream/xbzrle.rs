//! QEMU's delta of a page: which bytes stay, which are new.
//!
//! ```text
//! { count of bytes that stay | count of new bytes | the new bytes }*   counts: uleb128, 1-2 bytes
//! ```
//!
//! `//= qemu docs/devel/migration/features.rst, xbzrle.txt; migration/xbzrle.c`

use super::PAGE_SIZE;

/// A change that does not fit a page, or is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a change of a page is malformed at byte {at}")]
pub struct XbzrleError {
    /// Where in the encoded bytes.
    pub at: usize,
}

/// Applies a change to the version of the page that the source sent last.
///
/// # Errors
/// [`XbzrleError`]; the page's content is then undefined.
pub fn apply(page: &mut [u8; PAGE_SIZE], encoded: &[u8]) -> Result<(), XbzrleError> {
    let mut at = 0;
    let mut place = 0;
    while at < encoded.len() {
        let first = at == 0;
        let kept = count(encoded, &mut at)?;
        if kept == 0 && !first {
            return Err(XbzrleError { at });
        }
        place += kept;
        let fresh = count(encoded, &mut at)?;
        let content = encoded
            .get(at..at + fresh)
            .filter(|content| !content.is_empty());
        let content = content.ok_or(XbzrleError { at })?;
        let target = page
            .get_mut(place..place + fresh)
            .ok_or(XbzrleError { at })?;
        target.copy_from_slice(content);
        at += fresh;
        place += fresh;
    }
    Ok(())
}

/// Encodes the change from `before` to `after`; `None` when there is none or when it would be as
/// large as the page.
pub fn encode(before: &[u8; PAGE_SIZE], after: &[u8; PAGE_SIZE]) -> Option<Vec<u8>> {
    let mut encoded = Vec::new();
    let mut place = 0;
    while place < PAGE_SIZE {
        let differs = |at: &usize| before[*at] != after[*at];
        let Some(start) = (place..PAGE_SIZE).find(differs) else {
            break;
        };
        let end = (start..PAGE_SIZE)
            .find(|at| !differs(at))
            .unwrap_or(PAGE_SIZE);
        push_count(&mut encoded, start - place);
        push_count(&mut encoded, end - start);
        encoded.extend_from_slice(&after[start..end]);
        if encoded.len() >= PAGE_SIZE {
            return None;
        }
        place = end;
    }
    (!encoded.is_empty()).then_some(encoded)
}

/// One count; two bytes hold at most 14 bits, so sums of them stay small.
fn count(encoded: &[u8], at: &mut usize) -> Result<usize, XbzrleError> {
    let wrong = XbzrleError { at: *at };
    match encoded[*at..] {
        [low @ 0..=0x7f, ..] => {
            *at += 1;
            Ok(low.into())
        }
        [low, high @ 0..=0x7f, ..] => {
            *at += 2;
            Ok(usize::from(low & 0x7f) | usize::from(high) << 7)
        }
        _ => Err(wrong),
    }
}

fn push_count(encoded: &mut Vec<u8>, count: usize) {
    let [low, high] = [count & 0x7f, count >> 7]
        .map(|part| u8::try_from(part).expect("a count is at most a page: 13 bits"));
    if high == 0 {
        encoded.push(low);
    } else {
        encoded.extend_from_slice(&[low | 0x80, high]);
    }
}
