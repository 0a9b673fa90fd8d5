//! Figures of several servers beside each other: in the terminal, as Markdown, as a plot.

use std::fmt::Write as _;
use std::path::Path;

use crate::plot;

/// What is compared: our own figures come first.
#[derive(Clone, Debug)]
pub struct Table {
    pub title: String,
    pub columns: Vec<String>,
    pub rows: Vec<Row>,
}

#[derive(Clone, Debug)]
pub struct Row {
    pub what: &'static str,
    pub unit: Unit,
    /// One for each column.
    pub values: Vec<Option<f64>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unit {
    Seconds,
    Bytes,
    Count,
    /// Microseconds.
    Micros,
}

impl Unit {
    pub fn show(self, value: f64) -> String {
        match self {
            Self::Seconds if value < 1.0 => format!("{:.0} ms", value * 1e3),
            Self::Seconds if value < 10.0 => format!("{value:.2} s"),
            Self::Seconds => format!("{value:.0} s"),
            Self::Bytes if value < 1e4 => format!("{:.1} kB", value / 1e3),
            Self::Bytes if value < 1e6 => format!("{:.0} kB", value / 1e3),
            Self::Bytes if value < 1e7 => format!("{:.1} MB", value / 1e6),
            Self::Bytes => format!("{:.0} MB", value / 1e6),
            Self::Count => format!("{value:.0}"),
            Self::Micros => format!("{value:.0} us"),
        }
    }
}

/// One server's figures, in the order of the rows.
pub type Figures = Vec<(&'static str, Unit, f64)>;

impl Table {
    /// From several runs of each server, of which the medians are shown.
    pub fn of(title: String, servers: &[(String, Vec<Figures>)]) -> Self {
        let mut rows: Vec<Row> = Vec::new();
        for (column, (_, runs)) in servers.iter().enumerate() {
            for &(what, unit, _) in runs.iter().flatten() {
                let place = rows.iter().position(|row| row.what == what);
                let place = place.unwrap_or_else(|| {
                    rows.push(Row {
                        what,
                        unit,
                        values: vec![None; servers.len()],
                    });
                    rows.len() - 1
                });
                let all = runs.iter().flatten().filter(|figure| figure.0 == what);
                rows[place].values[column] = median(all.map(|figure| figure.2).collect());
            }
        }
        Self {
            title,
            columns: servers.iter().map(|(name, _)| name.clone()).collect(),
            rows,
        }
    }

    fn cells(&self) -> Vec<Vec<String>> {
        let mut header = vec![String::new()];
        header.extend(self.columns.iter().cloned());
        let compared = self.columns.len() > 1;
        if compared {
            header.push("ratio".to_owned());
        }
        let mut cells = vec![header];
        for row in &self.rows {
            let mut line = vec![row.what.to_owned()];
            let show = |value: &Option<f64>| value.map_or("–".to_owned(), |v| row.unit.show(v));
            line.extend(row.values.iter().map(show));
            if compared {
                line.push(match (row.values[0], row.values[1]) {
                    (Some(ours), Some(theirs)) if ours > 0.0 => ratio(theirs / ours),
                    _ => "–".to_owned(),
                });
            }
            cells.push(line);
        }
        cells
    }

    pub fn print(&self) {
        println!("\n{}", self.title);
        let cells = self.cells();
        let width = |column: usize| {
            let lengths = cells.iter().map(|line| line[column].chars().count());
            lengths.max().unwrap_or(0)
        };
        for line in &cells {
            let mut out = String::new();
            for (column, cell) in line.iter().enumerate() {
                let width = width(column);
                // Writing to a string does not fail.
                let _ = match column {
                    0 => write!(out, "  {cell:<width$}"),
                    _ => write!(out, "  {cell:>width$}"),
                };
            }
            println!("{out}");
        }
    }

    pub fn markdown(&self) -> String {
        let mut out = String::new();
        for (number, line) in self.cells().iter().enumerate() {
            out += &format!("| {} |\n", line.join(" | "));
            if number == 0 {
                out += &format!("| --- |{}\n", " ---: |".repeat(line.len() - 1));
            }
        }
        out
    }

    /// `NAME.md` and `NAME.svg` in the directory.
    pub fn save(&self, directory: &Path, name: &str) -> anyhow::Result<()> {
        std::fs::create_dir_all(directory)?;
        let markdown = directory.join(format!("{name}.md"));
        let text = format!("{}\n\n{}", self.title, self.markdown());
        std::fs::write(&markdown, text)?;
        let svg = directory.join(format!("{name}.svg"));
        std::fs::write(&svg, plot::bars(self))?;
        println!("\nin {} and {}", markdown.display(), svg.display());
        Ok(())
    }
}

fn ratio(ratio: f64) -> String {
    match ratio {
        small if small < 10.0 => format!("{small:.1}"),
        big => format!("{big:.0}"),
    }
}

/// Of an even number the lower one.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_theirs_over_ours_of_the_medians() {
        let runs = |values: [f64; 3]| {
            let figures = values.map(|value| vec![("answered", Unit::Seconds, value)]);
            figures.to_vec()
        };
        let servers = [
            ("ours".to_owned(), runs([0.3, 0.1, 0.2])),
            ("theirs".to_owned(), runs([2.0, 9.0, 1.0])),
        ];
        let table = Table::of("a table".to_owned(), &servers);
        let expected = "|  | ours | theirs | ratio |\n| --- | ---: | ---: | ---: |\n\
            | answered | 200 ms | 2.00 s | 10 |\n";
        assert_eq!(table.markdown(), expected);
    }

    #[test]
    fn what_one_server_has_not_has_no_ratio() {
        let servers = [
            (
                "ours".to_owned(),
                vec![vec![("requests", Unit::Count, 3.0)]],
            ),
            ("theirs".to_owned(), vec![Vec::new()]),
        ];
        let table = Table::of("a table".to_owned(), &servers);
        assert!(table.markdown().ends_with("| requests | 3 | – | – |\n"));
    }
}
