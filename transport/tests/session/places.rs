//! Ways to every state.

use crate::inputs::Named;

/// States of the source with the inputs, by name, that lead there from the last state named before
/// `from`.
pub(crate) const SOURCE_STATES: [Place; 27] = [
    ("waiting", "", &[]),
    ("preparing", "waiting", &["Frame Ready"]),
    ("layout", "preparing", &["Head"]),
    (
        "pre-copy, first pass",
        "layout",
        &["Frame LayoutTaken", "PassStarted"],
    ),
    ("pre-copy, held", "pre-copy, first pass", &["PassDrained"]),
    (
        "pre-copy, pass triggered",
        "pre-copy, held",
        &["Sample, nothing left"],
    ),
    (
        "pre-copy, held again",
        "pre-copy, pass triggered",
        &["PassStarted", "PassDrained"],
    ),
    (
        "stop asked for",
        "pre-copy, held again",
        &["Sample, nothing left"],
    ),
    ("stopped unasked", "pre-copy, held", &["VmStopped"]),
    (
        "draining",
        "stop asked for",
        &["VmStopped", "RamEnd", "Tail"],
    ),
    ("all is sent", "draining", &["Marked"]),
    ("loaded, not proved here", "all is sent", &["Frame Loaded"]),
    (
        "SHUT(0) is given",
        "all is sent",
        &["Proved Ok", "Frame Loaded"],
    ),
    (
        "intent being written",
        "SHUT(0) is given",
        &["VmMigration Completed"],
    ),
    ("committed", "intent being written", &["Journaled Ok"]),
    ("in doubt", "committed", &["PeerLost"]),
    ("asking", "in doubt", &["Reconnected"]),
    ("settling", "committed", &["Frame Running"]),
    ("returning, socket closed", "draining", &["Abort"]),
    (
        "returning, on the way to postmigrate",
        "SHUT(0) is given",
        &["Abort"],
    ),
    (
        "returning, refused after Commit",
        "committed",
        &["Frame Answer Refused"],
    ),
    (
        "all is sent, pages stay behind",
        "draining",
        &["Marked, pages stay behind"],
    ),
    (
        "committed, pages stay behind",
        "all is sent, pages stay behind",
        &[
            "Proved Ok",
            "Frame Loaded",
            "VmMigration Completed",
            "Journaled Ok",
        ],
    ),
    (
        "holding pages",
        "committed, pages stay behind",
        &["Frame Running"],
    ),
    ("relay, layout", "preparing", &["Relay"]),
    ("relaying", "relay, layout", &["Frame LayoutTaken"]),
    ("relaying, stopped", "relaying", &["VmStopped"]),
];

/// The same for the target.
pub(crate) const TARGET_STATES: [Place; 25] = [
    ("waiting", "", &[]),
    ("preparing", "waiting", &["Frame Layout"]),
    (
        "preparing, basis awaited",
        "waiting",
        &["Frame Layout, basis"],
    ),
    (
        "preparing, basis compared",
        "preparing, basis awaited",
        &["VmPrepared", "Frame Basis"],
    ),
    (
        "receiving, with a basis",
        "preparing, basis compared",
        &["BasisAgreed"],
    ),
    ("receiving", "preparing", &["VmPrepared"]),
    (
        "receiving, pages missing at the end",
        "receiving",
        &[
            "Missing",
            "Frame Tail",
            "Applied, pages missing",
            "Frame Final",
        ],
    ),
    (
        "receiving, all applied",
        "receiving",
        &["Frame Tail", "Applied"],
    ),
    ("loading", "receiving, all applied", &["Frame Final"]),
    ("proving", "loading", &["VmLoaded"]),
    ("loaded", "proving", &["Proved Ok"]),
    ("rechecking", "loaded", &["Frame Commit"]),
    ("Commit being written", "rechecking", &["Rechecked Ok"]),
    ("starting", "Commit being written", &["Journaled Ok"]),
    ("running", "starting", &["VmResumed"]),
    ("refusing before Loaded", "receiving", &["Abort"]),
    ("refusing after Loaded", "rechecking", &["Rechecked Err"]),
    ("never ran", "starting", &["NeverRan"]),
    (
        "receiving, pages may stay behind",
        "preparing",
        &["VmPrepared, post-copy"],
    ),
    (
        "receiving, pages stay behind",
        "receiving, pages may stay behind",
        &["Frame Tail", "Applied", "Frame Final, pages stay behind"],
    ),
    (
        "loaded, pages lacking",
        "receiving, pages stay behind",
        &["LeftOut", "VmLoaded", "Proved Ok"],
    ),
    (
        "running, pages lacking",
        "loaded, pages lacking",
        &["Frame Commit", "Rechecked Ok", "Journaled Ok", "VmResumed"],
    ),
    (
        "running, all pages came",
        "running, pages lacking",
        &["AllPages"],
    ),
    ("relay, preparing", "waiting", &["Frame Relay"]),
    ("relaying", "relay, preparing", &["VmPrepared"]),
];

/// Name, name of the state before, inputs from there.
pub(crate) type Place = (&'static str, &'static str, &'static [&'static str]);

/// All inputs from the beginning to a place.
pub(crate) fn way(places: &[Place], name: &str) -> Vec<&'static str> {
    let (_, from, inputs) = places
        .iter()
        .find(|(place, ..)| *place == name)
        .expect("a place of the list");
    let mut all = if from.is_empty() {
        Vec::new()
    } else {
        way(places, from)
    };
    all.extend(*inputs);
    all
}

/// The input of this name.
pub(crate) fn named<T>(inputs: Vec<Named<T>>, name: &str) -> T {
    let found = inputs.into_iter().find(|(known, _)| *known == name);
    found.expect("an input of the list").1
}
