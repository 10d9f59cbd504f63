//! What was measured, and how it is shown.

use std::fmt::Write;

use serde_json::{Value, json};

/// Whose figure it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Tarn,
    Qemu,
    /// QEMU, with Debian's qemu-ga in the guest.
    QemuGa,
    /// The machine itself, without a VM: cp, fsync.
    Host,
}

/// What is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Lower,
    Higher,
}

/// One figure, on all sides.
#[derive(Debug)]
struct Figure {
    name: String,
    unit: &'static str,
    better: Better,
    /// By [`Side`].
    samples: [Vec<f64>; 4],
}

/// All figures, in the order they were first added to.
#[derive(Debug, Default)]
pub struct Figures {
    figures: Vec<Figure>,
    /// Runs that gave none, and why.
    failures: Vec<String>,
}

/// What several runs gave.
#[derive(Debug, Clone, Copy)]
struct Summary {
    median: f64,
    min: f64,
    max: f64,
}

impl Summary {
    fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let half = sorted.len() / 2;
        let median =
            if sorted.len() % 2 == 1 { sorted[half] } else { f64::midpoint(sorted[half - 1], sorted[half]) };
        Some(Self { median, min, max })
    }

    fn json(self, samples: &[f64]) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max, "samples": samples })
    }
}

impl Figure {
    fn summary(&self, side: Side) -> Option<Summary> {
        Summary::of(&self.samples[side as usize])
    }

    /// Tarn's median over the other side's.
    fn ratio(&self, side: Side) -> Option<f64> {
        Some(self.summary(Side::Tarn)?.median / self.summary(side)?.median)
    }
}

impl Figures {
    /// Adds a sample.
    pub fn add(&mut self, name: &str, (unit, better): (&'static str, Better), side: Side, sample: f64) {
        let samples = &mut self.figure(name, unit, better).samples;
        samples[side as usize].push(sample);
    }

    /// Adds everything in `more`.
    pub fn append(&mut self, more: Self) {
        for Figure { name, unit, better, samples } in more.figures {
            let figure = self.figure(&name, unit, better);
            for (all, mut new) in figure.samples.iter_mut().zip(samples) {
                all.append(&mut new);
            }
        }
        self.failures.extend(more.failures);
    }

    /// A run gave no figures.
    pub fn failed(&mut self, why: String) {
        self.failures.push(why);
    }

    fn figure(&mut self, name: &str, unit: &'static str, better: Better) -> &mut Figure {
        let index = self.figures.iter().position(|figure| figure.name == name).unwrap_or_else(|| {
            self.figures.push(Figure { name: name.to_owned(), unit, better, samples: Default::default() });
            self.figures.len() - 1
        });
        &mut self.figures[index]
    }

    /// For people. Ratios below 1 are good where lower is better, above 1 where higher is; the others are marked.
    pub fn table(&self) -> String {
        let mut rows = vec![
            [
                "",
                "",
                "Tarn",
                "(min–max)",
                "QEMU",
                "(min–max)",
                "ratio",
                "QEMU + qemu-ga",
                "(min–max)",
                "ratio",
                "host alone",
                "(min–max)",
                "ratio",
            ]
            .map(str::to_owned)
            .to_vec(),
        ];
        for figure in &self.figures {
            let mut row = vec![figure.name.clone(), figure.unit.to_owned()];
            for side in [Side::Tarn, Side::Qemu, Side::QemuGa, Side::Host] {
                match figure.summary(side) {
                    Some(Summary { median, min, max }) => {
                        row.extend([number(median), format!("({}–{})", number(min), number(max))]);
                    }
                    None => row.extend([String::new(), String::new()]),
                }
                if side != Side::Tarn {
                    row.push(figure.ratio(side).map_or_else(String::new, |ratio| {
                        let behind = match figure.better {
                            Better::Lower => ratio > 1.0,
                            Better::Higher => ratio < 1.0,
                        };
                        format!("{ratio:.2}{}", if behind { " ◀" } else { "  " })
                    }));
                }
            }
            rows.push(row);
        }
        let mut text = align(&rows);
        text.push_str("Medians; ratio: Tarn's over the other's; ◀ marks where Tarn is behind\n");
        for failure in &self.failures {
            let _ = writeln!(text, "failed, and tried again: {}", failure.lines().next().unwrap_or_default());
        }
        text
    }

    /// All samples, for those who watch.
    pub fn lines(&self) -> String {
        let mut text = String::new();
        for Figure { name, unit, samples, .. } in &self.figures {
            let samples: Vec<_> = samples.iter().flatten().copied().map(number).collect();
            let _ = writeln!(text, "    {name}: {} {unit}", samples.join(", "));
        }
        text
    }

    /// The runs that gave no figures, in words.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let figure = |figure: &Figure| {
            let mut object = json!({
                "name": figure.name,
                "unit": figure.unit,
                "better": if figure.better == Better::Lower { "lower" } else { "higher" },
            });
            let sides =
                [(Side::Tarn, "tarn"), (Side::Qemu, "qemu"), (Side::QemuGa, "qemu-ga"), (Side::Host, "host")];
            for (side, name) in sides {
                if let Some(summary) = figure.summary(side) {
                    object[name] = summary.json(&figure.samples[side as usize]);
                    if side != Side::Tarn {
                        object[format!("ratio-to-{name}")] = json!(figure.ratio(side));
                    }
                }
            }
            object
        };
        self.figures.iter().map(figure).collect()
    }
}

/// Three significant digits, or all before the point.
fn number(value: f64) -> String {
    let decimals = match value {
        value if value >= 100.0 => 0,
        value if value >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

/// Columns: names to the left, numbers to the right, those that are empty throughout left out.
fn align(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().skip(1).map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..rows[0].len())
        .map(|column| match width(column) {
            0 => 0,
            width => width.max(rows[0][column].chars().count()),
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in
            row.iter().zip(&widths).enumerate().filter(|(_, (_, width))| **width > 0)
        {
            let _ = match column {
                0 | 1 => write!(line, "{cell:<width$}  "),
                _ => write!(line, "{cell:>width$}  "),
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}
