//! Charts as SVG, drawn by hand: horizontal bars with their spread, and stacked bars.

use super::draw::{self, Scale, add};
use super::{escape, number};
use crate::report::Spread;

const WIDTH: f64 = 460.0;
const LABEL_WIDTH: f64 = 178.0;
const VALUE_WIDTH: f64 = 62.0;
const ROW_HEIGHT: f64 = 24.0;
const BAR_HEIGHT: f64 = 14.0;
/// Room of one word of a legend.
const LEGEND_WIDTH: f64 = 66.0;

/// One bar.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    pub(super) label: String,
    /// Class in the style sheet, which gives its colour.
    pub(super) class: &'static str,
    /// Nothing where it was not measured.
    pub(super) value: Option<Spread>,
}

/// One stacked bar: the classes of its parts and their values, in the order of drawing.
#[derive(Clone, Debug)]
pub(super) struct Stack {
    pub(super) label: String,
    pub(super) parts: Vec<(String, f64)>,
}

/// Bars from zero; a line shows the least and the greatest value.
pub(super) fn bars(title: &str, digits: usize, bars: &[Bar]) -> String {
    let greatest = bars
        .iter()
        .filter_map(|bar| bar.value)
        .map(|value| value.max);
    let scale = scale(greatest.fold(0.0, f64::max));
    let mut svg = open(title, bars.len(), 0.0);
    for (row, bar) in bars.iter().enumerate() {
        let top = top(row);
        label(&mut svg, top, &bar.label);
        let Some(value) = bar.value else {
            text(&mut svg, LABEL_WIDTH + 4.0, top, "muted", "not arrived");
            continue;
        };
        rect(
            &mut svg,
            LABEL_WIDTH,
            top,
            scale.length(value.median),
            bar.class,
        );
        if value.max > value.min {
            let (from, to) = (scale.at(value.min), scale.at(value.max));
            let middle = top + BAR_HEIGHT / 2.0;
            add(
                &mut svg,
                format_args!(
                    "<path class='spread' d='M{from:.1} {middle:.1}H{to:.1}\
                     M{from:.1} {:.1}v6M{to:.1} {:.1}v6'/>",
                    middle - 3.0,
                    middle - 3.0
                ),
            );
        }
        let said = number(value.median, digits);
        text(&mut svg, scale.at(value.max) + 6.0, top, "value", &said);
    }
    svg + "</svg>"
}

/// Bars of parts, with a legend of all parts that occur.
pub(super) fn stacked(title: &str, digits: usize, stacks: &[Stack]) -> String {
    let total = |stack: &Stack| stack.parts.iter().map(|(_, value)| value).sum::<f64>();
    let scale = scale(stacks.iter().map(total).fold(0.0, f64::max));
    let mut svg = open(title, stacks.len(), ROW_HEIGHT);
    let mut legend: Vec<&str> = Vec::new();
    for (row, stack) in stacks.iter().enumerate() {
        let top = top(row);
        label(&mut svg, top, &stack.label);
        let mut left = LABEL_WIDTH;
        for (class, value) in &stack.parts {
            if *value <= 0.0 {
                continue;
            }
            if !legend.contains(&class.as_str()) {
                legend.push(class);
            }
            rect(
                &mut svg,
                left,
                top,
                scale.length(*value),
                &format!("part-{class}"),
            );
            left += scale.length(*value);
        }
        let said = number(total(stack), digits);
        text(&mut svg, left + 6.0, top, "value", &said);
    }
    let top = top(stacks.len()) + 6.0;
    for (place, class) in (0_u8..).zip(legend) {
        let left = 8.0 + f64::from(place) * LEGEND_WIDTH;
        add(
            &mut svg,
            format_args!(
                "<rect class='part-{class}' x='{left}' y='{:.1}' width='10' height='10' rx='2'/>",
                top + 2.0
            ),
        );
        text(&mut svg, left + 14.0, top, "label-left", class);
    }
    svg + "</svg>"
}

fn scale(greatest: f64) -> Scale {
    Scale::new(LABEL_WIDTH, WIDTH - VALUE_WIDTH, greatest)
}

fn top(row: usize) -> f64 {
    draw::row(28.0, ROW_HEIGHT, row)
}

fn open(title: &str, rows: usize, more: f64) -> String {
    let height = top(rows) + more + 6.0;
    let title = escape(title);
    format!(
        "<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{title}'>\
         <text class='title' x='8' y='16'>{title}</text>\
         <path class='axis' d='M{LABEL_WIDTH} 24V{:.1}'/>",
        top(rows)
    )
}

fn rect(svg: &mut String, left: f64, top: f64, width: f64, class: &str) {
    // A thin line shows that there is something.
    let width = width.max(0.8);
    add(
        svg,
        format_args!(
            "<rect class='{class}' x='{left:.1}' y='{top:.1}' width='{width:.1}' \
             height='{BAR_HEIGHT}' rx='1.5'/>"
        ),
    );
}

fn label(svg: &mut String, top: f64, name: &str) {
    text(svg, LABEL_WIDTH - 8.0, top, "label", name);
}

/// A word in the row that begins at `top`.
fn text(svg: &mut String, left: f64, top: f64, class: &str, said: &str) {
    draw::text(svg, class, left, top + BAR_HEIGHT - 3.0, said);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(label: &str, value: Option<f64>) -> Bar {
        let value = value.map(|median| Spread {
            median,
            min: median,
            max: median,
        });
        Bar {
            label: label.to_owned(),
            class: "ours",
            value,
        }
    }

    /// The longest bar takes the whole width, half of it is half as long, what was not measured has
    /// a word instead, and names are escaped.
    #[test]
    fn lengths() {
        let svg = bars(
            "t",
            1,
            &[bar("a<b", Some(2.0)), bar("c", Some(1.0)), bar("d", None)],
        );
        assert!(
            svg.contains("width='220.0'") && svg.contains("width='110.0'"),
            "{svg}"
        );
        assert!(
            svg.contains("not arrived") && svg.contains("a&lt;b"),
            "{svg}"
        );
        assert!(svg.ends_with("</svg>"));
    }

    /// Parts follow each other and the legend names each once.
    #[test]
    fn stacks() {
        let stack = |label: &str| Stack {
            label: label.to_owned(),
            parts: vec![("raw".to_owned(), 3.0), ("delta".to_owned(), 1.0)],
        };
        let svg = stacked("t", 1, &[stack("a"), stack("b")]);
        assert!(
            svg.contains("x='178.0'") && svg.contains("x='343.0'"),
            "{svg}"
        );
        assert_eq!(svg.matches(">raw</text>").count(), 1, "{svg}");
    }
}
