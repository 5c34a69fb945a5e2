//! What all charts are drawn with: parts of the SVG, words, and places on a linear scale.

use std::fmt::Write as _;

use super::escape;

/// Values from 0 on, along a line of pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    from: f64,
    per_unit: f64,
}

impl Scale {
    /// 0 stands at `from`, the greatest value at `to`.
    pub(super) fn new(from: f64, to: f64, greatest: f64) -> Scale {
        let per_unit = match greatest > 0.0 {
            true => (to - from) / greatest,
            false => 0.0,
        };
        Scale { from, per_unit }
    }

    pub(super) fn at(self, value: f64) -> f64 {
        self.from + self.length(value)
    }

    /// Pixels of a value.
    pub(super) fn length(self, value: f64) -> f64 {
        value * self.per_unit
    }
}

/// Where the row or panel of this place begins, the first one at `first`, one each `step`.
pub(super) fn row(first: f64, step: f64, place: usize) -> f64 {
    first + step * u16::try_from(place).map_or(0.0, f64::from)
}

pub(super) fn text(svg: &mut String, class: &str, x: f64, y: f64, said: &str) {
    add(
        svg,
        format_args!(
            "<text class='{class}' x='{x:.1}' y='{y:.1}'>{}</text>",
            escape(said)
        ),
    );
}

pub(super) fn add(svg: &mut String, part: std::fmt::Arguments<'_>) {
    svg.write_fmt(part)
        .expect("a string takes all that is written");
}
