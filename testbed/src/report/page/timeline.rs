//! A run over time as SVG: panels below each other on one time axis, with the rounds' boundaries and
//! what happened as lines through all of them.

use super::draw::{self, Scale, add, text};
use super::escape;
use crate::report::trace::{Point, Trace};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 46.0;
const PANEL_HEIGHT: f64 = 92.0;
const PANEL_GAP: f64 = 26.0;
/// Labels of events closer than this would lie on each other.
const LABEL_WIDTH: f64 = 74.0;
/// Least value on a logarithmic axis.
const LOG_MIN: f64 = 10.0;

/// One quantity over time, or several that are compared.
struct Panel {
    title: &'static str,
    axis: Axis,
    series: &'static [Series],
}

struct Series {
    /// Class in the style sheet, which gives its colour.
    class: &'static str,
    /// Low and high at a time; equal for a line.
    of: fn(&Point) -> Option<(f64, f64)>,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Axis {
    Linear,
    /// By powers of ten.
    Log,
}

const PANELS: [Panel; 6] = [
    Panel {
        title: "delivered, and applied at the target (darker), Mbit/s",
        axis: Axis::Linear,
        series: &[
            Series {
                class: "rate",
                of: |point| point.rate_bps.map(|rate| both(rate / 1e6)),
            },
            Series {
                class: "goodput",
                of: |point| point.goodput_bps.map(|rate| both(rate / 1e6)),
            },
        ],
    },
    Panel {
        title: "queueing delay, ms",
        axis: Axis::Linear,
        series: &[Series {
            class: "queue",
            of: |point| point.queueing_ms.map(both),
        }],
    },
    Panel {
        title: "left to send, MB on the wire",
        axis: Axis::Linear,
        series: &[Series {
            class: "backlog",
            of: |point| point.backlog_bytes.map(|bytes| both(bytes / 1e6)),
        }],
    },
    Panel {
        title: "pages made dirty, thousands a second",
        axis: Axis::Linear,
        series: &[Series {
            class: "dirty",
            of: |point| point.dirty_pages_per_s.map(|rate| both(rate / 1e3)),
        }],
    },
    Panel {
        title: "predicted downtime, ms",
        axis: Axis::Log,
        series: &[Series {
            class: "downtime",
            of: |point| {
                let range = point.predicted_downtime_ms;
                range.map(|range| (range.low, range.high))
            },
        }],
    },
    Panel {
        title: "guest slowed by, %",
        axis: Axis::Linear,
        series: &[Series {
            class: "throttle",
            of: |point| {
                let percent = point.throttle_percent;
                percent.filter(|percent| *percent > 0.0).map(both)
            },
        }],
    },
];

impl Panel {
    /// The greatest value; `None` where nothing is known of it.
    fn greatest(&self, trace: &Trace) -> Option<f64> {
        let series = self.series.iter();
        let values = series.flat_map(|series| trace.points.iter().filter_map(series.of));
        values.map(|(_, high)| high).reduce(f64::max)
    }
}

fn both(value: f64) -> (f64, f64) {
    (value, value)
}

/// The chart; `asked_ms` is the downtime that was asked for. Quantities that the trace has nothing of
/// have no panel.
pub(super) fn chart(title: &str, trace: &Trace, asked_ms: Option<f64>) -> String {
    let panels: Vec<&Panel> = PANELS
        .iter()
        .filter(|panel| panel.greatest(trace).is_some())
        .collect();
    let span_ms = trace
        .points
        .iter()
        .map(|point| point.t_ms)
        .chain(trace.events.iter().map(|event| event.t_ms))
        .fold(1.0, f64::max);
    let bottom = top(panels.len()) - PANEL_GAP;
    let mut svg = format!(
        "<svg class='timeline' viewBox='0 0 {WIDTH} {:.0}' role='img' aria-label='{}'>",
        bottom + 34.0,
        escape(title)
    );
    let time = Scale::new(LEFT, WIDTH - RIGHT, span_ms);
    for ms in trace.rounds_ms() {
        line(&mut svg, "round", time.at(ms), bottom);
    }
    events(&mut svg, trace, time, bottom);
    for (place, panel) in panels.iter().enumerate() {
        let asked_ms = asked_ms.filter(|_| panel.axis == Axis::Log);
        draw(&mut svg, panel, trace, time, top(place), asked_ms);
    }
    seconds(&mut svg, time, span_ms, bottom);
    svg + "</svg>"
}

fn top(place: usize) -> f64 {
    draw::row(TOP, PANEL_HEIGHT + PANEL_GAP, place)
}

/// Where a value stands in a panel.
#[derive(Clone, Copy)]
struct Height {
    axis: Axis,
    top: f64,
    max: f64,
}

impl Height {
    fn at(self, value: f64) -> f64 {
        let share = match self.axis {
            Axis::Linear => value / self.max,
            Axis::Log => (value.max(LOG_MIN) / LOG_MIN).log10() / (self.max / LOG_MIN).log10(),
        };
        self.top + PANEL_HEIGHT * (1.0 - share.clamp(0.0, 1.0))
    }

