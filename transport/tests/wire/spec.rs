//! docs/protocol.md is the spec: the frames and limits in the source cannot change alone.

use std::path::Path;

/// Hash over the code of wire/frame.rs and wire/limits.rs (comments and blank lines left out)
/// stands in docs/protocol.md. Who changes a frame or a limit changes the spec's text, then its
/// hash line.
#[test]
fn spec_knows_every_frame_and_limit() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut hasher = blake3::Hasher::new();
    for file in ["frame.rs", "limits.rs"] {
        let source = std::fs::read_to_string(root.join("src/wire").join(file)).unwrap();
        for line in source.lines().map(str::trim) {
            if !line.is_empty() && !line.starts_with("//") {
                hasher.update(line.as_bytes()).update(b"\n");
            }
        }
    }
    let expected = format!("Frames and limits: `{}`", hasher.finalize().to_hex());
    let spec = std::fs::read_to_string(root.join("../docs/protocol.md")).unwrap();
    assert!(
        spec.lines().any(|line| line == expected),
        "wire/frame.rs or wire/limits.rs changed: bring docs/protocol.md up to date, then its line\n{expected}"
    );
}
