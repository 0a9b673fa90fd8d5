//! Bars on a logarithmic scale, as SVG.

use std::fmt::Write as _;

use crate::table::{Row, Table, Unit};

const WIDTH: f64 = 760.0;
/// Where the bars begin, and the room after them for the figures.
const LEFT: f64 = 230.0;
const RIGHT: f64 = 90.0;
const BAR: f64 = 13.0;
const GAP: f64 = 12.0;
const TOP: f64 = 64.0;
/// Ours first.
const COLOURS: [&str; 4] = ["#0b7285", "#c2255c", "#868e96", "#e8590c"];
const LEAST_BAR: f64 = 2.0;

/// Each unit has a scale of its own, from the power of ten below its smallest value to its greatest one.
pub fn bars(table: &Table) -> String {
    let group = BAR * table.columns.len() as f64 + GAP;
    let height = TOP + group * table.rows.len() as f64 + GAP;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
        font-family=\"sans-serif\" font-size=\"12\">\n\
        <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n\
        <text x=\"12\" y=\"22\" font-size=\"14\">{}</text>\n",
        escaped(&table.title)
    );
    for (column, name) in table.columns.iter().enumerate() {
        let x = LEFT + 150.0 * column as f64;
        put(
            &mut out,
            format_args!(
                "<rect x=\"{x}\" y=\"36\" width=\"{BAR}\" height=\"{BAR}\" fill=\"{}\"/>\
                <text x=\"{}\" y=\"47\">{}</text>",
                COLOURS[column % COLOURS.len()],
                x + BAR + 5.0,
                escaped(name)
            ),
        );
    }
    put(
        &mut out,
        format_args!("<text x=\"12\" y=\"47\" fill=\"#666\">logarithmic, by unit</text>"),
    );
    for (number, row) in table.rows.iter().enumerate() {
        let scale = Scale::of(row.unit, &table.rows);
        let y = TOP + group * number as f64;
        let middle = y + BAR * table.columns.len() as f64 / 2.0 + 4.0;
        put(
            &mut out,
            format_args!("<text x=\"12\" y=\"{middle}\">{}</text>", escaped(row.what)),
        );
        for (column, value) in row.values.iter().enumerate() {
            let Some(value) = *value else { continue };
            let (y, length) = (y + BAR * column as f64, scale.length(value));
            put(
                &mut out,
                format_args!(
                    "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{length:.1}\" height=\"{}\" fill=\"{}\"/>\
                    <text x=\"{:.1}\" y=\"{}\" font-size=\"11\">{}</text>",
                    BAR - 1.0,
                    COLOURS[column % COLOURS.len()],
                    LEFT + length + 5.0,
                    y + BAR - 3.0,
                    row.unit.show(value)
                ),
            );
        }
    }
    out + "</svg>\n"
}

struct Scale {
    /// Decimal logarithms.
    least: f64,
    most: f64,
}

impl Scale {
    fn of(unit: Unit, rows: &[Row]) -> Self {
        let alike = rows.iter().filter(|row| row.unit == unit);
        let logarithms = alike
            .flat_map(|row| row.values.iter().flatten())
            .filter(|value| **value > 0.0)
            .map(|value| value.log10());
        let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
        for logarithm in logarithms {
            least = least.min((logarithm - 0.2).floor());
            most = most.max(logarithm);
        }
        Self { least, most }
    }

    fn length(&self, value: f64) -> f64 {
        let part = (value.log10() - self.least) / (self.most - self.least);
        // Also of zero, whose logarithm is none.
        (part * (WIDTH - LEFT - RIGHT)).max(LEAST_BAR)
    }
}

fn put(out: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "{line}");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