    /// Values that are written beside the axis.
    fn ticks(self) -> Vec<f64> {
        match self.axis {
            Axis::Linear => vec![0.0, self.max / 2.0, self.max],
            Axis::Log => {
                let mut ticks = vec![LOG_MIN];
                while ticks
                    .last()
                    .is_some_and(|last| last * 10.0 <= self.max * 1.001)
                {
                    ticks.extend(ticks.last().map(|last| last * 10.0));
                }
                ticks
            }
        }
    }
}

fn draw(svg: &mut String, panel: &Panel, trace: &Trace, time: Scale, top: f64, asked: Option<f64>) {
    let greatest = panel.greatest(trace).unwrap_or(0.0);
    let greatest = greatest.max(asked.unwrap_or(0.0));
    let max = match panel.axis {
        Axis::Linear => round_up(greatest),
        Axis::Log => 10_f64.powf(greatest.max(LOG_MIN * 10.0).log10().ceil()),
    };
    let scale = Height {
        axis: panel.axis,
        top,
        max,
    };
    text(svg, "title", LEFT, top - 7.0, panel.title);
    for tick in scale.ticks() {
        let y = scale.at(tick);
        add(
            svg,
            format_args!(
                "<path class='axis' d='M{LEFT} {y:.1}H{:.1}'/>",
                WIDTH - RIGHT
            ),
        );
        text(svg, "label", LEFT - 6.0, y + 4.0, &tick_word(tick));
    }
    if let Some(asked) = asked {
        let y = scale.at(asked);
        add(
            svg,
            format_args!(
                "<path class='asked' d='M{LEFT} {y:.1}H{:.1}'/>",
                WIDTH - RIGHT
            ),
        );
    }
    for series in panel.series {
        for part in known(trace, series) {
            curve(svg, series.class, &part, time, scale);
        }
    }
}

/// Time, low and high of a point.
type Known = (f64, f64, f64);

/// A line, or the band between low and high.
fn curve(svg: &mut String, class: &str, part: &[Known], time: Scale, scale: Height) {
    let at = |point: &Known, value: f64| format!("{:.1} {:.1}", time.at(point.0), scale.at(value));
    let highs: Vec<String> = part.iter().map(|point| at(point, point.2)).collect();
    let highs = highs.join("L");
    if part.iter().all(|point| point.1 >= point.2) {
        add(
            svg,
            format_args!("<path class='line {class}' d='M{highs}'/>"),
        );
        return;
    }
    let lows: Vec<String> = part.iter().rev().map(|point| at(point, point.1)).collect();
    let lows = lows.join("L");
    add(
        svg,
        format_args!("<path class='band {class}' d='M{highs}L{lows}Z'/>"),
    );
}

/// Spans in which the quantity was known.
fn known(trace: &Trace, series: &Series) -> Vec<Vec<Known>> {
    let mut parts = vec![Vec::new()];
    for point in &trace.points {
        match ((series.of)(point), parts.last_mut()) {
            (Some((low, high)), Some(part)) => part.push((point.t_ms, low, high)),
            (None, Some(part)) if !part.is_empty() => parts.push(Vec::new()),
            (Some(_) | None, _) => {}
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn events(svg: &mut String, trace: &Trace, time: Scale, bottom: f64) {
    // Two rows of words: what follows at once stands below.
    let mut free_from = [0.0; 2];
    for event in &trace.events {
        // Rounds have lines of their own, without words, and the search for the stop arms QEMU often.
        if event.event.starts_with("round") || ["arm", "disarm"].contains(&event.event.as_str()) {
            continue;
        }
        let x = time.at(event.t_ms);
        line(svg, "event", x, bottom);
        let x = x.min(WIDTH - LABEL_WIDTH);
        if let Some(row) = free_from.iter().position(|from| x >= *from) {
            let y = if row == 0 { 12.0 } else { 25.0 };
            text(svg, "muted", x + 3.0, y, &event.event);
            free_from[row] = x + LABEL_WIDTH;
        }
    }
}

fn seconds(svg: &mut String, time: Scale, span_ms: f64, bottom: f64) {
    let step = round_up(span_ms / 1000.0 / 8.0);
    let mut at_s = 0.0;
    while at_s * 1000.0 <= span_ms {
        text(
            svg,
            "tick",
            time.at(at_s * 1000.0),
            bottom + 17.0,
            &format!("{} s", tick_word(at_s)),
        );
        at_s += step;
    }
}

/// The next of 1, 2, 4, 5, 8, 10 times a power of ten.
fn round_up(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 4.0, 5.0, 8.0];
    let fits = steps
        .into_iter()
        .find(|step| step * power >= value * 0.999_999);
    fits.unwrap_or(10.0) * power
}

fn tick_word(value: f64) -> String {
    let digits = match value {
        value if value >= 10.0 || value == value.round() => 0,
        value if value >= 1.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

fn line(svg: &mut String, class: &str, x: f64, bottom: f64) {
    add(
        svg,
        format_args!(
            "<path class='{class}' d='M{x:.1} {:.1}V{bottom:.1}'/>",
            TOP - 18.0
        ),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::trace::{Event, Range};

    fn trace() -> Trace {
        let point = |t_ms: f64, high: f64| Point {
            t_ms,
            rate_bps: Some(8e7),
            round: Some((t_ms / 500.0).floor()),
            predicted_downtime_ms: (t_ms != 400.0).then_some(Range {
                low: high / 2.0,
                high,
            }),
            ..Point::default()
        };
        Trace {
            points: (0..=10)
                .map(|step| point(f64::from(step) * 100.0, 4000.0))
                .collect(),
            events: vec![Event {
                t_ms: 900.0,
                event: "a<b".to_owned(),
            }],
        }
    }

    /// Two quantities are known, so there are two panels; one of them in two parts, with the asked
    /// downtime across; rounds and events are lines; words are escaped.
    #[test]
    fn panels() {
        let svg = chart("t", &trace(), Some(300.0));
        let count = |what: &str| svg.matches(what).count();
        assert_eq!(
            (count("class='title'"), count("class='line rate'")),
            (2, 1),
            "{svg}"
        );
        assert_eq!(
            (count("class='band downtime'"), count("class='asked'")),
            (2, 1)
        );
        assert_eq!((count("class='round'"), count("class='event'")), (2, 1));
        assert!(svg.contains("a&lt;b") && !svg.contains("NaN") && !svg.contains("inf"));
        assert!(svg.ends_with("</svg>"));
    }

    /// A trace without a point has no panel and no wrong number.
    #[test]
    fn nothing() {
        let svg = chart("t", &Trace::default(), Some(300.0));
        assert!(
            !svg.contains("class='title'") && !svg.contains("NaN"),
            "{svg}"
        );
    }

    #[test]
    fn round_numbers() {
        assert_eq!(
            [0.0, 0.03, 1.0, 6.0, 81.0].map(round_up),
            [1.0, 0.04, 1.0, 8.0, 100.0]
        );
    }
}
