//! Every state with every input: what the machine does. `table.txt` holds the answer that was
//! reviewed; `UPDATE=1` writes it again.

use std::path::Path;
use std::time::{Duration, Instant};

use transport::session::{Hold, Outcome, source, target};
use transport::wire::Frame;

use crate::inputs::{self, source_inputs, target_inputs};
use crate::places::{SOURCE_STATES, TARGET_STATES, named, way};

/// The table is the one that was reviewed.
#[test]
fn transitions_are_as_reviewed() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/session/table.txt");
    let mut table = String::from(HEAD);
    for (name, ..) in SOURCE_STATES {
        state(&mut table, "source", name, &|inputs| {
            source_case(name, inputs)
        });
    }
    for (name, ..) in TARGET_STATES {
        state(&mut table, "target", name, &|inputs| {
            target_case(name, inputs)
        });
    }
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &table).unwrap();
    }
    let reviewed = std::fs::read_to_string(&path).unwrap();
    let differs = reviewed
        .lines()
        .zip(table.lines())
        .find(|(was, is)| was != is);
    assert!(
        reviewed == table,
        "transitions changed, first here: {differs:?}; if they are meant to, write {} again with \
         UPDATE=1 and review its changes",
        path.display()
    );
}

const HEAD: &str = "\
What each machine does in each state: `input   actions, => new state`, or, where many inputs do the
same, the actions and below them the inputs.
Written by `UPDATE=1 cargo test -p transport --test session`.
";

/// What came of one input.
struct Case {
    input: &'static str,
    actions: Vec<String>,
    before: String,
    after: String,
}

fn state(table: &mut String, side: &str, name: &str, cases: &dyn Fn(&'static str) -> Case) {
    let inputs: Vec<&'static str> = if side == "source" {
        source_inputs().into_iter().map(|(name, _)| name).collect()
    } else {
        target_inputs().into_iter().map(|(name, _)| name).collect()
    };
    let cases: Vec<Case> = inputs.into_iter().map(cases).collect();
    table.push_str(&format!("\n{side}: {name} ({})\n", cases[0].before));
    let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
    for case in cases {
        let mut effects = case.actions;
        if case.before != case.after {
            effects.push(format!("=> {}", case.after));
        }
        let effects = if effects.is_empty() {
            "nothing".into()
        } else {
            effects.join(", ")
        };
        match groups.iter_mut().find(|(known, _)| *known == effects) {
            Some((_, inputs)) => inputs.push(case.input),
            None => groups.push((effects, vec![case.input])),
        }
    }
    groups.sort_by_key(|(effects, inputs)| (effects == "nothing", !is_short(inputs)));
    for (effects, inputs) in groups {
        if !is_short(&inputs) {
            table.push_str(&format!("  {effects}\n"));
            for line in inputs.chunks(4) {
                table.push_str(&format!("      <- {}\n", line.join(" | ")));
            }
        } else {
            table.push_str(&format!("  {:<34} {effects}\n", inputs.join(" | ")));
        }
    }
}

/// Whether the inputs stand in front of what they bring about, not below it.
fn is_short(inputs: &[&str]) -> bool {
    inputs.join(" | ").len() <= 34
}

fn source_case(place: &str, input: &'static str) -> Case {
    let begin = inputs::begin();
    let mut machine = inputs::source(begin, Hold::SwitchoverAck);
    let mut now = begin;
    for name in way(&SOURCE_STATES, place) {
        now += Duration::from_millis(100);
        machine.handle(now, named(source_inputs(), name));
        while machine.poll_action().is_some() {}
    }
    let before = state_of(&machine);
    machine.handle(later(now, input), named(source_inputs(), input));
    let actions = std::iter::from_fn(|| machine.poll_action());
    Case {
        input,
        actions: actions.map(|action| source_text(&action)).collect(),
        before,
        after: state_of(&machine),
    }
}

fn target_case(place: &str, input: &'static str) -> Case {
    let begin = inputs::begin();
    let mut machine = inputs::target(begin);
    while machine.poll_action().is_some() {}
    let mut now = begin;
    for name in way(&TARGET_STATES, place) {
        now += Duration::from_millis(100);
        machine.handle(now, named(target_inputs(), name));
        while machine.poll_action().is_some() {}
    }
    let before = state_of(&machine);
    machine.handle(later(now, input), named(target_inputs(), input));
    let actions = std::iter::from_fn(|| machine.poll_action());
    Case {
        input,
        actions: actions.map(|action| target_text(&action)).collect(),
        before,
        after: state_of(&machine),
    }
}

/// A timer is only heard after its time.
fn later(now: Instant, input: &str) -> Instant {
    let span = if input == "Timer" { 1000 } else { 1 };
    now + Duration::from_secs(span)
}

/// The state as the machine's own `Debug` names it.
fn state_of(machine: &impl std::fmt::Debug) -> String {
    let text = format!("{machine:?}");
    let rest = text.split(" state: ").nth(1).unwrap_or_default();
    word(rest)
}

fn source_text(action: &source::Action) -> String {
    if let source::Action::Send(frame) = action {
        sent(frame)
    } else if let source::Action::Journal(mark) = action {
        format!("Journal {}", short(mark))
    } else if let source::Action::Done(outcome) = action {
        done(outcome)
    } else {
        short(action)
    }
}

fn target_text(action: &target::Action) -> String {
    if let target::Action::Send(frame) = action {
        sent(frame)
    } else if let target::Action::Journal(mark) = action {
        format!("Journal {}", word(&format!("{mark:?}")))
    } else if let target::Action::Done(outcome) = action {
        done(outcome)
    } else {
        short(action)
    }
}

fn sent(frame: &Frame) -> String {
    let mut text = format!("Send {}", frame.name());
    if let Frame::Abort { code, .. } = frame {
        text.push_str(&format!(" {code:?}"));
    }
    if let Frame::Answer { verdict, .. } = frame {
        text.push_str(&format!(" {verdict:?}"));
    }
    text
}

fn done(outcome: &Outcome) -> String {
    if let Outcome::Stayed { code, .. } = outcome {
        format!("Done Stayed {code:?}")
    } else {
        format!("Done {}", word(&format!("{outcome:?}")))
    }
}

/// Name of a value and, if it holds another one, of that.
fn short(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    let outer = word(&text);
    let inner = text.strip_prefix(&format!("{outer}(")).map(word);
    match inner {
        Some(inner) if inner.starts_with(char::is_alphabetic) => format!("{outer} {inner}"),
        Some(_) | None => outer,
    }
}

fn word(text: &str) -> String {
    text.split(|letter: char| !letter.is_alphanumeric())
        .next()
        .unwrap_or_default()
        .to_owned()
}
